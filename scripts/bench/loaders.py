"""How fast a folder of JPEG files is read, beside timm's and torchvision's loaders; and how alike
the pixels are.

Images a second are medians of interleaved rounds, so that a busy machine slows all alike; the
ratios say more than the figures. About three minutes on two cores.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median

import numpy as np
import timm.data
import torch
from PIL import Image, ImageOps
from sklearn.datasets import load_sample_images
from torch.utils.data import DataLoader
from torchvision import datasets, transforms

from ckpt_tools.contract import InputSpec
from ckpt_tools.data import open_source
from ckpt_tools.data.images.resampling import INTERPOLATIONS, matches_pil
from ckpt_tools.data.images.transforms import ImageTransform
from ckpt_tools.data.sample_order import Reading

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BATCH = 64
PEERS = ("timm", "torchvision")


def photographs(root: Path, count: int) -> None:
    """Write blended, flipped, recoloured crops of two photographs: 500×375, JPEG quality 90."""
    rng = np.random.default_rng(0)
    originals = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    (root / "class").mkdir()
    for number in range(count):
        height = int(rng.uniform(330, 427))
        left, top = rng.integers(640 - height * 4 // 3 + 1), rng.integers(427 - height + 1)
        box = (left, top, left + height * 4 // 3, top + height)
        parts = [image.resize((500, 375), Image.Resampling.BICUBIC, box) for image in originals]
        parts = [ImageOps.mirror(image) if rng.random() < 0.5 else image for image in parts]
        blend = np.asarray(Image.blend(*parts, rng.choice([0.0, 1.0, rng.random()]))) * rng.uniform(
            0.7, 1.2, 3
        )
        Image.fromarray(blend.clip(0, 255).astype(np.uint8)).save(root / f"class/{number:05}.jpg", quality=90)


def with_timm(root: Path, interpolation: str, workers: int) -> Iterable[object]:
    return timm.data.create_loader(
        timm.data.ImageDataset(str(root)), (3, 224, 224), BATCH, is_training=False, use_prefetcher=False,
        interpolation=interpolation, mean=MEAN, std=STD, crop_pct=0.875,
        num_workers=workers, pin_memory=False, persistent_workers=workers > 0,
    )  # fmt: skip


def with_torchvision(root: Path, interpolation: str, workers: int) -> Iterable[object]:
    steps = [
        transforms.Resize(256, transforms.InterpolationMode(interpolation)),
        transforms.CenterCrop(224),
        transforms.ToTensor(),
        transforms.Normalize(MEAN, STD),
    ]
    files = datasets.ImageFolder(str(root), transforms.Compose(steps))
    return DataLoader(files, BATCH, num_workers=workers, persistent_workers=workers > 0)


def with_ours(root: Path, interpolation: str, workers: int) -> Iterable[object]:
    spec = InputSpec((3, 224, 224), MEAN, STD, interpolation, 0.875)
    return open_source(str(root)).batches(spec, Reading(batch_size=BATCH, workers=workers))


def with_cached_stream(root: Path, interpolation: str, workers: int) -> Iterable[object]:
    spec = InputSpec((3, 224, 224), MEAN, STD, interpolation, 0.875)
    return open_source(str(root)).batches(spec, Reading(batch_size=BATCH, workers=workers, cached=True))


LOADERS: dict[str, Callable[[Path, str, int], Iterable[object]]] = {
    "timm": with_timm,
    "torchvision": with_torchvision,
    "ours": with_ours,
    "ours, later passes of a cached stream": with_cached_stream,
}


def seconds(batches: Iterable[object]) -> float:
    start = time.perf_counter()
    for _ in batches:
        pass
    return time.perf_counter() - start


def measure_speed(root: Path, count: int, rounds: int) -> dict[str, dict[str, float]]:
    """Measure images a second of every loader, and the ratio to those of the libraries' loaders.

    Keys of the result name the loader, the number of workers and the interpolation.
    """
    rates = {}
    for workers, interpolation in itertools.product((0, 2), ("bicubic", "bilinear")):
        streams = {name: loader(root, interpolation, workers) for name, loader in LOADERS.items()}
        for stream in streams.values():
            seconds(stream)  # starts processes, fills the cache
        # one torch thread without workers: with more, the libraries' loaders wait for cores on a
        # busy machine
        torch.set_num_threads(max(workers, 1))
        rounds_of_seconds = [
            {name: seconds(stream) for name, stream in streams.items()} for _ in range(rounds)
        ]
        print(f"\n{workers} workers, {interpolation}")
        for name in LOADERS:
            row = {"images/s": count / median(times[name] for times in rounds_of_seconds)}
            for base in PEERS:
                row[f"× {base}"] = median(times[base] / times[name] for times in rounds_of_seconds)
            print(
                f"  {name:38}" + "".join(f"  {value:7.2f} {unit}" for unit, value in row.items()), flush=True
            )
            rates[f"{name}, {workers} workers, {interpolation}"] = row
    return rates


def alikeness() -> dict[str, dict[str, float]]:
    """Measure how far torch's resizing is from PIL's, in grey levels, over sizes where both agree."""
    photographs = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    noise = np.random.default_rng(0).integers(0, 256, (427, 640, 3), dtype=np.uint8)
    pictures = {"photographs": photographs, "noise": [Image.fromarray(noise)]}
    sizes = [
        (640, 427),
        (500, 375),
        (375, 500),
        (333, 251),
        (97, 611),
        (1600, 1201),
        (3001, 35),
        (35, 3000),
        (17, 23),
    ]
    goals = [(341, 256), (235, 235), (224, 224), (300, 129), (32, 32), (384, 512)]
    differences = {}
    for interpolation, (kind, images) in itertools.product(("bilinear", "bicubic"), pictures.items()):
        off = []
        for image, size, goal in itertools.product(images, sizes, goals):
            if matches_pil(size, goal, interpolation):
                picture = image.resize(size, Image.Resampling.BICUBIC)
                spec = InputSpec(
                    (3, goal[1], goal[0]), interpolation=interpolation, crop_mode="squash", crop_pct=1.0
                )
                theirs = np.array(picture.resize(goal, INTERPOLATIONS[interpolation])).transpose(2, 0, 1)
                off.append(ImageTransform(spec)(picture).numpy().astype(int) - theirs)
        absolute = [float(abs(part).mean()) for part in off]
        differences[f"{interpolation}, {kind}"] = {
            "sizes": len(off),
            "|difference|, mean": float(np.mean(absolute)),
            "worst size": max(absolute),
            "worst size, signed": float(max(abs(part.mean()) for part in off)),
            "one pixel": float(max(abs(part).max() for part in off)),
        }
        print(f"{interpolation}, {kind}: {differences[f'{interpolation}, {kind}']}", flush=True)
    return differences
