"""What is killed: commands on small files of their own, and what their outputs have to be."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import nets
import numpy as np
import oracle
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

__all__ = ["JOBS", "Job", "command", "digest", "give", "hash_outputs", "is_whole_report"]

_CLASSES = 40_000  # a head that no forward runs, so that the files are a few megabytes
_ARCH = ("--arch", "nets:ResNet", "--model-kwargs", f"classes={_CLASSES}")
_IMAGES = ("--data", "IMAGES", "--input-size", "3,8,8", "--mean", "0.5,0.5,0.5", "--std", "0.2,0.2,0.2")
_PASS = (*_ARCH, *_IMAGES, "--batch-size", "32", "--workers", "2", "-q")


@dataclass(frozen=True)
class Job:
    """A command, its outputs with the source of each, and its reports, all below one folder.

    ``earlier``: the outputs are there already, and are replaced. ``resumes``: a second run goes on,
    and succeeds.
    """

    name: str
    arguments: tuple[str, ...]
    outputs: Mapping[str, str]
    reports: tuple[str, ...] = ()
    earlier: bool = False
    resumes: bool = False

    @property
    def sources(self) -> list[str]:
        """Files that stay as they are."""
        return sorted(set(self.outputs.values()))


JOBS = (
    Job(
        "one .safetensors", ("bn-reestimate", "a.safetensors", *_PASS), {"a.bn.safetensors": "a.safetensors"}
    ),
    Job("one .pt", ("bn-reestimate", "a.pt", *_PASS, "-o", "b.safetensors"), {"b.safetensors": "a.pt"}),
    Job(
        "overwrite, report",
        ("bn-reestimate", "a.pt", *_PASS, "--overwrite", "--report", "r.json", "--report", "r.md"),
        {"a.bn.safetensors": "a.pt"},
        ("r.json", "r.md"),
        earlier=True,
    ),
    Job(
        "folder",
        ("bn-reestimate", "runs", *_PASS, "--output-dir", "fixed", "--report", "fixed/r.json"),
        {f"fixed/{name}.bn.safetensors": f"runs/{name}.pt" for name in "abc"},
        ("fixed/r.json",),
        resumes=True,
    ),
    Job("convert", ("convert", "a.pt"), {"a.safetensors": "a.pt"}),
    Job(
        "init-rewrite",
        ("init-rewrite", "fresh.pt", *_ARCH, "--input-size", "3,8,8"),
        {"fresh.init.safetensors": "fresh.pt"},
    ),
)


def give(job: Job, shared_files: Path, folder: Path) -> None:
    """Fill a new folder with what a job needs.

    What all jobs share is made in `shared_files` once.
    """
    if not shared_files.exists():
        _make(shared_files)
    folder.mkdir()
    for source in job.sources:
        (folder / source).parent.mkdir(exist_ok=True)
        shutil.copyfile(shared_files / source, folder / source)
    for output in job.outputs if job.earlier else ():
        save_file({"earlier": torch.zeros(3)}, folder / output)


def _make(shared_files: Path) -> None:
    (shared_files / "images").mkdir(parents=True)
    pixels = [torch.clamp(batch * 40 + 128, 0, 255).byte() for batch in nets.batches((3, 8, 8), count=3)]
    for number, image in enumerate(torch.cat(pixels)):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(shared_files / "images" / f"{number:03}.png")
    data = [(batch / 255 - 0.5) / 0.2 for batch in pixels]
    (shared_files / "runs").mkdir()
    torch.manual_seed(3)
    torch.save(nets.ResNet(classes=_CLASSES).state_dict(), shared_files / "fresh.pt")
    for seed, name in enumerate("abc"):
        torch.manual_seed(seed)
        state = nets.trained(nets.ResNet(classes=_CLASSES), data, steps=90).state_dict()
        torch.save(state, shared_files / "runs" / f"{name}.pt")
    shutil.copyfile(shared_files / "runs" / "a.pt", shared_files / "a.pt")
    save_file(torch.load(shared_files / "a.pt"), shared_files / "a.safetensors")


def command(job: Job, shared_files: Path) -> list[str]:
    """The arguments; the data is named by an absolute path, which outputs remember."""
    return [str(shared_files / "images") if word == "IMAGES" else word for word in job.arguments]


def hash_outputs(job: Job, shared_files: Path, folder: Path) -> dict[str, str]:
    """Return the SHA-256 of the outputs of an undisturbed run.

    An oracle checks the outputs first.
    """
    for output, source in job.outputs.items():
        _verify(job, load_file(folder / output), _state(folder / source), shared_files / "images")
    return {output: digest(folder / output) for output in job.outputs}


def _state(path: Path) -> dict[str, Tensor]:
    return load_file(path) if path.suffix == ".safetensors" else torch.load(path)


def _verify(job: Job, state: dict[str, Tensor], before: dict[str, Tensor], images: Path) -> None:
    """The right tensors differ, and new variances are those of the data."""
    assert state.keys() == before.keys()
    differ = {key for key in before if not torch.equal(state[key], before[key])}
    if job.name == "convert":
        assert not differ
    elif job.name == "init-rewrite":
        assert {key for key, value in before.items() if value.ndim > 1} <= differ
    else:
        truth = _variances(before, images)
        assert differ == {f"{name}.running_var" for name in truth}
        new = {name: state[f"{name}.running_var"] for name in truth}
        assert oracle.relative_difference(new, truth).median() < 0.05


def _variances(state: dict[str, Tensor], images: Path) -> dict[str, Tensor]:
    model = nets.ResNet(classes=_CLASSES)
    model.load_state_dict(state)
    pixels = np.stack([np.asarray(Image.open(path)) for path in sorted(images.iterdir())])
    data = (torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255 - 0.5) / 0.2
    return oracle.corrected(model, data, {"1.bn1", "1.bn2", "1.shortcut.1"})


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def is_whole_report(path: Path) -> bool:
    """Whether a report is complete."""
    text = path.read_text()
    return text.endswith("\n") and (path.suffix != ".json" or bool(json.loads(text)))
