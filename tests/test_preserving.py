"""Whatever a forward does to a model or to torch's settings, nothing of it remains: each kind of change, and mixtures.

``photograph`` compares, and shares no code with what puts things back.
"""

from __future__ import annotations

import random
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import photograph
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from test_restoring import Faulty, Injected
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from ckpt_tools.errors import ModelError
from ckpt_tools.model import torch_settings
from ckpt_tools.model.preserving import evaluating, preserved
from ckpt_tools.model.tensor_state import _copy_of

pytestmark = pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state")


torch.use_deterministic_algorithms(False)  # the first call makes torch import a part of itself


class Tagged(Tensor):
    """A tensor of a class of its own."""


class Attic(nn.Module):
    """Holds one of everything."""

    note = "of the class"

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
        self.weight, self.frozen = nn.Parameter(draw(4, 3)), nn.Parameter(draw(5), requires_grad=False)
        self.tied = self.weight
        self.zeros, self.nan = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.full((2,), torch.nan))
        self.expanded = nn.Parameter(torch.ones(1, 3).expand(4, 3))
        self.part = nn.Parameter(draw(9)[2:5])
        self.turned = nn.Parameter(draw(2, 3, 4, 5).to(memory_format=torch.channels_last))
        self.short, self.imaginary = (
            nn.Parameter(draw(3).bfloat16()),
            nn.Parameter(torch.ones(3, dtype=torch.complex64)),
        )
        self.whole = nn.Parameter(torch.arange(5), requires_grad=False)
        self.nowhere = nn.Parameter(torch.empty(3, device="meta"))
        self.tagged = draw(3).as_subclass(Tagged)
        flat = draw(10)
        self.register_buffer("front", flat[:6])
        self.register_buffer("back", flat[3:])
        self.register_buffer("counter", torch.zeros(3))
        self.register_buffer("empty", torch.empty(0))
        self.register_buffer("table", None, persistent=False)
        self.register_buffer("flags", torch.tensor([True, False]))
        self.register_buffer("sparse", torch.eye(3).to_sparse())
        self.register_buffer("rows", torch.eye(3).to_sparse_csr())
        with torch.inference_mode():
            self.register_buffer("inferred", torch.ones(3))
        self.held: list[Any] = [draw(2), {"built": False}]
        self.recent, self.seen, self.log = deque([draw(2)], maxlen=1), {1, 2}, [1]
        self.votes = np.zeros(3)
        self.draws, self.dice, self.numbers = torch.Generator(), random.Random(0), np.random.default_rng(0)
        self.norm, self.layer = nn.BatchNorm1d(3), nn.Linear(3, 3)
        self.hidden = [nn.BatchNorm1d(3)]
        self.forwards = 0
        self.weight.grad, self.weight.note = draw(4, 3), "a note"
        self.hook = self.layer.register_forward_hook(lambda *_: None)
        self.tensor_hook = self.weight.register_hook(lambda grad: grad)
        self.layer.eval()
        self.norm.running_var.fill_(2)


class Other(nn.Linear):
    """What a module may turn into."""


MUTATIONS: dict[str, Callable[[Attic], object]] = {}


def mutation(function: Callable[[Attic], object]) -> Callable[[Attic], object]:
    MUTATIONS[function.__name__] = function
    return function


def mutations(**functions: Callable[[Attic], object]) -> None:
    MUTATIONS.update(functions)


mutations(
    data_in_place=lambda a: a.weight.data.add_(1),
    data_replaced=lambda a: setattr(a.weight, "data", torch.zeros(7)),
    data_of_another_type=lambda a: setattr(a.weight, "data", a.weight.data.double()),
    parameter_in_place=lambda a: a.weight.mul_(2),
    parameter_refilled=lambda a: nn.init.normal_(a.turned),
    sign_of_zero=lambda a: a.zeros.data.neg_(),
    nan_overwritten=lambda a: a.nan.data.fill_(1),
    expanded=lambda a: a.expanded.data[:1].add_(1),
    part_of_a_storage=lambda a: a.part.data.add_(1),
    part_around_it=lambda a: a.part.set_(a.part.untyped_storage(), 0, (9,), (1,)),
    half=lambda a: a.short.data.neg_(),
    complex=lambda a: a.imaginary.data.mul_(1j),
    whole=lambda a: a.whole.data.add_(1),
    sparse=lambda a: a.sparse._values().add_(1),
    sparse_replaced=lambda a: setattr(a.sparse, "data", torch.ones(3, 3).to_sparse()),
    compressed=lambda a: a.rows.values().add_(1),
    subclass=lambda a: a.tagged.add_(1),
    overlapping=lambda a: (a.front.add_(1), a.back.mul_(2)),
    parameter_of_another_object=lambda a: setattr(a, "weight", nn.Parameter(torch.zeros(2))),
    parameter_added=lambda a: setattr(a, "extra", nn.Parameter(torch.zeros(2))),
    parameter_deleted=lambda a: delattr(a, "frozen"),
    note_on_a_parameter=lambda a: setattr(a.weight, "note", "another"),
    converted=lambda a: a.double(),
    requires_grad=lambda a: (a.weight.requires_grad_(False), a.frozen.requires_grad_(True)),
    gradient_cleared=lambda a: setattr(a.weight, "grad", None),
    gradients_cleared=lambda a: a.zero_grad(),
    gradients_zeroed=lambda a: a.zero_grad(set_to_none=False),
    gradient_in_place=lambda a: a.weight.grad.add_(1),
    gradient_made=lambda a: setattr(a.frozen, "grad", torch.ones(5)),
    resized=lambda a: a.empty.resize_(5).fill_(1),
    storage_enlarged=lambda a: a.empty.untyped_storage().resize_(64),
    shrunk=lambda a: a.counter.resize_(1).fill_(9),
    set_to_another=lambda a: a.counter.set_(torch.ones(7)),
    buffer_in_place=lambda a: a.counter.add_(1),
    buffer_replaced=lambda a: setattr(a, "counter", torch.cat([a.counter, a.counter])),
    buffer_of_another_type=lambda a: setattr(a, "counter", a.counter.double()),
    buffer_made=lambda a: setattr(a, "table", torch.ones(2)),
    buffer_gone=lambda a: setattr(a, "counter", None),
    buffer_deleted=lambda a: delattr(a, "counter"),
    buffer_added=lambda a: a.register_buffer("late", torch.ones(2), persistent=False),
    bools=lambda a: a.flags.logical_not_(),
    statistics=lambda a: a.norm.running_mean.add_(1),
    reset=lambda a: a.norm.reset_running_stats(),
    hook_added=lambda a: a.layer.register_forward_pre_hook(lambda *_: None),
    hook_removed=lambda a: a.hook.remove(),
    hook_of_state_dicts=lambda a: a.register_state_dict_post_hook(lambda *_: None),
    backward_hook=lambda a: a.layer.register_full_backward_hook(lambda *_: None),
    tensor_hook=lambda a: a.weight.register_hook(lambda grad: grad),
    tensor_hook_removed=lambda a: a.tensor_hook.remove(),
    first_tensor_hook=lambda a: a.zeros.register_hook(lambda grad: grad),
    late_tensor_hook=lambda a: a.weight.register_post_accumulate_grad_hook(lambda tensor: None),
    train_mode=lambda a: a.train(),
    eval_mode=lambda a: a.eval(),
    forward_replaced=lambda a: setattr(a.layer, "forward", lambda x: x),
    class_exchanged=lambda a: setattr(a.layer, "__class__", Other),
    parametrized=lambda a: parametrize.register_parametrization(a.layer, "weight", nn.Identity()),
    spectral_norm=lambda a: parametrizations.spectral_norm(a.layer),
    weight_norm=lambda a: parametrizations.weight_norm(a.layer),
    child_added=lambda a: a.add_module("more", nn.Identity()),
    child_deleted=lambda a: delattr(a, "norm"),
    children_reordered=lambda a: (
        a._modules.move_to_end("norm")
        if hasattr(a._modules, "move_to_end")
        else a._modules.update(norm=a._modules.pop("norm"))
    ),
    hidden_child=lambda a: a.hidden[0].running_var.add_(1),
    list_appended=lambda a: a.held.append(3),
    tensor_inside=lambda a: a.held[0].add_(1),
    dict_inside=lambda a: a.held[1].update(built=True),
    deque_appended=lambda a: a.recent.append(3),
    set_added=lambda a: a.seen.add(3),
    array=lambda a: np.add(a.votes, 1, out=a.votes),
    generator=lambda a: torch.rand(1, generator=a.draws),
    dice=lambda a: a.dice.random(),
    numbers=lambda a: a.numbers.random(),
    attribute_changed=lambda a: setattr(a, "forwards", 1),
    attribute_added=lambda a: setattr(a, "built", True),
    attribute_hidden=lambda a: setattr(a, "note", "of the object"),
    attributes_exchanged=lambda a: object.__setattr__(a, "__dict__", dict(vars(a), forwards=2)),
)


@mutation
def backward(attic: Attic) -> None:
    with torch.enable_grad():
        (attic.weight * 2).sum().backward()


@mutation
def buffer_joins_a_graph(attic: Attic) -> None:
    with torch.enable_grad():
        attic.counter.add_(attic.weight.sum())


@mutation
def inferred(attic: Attic) -> None:
    with torch.inference_mode():
        attic.inferred.add_(1)


OUTCOMES = [None, Injected, KeyboardInterrupt]


@contextmanager
def unchanged(model: nn.Module | None = None, allowed: Sequence[str] = ("\0",)) -> Iterator[None]:
    """All is afterwards as before, but for places with such an end."""
    before = photograph.of_model(model or nn.Module()), photograph.of_process()
    try:
        yield
    finally:
        changed = photograph.differences(before[0], photograph.of_model(model) if model else before[0])
        assert [place for place in changed if not place.endswith(tuple(allowed))] == []
        assert photograph.differences(before[1], photograph.of_process()) == []


def fail(error: type[BaseException] | None) -> None:
    if error is not None:
        raise error


@pytest.mark.parametrize("name", MUTATIONS)
def test_every_kind_of_change_is_undone(name: str) -> None:
    attic = Attic()
    before = photograph.of_model(attic)
    for error in OUTCOMES:
        with unchanged(attic), suppress(Injected, KeyboardInterrupt), preserved(attic), torch.no_grad():
            MUTATIONS[name](attic)
            assert photograph.differences(before, photograph.of_model(attic))  # or the oracle is blind
            fail(error)


@settings(max_examples=40)
@given(st.lists(st.sampled_from(sorted(MUTATIONS)), min_size=2, max_size=8), st.sampled_from(OUTCOMES))
def test_any_sequence_of_changes_is_undone(program: list[str], error: type[BaseException] | None) -> None:
    attic = Attic()
    with unchanged(attic), suppress(Injected, KeyboardInterrupt), preserved(attic), torch.no_grad():
        for name in program:
            with suppress(AttributeError, RuntimeError, TypeError, KeyError, ValueError):  # on what is gone by now
                MUTATIONS[name](attic)
        fail(error)


@pytest.mark.parametrize("error", [Injected, KeyboardInterrupt])
def test_an_error_while_things_are_put_back_keeps_nothing_from_it(error: type[BaseException]) -> None:
    attic = Attic()
    program = ["data_replaced", "overlapping", "gradients_zeroed", "resized", "converted", "requires_grad"]

    def run(mode: Faulty) -> None:
        with suppress(error), preserved(attic):
            for name in program:
                MUTATIONS[name](attic)
            mode.__enter__()
        mode.__exit__(None, None, None)

    run(Faulty())  # the first dispatch mode makes torch import a part of itself
    counted = Faulty()
    with unchanged(attic), torch.no_grad():
        run(counted)
        assert counted.seen > 20
        for at in range(1, counted.seen + 1):
            run(Faulty(at, error))


def test_what_cannot_be_put_back_is_said_and_the_rest_is_put_back() -> None:
    attic = Attic()
    base = torch.zeros(2, 3)
    attic.register_buffer("row", base[1])
    weight = attic.weight.detach().clone()

    def join_graph() -> None:  # of a view, which torch cannot take out of a graph again
        with preserved(attic), torch.enable_grad():
            attic.weight.data.zero_()
            attic.row.add_(attic.zeros)

    with pytest.raises(ModelError, match=r"Attic: expected to leave the model .* cannot be undone"):
        join_graph()
    assert torch.equal(attic.weight, weight)


def test_a_storage_that_has_grown_comes_back_but_for_its_address() -> None:
    attic = Attic()
    before = photograph.of_model(attic)
    with preserved(attic):
        attic.counter.resize_(1000).fill_(1)
    (place,) = photograph.differences(before, photograph.of_model(attic))
    assert place == "_buffers[counter]"
    assert torch.equal(attic.counter, torch.zeros(3))
    assert attic.counter.untyped_storage().nbytes() == 12


def test_nothing_is_written_where_nothing_has_changed() -> None:
    """A graph that saved a tensor can still be used, and memory that processes share is not dirtied."""
    attic = Attic()
    versions = [tensor._version for tensor in attic.parameters()]
    loss = (attic.weight * attic.weight).sum()
    for change in (lambda: None, lambda: attic.weight.data.add_(1)):
        with preserved(attic), torch.no_grad():
            change()
    loss.backward()
    assert [tensor._version for tensor in attic.parameters()] == versions


@pytest.mark.parametrize("ambient", [torch.inference_mode, torch.no_grad, lambda: torch.autocast("cpu")])
def test_within_modes_of_the_caller(ambient: Callable[[], Any]) -> None:
    attic = Attic()
    with ambient(), unchanged(attic), preserved(attic):
        for name in ("data_in_place", "data_replaced", "overlapping", "resized", "gradients_zeroed", "inferred"):
            MUTATIONS[name](attic)


@pytest.mark.filterwarnings("ignore:.*quantize.*", "ignore:.*jit.*")
def test_quantised_and_scripted_models() -> None:
    quantised = nn.Module()
    quantised.register_buffer("q", torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8))
    with unchanged(quantised), preserved(quantised):
        quantised.q.copy_(torch.quantize_per_tensor(torch.zeros(4), 0.1, 0, torch.qint8))
        quantised.q.data = torch.quantize_per_tensor(torch.ones(5), 0.5, 0, torch.qint8)
    scripted = torch.jit.script(nn.BatchNorm1d(3))
    before = {key: value.clone() for key, value in scripted.state_dict().items()}
    with evaluating(scripted), torch.no_grad():
        assert not scripted.training
        scripted.weight.data.add_(1)
        scripted.running_var.add_(1)
    assert scripted.training
    assert all(torch.equal(before[key], value) for key, value in scripted.state_dict().items())


def test_modules_that_functions_run_come_back() -> None:
    norms = [nn.BatchNorm1d(3) for _ in range(3)]
    x = torch.randn(4, 3)
    model = nn.Linear(3, 3)
    closing, default = norms[0], norms[1]
    model.register_forward_hook(lambda module, args, output: closing(output))
    model.register_forward_hook(lambda module, args, output, norm=default: norm(output))
    model.forward_again = norms[2].forward
    before = [photograph.of_model(norm) for norm in norms]
    with unchanged(model), preserved(model):
        model(x)
        model.forward_again(x)
    assert [photograph.of_model(norm) for norm in norms] == before


def test_a_log_keeps_what_a_forward_has_told() -> None:
    attic = Attic()
    with preserved(attic):
        attic.log.append(2)
        attic.log = []
    assert attic.log == [1, 2]


def test_flat_weights_of_an_rnn_come_back_with_its_weights() -> None:
    rnn = nn.LSTM(3, 4)
    with unchanged(rnn), preserved(rnn):
        rnn.weight_ih_l0 = nn.Parameter(torch.zeros(16, 3))
        assert rnn._flat_weights[0] is rnn.weight_ih_l0


class _Crowded:
    """A tensor on a device without room for a copy."""

    device = torch.device("cuda")

    def clone(self) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    def cpu(self) -> Tensor:
        return torch.ones(1)


def test_copies_go_to_main_memory_where_the_device_is_full() -> None:
    assert _copy_of(_Crowded()).device.type == "cpu"  # type: ignore[arg-type]


def _other_engine() -> str:
    quantized: Any = torch.backends.quantized
    return next(engine for engine in quantized.supported_engines if engine not in ("none", quantized.engine))


SETTINGS: dict[str, Callable[[], object]] = {
    "default dtype": lambda: torch.set_default_dtype(torch.float64),
    "default device": lambda: torch.set_default_device("meta"),
    "benchmark": lambda: setattr(torch.backends.cudnn, "benchmark", not torch.backends.cudnn.benchmark),
    "cudnn": lambda: setattr(torch.backends.cudnn, "enabled", False),
    "limit": lambda: setattr(torch.backends.cudnn, "benchmark_limit", 3),
    "deterministic": lambda: setattr(torch.backends.cudnn, "deterministic", True),
    "TF32 of convolutions": lambda: setattr(torch.backends.cudnn, "allow_tf32", False),
    "TF32 of products": lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", True),
    "precision": lambda: torch.set_float32_matmul_precision("medium"),
    "precision of all": lambda: setattr(torch.backends, "fp32_precision", "tf32"),
    "precision of cuDNN": lambda: setattr(torch.backends.cudnn, "fp32_precision", "ieee"),
    "precision of products": lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32"),
    "precision of oneDNN": lambda: setattr(torch.backends.mkldnn, "fp32_precision", "bf16"),
    "fp16": lambda: setattr(torch.backends.cuda.matmul, "allow_fp16_reduced_precision_reduction", False),
    "bf16": lambda: setattr(torch.backends.cuda.matmul, "allow_bf16_reduced_precision_reduction", False),
    "accumulation": lambda: setattr(torch.backends.cuda.matmul, "allow_fp16_accumulation", True),
    "algorithms": lambda: torch.use_deterministic_algorithms(True, warn_only=True),
    "uninitialised": lambda: setattr(torch.utils.deterministic, "fill_uninitialized_memory", False),
    "anomalies": lambda: torch.set_anomaly_enabled(True, False),
    "warnings": lambda: torch.set_warn_always(True),
    "sparse": lambda: torch.sparse.check_sparse_tensor_invariants.enable(),
    "attention": lambda: torch.backends.cuda.enable_flash_sdp(False),
    "attention by mathematics": lambda: torch.backends.cuda.enable_math_sdp(False),
    "fast path": lambda: torch.backends.mha.set_fastpath_enabled(False),
    "oneDNN": lambda: torch.backends.mkldnn.set_flags(_enabled=False),
    "engine": lambda: setattr(torch.backends.quantized, "engine", _other_engine()),
    "threads": lambda: torch.set_num_threads(2 if torch.get_num_threads() == 1 else 1),
    "gradients": lambda: torch.set_grad_enabled(not torch.is_grad_enabled()),
    "autocast": lambda: torch.set_autocast_enabled("cpu", True),
    "autocast's dtype": lambda: torch.set_autocast_dtype("cpu", torch.float16),
    "autocast's cache": lambda: torch.set_autocast_cache_enabled(False),
    "torch's generator": lambda: torch.rand(1),
    "numpy's generator": lambda: np.random.rand(),
    "Python's generator": lambda: random.random(),
}


@pytest.mark.filterwarnings("ignore:.*(TF32|tf32|Anomaly).*")
@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_comes_back(name: str) -> None:
    for error in OUTCOMES:
        before = photograph.of_process()
        with unchanged(), suppress(Injected, KeyboardInterrupt), preserved():
            SETTINGS[name]()
            assert photograph.differences(before, photograph.of_process())
            fail(error)


@pytest.mark.filterwarnings("ignore:.*(TF32|tf32|Anomaly).*")
@settings(max_examples=40)
@given(
    st.lists(st.sampled_from([name for name in SETTINGS if name != "gradients"]), max_size=3),
    st.lists(st.sampled_from(sorted(SETTINGS)), max_size=8),
)
def test_any_mixture_of_settings_comes_back(own: list[str], changes: list[str]) -> None:
    """Also where the caller's own settings are none of the defaults."""
    defaults = [
        torch_settings._read(torch_settings._OF_THE_PROCESS),
        torch_settings._read(torch_settings._OF_THE_THREAD),
    ]
    try:
        for name in own:
            SETTINGS[name]()
        assume(RuntimeError not in dict(photograph.of_process()["switches"]).values())  # names of TF32 contradict
        with unchanged(), preserved():
            for name in changes:
                SETTINGS[name]()
    finally:
        for values in defaults:
            torch_settings._restore(values)


def test_threads_that_take_turns_leave_the_settings_of_the_process() -> None:
    first, second = threading.Event(), threading.Event()

    def inner() -> None:
        with preserved():
            first.set()
            second.wait()

    with unchanged():
        thread = threading.Thread(target=inner)
        with preserved():
            torch.set_default_dtype(torch.float64)
            thread.start()
            first.wait()
        second.set()
        thread.join()
