"""The one error boundary: what goes wrong becomes a message on stderr and an exit code."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

import click

from ckpt_tools.cli import github
from ckpt_tools.cli.progress import transfer_bar
from ckpt_tools.errors import CkptToolsError, is_short_of_memory
from ckpt_tools.import_path import children_without_current_folder
from ckpt_tools.redaction import presentable
from ckpt_tools.remote.mirror import as_urls, mirroring

TRACEBACK = "CKPT_FIX_TRACEBACK"  # set it to anything to see where an error came from


class Boundary(click.Group):
    """A group whose commands answer with our exit codes and never with a traceback."""

    def main(self, *arguments: Any, **said: Any) -> Any:
        """As of any command, with the standard streams that a daemon may have closed."""
        _open_streams()
        return super().main(*arguments, **said)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command and answer for what it raises. Copies of remote files last as long as the command."""
        _interrupted.clear()
        try:
            with children_without_current_folder(), mirroring(transfer_bar), terminable():
                return self._answered(ctx)
        except KeyboardInterrupt as error:  # as the command ended
            sys.exit(told(error))

    def _answered(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except click.ClickException as error:
            message = as_urls(error.format_message())
            github.fail(message, error.exit_code)
            if message != error.format_message():  # an argument was a URL with a token
                raise click.UsageError(message, getattr(error, "ctx", None)) from error
            raise
        except (click.exceptions.Exit, click.Abort):
            raise
        except BrokenPipeError:
            # The reader of our output went away; keep Python from complaining once more at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)
        except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 - the last resort of a boundary
            sys.exit(told(error))


def _open_streams() -> None:
    """Let closed standard streams lead nowhere, lest a file that is opened later takes the number of one."""
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(number)
    if sys.stdout is None:
        sys.stdout = os.fdopen(1, "w", encoding="utf-8")
    if sys.stderr is None:
        sys.stderr = os.fdopen(2, "w", encoding="utf-8")


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM ends the block like an interrupt, so that temporary files are removed."""
    previous = {signal.SIGTERM: signal.signal(signal.SIGTERM, _interrupt)}
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where it is to be ignored
        previous[signal.SIGINT] = signal.signal(signal.SIGINT, _interrupt)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


_interrupted = threading.Event()  # libraries that call back into Python make errors of their own of an interrupt


def _interrupt(number: int, frame: FrameType | None) -> None:
    _interrupted.set()
    raise KeyboardInterrupt


def told(error: BaseException) -> int:
    """Print what went wrong; the exit code for it. With CKPT_FIX_TRACEBACK set, raises it instead."""
    if os.environ.get(TRACEBACK):
        raise error
    message, code = _answer(error)
    message = _harmless(message)
    click.echo(f"ckpt-fix: {message}", err=True)
    github.fail(message, code)
    return code


def exit_code(error: BaseException) -> int:
    """What the process says about it to whoever started it."""
    return _answer(error)[1]


def _answer(error: BaseException) -> tuple[str, int]:
    if isinstance(error, KeyboardInterrupt) or _interrupted.is_set():
        return "interrupted; no unfinished output is left", 130
    if isinstance(error, CkptToolsError):
        return as_urls(str(error)), error.exit_code
    if is_short_of_memory(error):
        said = (str(error).splitlines() or [type(error).__name__])[0]
        return f"memory ran out: {said}. Try a smaller --batch-size, fewer --workers, or another --device.", 1
    if isinstance(error, OSError):
        name = error.filename or "standard output, or a file"
        return as_urls(f"{name}: {error.strerror or error}. Check the path and its permissions."), 1
    return as_urls(f"{type(error).__name__}: {error}. This is a bug of ckpt-fix; {TRACEBACK}=1 shows where."), 1


def _harmless(message: str) -> str:
    """Names in files come from others: no control characters, and nothing that a CI runner takes for a command.

    GitHub's looks for ``::`` at the start of a line, behind blanks too, and for ``##[`` anywhere (ActionCommand.cs).
    """
    return re.sub(r"^(\s*)::", r"\1: :", presentable(message), flags=re.MULTILINE).replace("##[", "# #[")
