"""Make the data that `bench data-check` hands to the check, right and wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from bench.image_sets import SIZE, ImageSet, crop_centre, image_set, resize
from bench.trained_nets import CIFAR, HALF, IMAGENET, MNIST, Training
from ckpt_tools.contract import InputSpec
from ckpt_tools.results import Walk

IMAGES = 256


@dataclass(frozen=True)
class Net:
    """A trained net with what it was trained on."""

    training: Training
    model: nn.Module
    walk: Walk
    data: ImageSet
    mean: Tensor
    std: Tensor

    def spec(self, mean: Tensor | None = None, std: Tensor | None = None) -> InputSpec:
        mean, std = self.mean if mean is None else mean, self.std if std is None else std
        shape = (self.data.channels, SIZE, SIZE)
        return InputSpec(shape, tuple(mean.flatten().tolist()), tuple(std.flatten().tolist()))


@dataclass(frozen=True)
class CheckInput:
    """What is handed to the check: a batch, and the preprocessing that is in force.

    `spec` is None for floats from a file.
    """

    batch: Tensor
    spec: InputSpec | None


def subset(net: Net, number: int) -> Tensor:
    """Indices of 256 images, from the training split for even numbers, held out for odd ones."""
    split = net.data.held_out if number % 2 else net.data.train
    order = torch.randperm(len(split), generator=torch.Generator().manual_seed(number))
    return split[order[:IMAGES]]


def right(net: Net, chosen: Tensor) -> CheckInput:
    return _normalise(net, resize(net.data.source[chosen]))


def _normalise(net: Net, pixels: Tensor) -> CheckInput:
    return CheckInput((pixels.float() / 255 - net.mean) / net.std, net.spec())


Wrong = Callable[[Net, Tensor], CheckInput]


def wrong_kinds(net: Net) -> Iterator[tuple[str, str, Wrong]]:
    """Kind, variant and maker of everything that is wrong for this net."""
    if net.training.norm:
        yield "no normalisation", "0–1", lambda net, i: _rescale(net, i, (0.0,), (1.0,))
        yield (
            "no normalisation",
            "0–1, from a file",
            lambda net, i: replace(_rescale(net, i, (0,), (1,)), spec=None),
        )
    yield "0–255", "0–255, from a file", lambda net, i: CheckInput(resize(net.data.source[i]).float(), None)
    for name, mean, std in _other_norms(net):
        far = "another mean/std" if _apart(net, mean, std) > 0.3 else "another mean/std, near"
        yield far, name, lambda net, i, mean=mean, std=std: _rescale(net, i, mean, std)
    if net.data.channels == 3:
        kind = "channels swapped" if _colourful(net) > 0.5 else "channels swapped, nearly grey"
        yield kind, "BGR", lambda net, i: _normalise(net, resize(net.data.source[i]).flip(1))
    for other in ("digits", "coloured", "photos", "china", "flower"):
        if other != net.data.name and not (net.data.name == "photos" and other in ("china", "flower")):
            yield (
                "another data set",
                other,
                lambda net, i, other=other: _normalise(net, _other(net, other, len(i))),
            )
    yield (
        "another resize",
        "half the size",
        lambda net, i: _normalise(net, resize(net.data.source[i], SIZE // 2)),
    )
    yield (
        "another resize",
        "twice the size",
        lambda net, i: _normalise(net, resize(net.data.source[i[:96]], 2 * SIZE)),
    )
    yield (
        "another resize",
        "heavy blur",
        lambda net, i: _normalise(net, resize(resize(net.data.source[i], 6))),
    )
    yield (
        "another resize, near",
        "centre crop 70 %",
        lambda net, i: _normalise(net, resize(crop_centre(net.data.source[i], 0.7))),
    )
    yield (
        "another resize, near",
        "nearest",
        lambda net, i: _normalise(net, resize(net.data.source[i], how="nearest")),
    )
    yield (
        "another resize, near",
        "bicubic",
        lambda net, i: _normalise(net, resize(net.data.source[i], how="bicubic")),
    )


def _rescale(net: Net, chosen: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> CheckInput:
    m, s = (torch.tensor(v, dtype=torch.float32).reshape(-1, 1, 1) for v in (mean, std))
    m, s = (v.expand(net.data.channels, 1, 1) for v in (m, s))
    return CheckInput((resize(net.data.source[chosen]).float() / 255 - m) / s, net.spec(m, s))


def _other_norms(net: Net) -> Iterator[tuple[str, tuple[float, ...], tuple[float, ...]]]:
    common = {
        "ImageNet": IMAGENET,
        "CIFAR-10": CIFAR,
        "0.5/0.5": HALF,
        "MNIST": MNIST,
        "0.3/0.15": ((0.3,), (0.15,)),
    }
    for name, (mean, std) in common.items():
        if net.data.channels == 1 and len(mean) == 3:
            mean, std = (sum(mean) / 3,), (sum(std) / 3,)
        if _apart(net, mean, std) > 1e-3:
            yield name, mean, std


def _apart(net: Net, mean: tuple[float, ...], std: tuple[float, ...]) -> float:
    """Return how far another normalisation is from the right one.

    It is a distance of inputs that are standard normal with the right mean and deviation.
    """
    m, s = (torch.tensor(v).reshape(-1, 1, 1) for v in (mean, std))
    return float((((net.mean - m) / s).square() + 2 * (net.std / s).log().square()).sqrt().mean())


def _colourful(net: Net) -> float:
    """Return the mean |red − blue| in standard deviations of the pixels.

    It is 0.3 to 1.7 for the data here, and 0 for grey images.
    """
    pixels = resize(net.data.source[subset(net, 0)]).float()
    return float((pixels[:, 0] - pixels[:, 2]).abs().mean() / pixels.std((0, 2, 3)).mean())


def _other(net: Net, name: str, count: int) -> Tensor:
    data = image_set(name)
    chosen = data.source[data.held_out[torch.randperm(len(data.held_out))[:count]]]
    if net.data.channels == 1:
        chosen = chosen.float().mean(1, keepdim=True).to(torch.uint8)
    return resize(chosen.expand(-1, net.data.channels, -1, -1))
