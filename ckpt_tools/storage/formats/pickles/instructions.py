"""One function for every instruction of pickle protocols 0 to 5: stack, memo, containers, names and calls."""

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
from ckpt_tools.storage.formats.pickles.stack_machine import Buffer, PickleMachine, ValueResolver

__all__ = ["read_pickle"]


def read_pickle(
    data: Buffer, meaning: ValueResolver, limits: Limits, position: int = 0
) -> tuple[object, int]:
    """The value of the pickle that starts at ``position``, and where it ends.

    Nothing is imported, looked up or called but ``meaning``. Raises Fault.
    """
    machine = PickleMachine(data, meaning, limits, position)
    value = machine.run(_INSTRUCTIONS, pickle.STOP[0])
    return value, machine.position


def _mark(m: PickleMachine) -> None:
    m.marks.append(len(m.stack))


def _pop(m: PickleMachine) -> None:
    if m.marks and len(m.stack) == m.marks[-1]:
        m.marks.pop()
    else:
        m.pop()


def _pop_mark(m: PickleMachine) -> None:
    m.pop_mark()


def _dup(m: PickleMachine) -> None:
    m.stack.append(m.top())


def _skip(count: int, m: PickleMachine) -> None:
    m.take_bytes(count)


def _tuple(count: int, m: PickleMachine) -> None:
    m.marks.append(max(m.marks[-1] if m.marks else 0, len(m.stack) - count))
    items = m.pop_mark()
    if len(items) != count:
        raise MalformedFileError("a pickle that takes more values than it gave")
    m.stack.append(tuple(items))


def _tuple_of_mark(m: PickleMachine) -> None:
    m.stack.append(tuple(m.pop_mark()))


def _list_of_mark(m: PickleMachine) -> None:
    m.stack.append(m.pop_mark())


def _dict_of_mark(m: PickleMachine) -> None:
    items = m.pop_mark()
    m.stack.append({})
    _set(m, items)


def _frozenset_of_mark(m: PickleMachine) -> None:
    items = m.pop_mark()
    m.limits.check_keys(items)
    m.stack.append(frozenset(items))


def _empty(kind: Callable[[], object], m: PickleMachine) -> None:
    m.stack.append(kind())


def _append(m: PickleMachine) -> None:
    _extend(m, [m.pop()])


def _appends(m: PickleMachine) -> None:
    _extend(m, m.pop_mark())


def _extend(m: PickleMachine, items: list[object]) -> None:
    target = m.top()
    if type(target) is OpaqueObject:
        target = target.items
    if type(target) is not list:
        raise MalformedFileError(f"a pickle that appends to a {type(target).__name__}")
    target.extend(items)


def _additems(m: PickleMachine) -> None:
    items, target = m.pop_mark(), m.top()
    if type(target) is OpaqueObject:
        target = target.items
    if type(target) is list:
        target.extend(items)
    elif type(target) is set:
        m.limits.check_keys(items, target)
        target.update(items)
    else:
        raise MalformedFileError(f"a pickle that adds to a {type(target).__name__}")


def _setitem(m: PickleMachine) -> None:
    value, key = m.pop(), m.pop()
    _set(m, [key, value])


def _setitems(m: PickleMachine) -> None:
    _set(m, m.pop_mark())


def _set(m: PickleMachine, items: list[object]) -> None:
    target = m.top()
    if type(target) is OpaqueObject:
        target.items = target.items or {}
        target = m.replace_top(target.items)  # a foreign kind of dict is a dict from here on
    if type(target) is not dict or len(items) % 2:
        raise MalformedFileError(f"a pickle that sets items of a {type(target).__name__}")
    keys = items[::2]
    m.limits.check_keys(keys, target)
    target.update(zip(keys, items[1::2], strict=True))


def _remember_line(m: PickleMachine) -> None:
    m.store_in_memo(int(m.take_line()))


def _remember(width: int, m: PickleMachine) -> None:
    m.store_in_memo(m.take_integer(width))


def _remember_byte(m: PickleMachine) -> None:
    m.store_in_memo(m.take_byte())


def _remember_next(m: PickleMachine) -> None:
    m.store_in_memo(len(m.memo))


def _recall_line(m: PickleMachine) -> None:
    m.push_from_memo(int(m.take_line()))


def _recall(width: int, m: PickleMachine) -> None:
    m.push_from_memo(m.take_integer(width))


def _recall_byte(m: PickleMachine) -> None:
    m.push_from_memo(m.take_byte())


def _global(m: PickleMachine) -> None:
    module, name = m.take_line(), m.take_line()
    m.push_global(decode_text(module), decode_text(name))


def _stack_global(m: PickleMachine) -> None:
    name, module = m.pop(), m.pop()
    m.push_global(module, name)


def _extension(width: int, m: PickleMachine) -> None:
    m.push_global("copyreg.extension", str(m.take_integer(width)))


def _inst(m: PickleMachine) -> None:
    module, name = m.take_line(), m.take_line()
    args = tuple(m.pop_mark())
    m.push_global(decode_text(module), decode_text(name))
    m.push_call_result(m.pop(), args)


def _obj(m: PickleMachine) -> None:
    items = m.pop_mark()
    if not items:
        raise MalformedFileError("a pickle that takes more values than it gave")
    m.push_call_result(items[0], tuple(items[1:]))


def _reduce(m: PickleMachine) -> None:
    args, function = m.pop(), m.pop()
    m.push_call_result(function, args)


def _newobj_ex(m: PickleMachine) -> None:
    keywords, args, function = m.pop(), m.pop(), m.pop()
    m.push_call_result(function, args)
    if keywords:
        m.replace_top(m.meaning.apply_state(m.top(), keywords))


def _build(m: PickleMachine) -> None:
    state, value = m.pop(), m.top()
    m.replace_top(m.meaning.apply_state(value, state))


def _persid(m: PickleMachine) -> None:
    m.stack.append(m.meaning.resolve_persistent_id(decode_text(m.take_line())))


def _binpersid(m: PickleMachine) -> None:
    m.stack.append(m.meaning.resolve_persistent_id(m.pop()))


def _nothing(m: PickleMachine) -> None:
    pass


def _buffer(m: PickleMachine) -> None:
    m.push_global("pickle", "PickleBuffer")  # its bytes were kept outside the file


_INSTRUCTIONS: dict[int, Callable[[PickleMachine], None]] = LITERAL_INSTRUCTIONS | {
    code[0]: function
    for code, function in (
        (pickle.PROTO, partial(_skip, 1)),
        (pickle.FRAME, partial(_skip, 8)),
        (pickle.MARK, _mark),
        (pickle.POP, _pop),
        (pickle.POP_MARK, _pop_mark),
        (pickle.DUP, _dup),
        (pickle.EMPTY_TUPLE, partial(push_value, ())),
        (pickle.TUPLE1, partial(_tuple, 1)),
        (pickle.TUPLE2, partial(_tuple, 2)),
        (pickle.TUPLE3, partial(_tuple, 3)),
        (pickle.TUPLE, _tuple_of_mark),
        (pickle.EMPTY_LIST, partial(_empty, list)),
        (pickle.LIST, _list_of_mark),
        (pickle.APPEND, _append),
        (pickle.APPENDS, _appends),
        (pickle.EMPTY_SET, partial(_empty, set)),
        (pickle.ADDITEMS, _additems),
        (pickle.FROZENSET, _frozenset_of_mark),
        (pickle.EMPTY_DICT, partial(_empty, dict)),
        (pickle.DICT, _dict_of_mark),
        (pickle.SETITEM, _setitem),
        (pickle.SETITEMS, _setitems),
        (pickle.PUT, _remember_line),
        (pickle.BINPUT, _remember_byte),
        (pickle.LONG_BINPUT, partial(_remember, 4)),
        (pickle.MEMOIZE, _remember_next),
        (pickle.GET, _recall_line),
        (pickle.BINGET, _recall_byte),
        (pickle.LONG_BINGET, partial(_recall, 4)),
        (pickle.GLOBAL, _global),
        (pickle.STACK_GLOBAL, _stack_global),
        (pickle.EXT1, partial(_extension, 1)),
        (pickle.EXT2, partial(_extension, 2)),
        (pickle.EXT4, partial(_extension, 4)),
        (pickle.INST, _inst),
        (pickle.OBJ, _obj),
        (pickle.REDUCE, _reduce),
        (pickle.NEWOBJ, _reduce),
        (pickle.NEWOBJ_EX, _newobj_ex),
        (pickle.BUILD, _build),
        (pickle.PERSID, _persid),
        (pickle.BINPERSID, _binpersid),
        (pickle.NEXT_BUFFER, _buffer),
        (pickle.READONLY_BUFFER, _nothing),
    )
}
