"""Measure how a model's signals are spread in training mode, layer by layer.

Var(z) of every weight layer forwards and Var(δ) backwards, as in Hendrycks & Gimpel 2016, Figure 1
and appendix A, for any model. A copy of the model runs under a dispatch mode, so that functional
calls, packed attention weights and reused layers are seen like modules. z is the output of an
operation that multiplies with a parameter; δ = ∂L/∂z is what the backward pass multiplies with the
same parameter.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ckpt_tools.arguments import advise
from ckpt_tools.errors import CkptToolsError, DataError, ModelError
from ckpt_tools.initialize.init_results import LayerSignal
from ckpt_tools.model.batch import Batch, to_device
from ckpt_tools.model.calling import Forward, call_model, device_of, force_eager, unwrap_model
from ckpt_tools.model.model_copy import RecordingMode, copy_model, set_mode
from ckpt_tools.model.preserving import preserve_models
from ckpt_tools.model.randomness import preserve_random_generators, seed_random_generators
from ckpt_tools.moments import Moments
from ckpt_tools.walker.weight_products import WeightNames, factor_roles
from ckpt_tools.walker.weights import layer_name

_ERROR_SCALE = 0.01  # standard deviation of the error that is fed in at the output
# More values are kept than are shown, because dropout and ReLU make most errors zero, and zeros are
# left out of the picture.
_RESERVOIR_SIZE = 16_000
_SAMPLE_SIZE = 2_000


def measure_signals(
    model: nn.Module, batches: Iterable[Batch], *, forward: Forward = call_model, seed: int = 0
) -> tuple[LayerSignal, ...]:
    """Variances of outputs z and error signals δ = ∂L/∂z of all weight layers, in execution order.

    Training mode: dropout is on, BN layers use the statistics of the batch. ∂L/∂output is drawn
    from N(0, 0.01²), and ``error_variance`` is Var(δ)/0.01². Every element counts alike, whatever
    its batch, unit or position; a layer used several times, and the parts of a packed weight, are
    pooled.

    Args:
        model: any nn.Module; wrappers are looked through. It is not changed, nor is any global
            random generator.
        batches: a few; they are held in memory together.
        forward: how to run the model on a batch, ``forward(model, batch)``.
        seed: fixes the dropout masks and the error that is fed in.

    Returns:
        One ``LayerSignal`` for each parameter that a matrix product or a convolution multiplied
        with.

    Raises:
        DataError: there is no batch, or its type is unknown.
        ModelError: the model runs neither in training mode nor with only its leaf modules in
            training mode.
    """
    batches = list(batches)
    if not batches:
        raise DataError("no batch to measure signals on; expected at least one. Check the data.")
    model = unwrap_model(model)
    try:
        return _measure(model, batches, forward, seed, "training")
    except CkptToolsError:
        raise
    # Detection models want targets when the outer module is in training mode, so a second attempt
    # puts only the leaf modules into it.
    except Exception as error:  # noqa: BLE001
        first_error = error
    try:
        return _measure(model, batches, forward, seed, "leaves")
    except CkptToolsError:
        raise
    except Exception as error:
        raise ModelError(
            f"{type(model).__name__}: forward and backward in training mode failed: "
            f"{type(first_error).__name__}: {first_error}. Expected the model to run on the "
            f"batches; check their shape and size{advise(' (--input-size, --batch-size)', '')}."
        ) from error


def _measure(
    model: nn.Module, batches: Sequence[Batch], forward: Forward, seed: int, mode: RecordingMode
) -> tuple[LayerSignal, ...]:
    device = device_of(model)
    with (
        preserve_models(model, forward),
        _isolate_globals(seed),
        force_eager(),
        torch.inference_mode(False),
        torch.enable_grad(),
    ):
        twin = _make_trainable_copy(model, mode)
        recorder = _SignalRecorder(twin, torch.Generator().manual_seed(seed))
        generator = torch.Generator().manual_seed(seed)
        for batch in batches:
            inputs = pytree.tree_map_only(Tensor, _to_differentiable, to_device(batch, device))
            with recorder:
                outputs = _differentiable_outputs(forward(twin, inputs))
            errors = [
                _ERROR_SCALE * torch.randn(output.shape, generator=generator).to(output) for output in outputs
            ]
            with recorder.backward_pass():
                torch.autograd.backward(outputs, errors)
    return recorder.layers()


@contextmanager
def _isolate_globals(seed: int) -> Iterator[None]:
    with warnings.catch_warnings(), preserve_random_generators():
        warnings.simplefilter("ignore")
        seed_random_generators(seed)
        yield


def _make_trainable_copy(model: nn.Module, mode: RecordingMode) -> nn.Module:
    twin = copy_model(model, meta=False)
    set_mode(twin, mode)
    for module in twin.modules():
        if isinstance(module, _BatchNorm):
            module.training = True
    for parameter in twin.parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_()
            parameter.register_post_accumulate_grad_hook(_discard_gradient)
    return twin


def _discard_gradient(parameter: Tensor) -> None:
    # The gradients of weights are of no use here, and as large as the model.
    parameter.grad = None


def _to_differentiable(tensor: Tensor) -> Tensor:
    # Gradients must reach the inputs, or else autograd leaves out the first layer's δ.
    if not tensor.is_floating_point():
        return tensor.clone()
    # The second copy is no leaf of the autograd graph, so the model may overwrite it.
    return tensor.detach().clone().requires_grad_().clone()


def _differentiable_outputs(tree: object) -> list[Tensor]:
    # A model may also return indices, masks or numbers, which no error reaches.
    leaves = [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]
    return [leaf for leaf in leaves if leaf.is_floating_point() and leaf.requires_grad]


class _SignalRecorder(TorchDispatchMode):
    """Collects z and δ of every parameter that a contraction multiplies with."""

    def __init__(self, model: nn.Module, generator: torch.Generator) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._weights = WeightNames(model)
        self._outputs: dict[str, _PooledValues] = {}
        self._errors: dict[str, _PooledValues] = {}
        self._generator = generator
        self._in_backward_pass = False

    @contextmanager
    def backward_pass(self) -> Iterator[None]:
        """Record the operations within this context as those of a backward pass.

        The same operations mean something else there: a weight is multiplied with δ.
        """
        self._in_backward_pass = True
        try:
            with self:
                yield
        finally:
            self._in_backward_pass = False

    def layers(self) -> tuple[LayerSignal, ...]:
        """The signals recorded so far, in order of execution."""
        return tuple(self._layer(name, outputs) for name, outputs in self._outputs.items())

    def _layer(self, name: str, outputs: _PooledValues) -> LayerSignal:
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
        if not self._in_backward_pass:
            self._record_output(func, args, output)
        # With gradients on, a checkpointed segment runs its forward again within the backward pass.
        elif not torch.is_grad_enabled():
            self._record_error(func, args)
        return output

    def _record_output(self, func: OpOverload, args: Sequence[Any], output: object) -> None:
        product = self._weights.find_product(func, args)
        if product is not None and isinstance(output, Tensor):
            name, _ = product
            self._errors.setdefault(name, _PooledValues(self._generator))
            self._outputs.setdefault(name, _PooledValues(self._generator)).add(output.detach())

    def _record_error(self, func: OpOverload, args: Sequence[Any]) -> None:
        # Pairs of positions: that of a weight, and that of the error it would be multiplied with.
        pairs = list(factor_roles(func))
        if func is torch.ops.aten.convolution_backward.default:
            pairs = [(2, 0)]
        for weight, error in pairs:
            name = self._weights.find(args[weight])
            if name in self._errors:
                self._errors[name].add(args[error].detach() / _ERROR_SCALE)
                return


class _PooledValues:
    """The pooled moments of tensors' elements, and a sample in which each is equally likely."""

    def __init__(self, generator: torch.Generator) -> None:
        self._generator = generator
        self._moments: Moments | None = None
        self._reservoir = torch.empty(0, dtype=torch.float64)

    @property
    def count(self) -> int:
        """The number of values so far."""
        return 0 if self._moments is None else self._moments.count

    def add(self, tensor: Tensor) -> None:
        """Add every element of a tensor of any shape and floating dtype."""
        values = tensor.to(torch.float64, copy=True, memory_format=torch.contiguous_format)
        values = values.flatten()
        if not len(values):
            return
        self._fill_reservoir(values)
        mean = values.mean()
        values -= mean  # three passes in place are faster than torch.var_mean
        moments = Moments(len(values), mean.cpu(), values.dot(values).cpu())
        self._moments = moments if self._moments is None else self._moments.merge(moments)

    def _fill_reservoir(self, values: Tensor) -> None:
        total = self.count + len(values)
        if total <= _RESERVOIR_SIZE:
            self._reservoir = torch.cat([self._reservoir, values.cpu()])
            return
        # Each earlier value stays with the probability that makes it as likely as each new one.
        keep_probability = max(self.count, _RESERVOIR_SIZE) / total
        draws = torch.rand(len(self._reservoir), generator=self._generator)
        survivors = self._reservoir[draws < keep_probability]
        free = _RESERVOIR_SIZE - len(survivors)
        picks = torch.randint(len(values), (free,), generator=self._generator)
        self._reservoir = torch.cat([survivors, values[picks.to(values.device)].cpu()])

    def variance(self) -> float:
        """M2/count; at least one value must have been added."""
        assert self._moments is not None
        return float(self._moments.variance(unbiased=False))

    def sample(self, *, nonzero: bool = False) -> tuple[float, ...]:
        """Up to 2,000 values drawn at random, without zeros if ``nonzero``."""
        values = self._reservoir[self._reservoir != 0] if nonzero else self._reservoir
        order = torch.randperm(len(values), generator=self._generator)
        return tuple(values[order[:_SAMPLE_SIZE]].tolist())
