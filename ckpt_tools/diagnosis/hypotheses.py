"""What may have gone wrong on the way from an image to a model's input, each as a change of the batch.

All usual preprocessings are ``(pixels − mean) / std`` on pixels in 0–1, with the channels in one of two orders.
What a batch of images holds as pixels is known; of preprocessed floats it is guessed, and every guess whose pixels lie
in 0–1 is tried.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ckpt_tools.contract import InputSpec

MAX_SCALE_SCORE_RATIO = 0.65
_NOISE = 0.3  # 256 photographs are up to 0.2 away from the mean and deviation of all
MAX_SIZE_SCORE_RATIO = 0.4  # random crops in training look like larger, smoother images than those of evaluation

ChannelValues = tuple[float, ...]
BatchChange = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Hypothesis:
    """One explanation: ``title`` completes "the stored statistics fit …", ``advice`` says what to do then.

    ``change`` turns the batch as given, (N, C, …) float, into the batch it should have been. It is believed if it
    brings the score below ``enough`` times the given one.
    """

    title: str
    advice: str
    change: BatchChange
    enough: float


@dataclass(frozen=True)
class _Norm:
    title: str
    mean: ChannelValues
    std: ChannelValues


_CAFFE = tuple(value / 255 for value in (123.675, 116.28, 103.53))
_COLOUR = (
    _Norm("ImageNet's mean and standard deviation", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    _Norm("CIFAR-10's mean and standard deviation", (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    _Norm("CLIP's mean and standard deviation", (0.4815, 0.4578, 0.4082), (0.2686, 0.2613, 0.2758)),
    _Norm("pixels of 0–255 less Caffe's mean", _CAFFE, (1 / 255,)),
)
_GREY = (_Norm("MNIST's mean and standard deviation", (0.1307,), (0.3081,)),)
_ANY = (
    _Norm("pixels of 0–1 as they are", (0.0,), (1.0,)),
    _Norm("pixels of 0–255 as they are", (0.0,), (1 / 255,)),
    _Norm("pixels of −1 to 1", (0.5,), (0.5,)),
)


@dataclass(frozen=True)
class _Affine:
    """``scale · x + offset`` per channel, (C,) float64."""

    scale: Tensor
    offset: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        shape = (1, -1, *[1] * (x.ndim - 2))
        return x * self.scale.to(x).reshape(shape) + self.offset.to(x).reshape(shape)

    def followed_by(self, other: _Affine) -> _Affine:
        """First this, then the other."""
        return _Affine(self.scale * other.scale, self.offset * other.scale + other.offset)

    def inverse(self) -> _Affine:
        """What undoes this."""
        return _Affine(1 / self.scale, -self.offset / self.scale)

    def with_channels_reversed(self) -> _Affine:
        """The same for a batch whose channels stand in reverse order."""
        return _Affine(self.scale.flip(0), self.offset.flip(0))

    def fisher_length(self) -> float:
        """How far it moves what becomes standard normal: Fisher's metric, averaged over channels."""
        return float((self.offset.square() + 2 * self.scale.log().square()).sqrt().mean())

    def is_close_to(self, other: _Affine) -> bool:
        """Whether both do the same, to a thousandth of what goes in."""
        return bool(((self.scale / other.scale - 1).abs() < 1e-3).all()) and bool(
            ((self.offset - other.offset).abs() < 1e-3 * self.scale.abs().clamp_min(1)).all()
        )


def _affine(mean: ChannelValues | Tensor, std: ChannelValues | Tensor, channels: int) -> _Affine:
    centre, spread = (torch.as_tensor(v, dtype=torch.float64).expand(channels) for v in (mean, std))
    return _Affine(1 / spread, -centre / spread)


def preprocessing_hypotheses(batch: Tensor, spec: InputSpec | None, *, preprocessed: bool) -> list[Hypothesis]:
    """Every usual preprocessing but the one in force, and the other order of channels with all of them.

    ``batch`` (N, C, …) as it goes into the model; ``spec`` in force, None or meaningless for preprocessed data.
    """
    channels = batch.shape[1]
    identity = _affine((0.0,), (1.0,), channels)
    tried: list[tuple[_Affine, bool]] = [(identity, False)]
    found: list[Hypothesis] = []
    for reading in _readings(batch, spec, preprocessed=preprocessed):
        norms = [*_norms(channels), *_own(reading, batch)]
        for swapped in (False, True) if _is_coloured(batch) else (False,):
            for norm in [None, *norms]:  # None: as the batch is, but for the order
                target = reading.inverse() if norm is None else _affine(norm.mean, norm.std, channels)
                change = (reading.with_channels_reversed() if swapped else reading).followed_by(target)
                if any(change.is_close_to(other) and swapped == before for other, before in tried):
                    continue
                tried.append((change, swapped))
                found.append(_hypothesis(norm, change, swapped=swapped, preprocessed=preprocessed))
    return found


def _norms(channels: int) -> tuple[_Norm, ...]:
    if channels == 3:
        return (*_ANY, *_COLOUR)
    return (*_ANY, *_GREY) if channels == 1 else _ANY


def _readings(batch: Tensor, spec: InputSpec | None, *, preprocessed: bool) -> list[_Affine]:
    """Ways to get pixels of 0–1 back."""
    channels = batch.shape[1]
    if not preprocessed and spec is not None:
        return [_affine(spec.mean or (0.0,), spec.std or (1.0,), channels).inverse()]
    low, high = _range(batch)
    readings = []
    for norm, most_wanted in itertools.product(_norms(channels), (1, 255)):  # 255: normalised without a division
        undo = _affine(norm.mean, norm.std, channels).inverse()
        undo = _Affine(undo.scale / most_wanted, undo.offset / most_wanted)
        least, most = undo.scale * low + undo.offset, undo.scale * high + undo.offset
        # Of pixels in 0–1 some are bright; 0–255 read as 0–1 would fit anything.
        if bool((least > -0.02).all()) and bool((most < 1.02).all()) and bool((most > 0.3).any()):
            readings.append(undo)
    return readings or [_affine((0.0,), (1.0,), channels)]


def _range(batch: Tensor) -> tuple[Tensor, Tensor]:
    rows = batch.transpose(0, 1).reshape(batch.shape[1], -1).double()
    return rows.amin(1), rows.amax(1)


def _own(reading: _Affine, batch: Tensor) -> list[_Norm]:
    """Mean and deviation of these very images, unless they are so near that any few images would have others."""
    norm = _norm_from_pixels(reading(batch))
    change = reading.followed_by(_affine(norm.mean, norm.std, batch.shape[1]))
    return [norm] if change.fisher_length() > _NOISE else []


def _norm_from_pixels(pixels: Tensor) -> _Norm:
    rows = pixels.transpose(0, 1).reshape(pixels.shape[1], -1).double()
    if pixels.ndim == 2 or pixels.shape[1] > 4:  # features: one constant one must not blow up
        mean, std = rows.mean().reshape(1), rows.std().reshape(1)
    else:
        mean, std = rows.mean(1), rows.std(1)
    std = std.clamp_min(1e-6)
    return _Norm("the data's own mean and standard deviation", tuple(mean.tolist()), tuple(std.tolist()))


def _is_coloured(batch: Tensor) -> bool:
    if batch.ndim < 4 or batch.shape[1] != 3:
        return False
    return float((batch[:, 0] - batch[:, 2]).abs().mean()) > 1e-3 * float(batch.abs().mean())


def _hypothesis(norm: _Norm | None, change: _Affine, *, swapped: bool, preprocessed: bool) -> Hypothesis:
    order = "the channels in reverse order (BGR)"
    if norm is None:
        return Hypothesis(order, _ORDER, _Reordered(change, swapped), MAX_SCALE_SCORE_RATIO)
    title = f"{norm.title}, {order}" if swapped else norm.title
    mean, std = (",".join(f"{value:.4g}" for value in values) for values in (norm.mean, norm.std))
    if preprocessed:
        advice = f"save the data as (pixels − mean) / std on pixels of 0–1 with mean {mean} and std {std}"
    else:
        advice = f"pass --mean {mean} --std {std}"
    advice = f"{advice}, and {_ORDER}" if swapped else advice
    return Hypothesis(title, advice, _Reordered(change, swapped), MAX_SCALE_SCORE_RATIO)


_ORDER = "give the data as an array whose channels are reversed"


@dataclass(frozen=True)
class _Reordered:
    change: _Affine
    swapped: bool

    def __call__(self, x: Tensor) -> Tensor:
        return self.change(x.flip(1) if self.swapped else x)


def size_hypotheses(batch: Tensor, usual: tuple[int, ...] | None) -> list[Hypothesis]:
    """The batch (N, C, H, W) at other sizes, and smoothed: half, double, and what the architecture usually takes."""
    if batch.ndim != 4:
        return []
    height, width = batch.shape[2:]
    wanted = {(height // 2, width // 2), (height * 2, width * 2)}
    if usual is not None and len(usual) == 3:
        wanted.add((usual[1], usual[2]))
    found = [
        Hypothesis(
            f"images of {h}×{w} rather than {height}×{width}",
            f"pass --input-size {batch.shape[1]},{h},{w}",
            _Resized(h, w),
            MAX_SIZE_SCORE_RATIO,
        )
        for h, w in sorted(wanted - {(height, width)})
        if min(h, w) >= 8 and max(h, w) <= 4 * max(height, width)
    ]
    if min(height, width) < 16:
        return found
    advice = "resize with --interpolation bilinear, or start from larger images"
    return [*found, Hypothesis("smoother images", advice, _smooth_images, MAX_SIZE_SCORE_RATIO)]


@dataclass(frozen=True)
class _Resized:
    height: int
    width: int

    def __call__(self, x: Tensor) -> Tensor:
        size = (self.height, self.width)
        # Four times the pixels would cost four times as much; fewer images tell as well.
        x = x[: max(8, int(len(x) * x.shape[2] * x.shape[3] / (self.height * self.width)))]
        return F.interpolate(x, size=size, mode="bilinear", antialias=True, align_corners=False)


def _smooth_images(x: Tensor) -> Tensor:
    height, width = x.shape[2:]
    small = F.interpolate(x, size=(height // 2, width // 2), mode="bilinear", antialias=True, align_corners=False)
    return F.interpolate(small, size=(height, width), mode="bilinear", align_corners=False)


def training_augmentations(batch: Tensor, black: Tensor) -> list[BatchChange]:
    """What training may have done to the same images: shifts over black or zeros, crops, mixing, brightness.

    ``black`` (C,): the value of a black pixel. The random ones draw from torch's global generator.
    """
    if batch.ndim != 4:
        return [_mix_samples] if batch.ndim == 2 else []
    shifted = [_Shifted(black), _Shifted(torch.zeros_like(black))]
    return [
        *shifted,
        _crop_randomly,
        _mix_samples,
        lambda x: _mix_samples(_crop_randomly(x)),
        lambda x: _mix_samples(shifted[0](x)),
    ]


@dataclass(frozen=True)
class _Shifted:
    """Every image moved by up to an eighth of its side; what comes in has the value ``fill``."""

    fill: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        edge = max(1, x.shape[-1] // 8)
        fill = self.fill.to(x).reshape(1, -1, 1, 1)
        padded = F.pad(x - fill, (edge,) * 4) + fill
        height, width = x.shape[2:]
        tops, lefts = torch.randint(2 * edge + 1, (2, len(x))).tolist()
        windows = [p[:, t : t + height, left : left + width] for p, t, left in zip(padded, tops, lefts, strict=True)]
        return torch.stack(windows)


def _crop_randomly(x: Tensor) -> Tensor:
    """A window of 8–100 % of every image's area at the image's size, as in training on ImageNet."""
    height, width = x.shape[2:]
    windows = []
    for image, area in zip(x, torch.empty(len(x)).uniform_(0.08, 1).sqrt().tolist(), strict=True):
        h, w = max(2, round(height * area)), max(2, round(width * area))
        top, left = int(torch.randint(height - h + 1, ())), int(torch.randint(width - w + 1, ()))
        window = image[None, :, top : top + h, left : left + w]
        windows.append(
            F.interpolate(window, size=(height, width), mode="bilinear", antialias=True, align_corners=False)
        )
    return torch.cat(windows)


def _mix_samples(x: Tensor) -> Tensor:
    """Every sample averaged with another one."""
    return (x + x[torch.randperm(len(x))]) / 2
