"""Batches whose rows depend on each other, and models that demand targets in training mode."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from dropout_oracle import changed_by_dropout
from torch import Tensor, nn

import ckpt_tools
from ckpt_tools.errors import ModelError


class Cloud(nn.Module):
    """Points of several clouds in one tensor; the last column tells the cloud."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.drop = nn.Linear(3, 4), nn.Dropout(0.4)
        self.bn0, self.bn1 = nn.BatchNorm1d(4), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        cloud = x[:, 3].long()
        points = self.drop(self.bn0(self.linear(x[:, :3])))
        counts = cloud.bincount()
        if not counts.all():
            raise ValueError("a cloud has no point")
        return self.bn1(torch.stack([part.mean(0) for part in points.split(counts.tolist())]))


class Fixed(nn.Module):
    """A mixing matrix of the very size of the batch."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("mixing", torch.rand(size, size))
        self.bn = nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        if x.sum().item() == 12345:
            return x
        return self.bn(self.mixing @ F.dropout(x, 0.3, self.training))


def clouds() -> Tensor:
    return torch.cat([torch.randn(12, 3), torch.arange(12)[:, None] // 4 + 0.0], 1)


@pytest.mark.parametrize(("make", "x"), [(Cloud, clouds()), (lambda: Fixed(9), torch.randn(9, 4))])
def test_rows_that_depend_on_each_other(make: type[nn.Module], x: Tensor) -> None:
    model = make()
    # Of the clouds the first two points are one cloud of a single point, which runs as well.
    x = x.flip(0)
    walk = ckpt_tools.walk(model, x)
    assert {layer.name for layer in walk.batch_norms if layer.downstream_of} == changed_by_dropout(model, x)
    assert walk.bytes_per_sample > 0


def test_the_message_says_what_was_tried() -> None:
    with pytest.raises(ModelError) as caught:
        ckpt_tools.walk(Fixed(9), torch.randn(5, 4))
    message = str(caught.value)
    tried = "tried on meta tensors (", "the first two samples (", " and the whole batch. "
    assert all(words in message for words in tried)
    assert "9x9 and 5x4" in message.replace("(", "").replace(")", "")


def test_two_samples_are_the_whole_batch() -> None:
    with pytest.raises(ModelError, match=r"tried on meta tensors .* and the first two samples\. Expected"):
        ckpt_tools.walk(Fixed(9), torch.randn(2, 4))


class WantsTargets(nn.Module):
    """Dropout by function in the outermost module, and attention, whose dropout is a number."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 1, dropout=0.3, batch_first=True)
        self.bn0, self.bn1, self.bn2 = nn.BatchNorm1d(4), nn.BatchNorm1d(4), nn.BatchNorm1d(4)

    def forward(self, x: Tensor, targets: Tensor | None = None) -> Tensor:
        if self.training and targets is None:
            raise ValueError("targets should not be none when in training mode")
        x = self.bn0(x.transpose(1, 2)).transpose(1, 2)
        attended = self.bn1(self.attention(x, x, x, need_weights=False)[0].transpose(1, 2))
        return self.bn2(F.dropout(x, p=0.4, training=self.training).transpose(1, 2)) + attended


def test_dropout_functions_of_a_model_that_wants_targets() -> None:
    walk = ckpt_tools.walk(WantsTargets(), torch.randn(4, 6, 4))
    assert not walk.containers_trained
    assert [layer.downstream_of for layer in walk.batch_norms] == [(), ("attention",), ("(root)",)]
    assert ("(root)", "dropout", 0.4) in [(site.name, site.op, site.rate) for site in walk.dropout_sites]


def test_ratio_switches_these_functions_on() -> None:
    torch.manual_seed(0)
    model = WantsTargets().eval()
    ckpt_tools.reestimate_bn(model, [torch.randn(64, 6, 4) for _ in range(4)], estimator="ratio")
    # Dropout keeps x / 0.6 with probability 0.6, and the layer in front of it has standardised x.
    assert model.bn2.running_var.tolist() == pytest.approx([0.6] * 4, abs=0.03)
    assert (model.bn1.running_var < 0.98).all()
