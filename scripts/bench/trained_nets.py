"""Train nets of many families briefly, in the different ways in which people train."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from bench.image_sets import SIZE, ImageSet, image_set, resize
from ckpt_tools.demo.densenet import digits_densenet

CLASSES = 10
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CIFAR = ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
HALF = ((0.5,), (0.5,))
MNIST = ((0.1307,), (0.3081,))
OWN = "own"  # the training set's mean and standard deviation


def conv(inside: int, outside: int, stride: int = 1, groups: int = 1, size: int = 3) -> nn.Conv2d:
    return nn.Conv2d(inside, outside, size, stride, size // 2, groups=groups, bias=False)


class DropPath(nn.Module):
    def __init__(self, rate: float) -> None:
        super().__init__()
        self.drop_prob = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.drop_prob:
            return x
        keep = 1 - self.drop_prob
        return x * x.new_empty((len(x), 1, 1, 1)).bernoulli_(keep).div_(keep)


class Residual(nn.Module):
    """A basic block with dropout.

    It is post-activated, or pre-activated with dropout between the convolutions (WRN), or has DropPath
    behind them.
    """

    def __init__(
        self, inside: int, outside: int, stride: int, *, pre: bool, drop: float, path: float
    ) -> None:
        super().__init__()
        self.pre = pre
        self.bn1 = nn.BatchNorm2d(inside if pre else outside)
        self.bn2 = nn.BatchNorm2d(outside)
        self.conv1, self.conv2 = conv(inside, outside, stride), conv(outside, outside)
        self.drop, self.path = nn.Dropout(drop), DropPath(path)
        plain = inside == outside and stride == 1
        self.shortcut = nn.Identity() if plain else conv(inside, outside, stride, size=1)

    def forward(self, x: Tensor) -> Tensor:
        if self.pre:
            y = self.conv1(F.relu(self.bn1(x)))
            return self.shortcut(x) + self.path(self.conv2(self.drop(F.relu(self.bn2(y)))))
        y = self.drop(F.relu(self.bn1(self.conv1(x))))
        return F.relu(self.shortcut(x) + self.path(self.bn2(self.conv2(y))))


def resnet(
    channels: int,
    *,
    width: int = 12,
    pre: bool = False,
    drop: float = 0.0,
    path: float = 0.0,
    pool: str = "mean",
) -> nn.Sequential:
    layers: list[nn.Module] = [conv(channels, width)]
    layers += [] if pre else [nn.BatchNorm2d(width), nn.ReLU()]
    inside = width
    for stage in range(3):
        outside = width * 2**stage
        for block in range(2):
            stride = 2 if stage and not block else 1
            layers.append(Residual(inside, outside, stride, pre=pre, drop=drop, path=path))
            inside = outside
    layers += [nn.BatchNorm2d(inside), nn.ReLU()] if pre else []
    head = nn.AdaptiveAvgPool2d(1) if pool == "mean" else nn.AdaptiveMaxPool2d(1)
    return nn.Sequential(*layers, head, nn.Flatten(), nn.Linear(inside, CLASSES))


def vgg(channels: int, pool: type[nn.Module] = nn.MaxPool2d) -> nn.Sequential:
    layers: list[nn.Module] = []
    for outside in (16, 32, 64):
        layers += [conv(channels, outside), nn.BatchNorm2d(outside), nn.ReLU()]
        layers += [conv(outside, outside), nn.BatchNorm2d(outside), nn.ReLU(), pool(2)]
        channels = outside
    return nn.Sequential(*layers, nn.Flatten(), nn.Dropout(0.3), nn.Linear(channels * 16, CLASSES))


def depthwise(channels: int) -> nn.Sequential:
    layers: list[nn.Module] = [conv(channels, 16, 2), nn.BatchNorm2d(16), nn.ReLU6()]
    for inside, outside, stride in ((16, 32, 1), (32, 64, 2), (64, 64, 1), (64, 96, 2)):
        layers += [conv(inside, inside, stride, groups=inside), nn.BatchNorm2d(inside), nn.ReLU6()]
        layers += [conv(inside, outside, size=1), nn.BatchNorm2d(outside), nn.ReLU6()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(96, CLASSES))


def mlp(channels: int, drop: float = 0.4) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Flatten(), nn.Linear(channels * SIZE * SIZE, 96)]
    for _ in range(3):
        layers += [nn.BatchNorm1d(96), nn.ReLU(), nn.Dropout(drop), nn.Linear(96, 96)]
    return nn.Sequential(*layers, nn.BatchNorm1d(96), nn.ReLU(), nn.Linear(96, CLASSES))


def normalised_input(channels: int) -> nn.Sequential:
    """A BN layer directly on the input, without affine parameters."""
    return nn.Sequential(nn.BatchNorm2d(channels, affine=False), *vgg(channels, nn.AvgPool2d))


def from_timm(name: str, **kwargs: object) -> Callable[[int], nn.Module]:
    return lambda channels: timm.create_model(name, num_classes=CLASSES, in_chans=channels, **kwargs)


def resnet18(channels: int) -> nn.Module:
    model = torchvision.models.resnet18(num_classes=CLASSES)
    model.conv1 = conv(channels, 64, 2, size=7)
    return model


def shufflenet(channels: int) -> nn.Module:
    model = torchvision.models.shufflenet_v2_x0_5(num_classes=CLASSES)
    model.conv1[0] = conv(channels, 24, 2)
    return model


@dataclass(frozen=True)
class Training:
    """How a net is trained.

    `norm` is mean and std, or OWN. `drops` says whether the net has dropout sites.
    """

    name: str
    build: Callable[[int], nn.Module]
    data: str
    norm: object = IMAGENET
    epochs: int = 8
    batch: int = 64
    augment: str = (
        ""  # letters: f flip, c crop with padding, r random resized crop, j jitter, e erasing, m mixup
    )
    optimizer: str = "sgd"
    rate: float = 0.05
    schedule: bool = True
    seed: int = 0
    share: Sequence[str] = ()


TRAININGS = (
    Training("resnet", resnet, "digits", MNIST),
    Training("resnet, 4 epochs", resnet, "digits", MNIST, epochs=4, schedule=False),
    Training("densenet, dropout", lambda c: digits_densenet(0.3, CLASSES, blocks=(5, 4), growth=8,
             in_channels=c), "coloured", HALF, batch=50),
    Training("wrn, dropout, crops", lambda c: resnet(c, pre=True, drop=0.3), "photos", IMAGENET, 8, 32, "fc"),
    Training("vgg", vgg, "coloured", IMAGENET, batch=128, optimizer="adam", rate=2e-3),
    Training("mlp, dropout", mlp, "digits", OWN, epochs=12, optimizer="adam", rate=2e-3),
    Training("mlp, dropout, colour", mlp, "coloured", CIFAR, epochs=10, batch=32),
    Training("depthwise, resized crops", depthwise, "photos", HALF, 10, 64, "frj"),
    Training("droppath", lambda c: resnet(c, path=0.2), "coloured", OWN, batch=32, optimizer="adam",
             rate=2e-3),
    Training("pre-activation", lambda c: resnet(c, pre=True), "photos", OWN, batch=96),
    Training("resnet10t, erasing", from_timm("resnet10t"), "photos", IMAGENET, 8, 64, "fre", "adam", 1e-3),
    Training("test_efficientnet", from_timm("test_efficientnet"), "coloured", CIFAR, 8, 64, "c", "adam",
             2e-3),
    Training("mobilenetv3, 3 epochs", from_timm("mobilenetv3_small_050"), "photos", IMAGENET, 3, 64, "f",
             "adam", 2e-3, schedule=False),
    Training("shufflenet, mixup", shufflenet, "coloured", IMAGENET, 8, 64, "m"),
    Training("resnet18", resnet18, "china", IMAGENET, 4, 64, "f"),
    Training("resnet, constant rate", resnet, "digits", MNIST, 10, 64, "", "sgd", 0.05, schedule=False),
    Training("densenet, Adam, constant rate", lambda c: digits_densenet(0.3, CLASSES, blocks=(5, 4), growth=8,
             in_channels=c), "digits", HALF, 10, 64, "", "adam", 1e-3, schedule=False),
    Training("vgg, Adam, constant rate", vgg, "coloured", IMAGENET, 10, 64, "", "adam", 1e-3, schedule=False),
    Training("BN on the input", normalised_input, "photos", (), 6, 48, "", "adam", 1e-3),
)  # fmt: skip


def normalisation(training: Training, data: ImageSet) -> tuple[Tensor, Tensor]:
    """Mean and std (C, 1, 1) on the scale 0–1."""
    if training.norm == OWN:
        pixels = resize(data.source[data.train]).double() / 255
        return pixels.mean((0, 2, 3), keepdim=True)[0].float(), pixels.std((0, 2, 3), keepdim=True)[0].float()
    mean, std = training.norm or ((0.0,), (1.0,))
    shape = (data.channels, 1, 1)
    return tuple(torch.tensor(v).reshape(-1, 1, 1).expand(shape).contiguous() for v in (mean, std))


def train_net(training: Training) -> nn.Module:
    """A net in evaluation mode, from a fixed seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(training.seed)
        data = image_set(training.data)
        model = training.build(data.channels)
        _fit(model, training, data)
    return model.eval()


def _fit(model: nn.Module, training: Training, data: ImageSet) -> None:
    mean, std = normalisation(training, data)
    images = resize(data.source[data.train]).float() / 255
    labels = data.labels[data.train]
    if training.optimizer == "sgd":
        optimizer = torch.optim.SGD(model.parameters(), training.rate, momentum=0.9, weight_decay=5e-4)
    else:
        optimizer = torch.optim.Adam(model.parameters(), training.rate)
    steps = training.epochs * (len(images) // training.batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps) if training.schedule else None
    model.train()
    for _ in range(training.epochs):
        for chosen in torch.randperm(len(images)).split(training.batch):
            if len(chosen) < training.batch:
                continue
            x, mixed = augment(images[chosen], training.augment)
            y = F.one_hot(labels[chosen], CLASSES).float()
            optimizer.zero_grad()
            F.cross_entropy(model((x - mean) / std), 0.5 * (y + y[mixed])).backward()
            optimizer.step()
            if schedule:
                schedule.step()


def augment(x: Tensor, letters: str) -> tuple[Tensor, Tensor]:
    """A batch 0–1 changed image by image, and the order in which labels were mixed in."""
    n, _, side, _ = x.shape
    mixed = torch.arange(n)
    if "f" in letters:
        x = torch.where((torch.rand(n) < 0.5)[:, None, None, None], x.flip(3), x)
    if "c" in letters:
        padded = F.pad(x, (4, 4, 4, 4))
        x = torch.stack([_window(image, side, *torch.randint(9, (2,)).tolist()) for image in padded])
    if "r" in letters:
        x = torch.stack([_random_resized(image) for image in x])
    if "j" in letters:
        x = (x * (0.7 + 0.6 * torch.rand(n, 1, 1, 1)) + 0.2 * (torch.rand(n, 1, 1, 1) - 0.5)).clamp(0, 1)
    if "e" in letters:
        for image in x[torch.rand(n) < 0.25]:
            top, left = torch.randint(side // 2, (2,)).tolist()
            image[:, top : top + side // 2, left : left + side // 3] = torch.rand(3, 1, 1)
    if "m" in letters:
        mixed = torch.randperm(n)
        x = 0.5 * (x + x[mixed])
    return x, mixed


def _window(image: Tensor, side: int, top: int, left: int) -> Tensor:
    return image[:, top : top + side, left : left + side]


def _random_resized(image: Tensor) -> Tensor:
    side = image.shape[-1]
    area, ratio = float(torch.empty(()).uniform_(0.25, 1)), float(torch.empty(()).uniform_(0.75, 1.33))
    height, width = (min(side, max(4, round(side * (area * r) ** 0.5))) for r in (ratio, 1 / ratio))
    top, left = int(torch.randint(side - height + 1, ())), int(torch.randint(side - width + 1, ()))
    window = image[None, :, top : top + height, left : left + width]
    return F.interpolate(window, size=(side, side), mode="bilinear", align_corners=False, antialias=True)[0]
