"""The gate that every printed line passes.

`guarded_streams` puts a `GuardedStream` in the place of each standard stream while a command runs.
So what click, Python's warnings and libraries print is made harmless like our own results and
messages. Three things go around the gate, and each is harmless by itself: JSON, the annotations of
GitHub, and progress bars.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TextIO, cast

import click

from ckpt_tools.plain_text import LONGEST_VALUE, harmless, shorten
from ckpt_tools.redaction import without_fragments, without_secrets

__all__ = [
    "guarded_streams",
    "print_json",
    "print_message",
    "print_result",
    "redirect_foreign_stdout",
    "unguarded_stderr",
    "write_workflow_command",
]


class GuardedStream:
    """A text stream that makes every text harmless before it passes it on to another stream.

    Everything but writing is left to that stream.
    """

    # click would go around a stream of another encoding. What the stream cannot encode becomes
    # escapes.
    encoding = "utf-8"
    errors = "backslashreplace"

    def __init__(self, stream: TextIO, without_secrets: Callable[[str], str]) -> None:
        self.stream = stream
        self._without_secrets = without_secrets
        self._line = ""  # the beginning of the line that is not ended yet
        self._lock = threading.RLock()  # threads that decode images warn, too

    def write(self, text: str) -> int:
        """Pass on a text, which may be a part of a line.

        Returns the number of characters of ``text``, as every text stream does.
        """
        if not isinstance(text, str):  # click tries bytes to find out what kind of stream this is
            raise TypeError(f"write() argument must be str, not {type(text).__name__}")
        clean = self._without_secrets(text)
        with self._lock:
            # What a text does may depend on the part of its line that was written before.
            text_so_far = self._line + clean
            new = harmless(text_so_far)[len(harmless(self._line)) :]
            self._line = text_so_far.rpartition("\n")[2][: LONGEST_VALUE + 1]
            self.stream.write(_encodable(new, self.stream))
        return len(text)

    def writelines(self, lines: list[str]) -> None:
        """Pass on several texts."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        if name == "buffer":  # bytes would go around the gate
            raise AttributeError(name)
        return getattr(self.stream, name)


@contextlib.contextmanager
def guarded_streams() -> Iterator[None]:
    """Let standard output and standard error pass the gate within the block."""
    before = sys.stdout, sys.stderr
    stdout = GuardedStream(_underlying_stream(sys.stdout), without_secrets)
    # Libraries print to standard error, redirect_foreign_stdout() sees to that, and quote URLs in
    # their own ways: so fragments of secrets are removed there, too.
    stderr = GuardedStream(_underlying_stream(sys.stderr), without_fragments)
    guarded = cast(TextIO, stdout), cast(TextIO, stderr)
    sys.stdout, sys.stderr = guarded
    try:
        yield
    finally:
        if sys.stdout is guarded[0]:  # click puts another one there when a pipe is closed
            sys.stdout = before[0]
        if sys.stderr is guarded[1]:
            sys.stderr = before[1]


@contextlib.contextmanager
def redirect_foreign_stdout() -> Iterator[None]:
    """Send to stderr what a user's factory or data code prints, or a program that it starts.

    Standard output is for results. The file descriptor itself is replaced, since programs that are
    started inherit that and know nothing of ``sys.stdout``.
    """
    stdout = sys.stdout
    try:
        stdout_number, stderr_number = stdout.fileno(), sys.stderr.fileno()
        stdout.flush()
        saved_number = os.dup(stdout_number)
    except (AttributeError, OSError, ValueError):  # the streams are closed, or no files
        with contextlib.redirect_stdout(sys.stderr):
            yield
        return
    try:
        os.dup2(stderr_number, stdout_number)
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        with contextlib.suppress(OSError, ValueError):
            stdout.flush()  # code that kept a reference to the stream may have written to it
        os.dup2(saved_number, stdout_number)
        os.close(saved_number)


def print_result(text: str, *, end: str = "\n") -> None:
    """Print a result on standard output."""
    # Made harmless here, because click would remove escape sequences instead of showing them.
    click.echo(harmless(without_secrets(text)) + end, nl=False)


def print_message(text: str) -> None:
    """Print a message on standard error."""
    click.echo(harmless(without_fragments(text)), err=True)


def print_json(facts: object) -> None:
    """Print a result as JSON on standard output.

    It goes around the gate, which would change names. JSON is harmless: all characters are
    printable ASCII, no line begins with a colon, and an escape parts ``##[`` where a name holds it.
    """
    text = json.dumps(_shorten_long_texts(without_secrets(facts)), indent=2)
    text = text.replace("##", "#\\u0023")
    stream = _underlying_stream(sys.stdout)
    stream.write(f"{text}\n")
    stream.flush()


def write_workflow_command(line: str) -> None:
    """Print a command for a CI runner, which the gate would stop; the data in it must have been
    escaped.
    """
    stream = unguarded_stderr()
    stream.write(_encodable(f"{line}\n", stream))
    stream.flush()


def unguarded_stderr() -> TextIO:
    """Standard error for progress bars, which move the cursor; whoever names a bar makes the name
    harmless.
    """
    return _underlying_stream(sys.stderr)


def _underlying_stream(stream: TextIO) -> TextIO:
    return stream.stream if isinstance(stream, GuardedStream) else stream


def _encodable(text: str, stream: TextIO) -> str:
    """The text with escapes for what the stream cannot encode, such as file names in a C locale."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def _shorten_long_texts(value: Any) -> Any:
    """Plain values with the middle of very long texts left out."""
    if isinstance(value, str):
        return shorten(value, LONGEST_VALUE)
    if isinstance(value, Mapping):
        return {_shorten_long_texts(key): _shorten_long_texts(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_shorten_long_texts(item) for item in value]
    return value
