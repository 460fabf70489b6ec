"""Walk every timm and torchvision model that has BatchNorm.

\b
scripts/run zoo                     walk all of them, list every failure with its reason
scripts/run zoo --run 20 --seed 1   and on 20 of them save random weights, re-estimate, compare
scripts/run zoo --init              new weights for every model: written, loaded, run (hours)
scripts/run zoo --only 'timm:resnet*'
"""

from __future__ import annotations

import functools
import json
import random
import subprocess
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import click
import torch
from PIL import Image
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from tqdm import tqdm

from ckpt_tools.identify import plugins
from ckpt_tools.identify.loading import load_architecture
from ckpt_tools.walker.downstream import walk
from zoo.initialisation import init_one, summary
from zoo.models import Checked, architectures, brief, build, check_all, example

LARGEST = 300_000_000  # parameters of a model that --run and --init still take: it is held in memory twice


@dataclass(frozen=True)
class Walked(Checked):
    """``layers`` 0: no BatchNorm."""

    layers: int = 0
    parameters: int = 0
    reachable: int = 0
    device: str = ""
    seconds: float = 0.0


def has_batch_norm(model: nn.Module) -> bool:
    return any(isinstance(module, _BatchNorm) and module.track_running_stats for module in model.modules())


def walk_one(architecture: str) -> Walked:
    try:
        model, spec = build(architecture)
        if not has_batch_norm(model):
            return Walked(architecture)
        parameters = sum(parameter.numel() for parameter in model.parameters())
    except Exception as error:
        return Walked(architecture, failure=f"cannot be built: {brief(error)}")
    started = time.perf_counter()
    try:
        loaded = load_architecture(architecture)
        graph = walk(loaded.model, example(loaded.model, spec), probe=loaded.probe)
    except Exception as error:
        return Walked(architecture, failure=brief(error), layers=-1)
    return Walked(
        architecture,
        "",
        len(graph.batch_norms),
        parameters,
        sum(bool(layer.downstream_of or layer.potentially_downstream_of) for layer in graph.batch_norms),
        graph.device,
        time.perf_counter() - started,
    )


def run_one(architecture: str, folder: Path) -> str:
    """The whole job by the command line; the reason of a failure, or nothing."""
    warnings.simplefilter("ignore")
    adapter, name = plugins.resolve(architecture)
    checkpoint, output = folder / "model.pt", folder / "model.bn.safetensors"
    torch.save(adapter.build(name, {}).state_dict(), checkpoint)
    command = [sys.executable, "-m", "ckpt_tools"]
    options = ["--layers", "all", "--batch-size", "8", "--workers", "0", "--overwrite", "--json", "--quiet"]
    for step in (
        [
            *command,
            "bn-reestimate",
            checkpoint,
            "--data",
            folder / "images",
            "--arch",
            architecture,
            *options,
        ],
        [*command, "diff", checkpoint, output, "--json"],
    ):
        done = subprocess.run(step, capture_output=True, text=True, check=False)
        if done.returncode:
            return f"{step[3]} exited {done.returncode}: {done.stderr.strip().splitlines()[-1:]}"
        if not json.loads(done.stdout):
            return f"{step[3]} printed nothing"
    return ""


def make_images(folder: Path, count: int) -> None:
    (folder / "images").mkdir()
    numbers = random.Random(0)
    for index in range(count):
        noise = Image.frombytes("RGB", (12, 9), numbers.randbytes(324)).resize(
            (320, 240), Image.Resampling.BICUBIC
        )
        noise.save(folder / "images" / f"{index}.jpg")


@click.command(help=__doc__)
@click.option("--only", default="*", metavar="PATTERN", help="Names such as 'timm:resnet*'.")
@click.option("--jobs", default=2, show_default=True)
@click.option(
    "--init", is_flag=True, help=f"Initialise all models up to {LARGEST:,} parameters instead of walking."
)
@click.option("--run", "runs", default=0, metavar="N", help="The whole job on N models drawn at random.")
@click.option("--seed", default=0, show_default=True)
@click.option(
    "--log",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Append a JSON line for every model, and pass over those it has.",
)
def main(only: str, jobs: int, init: bool, runs: int, seed: int, log: Path | None) -> None:
    done = {json.loads(line)["architecture"] for line in log.open()} if log and log.exists() else set()
    names = sorted(set(architectures(only)) - done)
    random.Random(seed).shuffle(names)  # a run that is cut off has seen models of every family
    check = functools.partial(init_one, largest=LARGEST) if init else walk_one
    results = check_all(check, names, jobs, log)
    for result in results:
        if result.failure:
            print(f"FAILED {result.architecture}: {result.failure}")
    failed = sum(bool(result.failure) for result in results)
    if init:
        print(summary(results))
    else:
        good = [result for result in results if not result.failure and result.layers]
        print(
            f"{len(results)} models, {len(good) + failed} with BatchNorm, {len(good)} walked, {failed} failed"
        )
        if good:
            print(walked_line(good))
        if runs:
            failed += run_some(
                [result.architecture for result in good if result.parameters <= LARGEST], runs, seed
            )
    sys.exit(1 if failed else 0)


def walked_line(good: list[Walked]) -> str:
    seconds = sorted(result.seconds for result in good)
    return (
        f"{sum(result.layers for result in good)} BN layers, "
        f"{sum(result.reachable for result in good)} within reach of "
        f"dropout; {sum(result.device == 'meta' for result in good)} models on meta tensors; "
        f"median {seconds[len(seconds) // 2]:.2f} s for building and walking"
    )


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
    main(prog_name="scripts/run zoo")
