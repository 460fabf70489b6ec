"""The batches of a pass: they can be looked at ahead, and a changed order or sample is noticed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.data import Dataset, IterableDataset

from ckpt_tools.errors import DataError, UsageError
from ckpt_tools.model.batch import Batch, batch_size, input_tensors
from ckpt_tools.model.layouts import values_of


class Batches:
    """An iterable of batches whose first ones can be looked at without losing or rereading them.

    Batches without a sample are skipped. Raises UsageError where ``batches`` is a single batch, or
    a dataset of samples: iterating over those would yield samples, which look like batches.
    """

    def __init__(self, batches: Iterable[Batch]) -> None:
        # What has a length along each axis (Tensor, numpy's arrays) is a batch, and a text is a path.
        is_batch = isinstance(batches, (Tensor, Mapping)) or hasattr(batches, "__array__")
        is_iterable = isinstance(batches, Iterable) or hasattr(batches, "__getitem__")
        if is_batch or not is_iterable or isinstance(batches, (str, bytes, nn.Module)):
            raise UsageError(
                f"batches is a {type(batches).__name__}; expected an iterable of batches, such as "
                "[batch] or a DataLoader, or None for random inputs."
            )
        # An IterableDataset may yield batches itself; what it yields is not known beforehand.
        if isinstance(batches, Dataset) and not isinstance(batches, IterableDataset):
            raise UsageError("batches is a Dataset of samples; expected batches. Wrap it in a DataLoader.")
        self._batches = batches
        self._ahead: list[Batch] = []
        self._started: Iterator[Batch] | None = None  # the iteration that `_ahead` was taken from

    @property
    def one_shot(self) -> bool:
        """Whether the batches can be read only once.

        Such data allows no second pass, and no pass can begin again.
        """
        return isinstance(self._batches, Iterator)

    def first(self) -> Batch:
        """The first batch; the next iteration begins with it. Raises DataError if there is none."""
        ahead = self.ahead(1)
        if not ahead:
            raise no_batch_error()
        return ahead[0]

    def ahead(self, images: int) -> list[Batch]:
        """The first batches, which hold ``images`` samples together if the data has as many.

        The next iteration begins with them. All but the last are copies, because a loader may
        write its next batch into the same memory.
        """
        if self._started is None:
            self._started = self._nonempty_batches()
        while sum(map(batch_size, self._ahead)) < images:
            if self._ahead:
                self._ahead[-1] = pytree.tree_map_only(Tensor, Tensor.clone, self._ahead[-1])
            batch = next(self._started, None)
            if batch is None:
                break
            self._ahead.append(batch)
        return self._ahead

    def first_images(self, images: int) -> Iterator[Batch]:
        """Iterate over the first batches, which hold ``images`` samples together or more.

        Where the data can be read only once, the batches are kept, and the next iteration begins
        with them. Otherwise it reads them again, which costs less memory.
        """
        given = number = 0
        if not self.one_shot:
            for batch in self:
                yield batch
                given += batch_size(batch)
                if given >= images:
                    return
        else:
            while given < images and len(ahead := self.ahead(given + 1)) > number:
                yield ahead[number]
                given += batch_size(ahead[number])
                number += 1

    def __iter__(self) -> Iterator[Batch]:
        """Iterate over all batches once."""
        ahead, started = self._ahead, self._started
        self._ahead, self._started = [], None
        while ahead:
            yield ahead.pop(0)
        yield from started or self._nonempty_batches()

    def _nonempty_batches(self) -> Iterator[Batch]:
        return (batch for batch in self._batches if batch_size(batch))


def no_batch_error() -> DataError:
    """The error to raise where the data holds no batch at all."""
    return DataError("no batch of training data; expected at least one.")


def checksum(batch: Batch) -> float:
    """The sum of a batch's input, in float64.

    Two passes whose checksums are equal have seen the same samples, in whatever order.
    """
    return sum(float(values_of(tensor).double().sum()) for tensor in input_tensors(batch))
