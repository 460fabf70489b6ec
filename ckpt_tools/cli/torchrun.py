"""A command on several processes that torchrun has started: one of them prints, all end alike."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from ckpt_tools.cli.error_boundary import exit_code, interrupt_on_sigterm, report_error

if TYPE_CHECKING:
    from ckpt_tools.distributed import Team


@contextlib.contextmanager
def join_team(device: str) -> Iterator[Team]:
    """Join the processes that torchrun has started; without torchrun this process is a team of one.

    ``device`` is the value of --device. An error is printed by rank 0 alone, and every rank leaves
    with the exit code for it.
    """
    from ckpt_tools.distributed import Processes, Ranks, start_team
    from ckpt_tools.machine.device import resolve_device

    ranks = Ranks.from_environment()
    if ranks.world == 1:
        with start_team(ranks, cuda=False) as team:
            yield team
        return
    with (
        interrupt_on_sigterm(),
        start_team(ranks, cuda=resolve_device(device, ranks).startswith("cuda")) as team,
    ):
        assert isinstance(team, Processes)
        try:
            yield team
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 - the boundary of all ranks
            if team.is_main_process:
                code = report_error(error)
                team.announce_printed()
            else:
                team.wait_until_printed()
                code = exit_code(error)
            sys.exit(code)
