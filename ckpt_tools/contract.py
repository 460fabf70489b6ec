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
    """A state dict as it stands in a file, and the other things that the file says about the model.

    ``tensors`` maps plain keys (wrapper prefixes such as ``module.`` removed) to CPU tensors in
    file order.
    """

    path: Path
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

    @property
    def rates(self) -> Rates:
        """Where the drop rates are known from: the user, the checkpoint, the model, or nobody.

        It decides which layers ``auto`` rewrites.
        """
        return self.recipe.rates


@dataclass(frozen=True)
class DropoutSite:
    """A place that injects noise in training. ``rate`` is PyTorch's p, None where no number can be read."""

    name: str
    op: str
    rate: float | None

    @property
    def active(self) -> bool:
        """Whether the site does anything in training as the model stands."""
        return self.rate != 0.0


@dataclass(frozen=True)
class BatchNormLayer:
    """A BN layer with running statistics. ``aliases`` are further names of the same module."""

    name: str
    kind: str
    channels: int
    reached: bool
    downstream_of: tuple[str, ...] = ()
    potentially_downstream_of: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True)
class LeftAlone:
    """A normalisation layer that this tool does not touch, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Geometry:
    """How a weight maps its input to its units.

    A linear weight has shape (units, fan-in), or (blocks, units, fan-in) for a batch of them; a convolution
    (units, inputs / groups, *kernel); a transposed convolution (inputs, units / groups, *kernel).
    ``stride`` and ``dilation`` are those of a transposed convolution: they say which kernel taps meet in one output.
    """

    kind: WeightKind = "linear"
    groups: int = 1
    stride: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()


@dataclass(frozen=True)
class WeightLayer:
    """A weight that the forward multiplies activations with, by linear map or convolution.

    ``parameter`` is its key in the state dict, ``name`` the key without ``.weight``. ``inputs`` and ``consumers`` are
    the parameters of the nearest weight layers before and behind it.
    """

    name: str
    parameter: str
    kind: WeightKind
    shape: tuple[int, ...]
    inputs: tuple[str, ...] = ()
    consumers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Walk:
    """What one recorded forward tells: BN layers in execution order, dropout sites, and what lies behind what."""

    batch_norms: tuple[BatchNormLayer, ...]
    dropout_sites: tuple[DropoutSite, ...]
    weights: tuple[WeightLayer, ...] = ()
    left_alone: tuple[LeftAlone, ...] = ()
    device: str = "meta"  # where the recorded forward ran: "meta" or "cpu" (for real)
    containers_trained: bool = True  # False: only leaf modules ran in training mode, other noise was not seen
    bytes_per_sample: int = 0  # peak of the live activations of an evaluation forward, float32


@dataclass(frozen=True)
class Spread:
    """Summary over the channels of a layer."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class LayerResult:
    """What became of one BN layer. ``ratio`` is stored variance / new variance; None if it was not measured.

    ``error`` is the relative standard error of the new variance, from how images and whole batches scatter.
    """

    name: str
    channels: int
    rewritten: bool
    reason: str
    downstream_of: tuple[str, ...] = ()
    control: bool = False
    ratio: Spread | None = None
    error: Spread | None = None


@dataclass(frozen=True)
class Controls:
    """Layers that no dropout reaches: their variance on the right data is the stored one.

    ``deviation``: median over the channels of the first three control layers of |ln(stored / measured)|; ``worst``: the
    largest median of a layer; ``shift``: median of |measured − running mean| in standard deviations.
    ``verdict``: "agree", "disagree", or "none" where no layer can serve.
    """

    names: tuple[str, ...]
    deviation: float | None
    worst: float | None
    shift: float | None
    verdict: Literal["agree", "disagree", "none"]
    reason: str = ""


@dataclass(frozen=True)
class Outlier:
    """A sample that was left out.

    ``leverage``: its mean square in units of the median sample's, of the input or of the distance from a BN layer's
    running mean (geometric mean over channels), whichever is largest; ``where`` is "input" or that layer. None where
    nothing could be measured. ``reason``: "extreme"; "blank", one colour all over; "not finite", NaN or infinity.
    """

    name: str
    reason: OutlierReason
    leverage: float | None
    where: str


@dataclass(frozen=True)
class Reestimation:
    """The outcome of a re-estimation: what was rewritten, why, and how sure the numbers are."""

    layers: tuple[LayerResult, ...]
    controls: Controls
    why: str
    estimator: Estimator
    statistics: Statistics
    images: int
    batches: int
    passes: int
    residual: float | None  # of `exact`: largest relative change in the last pass
    stopped_early: bool
    seconds: float
    device: str
    left_alone: tuple[LeftAlone, ...] = ()
    processes: int = 1  # that shared the batches
    cut_to: int | None = None  # samples at a time, where memory was too short for whole batches
    precision: Precision = "fp32"
    deviation: Spread | None = None  # of the variances on the first images from those in fp32, for other precisions
    outliers: tuple[Outlier, ...] = ()  # samples that were left out, in the order in which they were met
    common: tuple[OutlierReason, ...] = ()  # what over 1 % of the samples look like: no outliers, they counted

    @property
    def rewritten(self) -> tuple[LayerResult, ...]:
        """The layers whose running variance changed hands."""
        return tuple(layer for layer in self.layers if layer.rewritten)
