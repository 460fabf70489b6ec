"""Every entry point that takes a caller's model gives it back as it came, whatever its forward does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from typing import Any

import nets
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from mutations import MUTATIONS, OUTCOMES, SETTINGS, Attic, fail, unchanged
from torch import Tensor, nn
from torch.ao import quantization
from torch.ao.quantization import fake_quantize, observer

import ckpt_tools
from ckpt_tools.diagnosis.agreement import measure_agreement
from ckpt_tools.errors import CkptToolsError, ModelError
from ckpt_tools.evaluate.classifier import evaluate
from ckpt_tools.initialize.verify import measure_signals

pytestmark = [
    pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state"),
    pytest.mark.filterwarnings("ignore:.*(TF32|tf32|Anomaly).*"),
    pytest.mark.filterwarnings("ignore:.*(quantiz|qconfig|torch.ao|observer).*"),
]


class Restless(nn.Module):
    """A net that changes what it can reach in every forward, and fails in the second if it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.attic = nets.trained(nets.DenseNet(layers=1), images()), Attic()
        del self.attic.sparse, self.attic.rows  # no walk can record them
        self.plan = Plan()

    def forward(self, x: Tensor) -> Tensor:
        self.plan.carry_out(self)
        return self.net(x)


class Plan:
    """What the next forwards do; no part of the model."""

    def __init__(self) -> None:
        self.program: Sequence[str] = ()
        self.error: type[BaseException] | None = None
        self.forwards = 0

    def __deepcopy__(self, memo: object) -> Plan:
        return Plan()  # of a copy

    def carry_out(self, model: Restless) -> None:
        self.forwards += 1
        for name in self.program:
            with suppress(AttributeError, RuntimeError, TypeError, KeyError, ValueError):  # the second time
                SETTINGS[name]() if name in SETTINGS else MUTATIONS[name](model.attic)
        if self.program:
            factor = 1.5 if self.forwards == 1 else 1  # `exact` needs a network that stands still
            model.net.stem.weight.data = model.net.stem.weight.data * factor
            model.net.head.bias.data.add_(0.1)
            model.net.norm.eval().requires_grad_(False)
        if self.forwards > 1:
            fail(self.error)


def images() -> list[Tensor]:
    return nets.batches((3, 4, 4), count=3, size=8)


def labelled() -> list[tuple[Tensor, Tensor]]:
    return [(batch, torch.zeros(len(batch), dtype=torch.long)) for batch in images()]


Call = Callable[[nn.Module, dict[str, Any]], object]
DATA = images()


@cache
def known_walk() -> ckpt_tools.Walk:
    return ckpt_tools.walk(Restless(), DATA[0])


def reestimate(**options: Any) -> Call:
    return lambda model, more: ckpt_tools.reestimate_bn(
        model, DATA, walk=known_walk(), layers="all", force=True, **options, **more
    )


ENTRIES: dict[str, Call] = {
    "pooled": reestimate(),
    "exact": reestimate(estimator="exact"),
    "precise": reestimate(statistics="mean+variance"),
    "without a walk": lambda model, more: ckpt_tools.reestimate_bn(model, DATA, force=True, **more),
    "beside a training": lambda model, more: ckpt_tools.corrected_state_dict(model, DATA, **more),
    "walk": lambda model, more: ckpt_tools.walk(model, DATA[0], **more),
    "agreement": lambda model, more: measure_agreement(model, DATA, known_walk(), rates_known=True, **more),
    "signals": lambda model, more: measure_signals(model, DATA, **more),
    "evaluation": lambda model, more: evaluate(
        model,
        labelled(),
        forward=lambda net, batch: more.get("forward", lambda net, batch: net(batch))(net, batch),
    ),
    "initial weights": lambda model, more: ckpt_tools.rewrite_init(model, DATA[0], **more),
}
WRITES = {
    **dict.fromkeys(("pooled", "exact", "without a walk"), ("[running_var]",)),
    "precise": ("[running_var]", "[running_mean]"),
    "initial weights": ("[weight]", "[bias]"),
}
HARMLESS = [
    name for name in SETTINGS if name not in ("default device", "default dtype", "gradients", "anomalies")
]
HARMLESS += [name for name in MUTATIONS if name != "attributes_exchanged"]


COPIES = ("walk", "signals", "initial weights")
"""Entry points that run copies; a caller's function may still run the model itself."""


def run(entry: str, program: Sequence[str], error: type[BaseException] | None, *, bound: bool) -> None:
    """Run an entry point on a restless model; ``bound``: a function runs the model, whatever it is given."""
    known_walk()  # draws random numbers, once
    model = Restless()
    more = {"forward": lambda _, batch: model(batch)} if bound else {}
    model.plan.program, model.plan.error = program, error
    allowed = ["\0"]
    with unchanged(model, allowed):
        try:
            ENTRIES[entry](model, more)
            allowed += WRITES.get(entry, ())
        except (KeyboardInterrupt, CkptToolsError):
            if error is None and not bound:
                raise
    if bound or entry not in COPIES:
        assert model.plan.forwards > 0


@pytest.mark.parametrize("error", OUTCOMES)
@pytest.mark.parametrize("entry", ENTRIES)
def test_all_kinds_at_once(entry: str, error: type[BaseException] | None) -> None:
    run(entry, HARMLESS, error, bound=entry in COPIES)


@pytest.mark.parametrize("entry", ["pooled", "without a walk", "evaluation", "agreement"])
def test_settings_that_change_what_new_tensors_are(entry: str) -> None:
    run(entry, ["default dtype"], None, bound=False)


@settings(max_examples=25, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(
    st.sampled_from(sorted(ENTRIES)),
    st.lists(st.sampled_from(sorted({*SETTINGS, *MUTATIONS} - {"default device"})), min_size=1, max_size=6),
    st.sampled_from(OUTCOMES[1:]),
    st.booleans(),
)
def test_any_program_in_any_entry_point(
    entry: str, program: list[str], error: type[BaseException], bound: bool
) -> None:
    run(entry, program, error, bound=bound or entry in COPIES)


def lazy() -> nn.Module:
    return nn.Sequential(nn.LazyLinear(4), nn.Dropout(0.5), nn.LazyBatchNorm1d(), nn.Linear(4, 3))


LAZY: dict[str, Callable[[nn.Module], object]] = {
    "walk": lambda model: ckpt_tools.walk(model, torch.ones(4, 3)),
    "re-estimation": lambda model: ckpt_tools.reestimate_bn(model, [torch.ones(4, 3)], walk=known_walk()),
    "evaluation": lambda model: evaluate(model, [(torch.ones(4, 3), torch.zeros(4, dtype=torch.long))]),
    "signals": lambda model: measure_signals(model, [torch.ones(4, 3)]),
    "initial weights": lambda model: ckpt_tools.rewrite_init(model, torch.ones(4, 3)),
}


@pytest.mark.parametrize("entry", LAZY)
def test_lazy_modules_are_refused_as_they_are(entry: str) -> None:
    model = lazy()
    classes = [type(module) for module in model.modules()]
    with pytest.raises(ModelError, match=r"^[02]\.\w+: not initialised yet"):
        LAZY[entry](model)
    assert [type(module) for module in model.modules()] == classes


class Growing(nn.Module):
    """Collects what it has seen, in a buffer that grows."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(0, 3))

    def forward(self, x: Tensor) -> Tensor:
        self.seen = torch.cat([self.seen, x.detach().mean((2, 3)).to(self.seen.device)])
        return x


class Filling(nn.Module):
    """Fills an empty buffer in its first forward."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("least", torch.empty(0))

    def forward(self, x: Tensor) -> Tensor:
        if not self.least.numel():
            self.least.resize_(x.shape[1])
        self.least.copy_(x.detach().amin((0, 2, 3)))
        return x


def behind(*first: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*first, nn.Conv2d(3, 8, 1), nn.Dropout(0.3), nn.BatchNorm2d(8), nn.ReLU())


def quantisation_aware(config: quantization.QConfig) -> nn.Module:
    model = behind().train()
    model.qconfig = config
    return quantization.prepare_qat(model)


def per_channel() -> quantization.QConfig:
    activation = fake_quantize.FakeQuantize.with_args(observer=observer.PerChannelMinMaxObserver, ch_axis=1)
    return quantization.QConfig(
        activation=activation, weight=fake_quantize.default_per_channel_weight_fake_quant
    )


RESIZED: dict[str, Callable[[], nn.Module]] = {
    "filling": lambda: behind(Filling()),
    "growing": lambda: behind(Growing()),
    "moving average": lambda: quantisation_aware(quantization.get_default_qat_qconfig("fbgemm")),
    "per channel": lambda: quantisation_aware(per_channel()),
    "observers": lambda: behind(observer.HistogramObserver(), observer.PerChannelMinMaxObserver(ch_axis=1)),
}


@pytest.mark.parametrize("name", RESIZED)
def test_buffers_that_a_forward_resizes(name: str) -> None:
    """torch.ao's observers do it before their first batch.

    Storages that grow may move, so states are compared.
    """
    model = RESIZED[name]()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    result = ckpt_tools.reestimate_bn(model, DATA, force=True)
    after = model.state_dict()
    assert list(after) == list(before)
    changed = {key for key in after if not torch.equal(after[key].nan_to_num(), before[key].nan_to_num())}
    assert changed == {f"{layer.name}.running_var" for layer in result.rewritten} != set()


class Counting(nn.Module):
    """A nonlinearity that counts its calls, and learns."""

    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.ones(1))
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.slope.data.add_(0)
        self.last = x
        torch.set_default_dtype(torch.float64)
        return x * self.slope.clamp_min(0) + torch.zeros(1).double()


@pytest.mark.parametrize("how", ["module", "method", "function"])
def test_a_nonlinearity_comes_back(how: str) -> None:
    module = Counting()
    functions = {"module": module, "method": module.forward, "function": lambda x: module(x)}
    with unchanged(module):
        assert ckpt_tools.activation_moments(functions[how]).forward == pytest.approx(1)
