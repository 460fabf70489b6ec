"""A corrected state dict to save in the middle of a training, which goes on undisturbed."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TypedDict, Unpack

import torch
from torch import Generator, Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader

from ckpt_tools.arguments import check_callable, check_count, check_seed
from ckpt_tools.contract import Estimator, LayerChoice, Precision, Rates, Statistics
from ckpt_tools.model.batch import Batch, batch_size, to_device
from ckpt_tools.model.calling import Forward, device_of, unwrap_model
from ckpt_tools.model.model_state import ModelState
from ckpt_tools.model.randomness import seed_random_generators, seed_temporarily
from ckpt_tools.reestimate.batches import Batches
from ckpt_tools.reestimate.correction import reestimate_bn
from ckpt_tools.reestimate.stopping import Progress
from ckpt_tools.results import Reestimation, Walk


class Options(TypedDict, total=False):
    """The keyword arguments of ``reestimate_bn``."""

    estimator: Estimator
    layers: LayerChoice
    only: Sequence[str]
    keep: Sequence[str]
    statistics: Statistics
    tolerance: float | None
    precision: Precision
    compile: bool
    momentum: float
    epochs: int
    rates: Rates
    forward: Forward
    walk: Walk | None
    dropout: Mapping[str, float] | None
    force: bool
    strict: bool
    progress: Callable[[Progress], None] | None
    distributed: bool
    keep_outliers: bool
    rows_are_samples: bool
    input_shape: tuple[int, ...] | None


def corrected_state_dict(
    model: nn.Module,
    batches: Iterable[Batch] | None = None,
    *,
    prepare: Callable[[Batch], Batch] | None = None,
    limit_batches: int | None = None,
    max_images: int | None = None,
    seed: int = 0,
    done: Callable[[Reestimation], None] | None = None,
    **options: Unpack[Options],
) -> dict[str, Any]:
    """The state dict of ``model`` with its running variances re-estimated.

    The model itself stays as it is. This is for a training loop that saves now and then and goes
    on: weights, buffers, train flags, every global random generator, those of a DataLoader and its
    persistent workers are afterwards what they were, also if the pass raises. The keys are those of
    ``model.state_dict()`` and, as there, all values but the new ones share memory with the model:
    save the dict before the next step.

    Args:
        model: as in ``reestimate_bn``.
        batches: the training data; a DataLoader in use is read beside its own iteration. None:
            random inputs, as in ``reestimate_bn``.
        prepare: what the loop does to a batch before the forward. Default: move it to the model's
            device.
        limit_batches: read at most so many batches.
        max_images: read no further batch once so many samples were read.
        seed: of shuffling and augmentation during the pass, the same in every one.
        done: called with the ``Reestimation``.
        **options: those of ``reestimate_bn``; ``tolerance=0.05`` reads about 1,000 images.
            While weights move, the stored statistics trail behind. So ``force`` is True by default
            here, and the estimator is "pooled" where there are batches: those of the training are
            augmented as in training, and "ratio" would keep the lag.

    Raises:
        CkptToolsError: what ``reestimate_bn`` raises.
    """
    check_count("limit_batches", limit_batches)
    check_count("max_images", max_images)
    check_seed(seed)
    for name, function, signature in (("prepare", prepare, "(batch) -> batch"), ("done", done, "(result)")):
        if function is not None:
            check_callable(name, function, signature)
    inner = unwrap_model(model)
    with seed_temporarily(seed), ExitStack() as stack:
        readable: Iterable[Batch] | None = None
        if batches is not None:
            reading = _SeededBatches(batches, prepare or _mover(inner), limit_batches, max_images, seed)
            stack.enter_context(reading.restore_generators())
            # An iterator stays one, so that reestimate_bn refuses to read it several times.
            readable = iter(reading) if isinstance(batches, Iterator) else reading
        originals = stack.enter_context(_restore_statistics(inner))
        if batches is not None:
            options.setdefault("estimator", "pooled")
        options.setdefault("force", not options.get("strict", False))
        result = reestimate_bn(model, readable, **options)
        state: dict[str, Any] = model.state_dict()
        # The new values would be lost when the buffers get their content back.
        new = {buffer.data_ptr() for buffer, value in originals if not torch.equal(buffer, value)}
        for key, value in state.items():
            if isinstance(value, Tensor) and value.data_ptr() in new:
                state[key] = value.clone()
    if done is not None:
        done(result)
    return state


class _SeededBatches:
    """The batches of a pass; each iteration draws the same random numbers."""

    def __init__(
        self,
        batches: Iterable[Batch],
        prepare: Callable[[Batch], Batch],
        limit_batches: int | None,
        max_images: int | None,
        seed: int,
    ) -> None:
        self._batches = Batches(_with_own_workers(batches))
        # By identity, because a loader and its sampler often hold the same generator.
        self._generators = {id(item): item for item in _loader_generators(batches)}.values()
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
    def restore_generators(self) -> Iterator[None]:
        """Give the loader's own generators their state back at the end of the block."""
        states = [(generator, generator.get_state()) for generator in self._generators]
        try:
            yield
        finally:
            for generator, state in states:
                generator.set_state(state)


def _with_own_workers(batches: Iterable[Batch]) -> Iterable[Batch]:
    """The same batches; of a DataLoader, a copy that starts workers of its own.

    A second iteration over one with persistent workers would end the one in progress.
    """
    if not isinstance(batches, DataLoader):
        return batches
    twin = copy.copy(batches)
    # DataLoader.__setattr__ forbids this change, because on a loader in use it has no effect.
    vars(twin).update(_iterator=None, persistent_workers=False)
    return twin


def _loader_generators(batches: Iterable[Batch]) -> Iterator[Generator]:
    """The random generators that a DataLoader and its samplers hold, besides the global ones."""
    if not isinstance(batches, DataLoader):
        return
    inner = getattr(batches.batch_sampler, "sampler", None)
    for holder in (batches, batches.sampler, batches.batch_sampler, inner):
        generator = getattr(holder, "generator", None)
        if isinstance(generator, Generator):
            yield generator


def _mover(model: nn.Module) -> Callable[[Batch], Batch]:
    device = device_of(model)
    return lambda batch: to_device(batch, device)


@contextmanager
def _restore_statistics(model: nn.Module) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Give the BN layers their running statistics back at the end of the block.

    Yields each buffer with a copy of its content.
    """
    buffers = [
        buffer
        for module in model.modules()
        if isinstance(module, _BatchNorm)
        for buffer in (module.running_var, module.running_mean)
        if buffer is not None
    ]
    originals = [(buffer, buffer.detach().clone()) for buffer in buffers]
    state = ModelState(buffers)
    try:
        yield originals
    finally:
        state.put_back()
