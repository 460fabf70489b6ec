"""Running batches through a model: where it lives, in the layout that is fastest, in parts if memory is short."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import cast

import torch
from torch import nn

from ckpt_tools.contract import Precision
from ckpt_tools.errors import CkptToolsError, DataError, ModelError, is_short_of_memory
from ckpt_tools.machine.precision import compute_in_precision
from ckpt_tools.model.batch import Batch, batch_size, slice_samples, to_device
from ckpt_tools.model.calling import Forward, device_of
from ckpt_tools.reestimate.interception import Interception, SeenEnough
from ckpt_tools.reestimate.layer import Layer


class Runner:
    """Runs a model on batches while some of its BN layers are watched.

    Images go to convolutional models with their channels last (1.2 to 1.3 times faster on CPUs); a model that cannot
    take that (``x.view`` on a feature map) gets them as they are. Where memory runs short the batch is halved, and
    so are the later ones: ``largest`` then says to how many samples.
    """

    def __init__(
        self,
        model: nn.Module,
        forward: Forward,
        interception: Interception,
        precision: Precision = "fp32",
        *,
        compiled: bool = False,
    ) -> None:
        self._model = cast(nn.Module, torch.compile(model)) if compiled else model
        self._forward, self._interception = forward, interception
        self._device = device_of(model)
        self.precision: Precision = precision
        convolutional = any(isinstance(module, nn.Conv2d) for module in model.modules())
        self._layout = torch.channels_last if convolutional else None
        self.largest: int | None = None

    def run(self, batch: Batch, number: int, watched: Sequence[Layer], *, stop: bool = False) -> Iterator[int]:
        """Run one batch, as a whole or in parts; after each part its number of images is yielded.

        Raises ModelError, naming the batch by ``number``, if the model cannot run on it.
        """
        waiting = self._cut(batch)
        while waiting:
            part = waiting.pop(0)
            images = batch_size(part)
            if self._fits(part, number, watched, stop=stop):
                yield images
            elif images < 2:
                raise ModelError(f"batch {number}: not even one sample fits into memory. Use a smaller --input-size.")
            else:
                self.largest = images // 2
                waiting[:0] = self._cut(part)

    def _cut(self, batch: Batch) -> list[Batch]:
        size = batch_size(batch)
        if self.largest is None or size <= self.largest:
            return [batch]
        parts = -(-size // self.largest)
        bounds = [size * part // parts for part in range(parts + 1)]
        return [slice_samples(batch, start, stop) for start, stop in itertools.pairwise(bounds)]

    def _fits(self, batch: Batch, number: int, watched: Sequence[Layer], *, stop: bool) -> bool:
        """Run a batch. False if memory ran short; then it has left nothing behind."""
        error = self._attempt(batch, watched, stop=stop)
        if error is not None and self._layout is not None and not is_short_of_memory(error):
            self._layout = None
            error = self._attempt(batch, watched, stop=stop)
        if error is None:
            return True
        if not is_short_of_memory(error):
            raise _failure(error, number) from error
        del error  # its traceback holds the tensors of the forward
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        return False

    def _attempt(self, batch: Batch, watched: Sequence[Layer], *, stop: bool) -> Exception | None:
        """Run a batch; what it raised, if it did."""
        try:
            self._call(batch, watched, stop=stop)
        except CkptToolsError:
            raise
        except Exception as error:  # noqa: BLE001 - whatever the model, or the caller's forward, raises
            for layer in watched:
                layer.forget_batch()
            return error
        return None

    def _call(self, batch: Batch, watched: Sequence[Layer], *, stop: bool) -> None:
        self._interception.begin(batch_size(batch), watched, stop=stop)
        try:
            with compute_in_precision(self.precision, self._device), self._interception:
                self._forward(self._model, to_device(batch, self._device, self._layout))
        except SeenEnough:
            pass


def has_hooks(model: nn.Module) -> bool:
    """Whether forwards are watched by someone, who may count on their being run to the end."""
    return any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def _failure(error: Exception, number: int) -> CkptToolsError:
    if str(error).startswith("DataLoader worker"):  # torch raises it wherever the signal finds us
        return DataError(f"batch {number}: {error}. Memory ran out? Try fewer --workers.")
    return ModelError(
        f"batch {number}: the model cannot run on it: {type(error).__name__}: {error}. "
        "Check the input's shape and the device."
    )
