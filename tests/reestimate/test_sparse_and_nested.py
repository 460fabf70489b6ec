"""Models with sparse and nested tensors are re-estimated as all others."""

from __future__ import annotations

import layout_nets
import pytest
import torch
from torch import Tensor, nn

import ckpt_tools

# The walk's test has all layouts everywhere; a pass takes longer.
NAMES = [name for name in layout_nets.NETS if not name.startswith("GCN")]
NAMES += ["GCN buffer coo", "GCN buffer csr", "GCN input csr", "GCN inside csc"]

pytestmark = [
    pytest.mark.filterwarnings("ignore:Sparse", "ignore:The PyTorch API of nested tensors"),
    pytest.mark.parametrize("name", NAMES),
]


def prepare(name: str) -> tuple[nn.Module, list[object], list[str]]:
    torch.manual_seed(0)
    make, behind = layout_nets.NETS[name]
    model = make().eval()
    return model, model.batches(), behind


def variance(model: nn.Module, layer: str, batches: list[object], repeats: int = 1) -> Tensor:
    """The variance of the layer's input over all batches, in the model as it stands."""
    inputs: list[Tensor] = []
    hook = model.get_submodule(layer).register_forward_pre_hook(
        lambda _, args: inputs.append(args[0].double().transpose(0, 1).flatten(1))
    )
    with torch.no_grad():
        for batch in batches * repeats:
            model(**batch) if isinstance(batch, dict) else model(batch)
    hook.remove()
    return torch.cat(inputs, 1).var(1)


def test_exact_is_the_fixed_point(name: str) -> None:
    model, batches, behind = prepare(name)
    oracle, *_ = prepare(name)
    for layer in behind:
        oracle.get_submodule(layer).running_var = variance(oracle, layer, batches).float()
    ckpt_tools.reestimate_bn(model, batches, estimator="exact", force=True)
    for layer in behind:
        torch.testing.assert_close(
            model.get_submodule(layer).running_var,
            oracle.get_submodule(layer).running_var,
            rtol=2e-3,
            atol=1e-5,
        )


def test_pooled_is_the_variance_of_the_first_layer_behind_dropout(name: str) -> None:
    model, batches, behind = prepare(name)
    truth = variance(model, behind[0], batches).float()
    ckpt_tools.reestimate_bn(model, batches, estimator="pooled", force=True)
    torch.testing.assert_close(model.get_submodule(behind[0]).running_var, truth, rtol=1e-4, atol=1e-6)


def test_ratio_takes_out_what_dropout_adds(name: str) -> None:
    model, batches, behind = prepare(name)
    oracle, *_ = prepare(name)
    for module in oracle.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.train()
    off = variance(oracle, behind[0], batches)
    on = variance(oracle.train(), behind[0], batches, repeats=200)
    ckpt_tools.reestimate_bn(model, batches, estimator="ratio")
    # The stored variance is 1; the measurement draws dropout 4 to 16 times.
    torch.testing.assert_close(
        model.get_submodule(behind[0]).running_var.double(), off / on, rtol=0.12, atol=0
    )
