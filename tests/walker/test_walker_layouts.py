"""Noise is followed through sparse and nested tensors."""

from __future__ import annotations

import layout_nets
import pytest

import ckpt_tools


@pytest.mark.filterwarnings("ignore:Sparse", "ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("name", layout_nets.NETS)
def test_noise_is_followed_through_sparse_and_nested_tensors(name: str) -> None:
    make, behind = layout_nets.NETS[name]
    model = make()
    walk = ckpt_tools.walk(model, model.batches()[0])
    assert [layer.name for layer in walk.batch_norms if layer.downstream_of] == behind
