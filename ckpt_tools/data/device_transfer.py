"""Batches on the GPU: the next is on its way while one is in use."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

__all__ = ["prefetch_to_device"]


def prefetch_to_device(batches: Iterable[Tensor], device: torch.device) -> Iterator[Tensor]:
    """The same batches on ``device`` (CUDA), ready for work on its current stream, in the same memory format.

    They go from pinned memory on a stream of their own, so that copying takes no time from computing. One batch
    is read, and sent, ahead.
    """
    aside = torch.cuda.Stream(device)
    before: _Sent | None = None
    for batch in batches:
        sent = _Sent(batch, device, aside)
        if before is not None:
            yield before.wait_for_copy()
        before = sent
    if before is not None:
        yield before.wait_for_copy()


class _Sent:
    """A batch under way."""

    def __init__(self, batch: Tensor, device: torch.device, aside: torch.cuda.Stream) -> None:
        # the pinned memory may go at once: its allocator waits for the copy before it gives it to others
        pinned = batch.pin_memory()
        with torch.cuda.stream(aside):
            self._tensor = pinned.to(device, non_blocking=True)
            self._copied = aside.record_event()

    def wait_for_copy(self) -> Tensor:
        """The batch; what the current stream does from now on waits for the copy."""
        stream = torch.cuda.current_stream(self._tensor.device)
        stream.wait_event(self._copied)
        self._tensor.record_stream(stream)  # its memory belongs to the other stream, which must not reuse it early
        return self._tensor
