"""What every test shares: one thread, a fixed seed, and the little nets that stand for the families."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread_one_seed() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_continuous_integration(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the suite itself runs in GitHub Actions, the commands it tests add nothing to that run's page."""
    for name in ("GITHUB_ACTIONS", "GITHUB_STEP_SUMMARY"):
        monkeypatch.delenv(name, raising=False)
