"""Turn errors of any type, from the user's code or worker processes, into a DataError."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ckpt_tools.errors import DataError
from ckpt_tools.redaction import without_fragments

__all__ = ["convert_to_data_error", "describe_error"]


@contextmanager
def convert_to_data_error(action: str) -> Iterator[None]:
    """Turn any exception in the block into a DataError that says which ``action`` raised it.

    The original exception is its cause.
    """
    try:
        yield
    except DataError:
        raise
    except (Exception, SystemExit) as error:  # sys.exit in the user's code must not end this program
        raise DataError(f"{action} raised {describe_error(error)}.") from error


def describe_error(error: BaseException) -> str:
    """Return type and message of an exception, without secrets in URLs that it may quote."""
    text = without_fragments(str(error)).strip()
    if "Original Traceback" in text:  # torch passes on a worker's traceback as the message
        return text.splitlines()[-1]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
