"""What may have gone wrong on the way from an image to a model's input.

Each hypothesis is a change of the batch that would repair it. All usual preprocessings are
``(pixels − mean) / std`` on pixels in 0–1, with the channels in one of two orders. The pixels
behind a batch of images are known. Those behind preprocessed floats are guessed, and every guess
whose pixels lie in 0–1 is tried.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ckpt_tools.contract import InputSpec
from ckpt_tools.diagnosis.augmentations import BatchChange, resize_bilinear

# A hypothesis is believed if it lowers the score to this share of that of the data as given. Sizes
# need more: random crops in training look like larger, smoother images than those of evaluation.
MAX_SCALE_SCORE_RATIO = 0.65
MAX_SIZE_SCORE_RATIO = 0.4
# Distance in Fisher's metric. 256 photographs are up to 0.2 away from mean and deviation of all.
_SAMPLING_NOISE = 0.3

ChannelValues = tuple[float, ...]


@dataclass(frozen=True)
class Hypothesis:
    """One explanation of why the data does not agree with the stored statistics.

    Attributes:
        title: completes "the stored statistics fit …".
        advice: what the user should do if it is true.
        change: turns the batch as given, (N, C, …), into the batch that it should have been.
        max_ratio: it is believed if it brings the score below so many times the given one.
    """

    title: str
    advice: str
    change: BatchChange
    max_ratio: float


@dataclass(frozen=True)
class _Norm:
    """A preprocessing (pixels − mean) / std, with one value for each channel or one for all."""

    title: str
    mean: ChannelValues
    std: ChannelValues


# Models from Caffe take pixels of 0–255 less these means, which stand here on the scale of 0–1.
_CAFFE_MEAN = tuple(value / 255 for value in (123.675, 116.28, 103.53))
# Mean and standard deviation of pixels in 0–1, as the libraries that publish models give them.
_COLOUR = (
    _Norm("ImageNet's mean and standard deviation", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    _Norm("CIFAR-10's mean and standard deviation", (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    _Norm("CLIP's mean and standard deviation", (0.4815, 0.4578, 0.4082), (0.2686, 0.2613, 0.2758)),
    _Norm("pixels of 0–255 less Caffe's mean", _CAFFE_MEAN, (1 / 255,)),
)
_GREY = (_Norm("MNIST's mean and standard deviation", (0.1307,), (0.3081,)),)
_ANY = (
    _Norm("pixels of 0–1 as they are", (0.0,), (1.0,)),
    _Norm("pixels of 0–255 as they are", (0.0,), (1 / 255,)),
    _Norm("pixels of −1 to 1", (0.5,), (0.5,)),
)


@dataclass(frozen=True)
class _Affine:
    """The change ``scale · x + offset`` of a batch, for each channel. Both are (C,) float64."""

    scale: Tensor
    offset: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        shape = (1, -1, *[1] * (x.ndim - 2))
        return x * self.scale.to(x).reshape(shape) + self.offset.to(x).reshape(shape)

    def followed_by(self, other: _Affine) -> _Affine:
        """Return the change that makes this one first, and then the other."""
        return _Affine(self.scale * other.scale, self.offset * other.scale + other.offset)

    def inverse(self) -> _Affine:
        return _Affine(1 / self.scale, -self.offset / self.scale)

    def with_channels_reversed(self) -> _Affine:
        """Return the same change for a batch whose channels stand in reverse order."""
        return _Affine(self.scale.flip(0), self.offset.flip(0))

    def fisher_length(self) -> float:
        """Return how far this moves a standard normal distribution, averaged over channels.

        The distance is that of ``agreement``, in Fisher's metric.
        """
        return float((self.offset.square() + 2 * self.scale.log().square()).sqrt().mean())

    def is_close_to(self, other: _Affine) -> bool:
        """Tell whether both changes do the same, to a thousandth of what goes in."""
        close_scales = (self.scale / other.scale - 1).abs() < 1e-3
        tolerance = 1e-3 * self.scale.abs().clamp_min(1)
        close_offsets = (self.offset - other.offset).abs() < tolerance
        return bool((close_scales & close_offsets).all())


def _normalisation(mean: ChannelValues, std: ChannelValues, channels: int) -> _Affine:
    """Return (x − mean) / std as a change of a batch."""
    means = torch.tensor(mean, dtype=torch.float64).expand(channels)
    stds = torch.tensor(std, dtype=torch.float64).expand(channels)
    return _Affine(1 / stds, -means / stds)


def preprocessing_hypotheses(
    batch: Tensor, spec: InputSpec | None, *, preprocessed: bool
) -> list[Hypothesis]:
    """Return every usual preprocessing but the one in force, with both orders of the channels.

    Args:
        batch: (N, C, …), as it goes into the model.
        spec: the preprocessing in force; it is not read for preprocessed data.
        preprocessed: whether the batch holds samples just as they were stored.
    """
    channels = batch.shape[1]
    identity = _normalisation((0.0,), (1.0,), channels)
    tried: list[tuple[_Affine, bool]] = [(identity, False)]
    hypotheses: list[Hypothesis] = []
    orders = (False, True) if _is_coloured(batch) else (False,)
    for to_pixels in _changes_to_pixels(batch, spec, preprocessed=preprocessed):
        norms = [*_usual_norms(channels), *_norms_of_the_data(to_pixels, batch)]
        # The norm None changes nothing but the order of the channels.
        for swapped, norm in itertools.product(orders, [None, *norms]):
            target = to_pixels.inverse()
            if norm is not None:
                target = _normalisation(norm.mean, norm.std, channels)
            first = to_pixels.with_channels_reversed() if swapped else to_pixels
            change = first.followed_by(target)
            # Several ways to pixels lead to the same change.
            if any(change.is_close_to(other) and swapped == before for other, before in tried):
                continue
            tried.append((change, swapped))
            hypothesis = _hypothesis(norm, change, swapped=swapped, preprocessed=preprocessed)
            hypotheses.append(hypothesis)
    return hypotheses


def _usual_norms(channels: int) -> tuple[_Norm, ...]:
    if channels == 3:
        return (*_ANY, *_COLOUR)
    return (*_ANY, *_GREY) if channels == 1 else _ANY


def _changes_to_pixels(batch: Tensor, spec: InputSpec | None, *, preprocessed: bool) -> list[_Affine]:
    """Return the changes that may lead back to pixels in 0–1.

    For images that is the inverse of their preprocessing. For preprocessed data it is the inverse
    of every usual preprocessing after which the values would lie in 0–1.
    """
    channels = batch.shape[1]
    if not preprocessed and spec is not None:
        return [_normalisation(spec.mean or (0.0,), spec.std or (1.0,), channels).inverse()]
    values = _rows_by_channel(batch)
    low, high = values.amin(1), values.amax(1)
    changes = []
    # 255: the pixels were normalised without a division by 255 before it.
    for norm, white in itertools.product(_usual_norms(channels), (1, 255)):
        undo = _normalisation(norm.mean, norm.std, channels).inverse()
        undo = _Affine(undo.scale / white, undo.offset / white)
        darkest, brightest = undo.scale * low + undo.offset, undo.scale * high + undo.offset
        in_range = bool((darkest > -0.02).all()) and bool((brightest < 1.02).all())
        # Some pixels must be bright: anything of 0–1 divided by 255 would lie in 0–1, too.
        if in_range and bool((brightest > 0.3).any()):
            changes.append(undo)
    return changes or [_normalisation((0.0,), (1.0,), channels)]


def _rows_by_channel(batch: Tensor) -> Tensor:
    return batch.transpose(0, 1).reshape(batch.shape[1], -1).double()


def _norms_of_the_data(to_pixels: _Affine, batch: Tensor) -> list[_Norm]:
    """Return mean and deviation of these very images as a preprocessing.

    The result is empty if they are so near to those in force that any few images would differ as
    much.
    """
    norm = _norm_from_pixels(to_pixels(batch))
    change = to_pixels.followed_by(_normalisation(norm.mean, norm.std, batch.shape[1]))
    return [norm] if change.fisher_length() > _SAMPLING_NOISE else []


def _norm_from_pixels(pixels: Tensor) -> _Norm:
    rows = _rows_by_channel(pixels)
    # Features have one norm for all, because a constant one among them has no deviation.
    if pixels.ndim == 2 or pixels.shape[1] > 4:
        mean, std = rows.mean().reshape(1), rows.std().reshape(1)
    else:
        mean, std = rows.mean(1), rows.std(1)
    std = std.clamp_min(1e-6)  # a channel may be constant
    title = "the data's own mean and standard deviation"
    return _Norm(title, tuple(mean.tolist()), tuple(std.tolist()))


def _is_coloured(batch: Tensor) -> bool:
    # In grey images with three equal channels their order makes no difference.
    if batch.ndim < 4 or batch.shape[1] != 3:
        return False
    return float((batch[:, 0] - batch[:, 2]).abs().mean()) > 1e-3 * float(batch.abs().mean())


def _hypothesis(norm: _Norm | None, affine: _Affine, *, swapped: bool, preprocessed: bool) -> Hypothesis:
    change = _ChannelChange(affine, swapped)
    if norm is None:
        return Hypothesis(_BGR_TITLE, _BGR_ADVICE, change, MAX_SCALE_SCORE_RATIO)
    mean, std = (",".join(f"{value:.4g}" for value in values) for values in (norm.mean, norm.std))
    title, advice = norm.title, f"pass --mean {mean} --std {std}"
    if preprocessed:
        formula = "(pixels − mean) / std on pixels of 0–1"
        advice = f"save the data as {formula} with mean {mean} and std {std}"
    if swapped:
        title, advice = f"{title}, {_BGR_TITLE}", f"{advice}, and {_BGR_ADVICE}"
    return Hypothesis(title, advice, change, MAX_SCALE_SCORE_RATIO)


_BGR_TITLE = "the channels in reverse order (BGR)"
_BGR_ADVICE = "give the data as an array whose channels are reversed"


@dataclass(frozen=True)
class _ChannelChange:
    affine: _Affine
    swapped: bool

    def __call__(self, x: Tensor) -> Tensor:
        return self.affine(x.flip(1) if self.swapped else x)


def size_hypotheses(batch: Tensor, usual: tuple[int, ...] | None) -> list[Hypothesis]:
    """Return the hypotheses that the images had another size in training, or were smoother.

    The sizes are half, double, and that of ``usual``, the shape (C, H, W) that the architecture
    usually takes. Sizes below 8 pixels, and above four times the given one, are not tried. A batch
    that is not (N, C, H, W) has no hypotheses.
    """
    if batch.ndim != 4:
        return []
    height, width = batch.shape[2:]
    sizes = {(height // 2, width // 2), (height * 2, width * 2)}
    if usual is not None and len(usual) == 3:
        sizes.add((usual[1], usual[2]))
    hypotheses = [
        Hypothesis(
            f"images of {h}×{w} rather than {height}×{width}",
            f"pass --input-size {batch.shape[1]},{h},{w}",
            _Resize(h, w),
            MAX_SIZE_SCORE_RATIO,
        )
        for h, w in sorted(sizes - {(height, width)})
        if min(h, w) >= 8 and max(h, w) <= 4 * max(height, width)
    ]
    # Halving smaller images would leave next to nothing of them.
    if min(height, width) >= 16:
        advice = "resize with --interpolation bilinear, or start from larger images"
        smoother = Hypothesis("smoother images", advice, _smooth_images, MAX_SIZE_SCORE_RATIO)
        hypotheses.append(smoother)
    return hypotheses


@dataclass(frozen=True)
class _Resize:
    height: int
    width: int

    def __call__(self, x: Tensor) -> Tensor:
        # Four times the pixels would cost four times as much; fewer images tell as well.
        images = int(len(x) * x.shape[2] * x.shape[3] / (self.height * self.width))
        return resize_bilinear(x[: max(8, images)], self.height, self.width)


def _smooth_images(x: Tensor) -> Tensor:
    height, width = x.shape[2:]
    small = resize_bilinear(x, height // 2, width // 2)
    return F.interpolate(small, size=(height, width), mode="bilinear", align_corners=False)
