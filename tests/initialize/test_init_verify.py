"""Signals in training mode, against hooks of autograd on the functional calls; and the picture of them."""

from __future__ import annotations

import copy
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ckpt_tools.errors import DataError, ModelError, OutputError, UsageError
from ckpt_tools.initialize.init_results import LayerSignal
from ckpt_tools.initialize.verify import measure_signals
from ckpt_tools.report.pages.signals_figure import check_figure, write_signals_figure

CALLS = [(F, "linear"), (F, "conv1d"), (F, "conv2d"), (F, "conv_transpose2d"), (torch, "mm"), (torch, "bmm")]
SEED = 3


@contextmanager
def hooked(model: nn.Module) -> Iterator[tuple[dict[str, list[Tensor]], dict[str, list[Tensor]]]]:
    """Every z and δ by parameter, caught where Python calls the operation and by a hook on its result."""
    outputs: dict[str, list[Tensor]] = {}
    errors: dict[str, list[Tensor]] = {}
    names = {id(parameter): name for name, parameter in model.named_parameters()}

    def catching(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def caught(*args: object, **kwargs: object) -> Tensor:
            z = original(*args, **kwargs)
            weights = [names.get(id(arg), names.get(id(getattr(arg, "_base", None)))) for arg in args[:2]]
            for name in filter(None, weights):  # none in attention's product of queries and keys
                outputs.setdefault(name, []).append(z.detach().clone().flatten())
                z.register_hook(
                    lambda delta, name=name: errors.setdefault(name, []).append(delta.clone().flatten())
                )
            return z

        return caught

    with pytest.MonkeyPatch.context() as patch:
        for module, name in CALLS:
            patch.setattr(module, name, catching(getattr(module, name)))
        yield outputs, errors


def oracle(model: nn.Module, batches: Sequence[Tensor]) -> dict[str, tuple[float, float]]:
    """Var(z) and Var(δ)/0.01² of every parameter, with the dropout masks and errors of seed SEED."""
    model = copy.deepcopy(model)
    noise = torch.Generator().manual_seed(SEED)
    torch.manual_seed(SEED)
    with hooked(model) as (outputs, errors):
        for batch in batches:
            result = model(batch.clone())
            result.backward(0.01 * torch.randn(result.shape, generator=noise))

    def variance(parts: list[Tensor]) -> float:
        return float(torch.cat(parts).double().var(correction=0))

    return {name: (variance(outputs[name]), variance(errors[name]) / 0.01**2) for name in outputs}


class Net(nn.Module):
    """Parts and a function of them."""

    def __init__(
        self, function: Callable[[nn.Module, Tensor], Tensor], **parts: nn.Module | nn.Parameter
    ) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(6, 16),
        nn.ReLU(),
        nn.Dropout(0.4),
        nn.Linear(16, 16),
        nn.Tanh(),
        nn.Dropout(0.2),
        nn.Linear(16, 3),
    )


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Dropout2d(0.3),
        nn.Conv2d(8, 8, 3, groups=4), nn.LeakyReLU(0.1, inplace=True),
        nn.Conv2d(8, 8, 3, groups=8, padding="same"),
        nn.ConvTranspose2d(8, 6, 3, stride=2, groups=2), nn.ReLU(inplace=True), nn.Conv2d(6, 2, 1),
    )  # fmt: skip


def matrices() -> nn.Module:
    """A bare parameter, one on the left, a batch of matrices, a layer without bias on a transposed input."""

    def forward(net: nn.Module, x: Tensor) -> Tensor:
        x = F.linear(x.transpose(1, 2), net.bare).relu_()
        x = torch.bmm(x.transpose(0, 1), net.batched)
        return torch.mm(net.left, x.flatten(0, 1)) + net.last(x).mean()

    return Net(
        forward,
        bare=nn.Parameter(torch.randn(5, 6)),
        batched=nn.Parameter(torch.randn(4, 5, 7)),
        left=nn.Parameter(torch.randn(3, 32)),
        last=nn.Linear(7, 2, bias=False),
    )


def reused() -> nn.Module:
    """The same layer twice, and its weight once more under another name."""
    net = Net(lambda net, x: net.alias(net.layer(torch.tanh(net.layer(x))).relu_()), layer=nn.Linear(6, 6))
    net.alias = nn.Linear(6, 6)
    net.alias.weight = net.layer.weight
    return net


def attention(*, cross: bool) -> nn.Module:
    parts = {
        "attention": nn.MultiheadAttention(8, 2, dropout=0.3, batch_first=True),
        "memory": nn.Linear(8, 8),
    }

    def forward(net: nn.Module, x: Tensor) -> Tensor:
        memory = net.memory(x)
        key, value = (memory, memory.square()) if cross else (x, x)
        return net.attention(x, key, value)[0] + memory

    return Net(forward, **parts)


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (mlp, (6,)),
    "convolutions": (convolutions, (3, 9, 9)),
    "matrices": (matrices, (6, 4)),
    "reused": (reused, (6,)),
    "self-attention": (lambda: attention(cross=False), (5, 8)),
    "cross-attention": (lambda: attention(cross=True), (5, 8)),
    "encoder": (
        lambda: nn.TransformerEncoderLayer(8, 2, 16, 0.2, activation="gelu", batch_first=True),
        (5, 8),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_signals_are_those_that_autograd_hooks_see(case: str) -> None:
    make, shape = CASES[case]
    model, batches = make(), [torch.randn(8, *shape), 3 + torch.randn(8, *shape)]
    found = measure_signals(model.eval(), batches, seed=SEED)
    expected = oracle(model.train(), batches)
    assert [layer.parameter for layer in found] == list(expected)
    for layer in found:
        assert (layer.variance, layer.error_variance) == pytest.approx(expected[layer.parameter], rel=1e-4)
        assert layer.name == layer.parameter.removesuffix(".weight")


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputed_segments_count_once(reentrant: bool) -> None:
    def stored(net: nn.Module, x: Tensor) -> Tensor:
        return net.tail(net.head(x))

    def recomputed(net: nn.Module, x: Tensor) -> Tensor:
        return net.tail(checkpoint(net.head, x, use_reentrant=reentrant))

    parts = {
        "head": nn.Sequential(nn.Linear(6, 6, bias=False), nn.Dropout(0.5), mlp()),
        "tail": nn.Linear(3, 2),
    }
    batches = [torch.randn(16, 6)]
    plain, again = (measure_signals(Net(function, **parts), batches) for function in (stored, recomputed))
    assert {layer.parameter: layer.variance for layer in plain} == {
        layer.parameter: layer.variance for layer in again
    }
    assert [layer.error_variance for layer in again] == pytest.approx(
        [layer.error_variance for layer in plain]
    )


def test_frozen_parameters_are_measured_alike() -> None:
    model, batches = mlp(), [torch.randn(16, 6)]
    assert measure_signals(model, batches) == measure_signals(
        copy.deepcopy(model).requires_grad_(False), batches
    )


def test_gradients_may_be_off_around_it() -> None:
    model, batches = mlp(), [torch.randn(16, 6)]
    expected = measure_signals(model, batches)
    with torch.no_grad():
        assert measure_signals(model, batches) == expected
    with torch.inference_mode():
        assert measure_signals(model, [torch.cat(batches)]) == expected


def test_embeddings_pass_errors_on_to_the_first_layer() -> None:
    model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    layers = measure_signals(model, [torch.randint(10, (8, 5))])
    assert [layer.name for layer in layers] == ["1", "3"]
    assert all(layer.error_variance for layer in layers)


def test_layers_without_gradient_have_no_error() -> None:
    model = Net(
        lambda net, x: net.behind(net.before(x).detach()), before=nn.Linear(4, 4), behind=nn.Linear(4, 4)
    )
    before, behind = measure_signals(model, [torch.randn(8, 4)])
    assert (before.error_variance, before.errors) == (None, ())
    assert behind.error_variance is None, "its input is a constant for autograd"
    silent = measure_signals(
        Net(lambda net, x: net.layer(x).argmax(), layer=nn.Linear(4, 4)), [torch.randn(8, 4)]
    )
    assert [layer.error_variance for layer in silent] == [None]


def test_every_output_is_fed_an_error() -> None:
    model = Net(
        lambda net, x: {"scores": net.a(x), "more": [net.b(x), "word", 3]},
        a=nn.Linear(4, 50),
        b=nn.Linear(4, 50),
    )
    layers = measure_signals(model, [{"x": torch.randn(40, 4)}])
    assert [layer.error_variance for layer in layers] == pytest.approx([1, 1], rel=0.1)


def test_a_large_mean_costs_no_accuracy() -> None:
    layer, x = nn.Linear(1, 1), torch.randn(5000, 1)
    nn.init.ones_(layer.weight)
    nn.init.constant_(layer.bias, 600.0)
    (found,) = measure_signals(layer, [x])
    assert found.variance == pytest.approx(float(layer(x).detach().double().var(correction=0)), rel=1e-9)


def test_samples_are_values_each_batch_having_its_share() -> None:
    layer = nn.Linear(1, 1, bias=False)
    nn.init.ones_(layer.weight)
    (found,) = measure_signals(layer, [torch.full((30_000, 1), 1.0), torch.full((10_000, 1), 2.0)])
    assert set(found.outputs) == {1.0, 2.0}
    assert len(found.outputs) == len(found.errors) == 2000
    assert np.mean(np.array(found.outputs) == 1.0) == pytest.approx(0.75, abs=0.05)


def test_small_layers_are_sampled_whole_and_errors_without_zeros() -> None:
    model, x = nn.Sequential(nn.Linear(3, 4), nn.ReLU()), torch.randn(5, 3)
    (found,) = measure_signals(model, [x])
    z = model[0](x).detach().flatten()
    assert sorted(found.outputs) == pytest.approx(sorted(z.tolist()))
    assert len(found.errors) == int((z > 0).sum())
    assert all(found.errors)


def test_the_seed_decides() -> None:
    def noisy(net: nn.Module, x: Tensor) -> Tensor:
        return net.body(x) * random.random() + net.head(x) * np.random.rand()

    model, batches = Net(lambda net, x: net.last(noisy(net, x)), body=mlp(), head=mlp()), [torch.randn(16, 6)]
    model.last = nn.Linear(3, 3)
    first = measure_signals(model, batches, seed=1)
    random.random(), np.random.rand(), torch.rand(1)
    assert measure_signals(model, batches, seed=1) == first
    assert measure_signals(model, batches, seed=2) != first


def test_wrappers_leave_no_trace_in_names() -> None:
    assert [layer.name for layer in measure_signals(nn.DataParallel(mlp()), [torch.randn(16, 6)])] == [
        "0",
        "3",
        "6",
    ]


def test_nothing_of_the_callers_changes() -> None:
    def forward(net: nn.Module, x: Tensor) -> Tensor:
        random.random(), np.random.rand()
        return net.body(x.mul_(2) + torch.rand_like(x))

    model, x = Net(forward, body=convolutions()).eval(), torch.randn(4, 3, 9, 9)
    model.body[4].train()
    next(model.parameters()).requires_grad_(False)

    def state() -> tuple[object, ...]:
        tensors = [tensor.numpy(force=True).tobytes() for tensor in [*model.state_dict().values(), x]]
        flags = [module.training for module in model.modules()]
        gradients = [(parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
        generators = torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state(legacy=False))
        return tensors, flags, gradients, x.requires_grad, generators

    before = state()
    measure_signals(model, [x])
    assert state() == before


class Detector(nn.Sequential):
    """Wants targets when it trains."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            raise ValueError("targets should not be none when in training mode")
        return super().forward(x)


def test_a_container_that_wants_targets_runs_with_its_leaves_in_training_mode() -> None:
    model, batches = Detector(*convolutions()), [torch.randn(8, 3, 9, 9)]
    found = measure_signals(model, batches, seed=SEED)
    expected = oracle(nn.Sequential(*model).train(), batches)
    assert [(layer.variance, layer.error_variance) for layer in found] == [
        pytest.approx(pair, rel=1e-4) for pair in expected.values()
    ]


def test_what_cannot_be_measured_is_refused() -> None:
    with pytest.raises(DataError, match="no batch"):
        measure_signals(mlp(), [])
    with pytest.raises(DataError, match="a batch is of type str"):
        measure_signals(mlp(), ["x"])
    with pytest.raises(ModelError, match="Sequential: forward and backward in training mode failed"):
        measure_signals(mlp(), [torch.randn(4, 5)])


def signal(variance: float, error: float | None, size: int = 300) -> LayerSignal:
    values = torch.randn(size, generator=torch.Generator().manual_seed(0)).double()
    errors = () if error is None else tuple((values * error**0.5).tolist())
    return LayerSignal(
        "layer", "layer.weight", variance, error, tuple((values * variance**0.5).tolist()), errors
    )


MAGIC = {"signals.png": b"\x89PNG", "signals.svg": b"<?xml", "signals.PDF": b"%PDF"}


@pytest.mark.parametrize("name", MAGIC)
def test_a_picture_is_written_in_each_format_over_an_old_one(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(b"old")
    write_signals_figure(path, [signal(2.0, 3.0), signal(4.0, 1.0)], [signal(1.0, 1.0)] * 2)
    assert path.read_bytes().startswith(MAGIC[name])
    assert [file.name for file in tmp_path.iterdir()] == [name]


def test_settings_of_a_neighbouring_file_are_not_followed(tmp_path: Path) -> None:
    """matplotlib takes a matplotlibrc in the current folder for the user's, and text.usetex runs LaTeX."""
    matplotlib = pytest.importorskip("matplotlib")
    signals = [signal(2.0, 3.0), signal(4.0, 1.0)]
    write_signals_figure(tmp_path / "plain.png", signals, signals)
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\nfigure.facecolor: red\n")
    with matplotlib.rc_context(fname=tmp_path / "matplotlibrc"):
        write_signals_figure(tmp_path / "same.png", signals, signals)
        assert matplotlib.rcParams["text.usetex"]
    assert (tmp_path / "same.png").read_bytes() == (tmp_path / "plain.png").read_bytes()


ODD = {
    "one layer": [signal(1.0, None)],
    "exploding": [signal(10.0**power, 10.0**-power) for power in range(0, 38, 6)],
    "dead": [signal(0.0, 0.0)] * 3,
    "not finite": [
        LayerSignal("a", "a", float("inf"), float("nan"), (float("inf"), 1.0), (float("nan"),)),
        signal(1.0, 1.0),
    ],
    "constant layers": [
        LayerSignal(name, name, 0.0, None, (value,) * 9) for name, value in (("a", 1.0), ("b", 2.0))
    ],
    "far from each other": [
        signal(1.0, 1.0),
        *[LayerSignal("b", "b", 1.0, 1.0, (1e6, 1e6 + 1), (1e6, 1e6 + 1))] * 2,
    ],
    "a hair's breadth": [LayerSignal("a", "a", 0.0, None, (1.0, 1.0 + 2**-52) * 50)],
    "no layer": [],
}


@pytest.mark.parametrize("case", ODD)
def test_odd_signals_can_be_drawn(case: str, tmp_path: Path) -> None:
    write_signals_figure(tmp_path / "odd.png", ODD[case], [signal(1.0, 1.0)] * len(ODD[case]))
    assert (tmp_path / "odd.png").stat().st_size > 1000


def test_other_formats_and_missing_folders_are_refused_early(tmp_path: Path) -> None:
    for name in ("signals.jpg", "signals"):
        with pytest.raises(UsageError, match=r"\.png, \.svg or \.pdf"):
            check_figure(tmp_path / name)
    with pytest.raises(OutputError, match="folder"):
        check_figure(tmp_path / "nowhere" / "signals.png")


def test_without_matplotlib_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for refuse in (
        check_figure,
        lambda path: write_signals_figure(path, [signal(1.0, 1.0)], [signal(1.0, 1.0)]),
    ):
        with pytest.raises(UsageError, match=r"pip install 'ckpt-tools\[report\]'"):
            refuse(tmp_path / "signals.png")
    assert not list(tmp_path.iterdir())


def test_a_picture_that_cannot_be_written_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(figure: Figure, path: Path, **options: object) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", full)
    with pytest.raises(OutputError, match="No space left"):
        write_signals_figure(tmp_path / "signals.png", [signal(1.0, 1.0)], [signal(1.0, 1.0)])
    assert not list(tmp_path.iterdir())
