"""Options that several commands share, and the values they parse."""

from __future__ import annotations

import contextlib
import math
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ckpt_tools.location import Location
from ckpt_tools.urls import is_url

if TYPE_CHECKING:
    from ckpt_tools.data.preprocessing import Preprocessing

Command = TypeVar("Command", bound=Callable[..., Any])


class _LocationType(click.Path):
    """A path or a URL, as a ``Location``."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if isinstance(value, Location):
            return value
        if isinstance(value, str) and is_url(value):
            return Location.of(value)
        return Location(Path(os.fsdecode(super().convert(value, param, ctx))))


path = _LocationType(path_type=Path, readable=False)  # who cannot be read is told by the reader, like all else


def comma_separated_numbers(kind: type[int] | type[float], *, positive: bool) -> dict[str, Any]:
    """Arguments of an option that takes numbers separated by commas: ``3,224,224`` or ``0.485,0.456,0.406``."""

    def parse(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[float, ...] | None:
        if value is None:
            return None
        try:
            found = tuple(kind(part) for part in value.split(","))
        except ValueError:
            raise click.BadParameter(f"{value!r}: expected {kind.__name__}s separated by commas.") from None
        if not all(map(math.isfinite, found)):
            raise click.BadParameter(f"{value!r}: expected finite numbers.")
        if positive and min(found) <= 0:
            raise click.BadParameter(f"{value!r}: expected numbers above zero.")
        return found

    return {"metavar": "N,N,…" if kind is int else "X,X,…", "callback": parse}


@contextlib.contextmanager
def redirect_foreign_stdout() -> Iterator[None]:
    """What a user's factory or data code prints, or a program that it starts, goes to stderr: stdout is for results."""
    stdout = sys.stdout
    try:
        ours, theirs = stdout.fileno(), sys.stderr.fileno()
        stdout.flush()
        kept = os.dup(ours)
    except (AttributeError, OSError, ValueError):  # closed, or no files
        with contextlib.redirect_stdout(sys.stderr):
            yield
        return
    try:
        os.dup2(theirs, ours)
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        with contextlib.suppress(OSError, ValueError):
            stdout.flush()  # what went around the redirection
        os.dup2(kept, ours)
        os.close(kept)


def combine_options(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    """Several option decorators as one, in the order in which help lists them."""

    def decorate(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


architecture = combine_options(
    click.option(
        "--arch",
        "architecture",
        metavar="NAME",
        help="Architecture: timm:resnet50, torchvision:densenet121, package.module:factory (your code is imported and "
        "run). Not needed where the checkpoint names it.",
    ),
    click.option(
        "--model-kwargs",
        multiple=True,
        metavar="K=V",
        help="Keyword argument of the architecture, repeatable; drop rates of the training run go here: drop_rate=0.2.",
    ),
)

checkpoint = combine_options(
    click.option(
        "--weights",
        metavar="auto|model|ema|ENTRY",
        default="auto",
        show_default=True,
        help="Which weights of a checkpoint that holds several sets; auto takes EMA weights where there are some.",
    ),
    click.option(
        "--trust",
        is_flag=True,
        help="Load a pickle that needs code. Whoever made the file can then run anything on this machine.",
    ),
)

evaluation = combine_options(
    click.option(
        "--class-map",
        type=path,
        metavar="FILE",
        help='Which output of the head each class folder is: JSON {"folder": 0, …}, or one name a line in the head\'s '
        "order. Default: the folders in alphabetical order.",
    ),
    click.option(
        "--calibrate",
        is_flag=True,
        help="Fit a temperature, too: NLL and ECE of each half of the images at the other half's temperature. Weights "
        "stay as they are.",
    ),
    click.option(
        "--gate",
        metavar="EXPR",
        help="What must hold, or exit code 4: 'error <= before + 0.1 and ece <= 5'. Metrics: error, error5, ece "
        "(percent, so 0.1 is a tenth of a point), nll (nats), without temperature. Comparisons: < <= > >=. Sums of "
        "numbers, before (the same metric) and before.nll, with + - * and brackets.",
    ),
)

preprocessing = combine_options(
    click.option(
        "--input-size",
        **comma_separated_numbers(int, positive=True),
        help="Shape of one sample, such as 3,224,224 or 500.",
    ),
    click.option("--mean", **comma_separated_numbers(float, positive=False), help="Per channel, on the scale 0–1."),
    click.option("--std", **comma_separated_numbers(float, positive=True), help="Per channel, on the scale 0–1."),
    click.option("--interpolation", type=click.Choice(["nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"])),
    click.option(
        "--crop-pct",
        type=click.FloatRange(0, 1, min_open=True),
        help="Side of the centre crop / shorter side of the image.",
    ),
)


def pop_preprocessing(said: dict[str, Any]) -> Preprocessing:
    """Take the values of the options above out of a command's arguments."""
    from ckpt_tools.data.preprocessing import Preprocessing

    return Preprocessing(
        **{name: said.pop(name) for name in ("input_size", "mean", "std", "interpolation", "crop_pct")}
    )


running = combine_options(
    click.option(
        "--device", default="auto", show_default=True, help="auto (CUDA if there is one), cpu, cuda or cuda:N."
    ),
    click.option(
        "--batch-size",
        type=click.IntRange(min=1),
        help="Default: as large as memory allows, a power of two up to 512.",
    ),
    click.option(
        "--workers", type=click.IntRange(min=0), help="Threads that decode images. Default: one a core, up to 8."
    ),
)

as_json = click.option("--json", "as_json", is_flag=True, help="The result as JSON on stdout, and nothing else there.")

reports = click.option(
    "--report",
    "reports",
    type=path,
    multiple=True,
    metavar="FILE",
    help="Also write a report: a page that needs nothing else (.html, extra `report`), a CI summary (.md) or the facts "
    "(.json). Repeatable. An earlier report that nobody has changed is replaced, no other file is, not even with "
    "--overwrite.",
)
