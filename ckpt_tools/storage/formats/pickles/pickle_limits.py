"""What can be wrong with a pickle, and how much of it is read before that counts as wrong, too."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

__all__ = ["LARGEST_INTEGER_KEY", "Limits", "MalformedFileError", "limit_exceeded_error"]

_KEY_ITEMS = 64  # a tuple is a fine key; a tree of them takes forever to hash
LARGEST_INTEGER_KEY = 1 << 60  # larger integers can be chosen to share one hash
_SAME_HASH = 100  # keys of one container; hashes of tuples and complex numbers can be chosen, too


class MalformedFileError(Exception):
    """What was found instead of a sound pickle, as the middle of a sentence: "found …"."""


@dataclass
class Limits:
    """What one file may cost. The largest sound checkpoints need a few million instructions.

    ``copies`` are items (of lists, of texts, of bytes) that instructions touch again after they were read: none in
    most files, each of them once or twice in old protocols.
    """

    instructions: int = 50_000_000
    copies: int = 20_000_000
    nesting: int = 8  # pickles inside pickles
    _hashes: dict[int, Counter[int]] = field(default_factory=dict)

    @classmethod
    def for_file_size(cls, nbytes: int) -> Limits:
        """The limits of a file of this size."""
        return cls(copies=cls.copies + 4 * nbytes)

    def charge_copies(self, items: int) -> None:
        """Take some of the copies that are left. Raises Fault if there are too few."""
        self.copies -= items
        if self.copies < 0:
            raise limit_exceeded_error()

    def check_keys(self, keys: Iterable[object], holder: object = None) -> None:
        """Refuse keys of a dict or a set that cannot be hashed, or not in a bounded time. Raises Fault.

        ``holder`` is the container, if it has keys already.
        """
        hashes = None
        for key in keys:
            if type(key) is str:
                continue
            self.charge_copies(_check_key(key))
            if not isinstance(key, int):
                if hashes is None:
                    hashes = (
                        Counter()
                        if holder is None
                        else self._hashes.setdefault(id(holder), Counter())
                    )
                hashes[hash(key)] += 1
                if hashes[hash(key)] > _SAME_HASH:
                    raise MalformedFileError(
                        "a pickle with keys of a dict that were chosen to share one hash"
                    )


def limit_exceeded_error() -> MalformedFileError:
    """What to say of a file that reached its limits."""
    return MalformedFileError("a pickle that unfolds to far more than its own size")


def _check_key(key: object) -> int:
    """How many values hashing the key touches."""
    todo, seen = [key], 0
    while todo:
        item = todo.pop()
        seen += 1
        if isinstance(item, tuple):
            if seen + len(todo) + len(item) > _KEY_ITEMS:
                raise MalformedFileError("a pickle with an endless key in a dict")
            todo.extend(item)
        elif isinstance(item, list | dict | set | bytearray | slice) or _is_long(item):
            raise MalformedFileError(
                f"a pickle with a key of a dict that cannot be one ({type(item).__name__})"
            )
    return seen


def _is_long(item: object) -> bool:
    return isinstance(item, int) and abs(item) > LARGEST_INTEGER_KEY
