"""How batches are run: layout, memory, precision, and no more of the model than is needed."""

from __future__ import annotations

import copy
import functools

import nets
import oracle
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ckpt_tools
from ckpt_tools import reestimate_bn
from ckpt_tools.contract import Precision
from ckpt_tools.errors import ModelError, UsageError
from ckpt_tools.results import Reestimation

DATA = nets.batches((3, 8, 8))


def densenet() -> nets.DenseNet:
    torch.manual_seed(0)
    model = nets.trained(nets.DenseNet(), DATA)
    assert isinstance(model, nets.DenseNet)
    return model


def variances(model: nn.Module) -> dict[str, Tensor]:
    return {name: buffer for name, buffer in model.named_buffers() if name.endswith("running_var")}


def same(one: nn.Module, other: nn.Module, rtol: float = 1e-4) -> None:
    for (name, found), expected in zip(variances(one).items(), variances(other).values(), strict=True):
        torch.testing.assert_close(found, expected, rtol=rtol, atol=0, msg=name)


class Limited(nn.Module):
    """Runs out of memory half-way, as CUDA or the CPU's allocator says it, for more than so many samples."""

    def __init__(self, model: nets.DenseNet, most: int, error: Exception) -> None:
        super().__init__()
        self.model, self.most, self.error = model, most, error
        self.sizes: list[int] = []
        model.convs[2].register_forward_pre_hook(self.allocate)

    def allocate(self, layer: nn.Module, args: tuple[Tensor]) -> None:
        if len(args[0]) > self.most:
            raise self.error
        self.sizes.append(len(args[0]))

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes."),
        MemoryError(),
    ],
    ids=["cuda", "cpu", "python"],
)
def test_short_memory_halves_the_batches(error: Exception) -> None:
    limited, plain = Limited(densenet(), 10, error), densenet()
    found = ckpt_tools.walk(limited, DATA[0][:2])
    limited.sizes.clear()
    result = reestimate_bn(limited, DATA, walk=found, estimator="pooled", rows_are_samples=True)
    reestimate_bn(plain, [part for batch in DATA for part in batch.split(8)], estimator="pooled")
    assert result.cut_to == 8
    assert limited.sizes == [8] * 16
    assert result.images == 128
    assert result.batches == 4
    same(limited.model, plain)


def test_memory_for_not_even_one_sample() -> None:
    limited = Limited(densenet(), 2, torch.OutOfMemoryError("CUDA out of memory."))
    found = ckpt_tools.walk(limited, DATA[0][:2])
    limited.most = 0
    before = copy.deepcopy(limited.state_dict())
    with pytest.raises(ModelError, match="not even one sample fits"):
        reestimate_bn(limited, DATA, walk=found, estimator="pooled", rows_are_samples=True)
    for key, value in limited.state_dict().items():
        assert torch.equal(value, before[key])


class Viewing(nn.Module):
    """Written for feature maps that are contiguous."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.drop = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Dropout(0.5)
        self.linear, self.last = nn.Linear(6 * 36, 4), nn.BatchNorm1d(4)
        self.layouts: list[bool] = []

    def forward(self, x: Tensor) -> Tensor:
        self.layouts.append(x.is_contiguous(memory_format=torch.channels_last))
        x = F.relu(self.bn(self.conv(x)))
        return self.last(self.linear(self.drop(x.view(-1, 6 * 36))))


def test_a_model_that_cannot_take_channels_last_gets_what_it_can() -> None:
    model = nets.trained(Viewing(), DATA)
    assert isinstance(model, Viewing)
    expected = oracle.corrected(model, torch.cat(DATA), {"last"})
    model.layouts.clear()
    reestimate_bn(model, [torch.cat(DATA)], estimator="pooled")
    assert model.layouts == [True, False]
    assert oracle.relative_difference({"last": model.last.running_var}, expected).max() < 0.02


def test_inputs_of_convolutions_have_their_channels_last_and_weights_keep_their_layout() -> None:
    seen: list[bool] = []

    def forward(model: nn.Module, batch: object) -> object:
        assert isinstance(batch, Tensor)
        seen.append(batch.is_contiguous(memory_format=torch.channels_last))
        return model(batch)

    model = densenet()
    strides = {name: parameter.stride() for name, parameter in model.named_parameters()}
    reestimate_bn(model, DATA, forward=forward, walk=ckpt_tools.walk(model, DATA[0]), estimator="pooled")
    assert seen == [True] * 4
    assert strides == {name: parameter.stride() for name, parameter in model.named_parameters()}
    assert not DATA[0].is_contiguous(memory_format=torch.channels_last)


class Counting(nn.Linear):
    """Notes its forwards."""

    def __init__(self, *shape: int) -> None:
        super().__init__(*shape)
        self.forwards: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.forwards.append(len(x))
        return super().forward(x)


def test_nothing_runs_behind_the_last_layer_of_interest() -> None:
    model, plain = densenet(), densenet()
    model.head = Counting(24, 5)
    reestimate_bn(model, DATA, walk=ckpt_tools.walk(plain, DATA[0]), estimator="pooled")
    reestimate_bn(plain, DATA, estimator="pooled")
    assert len(model.head.forwards) == 1  # the first batch, which shows the order of the layers
    same(model, plain, rtol=0)


def test_forwards_that_hooks_watch_are_run_to_the_end() -> None:
    model, balance = densenet(), [0]

    def count(by: int) -> None:
        balance[0] += by

    model.register_forward_pre_hook(lambda *_: count(1))
    model.register_forward_hook(lambda *_: count(-1))
    reestimate_bn(model, DATA)
    assert balance == [0]


class Twice(nn.Module):
    """The second batch norm of every forward is the first one again."""

    def __init__(self) -> None:
        super().__init__()
        self.drop, self.bn, self.linear = nn.Dropout(0.5), nn.BatchNorm1d(4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.linear(self.bn(self.drop(x))))


def test_a_layer_that_is_used_twice_is_seen_twice() -> None:
    data = nets.batches((4,))
    model = nets.trained(Twice(), data)
    result = reestimate_bn(model, data, estimator="exact")
    names = {layer.name for layer in result.rewritten}
    expected = oracle.corrected(model, torch.cat(data), names, sweeps=30)
    assert oracle.relative_difference({"bn": model.bn.running_var}, expected).max() < 1e-3


def test_control_layers_look_at_a_sample() -> None:
    """More images, the same verdict: what lies beyond the sample is not measured on them."""
    torch.manual_seed(1)
    data = nets.batches((3, 8, 8), count=24)
    model = nets.trained(nets.DenseNet(), data)
    strange = [*data[:16], *(100 * batch for batch in data[16:])]
    few, many = (reestimate_bn(copy.deepcopy(model), part) for part in (data[:16], strange))
    assert few.controls == many.controls
    assert few.controls.verdict == "agree"


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_width_arithmetic(precision: Precision) -> None:
    model, exact = densenet(), densenet()
    result = reestimate_bn(model, DATA, precision=precision)
    assert reestimate_bn(exact, DATA).deviation is None
    assert result.precision == precision
    assert result.deviation is not None
    assert 0 < result.deviation.median < 0.01
    difference = oracle.relative_difference(variances(model), variances(exact))
    assert difference.max() < max(0.05, 2 * result.deviation.high)
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    assert not torch.is_autocast_enabled("cpu")


def test_precisions_that_mean_nothing_here() -> None:
    with pytest.raises(UsageError, match="tf32 is arithmetic of NVIDIA GPUs"):
        reestimate_bn(densenet(), DATA, precision="tf32")
    with pytest.raises(UsageError, match="expected one of fp32"):
        reestimate_bn(densenet(), DATA, precision="fp8")  # type: ignore[arg-type]


def test_the_process_computes_afterwards_as_it_did_before() -> None:
    cudnn = torch.backends.cudnn
    before = (torch.backends.cuda.matmul.fp32_precision, cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision)

    def failing(model: nn.Module, batch: object) -> Reestimation:
        assert cudnn.conv.fp32_precision == "ieee"
        raise ValueError

    model = densenet()
    with pytest.raises(ModelError, match="ValueError"):
        reestimate_bn(model, DATA, forward=failing, walk=ckpt_tools.walk(model, DATA[0]))
    assert before == (
        torch.backends.cuda.matmul.fp32_precision,
        cudnn.conv.fp32_precision,
        cudnn.rnn.fp32_precision,
    )


def test_a_compiled_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiler sees what stands between BN layers; the moments are the same, and dropout stays off."""
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: object) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    model, plain = densenet(), densenet()
    result = reestimate_bn(model, DATA, compile=True, estimator="pooled")
    reestimate_bn(plain, DATA, estimator="pooled")
    assert result.images == 128
    same(model, plain, rtol=1e-5)
    assert len(graphs) == 1
    targets = [str(node.target) for node in graphs[0].graph.nodes]
    assert sum("observed_batch_norm" in target for target in targets) == 5
    assert not any("dropout" in target for target in targets)
