"""A corrected state dict, and a training that does not notice."""

from __future__ import annotations

import copy
import inspect
import random

import nets
import numpy as np
import oracle
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import ckpt_tools
from ckpt_tools.errors import DataError, NothingToDo, UsageError
from ckpt_tools.reestimate.snapshot import Options


def case() -> tuple[nn.Module, list[Tensor]]:
    data = nets.batches((3, 8, 8))
    return nets.trained(nets.DenseNet(), data), data


def everything(model: nn.Module) -> tuple[object, ...]:
    """What a training loop could notice, bit for bit."""
    values = {key: value.detach().clone().numpy().tobytes() for key, value in model.state_dict().items()}
    flags = [module.training for module in model.modules()]
    chance = torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()
    return values, flags, chance


def test_it_takes_every_option_of_reestimate_bn() -> None:
    names = list(inspect.signature(ckpt_tools.reestimate_bn).parameters)
    assert names[2:] == list(Options.__annotations__)


def test_exactly_the_running_variances_differ_and_they_are_right() -> None:
    model, data = case()
    stored = copy.deepcopy(model)
    model.train()
    model.norms[0].eval()
    before = everything(model)
    results: list[ckpt_tools.Reestimation] = []
    state = ckpt_tools.corrected_state_dict(model, data, estimator="exact", done=results.append)
    assert everything(model) == before
    own = model.state_dict()
    assert list(state) == list(own)
    names = {layer.name for layer in results[0].rewritten}
    assert {key for key in own if not torch.equal(own[key], state[key])} == {
        f"{name}.running_var" for name in names
    }
    assert all(
        (state[key].data_ptr() == own[key].data_ptr()) == torch.equal(own[key], state[key]) for key in own
    )
    truth = oracle.corrected(stored, torch.cat(data), names)
    assert (
        oracle.relative_difference({name: state[f"{name}.running_var"] for name in names}, truth).max() < 1e-3
    )
    nets.DenseNet().load_state_dict(state)
    assert state._metadata == own._metadata


def test_keys_of_wrapped_models_stay_as_they_are() -> None:
    model, data = case()
    wrapped = nn.DataParallel(model)
    state = ckpt_tools.corrected_state_dict(wrapped, data)
    assert list(state) == [f"module.{key}" for key in model.state_dict()]
    plain = ckpt_tools.corrected_state_dict(model, data)
    assert all(torch.equal(state[f"module.{key}"], value) for key, value in plain.items())


def test_nothing_stays_behind_when_it_raises() -> None:
    model, data = case()
    model.train()
    before = everything(model)
    with pytest.raises(DataError, match="NaN"):
        ckpt_tools.corrected_state_dict(model, [*data, data[0] * float("nan")])
    model.drop_rate = 0.0
    with pytest.raises(NothingToDo):
        ckpt_tools.corrected_state_dict(model, data)
    assert everything(model) == before


class Augmented(Dataset[Tensor]):
    """Every access adds noise from the global generators."""

    def __init__(self, *shape: int) -> None:
        self.images = torch.cat(nets.batches(shape))

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return (
            self.images[index] + 0.1 * torch.randn(()) + 0.1 * random.random() + 0.1 * float(np.random.rand())
        )


def steps(loader: DataLoader[Tensor], *, saving: bool) -> Tensor:
    """Two epochs of a loop with a save in the middle of each: all that it saw."""
    torch.manual_seed(7)
    model = nets.DenseNet().train()
    random.seed(7)
    np.random.seed(7)
    seen = []
    for _ in range(2):
        for number, batch in enumerate(loader):
            seen.append(model(batch).detach())  # dropout: draws, too
            seen.append(batch.flatten(1)[:, :5])
            if saving and number == 1:
                ckpt_tools.corrected_state_dict(model, loader, tolerance=0.2)
    return torch.cat(seen)


@pytest.mark.parametrize("kind", ["global generator", "own generator", "persistent workers"])
def test_a_shuffled_augmented_loader_goes_on_as_if_nobody_had_looked(kind: str) -> None:
    workers = {"num_workers": 1, "persistent_workers": True} if kind == "persistent workers" else {}

    def loader() -> DataLoader[Tensor]:
        own = None if kind == "global generator" else torch.Generator().manual_seed(3)
        return DataLoader(Augmented(3, 8, 8), batch_size=32, shuffle=True, generator=own, **workers)

    assert torch.equal(steps(loader(), saving=True), steps(loader(), saving=False))


def test_exact_may_read_augmented_data() -> None:
    model = nets.mlp()
    loader = DataLoader(Augmented(10), batch_size=32, shuffle=True)
    results: list[ckpt_tools.Reestimation] = []
    ckpt_tools.corrected_state_dict(model, loader, estimator="exact", limit_batches=2, done=results.append)
    assert results[0].passes > 1
    assert results[0].images == 64


@pytest.mark.parametrize(
    ("limits", "images"), [({"limit_batches": 3}, 96), ({"max_images": 40}, 64), ({}, 128)]
)
def test_limits(limits: dict[str, int], images: int) -> None:
    model, data = case()
    results: list[ckpt_tools.Reestimation] = []
    ckpt_tools.corrected_state_dict(model, data, done=results.append, **limits)
    assert results[0].images == images


def test_batches_are_prepared() -> None:
    model, data = case()
    doubled = ckpt_tools.corrected_state_dict(model, [batch * 2 for batch in data])
    prepared = ckpt_tools.corrected_state_dict(model, data, prepare=lambda batch: batch * 2)
    assert all(torch.equal(doubled[key], prepared[key]) for key in doubled)


def test_labels_are_ignored_and_odd_batches_refused() -> None:
    model, data = case()
    labelled = DataLoader(TensorDataset(torch.cat(data), torch.zeros(128)), batch_size=32)
    assert ckpt_tools.corrected_state_dict(model, labelled)
    with pytest.raises(UsageError, match="one-shot"):
        ckpt_tools.corrected_state_dict(model, iter(data), estimator="exact")
    with pytest.raises(UsageError, match="Tensor"):
        ckpt_tools.corrected_state_dict(model, data[0])
