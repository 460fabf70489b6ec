"""Running batches through a model: in the fastest layout, and in parts if memory is short."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from ckpt_tools.arguments import advise
from ckpt_tools.contract import Precision
from ckpt_tools.errors import CkptToolsError, DataError, ModelError, is_short_of_memory
from ckpt_tools.machine.precision import compute_in_precision
from ckpt_tools.model.batch import Batch, batch_size, slice_samples, to_device
from ckpt_tools.model.calling import Forward, device_of
from ckpt_tools.observation.interception import Interception, StopForward
from ckpt_tools.observation.layer import Layer
from ckpt_tools.observation.paired_layer import PairedLayer
from ckpt_tools.results import DropoutSite

# Of the pass under training conditions. Four are enough where dropout adds less noise than images
# differ; beyond sixteen the gain does not pay (see scripts/bench evidence).
_FIRST_REPEATS, _MAX_REPEATS = 4, 16
# Between the logarithms of an image's energy in a whole batch and in half of it: rounding is below.
_SAME_ENERGY = 1e-2


class Runner:
    """Runs a model on batches while some of its BN layers are watched.

    Images go to convolutional models with their channels last (1.2 to 1.3 times faster on CPUs). A
    model that cannot take that, such as one with ``x.view`` on a feature map, gets them as they
    are. Where memory runs short the batch is halved, and so are the later ones; ``largest`` is then
    the number of samples that fit. Unless ``rows_are_samples`` is known, a trial must show that the
    layers get the same input from two halves as from the whole.
    """

    def __init__(
        self,
        model: nn.Module,
        forward: Forward,
        interception: Interception,
        precision: Precision = "fp32",
        *,
        compiled: bool = False,
        rows_are_samples: bool = False,
    ) -> None:
        self._rows_are_samples = rows_are_samples
        self._model = cast(nn.Module, torch.compile(model)) if compiled else model
        self._forward, self._interception = forward, interception
        interception.name_modules(model)
        self._device = device_of(model)
        self.precision: Precision = precision
        convolutional = any(isinstance(module, nn.Conv2d) for module in model.modules())
        self._layout = torch.channels_last if convolutional else None
        self.largest: int | None = None

    @property
    def noise_left_on(self) -> tuple[DropoutSite, ...]:
        """The operations that draw random numbers under test conditions, too."""
        return self._interception.noise_left_on

    def run(
        self, batch: Batch, number: int, watched: Sequence[Layer], *, stop: bool = False
    ) -> Iterator[int]:
        """Run one batch, as a whole or in parts; after each part yield its number of images.

        With ``stop`` a forward ends behind the last watched layer. Raises ModelError, naming the
        batch by ``number``, if the model cannot run on it.
        """
        parts = self.split(batch)
        while parts:
            part = parts.pop(0)
            images = batch_size(part)
            if self._fits(part, number, watched, stop=stop):
                yield images
            elif images < 2:
                raise ModelError(
                    f"batch {number}: not even one sample fits into memory. Use "
                    f"{advise('a smaller --input-size', 'smaller inputs')}."
                )
            elif not (self._rows_are_samples or self._gives_same_inputs_in_halves(part, watched)):
                raise ModelError(
                    f"batch {number}: memory is too short for it, and no trial could show that its halves "
                    "may be run one after the other. Use smaller batches or, if the rows of a batch are "
                    "independent samples, rows_are_samples=True (--rows-are-samples)."
                )
            else:
                # Later batches are split from the start: each failed attempt costs a forward. The
                # parts of this one go to the front, so that images keep their order.
                self.largest = images // 2
                parts[:0] = self.split(part)

    def _gives_same_inputs_in_halves(self, batch: Batch, watched: Sequence[Layer]) -> bool:
        """Try whether halving a batch leaves the layers' inputs as they are.

        The batch itself does not fit into memory, so the trial takes the first half of it that
        does, and halves that. In a graph the rows would belong to other edges then, and the model
        fails, or its layers see something else.
        """
        whole = slice_samples(batch, 0, batch_size(batch) // 2)
        while (size := batch_size(whole)) >= 2:
            halves = [slice_samples(whole, 0, size // 2), slice_samples(whole, size // 2, size)]
            try:
                expected, found = self._energies([whole], watched), self._energies(halves, watched)
            except Exception as error:  # noqa: BLE001 - models and the caller's forward raise anything
                if not is_short_of_memory(error):
                    return False
                whole = halves[0]
                continue
            self._rows_are_samples = expected.keys() == found.keys() and all(
                len(values) == len(found[name]) and torch.allclose(values, found[name], atol=_SAME_ENERGY)
                for name, values in expected.items()
            )
            return self._rows_are_samples
        return False

    def _energies(self, batches: Sequence[Batch], watched: Sequence[Layer]) -> dict[str, Tensor]:
        """The energy of every image of the batches in each layer, normalised as in the final network."""
        layers = [Layer(layer.name, layer.module, rewritten=False) for layer in watched]
        energies: dict[str, list[Tensor]] = {}
        for batch in batches:
            for layer in layers:
                layer.begin_batch(per_image=True)
            Runner._call(self, batch, layers, stop=False)  # without training conditions
            for layer in layers:
                observation = layer.take_observation()
                if observation is not None and observation.image_energy is not None:
                    energies.setdefault(layer.name, []).append(observation.image_energy)
        return {name: torch.cat(parts) for name, parts in energies.items()}

    def split(self, batch: Batch) -> list[Batch]:
        """Return parts of nearly equal size, none above ``largest``: what memory was found to hold."""
        size = batch_size(batch)
        if self.largest is None or size <= self.largest:
            return [batch]
        parts = -(-size // self.largest)
        bounds = [size * part // parts for part in range(parts + 1)]
        return [slice_samples(batch, start, stop) for start, stop in itertools.pairwise(bounds)]

    def _fits(self, batch: Batch, number: int, watched: Sequence[Layer], *, stop: bool) -> bool:
        """Run a batch. False if memory ran short; then its layers have forgotten the batch."""
        error = self._try(batch, watched, stop=stop)
        if error is not None and self._layout is not None and not is_short_of_memory(error):
            # The layout may be the cause. If it is not, the second error is the same one.
            self._layout = None
            error = self._try(batch, watched, stop=stop)
        if error is None:
            return True
        if not is_short_of_memory(error):
            raise _translate_error(error, number) from error
        del error  # its traceback refers to the tensors of the forward, which must be freed
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        return False

    def _try(self, batch: Batch, watched: Sequence[Layer], *, stop: bool) -> Exception | None:
        """Run a batch and return the error that the model raised, if any."""
        try:
            self._call(batch, watched, stop=stop)
        except CkptToolsError:
            raise
        except Exception as error:  # noqa: BLE001 - models and the caller's forward raise anything
            for layer in watched:
                layer.discard_batch()
            return error
        return None

    def _call(self, batch: Batch, watched: Sequence[Layer], *, stop: bool) -> None:
        self._interception.begin(batch_size(batch), watched, stop=stop)
        try:
            with compute_in_precision(self.precision, self._device), self._interception:
                self._forward(self._model, to_device(batch, self._device, self._layout))
        except StopForward:
            pass


class PairedRunner(Runner):
    """Runs each batch under training conditions, several times, and then under test conditions.

    ``training`` runs the copy in training mode. Dropout is drawn afresh in each repeat. After the
    first batch the number of ``repeats`` is set so that dropout's share of the error is below that
    of the images, within bounds: a repeat costs a forward.
    """

    def __init__(self, test: Runner, training: Runner, *, repeats: int | None = None) -> None:
        vars(self).update(vars(test))
        self._test, self._training = test, training
        self._is_decided = repeats is not None
        self.repeats = repeats or _FIRST_REPEATS

    @property
    def largest(self) -> int | None:
        """The number of samples that fit into memory, which the runner of other passes learns, too."""
        return self._test.largest

    @largest.setter
    def largest(self, size: int | None) -> None:
        self._test.largest = size

    def _call(self, batch: Batch, watched: Sequence[Layer], *, stop: bool) -> None:
        pairs = [layer for layer in watched if isinstance(layer, PairedLayer)]
        self._training.precision, self._training._layout = self.precision, self._layout
        for layer in pairs:
            layer.repeats = self.repeats
        for _ in range(self.repeats):
            self._training._call(batch, [layer.training for layer in pairs], stop=stop)
        super()._call(batch, watched, stop=stop)
        if not self._is_decided:
            self._decide_repeats(pairs)

    def _decide_repeats(self, layers: Sequence[PairedLayer]) -> None:
        shares = [layer.noise_share() for layer in layers if layer.rewritten]
        known = [share for share in shares if share is not None]
        if known:
            self.repeats = min(max(_FIRST_REPEATS, math.ceil(max(known))), _MAX_REPEATS)
            self._is_decided = True


def has_hooks(model: nn.Module) -> bool:
    """Whether some module has forward hooks.

    The owner of a hook may rely on complete forwards, so none is ended early then.
    """
    return any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def _translate_error(error: Exception, number: int) -> CkptToolsError:
    # torch raises this one from a signal handler, so it may arrive in the middle of a forward.
    if str(error).startswith("DataLoader worker"):
        return DataError(
            f"batch {number}: {error}. Memory ran out? Try fewer {advise('--workers', 'workers')}."
        )
    return ModelError(
        f"batch {number}: the model cannot run on it: {type(error).__name__}: {error}. "
        "Check the input's shape and the device."
    )
