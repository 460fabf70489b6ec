"""Copy batches to the GPU: the next is copied while one is in use."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

__all__ = ["prefetch_to_device"]


def prefetch_to_device(batches: Iterable[Tensor], device: torch.device) -> Iterator[Tensor]:
    """Yield the same batches on ``device`` (CUDA), in the same memory format.

    They are copied from pinned memory on a CUDA stream of their own, so that copying takes no time
    from computing. One batch is read and copied ahead.
    """
    copy_stream = torch.cuda.Stream(device)
    previous: _BatchCopy | None = None
    for batch in batches:
        current = _BatchCopy(batch, device, copy_stream)
        if previous is not None:
            yield previous.wait()
        previous = current
    if previous is not None:
        yield previous.wait()


class _BatchCopy:
    def __init__(self, batch: Tensor, device: torch.device, copy_stream: torch.cuda.Stream) -> None:
        # The pinned memory may be released at once: its allocator waits for the copy before reuse.
        pinned = batch.pin_memory()
        with torch.cuda.stream(copy_stream):
            self._tensor = pinned.to(device, non_blocking=True)
            self._copy_event = copy_stream.record_event()

    def wait(self) -> Tensor:
        """Return the batch. Only later work on the current stream waits for the copy."""
        stream = torch.cuda.current_stream(self._tensor.device)
        stream.wait_event(self._copy_event)
        # The memory belongs to the copy stream, which must not reuse it while this stream needs it.
        self._tensor.record_stream(stream)
        return self._tensor
