"""What the Python API returns.

The sites, layers and numbers of a walk and of a re-estimation, as frozen data.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ckpt_tools.contract import Estimator, OutlierReason, Precision, Statistics, VerdictLevel, WeightKind


@dataclass(frozen=True)
class DropoutSite:
    """An operation that injects noise in training.

    ``rate`` is PyTorch's p, None where no number can be read.
    """

    name: str
    op: str
    rate: float | None

    @property
    def active(self) -> bool:
        """Whether the site changes its input in training, as the model is configured."""
        return self.rate != 0.0


@dataclass(frozen=True)
class DeclaredDropout:
    """Dropout on the output of a module, or on its input, that the user says the training had.

    ``pattern`` is what the user called it by.
    """

    module: str
    rate: float
    on_input: bool = False
    pattern: str = ""


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
    """A normalisation layer that this tool does not change, and the reason."""

    name: str
    reason: str


@dataclass(frozen=True)
class Geometry:
    """How a weight maps its input to its units: its output channels or features.

    A linear weight has shape (units, fan-in), or (blocks, units, fan-in) for a batch of them; a convolution
    (units, inputs / groups, *kernel); a transposed convolution (inputs, units / groups, *kernel).
    ``stride`` and ``dilation`` are those of a transposed convolution: they say which kernel taps
    meet in one output.
    """

    kind: WeightKind = "linear"
    groups: int = 1
    stride: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()


@dataclass(frozen=True)
class WeightLayer:
    """A weight by which the forward pass multiplies activations, in a linear map or a convolution.

    ``parameter`` is its key in the state dict, ``name`` the key without ``.weight``. ``inputs`` and
    ``consumers`` are the parameters of the nearest weight layers before and behind it.
    """

    name: str
    parameter: str
    kind: WeightKind
    shape: tuple[int, ...]
    inputs: tuple[str, ...] = ()
    consumers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Walk:
    """The record of one forward pass.

    It has the BN layers in execution order, the dropout sites, and which layers lie behind which sites.
    """

    batch_norms: tuple[BatchNormLayer, ...]
    dropout_sites: tuple[DropoutSite, ...]
    weights: tuple[WeightLayer, ...] = ()
    left_alone: tuple[LeftAlone, ...] = ()
    device: str = "meta"  # where the recorded forward ran: "meta" or "cpu" (for real)
    containers_trained: bool = True  # False: only leaf modules ran in training mode, other noise was not seen
    declared_dropout: tuple[DeclaredDropout, ...] = ()  # which the model does not have itself
    bytes_per_sample: int = 0  # peak of the live activations of an evaluation forward, float32


@dataclass(frozen=True)
class Spread:
    """Median, minimum and maximum over the channels of a layer."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Measured(Spread):
    """A quantity of each channel of a layer, with the standard error of the median channel's."""

    error: float


@dataclass(frozen=True)
class LayerResult:
    """The result for one BN layer; what was not measured is None.

    Attributes:
        ratio: stored variance / new variance.
        error: relative standard error of the new variance, from how images and whole batches
            scatter.
        mismatch: stored variance / variance under training conditions. It is 1 if the data is
            distributed as it was in training.
        dropout_shift: variance under training conditions / under test conditions, which is what
            dropout adds.
    """

    name: str
    channels: int
    rewritten: bool
    reason: str
    downstream_of: tuple[str, ...] = ()
    control: bool = False
    ratio: Spread | None = None
    error: Spread | None = None
    mismatch: Measured | None = None
    dropout_shift: Measured | None = None


@dataclass(frozen=True)
class Verdict:
    """Whether data looks like the training data, from the mismatch of all layers.

    Attributes:
        level: "agree"; "doubt", where something differs that training may explain; "refuse", where
            another preprocessing explains the data, and the given one does not; "none" where nobody
            can tell.
        reason: what was seen, with every number that decided, in a sentence.
        score: how far the inputs of the layers are from the stored statistics beyond what sampling
            explains, in standard deviations: 0 is perfect.
        limit: the largest score of an agreement.
        images: how many samples were compared.
    """

    level: VerdictLevel
    reason: str
    score: float | None = None
    limit: float | None = None
    images: int = 0


@dataclass(frozen=True)
class Effect:
    """What a correction changes in the outputs of a model, on inputs without labels.

    For a classifier ``changed`` is the share of predictions that differ, and the confidences are
    the mean probabilities of the predicted class. For other outputs these are None, and
    ``relative_change`` is the root mean square change in units of the outputs' root mean square.
    """

    images: int
    changed: float | None
    confidence_before: float | None
    confidence_after: float | None
    relative_change: float


@dataclass(frozen=True)
class Controls:
    """Layers that no dropout reaches: their variance on the right data is the stored one.

    Attributes:
        names: the layers that were compared.
        deviation: |ln(stored / measured)|, median over the channels of the first three layers.
        worst: the largest median of a layer.
        shift: |measured − running mean| in standard deviations, median over the channels of the
            first three layers.
        verdict: "agree"; "doubt", where some layer moved by more than sampling explains;
            "disagree", where these cannot be the training data; "none", where no layer can serve.
        reason: what was seen, in a sentence, unless the layers agree.
        worst_layer: that layer, and ``worst_ratio`` its stored variance / measured variance.
    """

    names: tuple[str, ...]
    deviation: float | None
    worst: float | None
    shift: float | None
    verdict: Literal["agree", "doubt", "disagree", "none"]
    reason: str = ""
    worst_layer: str | None = None
    worst_ratio: Measured | None = None


@dataclass(frozen=True)
class Outlier:
    """A sample that stands out, and that was left out.

    ``leverage``: its mean square in units of the median sample's, of the input or of the distance
    from a BN layer's running mean (geometric mean over channels), whichever is largest; ``where``
    is "input" or that layer. None where nothing could be measured. ``reason``: "extreme"; "blank",
    one colour all over; "not finite", NaN or infinity. ``whole_batch``: its batch could not be cut,
    because its rows are not known to be independent samples, and stayed or went as a whole.
    """

    name: str
    reason: OutlierReason
    leverage: float | None
    where: str
    whole_batch: bool = False


@dataclass(frozen=True)
class BatchSpread:
    """Whether the batches of a pass are more unlike each other than batches of independent samples.

    Attributes:
        ratio: how far the sums of the batches scatter in the input of ``layer``, the one where it
            shows most, in units of what independent samples would give: 1 where data is shuffled.
        layer: its name.
        batches: how many were compared.
        unlike: whether the ratio is beyond chance. Then each batch shows only a part of the
            variance, as in class-sorted data or video frames in order, and the data is to be shuffled.
    """

    ratio: float
    layer: str
    batches: int
    unlike: bool


@dataclass(frozen=True)
class Reestimation:
    """The outcome of a re-estimation: what was rewritten, why, and how precise the numbers are."""

    layers: tuple[LayerResult, ...]
    controls: Controls
    why: str
    estimator: Estimator  # the one that was used, never "auto"
    statistics: Statistics
    images: int
    batches: int
    passes: int
    residual: float | None  # of `exact`: largest relative change in the last pass
    stopped_early: bool
    seconds: float
    device: str
    estimator_reason: str = ""  # why this estimator, in a sentence
    verdict: Verdict | None = None  # None if the data was not compared with the stored statistics
    effect: Effect | None = None
    left_alone: tuple[LeftAlone, ...] = ()
    noise_left_on: tuple[DropoutSite, ...] = ()  # operations that drew random numbers with dropout off, too
    processes: int = 1  # that shared the batches
    cut_to: int | None = None  # samples at a time, where memory was too short for whole batches
    precision: Precision = "fp32"
    deviation: Spread | None = (
        None  # of the variances on the first images from those in fp32, for other precisions
    )
    outliers: tuple[Outlier, ...] = ()  # samples that were left out, in the order in which they were met
    batch_spread: BatchSpread | None = None  # None if it cannot be told, or the inputs were made up
    kept_outliers: tuple[Outlier, ...] = ()  # that count: too much would have been left out with them
    common: tuple[
        OutlierReason, ...
    ] = ()  # what over 1 % of the samples look like: no outliers, they counted

    @property
    def rewritten(self) -> tuple[LayerResult, ...]:
        """The layers whose running variance was rewritten."""
        return tuple(layer for layer in self.layers if layer.rewritten)

    def __repr__(self) -> str:
        """Return a line; ``summary`` says more."""
        data = f", data: {self.verdict.level}" if self.verdict else ""
        if self.noise_left_on:
            data += f", noise stayed on: {', '.join(site.op for site in self.noise_left_on[:3])}"
        unlike = ", the batches differ: shuffle" if self.batch_spread and self.batch_spread.unlike else ""
        return (
            f"<Reestimation: {len(self.rewritten)} of {len(self.layers)} BN layers, {self.estimator}, "
            f"{self.images:,} samples{data}{unlike}>"
        )

    def summary(self) -> str:
        """Return what was rewritten, why, and how precise it is, as a table and some sentences."""
        lines = [
            f"{len(self.rewritten)} of {len(self.layers)} BN layers rewritten from {self.images:,} samples "
            f"in {self.seconds:.1f} s ({self.estimator}): {self.why}",
            *_align(self._layer_rows()),
        ]
        if self.estimator_reason:
            lines.append(f"estimator: {self.estimator} ({self.estimator_reason})")
        if self.verdict is not None:
            lines.append(f"data: {self.verdict.level} ({self.verdict.reason})")
        reason = f" ({self.controls.reason})" if self.controls.reason else ""
        lines.append(f"controls: {self.controls.verdict}{reason}")
        if self.noise_left_on:
            sites = ", ".join(f"{site.name} ({site.op})" for site in self.noise_left_on)
            lines.append(f"noise that stayed on: {sites}")
        if self.batch_spread is not None and self.batch_spread.unlike:
            lines.append(
                f"batches: they differ {self.batch_spread.ratio:.1f} times as much as chance; shuffle them"
            )
        for outlier in self.kept_outliers[:3]:
            lines.append(f"outlier: {outlier.name} ({outlier.reason}) counts, as its batch cannot be cut")
        if self.effect is not None and self.effect.changed is not None:
            lines.append(f"effect: {self.effect.changed:.1%} of {self.effect.images} predictions change")
        return "\n".join(lines)

    def _layer_rows(self) -> list[tuple[str, ...]]:
        rows: list[tuple[str, ...]] = [
            ("layer", "stored/new variance", "standard error", "mismatch", "dropout shift")
        ]
        for layer in self.rewritten:
            ratio = "" if layer.ratio is None else f"{layer.ratio.median:.3f}"
            error = "" if layer.error is None else f"{layer.error.median:.1%}"
            paired = (_measured_text(layer.mismatch), _measured_text(layer.dropout_shift))
            rows.append((layer.name or "(root)", ratio, error, *paired))
        return rows


def _measured_text(value: Measured | None) -> str:
    return "" if value is None else f"{value.median:.3f} ± {value.error:.3f}"


def _align(rows: list[tuple[str, ...]]) -> list[str]:
    """Return rows of cells as lines with aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
