"""The command line of an experiment."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import click
import torch

from ckpt_tools.errors import CkptToolsError
from reproduce.experiment import HOME, Experiment, Setup, draw, run
from reproduce.sets import Spec
from reproduce.tables import section, write_page


def command(experiment: Experiment) -> click.Command:
    """The command line of an experiment."""

    @click.option("--seeds", type=click.IntRange(1), help=f"Repetitions; {experiment.seeds} by default.")
    @click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:1, …")
    @click.option(
        "--only",
        multiple=True,
        metavar="FIELD=VALUE",
        help=f"Only these cells. Fields: {_names(experiment)}.",
    )
    @click.option(
        "--quick", is_flag=True, help="The whole way in less than a minute, on very little; proves nothing."
    )
    @click.option(
        "--out",
        type=click.Path(file_okay=False, path_type=Path),
        help="Folder for RESULTS.md and results/; beside the scripts by default, "
        "with --quick a temporary one.",
    )
    def invoke(
        seeds: int | None,
        device: str,
        only: Sequence[str],
        quick: bool,
        out: Path | None,
        data: str | None = None,
    ) -> None:
        _check_device(device)
        chosen = _chosen(experiment, only)
        out = _folder(out, quick)
        try:
            spec = Spec.parse(data) if data else None
            with tempfile.TemporaryDirectory() as temporary:
                scratch = Path(temporary) if quick else out / "results" / f".{experiment.file(out).stem}"
                seeds = seeds or (2 if quick else experiment.seeds)
                run(experiment, Setup(spec, seeds, device, quick, scratch, chosen), out)
            show(experiment, out)
        except CkptToolsError as error:
            raise click.ClickException(str(error)) from error

    if experiment.data:
        kinds = ", ".join(f"{name}:DIR" for name in experiment.data)
        help_ = f"digits (bundled), or in torchvision's layout, without a download: {kinds}."
        invoke = click.option("--data", "--root", "data", default="digits", show_default=True, help=help_)(
            invoke
        )
    return click.command(experiment.name, help=f"{experiment.title}.\n\n{experiment.paper}")(invoke)


def _names(experiment: Experiment) -> str:
    return ", ".join(cell_field.name for cell_field in fields(experiment.cell))


def _chosen(experiment: Experiment, only: Sequence[str]) -> dict[str, str]:
    chosen = dict(word.partition("=")[::2] for word in only)
    wrong = [name for name in chosen if name not in _names(experiment).split(", ")]
    if wrong:
        raise click.BadParameter(f"{wrong[0]}: expected FIELD=VALUE with a field among {_names(experiment)}.")
    return chosen


def _check_device(device: str) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch says both of a CUDA that is not there
        raise click.BadParameter(f"{device}: expected a device of this machine. {error}") from error


def _folder(out: Path | None, quick: bool) -> Path:
    if not quick:
        return out or HOME
    if out is not None and out.resolve() == HOME.resolve():
        raise click.UsageError(f"--quick --out {out}: the real results are there. Choose another folder.")
    return out or Path(tempfile.mkdtemp(prefix="reproduce-"))


def show(experiment: Experiment, out: Path) -> None:
    """Draw, render, and print this experiment's section and where everything is."""
    pictures = draw(experiment, out)
    page = write_page(out)
    click.echo(section(experiment, out))
    click.echo("\n".join(str(path) for path in (experiment.file(out), *pictures, page)), err=True)
