"""Which constructor arguments a checkpoint file may set, and to which values.

A file comes from a stranger, and a constructor does what its arguments say: it opens
`checkpoint_path`, downloads `hf-hub:…`, imports a class by its name, or builds ten million blocks.
So each adapter lists the arguments that a file may set (`Adapter.file_arguments`), each with one of
the kinds of this module. A kind admits values that name nothing (numbers, flags, words of a closed
list) and that are no larger than the file's own tensors justify.

Arguments that the user gives (`--model-kwargs`) do not pass through here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

__all__ = [
    "ArgumentKind",
    "Depth",
    "Evidence",
    "Factor",
    "Flag",
    "Forbidden",
    "LeftOut",
    "Nested",
    "NotAdmitted",
    "Number",
    "OwnArgument",
    "Pixels",
    "Rate",
    "Sizes",
    "Width",
    "Word",
    "admit_argument",
]

_LARGEST_NUMBER = 1e6  # of scales, epsilons and temperatures; timm's largest default is 10,000
_LARGEST_SIDE = 8192  # pixels
_DEEPEST_LIST = 8  # lists in lists; libraries use three


class NotAdmitted(Exception):
    """A file may not set an argument to this value. The message says what was expected instead."""


class LeftOut(NotAdmitted):
    """A value that does not reach the constructor, which then takes its own default."""


@dataclass(frozen=True)
class Evidence:
    """What the tensors of a file say about the size of its model.

    `tensors` is their number: a model cannot have more blocks, since each block has a tensor at
    least. `largest_dimension` is the largest entry of any shape: no layer can be wider. `nesting`
    is how many configurations may still stand in one another.
    """

    tensors: int
    largest_dimension: int
    # Libraries use three: a detector, its backbone, and the backbone's text or vision part
    nesting: int = 8

    @staticmethod
    def from_shapes(shapes: Mapping[str, tuple[int, ...]]) -> Evidence:
        """Return the evidence of a state dict whose tensors have these shapes."""
        return Evidence(len(shapes), max((size for shape in shapes.values() for size in shape), default=0))


class ArgumentKind(Protocol):
    """The values that a file may give to one argument.

    Every kind admits None, the usual word for "the default".
    """

    def admit(self, value: object, evidence: Evidence) -> object:
        """Return the value as the constructor may have it. Raises NotAdmitted."""
        ...


@dataclass(frozen=True)
class Rate:
    """A probability, or a sequence of probabilities: a drop rate."""

    def admit(self, value: object, evidence: Evidence) -> object:
        """Admit numbers from 0 to 1."""
        return _admit_numbers(value, evidence, "rates from 0 to 1", lambda number: 0 <= number <= 1)


@dataclass(frozen=True)
class Number:
    """A number that does not change the model's size: an epsilon, a momentum, an initial scale."""

    def admit(self, value: object, evidence: Evidence) -> object:
        """Admit finite numbers of ordinary size, and sequences of them."""
        expected = f"numbers of at most {_LARGEST_NUMBER:,.0f}"
        return _admit_numbers(value, evidence, expected, lambda number: abs(number) <= _LARGEST_NUMBER)


@dataclass(frozen=True)
class Factor:
    """A number that a width or depth is multiplied by."""

    def admit(self, value: object, evidence: Evidence) -> object:
        """Admit numbers up to the largest dimension in the file, and sequences of them."""
        largest = evidence.largest_dimension
        expected = f"factors of at most {largest:,}, the largest dimension of the file's tensors"
        return _admit_numbers(value, evidence, expected, lambda number: abs(number) <= largest)


@dataclass(frozen=True)
class Width:
    """A number of classes, channels, features, heads or groups, or a sequence of them."""

    def admit(self, value: object, evidence: Evidence) -> object:
        """Admit whole numbers up to the largest dimension in the file."""
        largest = evidence.largest_dimension
        expected = f"whole numbers of at most {largest:,}, the largest dimension of the file's tensors"
        return _admit_integers(
            value, evidence, expected, lambda sizes: all(abs(size) <= largest for size in sizes)
        )


@dataclass(frozen=True)
class Depth:
    """A number of layers or blocks, or a sequence of one number for each stage."""

    def admit(self, value: object, evidence: Evidence) -> object:
        """Admit whole numbers whose sum is at most the number of tensors in the file."""
        limit = evidence.tensors
        expected = f"whole numbers that add up to {limit:,} at most, the number of the file's tensors"
        return _admit_integers(value, evidence, expected, lambda depths: sum(map(abs, depths)) <= limit)


@dataclass(frozen=True)
class Pixels:
    """Sides of images, patches, windows and kernels, strides, and indices of stages."""

    def admit(self, value: object, evidence: Evidence) -> object:
        """Admit whole numbers of at most 8192, and sequences of them."""
        expected = f"whole numbers of at most {_LARGEST_SIDE:,}"
        return _admit_integers(
            value, evidence, expected, lambda sides: all(abs(s) <= _LARGEST_SIDE for s in sides)
        )


@dataclass(frozen=True)
class Flag:
    """True or False, or a sequence of them."""

    def admit(self, value: object, evidence: Evidence) -> object:
        """Admit booleans, and 0 and 1, which YAML and command lines make of them."""
        leaves = list(_leaves(value, evidence))
        if not all(leaf is None or (isinstance(leaf, bool | int) and leaf in (0, 1)) for leaf in leaves):
            raise NotAdmitted("expected True or False")
        return value


@dataclass(frozen=True)
class Sizes:
    """An argument of which only the type is known: numbers and flags, none larger than a width."""

    def admit(self, value: object, evidence: Evidence) -> object:
        """Admit booleans, finite numbers up to the file's largest dimension, and sequences of them."""
        largest = evidence.largest_dimension
        expected = f"numbers of at most {largest:,}, the largest dimension of the file's tensors"
        leaves = [int(leaf) if isinstance(leaf, bool) else leaf for leaf in _leaves(value, evidence)]
        _admit_numbers(leaves, evidence, expected, lambda number: abs(number) <= largest)
        return value


@dataclass(frozen=True)
class Word:
    """One of the words of a closed list, or a sequence of them.

    With `numbers`, numbers may stand among them. The list is ours or the library's, so that a word
    cannot name a file, a class or a place on a network.
    """

    words: frozenset[str]
    numbers: bool = False

    def admit(self, value: object, evidence: Evidence) -> object:
        """Admit strings that stand in the list.

        The empty word and False are admitted, too: they mean "none".
        """
        for leaf in _leaves(value, evidence):
            if leaf is None or leaf is False or leaf == "" or (isinstance(leaf, str) and leaf in self.words):
                continue
            if isinstance(leaf, str) or not self.numbers:
                raise NotAdmitted(f"expected one of {_shorten(sorted(self.words))}")
            Sizes().admit(leaf, evidence)
        return value


@dataclass(frozen=True)
class Forbidden:
    """An argument that only a person may set: a class, a function, a table of layers."""

    def admit(self, value: object, evidence: Evidence) -> object:
        """Admit None alone."""
        if value is not None:
            raise NotAdmitted("only you may set it, no file")
        return None


@dataclass(frozen=True)
class OwnArgument:
    """An argument of the user's own constructor, of which only the signature is known.

    `default` is its default value, `words` are those that a file may choose from. Where
    `is_about_model` is False the argument is one of the training, whose words do not matter.
    """

    default: object = None
    words: frozenset[str] = frozenset()
    is_about_model: bool = True

    def admit(self, value: object, evidence: Evidence) -> object:
        """Admit flags, numbers up to the file's largest dimension, and words of the list.

        Larger numbers and objects are left out: they are no size of this model. Another word is not
        admitted, since without it the same tensors might be built into another function.
        """
        try:
            leaves = list(_leaves(value, evidence))
        except NotAdmitted as error:
            raise LeftOut(str(error)) from None
        for leaf in leaves:
            if isinstance(leaf, str):
                if leaf not in ("", self.default) and leaf.lower() not in self.words:
                    error_class = NotAdmitted if self.is_about_model else LeftOut
                    raise error_class("to your own code a file may give numbers and well-known words alone")
                continue
            is_number = _is_finite_number(leaf) and abs(leaf) <= max(1, evidence.largest_dimension)
            if leaf is not None and not isinstance(leaf, bool) and not is_number:
                raise LeftOut("expected a number that the file's tensors justify")
        return value


@dataclass(frozen=True)
class Nested:
    """A configuration within a configuration: a mapping whose entries have kinds of their own.

    `arguments_of` returns the kinds for a given mapping, which may depend on what it says of itself
    (`model_type`). It raises NotAdmitted for a mapping that describes nothing known. Entries
    without a kind are left out: the library has no place for them.
    """

    arguments_of: Callable[[Mapping[str, object]], Mapping[str, ArgumentKind]]

    def admit(self, value: object, evidence: Evidence) -> object:
        """Admit a mapping, and return one that holds only entries that are admitted."""
        if value is None:
            return None
        if not isinstance(value, Mapping) or evidence.nesting <= 0:
            raise NotAdmitted("expected a configuration that is not nested too deeply")
        inner = replace(evidence, nesting=evidence.nesting - 1)
        kinds = self.arguments_of({str(name): setting for name, setting in value.items()})
        return {
            name: admit_argument(kinds, name, setting, inner)
            for name, setting in value.items()
            if name in kinds
        }


def admit_argument(kinds: Mapping[str, ArgumentKind], name: str, value: object, evidence: Evidence) -> object:
    """Return the value that a file gives to the argument `name`, filtered.

    Raises NotAdmitted, which names it.
    """
    kind = kinds.get(name)
    if kind is None:
        raise NotAdmitted(f"{name}: a file may not set it")
    try:
        return kind.admit(value, evidence)
    except NotAdmitted as error:
        raise type(error)(f"{name}: {error}") from None


def _admit_numbers(value: object, evidence: Evidence, expected: str, fits: Callable[[float], bool]) -> object:
    for leaf in _leaves(value, evidence):
        if leaf is not None and not (_is_finite_number(leaf) and fits(leaf)):
            raise NotAdmitted(f"expected {expected}")
    return value


def _admit_integers(
    value: object, evidence: Evidence, expected: str, fits: Callable[[list[int]], bool]
) -> object:
    leaves = [leaf for leaf in _leaves(value, evidence) if leaf is not None]
    # In Python True and False are integers, too.
    if not all(isinstance(leaf, int) and not isinstance(leaf, bool) for leaf in leaves) or not fits(leaves):
        raise NotAdmitted(f"expected {expected}")
    return value


def _is_finite_number(value: object) -> bool:
    if isinstance(value, bool):
        return False
    return isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))


def _leaves(value: object, evidence: Evidence, depth: int = 0) -> Iterator[Any]:
    """Yield the value, or the items of a sequence and of the sequences in it.

    Raises NotAdmitted for a deep one.
    """
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        yield value
        return
    # One number a block is the most that any constructor takes; small models have few tensors but
    # may list sizes.
    if depth >= _DEEPEST_LIST or len(value) > max(64, evidence.tensors):
        raise NotAdmitted("expected a short sequence")
    for item in value:
        yield from _leaves(item, evidence, depth + 1)


def _shorten(words: list[str]) -> str:
    shown = ", ".join(words[:12]) or "no word"
    return shown + (", …" if len(words) > 12 else "")
