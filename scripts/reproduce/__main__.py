"""`scripts/run reproduce`: one command an experiment."""

from __future__ import annotations

from pathlib import Path

import click

from reproduce import EXPERIMENTS, find


class _Experiments(click.Group):
    """A command for every experiment, its module imported when it is needed."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*EXPERIMENTS, *super().list_commands(ctx)]

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in EXPERIMENTS:
            return super().get_command(ctx, name)
        from reproduce.command import command

        return command(find(name))


@click.group(cls=_Experiments)
def main() -> None:
    """The paper's tables and figures, one command each.

    Every command has a progress bar, resumes where it was interrupted, and leaves JSON lines,
    pictures and RESULTS.md.
    """


@main.command()
@click.option(
    "--out", type=click.Path(exists=True, file_okay=False, path_type=Path), help="As the others' --out."
)
def results(out: Path | None) -> None:
    """Draw all pictures and write RESULTS.md from the records, running nothing."""
    from reproduce.experiment import HOME, draw
    from reproduce.tables import write_page

    folder = out or HOME
    for name in EXPERIMENTS:
        draw(find(name), folder)
    click.echo(write_page(folder))


if __name__ == "__main__":
    main(prog_name="scripts/run reproduce")
