"""One recorded forward: which dropout sites reach the input of which BN layer.

Dataflow is followed by storage under a dispatch mode. The output of an operation that draws random numbers is
tainted by the site that ran it; every output and every tensor written in place carries the taint of the
inputs; views share their storage and so their taint. Where a model decides by a random number (``.item()`` of a
tainted tensor, Python's ``random``), everything the deciding module does from then on is tainted.

The forward runs on a copy of the model, so the model itself is never touched: on meta tensors first, and where
that is impossible (data-dependent control flow) for real, on two samples.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ckpt_tools.errors import CkptToolsError
from ckpt_tools.model.batch import Batch, slice_samples, to_device
from ckpt_tools.model.calling import Forward, batch_norm_arguments, device_of, force_eager
from ckpt_tools.model.model_copy import RecordingMode, copy_model, set_mode
from ckpt_tools.model.model_state import ModelState
from ckpt_tools.model.preserving import evaluation_mode
from ckpt_tools.model.randomness import preserve_random_generators
from ckpt_tools.results import DropoutSite
from ckpt_tools.walker.dropout_sites import (
    PROBE_RATE,
    HostRandomness,
    activate_dropout,
    bernoulli_drop_rate,
    draws_random_numbers,
    ignores_input_values,
    module_drop_rate,
    parse_dropout_call,
)
from ckpt_tools.walker.graph import Graph, Recorder

_DECISIONS = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default}


@dataclass
class ForwardRecord:
    """What one forward showed. ``inputs``: BN layer → sites that reach its input, in order of execution."""

    device: str
    graph: Graph
    inputs: dict[str, frozenset[str]] = field(default_factory=dict)
    sites: dict[str, DropoutSite] = field(default_factory=dict)
    called: set[str] = field(default_factory=set)  # BN modules that ran at all
    peak_bytes: int = 0


@dataclass
class _Frame:
    """A module whose forward is running. ``decided_by``: sites whose random numbers chose its path."""

    name: str
    module: nn.Module | None
    sites: int = 0
    decided_by: frozenset[str] = frozenset()


class _Tape:
    """The state that the two modes and the module hooks share during one forward."""

    def __init__(self, model: nn.Module, record: ForwardRecord, recorder: Recorder, *, training: bool) -> None:
        self.record, self.recorder, self.training = record, recorder, training
        self.names = {id(module): name for name, module in model.named_modules()}
        self.frames = [_Frame("", model)]
        self.declared: tuple[str, float] | None = None  # op and rate of the dropout call under way
        self.host = HostRandomness()
        self.others_ran = False  # modules that are not the copy's
        self._taint: dict[StorageWeakRef, frozenset[str]] = {}
        self._sizes: dict[StorageWeakRef, int] = {}

    def taint_of(self, tensors: Sequence[Tensor]) -> frozenset[str]:
        found: frozenset[str] = frozenset()
        for tensor in tensors:
            found |= self._taint.get(StorageWeakRef(tensor.untyped_storage()), frozenset())
        return found

    def add_taint(self, tensors: Sequence[Tensor], taint: frozenset[str]) -> None:
        for tensor in tensors:
            key = StorageWeakRef(tensor.untyped_storage())
            if taint:
                self._taint[key] = self._taint.get(key, frozenset()) | taint

    def track_memory(self, tensors: Sequence[Tensor]) -> None:
        """Keep account of the bytes alive after an operation."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self._sizes[StorageWeakRef(storage)] = storage.nbytes()
        self._sizes = {key: size for key, size in self._sizes.items() if not key.expired()}
        self.record.peak_bytes = max(self.record.peak_bytes, sum(self._sizes.values()))

    def decision_taint(self) -> frozenset[str]:
        return frozenset().union(*(frame.decided_by for frame in self.frames))

    def add_site(self, op: str, rate: float | None) -> str:
        frame = self.frames[-1]
        frame.sites += 1
        place = frame.name or "(root)"
        name = place if frame.sites == 1 else f"{place}:{frame.sites}"
        self.record.sites.setdefault(name, DropoutSite(name, op, rate))
        return name

    def add_site_of_operation(self, func: OpOverload, args: Sequence[object]) -> str:
        if self.declared is not None:
            return self.add_site(*self.declared)
        module = self.frames[-1].module
        is_noise_module = module is not None and not module._modules and not module._parameters
        op = type(module).__name__ if is_noise_module else func._schema.name.replace("::", ".")
        rate = module_drop_rate(module)
        return self.add_site(op, bernoulli_drop_rate(func, args) if rate is None else rate)

    def taint_by_host_randomness(self) -> None:
        """A draw that no operation shows taints whatever the running module does next."""
        if self.training and self.host.has_advanced():
            frame = self.frames[-1]
            frame.decided_by |= {self.add_site("random", module_drop_rate(frame.module))}

    def enter_module(self, module: nn.Module, args: object) -> None:
        self.taint_by_host_randomness()
        self.others_ran |= id(module) not in self.names
        name = self.names.get(id(module), self.frames[-1].name)
        self.frames.append(_Frame(name, module))
        if isinstance(module, _BatchNorm):
            self.record.called.add(name)

    def leave_module(self, module: nn.Module, args: object, output: object) -> None:
        self.taint_by_host_randomness()
        frame = self.frames.pop()
        if frame.decided_by:
            self.add_taint(_tensors(output), frame.decided_by)


class _Dataflow(TorchDispatchMode):
    def __init__(self, tape: _Tape, *, meta: bool, weigh: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.tape, self.meta, self.track_memory = tape, meta, weigh

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> object:
        tape, kwargs = self.tape, kwargs or {}
        tape.taint_by_host_randomness()
        read, written = _tensors((args, kwargs)), _written_tensors(func, args, kwargs)
        taint = tape.decision_taint()
        if not ignores_input_values(func):
            taint |= tape.taint_of(read)
        operands = tape.recorder.to_operands((args, kwargs))
        if self.meta and any(tensor.is_meta for tensor in read):
            args, kwargs = _all_meta(args, kwargs, written)
        output = func(*args, **kwargs)
        if draws_random_numbers(func, args, kwargs):
            taint |= {tape.add_site_of_operation(func, args)}
        made = _tensors(output)
        tape.recorder.add_operation(func, operands, made, written, tape.frames[-1].name)
        tape.add_taint([*made, *written], taint)
        if func in _DECISIONS and taint:
            tape.frames[-1].decided_by |= taint
        if self.track_memory:
            tape.track_memory(made)
        return output


class _Calls(TorchFunctionMode):
    """Sees calls of the functional API before they fall apart into operations."""

    def __init__(self, tape: _Tape, layers: Mapping[int, str], *, alive: bool) -> None:
        super().__init__()
        self.tape, self.layers, self.alive = tape, layers, alive

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> object:
        kwargs = kwargs or {}
        if func is F.batch_norm:
            self._reach(args, kwargs)
        drop = parse_dropout_call(func, args, kwargs)
        if drop is None or not drop.training:
            return func(*args, **kwargs)
        if drop.rate == 0 and not self.alive:
            self.tape.frames[-1].sites += 1  # it keeps its number, and so the next site its name
            return func(*args, **kwargs)
        self.tape.declared = (drop.op, drop.rate)
        try:
            if 0 < drop.rate < 1:
                return func(*args, **kwargs)
            # At rate 0 or 1 nothing random runs; any other rate shows what the site reaches.
            return F.dropout(drop.input, PROBE_RATE, True, bool(kwargs.get("inplace", func.__name__.endswith("_"))))
        finally:
            self.tape.declared = None

    def _reach(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = batch_norm_arguments(args, kwargs)
        name = self.layers.get(id(given["running_var"]))
        if name is not None:
            inputs = self.tape.record.inputs
            taint = self.tape.taint_of([given["input"]]) | self.tape.decision_taint()
            inputs[name] = inputs.get(name, frozenset()) | taint


@dataclass(frozen=True)
class InactiveSitePolicy:
    """What becomes of sites at rate zero: left off, or run at ALIVE to see what they could reach.

    ``attributes``: also set attributes of modules, for sites hidden behind ``if self.drop_rate > 0``.
    """

    alive: bool = False
    attributes: bool = False


def record_forward(
    model: nn.Module,
    batch: Batch,
    forward: Forward,
    mode: RecordingMode,
    state: ModelState,
    rates: InactiveSitePolicy = InactiveSitePolicy(),
) -> ForwardRecord:
    """Run ``forward(model, batch)`` once on a copy and record it.

    mode: "training" (dropout on, BN layers in evaluation mode), "leaves" (training mode for modules without
        children only: detection models want targets when the outer module is training), or "evaluation".
    Code that is bound to the model may run it in place of its copy: afterwards it has its ``state`` back.
    Raises whatever the model raises when neither a meta nor a real forward gets through.
    """
    with torch.inference_mode(False):  # in that mode torch takes operations less far apart
        try:
            return _run(model, to_device(batch, "meta"), forward, mode, state, rates, meta=True)
        except CkptToolsError:
            raise
        except Exception:  # noqa: BLE001 - any failure on meta tensors only means that a real forward is needed
            few = to_device(slice_samples(batch, 0, 2), device_of(model))
            return _run(model, few, forward, mode, state, rates, meta=False)


def _run(
    model: nn.Module,
    batch: Batch,
    forward: Forward,
    mode: RecordingMode,
    state: ModelState,
    rates: InactiveSitePolicy,
    *,
    meta: bool,
) -> ForwardRecord:
    twin = copy_model(model, meta=meta)
    if rates.attributes:
        activate_dropout(twin)
    layers = set_mode(twin, mode)
    recorder = Recorder(twin, _tensors(dict(batch) if isinstance(batch, Mapping) else batch))
    result = ForwardRecord("meta" if meta else "cpu", recorder.graph)
    tape = _Tape(twin, result, recorder, training=mode != "evaluation")
    with ExitStack() as stack:
        # Comparing takes a quarter of a ResNet-18's recorded forward, so it is left out where nothing can have changed.
        stack.callback(lambda: state.put_back() if tape.others_ran else None)
        stack.enter_context(evaluation_mode(model))
        stack.enter_context(_quiet())
        stack.enter_context(torch.no_grad())
        stack.enter_context(force_eager())
        stack.callback(register_module_forward_pre_hook(tape.enter_module).remove)
        stack.callback(register_module_forward_hook(tape.leave_module, always_call=True).remove)
        stack.enter_context(_Calls(tape, layers, alive=rates.alive))
        stack.enter_context(_Dataflow(tape, meta=meta, weigh=mode == "evaluation"))
        forward(twin, batch)
    return result


@contextmanager
def _quiet() -> Iterator[None]:
    """Random generators and warning filters come back as they were."""
    with warnings.catch_warnings(), preserve_random_generators():
        warnings.simplefilter("ignore")
        yield


def _tensors(tree: object) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def _written_tensors(func: OpOverload, args: Sequence[object], kwargs: Mapping[str, object]) -> list[Tensor]:
    written = []
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            written += _tensors(value)
    return written


def _all_meta(
    args: tuple[Any, ...], kwargs: dict[str, Any], written: Sequence[Tensor]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Constants that a forward made on the CPU join the meta tensors they are combined with."""
    if any(not tensor.is_meta for tensor in written):
        raise RuntimeError("a meta tensor is written into a real one")
    converted: tuple[tuple[Any, ...], dict[str, Any]] = pytree.tree_map_only(
        Tensor, lambda tensor: tensor.to("meta"), (args, kwargs)
    )
    return converted
