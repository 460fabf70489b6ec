"""The batches of a pass: readable once or again and again, looked at ahead, and noticed if they change."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import Dataset, IterableDataset

from ckpt_tools.errors import DataError, UsageError
from ckpt_tools.model.batch import Batch, batch_size, input_tensors


class Batches:
    """An iterable of batches whose first ones can be looked at without being lost or read twice."""

    def __init__(self, batches: Iterable[Batch]) -> None:
        if isinstance(batches, (Tensor, Mapping)):
            raise UsageError(
                f"batches is a {type(batches).__name__}; expected an iterable of batches, such as [batch] or a "
                "DataLoader."
            )
        if isinstance(batches, Dataset) and not isinstance(batches, IterableDataset):
            raise UsageError("batches is a Dataset of samples; expected batches. Wrap it in a DataLoader.")
        self._batches = batches
        self._ahead: list[Batch] = []
        self._rest: Iterator[Batch] | None = None  # of the pass that begins with those

    @property
    def one_shot(self) -> bool:
        """Whether a second pass would find nothing."""
        return isinstance(self._batches, Iterator)

    def first(self) -> Batch:
        """The first batch; the next iteration begins with it. Raises DataError if there is none."""
        ahead = self.ahead(1)
        if not ahead:
            raise DataError("no batch of training data; expected at least one.")
        return ahead[0]

    def ahead(self, images: int) -> list[Batch]:
        """The first batches, with so many samples if there are as many; the next iteration begins with them.

        All but the last are copies: a loader may fill the same memory again.
        """
        if self._rest is None:
            self._rest = self._filled()
        while sum(map(batch_size, self._ahead)) < images:
            if self._ahead:
                self._ahead[-1] = pytree.tree_map_only(Tensor, Tensor.clone, self._ahead[-1])
            batch = next(self._rest, None)
            if batch is None:
                break
            self._ahead.append(batch)
        return self._ahead

    def __iter__(self) -> Iterator[Batch]:
        """A pass over all batches."""
        ahead, rest = self._ahead, self._rest
        self._ahead, self._rest = [], None
        while ahead:
            yield ahead.pop(0)
        yield from rest if rest is not None else self._filled()

    def _filled(self) -> Iterator[Batch]:
        return (batch for batch in self._batches if batch_size(batch))


def checksum(batch: Batch) -> float:
    """The sum of a batch's input, in float64: equal sums over a pass mean the same samples in whatever order."""
    return sum(float(tensor.double().sum()) for tensor in input_tensors(batch))
