"""A torch mode that raises at one operation."""

from __future__ import annotations

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class Injected(Exception):
    """What nobody but the test raises."""


class Faulty(TorchDispatchMode):
    """Counts operations and raises at one of them; 0: at none."""

    def __init__(self, at: int = 0, error: type[BaseException] = Injected) -> None:
        super().__init__()
        self.at, self.error, self.seen = at, error, 0

    def __torch_dispatch__(self, func: Any, types: object, args: Any = (), kwargs: Any = None) -> object:
        self.seen += 1
        if self.seen == self.at:
            raise self.error
        return func(*args, **(kwargs or {}))
