"""``ckpt-fix convert``: any readable checkpoint as a safetensors file."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from ckpt_tools.cli import options
from ckpt_tools.cli.error_boundary import interrupt_on_sigterm
from ckpt_tools.cli.printing import print_json, print_result, redirect_foreign_stdout

if TYPE_CHECKING:  # it imports torch
    from ckpt_tools.jobs.conversion import ConvertRequest


@click.command()
@click.argument("checkpoint", type=options.path)
@click.option(
    "-o",
    "--output",
    type=options.path,
    help="A file or a URL. Default: NAME.safetensors beside the checkpoint.",
)
@options.overwrite
@options.weights
@options.pack("request", "ckpt_tools.jobs.conversion", "ConvertRequest")
@options.as_json
def convert(request: ConvertRequest, as_json: bool) -> None:
    """Write the weights of CHECKPOINT as one safetensors file, bit for bit, under the same keys in
    order.

    CHECKPOINT is anything that can be read: torch.save files, folders of shards, TorchScript,
    whatever inspect shows. Nothing in it is executed and it is never changed; no architecture is
    needed. Of a file that holds several sets of weights, --weights chooses. Wrapper prefixes such
    as module. are removed; tensors that share memory are written once under each name.

    \b
        ckpt-fix convert model.pt
        ckpt-fix convert last.pth.tar --weights ema -o ema.safetensors
        ckpt-fix diff model.pt model.safetensors --expect nothing
    """
    from ckpt_tools.jobs.conversion import convert_checkpoint
    from ckpt_tools.report.records.reestimation_json import conversion_json
    from ckpt_tools.report.text.comparison_text import conversion_text

    with redirect_foreign_stdout(), interrupt_on_sigterm():
        conversion = convert_checkpoint(request)
    if as_json:
        print_json(conversion_json(conversion))
    else:
        print_result(conversion_text(conversion))
