"""The shape of a model's input, where nobody has given data: read from the model, or found by trials.

A trial is a forward of two samples on a copy of the model, on meta tensors: it takes neither memory nor time
for arithmetic, and it fails where a real one would fail because of shapes.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.utils import _pytree as pytree

from ckpt_tools.errors import UsageError, is_short_of_memory
from ckpt_tools.model.calling import device_of, force_eager, unwrap_model
from ckpt_tools.model.model_copy import copy_model, set_mode
from ckpt_tools.model.preserving import preserve_models

__all__ = ["infer_input_shape", "needs_integer_inputs"]

# Usual sides of images, the most usual first. 224 also stands first because of networks that take any size.
_SIDES = (224, 32, 64, 28, 96, 128, 299, 256, 384, 16, 8, 48, 112, 160, 192, 512)
_LENGTHS = (224, 32, 64, 128, 256, 512, 1024, 100, 1000, 4096, 16000, 16, 8)
_RECURRENT_LENGTHS = (32, 16, 64, 100, 128)  # on meta tensors, too, every step takes its time
_VOLUMES = ((16, 112, 112), (32, 32, 32), (16, 16, 16), (64, 64, 64), (8, 8, 8), (8, 32, 32), (16, 224, 224))
_TOKENS = ((16,), (64,), (128,), (1,), (2,), (4,), (8,), (32,), (77,), (256,), (512,))

# Networks that shrink an image by 16 or more (ResNet, VGG, DenseNet: 32) were made for images of ImageNet's
# size. Those that shrink it less (the ResNets of CIFAR: 4) would get maps of 56×56 from it, which costs time
# and which they never saw in training.
_SIDE_OF_LARGE_NETWORKS, _SIDE_OF_SMALL_NETWORKS = 224, 32
_LARGE_REDUCTION = 16
_MIN_SIDE_OF_MAPS = 4  # the last BN layer of a small network sees at least 4×4 points

_MAX_WEIGHT_LAYERS = 4  # of different input shapes that are tried: the first registered may not run first


def infer_input_shape(model: nn.Module) -> tuple[int, ...]:
    """Return the shape of one sample, without the batch dimension, that ``model`` takes.

    It is what the model says itself: timm's ``pretrained_cfg``, Lightning's ``example_input_array``. Else it
    follows from the input features of its first weight layer, with usual sizes for all further dimensions,
    and is a shape with which a forward of two samples gives an output of two rows. Networks that take images
    of any size get 224×224 if they shrink them by 16 or more, else 32×32.

    The model is left as it was.

    Raises:
        UsageError: the model takes token ids or other integers, or several inputs, or no shape works. The
            message says to give data, or the argument ``input_shape``.
    """
    model = unwrap_model(model)
    name = type(model).__name__
    arguments = _required_arguments(model)
    if len(arguments) > 1:
        raise UsageError(
            f"{name}: expected a model with one input, but its forward needs {', '.join(arguments)}. "
            "Give batches of real data."
        )
    with preserve_models(model):
        trials = _Trials(model)
        for shape in _recorded_shapes(model):
            if trials.works(shape):
                return shape
        working_shape = _first_working_shape(trials, model)
        if working_shape is not None:
            return working_shape
        reason = trials.first_error or "it has no linear layer or convolution to read it from"
        if trials.take_integers():
            raise UsageError(
                f"{name}: it takes integers, such as token ids, and random ones would be no text. "
                "It needs real data: give batches of it."
            )
    raise UsageError(
        f"{name}: the shape of its input is not known, and no usual shape works: {reason}. "
        "Give the shape of one sample, for example input_shape=(3, 224, 224), or batches of real data."
    )


def needs_integer_inputs(model: nn.Module) -> bool:
    """Return whether the model takes integers only: its first operation is an embedding, say.

    That is so if a forward with integers works where one with floats of the same shape fails. The model is
    left as it was.
    """
    model = unwrap_model(model)
    with preserve_models(model):
        return _Trials(model).take_integers()


# Models that decide by values cannot run on meta tensors. A real forward of 224×224 may take seconds.
_MAX_REAL_RUNS = 8


@dataclass(frozen=True)
class _Forward:
    """What a trial has shown.

    ``map_sides`` are the sides of the maps of the last BN or convolution layer. Where a network was dilated
    for segmentation, ``max_dilation`` stands for the strides that were taken out.
    """

    map_sides: tuple[int, ...]
    max_dilation: int


class _Trials:
    """Forwards of two samples on copies of a model, in evaluation mode."""

    def __init__(self, model: nn.Module) -> None:
        self.first_error = ""
        self._model = model
        self._twins: dict[bool, nn.Module] = {}  # on the meta device (True), and with values (False)
        self._real_runs = 0
        floats = (tensor.dtype for tensor in model.parameters() if tensor.is_floating_point())
        self._dtype = next(floats, torch.float32)

    def works(self, shape: tuple[int, ...]) -> bool:
        """Return whether the model takes float samples of this shape."""
        return self.run(shape) is not None

    def run(self, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> _Forward | None:
        """Run a forward; None if it fails, or if its output has no row for each of the two samples."""
        result = self._run(shape, dtype or self._dtype, meta=True)
        if isinstance(result, Exception) and _concerns_meta(result) and self._real_runs < _MAX_REAL_RUNS:
            self._real_runs += 1
            result = self._run(shape, dtype or self._dtype, meta=False)
        if isinstance(result, Exception):
            self.first_error = self.first_error or f"with {shape}, {_describe_error(result)}"
            return None
        return result

    def take_integers(self) -> bool:
        """Return whether integers work where floats of the same shape fail."""
        return any(not self.works(shape) and self.run(shape, torch.int64) is not None for shape in _TOKENS)

    def _run(self, shape: tuple[int, ...], dtype: torch.dtype, *, meta: bool) -> _Forward | Exception:
        device = torch.device("meta") if meta else device_of(self._model)
        batch = torch.ones(2, *shape, dtype=dtype, device=device)
        with ExitStack() as stack:
            stack.enter_context(warnings.catch_warnings(action="ignore"))
            stack.enter_context(torch.no_grad())
            stack.enter_context(force_eager())
            try:
                twin = self._twin(meta)
                sides = _record_map_sides(twin, stack)
                output = twin(batch)
            except Exception as error:  # whatever a model raises for a shape that it does not take
                if is_short_of_memory(error):
                    raise
                return error
        rows = _count_rows(output)
        if rows not in (None, 2):
            if not meta:
                self._real_runs = _MAX_REAL_RUNS  # it takes such samples, so further sizes tell no more
            return ValueError(f"two samples of shape {shape} give {rows} rows of output")
        dilations = [max(module.dilation) for module in twin.modules() if isinstance(module, _ConvNd)]
        return _Forward(tuple(sides), max(dilations, default=1))

    def _twin(self, meta: bool) -> nn.Module:
        if meta not in self._twins:
            self._twins[meta] = copy_model(self._model, meta=meta)
            set_mode(self._twins[meta], "evaluation")
        return self._twins[meta]


def _concerns_meta(error: Exception) -> bool:
    """Return whether a forward failed because meta tensors have no values, or met tensors of the CPU."""
    return isinstance(error, NotImplementedError) or "meta" in str(error).lower() or "item()" in str(error)


def _record_map_sides(model: nn.Module, stack: ExitStack) -> list[int]:
    """Record the sides of the maps that the last BN layer gives; of the last convolution without BN.

    The convolutions of squeeze-and-excitation blocks see one point of each channel, so that BN layers tell
    more about the size of maps.
    """
    sides: list[int] = []
    modules = list(model.modules())
    kind = _BatchNorm if any(isinstance(module, _BatchNorm) for module in modules) else _ConvNd
    layers = [module for module in modules if isinstance(module, kind)]

    def record(module: nn.Module, inputs: object, output: object) -> None:
        if isinstance(output, Tensor) and output.ndim > 2:
            sides[:] = output.shape[2:]

    for layer in layers:
        stack.callback(layer.register_forward_hook(record).remove)
    return sides


def _count_rows(output: object) -> int | None:
    """Return the length of the first tensor in a model's output; None if there is none with rows."""
    if isinstance(output, (list, tuple)) and any(isinstance(item, Mapping) for item in output):
        return len(output)  # detection models return a dict for each image
    # pytree knows no other mappings than dict, such as the outputs of transformers.
    for leaf in pytree.tree_leaves(dict(output) if isinstance(output, Mapping) else output):
        if isinstance(leaf, Tensor) and leaf.ndim:
            return len(leaf)
    return None


def _required_arguments(model: nn.Module) -> list[str]:
    """Return the arguments of ``forward`` that have no default value."""
    try:
        parameters = inspect.signature(model.forward).parameters.values()
    except (TypeError, ValueError):  # compiled or built-in functions have none
        return []
    optional = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [item.name for item in parameters if item.default is item.empty and item.kind not in optional]


def _recorded_shapes(model: nn.Module) -> Iterator[tuple[int, ...]]:
    """Yield the shapes that a model says its input has.

    Raises UsageError if its example is no single tensor of floats.
    """
    for attribute in ("pretrained_cfg", "default_cfg"):  # of timm
        settings = getattr(model, attribute, None)
        if isinstance(settings, Mapping) and _is_shape(settings.get("input_size")):
            shape = tuple(settings["input_size"])
            yield shape
            # The settings are those of the weights that timm offers. A model with in_chans=1 has them, too.
            for channels in _first_channels(model):
                yield (channels, *shape[1:])
    example = getattr(model, "example_input_array", None)  # of Lightning
    if isinstance(example, Sequence) and len(example) == 1:
        example = example[0]
    if isinstance(example, Tensor) and example.is_floating_point() and example.ndim > 1:
        yield tuple(example.shape[1:])
    elif example is not None:
        raise UsageError(
            f"{type(model).__name__}: its example_input_array is {_describe(example)}; expected a tensor of "
            "floats (N, …). It needs real data: give batches of it."
        )


def _is_shape(value: object) -> bool:
    return isinstance(value, (tuple, list)) and all(isinstance(side, int) and side > 0 for side in value)


def _first_channels(model: nn.Module) -> list[int]:
    """Return the input channels of the convolution that was registered first; [] without any."""
    return [module.in_channels for module in model.modules() if isinstance(module, _ConvNd)][:1]


def _describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor {tuple(value.shape)} of {str(value.dtype).removeprefix('torch.')}"
    return f"of type {type(value).__name__} with several values"


def _first_working_shape(trials: _Trials, model: nn.Module) -> tuple[int, ...] | None:
    """Return the first usual shape that works; None if none does."""
    for layer in _first_weight_layers(model):
        if isinstance(layer, (nn.Embedding, nn.EmbeddingBag)):
            if trials.take_integers():
                return None
            continue
        for shape in _usual_shapes(layer):
            forward = trials.run(shape)
            if forward is not None:
                return _shrink_images(trials, shape, forward)
        if isinstance(layer, nn.RNNBase):
            # It takes a batch of the vectors that a later layer takes for one sequence of vectors.
            return None
    return None


def _first_weight_layers(model: nn.Module) -> list[nn.Module]:
    """Return the first layers with weights in the order of registration, one for each input shape."""
    layers: dict[object, nn.Module] = {}
    for module in model.modules():
        if isinstance(module, nn.Linear):
            layers.setdefault(("linear", module.in_features), module)
        elif isinstance(module, _ConvNd):
            layers.setdefault((len(module.kernel_size), module.in_channels), module)
        elif isinstance(module, nn.RNNBase):
            layers.setdefault("recurrent", module)
        elif isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            layers.setdefault("embedding", module)
    return list(layers.values())[:_MAX_WEIGHT_LAYERS]


def _usual_shapes(layer: nn.Module) -> list[tuple[int, ...]]:
    """Return the shapes of samples to try for a model that begins with this layer."""
    if isinstance(layer, nn.Linear):
        return [(layer.in_features,)]
    if isinstance(layer, nn.RNNBase):
        # Where the batch is the second dimension, no shape of a sample stands behind the first.
        return [(length, layer.input_size) for length in _RECURRENT_LENGTHS] if layer.batch_first else []
    assert isinstance(layer, _ConvNd)
    match len(layer.kernel_size):
        case 1:
            sizes: list[tuple[int, ...]] = [(length,) for length in _LENGTHS]
        case 2:
            sizes = [(side, side) for side in _SIDES]
        case _:
            sizes = list(_VOLUMES)
    return [(layer.in_channels, *size) for size in sizes]


def _shrink_images(trials: _Trials, shape: tuple[int, ...], forward: _Forward) -> tuple[int, ...]:
    """Return a smaller shape of images for a network that takes any size and shrinks them little."""
    if shape[1:] != (_SIDE_OF_LARGE_NETWORKS, _SIDE_OF_LARGE_NETWORKS):
        return shape
    reduction = math.inf
    if len(forward.map_sides) == 2:
        reduction = _SIDE_OF_LARGE_NETWORKS / min(forward.map_sides) * forward.max_dilation
    if reduction >= _LARGE_REDUCTION:
        return shape
    smaller = (shape[0], _SIDE_OF_SMALL_NETWORKS, _SIDE_OF_SMALL_NETWORKS)
    forward_of_smaller = trials.run(smaller)
    if forward_of_smaller is None or min(forward_of_smaller.map_sides, default=0) < _MIN_SIDE_OF_MAPS:
        return shape
    return smaller


def _describe_error(error: Exception) -> str:
    first_line = (str(error).strip().splitlines() or ["no message"])[0]
    return f"{type(error).__name__}: {first_line.rstrip('.')}"
