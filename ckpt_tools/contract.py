"""The data that passes between the floors, and the Protocol that adapters satisfy.

Importing this module imports no torch; tensors and modules appear in annotations only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

if TYPE_CHECKING:
    from torch import Tensor, nn

Estimator = Literal["pooled", "exact", "ema"]
LayerChoice = Literal["auto", "downstream", "all"]
Statistics = Literal["variance", "mean+variance"]
Precision = Literal["fp32", "tf32", "bf16", "fp16"]
Rates = Literal["given", "recorded", "model", "unknown"]
RecognisedBy = Literal["user", "checkpoint", "module", "shapes", "shapes without head", "data", "file name"]
WeightKind = Literal["linear", "convolution", "transposed convolution"]
Scheme = Literal["hypersphere", "orthonormal", "uniform", "normal"]
InitRule = Literal["paper", "propagated"]
BackwardTerm = Literal["auto", "on", "off"]
BackwardFactor = Literal["paper", "inverted"]
OutlierReason = Literal["extreme", "blank", "not finite"]


@dataclass(frozen=True)
class Checkpoint:
    """A state dict as it stands in a file, and what else the file says about the model.

    ``tensors`` maps plain keys (wrapper prefixes such as ``module.`` removed) to CPU tensors in file order.
    """

    path: Path  # of the file or folder on this machine
    format: str
    tensors: Mapping[str, Tensor]
    weights: str = ""  # where in the file the state dict stood, "" for the top level
    prefix: str = ""  # what was removed in front of every key
    words: Mapping[str, object] = field(default_factory=dict)  # "arch", "args", …: everything that is no tensor
    metadata: Mapping[str, str] = field(default_factory=dict)  # of a safetensors file
    left_out: tuple[str, ...] = ()  # entries of the file that belong to no state dict, and odd ones in it
    module: nn.Module | None = None  # the model itself, where a trusted pickle held a whole one
    url: str = ""  # of which ``path`` is a copy, without credentials; "" for a file of this machine

    @property
    def shown_path(self) -> str:
        """What messages and reports call the checkpoint: its URL, or its path."""
        return self.url or str(self.path)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor by key."""
        return {key: tuple(tensor.shape) for key, tensor in self.tensors.items()}


@dataclass(frozen=True)
class InputSpec:
    """What a model eats: one sample's shape, and how an image becomes one (its evaluation transform)."""

    shape: tuple[int, ...]
    mean: tuple[float, ...] = ()  # per channel, on the scale 0–1; empty: pixels are only divided by 255
    std: tuple[float, ...] = ()
    interpolation: str = "bilinear"
    crop_pct: float = 1.0  # side of the centre crop / shorter side of the resized image
    crop_mode: str = "center"  # "center", "squash" (aspect ratio not kept) or "border" (padded), as in timm
    origin: str = "assumed"  # who said so


@dataclass(frozen=True)
class Recipe:
    """How to build one architecture: ``adapter:name`` with keyword arguments."""

    adapter: str
    name: str
    kwargs: Mapping[str, object] = field(default_factory=dict)
    rates: Rates = "unknown"  # "recorded" when the kwargs tell the drop rates of the training run

    @property
    def architecture(self) -> str:
        """The name as the user writes it after ``--arch``."""
        return self.name if self.adapter == "factory" else f"{self.adapter}:{self.name}"


@runtime_checkable
class Adapter(Protocol):
    """Builds the models of one library. Registered as an entry point of group ``ckpt_tools.adapters``.

    An adapter is made without arguments and holds no state. Every method may import its library.

    An adapter may also have ``file_arguments(name) -> Mapping[str, ArgumentKind]``: the constructor arguments that a
    checkpoint file may set, each with a kind of ``ckpt_tools.file_arguments`` that bounds its values. Without it a
    file may set drop rates alone; class counts and input channels follow from the shapes.
    """

    prefix: str
    """The word before the colon in ``--arch prefix:name``."""

    def architectures(self) -> Sequence[str]:
        """All names it can build, sorted; empty if they cannot be listed."""
        ...

    def recognise(self, words: Mapping[str, object]) -> Recipe | None:
        """The recipe that a checkpoint's own words describe, or None if they are not this library's."""
        ...

    def build(self, name: str, kwargs: Mapping[str, object]) -> nn.Module:
        """A new model with the library's own initialisation. Raises ArchitectureError."""
        ...

    def class_kwargs(
        self, shapes: Mapping[str, tuple[int, ...]], name: str, kwargs: Mapping[str, object]
    ) -> dict[str, object]:
        """Keyword arguments that follow from a state dict's shapes, given the others: class count, input channels."""
        ...

    def rate_kwargs(self, name: str) -> tuple[str, ...]:
        """Keyword arguments that are drop rates, among them those that bring hidden dropout sites to life."""
        ...

    def input_spec(self, model: nn.Module, name: str, words: Mapping[str, object]) -> InputSpec | None:
        """Input shape and preprocessing, the checkpoint's words before the library's; None if unknown."""
        ...


@dataclass(frozen=True)
class LoadedModel:
    """A checkpoint in the model it belongs to.

    ``model`` is on the CPU in float32 and evaluation mode. ``probe`` is the same architecture with every
    drop rate above zero and without weights (on the meta device where that works): the walker reads from it
    which BN layers dropout *could* reach. It is None where no rate is known to be hidden. ``recognised_by`` says
    who told the architecture.
    """

    model: nn.Module
    checkpoint: Checkpoint | None
    recipe: Recipe
    input_spec: InputSpec | None
    probe: nn.Module | None = None
    recognised_by: RecognisedBy = "user"
    twins: tuple[str, ...] = ()  # further architectures that compute the same function with these weights
    as_built: tuple[str, ...] = ()  # attributes ("fc.") that the checkpoint fills with a head of its own, or not at all

    @property
    def rates(self) -> Rates:
        """Who knows the drop rates: the user, the checkpoint, or nobody."""
        return self.recipe.rates
