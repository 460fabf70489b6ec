"""Options that several commands share, in groups; a command gets each group as one dataclass.

The dataclasses belong to the jobs, whose modules import torch. So each is imported when a command
runs, and not before: ``ckpt-fix --help`` needs no torch.
"""

from __future__ import annotations

import functools
import inspect
import math
import os
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar, cast

import click

from ckpt_tools.identify.model_kwargs import parse_model_kwargs
from ckpt_tools.location import Location
from ckpt_tools.urls import is_url
from ckpt_tools.walker.dropout_patterns import parse_declared_dropout

Command = TypeVar("Command", bound=Callable[..., Any])


class _LocationType(click.Path):
    """A path or a URL, as a ``Location``."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if isinstance(value, Location):
            return value
        if isinstance(value, str) and is_url(value):
            return Location.of(value)
        return Location(Path(os.fsdecode(super().convert(value, param, ctx))))


# click shall not check permissions: the reader's message says more about a file that cannot be
# read.
path = _LocationType(path_type=Path, readable=False)


def comma_separated_numbers(kind: type[int] | type[float], *, positive: bool) -> dict[str, Any]:
    """Arguments of an option that takes numbers separated by commas, such as ``3,224,224``."""

    def parse(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[float, ...] | None:
        if value is None:
            return None
        try:
            numbers = tuple(kind(part) for part in value.split(","))
        except ValueError:
            raise click.BadParameter(f"{value!r}: expected {kind.__name__}s separated by commas.") from None
        if not all(map(math.isfinite, numbers)):
            raise click.BadParameter(f"{value!r}: expected finite numbers.")
        if positive and min(numbers) <= 0:
            raise click.BadParameter(f"{value!r}: expected numbers above zero.")
        return numbers

    return {"metavar": "N,N,…" if kind is int else "X,X,…", "callback": parse}


def combine_options(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    """Join several decorators into one that lists its options in this order in the help."""

    def decorate(command: Command) -> Command:
        # The decorator that is applied last comes first in the help.
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def pack(parameter: str, module: str, name: str) -> Callable[[Command], Command]:
    """Give a command the values of several options as one object, the dataclass ``name`` of a
    module.

    The fields of the dataclass name the options. ``parameter`` is what the command calls the
    object. A field that is a dataclass itself is packed by a decorator further up, which runs
    first.
    """

    def decorate(command: Command) -> Command:
        # This also copies the options that click has attached to the function so far.
        @functools.wraps(command)
        def run(**values: Any) -> Any:
            kind = getattr(import_module(module), name)
            # A command may lack an option; then the dataclass has a default for it.
            names = [name for name in inspect.signature(kind).parameters if name in values]
            fields = {field: values.pop(field) for field in names}
            return command(**values, **{parameter: kind(**fields)})

        return cast(Command, run)

    return decorate


weights = combine_options(
    click.option(
        "--weights",
        metavar="auto|model|ema|ENTRY",
        default="auto",
        show_default=True,
        help="Which weights of a checkpoint that holds several sets; auto takes EMA weights where "
        "there are some, under whatever name their framework saves them.",
    ),
    click.option(
        "--trust",
        is_flag=True,
        help="Load a pickle that needs code. Whoever made the file can then run anything on this machine.",
    ),
)

model = combine_options(
    pack("model", "ckpt_tools.jobs.request", "ModelChoice"),
    click.option(
        "--arch",
        "architecture",
        metavar="NAME",
        help="Architecture: timm:resnet50, torchvision:densenet121, package.module:factory (your "
        "code is imported and run). Not needed where the checkpoint names it. "
        "Lightning's recorded hyper_parameters become arguments of your class.",
    ),
    click.option(
        "--model-kwargs",
        multiple=True,
        metavar="K=V",
        callback=lambda context, parameter, pairs: parse_model_kwargs(pairs),
        help="Keyword argument of the architecture, repeatable; drop rates of the training run go "
        "here: drop_rate=0.2.",
    ),
    weights,
)

dropout = click.option(
    "--dropout",
    multiple=True,
    metavar="NAME=RATE",
    callback=lambda context, parameter, pairs: parse_declared_dropout(pairs),
    help="Dropout that the training had and this architecture lacks, such as a port from another "
    "framework: on the output of the modules with such names ('pool*=0.25'), or on their input "
    "(conv2:input=0.25); repeatable. The drop rates are known then.",
)

evaluation = combine_options(
    pack("evaluation", "ckpt_tools.jobs.request", "EvaluationOptions"),
    click.option(
        "--labels",
        type=path,
        metavar="FILE",
        help="Labels of the images in a folder, instead of subfolders: CSV or text with a name and a "
        "label a line (a header is not needed), or one label a line in the order of the sorted names. "
        "Numbers from 0, or class names.",
    ),
    click.option(
        "--class-map",
        type=path,
        metavar="FILE",
        help="Which output of the head each class folder, or class name of --labels, is: JSON "
        """{"folder": 0, …}, or one name a line in the head's order. Default: in alphabetical order.""",
    ),
    click.option(
        "--calibrate",
        is_flag=True,
        help="Fit a temperature, too: NLL and ECE of each half of the images at the other half's "
        "temperature. Weights stay as they are.",
    ),
    click.option(
        "--gate",
        metavar="EXPR",
        help="What must hold, or exit code 4: 'error <= before + 0.1 and ece <= 5'. Metrics: "
        "error, error5, ece (percent, so 0.1 is a tenth of a point), nll (nats), without "
        "temperature. Comparisons: < <= > >=. Sums of numbers, before (the same metric) and "
        "before.nll, with + - * and brackets.",
    ),
)

preprocessing = combine_options(
    pack("preprocessing", "ckpt_tools.data.preprocessing", "Preprocessing"),
    click.option(
        "--input-size",
        **comma_separated_numbers(int, positive=True),
        help="Shape of one sample, such as 3,224,224 or 500.",
    ),
    click.option(
        "--mean",
        **comma_separated_numbers(float, positive=False),
        help="Per channel, on the scale 0–1.",
    ),
    click.option(
        "--std",
        **comma_separated_numbers(float, positive=True),
        help="Per channel, on the scale 0–1.",
    ),
    click.option(
        "--interpolation",
        type=click.Choice(["nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"]),
    ),
    click.option(
        "--crop-pct",
        type=click.FloatRange(0, 1, min_open=True),
        help="Side of the centre crop / shorter side of the image.",
    ),
    click.option(
        "--crop-mode",
        type=click.Choice(["center", "squash", "border"]),
        help="How an image gets the input's shape, as in timm. center: resized until it covers the input, "
        "and what lies over is cut off; squash: resized to it without keeping its proportions, as for "
        "lines of text; border: resized until it fits in, the rest padded with the mean colour.",
    ),
)


seed = functools.partial(
    click.option,
    "--seed",
    type=click.IntRange(0, 2**63 - 1),
    default=0,
    show_default=True,
)

reading = combine_options(
    pack("reading", "ckpt_tools.jobs.request", "ReadingOptions"),
    click.option(
        "--limit",
        type=click.IntRange(min=1),
        help="Read this many samples, drawn at random; of an iterable the first, in whole batches.",
    ),
    seed(help="Of the random order of the samples, and of the halves of --calibrate."),
    click.option(
        "--device",
        default="auto",
        show_default=True,
        help="auto (CUDA if there is one), cpu, cuda or cuda:N.",
    ),
    click.option(
        "--batch-size",
        type=click.IntRange(min=1),
        help="Default: as large as memory allows, a power of two up to 512.",
    ),
    click.option(
        "--workers",
        type=click.IntRange(min=0),
        help="Threads that decode images. Default: one a core, up to 8.",
    ),
)

as_json = click.option(
    "--json", "as_json", is_flag=True, help="The result as JSON on stdout, and nothing else there."
)

quiet = click.option("-q", "--quiet", is_flag=True, help="No progress bar.")

overwrite = click.option("--overwrite", is_flag=True, help="Replace an existing output.")

reports = click.option(
    "--report",
    "reports",
    type=path,
    multiple=True,
    metavar="FILE",
    help="Also write a report: a page that needs nothing else (.html, extra `report`), a CI "
    "summary (.md) or the facts (.json). Repeatable. An earlier report that nobody has changed "
    "is replaced, no other file is, not even with --overwrite.",
)
