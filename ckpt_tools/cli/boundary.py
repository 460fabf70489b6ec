"""The one error boundary: what goes wrong becomes a message on stderr and an exit code."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any

import click

from ckpt_tools.cli import github
from ckpt_tools.errors import CkptToolsError

TRACEBACK = "CKPT_FIX_TRACEBACK"  # set it to anything to see where an error came from


class Boundary(click.Group):
    """A group whose commands answer with our exit codes and never with a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command and answer for what it raises."""
        try:
            return super().invoke(ctx)
        except CkptToolsError as error:
            _fail(str(error), error.exit_code)
        except KeyboardInterrupt:
            _fail("interrupted; nothing was written", 130)
        except click.ClickException as error:
            github.fail(error.format_message(), error.exit_code)
            raise
        except (click.exceptions.Exit, click.Abort):
            raise
        except BrokenPipeError:
            # The reader of our output went away; keep Python from complaining once more at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)
        except OSError as error:
            _fail(f"{error.filename or 'a file'}: {error.strerror or error}. Check the path and its permissions.", 1)
        except Exception as error:  # noqa: BLE001 - the last resort of a boundary
            _fail(f"{type(error).__name__}: {error}. This is a bug of ckpt-fix; {TRACEBACK}=1 shows where.", 1)


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM ends the block like an interrupt, so that temporary files are removed."""
    previous = signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _fail(message: str, code: int) -> None:
    if os.environ.get(TRACEBACK):
        raise
    message = _harmless(message)
    click.echo(f"ckpt-fix: {message}", err=True)
    github.fail(message, code)
    sys.exit(code)


def _harmless(message: str) -> str:
    """Names in files come from others: no control characters, and nothing that a CI runner takes for a command.

    GitHub's looks for ``::`` at the start of a line, behind blanks too, and for ``##[`` anywhere (ActionCommand.cs).
    """
    from ckpt_tools.report.redaction import presentable

    return re.sub(r"^(\s*)::", r"\1: :", presentable(message), flags=re.MULTILINE).replace("##[", "# #[")
