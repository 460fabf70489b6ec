"""A training that goes on where it was interrupted."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol

import torch

EVERY = 60.0  # seconds between two saved states; shorter trainings begin anew


class Stateful(Protocol):
    """A model, an optimizer, a schedule."""

    def state_dict(self) -> Any: ...

    def load_state_dict(self, state: Any) -> Any: ...


class Training:
    """Epochs of a training whose state is in a file meanwhile.

    ``for epoch in Training(setup.scratch, cell, model=model, optimizer=optimizer).epochs(25): …``
    yields the epochs that are left. ``notes`` is a dict of JSON-like values (loss curves) that is
    kept along. The random states of the CPU and of CUDA are part of it, so an interrupted training
    ends as one that was not; generators of your own should be seeded from the epoch.
    """

    def __init__(self, scratch: Path, cell: object, **parts: Stateful) -> None:
        self.notes: dict[str, Any] = {}
        self._file = scratch / f"{sha256(repr(cell).encode()).hexdigest()[:16]}.pt"
        self._parts = parts
        self._next = 0
        if self._file.exists():
            self._load()

    def epochs(self, count: int) -> Iterator[int]:
        """Yield the remaining epochs, counted from 0.

        The state is saved between two of them, at most once a minute.
        """
        saved = time.monotonic()
        for epoch in range(self._next, count):
            yield epoch
            self._next = epoch + 1
            if time.monotonic() - saved >= EVERY:
                self.save()
                saved = time.monotonic()
        self._file.unlink(missing_ok=True)

    def save(self) -> None:
        """Replace the saved state in one step."""
        self._file.parent.mkdir(parents=True, exist_ok=True)
        state = {name: part.state_dict() for name, part in self._parts.items()}
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
        temporary = self._file.with_suffix(".tmp")
        torch.save(
            {
                "parts": state,
                "next": self._next,
                "notes": self.notes,
                "cpu": torch.get_rng_state(),
                "cuda": cuda,
            },
            temporary,
        )
        os.replace(temporary, self._file)

    def _load(self) -> None:
        state = torch.load(self._file, map_location="cpu", weights_only=True)
        for name, part in self._parts.items():
            part.load_state_dict(state["parts"][name])
        self._next, self.notes = state["next"], state["notes"]
        torch.set_rng_state(state["cpu"])
        if state["cuda"]:
            torch.cuda.set_rng_state_all(state["cuda"])
