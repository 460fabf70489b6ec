"""Which weights of a checkpoint are the averaged ones, by the framework that saved them.

Read from the sources of the frameworks; averaged weights are what they evaluate and deploy.

| Framework | Averaged weights | Weights of the training |
|---|---|---|
| timm, `train.py` | `state_dict_ema` | `state_dict` |
| torchvision references | `model_ema`: `module.*` and `n_averaged` | `model` |
| torch, `AveragedModel` | `module.*` and `n_averaged` | in an entry of their own |
| Lightning `WeightAveraging`, `EMAWeightAveraging` | `state_dict` | `current_model_state` |
| Lightning `StochasticWeightAveraging` | `state_dict`, from the end of training on | `state_dict` before |
| mmengine `EMAHook` | `state_dict` | `ema_state_dict`: `module.*` and `steps` |
| mmcv 1, mmdetection 2 | the plain keys | buffers `ema_*`, with `_` for each dot |
| d2go, detrex (detectron2) | `ema_state`, perhaps without buffers | `model` |
| pycls | `ema_state` | `model_state` |
| YOLOX | `model`, with no other copy | not saved |
| ultralytics, YOLOv5 | `ema`, a whole module | `model`, a whole module or None |
| MosaicML Composer `EMA` | `state.model` | below `state.algorithms` |
| fastai, with fastxtend's callback | `model`, with no other copy | not saved |
| BasicSR | `params_ema` | `params` |
| ema-pytorch | `ema_model.*` | `online_model.*` |
| latent diffusion, `LitEma` | `model_ema.*` without dots | the plain keys |

Where a framework swaps the two on saving, its files are told by what else stands in them (`_SWAPS`).
Everywhere else the names say which weights are averaged: `state_dict_search` reads them.

mmcv 1 swaps at the end of epochs. In what it saved by iteration the averaged weights are still in
the buffers: `--weights "ema_*"` takes those. Lightning's StochasticWeightAveraging keeps its average,
with BN statistics that were never updated, in its own state until the training ends: there
`--weights ema` takes it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from torch import Tensor

__all__ = ["averaged_by_framework", "sounds_averaged", "unfinished_averages", "wraps_average"]

_AVERAGED = frozenset({"ema", "swa", "avg", "averaged", "polyak"})
# What wrappers that average count with, and where the model stands in them: torch's AveragedModel,
# mmengine's BaseAveragedModel, ema-pytorch without the other model.
_WRAPPERS = (("module.", {"n_averaged"}), ("module.", {"steps"}), ("ema_model.", {"initted", "step"}))
_SWA_CALLBACK = "StochasticWeightAveraging"


def wraps_average(state: Mapping[str, object]) -> bool:
    """Return whether a state dict is that of a wrapper which averages: it counts beside the model."""
    for prefix, counters in _WRAPPERS:
        model_keys = state.keys() - counters
        if counters <= state.keys() and model_keys and all(key.startswith(prefix) for key in model_keys):
            return True
    return False


def _is_swapped_by_mmengine(root: Mapping[str, object]) -> bool:
    raw = root.get("ema_state_dict")
    return isinstance(raw, Mapping) and "steps" in raw and wraps_average(raw)


def _is_swapped_by_lightning(root: Mapping[str, object]) -> bool:
    return "averaging_state" in root


# Frameworks that save averaged weights under the usual name: the name of the averaged weights, that
# of the others, and what tells their files.
_SWAPS: tuple[tuple[str, str, Callable[[Mapping[str, object]], bool]], ...] = (
    ("state_dict", "ema_state_dict", _is_swapped_by_mmengine),
    ("state_dict", "current_model_state", _is_swapped_by_lightning),
)


def averaged_by_framework(root: Mapping[str, object]) -> dict[str, bool]:
    """Return the entries whose framework is known to swap, each with whether it is averaged."""
    for averaged, raw, is_swapped in _SWAPS:
        if averaged in root and raw in root and is_swapped(root):
            return {averaged: True, raw: False}
    return {}


def sounds_averaged(name: str) -> bool:
    """Return whether the name of an entry speaks of averages."""
    return not _AVERAGED.isdisjoint(re.split(r"[^a-z0-9]+", name.lower()))


def unfinished_averages(root: Mapping[str, object]) -> dict[tuple[str, ...], Mapping[str, object]]:
    """Return the averages that Lightning's StochasticWeightAveraging has not handed on yet, by path."""
    callbacks = root.get("callbacks")
    if not isinstance(callbacks, Mapping):
        return {}
    averages: dict[tuple[str, ...], Mapping[str, object]] = {}
    for name, callback in callbacks.items():
        # The name of a callback may have its settings behind it.
        if isinstance(name, str) and name.startswith(_SWA_CALLBACK) and isinstance(callback, Mapping):
            state = callback.get("average_model_state")
            if isinstance(state, Mapping) and any(isinstance(value, Tensor) for value in state.values()):
                averages[("callbacks", name, "average_model_state")] = state
    return averages
