"""Batches with the class of every sample, for an evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, Protocol

from torch import Tensor

from ckpt_tools.contract import InputSpec
from ckpt_tools.data.arrays.array_source import ArraySource
from ckpt_tools.data.callables import CallableSource, CallableStream, input_tensors
from ckpt_tools.data.data_source import Source
from ckpt_tools.data.images.image_folder import FolderSource
from ckpt_tools.data.label_files import LabelFile, file_labels
from ckpt_tools.data.labels import ClassMap, Labels, array_labels, as_class_numbers, folder_labels
from ckpt_tools.data.sample_order import Reading
from ckpt_tools.data.shards.disk_shards import ShardSource, shard_labels
from ckpt_tools.data.shards.shard_stream import ShardStream, ShardStreamSource
from ckpt_tools.data.stream import Batch, IndexedStream, SampleStream, SkippedSample, first_not_finite
from ckpt_tools.errors import DataError, UsageError
from ckpt_tools.model.batch_fields import find_label_field

__all__ = ["LabelledStream", "labelled_batches"]


class LabelledStream(SampleStream, Protocol):
    """Batches and their labels.

    Every iteration is a new pass over the same samples in the same order.
    """

    def check(self, labels: Tensor, outputs: int) -> None:
        """Raise DataError unless classes and labels fit a model with so many outputs."""

    def __iter__(self) -> Iterator[tuple[Batch, Tensor]]:
        """Start a pass over inputs for the model and class numbers (n,), int64 on the CPU.

        Raises DataError where the data or the labels cannot be used.
        """


def labelled_batches(
    source: Source,
    input_spec: InputSpec | None,
    reading: Reading,
    class_map: ClassMap | None = None,
    label_file: LabelFile | None = None,
) -> LabelledStream:
    """Like ``source.batches``, with labels.

    Folders give the first subfolder's name, arrays what lies beside them in the file, data sets
    their own labels, shards their ``.cls`` members; callables yield (inputs, labels), or dicts with
    "labels". ``label_file``, which takes the place of subfolders, and ``class_map`` are for folders.
    Raises DataError where there are no labels.
    """
    if label_file is not None and not isinstance(source, FolderSource):
        raise UsageError(
            f"--labels is for a folder of images; the labels of {source.spec} come with the data. Drop it."
        )
    if class_map is not None and not isinstance(source, FolderSource):
        raise UsageError(
            f"--class-map names folders; the labels of {source.spec} are numbers already. Drop it."
        )
    if isinstance(source, CallableSource | ShardStreamSource):
        return _StreamWithLabels(source.spec, source.batches(input_spec, reading, labelled=True))
    if isinstance(source, FolderSource) and label_file is not None:
        labels = file_labels(source.root, source.names, label_file, class_map)
    elif isinstance(source, FolderSource):
        labels = folder_labels(source.root, source.names, class_map)
    elif isinstance(source, ArraySource):
        labels = array_labels(source.array)
    elif isinstance(source, ShardSource):
        labels = shard_labels(source)
    else:
        raise DataError(
            f"{source.spec}: a {source.kind} has no labels. Give a folder, an .npz or a callable."
        )
    return _IndexedWithLabels(source.spec, source.batches(input_spec, reading), labels)


class _IndexedWithLabels:
    """A stream of samples that have a number, by which their label is looked up.

    That is every source but callables and shards behind a URL.
    """

    def __init__(self, spec: str, stream: IndexedStream, labels: Labels) -> None:
        self.count, self.transform = stream.count, stream.transform
        self._spec, self._stream, self._labels = spec, stream, labels

    @property
    def skipped_samples(self) -> tuple[SkippedSample, ...]:
        return self._stream.skipped_samples

    def check(self, labels: Tensor, outputs: int) -> None:
        expected = self._labels.outputs
        if expected is not None and expected != outputs:
            raise DataError(
                f"{self._spec}: expected a head with {expected} outputs "
                f"({self._labels.outputs_origin}), this one has {outputs}. {self._labels.hint}"
            )
        _check_range(self._spec, labels, outputs)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        # The two iterators run in step: samples are marked as skipped before their batch comes.
        numbers = self._stream.indices()
        for batch in self._stream:
            rows = list(islice(numbers, len(batch)))
            if len(rows) < len(batch):
                raise self._data_changed_error()
            _check_finite(batch, self._spec, rows)
            yield batch, self._labels.values[rows]
        if next(numbers, None) is not None:
            raise self._data_changed_error()

    def _data_changed_error(self) -> DataError:
        return DataError(f"{self._spec}: it changed while it was read. Leave it alone, and run again.")


class _StreamWithLabels:
    """A stream that yields labels beside the inputs: a user's callable, or shards behind a URL."""

    def __init__(self, spec: str, stream: CallableStream | ShardStream) -> None:
        self.count, self.transform = stream.count, stream.transform
        self._spec, self._stream = spec, stream

    @property
    def skipped_samples(self) -> tuple[SkippedSample, ...]:
        return self._stream.skipped_samples

    def check(self, labels: Tensor, outputs: int) -> None:
        _check_range(self._spec, labels, outputs)

    def __iter__(self) -> Iterator[tuple[Batch, Tensor]]:
        for number, batch in enumerate(self._stream):
            for tensor in input_tensors(batch):
                _check_finite(tensor, f"{self._spec}: batch {number}", range(len(tensor)))
            yield self._split_labels(batch, f"{self._spec}: batch {number}")

    def _split_labels(self, batch: Any, name: str) -> tuple[Batch, Tensor]:
        count = len(input_tensors(batch)[0])
        if isinstance(batch, Mapping):
            key = find_label_field(batch)
            if key is not None:
                inputs = {field: value for field, value in batch.items() if field != key}
                return inputs, as_class_numbers(batch[key], count, name)
        elif isinstance(batch, tuple | list) and len(batch) > 1:
            return batch[0], as_class_numbers(batch[1], count, name)
        raise DataError(f"{name} has no labels. Yield (inputs, labels), or a dict that also holds 'labels'.")


def _check_finite(batch: Tensor, name: str, numbers: Sequence[int]) -> None:
    # An evaluation does not leave such samples out: its metrics are of all samples or of none.
    row = first_not_finite(batch)
    if row is not None:
        raise DataError(f"{name} holds NaN or infinity, first in sample {numbers[row]}. Repair or remove it.")


def _check_range(spec: str, labels: Tensor, outputs: int) -> None:
    for label in (int(labels.min()), int(labels.max())):
        if not 0 <= label < outputs:
            raise DataError(
                f"{spec}: the label {label} is no class of a head with {outputs} outputs; "
                f"expected 0 to {outputs - 1}. Number the classes as in training."
            )
