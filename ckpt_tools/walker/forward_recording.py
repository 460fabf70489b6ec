"""One recorded forward: which dropout sites reach the input of which BN layer.

Dataflow is followed by storage under a dispatch mode. The output of an operation that draws random
numbers is tainted by the site that ran it. Every output, and every tensor written in place, carries
the taint of the inputs. Views share their storage and so their taint. Where a model decides by a
random number (``.item()`` of a tainted tensor, Python's ``random``), everything that the deciding
module does from then on is tainted.

The forward runs on a copy of the model, so the model itself is never touched: on meta tensors
first, and where that is impossible (data-dependent control flow) for real, on two samples. Rows of
a batch may depend on each other (the nodes of a graph), so the whole batch is tried at last.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from ckpt_tools.errors import CkptToolsError
from ckpt_tools.model.batch import Batch, batch_size, slice_samples, to_device, to_pytree
from ckpt_tools.model.calling import Forward, batch_norm_arguments, device_of, force_eager
from ckpt_tools.model.model_copy import RecordingMode, copy_model, set_mode
from ckpt_tools.model.model_state import ModelState
from ckpt_tools.model.preserving import evaluation_mode
from ckpt_tools.model.randomness import TorchRandomness, preserve_random_generators
from ckpt_tools.results import DeclaredDropout
from ckpt_tools.walker.declared_dropout import add_declared_dropout
from ckpt_tools.walker.dropout_sites import (
    PROBE_RATE,
    activate_dropout,
    draws_random_numbers,
    enable_dropout,
    ignores_input_values,
    is_custom_operator,
    parse_dropout_call,
)
from ckpt_tools.walker.graph import Recorder
from ckpt_tools.walker.recurrence import (
    CELL_OPERATORS,
    CellCalls,
    RecurrentCall,
    parse_recurrent_call,
)
from ckpt_tools.walker.taint import Feed, ForwardRecord, TaintTracker, find_tensors

_SAMPLES = 2  # of which a real forward is tried before the whole batch

# Operations that hand a value of a tensor to Python, which may decide by it.
_DECISIONS = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default}

# Functions that hand all values of a tensor to Python or numpy without any operation.
_EXPORTS = {Tensor.tolist, Tensor.numpy, Tensor.__array__, Tensor.__dlpack__}


class _OperationMode(TorchDispatchMode):
    """Sees every operation: records it, and hands the taint of its inputs on to its outputs."""

    def __init__(self, tracker: TaintTracker, *, meta: bool, track_memory: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.tracker, self.meta, self.track_memory = tracker, meta, track_memory

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> object:
        tracker, kwargs = self.tracker, kwargs or {}
        tracker.taint_by_host_randomness()
        inputs, written = find_tensors((args, kwargs)), _written_tensors(func, args, kwargs)
        taint = tracker.decision_taint()
        if not ignores_input_values(func):
            taint |= tracker.taint_of(inputs)
        # Before the operation runs: one in place would replace the contents that it has read.
        operands = tracker.recorder.to_operands((args, kwargs))
        if self.meta and any(tensor.is_meta for tensor in inputs):
            args, kwargs = _move_to_meta(args, kwargs, written)
        output, is_random = self._run(func, args, kwargs)
        # The operation that draws the numbers is the first that the site taints.
        if is_random:
            taint |= {tracker.add_site_of_operation(func, args, kwargs)}
        outputs = find_tensors(output)
        running = tracker.running[-1]
        tracker.recorder.add_operation(func, operands, outputs, written, running.name)
        tracker.add_taint([*outputs, *written], taint)
        if func in _DECISIONS and taint:
            running.decided_by |= taint
        if self.track_memory:
            tracker.track_memory(outputs)
        return output

    def _run(self, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[object, bool]:
        """Run an operation; return its output, and whether it has drawn random numbers."""
        if not is_custom_operator(func):
            return func(*args, **kwargs), draws_random_numbers(func, args, kwargs)
        if self.meta:
            raise RuntimeError(f"{func}: only a real run shows whether a custom operator is random")
        randomness = TorchRandomness()
        return func(*args, **kwargs), randomness.has_advanced()


class _FunctionMode(TorchFunctionMode):
    """Sees calls of functions such as F.dropout before they fall apart into operations."""

    def __init__(
        self,
        tracker: TaintTracker,
        layers: Mapping[int, str],
        *,
        run: bool,
        everywhere: bool,
        every_step: bool,
    ) -> None:
        super().__init__()
        self.cells = None if every_step else CellCalls()
        self.tracker, self.layers = tracker, layers
        self.run_inactive, self.everywhere = run, everywhere

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> object:
        kwargs = kwargs or {}
        if func in _EXPORTS:
            self.tracker.running[-1].decided_by |= self.tracker.taint_of(find_tensors((args, kwargs)))
        if func is F.batch_norm:
            self._record_layer_input(args, kwargs)
        if self.everywhere:
            args, kwargs = enable_dropout(func, args, kwargs)
        recurrent = parse_recurrent_call(func, args)
        if recurrent is not None:
            return self._run_first_steps(recurrent, func, args)
        if self.cells is not None and self.cells.is_repeated(func, args):
            return self._run_cell(func, args, kwargs)
        dropout = parse_dropout_call(func, args, kwargs)
        if dropout is None or not dropout.training:
            return func(*args, **kwargs)
        if dropout.rate == 0 and not self.run_inactive:
            # The site keeps its number, and so the next one in this module keeps its name.
            self.tracker.running[-1].sites += 1
            return func(*args, **kwargs)
        self.tracker.dropout_call = (dropout.op, dropout.rate)
        try:
            if 0 < dropout.rate < 1:
                return func(*args, **kwargs)
            # At rate 0 or 1 nothing random runs; any other rate shows what the site reaches.
            in_place = bool(kwargs.get("inplace", func.__name__.endswith("_")))
            return F.dropout(dropout.input, PROBE_RATE, True, in_place)
        finally:
            self.tracker.dropout_call = None

    def _run_first_steps(
        self, call: RecurrentCall, func: Callable[..., Any], args: tuple[Any, ...]
    ) -> tuple[Tensor, ...]:
        outputs = call.extend(func(*call.first_steps))
        if not outputs[0].is_meta:
            with _disable_current_modes():
                for output, value in zip(outputs, func(*args), strict=True):
                    output.copy_(value)
        return outputs

    def _run_cell(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> object:
        tracker, inputs = self.tracker, find_tensors((args, kwargs))
        operands = tracker.recorder.to_operands((args, kwargs))
        taint = tracker.decision_taint() | tracker.taint_of(inputs)
        with _disable_current_modes():
            if any(tensor.is_meta for tensor in inputs):
                output: object = pytree.tree_map(_empty_meta_like, args[1])  # of the shape of the state
            else:
                output = func(*args, **kwargs)
        outputs = find_tensors(output)
        name = tracker.running[-1].name
        tracker.recorder.add_operation(CELL_OPERATORS[func], operands, outputs, (), name)
        tracker.add_taint(outputs, taint)
        return output

    def _record_layer_input(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        arguments, tracker = batch_norm_arguments(args, kwargs), self.tracker
        name = self.layers.get(id(arguments["running_var"]))
        if name is not None:
            taint = tracker.taint_of([arguments["input"]]) | tracker.decision_taint()
            # A layer may run several times in one forward.
            inputs = tracker.record.inputs
            inputs[name] = inputs.get(name, frozenset()) | taint


class FailedForward(Exception):
    """No forward got through; ``failures`` has what was tried, and the error that came of it."""

    def __init__(self, failures: Sequence[tuple[Feed, Exception]]) -> None:
        super().__init__(str(failures[-1][1]))
        self.failures = failures


@dataclass(frozen=True)
class ForwardCall:
    """How to run a model once: an example batch, and ``forward(model, batch)``.

    ``state`` is that of the model and of all that ``forward`` may run. They have it back after
    every recorded forward. ``dropout`` is declared by the user; it is on in training mode. With
    ``every_step`` all operations of recurrent cells are recorded, not those of the first steps
    alone: an init rewrite follows the values through them.
    """

    batch: Batch
    forward: Forward
    state: ModelState
    dropout: tuple[DeclaredDropout, ...] = ()
    every_step: bool = False


@dataclass(frozen=True)
class InactiveSitePolicy:
    """What becomes of sites at rate zero.

    ``run``: they run at PROBE_RATE to show what they could reach; else they stay off.
    ``set_attributes``: rates among the attributes of modules are set, too, for sites that are
    hidden behind ``if self.drop_rate > 0``.
    """

    run: bool = False
    set_attributes: bool = False


def record_forward(
    model: nn.Module,
    call: ForwardCall,
    mode: RecordingMode,
    inactive_sites: InactiveSitePolicy = InactiveSitePolicy(),
    feeds: Sequence[Feed] = tuple(Feed),
) -> ForwardRecord:
    """Run a copy of the model once and record its forward.

    Code that is bound to the model may run it in place of its copy, which is why its state has to
    be known.

    Args:
        model: any nn.Module without a wrapper.
        call: how to run it.
        mode: "training" (dropout on, BN layers in evaluation mode), "leaves" (training mode for
            modules without children only: detection models want targets when the outer module is
            training; the dropout functions that they call are on all the same), or "evaluation".
        inactive_sites: what becomes of sites at rate zero.

        feeds: what to run it on, in this order, until a forward gets through.

    Raises FailedForward if none gets through.
    """
    failures: list[tuple[Feed, Exception]] = []
    # In inference mode torch takes operations less far apart.
    with torch.inference_mode(False):
        for feed in feeds:
            if feed is Feed.WHOLE_BATCH and batch_size(call.batch) <= _SAMPLES:
                continue
            try:
                fed_call = replace(call, batch=_take(call.batch, feed, device_of(model)))
                return _run(model, fed_call, mode, inactive_sites, feed)
            except CkptToolsError:
                raise
            except Exception as error:  # noqa: BLE001 - then another feed is needed
                # A traceback would keep the tensors of the forward alive.
                failures.append((feed, error.with_traceback(None)))
    raise FailedForward(failures)


def _take(batch: Batch, feed: Feed, device: torch.device) -> Batch:
    if feed is Feed.META:
        return to_device(batch, "meta")
    return to_device(slice_samples(batch, 0, _SAMPLES) if feed is Feed.TWO_SAMPLES else batch, device)


def _run(
    model: nn.Module,
    call: ForwardCall,
    mode: RecordingMode,
    inactive_sites: InactiveSitePolicy,
    feed: Feed,
) -> ForwardRecord:
    meta = feed is Feed.META
    twin = copy_model(model, meta=meta)
    if inactive_sites.set_attributes:
        activate_dropout(twin)
    layers = set_mode(twin, mode)
    if mode != "evaluation":
        add_declared_dropout(twin, call.dropout)
    recorder = Recorder(twin, find_tensors(to_pytree(call.batch)))
    record = ForwardRecord(feed, batch_size(call.batch), recorder.graph)
    tracker = TaintTracker(twin, record, recorder, training=mode != "evaluation")
    with ExitStack() as stack:
        # Comparing takes a quarter of a ResNet-18's recorded forward, so it is left out where
        # nothing can have changed.
        stack.callback(lambda: call.state.put_back() if tracker.foreign_module_ran else None)
        stack.enter_context(evaluation_mode(model))
        stack.enter_context(warnings.catch_warnings(action="ignore"))
        stack.enter_context(preserve_random_generators())
        stack.enter_context(torch.no_grad())
        stack.enter_context(force_eager())
        # Hooks for all modules also see those outside the copy; always_call: also when one raises.
        stack.callback(register_module_forward_pre_hook(tracker.enter_module).remove)
        after = register_module_forward_hook(tracker.leave_module, always_call=True)
        stack.callback(after.remove)
        functions = _FunctionMode(
            tracker,
            layers,
            run=inactive_sites.run,
            everywhere=mode == "leaves",
            every_step=call.every_step,
        )
        stack.enter_context(functions)
        track_memory = mode == "evaluation"
        stack.enter_context(_OperationMode(tracker, meta=meta, track_memory=track_memory))
        call.forward(twin, call.batch)
    return record


def _empty_meta_like(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, device="meta")


def _written_tensors(func: OpOverload, args: Sequence[object], kwargs: Mapping[str, object]) -> list[Tensor]:
    """Return the arguments that an operation writes to, as its schema says."""
    written = []
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            written += find_tensors(value)
    return written


def _move_to_meta(
    args: tuple[Any, ...], kwargs: dict[str, Any], written: Sequence[Tensor]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Move an operation's arguments to meta: the forward has made constants on the CPU.

    Raises RuntimeError where the operation would write to a real tensor: its values would be lost.
    """
    if any(not tensor.is_meta for tensor in written):
        raise RuntimeError("a meta tensor is written into a real one")
    converted: tuple[tuple[Any, ...], dict[str, Any]] = pytree.tree_map_only(
        Tensor, lambda tensor: tensor.to("meta"), (args, kwargs)
    )
    return converted
