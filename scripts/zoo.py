"""Walk every timm and torchvision model that has BatchNorm; with --run N do the whole job on N of them.

scripts/zoo                     # walk all of them, list every failure with its reason
scripts/zoo --run 20 --seed 1   # random weights saved as .pt, a few images, bn-reestimate, diff
scripts/zoo --only 'timm:resnet*'
"""

from __future__ import annotations

import fnmatch
import inspect
import json
import random
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import click
import torch
from PIL import Image
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from tqdm import tqdm

from ckpt_tools import plugins
from ckpt_tools.contract import InputSpec
from ckpt_tools.errors import CkptToolsError
from ckpt_tools.identify.load import load_architecture
from ckpt_tools.walker.downstream import walk

LARGEST = 300_000_000  # parameters of a model that --run still takes: it is held in memory twice


@dataclass(frozen=True)
class Walked:
    """How the walk of one model went. ``failure`` is empty if it went well; ``layers`` 0: no BatchNorm."""

    architecture: str
    layers: int = 0
    parameters: int = 0
    reachable: int = 0
    device: str = ""
    seconds: float = 0.0
    failure: str = ""


def architectures(pattern: str) -> Iterator[str]:
    for prefix in ("timm", "torchvision"):
        for name in plugins.adapter(prefix).architectures():
            if fnmatch.fnmatch(f"{prefix}:{name}", pattern):
                yield f"{prefix}:{name}"


def build(architecture: str) -> tuple[nn.Module, InputSpec | None]:
    """The bare model, on the meta device where its constructor allows that."""
    adapter, name = plugins.resolve(architecture)
    for device in ("meta", "cpu"):
        try:
            with torch.device(device):
                model = adapter.build(name, {})
            return model, adapter.input_spec(model, name, {})
        except (CkptToolsError, RuntimeError, NotImplementedError):
            if device == "cpu":
                raise
    raise AssertionError


def normalised(model: nn.Module) -> bool:
    return any(isinstance(module, _BatchNorm) and module.track_running_stats for module in model.modules())


def walk_one(architecture: str) -> Walked:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    try:
        model, spec = build(architecture)
        if not normalised(model):
            return Walked(architecture)
        parameters = sum(parameter.numel() for parameter in model.parameters())
    except Exception as error:
        return Walked(architecture, failure=f"cannot be built: {brief(error)}")
    started = time.perf_counter()
    try:
        loaded = load_architecture(architecture)
        shape = spec.shape if spec is not None else (3, 224, 224)
        found = walk(loaded.model, example(loaded.model, shape), probe=loaded.probe)
    except Exception as error:
        return Walked(architecture, failure=brief(error), layers=-1)
    return Walked(
        architecture,
        len(found.batch_norms),
        parameters,
        sum(bool(layer.downstream_of or layer.potentially_downstream_of) for layer in found.batch_norms),
        found.device,
        time.perf_counter() - started,
    )


def example(model: nn.Module, shape: tuple[int, ...]) -> object:
    """Zeros for the input, or for every input that the forward cannot do without (RAFT wants two images)."""
    required = [name for name, one in inspect.signature(model.forward).parameters.items() if one.default is one.empty]
    named = [name for name in required if name not in ("args", "kwargs")]
    return {name: torch.zeros(2, *shape) for name in named} if len(named) > 1 else torch.zeros(2, *shape)


def run_one(architecture: str, folder: Path) -> str:
    """The whole job by the command line; the reason of a failure, or nothing."""
    warnings.simplefilter("ignore")
    adapter, name = plugins.resolve(architecture)
    checkpoint, output = folder / "model.pt", folder / "model.bn.safetensors"
    torch.save(adapter.build(name, {}).state_dict(), checkpoint)
    command = [sys.executable, "-m", "ckpt_tools"]
    options = ["--layers", "all", "--batch-size", "8", "--workers", "0", "--overwrite", "--json", "--quiet"]
    for step in (
        [*command, "bn-reestimate", checkpoint, "--data", folder / "images", "--arch", architecture, *options],
        [*command, "diff", checkpoint, output, "--json"],
    ):
        done = subprocess.run(step, capture_output=True, text=True, check=False)
        if done.returncode:
            return f"{step[3]} exited {done.returncode}: {done.stderr.strip().splitlines()[-1:]}"
        if not json.loads(done.stdout):
            return f"{step[3]} printed nothing"
    return ""


def brief(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".replace("\n", " ")[:240]


def make_images(folder: Path, count: int) -> None:
    (folder / "images").mkdir()
    numbers = random.Random(0)
    for index in range(count):
        noise = Image.frombytes("RGB", (12, 9), numbers.randbytes(324)).resize((320, 240), Image.Resampling.BICUBIC)
        noise.save(folder / "images" / f"{index}.jpg")


def walk_all(pattern: str, jobs: int) -> list[Walked]:
    # Forked after the imports: a fresh interpreter a process would import torch, timm and torchvision again.
    with ProcessPoolExecutor(jobs, mp_context=get_context("fork"), max_tasks_per_child=None) as pool:
        futures = [pool.submit(walk_one, name) for name in architectures(pattern)]
        bar = tqdm(as_completed(futures), total=len(futures), unit="model", file=sys.stderr)
        return [future.result() for future in bar]


@click.command(help=__doc__)
@click.option("--only", default="*", metavar="PATTERN", help="Names such as 'timm:resnet*'.")
@click.option("--jobs", default=2, show_default=True)
@click.option("--run", "runs", default=0, metavar="N", help="The whole job on N models drawn at random.")
@click.option("--seed", default=0, show_default=True)
def main(only: str, jobs: int, runs: int, seed: int) -> None:
    walked = walk_all(only, jobs)
    with_bn = [one for one in walked if one.layers or one.failure]
    good = [one for one in with_bn if not one.failure]
    for one in sorted(walked, key=lambda one: one.architecture):
        if one.failure:
            print(f"FAILED {one.architecture}: {one.failure}")
    seconds = sorted(one.seconds for one in good)
    print(f"{len(walked)} models, {len(with_bn)} with BatchNorm, {len(good)} walked, {len(with_bn) - len(good)} failed")
    if good:
        print(
            f"{sum(one.layers for one in good)} BN layers, {sum(one.reachable for one in good)} within reach of "
            f"dropout; {sum(one.device == 'meta' for one in good)} models on meta tensors; "
            f"median {seconds[len(seconds) // 2]:.2f} s for building and walking"
        )
    failed = len(with_bn) - len(good)
    if runs:
        failed += run_some([one.architecture for one in good if one.parameters <= LARGEST], runs, seed)
    sys.exit(1 if failed else 0)


def run_some(names: list[str], runs: int, seed: int) -> int:
    """The number of models on which the whole job failed."""
    drawn = random.Random(seed).sample(sorted(names), min(runs, len(names)))
    failures = {}
    for name in tqdm(drawn, unit="model", file=sys.stderr):
        with tempfile.TemporaryDirectory() as folder:
            make_images(Path(folder), 8)
            try:
                failure = run_one(name, Path(folder))
            except Exception as error:
                failure = brief(error)
        if failure:
            failures[name] = failure
            print(f"FAILED {name}: {failure}")
    print(f"the whole job: {len(drawn) - len(failures)} of {len(drawn)} models")
    return len(failures)


if __name__ == "__main__":
    main()
