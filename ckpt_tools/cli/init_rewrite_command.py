"""``ckpt-fix init-rewrite``: weights of a fresh model, corrected for dropout and for the
nonlinearity.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, get_args

import click

from ckpt_tools.cli import options
from ckpt_tools.cli.error_boundary import interrupt_on_sigterm
from ckpt_tools.cli.printing import print_json, print_result, redirect_foreign_stdout
from ckpt_tools.contract import BackwardFactor, BackwardTerm, InitRule, Scheme
from ckpt_tools.location import Location

if TYPE_CHECKING:  # it imports torch
    from ckpt_tools.jobs.initialization import InitRequest, SignalsCallback


@click.command(name="init-rewrite")
@click.argument("checkpoint", type=options.path, required=False)
@options.model
@click.option(
    "-o",
    "--output",
    type=options.path,
    help="Default: NAME.init.safetensors beside the checkpoint; needed without one.",
)
@options.overwrite
@click.option(
    "--scheme",
    type=click.Choice(get_args(Scheme)),
    default="hypersphere",
    show_default=True,
    help="What is scaled: each unit's weights on the unit sphere; orthonormal ones; the uniform "
    "distribution of Xavier or the normal one of He, generalised to any nonlinearity and drop "
    "rate.",
)
@click.option(
    "--rule",
    type=click.Choice(get_args(InitRule)),
    default="paper",
    show_default=True,
    help="paper: by the neighbours of each layer. propagated: by the variance that the drawn "
    "weights give each layer's output on N(0, 1) inputs, so that it becomes 1.",
)
@click.option(
    "--backward-term",
    type=click.Choice(get_args(BackwardTerm)),
    default="auto",
    show_default=True,
    help="Whether the error signal counts, too. auto: in linear layers under --rule paper.",
)
@click.option(
    "--backward-factor",
    type=click.Choice(get_args(BackwardFactor)),
    default="paper",
    show_default=True,
    help="paper: keep·E[f'²]. inverted: E[f'²]/keep, which is what inverted dropout (that of torch) "
    "does to errors.",
)
@options.seed(help="Of the new weights, and without a checkpoint of all other values.")
@click.option("--force", is_flag=True, help="Rewrite a checkpoint whose BatchNorm layers have seen data.")
@click.option(
    "--verify",
    is_flag=True,
    help="Measure before and after, in training mode: the variance of every layer's output and error signal.",
)
@click.option(
    "--data",
    metavar="SPEC",
    help="Verify on this data (as of bn-reestimate) instead of N(0, 1) inputs.",
)
@click.option(
    "--samples",
    type=click.IntRange(min=2),
    default=64,
    show_default=True,
    help="Of the verification.",
)
@click.option(
    "--device",
    default="auto",
    show_default=True,
    help="Of the verification: auto (CUDA if there is one), cpu, cuda or cuda:N.",
)
@click.option(
    "--report",
    type=options.path,
    metavar="FILE",
    help="Verify, and draw the distributions as .png, .svg or .pdf. An earlier picture is replaced, "
    "no other file is.",
)
@options.preprocessing
@options.pack("request", "ckpt_tools.jobs.initialization", "InitRequest")
@options.as_json
def init_rewrite(request: InitRequest, as_json: bool) -> None:
    """Give a model's weights an initialisation that is corrected for dropout and for the
    nonlinearity.

    The model is a fresh CHECKPOINT, or an architecture as its library initialises it. A new
    safetensors file is written in which the weights of linear layers and convolutions are new and
    their biases 0; all else stays.

    \b
        ckpt-fix init-rewrite --arch timm:vgg16_bn --model-kwargs drop_rate=0.5 -o init.safetensors
        ckpt-fix init-rewrite fresh.pt --arch torchvision:densenet121 --model-kwargs drop_rate=0.2
        ckpt-fix init-rewrite --arch timm:mixer_b16_224 --rule propagated --verify -o init.safetensors
    """
    from ckpt_tools.jobs.initialization import initialize_checkpoint
    from ckpt_tools.report.records.init_json import init_json
    from ckpt_tools.report.text.init_text import init_text

    with redirect_foreign_stdout(), interrupt_on_sigterm():
        outcome = initialize_checkpoint(request, _make_figure_writer(request))
    if as_json:
        print_json(init_json(outcome))
    else:
        print_result(init_text(outcome))


def _make_figure_writer(request: InitRequest) -> SignalsCallback | None:
    """A function that draws the signals, if a picture is wanted and after a check that it can be
    drawn.
    """
    report = request.report
    if report is None:
        return None
    from ckpt_tools.report.pages.signals_figure import (
        check_earlier_figure,
        check_figure,
        write_signals_figure,
    )
    from ckpt_tools.storage.files.input_files import files_of_checkpoint

    inputs = () if request.checkpoint is None else files_of_checkpoint(request.checkpoint)
    data = None if request.data is None else Location.of(request.data)
    # Before the weights are made: the figure is drawn last.
    check_figure(report)
    check_earlier_figure(report, (*inputs, request.output, data))
    return partial(write_signals_figure, report, only_own=True)
