"""The adapter for `package.module:factory`, a callable of the user's own that returns a model."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from torch import nn

from ckpt_adapters.construct import construct, keyword_parameters, rate_keywords, suggest_names
from ckpt_adapters.recorded_arguments import is_about_the_model, model_arguments
from ckpt_adapters.sizes_from_shapes import infer_size_argument
from ckpt_tools.contract import InputSpec, Recipe
from ckpt_tools.errors import ArchitectureError
from ckpt_tools.file_arguments import ArgumentKind, OwnArgument
from ckpt_tools.import_path import import_user_module, suggest_import_path

# Keyword arguments that are sizes, and the axis of a weight along which each of them shows.
_SIZES = (
    ("num_classes", 0),
    ("n_classes", 0),
    ("num_labels", 0),
    ("in_chans", 1),
    ("in_channels", 1),
)

# Words for layers that a file may choose, in lower case. None of them names a file or a class.
_WORDS = frozenset(
    re.findall(
        r"\w+",
        """
        none identity relu relu6 leaky_relu leakyrelu prelu rrelu elu selu celu gelu silu swish mish glu
        tanh sigmoid softplus hardswish hardsigmoid bn ln gn in batch layer group instance batchnorm
        batch_norm layernorm layer_norm groupnorm group_norm instancenorm instance_norm avg max mean sum
        add cat concat same valid causal zeros reflect replicate circular nearest bilinear bicubic pre post
        """,
    )
)
# Arguments of a training module that say how to train. Their words do not change the model.
_OF_TRAINING = re.compile(
    r"optim|sched|loss|criteri|metric|monitor|data|log|trainer|strategy|precision|experiment|run|^name$|task"
)


class FactoryAdapter:
    """Functions and classes by import path, also from modules of the current folder.

    The callable runs several times: once or twice for shapes (on the meta device where it can),
    once for the model, once with drop rates switched on.
    """

    prefix = "factory"

    def architectures(self) -> Sequence[str]:
        """Return no names: what can be imported cannot be listed."""
        return ()

    def recognise(self, words: Mapping[str, object]) -> Recipe | None:
        """Return None: a checkpoint must not choose which code of the user's runs."""
        del words
        return None

    def build(self, name: str, kwargs: Mapping[str, object]) -> nn.Module:
        """Call the factory. Raises ArchitectureError."""
        return construct(name, _factory(name), kwargs)

    def class_kwargs(
        self, shapes: Mapping[str, tuple[int, ...]], name: str, kwargs: Mapping[str, object]
    ) -> dict[str, object]:
        """Read the class count and the input channels off the shapes.

        Only arguments that the callable takes are returned.
        """
        make = _factory(name)
        parameters = keyword_parameters(make)
        sizes = {
            keyword: infer_size_argument(make, kwargs, keyword, axis, shapes)
            for keyword, axis in _SIZES
            if keyword in parameters
        }
        return {keyword: size for keyword, size in sizes.items() if size}

    def rate_kwargs(self, name: str) -> tuple[str, ...]:
        """Return the parameters whose names and defaults look like drop rates."""
        return rate_keywords(_factory(name))

    def recorded_arguments(self, name: str, words: Mapping[str, object]) -> tuple[dict[str, object], bool]:
        """Return the arguments that a file records for this callable, and whether these are all.

        They are the ``hyper_parameters`` of Lightning, and ``model_kwargs`` of other scripts, as far
        as the signature has them. As all of them are known, so are the drop rates.
        """
        parameters = keyword_parameters(_factory(name))
        recorded = model_arguments(words) | _lightning_arguments(words)
        arguments = {key: recorded[key] for key in parameters if key in recorded and is_about_the_model(key)}
        return arguments, bool(parameters) and parameters.keys() <= recorded.keys()

    def file_arguments(self, name: str) -> Mapping[str, ArgumentKind]:
        """Return a kind for each argument of the signature: numbers, flags and well-known words."""
        return {
            key: OwnArgument(
                parameter.default,
                _WORDS | {word.lower() for word in get_args(parameter.annotation) if isinstance(word, str)},
                _OF_TRAINING.search(key) is None,
            )
            for key, parameter in keyword_parameters(_factory(name)).items()
        }

    def input_spec(self, model: nn.Module, name: str, words: Mapping[str, object]) -> InputSpec | None:
        """Return the model's own `input_spec`, which is an InputSpec or a mapping of its fields.

        A timm-style `default_cfg` serves as well. Raises ArchitectureError for unknown fields.
        """
        del words
        spec = getattr(model, "input_spec", None)
        if isinstance(spec, InputSpec):
            return spec
        cfg = getattr(model, "default_cfg", None) or getattr(model, "pretrained_cfg", None)
        fields = spec if isinstance(spec, Mapping) else _fields_of_cfg(cfg)
        if not fields:
            return None
        try:
            return InputSpec(**{"origin": name, **fields})
        except TypeError as error:
            raise ArchitectureError(
                f"{name}: input_spec should hold the fields of InputSpec: {error}"
            ) from error


def _lightning_arguments(words: Mapping[str, object]) -> dict[str, object]:
    """Return the arguments that Lightning's ``save_hyperparameters`` has recorded."""
    recorded = words.get("hyper_parameters")
    if not isinstance(recorded, Mapping):
        return {}
    # The command line of Lightning records a class and its arguments.
    inner = recorded.get("init_args")
    return {str(key): value for key, value in (inner if isinstance(inner, Mapping) else recorded).items()}


def _fields_of_cfg(cfg: object) -> dict[str, Any]:
    """Return the fields of InputSpec that a timm-style configuration of the input holds."""
    if not isinstance(cfg, Mapping) or not cfg.get("input_size"):
        return {}
    fields = {key: cfg[key] for key in ("interpolation", "crop_pct", "crop_mode") if cfg.get(key)}
    fields |= {key: tuple(cfg[key]) for key in ("mean", "std") if cfg.get(key)}
    return {"shape": tuple(cfg["input_size"]), **fields}


def _factory(name: str) -> Callable[..., object]:
    module_name, _, path = name.partition(":")
    if not module_name or not path:
        raise ArchitectureError(
            f"{name}: expected package.module:factory, found no "
            f"{'module' if path else 'name after a colon'}. "
            "Write timm:NAME or torchvision:NAME for a model of those libraries."
        )
    if module_name.endswith(".py"):
        raise ArchitectureError(f"{name}: expected package.module:factory. {suggest_import_path(name)}")
    module = _import(name, module_name)
    try:
        factory: Callable[..., object] = operator.attrgetter(path)(module)
    except AttributeError as error:
        callables = [key for key, value in vars(module).items() if callable(value)]
        raise ArchitectureError(
            f"{name}: module {module_name} ({getattr(module, '__file__', None)}) has no {path!r}."
            f"{suggest_names(path, callables)}"
        ) from error
    if not callable(factory):
        raise ArchitectureError(
            f"{name}: expected a callable, found {type(factory).__name__}. Name a function."
        )
    return factory


def _import(name: str, module_name: str) -> Any:
    try:
        return import_user_module(module_name)
    except (Exception, SystemExit) as error:  # The user's module may do anything while it loads.
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        # The module itself may exist, and import another one that does not.
        if missing and f"{module_name}.".startswith(f"{missing}."):
            reason = f"no module named {missing} is installed or stands in {Path.cwd()}"
        else:
            reason = f"importing {module_name} failed with {type(error).__name__}: {error}"
        raise ArchitectureError(f"{name}: {reason}.") from error
