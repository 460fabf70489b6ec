"""The error for a malformed file, and the bounds on what reading one file may cost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

__all__ = [
    "LARGEST_INTEGER_KEY",
    "LONGEST_NAME",
    "Limits",
    "MalformedFileError",
    "limit_exceeded_error",
]

LONGEST_NAME = 2000  # characters; a class nested in a function in a package stays far below
# Tuples of tuples that share their items take a few bytes of a file, and exponential time to hash.
_MAX_KEY_ITEMS = 64
# Python's hash of an integer is its remainder modulo 2**61 - 1. Larger integers can therefore be
# chosen to share one hash, which makes each insertion into a dict take as long as the dict.
LARGEST_INTEGER_KEY = 1 << 60
# The hashes of tuples and complex numbers can be chosen, too, so that equal ones are counted.
_MAX_EQUAL_HASHES = 100  # among the keys of one container


class MalformedFileError(Exception):
    """The file is no sound pickle. The message says what it is instead, to stand behind "found"."""


@dataclass
class Limits:
    """What reading one file may still cost; each field counts down.

    The largest sound checkpoints need a few million instructions. ``copies`` are items (of lists,
    of texts, of bytes) that instructions touch again after they were read: none in most files, each
    of them once or twice in old protocols. ``nesting`` counts pickles inside pickles.
    """

    instructions: int = 50_000_000
    copies: int = 20_000_000
    nesting: int = 8
    # How often each hash occurs among the keys of a container, by the container's identity.
    _hashes: dict[int, Counter[int]] = field(default_factory=dict)

    @classmethod
    def for_file_size(cls, nbytes: int) -> Limits:
        """Return the limits for a file of ``nbytes`` bytes."""
        return cls(copies=cls.copies + 4 * nbytes)

    def charge_copies(self, items: int) -> None:
        """Use up some of the copies that are left. Raises MalformedFileError beyond the last."""
        self.copies -= items
        if self.copies < 0:
            raise limit_exceeded_error()

    def check_keys(self, keys: Iterable[object], holder: object = None) -> None:
        """Raise MalformedFileError for keys that cannot be hashed and stored in bounded time.

        ``holder`` is the container to which the keys are added, if there is one already: hashes are
        counted over all keys that it gets. Texts pass, because Python salts their hashes.
        """
        hashes: Counter[int] | None = None
        for key in keys:
            if type(key) is str:
                continue
            self.charge_copies(_check_key(key))
            if not isinstance(key, int):
                if hashes is None:
                    hashes = Counter()
                    if holder is not None:
                        hashes = self._hashes.setdefault(id(holder), hashes)
                hashes[hash(key)] += 1
                if hashes[hash(key)] > _MAX_EQUAL_HASHES:
                    raise MalformedFileError(
                        "a pickle with keys of a dict that were chosen to share one hash"
                    )


def limit_exceeded_error() -> MalformedFileError:
    """Return the error for a file that has used up its limits."""
    return MalformedFileError("a pickle that unfolds to far more than its own size")


def _check_key(key: object) -> int:
    """Return how many values hashing a key touches. Raises MalformedFileError for what is none."""
    waiting, touched = [key], 0
    while waiting:
        item = waiting.pop()
        touched += 1
        if isinstance(item, tuple):
            if touched + len(waiting) + len(item) > _MAX_KEY_ITEMS:
                raise MalformedFileError("a pickle with an endless key in a dict")
            waiting.extend(item)
        elif isinstance(item, list | dict | set | bytearray | slice) or _is_long(item):
            raise MalformedFileError(
                f"a pickle with a key of a dict that cannot be one ({type(item).__name__})"
            )
    return touched


def _is_long(item: object) -> bool:
    return isinstance(item, int) and abs(item) > LARGEST_INTEGER_KEY
