"""The batches of a pass: readable once or again and again, and noticed if they change."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from ckpt_tools.errors import DataError, UsageError
from ckpt_tools.walker.call import Batch, batch_size, input_tensors


class Batches:
    """An iterable of batches whose first one can be looked at without being lost or read twice."""

    def __init__(self, batches: Iterable[Batch]) -> None:
        if isinstance(batches, (Tensor, Mapping)):
            raise UsageError(
                f"batches is a {type(batches).__name__}; expected an iterable of batches, such as [batch] or a "
                "DataLoader."
            )
        if isinstance(batches, Dataset) and not isinstance(batches, IterableDataset):
            raise UsageError("batches is a Dataset of samples; expected batches. Wrap it in a DataLoader.")
        self._batches = batches
        self._begun: tuple[Batch, Iterator[Batch]] | None = None

    @property
    def one_shot(self) -> bool:
        """Whether a second pass would find nothing."""
        return isinstance(self._batches, Iterator)

    def first(self) -> Batch:
        """The first batch; the next iteration begins with it. Raises DataError if there is none."""
        if self._begun is None:
            iterator = self._filled()
            for batch in iterator:
                self._begun = batch, iterator
                break
            else:
                raise DataError("no batch of training data; expected at least one.")
        return self._begun[0]

    def __iter__(self) -> Iterator[Batch]:
        """A pass over all batches."""
        begun, self._begun = self._begun, None
        if begun is not None:
            yield begun[0]
            yield from begun[1]
        else:
            yield from self._filled()

    def _filled(self) -> Iterator[Batch]:
        return (batch for batch in self._batches if batch_size(batch))


def checksum(batch: Batch) -> float:
    """The sum of a batch's input, in float64: equal sums over a pass mean the same samples in whatever order."""
    return sum(float(tensor.double().sum()) for tensor in input_tensors(batch))
