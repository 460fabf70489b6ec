"""The instructions that push a plain value: numbers, texts, bytes."""

from __future__ import annotations

import codecs
import pickle
import struct
from collections.abc import Callable
from functools import partial

from ckpt_tools.storage.formats.pickles.pickle_limits import MalformedFileError
from ckpt_tools.storage.formats.pickles.stack_machine import PickleMachine

__all__ = ["LITERAL_INSTRUCTIONS", "decode_text", "push_value"]


def push_value(value: object, m: PickleMachine) -> None:
    """Put a value on the stack."""
    m.stack.append(value)


def _bytes(width: int, convert: Callable[[bytes], object], m: PickleMachine) -> None:
    m.stack.append(convert(m.take_bytes(m.take_integer(width))))


def _short_bytes(convert: Callable[[bytes], object], m: PickleMachine) -> None:
    m.stack.append(convert(m.take_bytes(m.take_byte())))


def _byte(m: PickleMachine) -> None:
    m.stack.append(m.take_byte())


def _push_unsigned(width: int, m: PickleMachine) -> None:
    m.stack.append(m.take_integer(width))


def _binint(m: PickleMachine) -> None:
    m.stack.append(m.take_integer(4, signed=True))


def decode_text(raw: bytes) -> str:
    """UTF-8 as pickle writes it, which may hold half characters."""
    return raw.decode("utf-8", "surrogatepass")


def _old_text(raw: bytes) -> str:
    return raw.decode("latin-1")  # what Python 2 called a string may be the bytes of an array


def _long(raw: bytes) -> int:
    return int.from_bytes(raw, "little", signed=True)


def _int_line(m: PickleMachine) -> None:
    line = m.take_line()
    m.stack.append(line == b"01" if line in (b"00", b"01") else int(line))


def _long_line(m: PickleMachine) -> None:
    m.stack.append(int(m.take_line().removesuffix(b"L")))


def _float_line(m: PickleMachine) -> None:
    m.stack.append(float(m.take_line()))


def _binfloat(m: PickleMachine) -> None:
    m.stack.append(struct.unpack(">d", m.take_bytes(8))[0])


def _string_line(m: PickleMachine) -> None:
    line = m.take_line().strip()
    if len(line) < 2 or line[:1] not in (b'"', b"'") or line[:1] != line[-1:]:
        raise MalformedFileError("a pickle with a string without quotes")
    m.stack.append(_old_text(codecs.escape_decode(line[1:-1])[0]))


def _unicode_line(m: PickleMachine) -> None:
    m.stack.append(codecs.raw_unicode_escape_decode(m.take_line())[0])


LITERAL_INSTRUCTIONS: dict[int, Callable[[PickleMachine], None]] = {
    code[0]: function
    for code, function in (
        (pickle.NONE, partial(push_value, None)),
        (pickle.NEWTRUE, partial(push_value, True)),
        (pickle.NEWFALSE, partial(push_value, False)),
        (pickle.INT, _int_line),
        (pickle.BININT, _binint),
        (pickle.BININT1, _byte),
        (pickle.BININT2, partial(_push_unsigned, 2)),
        (pickle.LONG, _long_line),
        (pickle.LONG1, partial(_short_bytes, _long)),
        (pickle.LONG4, partial(_bytes, 4, _long)),
        (pickle.FLOAT, _float_line),
        (pickle.BINFLOAT, _binfloat),
        (pickle.STRING, _string_line),
        (pickle.BINSTRING, partial(_bytes, 4, _old_text)),
        (pickle.SHORT_BINSTRING, partial(_short_bytes, _old_text)),
        (pickle.UNICODE, _unicode_line),
        (pickle.SHORT_BINUNICODE, partial(_short_bytes, decode_text)),
        (pickle.BINUNICODE, partial(_bytes, 4, decode_text)),
        (pickle.BINUNICODE8, partial(_bytes, 8, decode_text)),
        (pickle.SHORT_BINBYTES, partial(_short_bytes, bytes)),
        (pickle.BINBYTES, partial(_bytes, 4, bytes)),
        (pickle.BINBYTES8, partial(_bytes, 8, bytes)),
        (pickle.BYTEARRAY8, partial(_bytes, 8, bytearray)),
    )
}
