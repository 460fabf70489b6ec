"""The propagated rule: the second moments that the drawn weights really give.

The paper's rule looks at the nearest neighbours of a layer. What it leaves out (means, pooling,
padding, residual sums) adds up over the depth, and so does chance: SiLU, GELU and their kin push
every variance that is off 1 further away, so that the scatter of 20 layers of 500 units ends in
variances of 6 to 19. This rule lets N(0, 1) inputs through the drawn weights once, with dropout on.
At every weight layer it measures the output's variance, and sets the divisor before it goes on.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ckpt_tools.errors import ModelError
from ckpt_tools.initialize.init_results import Factors
from ckpt_tools.initialize.layer_factors import MAX_USES, ZERO_INPUT
from ckpt_tools.model.batch import Batch, batch_size, repeat_samples, to_device, to_pytree
from ckpt_tools.model.calling import Forward, device_of, force_eager
from ckpt_tools.model.model_copy import RecordingMode, copy_model, set_mode
from ckpt_tools.model.overwriting import overwrite_tensors
from ckpt_tools.model.preserving import preserve_models
from ckpt_tools.model.randomness import preserve_random_generators, seed_random_generators
from ckpt_tools.walker.contractions import contraction
from ckpt_tools.walker.graph import Graph
from ckpt_tools.walker.weight_products import WeightNames

# In deep nets of SiLU or GELU a few samples carry most of the variance, so many are needed. The
# elements of all intermediate results together limit them: a second or two for every 2^28.
_MAX_SAMPLES, _MAX_ELEMENTS = 8192, 2**28
# The output of a head with few units may vary little by chance. It is not scaled up by more than
# the root of 1 / this share.
_LEAST_SHARE = 0.25


@dataclass(frozen=True)
class DrawnModel:
    """A model and what a rewrite is about to write into it.

    ``tensors`` has the new weights, divided by the divisors in ``factors``, and the biases, which
    are zero.
    """

    model: nn.Module
    tensors: Mapping[str, Tensor]
    factors: Mapping[str, Factors]


def measure_factors(
    drawn: DrawnModel, graph: Graph, example_input: Batch, forward: Forward, seed: int
) -> dict[str, Factors]:
    """The factors of every weight with E[f²] as the drawn weights give it.

    E[f²] / keep is Var(z) of the layer's output z, over samples, units and positions, if the
    layer's fan-in vectors had norm one. A layer that the forward does not show by itself, such as
    those inside a fused LSTM, and one that nothing reaches yet, keep the factors that they have.

    Args:
        drawn: the model is not changed.
        graph: the recorded forward; it tells how large a sample's intermediate results are.
        example_input: its floating-point tensors are replaced by N(0, 1), with more samples where
            the model lets them be repeated.
        forward: how to run the model on a batch.
        seed: fixes the inputs and the dropout masks.

    Raises:
        ModelError: the model cannot be run.
    """
    size = max(1, batch_size(example_input))
    elements = sum(math.prod(shape) for node in graph.nodes for shape in node.outputs)
    samples = max(size, min(_MAX_SAMPLES, size * _MAX_ELEMENTS // max(1, elements)))
    batches = list(_normal_batches(example_input, samples // size, seed))
    modes: list[RecordingMode] = ["training", "leaves"]
    first_error: Exception | None = None
    for mode, batch in itertools.product(modes, batches):
        try:
            return _measure(drawn, batch, forward, mode, seed)
        # A model may refuse more samples, other values, or targets that are missing in training
        # mode, with any exception.
        except Exception as error:  # noqa: BLE001
            first_error = first_error or error
    raise ModelError(
        f"{type(drawn.model).__name__}: expected a forward in training mode to run on N(0, 1) inputs, "
        f"found {type(first_error).__name__}: {first_error}. The rule 'paper' needs no such forward."
    ) from first_error


def _normal_batches(example_input: Batch, repeats: int, seed: int) -> Iterator[Batch]:
    """The batches to try: with more samples, with as many as given, and as it was given."""
    generator = torch.Generator().manual_seed(seed)

    def draw_like(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point() or tensor.layout is not torch.strided:
            return tensor
        return torch.randn(tensor.shape, generator=generator).to(tensor)

    repeated = repeat_samples(example_input, repeats)
    if repeated is not None:
        yield pytree.tree_map_only(Tensor, draw_like, repeated)
    yield pytree.tree_map_only(Tensor, draw_like, to_pytree(example_input))
    yield example_input


def _measure(
    drawn: DrawnModel, batch: Batch, forward: Forward, mode: RecordingMode, seed: int
) -> dict[str, Factors]:
    batch = to_device(batch, device_of(drawn.model))
    seconds = _sweep(drawn, batch, forward, mode, seed, {})
    # A weight that is used several times gets the mean of its first uses. What comes in between
    # was measured with a weight of another size, so a second sweep starts with that mean.
    shared = {
        name: _update_factors(drawn.factors[name], values)
        for name, values in seconds.items()
        if len(values) > 1
    }
    if shared:
        seconds = {**_sweep(drawn, batch, forward, mode, seed, shared), **{n: seconds[n] for n in shared}}
    return {name: _update_factors(factors, seconds.get(name, [])) for name, factors in drawn.factors.items()}


def _sweep(
    drawn: DrawnModel,
    batch: Batch,
    forward: Forward,
    mode: RecordingMode,
    seed: int,
    fixed: Mapping[str, Factors],
) -> dict[str, list[float]]:
    """Run a copy of the model once, and return the second moments of each weight's first uses."""
    seconds: dict[str, list[float]] = {}
    with preserve_models(drawn.model, forward), preserve_random_generators(), force_eager(), torch.no_grad():
        seed_random_generators(seed)
        twin = copy_model(drawn.model, meta=False)
        set_mode(twin, mode)
        for module in twin.modules():
            if isinstance(module, _BatchNorm):
                module.training = True
        parameters = dict(twin.named_parameters(remove_duplicate=False))
        overwrite_tensors([(parameters[name], value) for name, value in drawn.tensors.items()])
        for name, factors in fixed.items():
            parameters[name].mul_(drawn.factors[name].divisor / factors.divisor)
        with _Rescaler(twin, {**drawn.factors, **fixed}, fixed, seconds):
            forward(twin, batch)
    return seconds


class _Rescaler(TorchDispatchMode):
    """Sets the divisor of every weight at its first use, by the variance of its output there.

    ``seconds`` receives the second moments of each weight's first uses that something reaches.
    Weights in ``fixed`` keep their divisors.
    """

    def __init__(
        self,
        model: nn.Module,
        factors: Mapping[str, Factors],
        fixed: Mapping[str, Factors],
        seconds: dict[str, list[float]],
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._seconds = seconds
        self._names = WeightNames(model)
        self._parameters = dict(model.named_parameters())
        self._factors = dict(factors)
        self._fixed = fixed

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> object:
        product = self._names.find_product(func, args)
        if product is None or product[0] not in self._factors:
            return func(*args, **(kwargs or {}))
        name, position = product
        z = func(*_without_bias(func, args), **(kwargs or {}))
        factors = self._factors[name]
        second = _second_moment(z, args[position], factors.divisor)
        uses = self._seconds.setdefault(name, [])
        if math.isfinite(second) and second > ZERO_INPUT and len(uses) < MAX_USES:
            uses.append(second)
            if len(uses) == 1 and name not in self._fixed:
                self._factors[name] = _update_factors(factors, uses)
                scale = factors.divisor / self._factors[name].divisor
                self._parameters[name].mul_(scale)
                z *= scale
        return func(*args, **(kwargs or {})) if _has_bias(func, args) else z


def _second_moment(z: Tensor, x: Tensor, divisor: float) -> float:
    """Var(z) for fan-in vectors of norm one, rounded to four digits.

    Sums depend in their last digits on the machine; the new weights shall not.
    """
    variance = float(z.float().var(correction=0)) * divisor**2
    # Of a convolution most taps may lie on zero padding, so that z is small for a good reason.
    square = float(x.float().square().mean()) if x.dim() <= 2 else 0.0
    least = _LEAST_SHARE * square
    return float(f"{max(variance, least):.4g}") if math.isfinite(variance) else math.nan


def _update_factors(factors: Factors, seconds: Sequence[float]) -> Factors:
    if not seconds:
        return factors
    second = sum(seconds) / len(seconds)
    backward = factors.divisor**2 - factors.second_moment / factors.keep
    return replace(
        factors, second_moment=second * factors.keep, divisor=math.sqrt(second + max(backward, 0.0))
    )


def _has_bias(func: OpOverload, args: Sequence[Any]) -> bool:
    """Whether a product adds a bias that is not zero: one that is not trained, or a sum."""
    product = contraction(func)
    bias = args[product.bias] if product is not None and product.bias is not None else None
    return isinstance(bias, Tensor) and bool(bias.any())


def _without_bias(func: OpOverload, args: tuple[Any, ...]) -> tuple[Any, ...]:
    product = contraction(func)
    if product is None or product.bias is None or not _has_bias(func, args):
        return args
    position = product.bias
    return (*args[:position], torch.zeros_like(args[position]), *args[position + 1 :])
