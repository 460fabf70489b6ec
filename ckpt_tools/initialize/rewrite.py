"""``rewrite_init``: new weights for a fresh model, corrected for dropout and for the nonlinearity at each layer."""

from __future__ import annotations

import hashlib
import re
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import get_args

import torch
from torch import Tensor, nn

from ckpt_tools.contract import BackwardFactor, BackwardTerm, InitRule, Scheme
from ckpt_tools.errors import ModelError
from ckpt_tools.initialize.constants import Constants
from ckpt_tools.initialize.flow import Flow
from ckpt_tools.initialize.following import Follower, follower
from ckpt_tools.initialize.outcome import Factors, InitLayer, InitRewrite
from ckpt_tools.initialize.propagation import Propagation
from ckpt_tools.initialize.rule import backward_term as backward_of
from ckpt_tools.initialize.rule import check_choice, divisor, fan_ratio
from ckpt_tools.initialize.scheme import fans, fill
from ckpt_tools.initialize.state import State
from ckpt_tools.model.batch import Batch
from ckpt_tools.model.calling import Forward, call_model, unwrap_model
from ckpt_tools.model.overwriting import overwrite_tensors
from ckpt_tools.walker.downstream import record_training_forward
from ckpt_tools.walker.graph import Graph
from ckpt_tools.walker.weights import WeightUse, layer_name, reason_not_rewritten, weight_uses

_MOST_USES = 2
_DEAD = 1e-12  # E[x²] of a layer behind a scale that starts at zero


@dataclass(frozen=True)
class _Method:
    scheme: Scheme
    rule: InitRule
    backward_term: BackwardTerm
    backward_factor: BackwardFactor


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

    W has fan-in vectors of norm one, divided by √(E[f(z^{l−1})²]/p_{l−1} + p_l·E[f'(z^l)²]), the backward term for
    linear layers only (Hendrycks & Gimpel 2016, section 2.2). f and p are read off one forward in training mode.
    Everything else (normalisation, embeddings, tokens, positional tables) keeps its values.

    Args:
        model: a fresh nn.Module; wrappers are looked through. Its train flags, buffers and hooks stay as they are.
        example_input: a batch as for ``walk``; only its shape matters.
        scheme: "hypersphere" or "orthonormal" fan-in vectors, "uniform" (section 4), or "normal".
        rule: "paper": every layer from its neighbours; "propagated": mean and second moment carried through the graph.
        backward_term: "auto" (linear layers under the paper's rule), "on" or "off".
        backward_factor: "paper": p·E[f'²]; "inverted": E[f'²]/p, what PyTorch's dropout does to the error signal.
        seed: of the new weights.
        forward: how to run the model on a batch.

    Raises:
        UsageError: an unknown method.
        ModelError: no weight layer, dropout that keeps nothing, weights without values, or a model that cannot be run.
            Nothing is changed then.
    """
    method = _Method(scheme, rule, backward_term, backward_factor)
    _check(method)
    model = unwrap_model(model)
    parameters = dict(model.named_parameters())
    record = record_training_forward(model, example_input, forward)
    for site in record.sites.values():
        if site.rate is not None and site.rate >= 1:
            raise ModelError(
                f"{site.name}: expected a drop rate below 1, found {site.rate:g}, which lets nothing through. Lower it."
            )
    trainable = [name for name, parameter in parameters.items() if parameter.requires_grad]
    uses = weight_uses(record.graph, trainable)
    if not uses:
        raise ModelError(
            f"{type(model).__name__}: expected linear layers or convolutions to rewrite, found none in its forward. "
            "Check the architecture."
        )
    if meta := next((use.parameter for use in uses if parameters[use.parameter].is_meta), None):
        raise ModelError(f"{meta}: expected values, found a tensor on the meta device. Build the model on a real one.")
    layers = _layers(record.graph, model, uses, method)
    _write(model, uses, layers, method, seed)
    left = _left_alone(record.graph, parameters, {use.parameter for use in uses})
    return InitRewrite((*layers.values(), *left), rule, scheme, backward_term, backward_factor, seed)


def _check(method: _Method) -> None:
    for name, known in zip(vars(method), (Scheme, InitRule, BackwardTerm, BackwardFactor), strict=True):
        check_choice(getattr(method, name), name, get_args(known))


def _layers(graph: Graph, model: nn.Module, uses: Sequence[WeightUse], method: _Method) -> dict[str, InitLayer]:
    """Every weight layer with its factors, by parameter."""
    biases = _biases(model, uses)
    constants = Constants(graph, model, zeroed=[bias for bias in biases.values() if bias])
    near = Flow(graph, constants, uses)
    fed = near.inputs()
    followers = {use.node: follower(near, use.node) for use in uses if _with_backward(use, method)}
    if method.rule == "propagated":
        fed = _propagated(graph, uses, constants, followers, method)
    layers: dict[str, InitLayer] = {}
    parameters = dict(model.named_parameters())
    for name in dict.fromkeys(use.parameter for use in uses):
        # Two uses are enough: the state of a recurrent net would be carried through every step.
        own = [use for use in uses if use.parameter == name][:_MOST_USES]
        states = [fed[use.node] for use in own]
        behind = [followers[use.node] for use in own if use.node in followers]
        fan_in, fan_out = fans(own[0].view.shape, own[0].geometry)
        layers[name] = InitLayer(
            name=layer_name(name),
            parameter=name,
            kind=own[0].geometry.kind,
            shape=tuple(parameters[name].shape),
            rewritten=True,
            fan_in=fan_in,
            fan_out=fan_out,
            factors=_factors(states, behind, fan_ratio(method.scheme, fan_in, fan_out), method),
            bias=biases[name],
        )
    return layers


def _propagated(
    graph: Graph, uses: Sequence[WeightUse], constants: Constants, followers: dict[int, Follower], method: _Method
) -> dict[int, State]:
    """A second time through the graph where a weight is used more than once: its uses share one divisor."""
    backward = {}
    for use in uses:
        if use.node in followers:
            found = followers[use.node]
            ratio = fan_ratio(method.scheme, *fans(use.view.shape, use.geometry))
            backward[use.parameter] = ratio * backward_of(found.slope, found.keep, method.backward_factor)
    fed = Propagation(graph, constants, uses, backward=backward).inputs()
    if len({use.parameter for use in uses}) == len(uses):
        return fed
    seconds: dict[str, list[float]] = {}
    for use in uses:
        seconds.setdefault(use.parameter, []).append(fed[use.node].signal.second)
    shared = {name: statistics.fmean(found[:_MOST_USES]) for name, found in seconds.items() if len(found) > 1}
    return Propagation(graph, constants, uses, shared, backward).inputs()


def _factors(states: Sequence[State], behind: Sequence[Follower], ratio: float, method: _Method) -> Factors:
    """The divisor; a weight used several times gets the average of what it meets."""
    second = sum(state.signal.second for state in states) / len(states)
    quiet = sum(state.signal.second * state.signal.keep for state in states) / len(states)
    dead = second < _DEAD
    activation = " | ".join(list(dict.fromkeys(state.activation for state in states))[:3])
    found = Factors(
        activation=f"{activation}, nothing yet" if dead else activation,
        second_moment=1.0 if dead else quiet,
        keep=1.0 if dead else min(1.0, quiet / second),
    )
    if behind:
        found = replace(
            found,
            next_activation=" | ".join(list(dict.fromkeys(one.activation for one in behind))[:3]),
            next_slope=sum(one.slope for one in behind) / len(behind),
            next_keep=sum(one.keep for one in behind) / len(behind),
        )
    value = divisor(
        found.second_moment,
        found.keep,
        next_slope=found.next_slope,
        next_keep=found.next_keep,
        backward_factor=method.backward_factor,
        fan_ratio=ratio,
    )
    return replace(found, divisor=value)


def _with_backward(use: WeightUse, method: _Method) -> bool:
    if method.backward_term == "auto":
        return use.geometry.kind == "linear" and method.rule == "paper"
    return method.backward_term == "on"


def _biases(model: nn.Module, uses: Iterable[WeightUse]) -> dict[str, str]:
    """The bias that goes with each weight: the operation's own, or its namesake; "" where there is none."""
    names = {name for name, parameter in model.named_parameters(remove_duplicate=False) if parameter.requires_grad}
    found: dict[str, str] = {}
    for use in uses:
        namesake = re.sub(r"weight$", "bias", use.parameter)
        own = use.bias if use.bias in names else ""
        known = own or (namesake if namesake != use.parameter and namesake in names else "")
        found[use.parameter] = found.get(use.parameter) or known
    return found


def _write(
    model: nn.Module, uses: Sequence[WeightUse], layers: dict[str, InitLayer], method: _Method, seed: int
) -> None:
    """Draw all new weights, then put them in place."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    new: dict[str, Tensor] = {}
    generators: dict[str, torch.Generator] = {}
    done = set()
    for use in uses:
        view = use.view
        if (use.parameter, view.numel, view.offset) in done:
            continue
        done.add((use.parameter, view.numel, view.offset))
        old = parameters[use.parameter].detach()
        if use.parameter not in new:
            generators[use.parameter] = _generator(seed, use.parameter)
            new[use.parameter] = torch.empty_like(old, dtype=torch.float32, device="cpu").copy_(old)
        factors = layers[use.parameter].factors
        assert factors is not None
        part = new[use.parameter].as_strided(view.shape, view.stride, view.offset)
        fill(part, use.geometry, method.scheme, generators[use.parameter], divisor=factors.divisor)
    biases = [parameters[layer.bias] for layer in layers.values() if layer.bias]
    overwrite_tensors(
        [(parameters[name], value) for name, value in new.items()] + [(bias, torch.zeros_like(bias)) for bias in biases]
    )


def _generator(seed: int, parameter: str) -> torch.Generator:
    """One for each weight, by its name: with another head the other layers still get the same weights."""
    digest = hashlib.sha256(f"{seed} {parameter}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def _left_alone(graph: Graph, parameters: dict[str, nn.Parameter], rewritten: set[str]) -> list[InitLayer]:
    """Every other parameter with two dimensions or more, and why it stays."""
    return [
        InitLayer(
            layer_name(name), name, None, tuple(parameter.shape), False, reason_not_rewritten(graph, name, parameter)
        )
        for name, parameter in parameters.items()
        if parameter.ndim >= 2 and name not in rewritten
    ]
