"""One function for every instruction of pickle protocols 0 to 5, in a table by opcodes.

The functions move values between the stack, the memo and containers. What a name, a call or a
persistent id means is left to the machine's resolver, so that no function here can import or call
anything from a file. ``pickletools`` of the standard library describes the instructions and their
arguments.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from functools import partial

from ckpt_tools.storage.formats.pickles.literals import (
    LITERAL_INSTRUCTIONS,
    decode_text,
    push_value,
)
from ckpt_tools.storage.formats.pickles.opaque_object import OpaqueObject
from ckpt_tools.storage.formats.pickles.pickle_limits import Limits, MalformedFileError
from ckpt_tools.storage.formats.pickles.stack_machine import (
    TOO_FEW_VALUES,
    Buffer,
    Instruction,
    PickleMachine,
    ValueResolver,
)

__all__ = ["read_pickle"]


def read_pickle(
    data: Buffer, resolver: ValueResolver, limits: Limits, position: int = 0
) -> tuple[object, int]:
    """Return the value of the pickle that starts at ``position``, and where that pickle ends.

    Nothing that the pickle names is imported, looked up or called: ``resolver`` decides what stands
    for it. Raises MalformedFileError.
    """
    machine = PickleMachine(data, resolver, limits, position)
    value = machine.run(_INSTRUCTIONS, pickle.STOP[0])
    return value, machine.position


def _skip_bytes(count: int, m: PickleMachine) -> None:
    m.take_bytes(count)


# The stack.
def _push_mark(m: PickleMachine) -> None:
    m.marks.append(len(m.stack))


def _pop_value_or_mark(m: PickleMachine) -> None:
    # POP takes a mark off where nothing lies above it, as pickle itself does.
    if m.marks and len(m.stack) == m.marks[-1]:
        m.marks.pop()
    else:
        m.pop()


def _pop_to_mark(m: PickleMachine) -> None:
    m.pop_to_mark()


def _duplicate_top(m: PickleMachine) -> None:
    m.stack.append(m.top())


# Containers.
def _build_short_tuple(count: int, m: PickleMachine) -> None:
    # A mark below the last ``count`` values, but never below an older mark, makes this a case of
    # TUPLE.
    m.marks.append(max(m.marks[-1] if m.marks else 0, len(m.stack) - count))
    items = m.pop_to_mark()
    if len(items) != count:
        raise MalformedFileError(TOO_FEW_VALUES)
    m.stack.append(tuple(items))


def _build_tuple(m: PickleMachine) -> None:
    m.stack.append(tuple(m.pop_to_mark()))


def _build_list(m: PickleMachine) -> None:
    m.stack.append(m.pop_to_mark())


def _build_dict(m: PickleMachine) -> None:
    items = m.pop_to_mark()
    m.stack.append({})
    _set_items_of_top(m, items)


def _build_frozenset(m: PickleMachine) -> None:
    items = m.pop_to_mark()
    m.limits.check_keys(items)
    m.stack.append(frozenset(items))


def _push_empty(kind: Callable[[], object], m: PickleMachine) -> None:
    m.stack.append(kind())


def _append_item(m: PickleMachine) -> None:
    _extend_top(m, [m.pop()])


def _append_items(m: PickleMachine) -> None:
    _extend_top(m, m.pop_to_mark())


def _extend_top(m: PickleMachine, items: list[object]) -> None:
    target = m.top()
    if type(target) is OpaqueObject:
        target = target.items
    if type(target) is not list:
        raise MalformedFileError(f"a pickle that appends to a {type(target).__name__}")
    target.extend(items)


def _add_items(m: PickleMachine) -> None:
    items, target = m.pop_to_mark(), m.top()
    if type(target) is OpaqueObject:
        target = target.items
    if type(target) is list:
        target.extend(items)
    elif type(target) is set:
        m.limits.check_keys(items, target)
        target.update(items)
    else:
        raise MalformedFileError(f"a pickle that adds to a {type(target).__name__}")


def _set_item(m: PickleMachine) -> None:
    value, key = m.pop(), m.pop()
    _set_items_of_top(m, [key, value])


def _set_items(m: PickleMachine) -> None:
    _set_items_of_top(m, m.pop_to_mark())


def _set_items_of_top(m: PickleMachine, items: list[object]) -> None:
    """Set items of the container on top of the stack; ``items`` are keys and values in turn."""
    target = m.top()
    if type(target) is OpaqueObject:
        # An object of a foreign class of dict becomes a plain dict here, wherever it is held.
        target.items = target.items or {}
        target = m.replace_top(target.items)
    if type(target) is not dict or len(items) % 2:
        raise MalformedFileError(f"a pickle that sets items of a {type(target).__name__}")
    keys = items[::2]
    m.limits.check_keys(keys, target)
    target.update(zip(keys, items[1::2], strict=True))


# The memo, which holds values under numbers.
def _store_at_line(m: PickleMachine) -> None:
    m.store_in_memo(int(m.take_line()))


def _store_at_integer(m: PickleMachine) -> None:
    m.store_in_memo(m.take_integer(4))


def _store_at_byte(m: PickleMachine) -> None:
    m.store_in_memo(m.take_byte())


def _store_at_end(m: PickleMachine) -> None:
    m.store_in_memo(len(m.memo))


def _recall_at_line(m: PickleMachine) -> None:
    m.push_from_memo(int(m.take_line()))


def _recall_at_integer(m: PickleMachine) -> None:
    m.push_from_memo(m.take_integer(4))


def _recall_at_byte(m: PickleMachine) -> None:
    m.push_from_memo(m.take_byte())


# Names, calls and persistent ids, of which the resolver says what they mean.
def _push_global_of_lines(m: PickleMachine) -> None:
    module, name = m.take_line(), m.take_line()
    m.push_global(decode_text(module), decode_text(name))


def _push_global_of_stack(m: PickleMachine) -> None:
    name, module = m.pop(), m.pop()
    m.push_global(module, name)


def _push_extension(width: int, m: PickleMachine) -> None:
    # An extension is a number for a global that the writer had registered with copyreg.
    m.push_global("copyreg.extension", str(m.take_integer(width)))


def _call_global_of_lines(m: PickleMachine) -> None:
    module, name = m.take_line(), m.take_line()
    args = tuple(m.pop_to_mark())
    m.push_global(decode_text(module), decode_text(name))
    m.push_call_result(m.pop(), args)


def _call_first_of_mark(m: PickleMachine) -> None:
    items = m.pop_to_mark()
    if not items:
        raise MalformedFileError(TOO_FEW_VALUES)
    m.push_call_result(items[0], tuple(items[1:]))


def _call(m: PickleMachine) -> None:
    args, function = m.pop(), m.pop()
    m.push_call_result(function, args)


def _call_with_keywords(m: PickleMachine) -> None:
    keywords, args, function = m.pop(), m.pop(), m.pop()
    m.push_call_result(function, args)
    if keywords:
        # No signature is known, so that keyword arguments are taken for attributes.
        m.replace_top(m.resolver.apply_state(m.top(), keywords))


def _apply_state(m: PickleMachine) -> None:
    state, value = m.pop(), m.top()
    m.replace_top(m.resolver.apply_state(value, state))


def _resolve_id_of_line(m: PickleMachine) -> None:
    m.stack.append(m.resolver.resolve_persistent_id(decode_text(m.take_line())))


def _resolve_id_of_stack(m: PickleMachine) -> None:
    m.stack.append(m.resolver.resolve_persistent_id(m.pop()))


def _push_missing_buffer(m: PickleMachine) -> None:
    # The writer of an out-of-band buffer kept its bytes outside the file.
    m.push_global("pickle", "PickleBuffer")


_INSTRUCTIONS: dict[int, Instruction] = LITERAL_INSTRUCTIONS | {
    code[0]: function
    for code, function in (
        # The number of the protocol and the size of a frame say nothing that reading needs.
        (pickle.PROTO, partial(_skip_bytes, 1)),
        (pickle.FRAME, partial(_skip_bytes, 8)),
        (pickle.MARK, _push_mark),
        (pickle.POP, _pop_value_or_mark),
        (pickle.POP_MARK, _pop_to_mark),
        (pickle.DUP, _duplicate_top),
        (pickle.EMPTY_TUPLE, partial(push_value, ())),
        (pickle.TUPLE1, partial(_build_short_tuple, 1)),
        (pickle.TUPLE2, partial(_build_short_tuple, 2)),
        (pickle.TUPLE3, partial(_build_short_tuple, 3)),
        (pickle.TUPLE, _build_tuple),
        (pickle.EMPTY_LIST, partial(_push_empty, list)),
        (pickle.LIST, _build_list),
        (pickle.APPEND, _append_item),
        (pickle.APPENDS, _append_items),
        (pickle.EMPTY_SET, partial(_push_empty, set)),
        (pickle.ADDITEMS, _add_items),
        (pickle.FROZENSET, _build_frozenset),
        (pickle.EMPTY_DICT, partial(_push_empty, dict)),
        (pickle.DICT, _build_dict),
        (pickle.SETITEM, _set_item),
        (pickle.SETITEMS, _set_items),
        (pickle.PUT, _store_at_line),
        (pickle.BINPUT, _store_at_byte),
        (pickle.LONG_BINPUT, _store_at_integer),
        (pickle.MEMOIZE, _store_at_end),
        (pickle.GET, _recall_at_line),
        (pickle.BINGET, _recall_at_byte),
        (pickle.LONG_BINGET, _recall_at_integer),
        (pickle.GLOBAL, _push_global_of_lines),
        (pickle.STACK_GLOBAL, _push_global_of_stack),
        (pickle.EXT1, partial(_push_extension, 1)),
        (pickle.EXT2, partial(_push_extension, 2)),
        (pickle.EXT4, partial(_push_extension, 4)),
        (pickle.INST, _call_global_of_lines),
        (pickle.OBJ, _call_first_of_mark),
        (pickle.REDUCE, _call),
        (pickle.NEWOBJ, _call),
        (pickle.NEWOBJ_EX, _call_with_keywords),
        (pickle.BUILD, _apply_state),
        (pickle.PERSID, _resolve_id_of_line),
        (pickle.BINPERSID, _resolve_id_of_stack),
        (pickle.NEXT_BUFFER, _push_missing_buffer),
        (pickle.READONLY_BUFFER, partial(_skip_bytes, 0)),
    )
}
