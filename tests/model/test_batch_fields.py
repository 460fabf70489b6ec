"""A batch with names reaches models that take a tensor and models that take the names."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from ckpt_tools import reestimate_bn
from ckpt_tools.errors import DataError
from ckpt_tools.model.batch_fields import find_label_field, select_arguments
from ckpt_tools.model.calling import call_model

IMAGES, LABELS = torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 0])
MASKS = torch.ones(4, 8, 8)


def model(forward: Callable[..., object]) -> nn.Module:
    module = nn.Module()
    module.forward = forward  # type: ignore[assignment]
    return module


def one(x: object) -> object:
    return x


def optional(x: object, return_features: bool = False) -> object:
    return x


def transformers_like(pixel_values: object = None, labels: object = None, **kwargs: object) -> object:
    return pixel_values, labels, kwargs


@pytest.mark.parametrize(
    "fields",
    [
        {"image": IMAGES, "label": LABELS},
        {"label": LABELS, "img": IMAGES},
        {"pixel_values": IMAGES, "labels": LABELS},
        {"x": IMAGES, "y": LABELS},
        {"jpg": IMAGES, "cls": LABELS, "__key__": ["a", "b", "c", "d"]},
        {"image": IMAGES, "target": torch.rand(4, 10), "path": ["a"] * 4, "index": torch.arange(4)},
        {"audio": IMAGES, "fine_label": LABELS, "coarse_label": LABELS},
        {"unusual": IMAGES},
    ],
)
@pytest.mark.parametrize("forward", [one, optional])
def test_models_that_take_a_tensor(forward: Callable[..., object], fields: dict[str, object]) -> None:
    assert call_model(model(forward), fields) is IMAGES


def test_an_input_among_others_is_told_by_its_name_if_the_model_takes_one_tensor() -> None:
    fields = {"mask": MASKS, "image": IMAGES, "label": LABELS}
    assert call_model(model(one), fields) is IMAGES
    assert call_model(model(lambda mask: mask), fields) is MASKS
    with pytest.raises(TypeError):  # the mask could be meant for the second parameter
        call_model(model(optional), fields)


def test_models_that_take_names() -> None:
    fields = {"pixel_values": IMAGES, "labels": LABELS}
    assert call_model(model(transformers_like), fields) == (IMAGES, LABELS, {})
    assert select_arguments(model(lambda x, mask: x), {"x": IMAGES, "mask": MASKS, "label": LABELS}) == (
        (),
        {"x": IMAGES, "mask": MASKS},
    )
    # Columns of a table have one dimension.
    table = {"age": torch.rand(4), "income": torch.rand(4), "label": LABELS}
    assert set(select_arguments(model(lambda age, income: age), table)[1]) == {"age", "income"}


def test_wrappers_pass_on_what_the_model_inside_takes() -> None:
    net = nn.Sequential(nn.Conv2d(3, 2, 3), nn.Flatten())
    for wrapped in (nn.DataParallel(net), torch.optim.swa_utils.AveragedModel(net)):
        output = call_model(wrapped, {"image": IMAGES, "label": LABELS})
        assert isinstance(output, Tensor)
        assert torch.equal(output, net(IMAGES))


def test_the_correction_is_that_of_the_same_tensors() -> None:
    corrected = []
    for batches in ([{"image": IMAGES, "label": LABELS}] * 3, [IMAGES] * 3):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(3, 2, 3), nn.Dropout(0.3), nn.BatchNorm2d(2))
        reestimate_bn(net, batches, estimator="pooled")
        corrected.append(net[2].running_var)
    assert torch.equal(*corrected)


def test_labels_are_found_by_name() -> None:
    assert find_label_field(["image", "y"]) == "y"
    assert find_label_field(["label", "image", "labels"]) == "labels"
    assert find_label_field(["img", "fine_label"]) == "fine_label"
    assert find_label_field(["image", "index"]) is None
    with pytest.raises(DataError, match="several labels: fine_label, coarse_label"):
        find_label_field(["fine_label", "coarse_label"])
