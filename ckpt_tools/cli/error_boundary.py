"""The one error boundary: what goes wrong becomes a message on stderr and an exit code."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Any

import click

from ckpt_tools.arguments import caller_gives_options
from ckpt_tools.cli import github
from ckpt_tools.cli.printing import guarded_streams, print_message
from ckpt_tools.cli.progress import transfer_bar
from ckpt_tools.errors import CkptToolsError, is_short_of_memory
from ckpt_tools.import_path import children_without_current_folder
from ckpt_tools.plain_text import harmless, shorten_message
from ckpt_tools.redaction import remembering, without_fragments
from ckpt_tools.remote.mirror import open_mirror
from ckpt_tools.urls import remember_urls

TRACEBACK_VARIABLE = "CKPT_FIX_TRACEBACK"  # set it to anything to see where an error came from


class ErrorBoundary(click.Group):
    """A group whose commands answer with our exit codes and never with a traceback."""

    def main(self, args: Sequence[str] | None = None, *more: Any, **settings: Any) -> Any:
        """As of any command, with the standard streams that a daemon may have closed, and behind
        the gate.

        The secrets of all URLs are known before anything looks at the arguments: an error of usage
        quotes them.
        """
        _open_streams()
        args = args if args is None else list(args)
        with remembering(), guarded_streams(), caller_gives_options():
            remember_urls(sys.argv[1:] if args is None else args)
            words = [word for value in os.environ.values() if "://" in value for word in value.split()]
            remember_urls(word for word in words if "@" in word or "?" in word)  # of proxies, for example
            try:
                with interrupt_on_sigterm():
                    return super().main(args, *more, **settings)
            except SystemExit as error:
                # An interrupt between the end of `invoke` and that of click ends with click's own
                # exit code.
                sys.exit(130 if error.code == 1 and _interrupted.is_set() else error.code)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command and answer for what it raises.

        Copies of remote files last as long as the command.
        """
        _interrupted.clear()  # a process may run several commands, as the tests do
        try:
            with (
                children_without_current_folder(),
                open_mirror(transfer_bar),
                interrupt_on_sigterm(),
            ):
                return self._invoke_reporting_errors(ctx)
        except KeyboardInterrupt as error:  # as the command ended
            sys.exit(report_error(error))

    def _invoke_reporting_errors(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except click.ClickException as error:
            message = _presentable(error.format_message())
            github.report_failure(message, error.exit_code)
            if message != error.format_message():  # an argument was a URL with a token
                raise click.UsageError(message, getattr(error, "ctx", None)) from error
            raise
        except (click.exceptions.Exit, click.Abort):
            raise
        except BrokenPipeError:
            # The reader of our output went away; keep Python from complaining once more at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)
        except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 - the last resort
            sys.exit(report_error(error))


def _open_streams() -> None:
    """Open closed standard streams on the null device.

    Otherwise a file that is opened later would get the number of one, and be printed into.
    """
    # A new file gets the lowest free number, so this fills the gaps among 0, 1 and 2.
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(number)
    if sys.stdout is None:
        sys.stdout = os.fdopen(1, "w", encoding="utf-8")
    if sys.stderr is None:
        sys.stderr = os.fdopen(2, "w", encoding="utf-8")


@contextlib.contextmanager
def interrupt_on_sigterm() -> Iterator[None]:
    """SIGTERM ends the block like an interrupt, so that temporary files are removed."""
    previous = {signal.SIGTERM: signal.signal(signal.SIGTERM, _interrupt)}
    # A process in the background ignores SIGINT, and shall go on doing so.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        previous[signal.SIGINT] = signal.signal(signal.SIGINT, _interrupt)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


# Libraries that call back into Python turn an interrupt into an error of their own, so this
# remembers it.
_interrupted = threading.Event()


def _interrupt(number: int, frame: FrameType | None) -> None:
    _interrupted.set()
    raise KeyboardInterrupt


def report_error(error: BaseException) -> int:
    """Print an error, and its traceback if CKPT_FIX_TRACEBACK is set.

    Returns the exit code for it.
    """
    if os.environ.get(TRACEBACK_VARIABLE):
        print_message("".join(traceback.format_exception(error)))
    message, code = _message_and_code(error)
    message = _presentable(message)
    # Behind a line break this prefix is a part of a file's name, which must not look like our
    # message.
    prefix = "ckpt-fix: "
    print_message(prefix + message.replace(f"\n{prefix}", f"\n  {prefix}"))
    github.report_failure(message, code)
    return code


def exit_code(error: BaseException) -> int:
    """The exit code for an error."""
    return _message_and_code(error)[1]


def _message_and_code(error: BaseException) -> tuple[str, int]:
    if isinstance(error, KeyboardInterrupt) or _interrupted.is_set():
        return "interrupted; no unfinished output is left", 130
    if isinstance(error, CkptToolsError):
        return str(error), error.exit_code
    if is_short_of_memory(error):
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        advice = "Try a smaller --batch-size, fewer --workers, or another --device."
        return f"memory ran out: {reason}. {advice}", 1
    if isinstance(error, OSError):
        name = error.filename or "standard output, or a file"
        return f"{name}: {error.strerror or error}. Check the path and its permissions.", 1
    return (
        f"{type(error).__name__}: {error}. This is a bug of ckpt-fix; {TRACEBACK_VARIABLE}=1 shows where.",
        1,
    )


def _presentable(message: str) -> str:
    """A message for standard error, an annotation and the summary: without secrets, of bounded
    size, harmless.
    """
    return harmless(shorten_message(without_fragments(message)))
