"""Pruned and parametrized weights, and modules at two places, load into the plain model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_model
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

from ckpt_tools.errors import ArchitectureError
from ckpt_tools.identify.loading import identify_model
from ckpt_tools.storage.reading import read_checkpoint


class Plain(nn.Module):
    """`--arch test_stored_forms:Plain`"""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.up = nn.Conv2d(3, 4, 3), nn.ConvTranspose2d(4, 6, 2)
        self.norm, self.head = nn.BatchNorm2d(6), nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.head(self.norm(self.up(self.conv(x))).mean((2, 3)))
        return output


def pruned(model: Plain) -> None:
    for module in (model.conv, model.up, model.head):
        prune.l1_unstructured(module, "weight", amount=0.5)
    prune.random_unstructured(model.head, "bias", amount=1)


def normalised(model: Plain) -> None:
    weight_norm(model.conv)
    weight_norm(model.up, dim=1)
    weight_norm(model.head, dim=None)


def normalised_anew(model: Plain) -> None:
    parametrizations.weight_norm(model.conv)
    parametrizations.weight_norm(model.up, dim=1)


def spectral(model: Plain) -> None:
    spectral_norm(model.conv)
    spectral_norm(model.up)
    parametrizations.spectral_norm(model.head)


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("change", [pruned, normalised, normalised_anew, spectral])
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
def test_the_plain_model_gets_the_weights_in_use(
    tmp_path: Path, change: Callable[[Plain], None], prefix: str
) -> None:
    torch.manual_seed(0)
    model, x = Plain(), torch.randn(2, 3, 5, 5)
    change(model)
    model.train()(x)  # the vectors of spectral normalisation move in training alone
    expected = model.eval()(x)
    file = tmp_path / "x.pt"
    torch.save({prefix + key: value for key, value in model.state_dict().items()}, file)
    loaded = identify_model(read_checkpoint(file), "test_stored_forms:Plain")
    assert torch.allclose(loaded.model(x), expected, atol=1e-6)
    assert loaded.checkpoint is not None
    assert list(loaded.checkpoint.tensors) == list(model.state_dict())


def test_a_pruned_file_without_a_name_is_recognised(tmp_path: Path) -> None:
    model = timm.create_model("resnet10t", num_classes=3)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            prune.l1_unstructured(module, "weight", amount=0.5)
    torch.save(model.state_dict(), tmp_path / "x.pt")
    loaded = identify_model(read_checkpoint(tmp_path / "x.pt"))
    assert loaded.recipe.architecture == "timm:resnet10t"
    weight = loaded.model.get_parameter("layer1.0.conv1.weight")
    assert torch.equal(weight, model.layer1[0].conv1.weight)


class Normalised(Plain):
    """`--arch test_stored_forms:Normalised`"""

    def __init__(self) -> None:
        super().__init__()
        normalised_anew(self)


def test_a_model_that_has_these_parts_itself_gets_them(tmp_path: Path) -> None:
    model = Normalised()
    torch.save(model.state_dict(), tmp_path / "x.pt")
    loaded = identify_model(read_checkpoint(tmp_path / "x.pt"), "test_stored_forms:Normalised")
    assert list(loaded.model.state_dict()) == list(model.state_dict())


def test_parts_that_do_not_belong_together_are_unexpected(tmp_path: Path) -> None:
    model = Plain()
    pruned(model)
    state = model.state_dict() | {"conv.weight_mask": torch.ones(3)}
    torch.save(state, tmp_path / "x.pt")
    with pytest.raises(ArchitectureError, match=r"conv\.weight_orig"):
        identify_model(read_checkpoint(tmp_path / "x.pt"), "test_stored_forms:Plain")


class Tied(nn.Module):
    """`--arch test_stored_forms:Tied`: a block at two places, in a list and by its name."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
        self.blocks = nn.ModuleList([self.block, nn.Dropout(0.2), self.block])


class Untied(nn.Module):
    """`--arch test_stored_forms:Untied`: the training script ties the convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.last = nn.Conv2d(3, 3, 1)


def test_names_that_a_file_leaves_out(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, file = Tied(), tmp_path / "x.safetensors"
    model.block[1].running_var.uniform_(1, 2)
    save_model(model, str(file))
    loaded = identify_model(read_checkpoint(file), "test_stored_forms:Tied")
    assert all(
        torch.equal(value, model.state_dict()[key]) for key, value in loaded.model.state_dict().items()
    )
    assert isinstance(loaded.model, Tied)
    assert loaded.model.block is loaded.model.blocks[2]

    script = Untied()
    script.last = script.block
    save_model(script, str(file))
    loaded = identify_model(read_checkpoint(file), "test_stored_forms:Untied")
    assert torch.equal(loaded.model.get_parameter("last.weight"), script.block.weight)
