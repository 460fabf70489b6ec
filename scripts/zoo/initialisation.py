"""`scripts/run zoo --init`: rewrite a model's weights, write and load them, and run the model."""

from __future__ import annotations

import tempfile
import time
import zlib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils import _pytree as pytree

from ckpt_tools.contract import LoadedModel, Recipe
from ckpt_tools.identify import plugins
from ckpt_tools.identify.key_matching import fill_model
from ckpt_tools.initialize.init_results import InitRewrite
from ckpt_tools.initialize.rewrite import rewrite_init
from ckpt_tools.jobs.initialization import seed_constructors, write_initialized
from ckpt_tools.model.calling import call_model
from ckpt_tools.storage.provenance import checkpoint_provenance
from ckpt_tools.storage.reading import read_checkpoint
from zoo.models import Checked, brief, build, example


@dataclass(frozen=True)
class Initialized(Checked):
    """``left``: number of weights by the reason to leave them; ``skipped``: not tried, and why."""

    parameters: int = 0
    rewritten: int = 0
    left: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    skipped: str = ""


def init_one(architecture: str, largest: int) -> Initialized:
    """The check of one model with up to ``largest`` parameters."""
    try:
        bare, spec = build(architecture)
        parameters = sum(parameter.numel() for parameter in bare.parameters())
        if parameters > largest:
            return Initialized(architecture, parameters=parameters, skipped="too large")
        del bare
        adapter, name = plugins.resolve(architecture)
        with seed_constructors(0):
            model = adapter.build(name, {}).float().eval()
    except Exception as error:
        return Initialized(architecture, f"cannot be built: {brief(error)}")
    started = time.perf_counter()
    try:
        result = check(LoadedModel(model, None, Recipe(adapter.prefix, name), spec))
    except Exception as error:
        return Initialized(architecture, brief(error), parameters)
    left = Counter(layer.reason for layer in result.layers if not layer.rewritten)
    seconds = time.perf_counter() - started
    return Initialized(architecture, "", parameters, len(result.rewritten), dict(left), seconds)


def check(loaded: LoadedModel) -> InitRewrite:
    """Rewrite, write, load back and run. Raises AssertionError for whatever should not be so."""
    model = loaded.model
    before = digests(model)
    result = rewrite_init(model, example(model, loaded.input_spec), seed=0)
    after = digests(model)
    with tempfile.TemporaryDirectory(prefix="zoo-init-") as folder:
        path = Path(folder) / "init.safetensors"
        write_initialized(path, loaded, result)
        recorded = checkpoint_provenance(read_checkpoint(path)) or {}
        scramble(model)
        fill_model(
            model, read_checkpoint(path), loaded.recipe.architecture
        )  # strict; mnasnet needs its version metadata
    assert digests(model) == after, "the file does not bring back the model"
    changed = {key for key in before if before[key] != after[key]}
    rewritten, zeroed = recorded["rewritten"], recorded["zeroed"]
    assert isinstance(rewritten, list)
    assert isinstance(zeroed, list)
    assert changed <= {*rewritten, *zeroed}, (
        f"changed but not listed: {sorted(changed - {*rewritten, *zeroed})[:3]}"
    )
    assert changed >= set(rewritten), f"listed but not changed: {sorted(set(rewritten) - changed)[:3]}"
    missing = weight_keys(model) - {layer.parameter for layer in result.layers}
    assert not missing, f"not in the table: {sorted(missing)[:3]} and {max(0, len(missing) - 3)} more"
    assert all(layer.rewritten or layer.reason for layer in result.layers), "left without a reason"
    assert finite(call_once(loaded)), "the forward of the rewritten model is not finite"
    return result


def weight_keys(model: nn.Module) -> set[str]:
    """Every linear or convolutional weight, a tied one under its first name."""
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    weighted = [module for module in model.modules() if isinstance(module, (nn.Linear, _ConvNd))]
    return {
        first[id(weight)] for module in weighted if (weight := module._parameters.get("weight")) is not None
    }


def call_once(loaded: LoadedModel) -> object:
    torch.manual_seed(0)
    with torch.no_grad():
        return call_model(loaded.model.eval(), example(loaded.model, loaded.input_spec, 1, torch.randn))


def finite(output: object) -> bool:
    leaves = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
    return bool(leaves) and all(bool(leaf.isfinite().all()) for leaf in leaves)


def digests(model: nn.Module) -> dict[str, int]:
    """A checksum of every tensor: a copy of a large model would need its memory once more."""
    tensors = {key: value for key, value in model.state_dict().items() if isinstance(value, Tensor)}
    return {
        key: zlib.crc32(value.contiguous().view(-1).view(torch.uint8).numpy())
        for key, value in tensors.items()
    }


def scramble(model: nn.Module) -> None:
    """Nothing of the state dict survives, so that what loads came from the file."""
    for value in model.state_dict().values():
        if isinstance(value, Tensor):
            value.fill_(float("nan") if value.is_floating_point() else 0)


def summary(results: list[Checked]) -> str:
    tried = [result for result in results if isinstance(result, Initialized)]
    good = [result for result in tried if not result.failure and not result.skipped]
    seconds = sorted(result.seconds for result in good) or [0.0]
    reasons: Counter[str] = Counter()
    for result in good:
        reasons.update(result.left)
    lines = [
        f"{len(results)} models, {sum(bool(result.skipped) for result in tried)} too large, "
        f"{len(good)} initialised, {sum(bool(result.failure) for result in results)} failed",
        f"{sum(result.rewritten for result in good):,} weights rewritten, {sum(reasons.values()):,} left; "
        f"median {seconds[len(seconds) // 2]:.2f} s, longest {seconds[-1]:.1f} s for a model",
        *(f"  left, {count:,} in all: {reason}" for reason, count in reasons.most_common()),
    ]
    return "\n".join(lines)
