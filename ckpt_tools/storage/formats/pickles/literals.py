"""The instructions that push a plain value: numbers, texts, bytes."""

from __future__ import annotations

import codecs
import pickle
import struct
from collections.abc import Callable
from functools import partial

from ckpt_tools.storage.formats.pickles.pickle_limits import MalformedFileError
from ckpt_tools.storage.formats.pickles.python2_strings import decode_python2_string
from ckpt_tools.storage.formats.pickles.stack_machine import Instruction, PickleMachine

__all__ = ["LITERAL_INSTRUCTIONS", "decode_text", "push_value"]


def push_value(value: object, m: PickleMachine) -> None:
    """Put a value on the stack."""
    m.stack.append(value)


def decode_text(raw: bytes) -> str:
    """Return the text of UTF-8 as pickle writes it, which may hold lone surrogates."""
    return raw.decode("utf-8", "surrogatepass")


def _decode_integer(raw: bytes) -> int:
    return int.from_bytes(raw, "little", signed=True)


def _push_converted(width: int, convert: Callable[[bytes], object], m: PickleMachine) -> None:
    """Push the value of the next bytes, whose count stands before them in ``width`` bytes."""
    m.stack.append(convert(m.take_bytes(m.take_integer(width))))


def _push_short_converted(convert: Callable[[bytes], object], m: PickleMachine) -> None:
    # Most texts have a count of one byte, which take_byte reads faster than take_integer would.
    m.stack.append(convert(m.take_bytes(m.take_byte())))


def _push_byte(m: PickleMachine) -> None:
    m.stack.append(m.take_byte())


def _push_unsigned_short(m: PickleMachine) -> None:
    m.stack.append(m.take_integer(2))


def _push_signed_integer(m: PickleMachine) -> None:
    m.stack.append(m.take_integer(4, signed=True))


def _push_integer_of_line(m: PickleMachine) -> None:
    line = m.take_line()
    # Protocol 0 writes the two truth values as integers with a leading zero.
    m.stack.append(line == b"01" if line in (b"00", b"01") else int(line))


def _push_long_of_line(m: PickleMachine) -> None:
    m.stack.append(int(m.take_line().removesuffix(b"L")))


def _push_float_of_line(m: PickleMachine) -> None:
    m.stack.append(float(m.take_line()))


def _push_float(m: PickleMachine) -> None:
    # Unlike the integers of a pickle, its floats are big-endian.
    m.stack.append(struct.unpack(">d", m.take_bytes(8))[0])


def _push_string_of_line(m: PickleMachine) -> None:
    line = m.take_line().strip()
    if len(line) < 2 or line[:1] not in (b'"', b"'") or line[:1] != line[-1:]:
        raise MalformedFileError("a pickle with a string without quotes")
    m.stack.append(decode_python2_string(codecs.escape_decode(line[1:-1])[0]))


def _push_text_of_line(m: PickleMachine) -> None:
    m.stack.append(codecs.raw_unicode_escape_decode(m.take_line())[0])


LITERAL_INSTRUCTIONS: dict[int, Instruction] = {
    code[0]: function
    for code, function in (
        (pickle.NONE, partial(push_value, None)),
        (pickle.NEWTRUE, partial(push_value, True)),
        (pickle.NEWFALSE, partial(push_value, False)),
        (pickle.INT, _push_integer_of_line),
        (pickle.BININT, _push_signed_integer),
        (pickle.BININT1, _push_byte),
        (pickle.BININT2, _push_unsigned_short),
        (pickle.LONG, _push_long_of_line),
        (pickle.LONG1, partial(_push_short_converted, _decode_integer)),
        (pickle.LONG4, partial(_push_converted, 4, _decode_integer)),
        (pickle.FLOAT, _push_float_of_line),
        (pickle.BINFLOAT, _push_float),
        (pickle.STRING, _push_string_of_line),
        (pickle.BINSTRING, partial(_push_converted, 4, decode_python2_string)),
        (pickle.SHORT_BINSTRING, partial(_push_short_converted, decode_python2_string)),
        (pickle.UNICODE, _push_text_of_line),
        (pickle.SHORT_BINUNICODE, partial(_push_short_converted, decode_text)),
        (pickle.BINUNICODE, partial(_push_converted, 4, decode_text)),
        (pickle.BINUNICODE8, partial(_push_converted, 8, decode_text)),
        (pickle.SHORT_BINBYTES, partial(_push_short_converted, bytes)),
        (pickle.BINBYTES, partial(_push_converted, 4, bytes)),
        (pickle.BINBYTES8, partial(_push_converted, 8, bytes)),
        (pickle.BYTEARRAY8, partial(_push_converted, 8, bytearray)),
    )
}
