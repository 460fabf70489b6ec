"""Stopping at a tolerance: whether the stated errors are right, and what it saves."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from tqdm import trange

from bench.photos import jpeg_folder, photos
from bench.trained_nets import CLASSES, resnet
from ckpt_tools.data.sample_order import random_order
from ckpt_tools.demo.densenet import digits_densenet
from ckpt_tools.model.calling import call_model
from ckpt_tools.model.preserving import preserved_evaluation_mode
from ckpt_tools.observation.interception import Interception
from ckpt_tools.observation.layer import Layer
from ckpt_tools.observation.running import Runner
from ckpt_tools.reestimate.batches import Batches
from ckpt_tools.reestimate.estimators import Estimate, pooled
from ckpt_tools.reestimate.passes import PassContext
from ckpt_tools.reestimate.screening import Screening

BATCH, SIDE = 128, 32
NETS = {
    "WRN-like, dropout 0.3": lambda: resnet(3, pre=True, drop=0.3),
    "ResNet, DropPath 0.2": lambda: resnet(3, path=0.2),
    "DenseNet, dropout 0.3": lambda: digits_densenet(0.3, CLASSES, blocks=(4, 4), growth=8, in_channels=3),
}


def normalise(images: Tensor) -> Tensor:
    return (images.float() / 255 - 0.45) / 0.25


def train_net(name: str, images: Tensor, labels: Tensor, epochs: int = 4) -> nn.Module:
    torch.manual_seed(0)
    model = NETS[name]().train()
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    for _ in range(epochs):
        for chosen in torch.randperm(len(images)).split(64)[:-1]:
            optimizer.zero_grad()
            F.cross_entropy(model(normalise(images[chosen])), labels[chosen]).backward()
            optimizer.step()
    return model.eval()


def shuffle(images: Tensor, seed: int) -> Iterator[Tensor]:
    """Batches in the order that the tool would read them in."""
    for chosen in random_order(len(images), limit=None, seed=seed).split(BATCH):
        yield normalise(images[chosen])


def estimated(model: nn.Module, batches: Iterator[Tensor], tolerance: float | None) -> Estimate:
    norms = [(name, module) for name, module in model.named_modules() if isinstance(module, _BatchNorm)]
    layers = {name: Layer(name, module, rewritten=True) for name, module in norms}
    runner, screening = (
        Runner(model, call_model, Interception()),
        Screening(model, lambda batch, row: "", keep=False, rows_are_samples=True),
    )
    context = PassContext(model, Batches(batches), runner, layers, screening)
    with preserved_evaluation_mode(model), torch.no_grad():
        return pooled(context, "variance", tolerance)


def coverage(name: str, images: Tensor, labels: Tensor, tolerance: float, trials: int) -> dict[str, object]:
    """Share of channels whose full-data variance is within ±1.96 stated standard errors, in seeded trials."""
    model = train_net(name, images[:4000], labels[:4000])
    modules = dict(model.named_modules())
    truth = estimated(model, shuffle(images, 10**6), None).statistics
    inside: list[Tensor] = []
    counts: list[int] = []
    errors: list[float] = []
    for seed in trange(trials, desc=name, file=sys.stderr):
        estimate = estimated(model, shuffle(images, seed), tolerance)
        counts.append(estimate.last_pass.total.images)
        misses = []
        for name, new in estimate.statistics.items():
            misses.append((new.variance / truth[name].variance - 1).abs())
            error = estimate.last_pass.evidence[name].relative_error(modules[name].running_mean.double())
            inside.append(misses[-1] <= 1.96 * error)
        errors.append(float(torch.cat(misses).quantile(0.95)))
    return {
        "covered": float(torch.cat(inside).double().mean()),
        "images, median": sorted(counts)[len(counts) // 2],
        "95th percentile of the true error, mean": sum(errors) / len(errors),
    }


def wall_times(root: Path, count: int, rounds: int) -> dict[str, list[float]]:
    """Return the seconds of the whole command on a folder of JPEG files, start-up included.

    It runs over everything, and with two tolerances.
    """
    folder = jpeg_folder(root, count, 120, 160)
    checkpoint = root / "resnet18.pt"
    torch.manual_seed(0)
    model = torchvision.models.resnet18().train()
    sample = F.interpolate(normalise(photos(256, 120, 160, seed=1)[0]), size=(96, 128))[..., 16:112]
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.momentum = None
    with torch.no_grad():
        for batch in sample.split(64):
            model(batch)
    torch.save(model.state_dict(), checkpoint)
    cases = {
        "everything": [],
        "tolerance 0.02": ["--tolerance", "0.02"],
        "tolerance 0.05": ["--tolerance", "0.05"],
    }
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name, arguments in cases.items():
            command = [
                sys.executable,
                "-m",
                "ckpt_tools",
                "bn-reestimate",
                checkpoint,
                "--data",
                folder,
                "--arch",
                "torchvision:resnet18",
            ]
            command += ["--input-size", "3,96,96", "--mean", "0.45", "--std", "0.25", "--batch-size", "128"]
            command += [
                "--overwrite",
                "--force",
                "-q",
                "--layers",
                "all",
                "--estimator",
                "pooled",
                *arguments,
            ]
            started = time.perf_counter()
            subprocess.run(list(map(str, command)), check=True, stdout=subprocess.DEVNULL)
            seconds[name].append(time.perf_counter() - started)
    return seconds
