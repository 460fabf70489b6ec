"""``ckpt-fix inspect``: what the walker finds, without data."""

from __future__ import annotations

import json
from pathlib import Path

import click

from ckpt_tools.cli import options


@click.command()
@click.argument("checkpoint", type=options.path, required=False)
@options.architecture
@options.checkpoint
@click.option(
    "--input-size",
    **options.numbers(int, positive=True),
    help="Shape of one sample, such as 3,224,224 or 500. Default: the architecture's own.",
)
@options.as_json
def inspect(
    checkpoint: Path | None,
    architecture: str | None,
    model_kwargs: tuple[str, ...],
    weights: str,
    trust: bool,
    input_size: tuple[int, ...] | None,
    as_json: bool,
) -> None:
    """List the dropout sites and BN layers of CHECKPOINT, or of an architecture, and what lies behind what.

    \b
        ckpt-fix inspect model.pt --arch torchvision:densenet121 --model-kwargs drop_rate=0.2
        ckpt-fix inspect --arch timm:resnet50 --model-kwargs drop_path_rate=0.1 --json
    """
    from ckpt_tools.identify.kwargs import parse_model_kwargs
    from ckpt_tools.identify.load import load, load_architecture
    from ckpt_tools.jobs.inputs import Preprocessing, example_input, input_spec_for
    from ckpt_tools.report.json import inspection_json
    from ckpt_tools.report.text import architecture_line, checkpoint_line, walk_text
    from ckpt_tools.walker.downstream import walk

    kwargs = parse_model_kwargs(model_kwargs)
    if checkpoint is None and architecture is None:
        raise click.UsageError("Give a checkpoint, or an architecture with --arch.")
    with options.own_stdout():
        if checkpoint is not None:
            loaded = load(checkpoint, architecture, model_kwargs=kwargs, weights=weights, trust=trust)
        else:
            loaded = load_architecture(str(architecture), kwargs)
        spec = input_spec_for(loaded.input_spec, Preprocessing(input_size=input_size), None)
        found = walk(loaded.model, example_input(spec, None), probe=loaded.probe)
    if as_json:
        click.echo(json.dumps(inspection_json(loaded, found), indent=2))
        return
    if loaded.checkpoint is not None:
        click.echo(checkpoint_line(loaded.checkpoint))
    click.echo(f"{architecture_line(loaded)}\n\n{walk_text(found)}")
