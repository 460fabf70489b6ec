"""Batches that the user's own code makes, given as ``package.module:callable``."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

from ckpt_tools.contract import InputSpec, Split
from ckpt_tools.data.sample_order import FULL_SHARE, Reading, Share, balanced_batch_sizes, random_order
from ckpt_tools.data.stream import Batch, SkippedSample
from ckpt_tools.data.user_code import CallableResult, import_callable
from ckpt_tools.data.user_errors import convert_to_data_error
from ckpt_tools.errors import DataError
from ckpt_tools.import_path import user_code_for_children

__all__ = ["CallableSource", "CallableStream", "input_tensors"]


@dataclass(frozen=True)
class CallableSource:
    """What a callable returned: an iterable of batches, a DataLoader, or a Dataset.

    A Dataset with a length is batched here, in random order and, unless they are asked for, without
    labels. Of an iterable, the first batches are taken in its own order, up to the one with which
    ``limit`` samples are reached: nobody knows whether its batches may be cut.
    """

    spec: str
    product: CallableResult
    limit: int | None = None
    seed: int = 0
    kind: Literal["callable"] = "callable"
    is_preprocessed: bool = True
    sample_shape: None = None

    @classmethod
    def open(cls, spec: str, *, limit: int | None, seed: int, split: Split = "train") -> CallableSource:
        """Import and call the callable.

        ``split`` says which loader of a Lightning DataModule is meant. Raises DataError, with the
        user's exception as its cause.
        """
        source = cls(spec, CallableResult(spec, import_callable(spec), split), limit, seed)
        if source.count == 0:
            raise DataError(f"{spec}: expected samples, the Dataset is empty.")
        return source

    @property
    def count(self) -> int | None:
        """Number of samples in one pass; None for anything but a Dataset with a length."""
        data = self.product.latest
        if not _has_length(data):
            return None
        return len(data) if self.limit is None else min(self.limit, len(data))

    def batches(
        self, input_spec: InputSpec | None, reading: Reading, *, labelled: bool = False
    ) -> CallableStream:
        """The user's batches as they come, where they come.

        A Dataset is batched as ``reading`` says, with its labels if ``labelled``. Of an iterable
        every process makes all batches and keeps its share; nothing else of ``reading`` is used.
        """
        data = self.product.latest
        if not _has_length(data):
            return CallableStream(
                self.spec, self.product.unread_iterable, limit=self.limit, seed=self.seed, share=reading.share
            )
        order = random_order(len(data), limit=self.limit, seed=self.seed)
        parts = torch.split(order, balanced_batch_sizes(len(order), reading.batch_size))
        plan = [part.tolist() for part in reading.share.select_items(parts)]
        workers = min(reading.worker_count, len(plan))
        with convert_to_data_error(f"{self.spec}: batching the Dataset"):
            loader = DataLoader(
                data,
                batch_sampler=plan,
                num_workers=workers,
                collate_fn=_collate_pairs if labelled else _collate_inputs,
                persistent_workers=workers > 0,
                generator=torch.Generator(),  # leaves the user's random state alone
            )
        numbers = reading.share.select_items(range(len(parts)))
        return CallableStream(
            self.spec, lambda: loader, seed=self.seed, count=len(order), numbers=numbers, indices=plan
        )


class CallableStream:
    """Passes over what the user's callable returned."""

    transform = "as the callable yields it"
    skipped_samples: tuple[SkippedSample, ...] = ()

    def __init__(
        self,
        spec: str,
        product: Callable[[], Iterable[object]],
        *,
        limit: int | None = None,
        seed: int = 0,
        count: int | None = None,
        numbers: Sequence[int] | None = None,
        indices: Sequence[Sequence[int]] | None = None,
        share: Share = FULL_SHARE,
    ) -> None:
        """Prepare passes over the batches of ``product``.

        ``numbers`` has the numbers of its batches, and ``indices`` the numbers of the samples in
        each. Both are None for an iterable: it yields all batches, and the ``share`` is kept.
        """
        self.count, self.batch_count = count, None if numbers is None else len(numbers)
        self._numbers, self._indices, self._share = numbers, indices, share
        self._spec, self._product, self._limit, self._seed = spec, product, limit, seed

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches of one pass.

        Raises DataError if the user's code raises, and for batches that no model can take.
        """
        remaining = self._limit
        number = -1
        # An iterable is read by every process as a whole, and each keeps the batches of its share.
        for batch, number in zip(self._items(), self._numbers or itertools.count(), strict=False):
            size = self._count_samples(batch, number)
            is_ours = self._numbers is not None or number % self._share.world == self._share.rank
            if remaining is not None and size >= remaining:
                if is_ours:
                    yield batch
                return
            if remaining is not None:
                remaining -= size
            if is_ours:
                yield batch
        if number < 0 and self.batch_count is None:
            raise DataError(f"{self._spec}: expected batches, found none. An iterator may be used up.")

    @property
    def rows_are_samples(self) -> bool:
        """Whether the samples of a Dataset were put into batches here; of other batches nobody knows."""
        return self._indices is not None

    def sample_name(self, batch: int, row: int) -> str:
        """Return the number of a Dataset's sample, or the place of a sample in its batch."""
        if self._indices is not None:
            return f"sample {self._indices[batch][row]}"
        return f"sample {row} of batch {self._share.rank + batch * self._share.world}"

    def _items(self) -> Iterator[Any]:
        # A DataLoader that shuffles draws its order from torch's global state, on the first step.
        # With the same seed, every pass has the same order. Worker processes start there, too.
        translation = convert_to_data_error(f"{self._spec}: reading")
        with translation, torch.random.fork_rng(devices=[]), user_code_for_children():
            torch.default_generator.manual_seed(self._seed)
            items = iter(self._product())
            item = next(items, _END)
        while item is not _END:
            yield item
            with convert_to_data_error(f"{self._spec}: reading"):
                item = next(items, _END)

    def _count_samples(self, batch: object, number: int) -> int:
        """Return how many samples a batch holds. Raises DataError if no model can take it."""
        inputs = input_tensors(batch)
        if not inputs or any(tensor.ndim == 0 or not len(tensor) for tensor in inputs):
            raise DataError(
                f"{self._spec}: batch {number} is {_describe_batch(batch)}. Expected a tensor "
                f"(N, …), a tuple or list whose first item is one, or a dict of tensors for "
                f"model(**batch)."
            )
        return len(inputs[0])


_END = object()


def _has_length(data: object) -> bool:
    # Every Dataset may define __len__, but an IterableDataset has no samples by number. A Dataset of
    # Hugging Face has another base class; it has columns, and iterating over it gives samples.
    is_dataset = isinstance(data, Dataset) or (hasattr(data, "column_names") and hasattr(data, "__getitem__"))
    return is_dataset and not isinstance(data, IterableDataset) and hasattr(data, "__len__")


def _collate_inputs(samples: list[Any]) -> Any:
    """Collate the inputs of samples, and drop the labels, which need not be of one size."""
    return default_collate([sample[0] if isinstance(sample, tuple | list) else sample for sample in samples])


def _collate_pairs(samples: list[Any]) -> Any:
    """Collate inputs and labels, and drop further items of a sample."""
    return default_collate(
        [tuple(sample[:2]) if isinstance(sample, tuple | list) else sample for sample in samples]
    )


def input_tensors(batch: object) -> list[Tensor]:
    """Return the tensors (N, …) in a batch that go into the model, and not the labels."""
    if isinstance(batch, tuple | list):
        batch = batch[0] if batch else None
    if isinstance(batch, Mapping):
        return [value for value in batch.values() if isinstance(value, Tensor) and value.ndim]
    return [batch] if isinstance(batch, Tensor) else []


def _describe_batch(batch: object) -> str:
    if isinstance(batch, Tensor):
        return f"a tensor of shape {tuple(batch.shape)}"
    if isinstance(batch, tuple | list):
        return f"a {type(batch).__name__} of {[type(item).__name__ for item in batch][:5]}"
    return f"a {type(batch).__name__}"
