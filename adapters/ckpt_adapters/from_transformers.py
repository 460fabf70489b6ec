"""The adapter for transformers, https://github.com/huggingface/transformers.

The library takes seconds to import, so it is imported only where a name or a config.json asks for
it.
"""

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

# Models of timm in a wrapper of transformers. The adapter of timm builds them.
_WRAPPERS = {"timm_wrapper", "timm_backbone"}
_PROBE_RATE = 0.2


class TransformersAdapter:
    """Model classes of transformers (`ResNetForImageClassification`).

    Keyword arguments are those of the model's configuration. Code that comes with a checkpoint
    (`auto_map`) is never run, and nothing is looked up on the Hub.
    """

    prefix = "transformers"

    def architectures(self) -> Sequence[str]:
        """Return no names: listing them would import the library. `build` suggests names."""
        return ()

    def recognise(self, words: Mapping[str, object]) -> Recipe | None:
        """Return the recipe of a folder of `save_pretrained`.

        `words["config"]` is its config.json.
        """
        config = recorded_arguments.hub_config(words)
        model_type = config.get("model_type")
        if not isinstance(model_type, str) or model_type in _WRAPPERS:
            return None
        name = _class_name(config, model_type)
        if name is None or name.startswith("Timm"):
            return None
        kwargs = {key: value for key, value in config.items() if key not in NOT_SETTINGS}
        labels = config.get("id2label")
        if isinstance(labels, Mapping):
            kwargs["num_labels"] = len(labels)
        with contextlib.suppress(ArchitectureError):  # An unknown class; `build` raises for it.
            settings = self.file_arguments(name)
            kwargs = {key: value for key, value in kwargs.items() if key in settings}
        rates = {key: value for key, value in kwargs.items() if "drop" in key and _is_rate(value)}
        return Recipe(self.prefix, name, rates | kwargs, "recorded" if rates else "unknown")

    def build(self, name: str, kwargs: Mapping[str, object]) -> nn.Module:
        """Build a model of that class by a configuration of these arguments, without pretrained
        weights.

        Raises ArchitectureError for an argument that the configuration does not have.
        """
        settings = _setting_names(_model_class(name))
        for keyword in kwargs:
            if keyword not in settings:
                message = unknown_keyword_message(f"transformers:{name}", keyword, settings)
                raise ArchitectureError(message)
        return construct(f"transformers:{name}", _constructor(name), kwargs)

    def class_kwargs(
        self, shapes: Mapping[str, tuple[int, ...]], name: str, kwargs: Mapping[str, object]
    ) -> dict[str, object]:
        """Read `num_labels` and `num_channels` off the shapes, if the configuration has them."""
        make, settings = _constructor(name), _setting_names(_model_class(name))
        sizes = {
            keyword: infer_size_argument(make, kwargs, keyword, axis, shapes)
            for keyword, axis in (("num_labels", 0), ("num_channels", 1))
            if keyword in settings
        }
        return {keyword: size for keyword, size in sizes.items() if size}

    def rate_kwargs(self, name: str) -> tuple[str, ...]:
        """Return the settings that are drop rates, also those that hold a rate for each stage."""
        return _rate_kwargs(name)

    def file_arguments(self, name: str) -> Mapping[str, ArgumentKind]:
        """Return the kinds of all settings of the class's configuration.

        `transformers_arguments` derives them from the configuration class.
        """
        return config_arguments(_model_class(name).config_class)

    def input_spec(self, model: nn.Module, name: str, words: Mapping[str, object]) -> InputSpec | None:
        """Return the preprocessing that the checkpoint records, else that of the model's type.

        `words["preprocessor"]` holds the former. Returns None for models whose input is no image.
        """
        del name
        config: Any = getattr(model, "config", None)
        if getattr(model, "main_input_name", "") != "pixel_values" or config is None:
            return None
        stored = words.get("preprocessor")
        settings = stored if isinstance(stored, Mapping) else {}
        processor, defaults = _processor_defaults(settings, str(config.model_type))
        channels = int(getattr(config, "num_channels", 3))
        side = getattr(config, "image_size", None)
        sources = [(settings, "preprocessor_config.json")] if settings else []
        for source, origin in [*sources, ({}, f"transformers {processor or 'config'}")]:
            # Settings of another meaning raise. Then the processor's defaults stand.
            with contextlib.suppress(*recorded_arguments.INVALID_SETTING_ERRORS):
                return image_processor.input_spec(source, defaults, channels, side, origin)
        return None


@functools.cache
def _model_class(name: str) -> Any:
    """Return a model class of the installed library by its name.

    Raises ArchitectureError for other names, and for wrappers of timm's models.
    """
    library = import_library()
    cls: Any = None
    # The name may come from a config.json. Only names that the library itself lists are looked up.
    if name in dir(library):
        with contextlib.suppress(Exception):  # The class may need a package that is not installed.
            cls = getattr(library, name)
    is_model = isinstance(cls, type) and issubclass(cls, library.PreTrainedModel)
    if is_model and getattr(cls, "config_class", None):
        if cls.__module__.startswith("transformers.models.timm_"):
            raise ArchitectureError(
                f"transformers:{name}: expected a model of transformers, found its cover of a "
                "model of timm. Name the model itself: --arch timm:NAME."
            )
        return cls
    # The library has several thousand names, and comparing with all of them is slow.
    similar = [candidate for candidate in dir(library) if candidate[:2].lower() == name[:2].lower()]
    model_names = [
        candidate for candidate in similar if candidate.endswith(("Model", "Backbone")) or "For" in candidate
    ]
    raise ArchitectureError(
        f"transformers:{name}: expected a model class of transformers {library.__version__}, found "
        f"{name!r}.{suggest_names(name, model_names)} Code that comes with a checkpoint is not "
        "run; name your own class as --arch package.module:Class."
    )


def _class_name(config: Mapping[str, object], model_type: str) -> str | None:
    """Return the name of the class that wrote the configuration.

    If the configuration does not hold it, return the plain model of its type.
    """
    architectures = config.get("architectures")
    if isinstance(architectures, list | tuple) and architectures:
        name = architectures[0]
        if isinstance(name, str):
            return name
    try:
        auto = importlib.import_module("transformers.models.auto.modeling_auto")
    except Exception:  # noqa: BLE001 - transformers is not installed, or broken
        return None
    name = auto.MODEL_MAPPING_NAMES.get(model_type)
    return name if isinstance(name, str) else None


@functools.cache
def _fields(cls: Any) -> dict[str, Any]:
    return config_fields(cls.config_class)


def _setting_names(cls: Any) -> list[str]:
    return [field for field in _fields(cls) if field not in NOT_SETTINGS]


@functools.cache
def _rate_kwargs(name: str) -> tuple[str, ...]:
    cls = _model_class(name)
    defaults = _fields(cls)
    rates = [field for field in _setting_names(cls) if "drop" in field and _is_rate(defaults[field])]
    return tuple(rate for rate in rates if _accepts_fraction(cls, rate))


def _accepts_fraction(cls: Any, setting: str) -> bool:
    """Whether a setting takes a rate.

    Some whose names contain "drop" are declared as whole numbers.
    """
    try:
        _build_config(cls, {setting: _PROBE_RATE})
    except Exception:  # noqa: BLE001 - the library checks types in its own way
        return False
    return True


def _is_rate(value: object) -> bool:
    if isinstance(value, list | tuple):
        return bool(value) and all(_is_rate(item) for item in value)
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1


def _constructor(name: str) -> Callable[..., object]:
    cls = _model_class(name)

    def make(**kwargs: object) -> object:
        with warnings.catch_warnings(), forbid_hub_and_remote_code():
            # The library warns about settings that are older or newer than itself.
            warnings.simplefilter("ignore")
            return cls(_build_config(cls, kwargs))

    return make


def _build_config(cls: Any, kwargs: Mapping[str, object]) -> Any:
    """Build a configuration of the class.

    One number for a drop rate that the class has for each stage is taken for every stage.
    """
    defaults = _fields(cls)
    settings = dict(kwargs)
    for name, value in kwargs.items():
        default = defaults.get(name)
        if isinstance(value, int | float) and "drop" in name and isinstance(default, list | tuple):
            settings[name] = [value] * len(default)
    return cls.config_class.from_dict(_without_downloads(settings))


def _without_downloads(value: Any) -> Any:
    """Switch off pretrained weights of a backbone, also in nested configurations.

    The weights come from the checkpoint; the library would download others first.
    """
    if isinstance(value, Mapping):
        return {
            name: False if name == "use_pretrained_backbone" else _without_downloads(setting)
            for name, setting in value.items()
        }
    return [_without_downloads(item) for item in value] if isinstance(value, list) else value


def _processor_defaults(settings: Mapping[str, object], model_type: str) -> tuple[str, dict[str, Any]]:
    """Return the name and the default settings of an image processor, or ("", {}) if it is unknown.

    It is the processor that the settings name, else the one that goes with the model type.
    """
    recorded = settings.get("image_processor_type") or settings.get("feature_extractor_type")
    if isinstance(recorded, str):
        # A feature extractor is an image processor of an older version; "Fast" marks a variant. All
        # have the same settings.
        name = recorded.removesuffix("Fast").replace("FeatureExtractor", "ImageProcessor")
    else:
        name = _default_processor_name(model_type)
    library = import_library()
    # The name may come from a file. Only image processors that the library itself lists are made.
    if name in dir(library) and name.endswith("ImageProcessor"):
        with contextlib.suppress(Exception):  # It may need a package that is not installed.
            return name, dict(getattr(library, name)().to_dict())
    return "", {}


def _default_processor_name(model_type: str) -> str:
    # Another version of the library keeps the table elsewhere, or in another form.
    with contextlib.suppress(Exception):
        auto = importlib.import_module("transformers.models.auto.image_processing_auto")
        entry = auto.IMAGE_PROCESSOR_MAPPING_NAMES.get(model_type)
        names = entry.values() if isinstance(entry, Mapping) else entry
        for name in names or ():
            if name and not str(name).endswith(("Fast", "Pil")):
                return str(name)
    return ""
