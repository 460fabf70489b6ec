"""``ckpt-fix inspect``: the page to read first."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from ckpt_tools.cli import options
from ckpt_tools.cli.printing import print_json, print_result, redirect_foreign_stdout

if TYPE_CHECKING:  # it imports torch
    from ckpt_tools.jobs.inspection import InspectRequest


@click.command()
@click.argument("checkpoint", type=options.path, required=False)
@click.option(
    "--data",
    metavar="SPEC",
    help="Training data, as for bn-reestimate: at most 512 samples of it answer why the model is worse "
    "in eval mode than in training.",
)
@options.model
@options.dropout
@options.preprocessing
@options.reading
@click.option(
    "--all",
    "everything",
    is_flag=True,
    help="Every row of the tables, which are cut at 12 otherwise.",
)
@options.pack("request", "ckpt_tools.jobs.inspection", "InspectRequest")
@options.as_json
def inspect(request: InspectRequest, everything: bool, as_json: bool) -> None:
    """Show what CHECKPOINT, or an architecture, is and what bn-reestimate would do with it.

    Nothing is written. The page tells the file's format and what is inside, the architecture and
    who says so, the input and its preprocessing, dropout sites with their rates, BatchNorm layers,
    which lie behind which site, and the command to run. Where the architecture cannot be told, it
    ends with what is known of the file (exit code 1).

    With --data, the statistics that the BatchNorm layers have stored are compared with those of
    the data, with dropout on and off, and a paragraph says why eval mode may be worse than
    training, with the command that helps.

    \b
        ckpt-fix inspect model.pt
        ckpt-fix inspect model.pt --data train/
        ckpt-fix inspect model.pt --arch torchvision:densenet121 --model-kwargs drop_rate=0.2
        ckpt-fix inspect --arch timm:resnet50 --model-kwargs drop_path_rate=0.1 --json
    """
    from ckpt_tools.jobs.inspection import inspect_checkpoint
    from ckpt_tools.report.records.reestimation_json import inspection_json
    from ckpt_tools.report.text.inspection_text import inspection_text

    with redirect_foreign_stdout():
        inspection = inspect_checkpoint(request)
    if as_json:
        print_json(inspection_json(inspection))
    else:
        print_result(inspection_text(inspection, everything=everything))
    if inspection.error is not None:
        raise inspection.error
