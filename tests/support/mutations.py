"""Everything that a forward may change in a model or in torch's settings."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import photograph
import torch
from faulty_operations import Injected
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize


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
