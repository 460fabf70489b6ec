"""Progress bars: samples a second, time left, and how sure a re-estimation is so far."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Never

from tqdm import tqdm

from ckpt_tools.cli.printing import unguarded_stderr
from ckpt_tools.plain_text import harmless, one_line
from ckpt_tools.redaction import without_secrets

if TYPE_CHECKING:
    from ckpt_tools.reestimate.stopping import Progress


class ReestimationBar:
    """A tqdm bar on stderr, a new one for every pass; call it with each Progress."""

    def __init__(self, total: int | None, *, hidden: bool) -> None:
        self._total, self._hidden = total, hidden
        self._pass_number = 0
        self._bar: tqdm[Never] | None = None

    def __enter__(self) -> ReestimationBar:
        self._begin(1)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def __call__(self, progress: Progress) -> None:
        """Show where the pass stands."""
        # Every pass counts its images from zero.
        if progress.pass_number != self._pass_number:
            self._begin(progress.pass_number)
        assert self._bar is not None
        self._bar.set_postfix_str(_certainty(progress), refresh=False)
        self._bar.update(progress.images - self._bar.n)  # tqdm takes a difference

    def _begin(self, number: int) -> None:
        if self._bar is not None:
            self._bar.close()
        self._pass_number = number
        name = f"pass {number}"
        self._bar = progress_bar(name, self._total, unit="img", hidden=self._hidden)


class EvaluationBar:
    """A tqdm bar on stderr for every model that is evaluated; call it with which one and its images
    so far.
    """

    def __init__(self, total: int | None, *, hidden: bool) -> None:
        self._total, self._hidden = total, hidden
        self._name = ""
        self._bar: tqdm[Never] | None = None

    def __enter__(self) -> EvaluationBar:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def __call__(self, name: str, images: int) -> None:
        """Show how far the model has come."""
        if self._bar is None or name != self._name:
            if self._bar is not None:
                self._bar.close()
            self._name = name
            self._bar = progress_bar(name, self._total, unit="img", hidden=self._hidden)
        self._bar.update(images - self._bar.n)


@contextlib.contextmanager
def transfer_bar(url: str, size: int | None) -> Iterator[Callable[[int], object]]:
    """A bar for a file that comes from or goes to a store: on a terminal, if it takes longer than a
    second.
    """
    hidden = not unguarded_stderr().isatty()
    with progress_bar(url, size, unit="B", unit_scale=True, delay=1, leave=False, hidden=hidden) as bar:
        yield lambda bytes_moved: bar.update(bytes_moved - bar.n)


def progress_bar(
    name: str,
    total: int | None,
    *,
    unit: str = "",
    unit_scale: bool = False,
    hidden: bool = False,
    leave: bool = True,
    delay: float = 0,
    position: int | None = None,
) -> tqdm[Never]:
    """Begin a tqdm bar on standard error; the arguments are those of tqdm, but for ``hidden``.

    It goes around the gate, since it moves the cursor. CI runners take what follows a carriage
    return for a new line, so the name is made harmless here.
    """
    stream = unguarded_stderr()
    return tqdm(
        total=total,
        desc=harmless(one_line(without_secrets(name))),
        file=stream,
        mininterval=0.2 if stream.isatty() else 10,  # seconds; a log keeps every state of a bar
        dynamic_ncols=True,
        unit=unit,
        unit_scale=unit_scale,
        disable=hidden,
        leave=leave,
        delay=delay,
        position=position,
    )


def write_above_bars(line: str) -> None:
    """Print a line on standard error while bars are shown there."""
    tqdm.write(harmless(one_line(without_secrets(line))), file=unguarded_stderr())


def _certainty(progress: Progress) -> str:
    bound = "" if math.isinf(progress.bound) else f"standard error ≤ {progress.bound:.1%}"
    change = "" if progress.residual is None else f", last change {progress.residual:.1g}"
    return bound + change
