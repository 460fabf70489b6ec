"""Decides which settings of a transformers configuration a file may set, and to which values.

The settings are those that the library's own configuration class has. The kind of each follows from
the class's default: numbers and flags are admitted within bounds, and a word only where it stands
in a list of this module or is the class's own default. So no setting can name a file, a folder, a
repository or a class.

A configuration inside another one (`backbone_config`) is filtered in the same way, by the class of
its `model_type`.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

from ckpt_adapters.from_timm import is_timm_model
from ckpt_adapters.recorded_arguments import is_about_the_model
from ckpt_tools.errors import ArchitectureError
from ckpt_tools.file_arguments import (
    ArgumentKind,
    Depth,
    Evidence,
    Flag,
    Forbidden,
    Nested,
    NotAdmitted,
    Number,
    Pixels,
    Rate,
    Sizes,
    Width,
    Word,
)

# What a config.json holds besides the settings of its class. Of the labels only their number
# counts.
_NOT_SETTINGS = """
    architectures model_type transformers_version _name_or_path name_or_path _commit_hash
    auto_map dtype torch_dtype id2label label2id problem_type quantization_config torchscript
    return_dict output_hidden_states output_attentions chunk_size_feed_forward
    is_encoder_decoder use_cache attn_implementation _attn_implementation label_names
"""
NOT_SETTINGS = frozenset(_NOT_SETTINGS.split())
# Models of timm in a wrapper of transformers.
_TIMM_TYPES = frozenset({"timm_backbone", "timm_wrapper"})

_ACTIVATIONS = """
    celu elu gelu gelu_10 gelu_accurate gelu_fast gelu_new gelu_python gelu_python_tanh
    gelu_pytorch_tanh hardsigmoid hardswish identity laplace leaky_relu linear mish prelu quick_gelu
    relu relu2 relu6 sigmoid silu swish tanh xielu
"""
_WORDS = {
    "conv_layer": "basic bottleneck preactivation",
    "cross_attention_shape_for_attention": "kv q",
    "decoder_method": "default discrete",
    "depth_estimation_type": "metric relative",
    "encoder_type": "basic hybrid",
    "encoder_fuse_op": "cat sum",
    "global_padding": "SAME VALID same valid",
    "interpolate_mode": "area bicubic bilinear nearest",
    "interpolation_mode": "area bicubic bilinear nearest",
    "layer_norm_type": "batch layer",
    "layer_type": "basic bottleneck preactivation x y",
    "norm_type": "batchnorm layernorm rmsnorm",
    "pooling_type": "max mean none",
    "position_embedding_type": ("absolute learned none relative relative_key relative_key_query rotary sine"),
    "projection_type": "convolution linear",
    "qkv_projection_method": "avg dw_bn linear",
    "readout_type": "add ignore project",
    "stem_type": "large small",
}
# Parts of the names of settings that are numbers of layers, and of those that are sizes in pixels.
_DEPTHS = ("layers", "depth", "blocks", "num_hidden", "repeats")
_SIDES = "image_size patch_size window crop_size img_size resolution kernel stride ratio_size"


def config_fields(config_class: Any) -> dict[str, Any]:
    """Return the settings of a configuration class with their defaults, also under their aliases.

    A class whose configuration cannot be made without arguments has `num_labels` alone.
    """
    # An argument of every configuration, which `to_dict` leaves out.
    num_labels = {"num_labels": 2}
    with (
        warnings.catch_warnings(action="ignore"),
        contextlib.suppress(Exception),
        forbid_hub_and_remote_code(),
    ):
        fields = dict(config_class().to_dict())
        aliases = getattr(config_class, "attribute_map", {})
        return fields | {alias: fields.get(field) for alias, field in aliases.items()} | num_labels
    return num_labels


@functools.cache
def config_arguments(config_class: Any) -> Mapping[str, ArgumentKind]:
    """Return the kinds of all settings of a configuration class, by name."""
    fields = config_fields(config_class)
    parts = getattr(config_class, "sub_configs", {})
    return {
        name: _part_kind(parts.get(name)) if name in parts else _kind_of_setting(name, default)
        for name, default in fields.items()
        if name not in NOT_SETTINGS and is_about_the_model(name)
    }


def _kind_of_setting(name: str, default: object) -> ArgumentKind:
    if isinstance(default, dict):
        return _mapping_kind(default)
    return _OrDefault(_kind_by_name(name, list(_leaves(default))), default)


def _kind_by_name(name: str, leaves: list[object]) -> ArgumentKind:
    """Return the kind of a setting by its name and its default.

    `leaves` are the values in the default: itself, or the items of a list.
    """
    types = {type(leaf) for leaf in leaves if leaf is not None}
    if name in ("backbone", "use_timm_backbone"):
        # Older versions of the library look the first up on the Hub or in a folder.
        return Forbidden()
    if name in ("out_features", "stage_names"):
        return _STAGES
    if name.endswith(("act", "activation", "activation_function", "act_func")):
        return _ACTIVATION
    if name in _WORDS or str in types:
        words = {*_WORDS.get(name, "").split(), *(leaf for leaf in leaves if isinstance(leaf, str))}
        return Word(frozenset(words), numbers=bool(types - {str}))
    if "drop" in name and types <= {int, float}:
        return Rate()
    if types == {bool}:
        return Flag()
    if any(part in name for part in _SIDES.split()):
        return Pixels()
    if types == {int}:
        return Depth() if any(part in name for part in _DEPTHS) else Width()
    return Number() if float in types else Sizes()


# Words of closed lists. A setting of these kinds can name no file, class or place on a network.
_ACTIVATION = Word(frozenset(_ACTIVATIONS.split()))
_STAGES = Word(frozenset({"stem", *(f"stage{number}" for number in range(100))}))


class _OrDefault:
    """Admits what another kind admits, and the class's own default.

    The default is the library's word and not the file's, so it can do no harm.
    """

    def __init__(self, kind: ArgumentKind, default: object) -> None:
        self._kind, self._default = kind, default

    def admit(self, value: object, evidence: Evidence) -> object:
        """Admit the default, or what the kind admits. Raises NotAdmitted."""
        # Types are compared, too, since True == 1 == 1.0 in Python.
        if type(value) is type(self._default) and value == self._default:
            return value
        return self._kind.admit(value, evidence)


def _leaves(default: object) -> Iterator[object]:
    if isinstance(default, list | tuple):
        for item in default:
            yield from _leaves(item)
    else:
        yield default


def _part_kind(part: Any) -> ArgumentKind:
    """Return the kind of a configuration inside another one.

    Its class is `part`, or follows from the `model_type` in the file where `part` stands for any
    class.
    """
    if getattr(part, "model_type", ""):
        return Nested(lambda settings: {**config_arguments(part), "model_type": _TYPES})
    return Nested(_arguments_by_type)


def _mapping_kind(default: Mapping[str, object]) -> ArgumentKind:
    """Return the kind of a mapping in a configuration, by the default that the class has for it."""
    if default.get("model_type") in _configurations():
        return Nested(_arguments_by_type)
    kinds = {
        name: _kind_of_setting(name, value) for name, value in default.items() if name not in NOT_SETTINGS
    }
    return Nested(lambda settings: kinds)


class _ModelType:
    """The type of a model that the library has."""

    def admit(self, value: object, evidence: Evidence) -> object:
        """Admit a string that the library lists. Raises NotAdmitted."""
        if not isinstance(value, str) or value not in _configurations():
            raise NotAdmitted("expected the type of a model of transformers")
        return value


class _TimmName:
    """The name of a model that timm has, which the adapter of timm would build, too."""

    def admit(self, value: object, evidence: Evidence) -> object:
        """Admit the names of timm's registry.

        Raises NotAdmitted for others, among them names of files, folders and repositories.
        """
        if not isinstance(value, str) or not is_timm_model(value):
            raise NotAdmitted("expected the name of a model of timm")
        return value


_TYPES = _ModelType()


def _arguments_by_type(settings: Mapping[str, object]) -> Mapping[str, ArgumentKind]:
    model_type = settings.get("model_type")
    if not isinstance(model_type, str) or model_type not in _configurations():
        raise NotAdmitted("expected a `model_type` that transformers has")
    if model_type in _TIMM_TYPES:
        return _TIMM_BACKBONE
    return {**config_arguments(_configurations()[model_type]), "model_type": _TYPES}


_TIMM_BACKBONE: Mapping[str, ArgumentKind] = {
    "model_type": _TYPES,
    "backbone": _TimmName(),
    "architecture": _TimmName(),
    "num_channels": Width(),
    "features_only": Flag(),
    "freeze_batch_norm_2d": Flag(),
    "out_indices": Pixels(),
    "out_features": _STAGES,
    "stage_names": _STAGES,
    "output_stride": Pixels(),
    "use_timm_backbone": Flag(),
    "num_labels": Width(),
    "initializer_range": Number(),
}


def _configurations() -> Mapping[str, Any]:
    auto = importlib.import_module("transformers.models.auto.configuration_auto")
    configurations: Mapping[str, Any] = auto.CONFIG_MAPPING
    return configurations


def import_library() -> Any:
    """Return the package `transformers`. Raises ArchitectureError where it cannot be imported."""
    try:
        return importlib.import_module("transformers")
    except Exception as error:
        raise ArchitectureError(
            "this architecture is one of transformers, which cannot be imported "
            f"({type(error).__name__}: {error}). "
            "Install it: pip install 'ckpt-tools[transformers]'."
        ) from error


@contextlib.contextmanager
def forbid_hub_and_remote_code() -> Iterator[None]:
    """Let transformers neither reach the Hub nor run code that comes with a model.

    The Hub's client refuses every request, also where a configuration asks for another model's.
    Classes that build others by a configuration (`AutoBackbone.from_config`) decide by
    `resolve_trust_remote_code`, which would ask at the terminal; here its answer is
    `trust_remote_code=False`.
    """
    hub: Any = importlib.import_module("huggingface_hub.constants")
    factory: Any = importlib.import_module("transformers.models.auto.auto_factory")
    was_offline, resolve = hub.HF_HUB_OFFLINE, factory.resolve_trust_remote_code
    hub.HF_HUB_OFFLINE, factory.resolve_trust_remote_code = True, _refuse_remote_code
    try:
        yield
    finally:
        hub.HF_HUB_OFFLINE, factory.resolve_trust_remote_code = was_offline, resolve


def _refuse_remote_code(trust_remote_code: object, *arguments: object, **settings: object) -> bool:
    return False
