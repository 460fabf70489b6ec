"""transformers: https://github.com/huggingface/transformers. Imported only where a name or a config.json asks."""

from __future__ import annotations

import contextlib
import functools
import importlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from ckpt_adapters import image_processor, recorded_arguments
from ckpt_adapters.construct import construct, suggest_names, unknown_keyword_message
from ckpt_adapters.sizes_from_shapes import infer_size_argument
from ckpt_adapters.transformers_arguments import (
    NOT_SETTINGS,
    config_arguments,
    config_fields,
    forbid_hub_and_remote_code,
    import_library,
)
from ckpt_tools.contract import InputSpec, Recipe
from ckpt_tools.errors import ArchitectureError
from ckpt_tools.file_arguments import ArgumentKind

_WRAPPERS = {"timm_wrapper", "timm_backbone"}  # models of timm in a cover of transformers: the adapter of timm has them
_PROBED_RATE = 0.2


class TransformersAdapter:
    """Model classes of transformers (``ResNetForImageClassification``); keyword arguments are those of the config.

    Code that comes with a checkpoint (``auto_map``) is never run, and nothing is looked up on the Hub.
    """

    prefix = "transformers"

    def architectures(self) -> Sequence[str]:
        """Nothing: listing them would import the library. ``build`` suggests names."""
        return ()

    def recognise(self, words: Mapping[str, object]) -> Recipe | None:
        """A folder of ``save_pretrained``: ``words["config"]`` is its config.json."""
        config = recorded_arguments.hub_config(words)
        kind = config.get("model_type")
        if not isinstance(kind, str) or kind in _WRAPPERS:
            return None
        name = _class_name(config, kind)
        if name is None or name.startswith("Timm"):
            return None
        kwargs = {key: value for key, value in config.items() if key not in NOT_SETTINGS}
        labels = config.get("id2label")
        if isinstance(labels, Mapping):
            kwargs["num_labels"] = len(labels)
        with contextlib.suppress(ArchitectureError):  # ``build`` will say it
            settings = self.file_arguments(name)
            kwargs = {key: value for key, value in kwargs.items() if key in settings}
        rates = {key: value for key, value in kwargs.items() if "drop" in key and _is_rate(value)}
        return Recipe(self.prefix, name, rates | kwargs, "recorded" if rates else "unknown")

    def build(self, name: str, kwargs: Mapping[str, object]) -> nn.Module:
        """A model of that class with a config of these arguments, without weights."""
        known = _setting_names(_model_class(name))
        for keyword in kwargs:
            if keyword not in known:
                raise ArchitectureError(unknown_keyword_message(f"transformers:{name}", keyword, known))
        return construct(f"transformers:{name}", _maker(name), kwargs)

    def class_kwargs(
        self, shapes: Mapping[str, tuple[int, ...]], name: str, kwargs: Mapping[str, object]
    ) -> dict[str, object]:
        """``num_labels`` and ``num_channels``, as far as the config takes them and tensors tell them."""
        make, known = _maker(name), _setting_names(_model_class(name))
        sizes = {
            keyword: infer_size_argument(make, kwargs, keyword, axis, shapes)
            for keyword, axis in (("num_labels", 0), ("num_channels", 1))
            if keyword in known
        }
        return {keyword: size for keyword, size in sizes.items() if size}

    def rate_kwargs(self, name: str) -> tuple[str, ...]:
        """Fields of the config that are drop rates, also those that hold one a stage."""
        return _rate_kwargs(name)

    def file_arguments(self, name: str) -> Mapping[str, ArgumentKind]:
        """Return the kinds of all settings that the class's configuration has (`transformers_arguments`)."""
        return config_arguments(_model_class(name).config_class)

    def input_spec(self, model: nn.Module, name: str, words: Mapping[str, object]) -> InputSpec | None:
        """By ``words["preprocessor"]`` (preprocessor_config.json), else by the image processor of the model's type.

        None for models that eat something other than images.
        """
        del name
        config: Any = getattr(model, "config", None)
        if getattr(model, "main_input_name", "") != "pixel_values" or config is None:
            return None
        stored = words.get("preprocessor")
        settings = stored if isinstance(stored, Mapping) else {}
        kind, defaults = _processor(settings, str(config.model_type))
        channels, side = getattr(config, "num_channels", 3), getattr(config, "image_size", None)
        size, origin = (int(channels), side), f"transformers {kind or 'config'}"
        if settings:
            with contextlib.suppress(*recorded_arguments.INVALID_SETTING_ERRORS):
                return image_processor.input_spec(settings, defaults, *size, "preprocessor_config.json")
        with contextlib.suppress(*recorded_arguments.INVALID_SETTING_ERRORS):
            return image_processor.input_spec({}, defaults, *size, origin)
        return None


@functools.cache
def _model_class(name: str) -> Any:
    """A model class of the installed library by its name. Raises ArchitectureError."""
    library = import_library()
    cls = None
    if name in dir(library):  # nothing else leads anywhere, whatever a config.json says
        with contextlib.suppress(Exception):  # it needs a package that is not installed
            cls = getattr(library, name)
    if isinstance(cls, type) and issubclass(cls, library.PreTrainedModel) and getattr(cls, "config_class", None):
        if cls.__module__.startswith("transformers.models.timm_"):
            raise ArchitectureError(
                f"transformers:{name}: expected a model of transformers, found its cover of a model of timm. Name the "
                "model itself: --arch timm:NAME."
            )
        return cls
    alike = [one for one in dir(library) if one[:2].lower() == name[:2].lower()]  # of several thousands
    known = [one for one in alike if one.endswith(("Model", "Backbone")) or "For" in one]
    raise ArchitectureError(
        f"transformers:{name}: expected a model class of transformers {library.__version__}, found {name!r}."
        f"{suggest_names(name, known)} Code that comes with a checkpoint is not run; name your own class as "
        "--arch package.module:Class."
    )


def _class_name(config: Mapping[str, object], kind: str) -> str | None:
    """The class that wrote the config, else the plain model of its type."""
    written = config.get("architectures")
    if isinstance(written, list | tuple) and written and isinstance(written[0], str):
        return written[0]
    try:
        auto = importlib.import_module("transformers.models.auto.modeling_auto")
    except Exception:  # noqa: BLE001 - not installed, or broken: then nobody knows
        return None
    found = auto.MODEL_MAPPING_NAMES.get(kind)
    return found if isinstance(found, str) else None


@functools.cache
def _fields(cls: Any) -> dict[str, Any]:
    """The config's arguments with their defaults."""
    return config_fields(cls.config_class)


def _setting_names(cls: Any) -> list[str]:
    return [field for field in _fields(cls) if field not in NOT_SETTINGS]


@functools.cache
def _rate_kwargs(name: str) -> tuple[str, ...]:
    cls = _model_class(name)
    rates = [field for field in _setting_names(cls) if "drop" in field and _is_rate(_fields(cls)[field])]
    return tuple(rate for rate in rates if _takes(cls, rate))


def _takes(cls: Any, rate: str) -> bool:
    """Some fields are declared as whole numbers."""
    try:
        _build_config(cls, {rate: _PROBED_RATE})
    except Exception:  # noqa: BLE001 - the library checks types in its own way
        return False
    return True


def _is_rate(value: object) -> bool:
    if isinstance(value, list | tuple):
        return bool(value) and all(_is_rate(item) for item in value)
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1


def _maker(name: str) -> Callable[..., object]:
    cls = _model_class(name)

    def make(**kwargs: object) -> object:
        with warnings.catch_warnings(), forbid_hub_and_remote_code():
            warnings.simplefilter("ignore")  # about fields that are older or newer than the library
            return cls(_build_config(cls, kwargs))

    return make


def _build_config(cls: Any, kwargs: Mapping[str, object]) -> Any:
    """The config; a number for a field that holds one a stage goes for every stage."""
    fields = _fields(cls)
    spread = {
        key: [value] * len(fields[key])
        if isinstance(value, int | float) and "drop" in key and isinstance(fields.get(key), list | tuple)
        else _without_downloads(value)
        for key, value in kwargs.items()
    }
    return cls.config_class.from_dict(_without_downloads(spread))


def _without_downloads(value: Any) -> Any:
    """A backbone's published weights are not wanted: they come from the checkpoint."""
    if isinstance(value, Mapping):
        return {k: False if k == "use_pretrained_backbone" else _without_downloads(v) for k, v in value.items()}
    return [_without_downloads(item) for item in value] if isinstance(value, list) else value


def _processor(settings: Mapping[str, object], kind: str) -> tuple[str, dict[str, Any]]:
    """Name and defaults of the image processor that the settings name, or that goes with a model type."""
    wanted = settings.get("image_processor_type") or settings.get("feature_extractor_type")
    if isinstance(wanted, str):
        name = wanted.removesuffix("Fast").replace("FeatureExtractor", "ImageProcessor")
    else:
        name = _default_processor_name(kind)
    library = import_library()
    if name in dir(library) and name.endswith("ImageProcessor"):
        with contextlib.suppress(Exception):  # it needs a package that is not installed
            return name, dict(getattr(library, name)().to_dict())
    return "", {}


def _default_processor_name(kind: str) -> str:
    with contextlib.suppress(Exception):  # another version of the library keeps its table elsewhere
        auto = importlib.import_module("transformers.models.auto.image_processing_auto")
        found = auto.IMAGE_PROCESSOR_MAPPING_NAMES.get(kind)
        names = found.values() if isinstance(found, Mapping) else found
        return next((str(name) for name in names or () if name and not str(name).endswith(("Fast", "Pil"))), "")
    return ""
