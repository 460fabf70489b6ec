"""A corrected state dict to save while training goes on as if nobody had looked."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypedDict, Unpack

import torch
from torch import Generator, Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader

from ckpt_tools.contract import Estimator, LayerChoice, Precision, Rates, Statistics
from ckpt_tools.model.batch import Batch, batch_size, to_device
from ckpt_tools.model.calling import Forward, device_of, unwrap_model
from ckpt_tools.model.model_state import ModelState
from ckpt_tools.model.randomness import seed_random_generators, seed_temporarily
from ckpt_tools.reestimate.run import reestimate_bn
from ckpt_tools.reestimate.source import Batches
from ckpt_tools.reestimate.stopping import Progress
from ckpt_tools.results import Reestimation, Walk


class Options(TypedDict, total=False):
    """The keyword arguments of ``reestimate_bn``."""

    estimator: Estimator
    layers: LayerChoice
    statistics: Statistics
    tolerance: float | None
    precision: Precision
    compile: bool
    momentum: float
    epochs: int
    rates: Rates
    forward: Forward
    walk: Walk | None
    force: bool
    progress: Callable[[Progress], None] | None
    distributed: bool
    keep_outliers: bool


def corrected_state_dict(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    prepare: Callable[[Batch], Batch] | None = None,
    limit_batches: int | None = None,
    max_images: int | None = None,
    seed: int = 0,
    done: Callable[[Reestimation], None] | None = None,
    **options: Unpack[Options],
) -> dict[str, Any]:
    """The state dict of ``model`` with its running variances re-estimated; the model itself stays as it is.

    For a training loop that saves now and then and goes on: weights, buffers, train flags, every global random
    generator, those of a DataLoader and its persistent workers are afterwards what they were, also if the pass
    raises. The keys are those of ``model.state_dict()`` and, as there, all values but the new ones share memory
    with the model: save the dict before the next step.

    Args:
        model: as in ``reestimate_bn``.
        batches: the training data; a DataLoader in use is read beside its own iteration.
        prepare: what the loop does to a batch before the forward. Default: move it to the model's device.
        limit_batches: read at most so many batches.
        max_images: read no further batch once so many samples were seen.
        seed: of shuffling and augmentation during the pass, the same in every one.
        done: called with the ``Reestimation``.
        **options: those of ``reestimate_bn``; ``tolerance=0.05`` reads about 1,000 images. ``force`` is True unless
            said otherwise: while weights move, the stored statistics of control layers trail behind.

    Raises: what ``reestimate_bn`` raises.
    """
    inside = unwrap_model(model)
    reading = _Reading(batches, prepare or _mover(inside), limit_batches, max_images, seed)
    with seed_temporarily(seed), reading.beside(), _kept(inside) as kept:
        again = iter(reading) if isinstance(batches, Iterator) else reading
        options.setdefault("force", True)
        result = reestimate_bn(model, again, **options)
        state: dict[str, Any] = model.state_dict()
        new = {buffer.data_ptr() for buffer, content in kept if not torch.equal(buffer, content)}
        for key, value in state.items():
            if isinstance(value, Tensor) and value.data_ptr() in new:
                state[key] = value.clone()
    if done is not None:
        done(result)
    return state


class _Reading:
    """The batches of a pass; each iteration draws the same random numbers."""

    def __init__(
        self,
        batches: Iterable[Batch],
        prepare: Callable[[Batch], Batch],
        limit_batches: int | None,
        max_images: int | None,
        seed: int,
    ) -> None:
        self._batches = Batches(_own_workers(batches))
        self._generators = {id(held): held for held in _generators(batches)}.values()
        self._prepare, self._seed = prepare, seed
        self._limit_batches, self._max_images = limit_batches, max_images

    def __iter__(self) -> Iterator[Batch]:
        seed_random_generators(self._seed)
        for generator in self._generators:
            generator.manual_seed(self._seed)
        images = 0
        for batch in itertools.islice(self._batches, self._limit_batches):
            if self._max_images is not None and images >= self._max_images:
                return
            images += batch_size(batch)
            yield self._prepare(batch)

    @contextmanager
    def beside(self) -> Iterator[None]:
        """Afterwards the loader's own generators stand where they stood."""
        states = [(generator, generator.get_state()) for generator in self._generators]
        try:
            yield
        finally:
            for generator, state in states:
                generator.set_state(state)


def _own_workers(batches: Iterable[Batch]) -> Iterable[Batch]:
    """A DataLoader with workers of its own: asking one with persistent workers again ends the iteration under way."""
    if not isinstance(batches, DataLoader):
        return batches
    twin = copy.copy(batches)
    vars(twin).update(_iterator=None, persistent_workers=False)  # past a guard against changes that would do nothing
    return twin


def _generators(batches: Iterable[Batch]) -> Iterator[Generator]:
    """The random generators that a DataLoader holds, besides the global ones."""
    if isinstance(batches, DataLoader):
        inner = getattr(batches.batch_sampler, "sampler", None)
        for holder in (batches, batches.sampler, batches.batch_sampler, inner):
            if isinstance(held := getattr(holder, "generator", None), Generator):
                yield held


def _mover(model: nn.Module) -> Callable[[Batch], Batch]:
    device = device_of(model)
    return lambda batch: to_device(batch, device)


@contextmanager
def _kept(model: nn.Module) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """The running statistics of every BN layer, each with its content, which it gets back."""
    layers = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    buffers = [buffer for layer in layers for buffer in (layer.running_var, layer.running_mean) if buffer is not None]
    kept = [(buffer, buffer.detach().clone()) for buffer in buffers]
    state = ModelState(buffers)
    try:
        yield kept
    finally:
        state.put_back()
