"""The inert reader against pickle and torch.load: values equal bit for bit, nothing of the classes named."""

from __future__ import annotations

import argparse
import collections
import datetime
import enum
import io
import pathlib
import pickle
import types
import uuid
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from format_files import old_tar
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ckpt_tools.errors import CheckpointError
from ckpt_tools.storage.contents.recorded_values import plain_words
from ckpt_tools.storage.formats.module_trees import module_class_name, module_drop_rates, module_state
from ckpt_tools.storage.formats.pickles import OpaqueObject, load_archive, load_pickle, load_stream

DTYPES = [
    torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128,
    torch.bool, torch.uint8, torch.uint16, torch.uint32, torch.uint64,
    torch.int8, torch.int16, torch.int32, torch.int64,
    torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz,
    torch.float8_e8m0fnu,
]  # fmt: skip


def net() -> nn.Sequential:
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.25))
    body.register_buffer("passing", torch.ones(2), persistent=False)
    return nn.Sequential(body, nn.Flatten(), nn.Linear(4, 2), nn.Identity())


def numbers(dtype: torch.dtype, *shape: int) -> Tensor:
    count = int(np.prod(shape)) * dtype.itemsize
    raw = torch.randint(0, 2 if dtype == torch.bool else 256, (count,), dtype=torch.uint8)
    return raw.view(dtype).reshape(shape)


def assert_bits(found: object, expected: Tensor) -> None:
    assert type(found) is Tensor
    assert not found.requires_grad
    assert (found.dtype, found.shape, found.stride()) == (expected.dtype, expected.shape, expected.stride())
    assert (found.is_conj(), found.is_neg()) == (expected.is_conj(), expected.is_neg())
    assert found.storage_offset() == expected.storage_offset()
    assert bytes(found.untyped_storage()) == bytes(expected.untyped_storage())


def assert_module(found: object, model: nn.Module) -> None:
    state = module_state(found)
    assert state is not None
    assert list(state) == list(model.state_dict())
    for key, tensor in model.state_dict().items():
        assert torch.equal(state[key], tensor)  # type: ignore[arg-type]


def written(content: object, how: str) -> bytes:
    """``content`` as torch.save ("zip", "legacy") or pickle ("0" to "5") writes it."""
    if how.isdigit():
        return pickle.dumps(content, protocol=int(how))
    target = io.BytesIO()
    torch.save(content, target, _use_new_zipfile_serialization=how == "zip")
    return target.getvalue()


def read(raw: bytes) -> object:
    return load_stream(io.BytesIO(raw))


HOW = ["zip", "legacy", *"012345"]

# --- plain data ---------------------------------------------------------------------------------------------

LEAVES = (
    st.none() | st.booleans() | st.integers() | st.integers(-(2**200), 2**200) | st.text(max_size=8)
    | st.floats(allow_nan=False) | st.binary(max_size=8) | st.complex_numbers(allow_nan=False)
    | st.binary(max_size=4).map(bytearray)
    | st.sampled_from([..., torch.float16, torch.bfloat16, torch.strided])
    | st.datetimes() | st.dates() | st.times() | st.timedeltas()
    | st.builds(slice, st.integers(0, 9), st.none()) | st.datetimes(timezones=st.just(datetime.UTC))
)  # fmt: skip
KEYS = (
    st.text(max_size=4)
    | st.integers(-(2**40), 2**40)
    | st.none()
    | st.tuples(st.integers(0, 9), st.text(max_size=2))
)
DATA = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(KEYS, inner, max_size=4)
        | st.dictionaries(KEYS, inner, max_size=4).map(collections.OrderedDict)
        | st.dictionaries(KEYS, inner, max_size=3).map(lambda items: collections.defaultdict(list, items))
        | st.sets(KEYS, max_size=4)
        | st.frozensets(KEYS, max_size=4)
        | st.dictionaries(st.from_regex("[a-z]{1,3}", fullmatch=True), inner, max_size=3).map(
            lambda items: argparse.Namespace(**items)
        )
    ),
    max_leaves=20,
)


@settings(max_examples=60)
@given(DATA, st.sampled_from(HOW))
def test_plain_data_comes_back(content: object, how: str) -> None:
    assert read(written(content, how)) == content


@settings(max_examples=60)
@given(st.binary(max_size=60))
def test_any_bytes_are_a_value_or_an_error(raw: bytes) -> None:
    for content in (raw, b"\x80\x04" + raw, raw + b"."):
        try:
            read(content)
        except CheckpointError as error:
            assert "found" in str(error) or "cut short" in str(error)  # noqa: PT017


def test_containers_that_are_shared_or_hold_themselves() -> None:
    loop: dict[str, object] = {}
    loop["again"] = loop
    shared = [1]
    found = read(pickle.dumps({"loop": loop, "a": shared, "b": shared}))
    assert isinstance(found, dict)
    assert found["loop"]["again"] is found["loop"]
    assert found["a"] is found["b"]


# --- tensors ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_bit_for_bit(dtype: torch.dtype, how: str) -> None:
    whole = numbers(dtype, 4, 6)
    views = {
        "whole": whole,
        "t": whole.t(),
        "row": whole[1],
        "empty": whole[:0],
        "one": whole[0, 0],
        "gap": whole[:, ::2],
    }
    raw = written(views, how)
    found = read(raw)
    assert isinstance(found, dict)
    for key, expected in views.items():
        assert_bits(found[key], expected)
    if how in ("zip", "legacy"):
        assert len({tensor.untyped_storage().data_ptr() for tensor in found.values()}) == 1


@settings(max_examples=60)
@given(st.data(), st.sampled_from(HOW))
def test_any_view_that_torch_can_make(data: st.DataObject, how: str) -> None:
    size = data.draw(st.lists(st.integers(0, 3), max_size=4))
    stride = data.draw(st.lists(st.integers(0, 5), min_size=len(size), max_size=len(size)))
    offset = data.draw(st.integers(0, 4))
    tensor = torch.arange(64.0).as_strided(size, stride, offset)
    assert_bits(read(written(tensor, how)), tensor)


def test_lazy_conjugates_negatives_and_parameters() -> None:
    z = torch.randn(3, dtype=torch.complex64)
    content = {"conj": z.conj(), "neg": torch._neg_view(torch.ones(2)), "p": nn.Parameter(torch.ones(2))}
    for how in HOW:
        found, expected = read(written(content, how)), torch.load(io.BytesIO(written(content, "zip")))
        assert isinstance(found, dict)
        for key in content:
            assert type(found[key]) is Tensor
            assert torch.equal(
                found[key].resolve_conj().resolve_neg(), expected[key].resolve_conj().resolve_neg()
            )


def test_big_endian_archives(tmp_path: Path) -> None:
    tensors = {"f": torch.arange(4.0), "h": torch.arange(4).half(), "u": torch.arange(4, dtype=torch.uint8)}
    torch.save(tensors, tmp_path / "little")
    with zipfile.ZipFile(tmp_path / "little") as source, zipfile.ZipFile(tmp_path / "big", "w") as target:
        for name in source.namelist():
            content = source.read(name)
            target.writestr(name, b"big" if name.endswith("byteorder") else content)
    expected = torch.load(tmp_path / "big", weights_only=False)
    found = load_pickle(tmp_path / "big")
    assert isinstance(found, dict)
    assert all(torch.equal(found[key], expected[key]) for key in tensors)


@pytest.mark.parametrize("legacy", [False, True])
def test_large_storages_are_mapped(tmp_path: Path, legacy: bool) -> None:
    torch.save({"w": torch.ones(1 << 20)}, tmp_path / "x.pt", _use_new_zipfile_serialization=not legacy)
    found = load_pickle(tmp_path / "x.pt")
    assert isinstance(found, dict)
    found["w"][0] = 7  # private: the file stays as it is
    assert torch.equal(torch.load(tmp_path / "x.pt")["w"], torch.ones(1 << 20))
    mapped = [line for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith("x.pt")]
    assert mapped or legacy


@pytest.mark.filterwarnings("ignore")  # torch's own reader of this format uses what newer Pythons deprecate
def test_tar_archives_of_2016(tmp_path: Path) -> None:
    tensors = {"w": torch.randn(3, 4), "b": torch.randn(3)}
    old_tar(tmp_path / "x.pt", tensors)
    expected = torch.load(tmp_path / "x.pt", weights_only=False)
    for found in (load_pickle(tmp_path / "x.pt"), load_pickle(tmp_path / "x.pt", trust=True)):
        assert isinstance(found, dict)
        assert all(torch.equal(found[key], expected[key]) for key in tensors)
    raw = (tmp_path / "x.pt").read_bytes()
    for stop in range(0, len(raw), 97):
        (tmp_path / "cut").write_bytes(raw[:stop])
        try:
            load_pickle(tmp_path / "cut")
        except CheckpointError:
            continue


# --- numpy --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", HOW)
def test_arrays_are_the_weights_where_nothing_else_is(how: str) -> None:
    arrays = {
        "c": np.arange(6.0).reshape(2, 3), "f": np.asfortranarray(np.arange(6, dtype="i4").reshape(2, 3)),
        "big": np.arange(3, dtype=">f4"), "bool": np.array([True, False]), "scalar": np.array(3.0, "f2"),
        "empty": np.zeros((0, 2)), "complex": np.array([1j]),
    }  # fmt: skip
    found = read(written(arrays, how))
    assert isinstance(found, dict)
    for key, array in arrays.items():
        assert type(found[key]) is Tensor
        np.testing.assert_array_equal(found[key].numpy(), array)
        assert found[key].dtype.itemsize == array.dtype.itemsize


def test_arrays_beside_tensors_and_odd_arrays_stay_opaque() -> None:
    odd = {
        "o": np.array([object], dtype=object),
        "text": np.array(["a"]),
        "when": np.array(["2024"], "M8[s]"),
    }
    for content in (odd, {"w": torch.ones(2), "a": np.ones(2)}):
        found = read(pickle.dumps(content))
        assert isinstance(found, dict)
        assert {key for key, value in found.items() if type(value) is OpaqueObject} == set(content) - {"w"}
        assert (
            repr(next(value for value in found.values() if type(value) is OpaqueObject)) == "<numpy.ndarray>"
        )


# --- names --------------------------------------------------------------------------------------------------


class Colour(enum.Enum):
    RED = "red"


class Config:
    def __init__(self) -> None:
        self.lr = 0.1
        self.inner = types.SimpleNamespace(a=1)
        self.colour = Colour.RED
        self.items = "shadows nothing"


class Slots:
    __slots__ = ("a",)


class Settings(dict[str, object]):
    pass


class Names(list[str]):
    pass


@pytest.mark.parametrize("how", HOW)
def test_foreign_classes_are_opaque_but_readable(how: str) -> None:
    words = {
        "config": Config(),
        "settings": Settings(a=1),
        "names": Names(["x"]),
        "type": Config,
        "id": uuid.UUID(int=5),
    }
    found = read(written(words, how))
    assert isinstance(found, dict)
    assert type(found["config"]) is OpaqueObject
    assert found["config"].name == f"{__name__}.Config"
    plain = {"lr": 0.1, "inner": {"a": 1}, "colour": "red", "items": "shadows nothing"}
    assert plain_words(found) == {
        "config": plain,
        "settings": {"a": 1}, "names": ["x"], "type": f"<{__name__}.Config>", "id": str(uuid.UUID(int=5))
    }  # fmt: skip


def test_paths_devices_sizes_and_numbers() -> None:
    content = {
        "path": pathlib.PurePosixPath("/a/b"), "device": torch.device("cuda", 1), "size": torch.Size([1, 2]),
        "deque": collections.deque([1], 3), "count": collections.Counter("aab"), "np": np.float32(0.5),
        "dt": np.dtype("f4"),
    }  # fmt: skip
    for how in HOW:
        found = read(written(content, how))
        assert isinstance(found, dict)
        assert (found["path"], found["device"], found["size"]) == ("/a/b", torch.device("cuda", 1), (1, 2))
        assert (found["deque"], found["count"], found["np"]) == ([1], {"a": 2, "b": 1}, 0.5)
        assert found["dt"].name == "numpy.dtype"


def test_words_are_bounded() -> None:
    wide: list[object] = [1]
    for _ in range(12):
        wide = [wide] * 10
    words = plain_words({"a": 1, "wide": wide, "big": 1 << 9999, "odd": "\ud800", "b": 2})
    assert words == {"a": 1, "wide": words["wide"], "big": "<int of 10,000 bits>", "odd": "\\ud800", "b": 2}
    assert len(str(words)) < 10_000_000


# --- modules ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", HOW)
def test_a_pickled_module_yields_its_state_dict(how: str) -> None:
    model = net()
    model[2].tied = model[2].weight
    found = read(written(model, how))
    assert_module(found, model)
    assert module_class_name(found) == "torch.nn.modules.container.Sequential"
    assert module_drop_rates(found) == {"0.2": {"p": 0.25}}
    state = module_state(found) or {}
    assert state["2.tied"] is state["2.weight"]


def test_wrapped_modules_come_with_their_prefixes() -> None:
    for wrap in (
        nn.DataParallel,
        torch.optim.swa_utils.AveragedModel,
        torch.compile,
        torch.fx.symbolic_trace,
    ):
        model = wrap(net())
        found = read(written(model, "zip"))
        assert_module(found, model)
        if wrap is not torch.fx.symbolic_trace:
            assert module_class_name(found) == "torch.nn.modules.container.Sequential"


@pytest.mark.filterwarnings("ignore")  # torch deprecates TorchScript
@pytest.mark.parametrize("how", ["script", "trace"])
def test_torchscript_archives(tmp_path: Path, how: str) -> None:
    model = net().eval()
    script = torch.jit.script(model) if how == "script" else torch.jit.trace(model, torch.zeros(1, 3, 3, 3))
    torch.jit.save(script, tmp_path / "x.pt")
    found = load_archive(tmp_path / "x.pt")
    state = module_state(found) or {}
    expected = script.state_dict()
    assert [key for key in state if key in expected] == list(expected)
    assert all(torch.equal(state[key], expected[key]) for key in expected)  # type: ignore[arg-type]
    assert module_class_name(found).endswith("Sequential")
    assert isinstance(load_archive(tmp_path / "x.pt", "constants.pkl"), tuple)


def test_what_is_no_module() -> None:
    for value in (None, {}, torch.ones(2), OpaqueObject("a.b"), OpaqueObject("a.b", ())):
        assert module_state(value) is None
        assert module_drop_rates(value) == {}
        assert module_class_name(value) == ""


# --- errors and trust ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", HOW)
def test_cut_anywhere(how: str) -> None:
    raw = written({"w": torch.randn(3, 4), "args": argparse.Namespace(a=[1, 2])}, how)
    for stop in {*range(0, len(raw) - 1, max(1, len(raw) // 60)), len(raw) - 1}:
        with pytest.raises(CheckpointError):
            read(raw[:stop])


def test_errors_name_the_file_and_the_next_step(tmp_path: Path) -> None:
    (tmp_path / "x.pt").write_bytes(b"\x80\x02}")
    with pytest.raises(
        CheckpointError, match=r"x\.pt: expected a complete checkpoint, found .*copy or download it again"
    ):
        load_pickle(tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_pickle(tmp_path / "gone.pt")
    torch.save({}, tmp_path / "y.pt")
    with pytest.raises(CheckpointError, match=r"there is no other\.pkl"):
        load_archive(tmp_path / "y.pt", "other.pkl")


@pytest.mark.parametrize("how", HOW)
def test_trust_brings_the_real_classes(tmp_path: Path, how: str) -> None:
    (tmp_path / "x.pt").write_bytes(written(net(), how))
    model = load_pickle(tmp_path / "x.pt", trust=True)
    assert isinstance(model, nn.Sequential)
    assert_module(load_pickle(tmp_path / "x.pt"), model)


def test_reading_twice_gives_tensors_of_their_own() -> None:
    raw = written({"w": torch.ones(3)}, "4")
    first, second = read(raw), read(raw)
    assert isinstance(first, dict)
    first["w"].zero_()
    assert isinstance(second, dict)
    assert torch.equal(second["w"], torch.ones(3))


@pytest.mark.parametrize("key", ["größe.weight", "数.bias"])
@pytest.mark.parametrize("instruction", ["U{0:c}{1}", "T{0:c}\0\0\0{1}", "S'{1}'\n"])
def test_strings_of_python_2_are_utf_8_first(instruction: str, key: str) -> None:
    """Python 2 wrote keys as bytes, which torch.load reads as UTF-8. Other bytes become Latin-1."""
    raw = f"({instruction.format(len(key.encode()), key)}K\x01d.".encode()
    assert load_stream(io.BytesIO(raw)) == pickle.loads(raw, encoding="utf-8") == {key: 1}
    assert load_stream(io.BytesIO(b"(U\x05gr\xf6\xdfeK\x01d.")) == {"größe": 1}


@pytest.mark.parametrize("content", [b"\xc3\xa9", b"\xff\xe9", b"ab"])
def test_arrays_of_python_2_keep_every_byte(content: bytes) -> None:
    """Bytes that happen to be UTF-8 are no text in an array."""
    raw = (
        b"\x80\x02}U\x01wcnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
        b"(K\x01K\x02\x85cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xff"
        b"K\x00tb\x89U\x02" + content + b"tbs."
    )
    array = load_stream(io.BytesIO(raw))
    assert isinstance(array, dict)
    assert bytes(array["w"].tolist()) == content
