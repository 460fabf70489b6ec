"""How a model's signals are spread in training mode: Var(z) of every weight layer forwards, Var(δ) backwards.

Hendrycks & Gimpel 2016, Figure 1 and appendix A, for any model. A copy of the model runs under a dispatch mode, so that
functional calls, packed attention weights and reused layers are seen like modules: z is the output of an operation that
multiplies with a parameter, δ = ∂L/∂z what the backward multiplies with the same parameter.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ckpt_tools.errors import CkptToolsError, DataError, ModelError
from ckpt_tools.initialize.outcome import LayerSignal
from ckpt_tools.model.batch import Batch, to_device
from ckpt_tools.model.calling import Forward, call_model, device_of, force_eager, unwrap_model
from ckpt_tools.model.model_copy import RecordingMode, copy_model, set_mode
from ckpt_tools.model.preserving import preserve_models
from ckpt_tools.model.randomness import preserve_random_generators, seed_random_generators
from ckpt_tools.moments import Moments
from ckpt_tools.walker.contractions import contraction
from ckpt_tools.walker.weights import layer_name

_ERROR_SCALE = 0.01  # standard deviation of the error that is fed in at the output
_DRAWN = 16_000  # more than are shown: dropout and ReLU make most errors zero
_SHOWN = 2_000


def measure_signals(
    model: nn.Module, batches: Iterable[Batch], *, forward: Forward = call_model, seed: int = 0
) -> tuple[LayerSignal, ...]:
    """Variances of outputs z and error signals δ = ∂L/∂z of all weight layers, in order of execution.

    Training mode: dropout is on, BN layers use the statistics of the batch. ∂L/∂output is drawn from N(0, 0.01²), and
    ``error_variance`` is Var(δ)/0.01². Every element counts alike, whatever its batch, unit or position; a layer
    used several times, and the parts of a packed weight, are pooled.

    Args:
        model: any nn.Module; wrappers are looked through. It is not changed, nor is any global random generator.
        batches: a few; they are held in memory together.
        forward: how to run the model on a batch, ``forward(model, batch)``.
        seed: fixes the dropout masks and the error that is fed in.

    Returns:
        One ``LayerSignal`` for each parameter that a matrix product or a convolution multiplied with.

    Raises:
        DataError: there is no batch, or its type is unknown.
        ModelError: the model runs neither in training mode nor with only its leaf modules in training mode.
    """
    batches = list(batches)
    if not batches:
        raise DataError("no batch to measure signals on; expected at least one. Check the data.")
    model = unwrap_model(model)
    try:
        return _measured(model, batches, forward, seed, "training")
    except CkptToolsError:
        raise
    except Exception as error:  # noqa: BLE001 - detection models want targets when the outer module is training
        first = error
    try:
        return _measured(model, batches, forward, seed, "leaves")
    except CkptToolsError:
        raise
    except Exception as error:
        raise ModelError(
            f"{type(model).__name__}: forward and backward in training mode failed: {type(first).__name__}: {first}. "
            "Expected the model to run on the batches; check their shape (--input-size) and size (--batch-size)."
        ) from error


def _measured(
    model: nn.Module, batches: Sequence[Batch], forward: Forward, seed: int, mode: RecordingMode
) -> tuple[LayerSignal, ...]:
    device = device_of(model)
    with (
        preserve_models(model, forward),
        _isolated(seed),
        force_eager(),
        torch.inference_mode(False),
        torch.enable_grad(),
    ):
        twin = _trainable(model, mode)
        signals = _Signals(twin, torch.Generator().manual_seed(seed))
        noise = torch.Generator().manual_seed(seed)
        for batch in batches:
            given = pytree.tree_map_only(Tensor, _differentiable, to_device(batch, device))
            with signals:
                outputs = _differentiable_outputs(forward(twin, given))
            errors = [_ERROR_SCALE * torch.randn(output.shape, generator=noise).to(output) for output in outputs]
            with signals.backward():
                torch.autograd.backward(outputs, errors)
    return signals.layers()


@contextmanager
def _isolated(seed: int) -> Iterator[None]:
    """All global generators start at ``seed`` and come back as they were, as do the warning filters."""
    with warnings.catch_warnings(), preserve_random_generators():
        warnings.simplefilter("ignore")
        seed_random_generators(seed)
        yield


def _trainable(model: nn.Module, mode: RecordingMode) -> nn.Module:
    twin = copy_model(model, meta=False)
    set_mode(twin, mode)
    for module in twin.modules():
        if isinstance(module, _BatchNorm):
            module.training = True
    for parameter in twin.parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_()
            parameter.register_post_accumulate_grad_hook(_forget)
    return twin


def _forget(parameter: Tensor) -> None:
    parameter.grad = None  # gradients of weights are of no use here, and as large as the model


def _differentiable(tensor: Tensor) -> Tensor:
    """A copy that gradients reach, so that the first layer's δ is computed; not a leaf, so it may be overwritten."""
    if not tensor.is_floating_point():
        return tensor.clone()
    return tensor.detach().clone().requires_grad_().clone()


def _differentiable_outputs(tree: object) -> list[Tensor]:
    leaves = [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]
    return [leaf for leaf in leaves if leaf.is_floating_point() and leaf.requires_grad]


class _Signals(TorchDispatchMode):
    """Tallies z and δ of every parameter that a contraction multiplies with."""

    def __init__(self, model: nn.Module, generator: torch.Generator) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._names = {StorageWeakRef(tensor.untyped_storage()): name for name, tensor in model.named_parameters()}
        self._outputs: dict[str, _Tally] = {}
        self._errors: dict[str, _Tally] = {}
        self._generator = generator
        self._backward = False

    @contextmanager
    def backward(self) -> Iterator[None]:
        """The operations in this context are those of a backward."""
        self._backward = True
        try:
            with self:
                yield
        finally:
            self._backward = False

    def layers(self) -> tuple[LayerSignal, ...]:
        """What was seen so far, in order of execution."""
        return tuple(self._layer(name, outputs) for name, outputs in self._outputs.items())

    def _layer(self, name: str, outputs: _Tally) -> LayerSignal:
        errors = self._errors[name]
        return LayerSignal(
            name=layer_name(name),
            parameter=name,
            variance=outputs.variance(),
            error_variance=errors.variance() if errors.count else None,
            outputs=outputs.sample(),
            errors=errors.sample(nonzero=True),
        )

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> object:
        output = func(*args, **(kwargs or {}))
        if not self._backward:
            self._see_output(func, args, output)
        elif not torch.is_grad_enabled():  # with gradients on, a checkpointed segment runs forward again
            self._see_error(func, args)
        return output

    def _see_output(self, func: OpOverload, args: Sequence[Any], output: object) -> None:
        found = contraction(func)
        if found is None:
            return
        first, second = found.factors
        weights = (second,) if func is torch.ops.aten.convolution.default else (second, first)
        names = [name for weight in weights if (name := self._name(args[weight])) is not None]
        if names and isinstance(output, Tensor):
            self._errors.setdefault(names[0], _Tally(self._generator))
            self._outputs.setdefault(names[0], _Tally(self._generator)).add(output.detach())

    def _see_error(self, func: OpOverload, args: Sequence[Any]) -> None:
        if func is torch.ops.aten.convolution_backward.default:
            pairs = [(2, 0)]
        elif (found := contraction(func)) is not None:
            first, second = found.factors
            pairs = [(second, first), (first, second)]
        else:
            return
        for weight, error in pairs:
            name = self._name(args[weight])
            if name in self._errors:
                self._errors[name].add(args[error].detach() / _ERROR_SCALE)
                return

    def _name(self, tensor: Tensor) -> str | None:
        return self._names.get(StorageWeakRef(tensor.untyped_storage()))


class _Tally:
    """Pooled moments of all elements of the tensors that it is given, and a sample in which each is equally likely."""

    def __init__(self, generator: torch.Generator) -> None:
        self._generator = generator
        self._moments: Moments | None = None
        self._drawn = torch.empty(0, dtype=torch.float64)

    @property
    def count(self) -> int:
        """How many values there were."""
        return 0 if self._moments is None else self._moments.count

    def add(self, tensor: Tensor) -> None:
        """Count every element of a tensor of any shape and floating dtype."""
        values = tensor.to(torch.float64, copy=True, memory_format=torch.contiguous_format).flatten()
        if not len(values):
            return
        self._draw(values)
        mean = values.mean()
        values -= mean  # three passes in place are faster than torch.var_mean
        new = Moments(len(values), mean.cpu(), values.dot(values).cpu())
        self._moments = new if self._moments is None else self._moments.merge(new)

    def _draw(self, values: Tensor) -> None:
        total = self.count + len(values)
        if total <= _DRAWN:
            self._drawn = torch.cat([self._drawn, values.cpu()])
            return
        stay = torch.rand(len(self._drawn), generator=self._generator) < max(self.count, _DRAWN) / total
        kept = self._drawn[stay]
        picks = torch.randint(len(values), (_DRAWN - len(kept),), generator=self._generator)
        self._drawn = torch.cat([kept, values[picks.to(values.device)].cpu()])

    def variance(self) -> float:
        """M2/count; at least one value must have been added."""
        assert self._moments is not None
        return float(self._moments.variance(unbiased=False))

    def sample(self, *, nonzero: bool = False) -> tuple[float, ...]:
        """Up to 2,000 values drawn at random, zeros left out if asked for."""
        drawn = self._drawn[self._drawn != 0] if nonzero else self._drawn
        order = torch.randperm(len(drawn), generator=self._generator)
        return tuple(drawn[order[:_SHOWN]].tolist())
