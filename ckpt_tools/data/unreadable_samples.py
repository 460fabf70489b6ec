"""Samples that cannot be read: one, or up to 1 %, are skipped, and more are an error."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ckpt_tools.data.prefetch import ReadTimeoutError
from ckpt_tools.data.user_errors import describe_error
from ckpt_tools.errors import CkptToolsError, DataError

__all__ = ["SkippedSample", "SkippedSamples", "refuse_unreadable", "translate_reading_errors"]

MAX_UNREADABLE_SHARE = 0.01
"""Share of unreadable samples above which the data set is refused.

A single one is no reason, however small the data set is, unless it is the only sample.
"""


@dataclass(frozen=True)
class SkippedSample:
    """A sample that could not be read, and the reason.

    ``name`` is its file, or whatever messages call it.
    """

    name: str
    reason: str


class SkippedSamples:
    """The samples of one data set that could not be read in any pass so far.

    ``by_key`` holds each once, in the order in which they were met. A key identifies a sample in
    every pass: its number, or its URL and name.
    """

    def __init__(self, data_name: str) -> None:
        self.by_key: dict[Any, SkippedSample] = {}
        self._data_name = data_name
        self._first_pass_ended = False

    def add(self, skipped: Mapping[Any, SkippedSample]) -> None:
        """Record samples that could not be read.

        Raises DataError for one that was read in an earlier pass, because every pass must see the
        same samples.
        """
        for key, sample in skipped.items():
            if key in self.by_key:  # every pass meets it again
                continue
            if self._first_pass_ended:
                raise DataError(
                    f"{self._data_name}: {sample.name} was readable in the first pass, now: "
                    f"{sample.reason}. All passes must see the same samples: leave the data alone "
                    f"while it is read, and run again."
                )
            self.by_key[key] = sample

    def end_pass(self) -> None:
        """Note that a pass has met all samples."""
        self._first_pass_ended = True

    def refuse_too_many(self, count: int) -> None:
        """Raise DataError if more than one and more than 1 % of ``count`` samples were skipped."""
        refuse_unreadable(self._data_name, tuple(self.by_key.values()), count)


def refuse_unreadable(data_name: str, skipped: Sequence[SkippedSample], count: int) -> None:
    """Raise DataError if more than one and more than 1 % of ``count`` samples were skipped, or all."""
    if len(skipped) > max(1, MAX_UNREADABLE_SHARE * count) or len(skipped) == count > 0:
        first_few = "; ".join(f"{sample.name} ({sample.reason})" for sample in skipped[:5])
        raise DataError(
            f"{data_name}: {len(skipped)} of {count} samples are unreadable so far, expected "
            f"at most one or {MAX_UNREADABLE_SHARE:.0%}: {first_few}. Repair or remove them."
        )


@contextmanager
def translate_reading_errors(data_name: str) -> Iterator[None]:
    """Turn whatever the reading threads raise into a DataError that suggests what to do.

    Errors of this project pass through.
    """
    try:
        yield
    except CkptToolsError:
        raise
    except ReadTimeoutError as error:
        raise DataError(
            f"{data_name}: {error}. Look at that file, and at the disk or network it comes from; "
            "leave it out, or run again."
        ) from error
    except Exception as error:  # decoders and file systems raise all kinds
        raise DataError(
            f"{data_name}: reading failed with {describe_error(error)}. If memory ran out, "
            "try fewer --workers, --workers 0, or a smaller --batch-size."
        ) from error
