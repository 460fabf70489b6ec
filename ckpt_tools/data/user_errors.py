"""Errors that are not ours: the user's code and worker processes raise anything; it becomes a DataError."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ckpt_tools.errors import DataError
from ckpt_tools.redaction import without_fragments

__all__ = ["convert_to_data_error", "describe_error"]


@contextmanager
def convert_to_data_error(what: str) -> Iterator[None]:
    """Turns any exception inside into a DataError that says ``what`` raised it, with the original as cause."""
    try:
        yield
    except DataError:
        raise
    except (Exception, SystemExit) as error:
        raise DataError(f"{what} raised {describe_error(error)}.") from error


def describe_error(error: BaseException) -> str:
    """Type and message of an exception, without the secrets of the URLs that it may quote."""
    text = without_fragments(str(error)).strip()
    if "Original Traceback" in text:  # torch ships a worker's traceback as the message
        return text.splitlines()[-1]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
