"""Data and nets that end the process they are in, for workers of a cluster; its folder marks what they do."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nets
from torch import Tensor

from ckpt_tools.jobs.many.engine import Record
from ckpt_tools.jobs.many.folder_run import ItemResult
from ckpt_tools.report.records.manifest import make_record

SHAPE = (3, 8, 8)


def killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def once() -> Iterator[Tensor]:
    """Batches amid which the first process of all dies."""
    for number, batch in enumerate(nets.batches(SHAPE)):
        if number == 2 and not _marked("killed"):
            killed()
        yield batch


def endless() -> Iterator[Tensor]:
    """Batches without an end; amid them the process named in ``driver`` is told to end."""
    number = 0
    try:
        while True:
            yield from nets.batches(SHAPE)
            number += 1
            if number == 20 and not _marked("told"):
                os.kill(int(Path("driver").read_text()), signal.SIGTERM)
    finally:
        _marked(f"ended-{os.getpid()}")


def _marked(name: str) -> bool:
    """Whether a mark was there; it is from now on."""
    try:
        Path(name).touch(exist_ok=False)
    except FileExistsError:
        return True
    return False


class Fragile(nets.DenseNet):
    """Dies when it is taken to a device, if its head's first bias is 666."""

    def to(self, *args: Any, **kwargs: Any) -> Fragile:
        if not self.head.bias.is_meta and self.head.bias[0] == 666:
            killed()
        return super().to(*args, **kwargs)


def described(result: ItemResult) -> Record:
    """The record of a result; the first process of all that has an output dies before it can say so."""
    if result.status == "done" and not _marked("described"):
        killed()
    return make_record(result)
