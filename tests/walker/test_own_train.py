"""Models whose own train() keeps parts in evaluation mode, as transfer learning does."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ckpt_tools import reestimate_bn, walk


class Tuned(nn.Module):
    """A pre-trained part that its owner keeps in evaluation mode, in one way of several, and a new head."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.trunk = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.3), nn.BatchNorm1d(8), nn.ReLU())
        self.head = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.4), nn.BatchNorm1d(8), nn.Linear(8, 2))

    def train(self, mode: bool = True) -> Tuned:
        if self.how == "only the head trains":
            self.training = mode
            self.trunk.eval()
            self.head.train(mode)
            return self
        super().train(mode)
        for module in self.trunk.modules():
            if self.how == "no dropout in the trunk" and isinstance(module, nn.Dropout):
                module.training = False
            elif self.how == "it fails":
                raise RuntimeError("only on a cluster")
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.trunk(x))


@pytest.mark.parametrize("how", ["only the head trains", "no dropout in the trunk"])
def test_what_train_keeps_in_evaluation_mode_is_no_dropout(how: str) -> None:
    model, x = Tuned(how), torch.randn(16, 6)
    walked = walk(model, x)
    assert {site.name for site in walked.dropout_sites} == {"head.1"}
    assert {layer.name: layer.downstream_of for layer in walked.batch_norms} == {
        "trunk.2": (),
        "head.2": ("head.1",),
    }
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for estimator in ("pooled", "exact", "ratio"):
        reestimate_bn(model, [x], estimator=estimator, force=True)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"head.2.running_var"}


def test_a_train_method_that_fails_leaves_all_dropout_on() -> None:
    walked = walk(Tuned("it fails"), torch.randn(16, 6))
    assert [site.name for site in walked.dropout_sites] == ["trunk.1", "head.1"]
