"""What every test shares: one thread, a fixed seed, and the little nets that stand for the families."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

from ckpt_tools.redaction import remembering

# A test must not fail because the machine is busy, and the first example pays for imports.
settings.register_profile("without deadlines", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("without deadlines")


@pytest.fixture(scope="module", autouse=True)
def _frozen() -> None:
    """What stands in memory before a file's tests is not searched for garbage.

    The tests make millions of objects.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _one_thread_one_seed() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _own_secrets() -> Iterator[None]:
    """What is a secret in one test is a word in another."""
    with remembering():
        yield


@pytest.fixture(autouse=True)
def _no_continuous_integration(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the suite itself runs in GitHub Actions, the commands it tests add nothing to that run's page."""
    for name in ("GITHUB_ACTIONS", "GITHUB_STEP_SUMMARY"):
        monkeypatch.delenv(name, raising=False)
