"""Engines: what takes the checkpoints of a folder to their ends, on this machine or elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from ckpt_tools.jobs.many.folder_items import CheckpointItem
from ckpt_tools.jobs.many.folder_run import (
    ItemResult,
    ProgressCallback,
    reestimate_items,
)
from ckpt_tools.jobs.request import Request

__all__ = ["Engine", "LocalEngine", "Record", "RecordBuilder"]

Record = Mapping[str, Any]
"""What became of a checkpoint as plain data, fit for JSON and for another machine."""

RecordBuilder = Callable[[ItemResult], Record]
"""Makes a record where the result is, for a result holds a whole model.

A function of a module, not a lambda.
"""


class Engine(Protocol):
    """Runs the local job on many checkpoints; the one seam between a folder and the machines that
    work on it.
    """

    def run(
        self,
        items: Sequence[CheckpointItem],
        request: Request,
        describe: RecordBuilder,
        record: Callable[[Record], None],
        watch: ProgressCallback | None = None,
    ) -> None:
        """Re-estimate every item; ``record`` gets one record of each, as soon as its output stands.

        One failure stops no other, and what is done already is not done again, as ``reestimate_items``
        says. Raises what concerns all items: DataError, UsageError, ClusterError. ``watch`` is for
        engines that see every batch.
        """
        ...


class LocalEngine:
    """All in this process."""

    def run(
        self,
        items: Sequence[CheckpointItem],
        request: Request,
        describe: RecordBuilder,
        record: Callable[[Record], None],
        watch: ProgressCallback | None = None,
    ) -> None:
        """One group after the other."""
        reestimate_items(items, request, lambda result: record(describe(result)), watch)
