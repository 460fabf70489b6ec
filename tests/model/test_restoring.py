"""Whatever is raised, wherever: the caller's model and process are as they were, to the last bit and hook.

A dispatch mode counts the operations of a call and raises at the n-th; first, last and a seeded sample are
tried, half of them as an error and half as an interrupt. ``photograph`` compares.
"""

from __future__ import annotations

import copy
import functools
import random
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import nets
import photograph
import pytest
import torch
from faulty_operations import Faulty, Injected
from torch import Tensor, nn
from torch.utils.data import DataLoader

import ckpt_tools
from ckpt_tools.diagnosis.agreement import measure_agreement
from ckpt_tools.evaluate.classifier import evaluate
from ckpt_tools.initialize.verify import measure_signals

TRIED = 2  # operations of each call, beside the first and the last
SIZE = 8


class Busy(nn.Module):
    """A forward that leaves traces: a new buffer and module, a counter, a hook, numbers drawn at random."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nets.DenseNet(layers=1)
        self.register_buffer("table", None, persistent=False)
        self.register_buffer(
            "mask", torch.ones(1, 3).expand(2, 3)
        )  # two rows in one place: not to be written
        self.register_buffer("forwards", torch.zeros(1))
        self.built = False

    def forward(self, x: Tensor) -> Tensor:
        x = x + 1e-3 * torch.rand_like(x) + random.random()
        if self.table is None:
            self.table = torch.ones(3)
            self.register_buffer("late", torch.zeros(1))
            self.net.register_forward_hook(lambda *_: None)
        if not self.built:
            self.built, self.extra = True, nn.Identity()
        self.forwards += 1
        return self.extra(self.net(x))


def train_mode() -> nn.Module:
    """In training mode, with parts that are not; hooks of every kind; gradients; one weight frozen."""
    model = nets.trained(nets.DenseNet(layers=2), images()).train()
    model.norms[0].eval()
    model.stem.weight.requires_grad_(False)
    model(images()[0]).sum().backward()
    model.stem.register_forward_hook(lambda *_: None)
    model.stem.register_forward_pre_hook(lambda *_: None)
    model.head.register_full_backward_hook(lambda *_: None)
    model.head.weight.register_hook(lambda grad: grad)
    model.register_state_dict_post_hook(lambda *_: None)
    model.register_load_state_dict_pre_hook(lambda *_: None)
    return model


def channels_last() -> nn.Module:
    return nets.trained(nets.ResNet().to(memory_format=torch.channels_last), images())


def odd_layers() -> nn.Module:
    """Frozen, cumulative, without scale, without statistics, and a parametrisation with its own buffers."""
    model = nets.trained(nets.mlp(), vectors()).train()
    model[1].requires_grad_(False)
    model[1].eval()
    model[5].momentum = None
    model[9] = nn.BatchNorm1d(16, track_running_stats=False)
    model.append(nn.BatchNorm1d(4, affine=False))
    nn.utils.parametrizations.spectral_norm(model[4])
    return model


def half() -> nn.Module:
    return nets.trained(nets.mlp(), vectors()).bfloat16()


def images() -> list[Tensor]:
    return nets.batches((3, 4, 4), count=2, size=SIZE)


def vectors() -> list[Tensor]:
    return nets.batches((10,), count=2, size=SIZE)


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], list[Tensor]]]] = {
    "training": (train_mode, images),
    "channels last": (channels_last, images),
    "shared": (lambda: nets.trained(nets.Reused(), images()), images),
    "odd layers": (odd_layers, vectors),
    "bfloat16": (half, lambda: [batch.bfloat16() for batch in vectors()]),
    "traces": (Busy, images),
}

Call = Callable[[nn.Module, list[Tensor], ckpt_tools.Walk], object]


def reestimate(**more: Any) -> Call:
    return lambda model, data, walk: ckpt_tools.reestimate_bn(
        model, data, walk=walk, force=True, layers="all", **more
    )


def labelled(data: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    return [(batch, torch.zeros(len(batch), dtype=torch.long)) for batch in data]


CALLS: dict[str, Call] = {
    "pooled": reestimate(),
    "exact": reestimate(estimator="exact"),
    "ema": reestimate(estimator="ema", epochs=2),
    "precise": reestimate(statistics="mean+variance", tolerance=0.9),
    "bf16": reestimate(precision="bf16"),
    "beside a training": lambda model, data, walk: ckpt_tools.corrected_state_dict(model, data, walk=walk),
    "agreement": lambda model, data, walk: measure_agreement(model, data, walk, rates_known=True),
    "walk": lambda model, data, walk: ckpt_tools.walk(model, data[0]),
    "signals": lambda model, data, walk: measure_signals(model, data),
    "evaluation": lambda model, data, walk: evaluate(model, labelled(data)),
    "initial weights": lambda model, data, walk: ckpt_tools.rewrite_init(model, data[0]),
}
WRITES = {
    **dict.fromkeys(("pooled", "exact", "ema", "bf16"), ("running_var",)),
    "precise": ("running_var", "running_mean"),
    "initial weights": ("weight", "bias", "original"),
}


@contextmanager
def odd_process() -> Iterator[None]:
    """Settings that no default has: what is put back must be what was there."""
    hook = nn.modules.module.register_module_forward_hook(lambda *_: None)
    cudnn = torch.backends.cudnn
    with ExitStack() as stack:
        stack.callback(hook.remove)
        stack.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
        stack.callback(setattr, cudnn, "benchmark", cudnn.benchmark)
        stack.callback(setattr, cudnn, "deterministic", cudnn.deterministic)
        stack.callback(torch.use_deterministic_algorithms, False)
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", message="odd")
        torch.set_float32_matmul_precision("high")
        cudnn.benchmark = cudnn.deterministic = True
        torch.use_deterministic_algorithms(True, warn_only=True)
        yield


@contextmanager
def unchanged(model: nn.Module, writes: Iterable[str] = ()) -> Iterator[None]:
    """Afterwards all is as before; if nothing was raised, but for tensors under these names."""
    before, process = photograph.of_model(model), photograph.of_process()
    allowed: tuple[str, ...] = ()
    try:
        yield
        allowed = tuple(f"[{name}{rest}" for name in writes for rest in ("]", "0]"))
    finally:
        changed = photograph.differences(before, photograph.of_model(model))
        assert [name for name in changed if not name.endswith(allowed or ("\0",))] == []
        assert photograph.differences(process, photograph.of_process()) == []


def attempt(call: Call, model: nn.Module, data: list[Tensor], walk: ckpt_tools.Walk, mode: Faulty) -> None:
    try:
        with mode:
            call(model, data, walk)
    except (Injected, KeyboardInterrupt, ckpt_tools.CkptToolsError):
        if not mode.at:
            raise


PAIRS = [
    (kind, name) for kind in MODELS for name in CALLS if kind == "training" or name in ("pooled", "walk")
]
PAIRS += [
    ("shared", "exact"),
    ("channels last", "agreement"),
    ("traces", "evaluation"),
    ("traces", "beside a training"),
]


@pytest.mark.parametrize(("kind", "name"), PAIRS)
def test_at_any_operation(kind: str, name: str) -> None:
    make, batches = MODELS[kind]
    model, data, call = make(), batches(), CALLS[name]
    walk = ckpt_tools.walk(model, data[0])
    mode = Faulty()
    with odd_process():
        with unchanged(model, WRITES.get(name, ())):
            attempt(call, model, data, walk, mode)
        draw = random.Random(f"{kind} {name}")
        for turn, at in enumerate([1, mode.seen, *draw.sample(range(2, mode.seen), TRIED)]):
            with unchanged(model, WRITES.get(name, ())):
                attempt(call, model, data, walk, Faulty(at, (Injected, KeyboardInterrupt)[turn % 2]))


@pytest.mark.parametrize("name", ["pooled", "precise", "initial weights", "beside a training"])
def test_while_results_are_written(name: str) -> None:
    """The last operations of a call put the new values in place, or the old ones back."""
    model, data = train_mode(), images()
    walk = ckpt_tools.walk(model, data[0])
    mode = Faulty()
    attempt(CALLS[name], model, data, walk, mode)
    for at in range(mode.seen - 5, mode.seen + 1):
        with unchanged(model):
            attempt(CALLS[name], model, data, walk, Faulty(at, KeyboardInterrupt))


@pytest.mark.parametrize("error", [Injected, KeyboardInterrupt])
@pytest.mark.parametrize("estimator", ["pooled", "exact"])
@pytest.mark.parametrize("place", ["loader", "end of the loader", "progress", "forward"])
def test_in_what_the_caller_supplies(place: str, estimator: str, error: type[BaseException]) -> None:
    model, data = train_mode(), images()
    walk = ckpt_tools.walk(model, data[0])

    def fail(*_: object) -> None:
        raise error

    class Loader:
        def __iter__(self) -> Iterator[Tensor]:
            yield data[0]
            if place == "loader":
                fail()
            yield data[1]
            if place == "end of the loader":
                fail()

    def forward(network: nn.Module, batch: Any) -> None:
        network(batch)
        if place == "forward":
            fail()

    expected = ckpt_tools.CkptToolsError if place == "forward" and error is Injected else error
    for call in (ckpt_tools.reestimate_bn, ckpt_tools.corrected_state_dict):
        options: dict[str, Any] = {"progress": fail} if place == "progress" else {}
        with unchanged(model), pytest.raises(expected):
            call(model, Loader(), estimator=estimator, forward=forward, walk=walk, force=True, **options)


def test_random_numbers_of_a_loader_are_drawn_beside_the_callers() -> None:
    model = nets.trained(nets.DenseNet(layers=1), images())
    loader = DataLoader(torch.cat(images()), batch_size=SIZE, shuffle=True)
    with unchanged(model, ["running_var"]):
        ckpt_tools.reestimate_bn(model, loader, force=True)


@pytest.mark.parametrize("ambient", [torch.inference_mode, torch.enable_grad, lambda: torch.autocast("cpu")])
def test_within_modes_of_the_caller(ambient: Callable[[], Any]) -> None:
    model, data = train_mode(), images()
    with ambient():
        for at in (0, 400):
            with unchanged(model, ["running_var"]):
                attempt(CALLS["pooled"], model, data, None, Faulty(at))  # type: ignore[arg-type]


def test_seeds_beyond_those_of_numpy() -> None:
    evaluate(nets.DenseNet(layers=1), labelled(images()), seed=2**62)


def wrapped(model: nn.Module) -> None:
    model.forward = torch.autocast("cpu", dtype=torch.bfloat16)(model.forward)


def in_a_lambda(model: nn.Module) -> None:
    model.forward = lambda x, old=model.forward: old(x)


def in_a_partial(model: nn.Module) -> None:
    model.forward = functools.partial(type(model).forward, model)


def in_a_part(model: nn.Module) -> None:
    old = model[3].forward
    model[3].forward = lambda x: old(x)


def in_a_hook(model: nn.Module) -> None:
    norm = model[1]
    model[0].register_forward_hook(lambda module, args, output: norm(output))


@pytest.mark.parametrize("bind", [wrapped, in_a_lambda, in_a_partial, in_a_part, in_a_hook])
def test_functions_that_are_bound_to_the_model(bind: Callable[[nn.Module], None]) -> None:
    """A copy of the model still holds them, and they hold the model."""
    vectors = [torch.randn(16, 6) for _ in range(4)]
    layers = [nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Dropout(0.3), nn.Linear(6, 6), nn.BatchNorm1d(6)]
    plain = nn.Sequential(*layers)
    model = copy.deepcopy(plain)
    bind(model)
    expected = ckpt_tools.walk(plain, vectors[0])
    before = photograph.of_model(model)
    found = ckpt_tools.walk(model, vectors[0])
    assert photograph.differences(before, photograph.of_model(model)) == []
    assert [(one.name, one.reached, one.downstream_of) for one in found.batch_norms] == [
        (one.name, one.reached, one.downstream_of) for one in expected.batch_norms
    ]
    with unchanged(model, ("running_var",)):
        result = ckpt_tools.reestimate_bn(model, vectors)
    assert [layer.name for layer in result.rewritten] == ["4"]


def test_a_forward_that_runs_another_model_than_it_is_given() -> None:
    model = train_mode()
    with unchanged(model):
        ckpt_tools.walk(model, images()[0], forward=lambda _, batch: model(batch))


def test_functions_in_what_cannot_be_copied_stay() -> None:
    model = train_mode()
    model.held = {"lock": threading.Lock(), "forward": lambda x: model(x)}
    with unchanged(model):
        ckpt_tools.walk(model, images()[0])
