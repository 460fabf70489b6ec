"""An array of samples in a file whose values are read only when they are needed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ckpt_tools.errors import DataError

__all__ = ["StoredArray", "are_class_numbers", "max_decompressed_bytes"]

_MAX_COMPRESSION, _ALLOWANCE_BYTES = 100, 1 << 26


@dataclass(frozen=True)
class StoredArray:
    """An array (N, …) in a file.

    ``label`` is the file, and the name within it, as messages show it. ``dtype`` is numpy's name of
    the type. ``read`` returns the values as a tensor, memory-mapped where the format allows.
    ``labels``, if the file has them, holds the class of every sample (N,), and ``classes`` says how
    many classes there are, if known. ``name`` tells the array from others in the same file.
    """

    label: str
    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], Tensor]
    labels: StoredArray | None = None
    classes: int | None = None
    name: str = ""

    @property
    def holds_pixels(self) -> bool:
        """Whether the values are bytes of images, not yet preprocessed."""
        return self.dtype == "uint8"

    def load(self) -> Tensor:
        """Read the values, and check that they have the announced shape and type.

        Raises DataError if the file is damaged, or has changed since it was opened.
        """
        try:
            values = self.read()
        except OSError as error:
            raise DataError(
                f"{self.label}: the values cannot be read: {error}. Check file and disk."
            ) from error
        except Exception as error:  # readers of damaged files raise whatever the damage leads them to
            raise DataError(
                f"{self.label}: the values cannot be read: {error}. The file is damaged."
            ) from error
        if tuple(values.shape) != self.shape or (values.dtype == torch.uint8) != self.holds_pixels:
            raise DataError(
                f"{self.label}: expected {self.dtype} {self.shape}, "
                f"found {values.dtype} {tuple(values.shape)}. "
                "The file is damaged, or has changed meanwhile."
            )
        return values


def max_decompressed_bytes(path: Path) -> int:
    """Return how many bytes a compressed file may decompress to before it counts as an attack.

    Without this bound a small file (a "zip bomb") could fill the memory.
    """
    return _MAX_COMPRESSION * path.stat().st_size + _ALLOWANCE_BYTES


def are_class_numbers(values: Sequence[object]) -> bool:
    """Whether all values are whole numbers of a size that numbers of classes can have."""
    # type() and not isinstance(): True and False are no class numbers.
    return all(type(value) is int and abs(value) < 2**31 for value in values)
