"""``rewrite_init``: new weights for a fresh model, corrected for dropout and nonlinearities."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import get_args

import torch
from torch import Tensor, nn

from ckpt_tools.arguments import check_callable, check_seed
from ckpt_tools.contract import BackwardFactor, BackwardTerm, InitRule, Scheme
from ckpt_tools.errors import ModelError
from ckpt_tools.initialize.constants import Constants
from ckpt_tools.initialize.init_results import Factors, InitLayer, InitRewrite
from ckpt_tools.initialize.layer_factors import InitMethod, compute_factors
from ckpt_tools.initialize.propagated_rule import DrawnModel, measure_factors
from ckpt_tools.initialize.rule import check_choice
from ckpt_tools.initialize.scheme import fans, fill
from ckpt_tools.model.batch import Batch
from ckpt_tools.model.calling import Forward, call_model, unwrap_model
from ckpt_tools.model.overwriting import overwrite_tensors
from ckpt_tools.walker.downstream import record_training_forward
from ckpt_tools.walker.graph import Graph
from ckpt_tools.walker.weights import WeightUse, layer_name, reason_not_rewritten, weight_uses


def rewrite_init(
    model: nn.Module,
    example_input: Batch,
    *,
    scheme: Scheme = "hypersphere",
    rule: InitRule = "paper",
    backward_term: BackwardTerm = "auto",
    backward_factor: BackwardFactor = "paper",
    seed: int = 0,
    forward: Forward = call_model,
) -> InitRewrite:
    """Rewrite the weights of linear layers and convolutions in place, and set their biases to zero.

    W has fan-in vectors of norm one, divided by √(E[f(z^{l−1})²]/p_{l−1} + p_l·E[f'(z^l)²]). The
    backward term is there for linear layers only (Hendrycks & Gimpel 2016, section 2.2). f and p
    are read off one forward in training mode. Everything else (normalisation, embeddings, tokens,
    positional tables) keeps its values.

    Args:
        model: a fresh nn.Module; wrappers are looked through. Its train flags, buffers and hooks
            stay as they are.
        example_input: a batch as for ``walk``. Of its floating-point tensors only the shape matters.
        scheme: "hypersphere" or "orthonormal" fan-in vectors, "uniform" (section 4), or "normal".
        rule: "paper": every layer from its neighbours; "propagated": by the variance that the drawn
            weights give every layer's output, in one forward on N(0, 1) inputs with dropout on.
        backward_term: "auto" (linear layers under the paper's rule), "on" or "off".
        backward_factor: "paper": p·E[f'²]; "inverted": E[f'²]/p, what PyTorch's dropout does to the
            error signal.
        seed: fixes the new weights.
        forward: how to run the model on a batch.

    Raises:
        UsageError: an unknown method.
        ModelError: no weight layer, dropout that keeps nothing, weights without values, or a model
            that cannot be run. Nothing is changed then.
    """
    check_choice(scheme, "scheme", get_args(Scheme))
    check_choice(rule, "rule", get_args(InitRule))
    check_choice(backward_term, "backward_term", get_args(BackwardTerm))
    check_choice(backward_factor, "backward_factor", get_args(BackwardFactor))
    check_seed(seed)
    check_callable("forward", forward, "(model, batch)")
    model = unwrap_model(model)
    graph, uses = _record_weight_uses(model, example_input, forward)
    biases = _find_biases(model, uses)
    constants = Constants(graph, model, zeroed=[bias for bias in biases.values() if bias])
    parameters = dict(model.named_parameters(remove_duplicate=False))
    method = InitMethod(scheme, rule, backward_term, backward_factor)
    factors = compute_factors(graph, constants, uses, method)
    tensors = _new_tensors(model, uses, factors, biases, scheme, seed)
    if rule == "propagated":
        drawn = DrawnModel(model, tensors, factors)
        factors = measure_factors(drawn, graph, example_input, forward, seed)
        tensors = _new_tensors(model, uses, factors, biases, scheme, seed)
    overwrite_tensors([(parameters[name], value) for name, value in tensors.items()])
    layers = _rewritten_layers(model, uses, factors, biases) + _untouched_layers(graph, model, uses)
    return InitRewrite(tuple(layers), rule, scheme, backward_term, backward_factor, seed)


def _record_weight_uses(
    model: nn.Module, example_input: Batch, forward: Forward
) -> tuple[Graph, Sequence[WeightUse]]:
    parameters = dict(model.named_parameters())
    record = record_training_forward(model, example_input, forward)
    for site in record.sites.values():
        if site.rate is not None and site.rate >= 1:
            raise ModelError(
                f"{site.name}: expected a drop rate below 1, found {site.rate:g}, which lets "
                "nothing through. Lower it."
            )
    trainable = [name for name, parameter in parameters.items() if parameter.requires_grad]
    uses = weight_uses(record.graph, trainable)
    if not uses:
        raise ModelError(
            f"{type(model).__name__}: expected linear layers or convolutions to rewrite, "
            "found none in its forward. Check the architecture."
        )
    for use in uses:
        if parameters[use.parameter].is_meta:
            raise ModelError(
                f"{use.parameter}: expected values, found a tensor on the meta device. Build the "
                "model on a real one."
            )
    return record.graph, uses


def _find_biases(model: nn.Module, uses: Iterable[WeightUse]) -> dict[str, str]:
    """The bias that goes with each weight, by parameter; "" where there is none.

    It is the bias of the operation, or else the parameter of the same name with "bias" for
    "weight": a model may add its bias in an operation of its own.
    """
    parameters = model.named_parameters(remove_duplicate=False)
    trainable = {name for name, parameter in parameters if parameter.requires_grad}
    biases: dict[str, str] = {}
    for use in uses:
        namesake = re.sub(r"weight$", "bias", use.parameter)
        candidates = [biases.get(use.parameter, ""), use.bias]
        if namesake != use.parameter:
            candidates.append(namesake)
        biases[use.parameter] = next((name for name in candidates if name in trainable), "")
    return biases


def _new_tensors(
    model: nn.Module,
    uses: Iterable[WeightUse],
    factors: Mapping[str, Factors],
    biases: Mapping[str, str],
    scheme: Scheme,
    seed: int,
) -> dict[str, Tensor]:
    """New values of every weight, in float32 on the CPU, and of every bias.

    The parts of a packed weight (query, key and value of an attention) are drawn one by one.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    weights: dict[str, Tensor] = {}
    generators: dict[str, torch.Generator] = {}
    drawn_parts = set()
    for use in uses:
        name, view = use.parameter, use.view
        part = (name, view.numel, view.offset)
        if part in drawn_parts:
            continue
        drawn_parts.add(part)
        if name not in weights:
            generators[name] = _weight_generator(seed, name)
            old = parameters[name].detach()
            weights[name] = torch.empty_like(old, dtype=torch.float32, device="cpu").copy_(old)
        values = weights[name].as_strided(view.shape, view.stride, view.offset)
        fill(values, use.geometry, scheme, generators[name], divisor=factors[name].divisor)
    return {**weights, **{bias: torch.zeros_like(parameters[bias]) for bias in biases.values() if bias}}


def _weight_generator(seed: int, parameter: str) -> torch.Generator:
    # Each weight has a generator of its own, seeded by its name. So with another head the other
    # layers still get the same weights.
    digest = hashlib.sha256(f"{seed} {parameter}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def _rewritten_layers(
    model: nn.Module,
    uses: Sequence[WeightUse],
    factors: Mapping[str, Factors],
    biases: Mapping[str, str],
) -> list[InitLayer]:
    parameters = dict(model.named_parameters())
    layers: dict[str, InitLayer] = {}
    for use in uses:
        if use.parameter in layers:
            continue
        fan_in, fan_out = fans(use.view.shape, use.geometry)
        layers[use.parameter] = InitLayer(
            name=layer_name(use.parameter),
            parameter=use.parameter,
            kind=use.geometry.kind,
            shape=tuple(parameters[use.parameter].shape),
            rewritten=True,
            fan_in=fan_in,
            fan_out=fan_out,
            factors=factors[use.parameter],
            bias=biases[use.parameter],
        )
    return list(layers.values())


def _untouched_layers(graph: Graph, model: nn.Module, uses: Iterable[WeightUse]) -> list[InitLayer]:
    # Biases and gains have one dimension; the result does not list them.
    rewritten = {use.parameter for use in uses}
    return [
        InitLayer(
            layer_name(name),
            name,
            None,
            tuple(parameter.shape),
            False,
            reason_not_rewritten(graph, name, parameter),
        )
        for name, parameter in model.named_parameters()
        if parameter.ndim >= 2 and name not in rewritten
    ]
