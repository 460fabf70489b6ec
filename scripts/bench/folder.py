"""Compare a folder of checkpoints in one run with as many single runs.

Seconds include the start-up, and the outputs must be equal.
"""

from __future__ import annotations

import functools
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from PIL import Image
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.transforms.v2.functional import center_crop, normalize, pil_to_tensor, resize

from bench.loaders import photographs

SIDE = 96
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
NETS: dict[str, Callable[[], nn.Module]] = {
    name: functools.partial(timm.create_model, name, drop_path_rate=0.1)
    for name in ("resnet18", "regnetx_002", "mobilenetv3_small_050")
}


def prepare_files(root: Path, images: int, each: int) -> tuple[Path, Path]:
    """Return a folder of JPEG files and one of checkpoints, made on first use.

    There are `each` checkpoints of every net, with the running statistics of those images.
    """
    data, runs = root / f"folder-{images}", root / f"runs-{images}-{each}"
    if not data.exists():
        data.mkdir(parents=True)
        photographs(data, images)
    sample = _sample(sorted(data.rglob("*.jpg"))[:256])
    for name, make in NETS.items():
        for seed in range(each):
            path = runs / name / f"seed{seed}.pt"
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                torch.manual_seed(seed)
                torch.save(_with_statistics(make(), sample).state_dict(), path)
    return data, runs


def race(data: Path, runs: Path, rounds: int, scratch: Path) -> dict[str, list[float]]:
    """Return the seconds of all single runs together and of the folder run, interleaved.

    Raises SystemExit if their tensors differ.
    """
    checkpoints = sorted(runs.rglob("*.pt"))
    seconds: dict[str, list[float]] = {"single runs": [], "one folder run": []}
    for number in range(rounds):
        alone, together = scratch / f"alone{number}", scratch / f"together{number}"
        started = time.perf_counter()
        for path in checkpoints:
            output = (alone / path.relative_to(runs)).with_suffix(".bn.safetensors")
            output.parent.mkdir(parents=True, exist_ok=True)
            _run(path, data, "--output", output)
        seconds["single runs"].append(time.perf_counter() - started)
        started = time.perf_counter()
        _run(runs, data, "--output-dir", together)
        seconds["one folder run"].append(time.perf_counter() - started)
        for output in sorted(alone.rglob("*.safetensors")):
            _check_equal(output, together / output.relative_to(alone))
    return seconds


def _sample(files: list[Path]) -> Tensor:
    small = [resize(pil_to_tensor(Image.open(file)), [round(SIDE / 0.875)]) for file in files]
    return normalize(
        torch.stack([center_crop(image, [SIDE, SIDE]) for image in small]).float() / 255, MEAN, STD
    )


def _with_statistics(model: nn.Module, sample: Tensor) -> nn.Module:
    for module in model.train().modules():
        if isinstance(module, _BatchNorm):
            module.momentum = None
    with torch.no_grad():
        for batch in sample.split(64):
            model(batch)
    return model


def _run(path: Path, data: Path, *arguments: object) -> None:
    command = [sys.executable, "-m", "ckpt_tools", "bn-reestimate", path, "--data", data, "--input-size"]
    command += [f"3,{SIDE},{SIDE}", "-q", "--layers", "all", "--estimator", "pooled", *arguments]
    subprocess.run(list(map(str, command)), check=True, stdout=subprocess.DEVNULL)


def _check_equal(first: Path, second: Path) -> None:
    with safe_open(first, "pt") as a, safe_open(second, "pt") as b:
        keys = list(a.keys())
        if keys != list(b.keys()) or not all(_same(a.get_tensor(key), b.get_tensor(key)) for key in keys):
            raise SystemExit(f"{first} and {second} differ.")


def _same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.numpy().tobytes() == b.numpy().tobytes()
