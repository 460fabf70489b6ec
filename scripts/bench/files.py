"""Files and memory: writing against cp, start-up, what a whole run holds in memory."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torchvision
from safetensors.torch import save_file
from torch import nn

from bench.photos import jpeg_folder
from ckpt_tools.contract import Checkpoint
from ckpt_tools.storage.output.checkpoint_writer import save
from ckpt_tools.storage.reading import read_checkpoint


def large_checkpoint(path: Path, size: int) -> Checkpoint:
    """A safetensors file of about ``size`` bytes: wide convolutions, each with a running variance."""
    if not path.exists():
        tensors = {}
        for number in range(max(1, size // (4 * 9 * 1024 * 1024))):
            tensors[f"{number}.conv.weight"] = torch.randn(1024, 1024, 3, 3)
            tensors[f"{number}.bn.running_var"] = torch.rand(1024)
        save_file(tensors, path, metadata={"format": "pt"})
    return read_checkpoint(path)


def writing(root: Path, size: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of cp, of cp with sync, and of a whole verified ``save``, interleaved."""
    source = root / f"{size}.safetensors"
    checkpoint = large_checkpoint(source, size)
    variances = {key: tensor + 1 for key, tensor in checkpoint.tensors.items() if key.endswith("running_var")}
    seconds: dict[str, list[float]] = {"cp": [], "cp and sync": [], "save": []}
    for _ in range(rounds):
        for name, runs in seconds.items():
            target = root / "copy.safetensors"
            target.unlink(missing_ok=True)
            os.sync()
            started = time.perf_counter()
            if name == "save":
                save(target, checkpoint, variances, provenance={"expect": "variance"})
            else:
                subprocess.run(["cp", source, target], check=True)
                if name == "cp and sync":
                    subprocess.run(["sync", target], check=True)
            runs.append(time.perf_counter() - started)
            target.unlink()
    return seconds


def start_up(root: Path, rounds: int) -> dict[str, float]:
    """Return the median seconds of --help, of a bare import of torch, and of `inspect` (100 MB)."""
    checkpoint = root / "densenet161.pt"
    torch.save(torchvision.models.densenet161().state_dict(), checkpoint)
    commands = {
        "--help": [sys.executable, "-m", "ckpt_tools", "--help"],
        "import torch": [sys.executable, "-c", "import torch"],
        "import torch, torchvision": [sys.executable, "-c", "import torch, torchvision"],
        "import torch, torchvision, timm": [sys.executable, "-c", "import torch, torchvision, timm"],
        "inspect, 115 MB": [sys.executable, "-m", "ckpt_tools", "inspect", str(checkpoint)],
        "inspect --arch, 115 MB": [
            sys.executable,
            "-m",
            "ckpt_tools",
            "inspect",
            str(checkpoint),
            "--arch",
            "torchvision:densenet161",
        ],
    }
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(rounds):
        for name, command in commands.items():
            started = time.perf_counter()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(runs) for name, runs in seconds.items()}


def peak_memory(root: Path, counts: tuple[int, ...]) -> dict[str, int]:
    """Measure the peak resident bytes of `bn-reestimate`, by the number of JPEG files it reads."""
    checkpoint = root / "resnet18-memory.pt"
    torch.manual_seed(0)
    model = torchvision.models.resnet18().train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    with torch.no_grad():
        model(torch.randn(32, 3, 96, 96))
    torch.save(model.state_dict(), checkpoint)
    folder = jpeg_folder(root, max(counts), 120, 160)
    peaks = {}
    for count in counts:
        arguments = [
            checkpoint,
            "--data",
            folder,
            "--arch",
            "torchvision:resnet18",
            "--limit",
            count,
            "--force",
            "-q",
            *("--layers", "all", "--estimator", "pooled"),
        ]
        arguments += ["--input-size", "3,96,96", "--batch-size", 32, "--overwrite", "--json"]
        peaks[f"{count} images"] = _peak(
            [sys.executable, "-m", "ckpt_tools", "bn-reestimate", *map(str, arguments)]
        )
    return peaks


def _peak(command: list[str]) -> int:
    """Peak resident bytes of the largest process of a command."""
    script = (
        "import resource, subprocess, sys; "
        "subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL); "
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *command], check=True, capture_output=True, text=True
    )
    return 1024 * int(done.stdout)
