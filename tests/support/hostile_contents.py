"""Checkpoints and arrays that are not what they seem."""

from __future__ import annotations

import io
import struct
import zipfile
from collections.abc import Callable

from malicious_files import as_archive
from pickle_assembler import call, name, tensor, value, whole


def safetensors(entry: str) -> bytes:
    header = f'{{"w":{{"dtype":"F32","shape":[2],"data_offsets":[0,{entry}]}}}}'.encode()
    return struct.pack("<Q", len(header)) + header + bytes(8)


def complex_keys() -> bytes:
    """c(a, b) hashes to a + 1000003 b: thousands of keys with one hash."""
    pairs = b"".join(call("builtins.complex", 1_000_003 * i, -i) + b"N" for i in range(20_000))
    return whole(b"}(" + pairs + b"u")


def ordered_keys() -> bytes:
    """Integers that hash to zero, in the list that OrderedDict is made of."""
    items = [[i * ((1 << 61) - 1), None] for i in range(1, 20_000)]
    return whole(call("collections.OrderedDict", items))


def overlapping(copies: int) -> bytes:
    """A table of contents with many records over the same megabyte."""
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w") as archive:
        archive.writestr("archive/data.pkl", whole(value({"w": tensor()})))
        archive.writestr("archive/data/0", bytes(1 << 20))
    raw = target.getvalue()
    start = raw.rfind(b"PK\x01\x02")
    end = raw.rfind(b"PK\x05\x06")
    entry = bytearray(raw[start:end])
    table = raw[raw.find(b"PK\x01\x02") : start]
    for number in range(copies):
        entry[-1:] = b"0"
        table += bytes(entry[:-1]).replace(b"archive/data/", f"archive/dat{number:02}".encode()) + b"0"
    count = copies + 1
    at = raw.find(b"PK\x01\x02")
    return raw[:at] + table + struct.pack("<4sHHHHIIH", b"PK\x05\x06", 0, 0, count, count, len(table), at, 0)


def script(text: str) -> bytes:
    pickled = whole(call("__torch__.Net") + value({"w": tensor()}) + b"b")
    return as_archive(
        pickled, zipfile.ZIP_DEFLATED, **{"constants.pkl": whole(b")"), "code/__torch__.py": text.encode()}
    )


def one_module_many_times() -> bytes:
    parameters = {f"p{i}": b"h\x01" for i in range(3000)}
    module = (
        call("torch.nn.Module") + value({"_parameters": parameters, "_buffers": {}, "_modules": {}}) + b"b"
    )
    wrapped = [
        call("torch.nn.Module")
        + value({"_parameters": {}, "_buffers": {}, "_modules": {"m": b"h\x02"}})
        + b"b"
        for _ in range(3000)
    ]
    return as_archive(
        whole(
            tensor() + b"q\x010" + module + b"q\x020" + value({f"model{i}": x for i, x in enumerate(wrapped)})
        )
    )


FILES: dict[str, Callable[[], bytes]] = {
    "an offset that is infinite": lambda: safetensors("Infinity"),
    "an offset of 4,300 digits": lambda: safetensors("9" * 4300),
    "an entry that is a number": lambda: struct.pack("<Q", 7) + b'{"w":3}',
    "complex keys with one hash": complex_keys,
    "keys of an OrderedDict with one hash": ordered_keys,
    "records over the same bytes": lambda: overlapping(60),
    "a list of parameters without an end": lambda: script(
        "class Net(Module):\n" + "  __parameters__ = [\n" * 60_000 + "  w : Tensor\n"
    ),
    "a module in thousands of places": one_module_many_times,
}


def npy(shape: str, body: bytes = bytes(24), kind: str = "<f4") -> bytes:
    header = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + body


def npz(content: bytes, method: int = zipfile.ZIP_DEFLATED) -> bytes:
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w") as archive:
        archive.writestr("images.npy", content, method)
    return target.getvalue()


def batches(copies: int) -> bytes:
    """A list that holds one tensor of a megabyte again and again."""
    pid = value(("storage", name("torch.FloatStorage"), "0", "cpu", 1 << 18)) + b"Q"
    body = tensor((1 << 9, 1 << 9), (1 << 9, 1), where=pid) + b"q\x010" + b"](" + b"h\x01" * copies + b"e"
    return as_archive(whole(body), **{"data/0": bytes(1 << 20)})


ARRAYS: dict[str, tuple[str, Callable[[], bytes]]] = {
    "a shape beyond 64 bits": ("a.npy", lambda: npy("(9223372036854775808, 2)")),
    "a shape whose product overflows": ("a.npy", lambda: npy("(4, 65535, 2147483648, 4611686018427387903)")),
    "a negative shape": ("a.npy", lambda: npy("(-3, -2)")),
    "a billion samples in 24 bytes": ("a.npy", lambda: npy("(1000000000, 2)")),
    "a header of minus signs": ("a.npy", lambda: npy("-" * 8000 + "1")),
    "a header of brackets": ("a.npy", lambda: npy("(" * 5000)),
    "a header of blanks": ("a.npy", lambda: npy("(3, 2)" + " " * 5000)),
    "text that is no Python": ("a.npy", lambda: npy("('")),
    "a type of two gigabytes": ("a.npy", lambda: npy("(3, 2)", kind="|V2147483647")),
    "an archive that claims gigabytes": ("a.npz", lambda: npz(npy("(1000000, 1000)", bytes(2000)))),
    "an archive that inflates to much": ("a.npz", lambda: npz(npy("(5000, 5000)", bytes(100_000_000)))),
    "an archive of another method": ("a.npz", lambda: npz(npy("(3, 2)"), zipfile.ZIP_LZMA)),
    "one batch again and again": ("a.pt", lambda: batches(10_000)),
    "a bytearray of gigabytes": ("a.pt", lambda: as_archive(whole(call("builtins.bytearray", 1 << 33)))),
}
