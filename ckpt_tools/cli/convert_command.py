"""``ckpt-fix convert``: any readable checkpoint as a safetensors file."""

from __future__ import annotations

from typing import Any

import click

from ckpt_tools.cli import options
from ckpt_tools.cli.error_boundary import interrupt_on_sigterm
from ckpt_tools.cli.printing import print_json, print_result
from ckpt_tools.location import Location


@click.command()
@click.argument("checkpoint", type=options.path)
@click.option(
    "-o", "--output", type=options.path, help="A file or a URL. Default: NAME.safetensors beside the checkpoint."
)
@click.option("--overwrite", is_flag=True, help="Replace an existing output.")
@options.checkpoint
@options.as_json
def convert(checkpoint: Location, as_json: bool, **said: Any) -> None:
    """Write the weights of CHECKPOINT as one safetensors file, bit for bit, under the same keys in the same order.

    CHECKPOINT is anything that can be read: torch.save files, folders of shards, TorchScript, whatever inspect shows.
    Nothing in it is executed and it is never changed; no architecture is needed. Of a file that holds several sets
    of weights, --weights chooses. Wrapper prefixes such as module. are removed; tensors that share memory are written
    once under each name.

    \b
        ckpt-fix convert model.pt
        ckpt-fix convert last.pth.tar --weights ema -o ema.safetensors
        ckpt-fix diff model.pt model.safetensors --expect nothing
    """
    from ckpt_tools.jobs.conversion import ConvertRequest
    from ckpt_tools.jobs.conversion import convert_checkpoint as execute
    from ckpt_tools.report.records.reestimation_json import conversion_json
    from ckpt_tools.report.text.reestimation_text import conversion_text

    with options.redirect_foreign_stdout(), interrupt_on_sigterm():
        conversion = execute(ConvertRequest(checkpoint, **said))
    if as_json:
        print_json(conversion_json(conversion))
    else:
        print_result(conversion_text(conversion))
