"""The data that passes between the layers of the package, and the protocol that adapters satisfy.

Importing this module imports no torch; tensors and modules appear in annotations only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

if TYPE_CHECKING:
    from torch import Tensor, nn

Estimator = Literal["auto", "ratio", "pooled", "exact", "ema"]
LayerChoice = Literal["auto", "downstream", "all"]
Statistics = Literal["variance", "mean+variance"]
Precision = Literal["fp32", "tf32", "bf16", "fp16"]
Rates = Literal["given", "recorded", "estimated", "model", "unknown"]
RecognisedBy = Literal["user", "checkpoint", "module", "shapes", "shapes without head", "data", "file name"]
WeightKind = Literal["linear", "convolution", "transposed convolution"]
Scheme = Literal["hypersphere", "orthonormal", "uniform", "normal"]
InitRule = Literal["paper", "propagated"]
BackwardTerm = Literal["auto", "on", "off"]
BackwardFactor = Literal["paper", "inverted"]
OutlierReason = Literal["extreme", "blank", "not finite"]
Split = Literal["train", "test"]
VerdictLevel = Literal["agree", "doubt", "refuse", "none"]


@dataclass(frozen=True)
class Checkpoint:
    """A state dict as it stands in a file, and the other things that the file says about the model.

    ``tensors`` maps plain keys (wrapper prefixes such as ``module.`` removed) to CPU tensors in
    file order.
    """

    path: Path  # of the file or folder on this machine
    format: str
    tensors: Mapping[str, Tensor]
    weights: str = ""  # where in the file the state dict stood, "" for the top level
    prefix: str = ""  # text that was removed from the start of every key
    # Entries of the file without tensors: "arch", "args", …
    words: Mapping[str, object] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)  # of a safetensors file
    # Entries that belong to no state dict, and odd entries within it
    left_out: tuple[str, ...] = ()
    module: nn.Module | None = None  # the model itself, if a trusted pickle held a whole one
    # Where ``path`` was copied from, without credentials; "" for a file of this machine
    url: str = ""

    @property
    def shown_path(self) -> str:
        """The checkpoint's URL or path, as messages and reports name it."""
        return self.url or str(self.path)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor, by key."""
        return {key: tuple(tensor.shape) for key, tensor in self.tensors.items()}


@dataclass(frozen=True)
class InputSpec:
    """The input of a model: the shape of one sample, and the evaluation transform of images."""

    shape: tuple[int, ...]
    # Per channel, on the scale 0–1; empty: pixels are only divided by 255
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    interpolation: str = "bilinear"
    crop_pct: float = 1.0  # side of the centre crop / shorter side of the resized image
    # "center", "squash" (aspect ratio not kept) or "border" (padded), as in timm
    crop_mode: str = "center"
    origin: str = "assumed"  # where these values come from


@dataclass(frozen=True)
class Recipe:
    """How to build one architecture: ``adapter:name`` with keyword arguments."""

    adapter: str
    name: str
    kwargs: Mapping[str, object] = field(default_factory=dict)
    rates: Rates = "unknown"  # "recorded" if the kwargs hold the drop rates of the training run

    @property
    def architecture(self) -> str:
        """The name as the user writes it after ``--arch``.

        A factory has no prefix, since its own name has a colon already.
        """
        return self.name if self.adapter == "factory" else f"{self.adapter}:{self.name}"


@runtime_checkable
class Adapter(Protocol):
    """Builds the models of one library.

    It is registered as an entry point of the group ``ckpt_tools.adapters``.

    An adapter is created without arguments and holds no state. Every method may import its library.

    An adapter may also have ``file_arguments(name) -> Mapping[str, ArgumentKind]``: the constructor
    arguments that a checkpoint file may set, each with a kind of ``ckpt_tools.file_arguments`` that
    bounds its values. Without it a file may set drop rates alone; class counts and input channels
    follow from the shapes.
    """

    prefix: str
    """The word before the colon in ``--arch prefix:name``."""

    def architectures(self) -> Sequence[str]:
        """Return all names that it can build, sorted; none if they cannot be listed."""
        ...

    def recognise(self, words: Mapping[str, object]) -> Recipe | None:
        """Return the recipe in a checkpoint's words; None if they are another library's."""
        ...

    def build(self, name: str, kwargs: Mapping[str, object]) -> nn.Module:
        """Return a new model with the library's own initialisation. Raises ArchitectureError."""
        ...

    def class_kwargs(
        self, shapes: Mapping[str, tuple[int, ...]], name: str, kwargs: Mapping[str, object]
    ) -> dict[str, object]:
        """Return the arguments that follow from a state dict's shapes: classes, input channels.

        ``kwargs`` are the other keyword arguments of the architecture.
        """
        ...

    def rate_kwargs(self, name: str) -> tuple[str, ...]:
        """Return the names of the keyword arguments that are drop rates.

        Among them are those that add dropout sites which the default arguments leave out.
        """
        ...

    def input_spec(self, model: nn.Module, name: str, words: Mapping[str, object]) -> InputSpec | None:
        """Return input shape and preprocessing; None if they are unknown.

        The words of the checkpoint come before the defaults of the library.
        """
        ...


@dataclass(frozen=True)
class LoadedModel:
    """A checkpoint in the model that it belongs to.

    ``model`` is on the CPU, in float32 and in eval mode. ``probe`` is the same architecture with
    every drop rate above zero and without weights (on the meta device where that works): the walker
    reads from it which BN layers dropout *could* reach. It is None where no rate is known to be
    hidden. ``recognised_by`` says where the architecture is known from.
    """

    model: nn.Module
    checkpoint: Checkpoint | None
    recipe: Recipe
    input_spec: InputSpec | None
    probe: nn.Module | None = None
    recognised_by: RecognisedBy = "user"
    # Further architectures that compute the same function with these weights
    twins: tuple[str, ...] = ()
    # Attributes ("fc.") that the checkpoint fills with a head of its own, or not at all.
    as_built: tuple[str, ...] = ()
    # Rates of dropout that the user declares by patterns of names; the model itself has none there
    dropout: Mapping[str, float] = field(default_factory=dict)

    @property
    def rates(self) -> Rates:
        """Where the drop rates are known from: the user, the checkpoint, the stored statistics, the
        model, or nobody.

        It decides which layers ``auto`` rewrites.
        """
        return "given" if self.dropout and self.recipe.rates == "unknown" else self.recipe.rates
