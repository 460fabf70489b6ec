"""The same on CUDA: skipped where there is none."""

from __future__ import annotations

import copy
from pathlib import Path

import nets
import numpy as np
import oracle
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

import ckpt_tools
from ckpt_tools.cli import main
from ckpt_tools.evaluate.classifier import evaluate
from ckpt_tools.initialize.verify import measure_signals

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]


@pytest.mark.parametrize("estimator", ["pooled", "exact", "ema"])
def test_same_as_on_the_cpu(estimator: str) -> None:
    data = nets.batches((3, 8, 8))
    on_cpu = nets.trained(nets.DenseNet(), data)
    on_cuda = copy.deepcopy(on_cpu).cuda()
    ckpt_tools.reestimate_bn(on_cpu, data, estimator=estimator)
    result = ckpt_tools.reestimate_bn(on_cuda, data, estimator=estimator)
    assert result.device == "cuda:0"
    found = {layer.name: on_cuda.get_buffer(f"{layer.name}.running_var").cpu() for layer in result.rewritten}
    truth = {name: on_cpu.get_buffer(f"{name}.running_var") for name in found}
    assert oracle.relative_difference(found, truth).max() < 2e-3  # TF32 convolutions


def test_evaluation_is_the_same_as_on_the_cpu() -> None:
    model = nets.trained(nets.DenseNet(), nets.batches((3, 8, 8)))
    data = [(batch, torch.arange(32) % 5) for batch in nets.batches((3, 8, 8))]
    on_cpu = evaluate(model, data, keep_logits=True)
    on_cuda = evaluate(copy.deepcopy(model).cuda(), data, keep_logits=True)
    assert torch.allclose(on_cuda.logits, on_cpu.logits, atol=1e-4)
    assert torch.allclose(on_cuda.outcomes.nll, on_cpu.outcomes.nll, atol=1e-4)


def test_walk_of_a_model_on_cuda() -> None:
    x = torch.randn(2, 3, 8, 8)
    model = nets.DenseNet()
    assert ckpt_tools.walk(model, x).batch_norms == ckpt_tools.walk(model.cuda(), x).batch_norms


def test_command_line(tmp_path: Path) -> None:
    torch.save(nets.trained(nets.DenseNet(), nets.batches((3, 8, 8))).state_dict(), tmp_path / "model.pt")
    np.save(tmp_path / "data.npy", torch.cat(nets.batches((3, 8, 8))).numpy())
    arguments = [
        "bn-reestimate",
        tmp_path / "model.pt",
        "--data",
        tmp_path / "data.npy",
        "--arch",
        "nets:DenseNet",
    ]
    for device in ("cpu", "cuda"):
        output = tmp_path / f"{device}.safetensors"
        result = CliRunner().invoke(main, [str(a) for a in [*arguments, "-o", output, "--device", device]])
        assert result.exit_code == 0, result.output
    one, other = (load_file(tmp_path / f"{device}.safetensors") for device in ("cpu", "cuda"))
    torch.testing.assert_close(one["norm.running_var"], other["norm.running_var"], rtol=2e-3, atol=0)


def test_an_init_rewrite_on_cuda_gives_the_weights_of_the_cpu() -> None:
    here = nets.mlp()
    there = copy.deepcopy(here).cuda()
    x = torch.randn(64, 10)
    ckpt_tools.rewrite_init(here, x)
    ckpt_tools.rewrite_init(there, x.cuda())
    for one, other in zip(here.parameters(), there.parameters(), strict=True):
        assert torch.equal(one, other.cpu())
    found = measure_signals(there, [x.cuda()])
    assert len(found) == 4
    assert all(signal.error_variance is not None for signal in found)
