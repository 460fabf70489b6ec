"""The README's CI recipes run as shown, with the real make, on a tiny timm checkpoint and some JPEGs."""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
SECTION = (ROOT / "README.md").read_text().split("\n## In CI\n")[1].split("\n## ")[0]
SIDE = 64


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.+?)^```", SECTION, re.DOTALL | re.MULTILINE)


def commands(lines: list[str]) -> list[str]:
    return [line for line in lines if not line.startswith("pip install")]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``train/`` with crops of two photographs, and ``model.pt`` as timm's train.py leaves it."""
    folder = tmp_path_factory.mktemp("recipes")
    (folder / "train").mkdir()
    from sklearn.datasets import load_sample_image

    photos = [load_sample_image("china.jpg"), load_sample_image("flower.jpg")]
    corners = np.random.default_rng(0).integers(0, (427 - SIDE, 640 - SIDE), (160, 2))
    for number, (top, left) in enumerate(corners):
        crop = photos[number % 2][top : top + SIDE, left : left + SIDE]
        Image.fromarray(crop).save(folder / "train" / f"{number:03}.jpg", quality=95)
    torch.save(trained(folder / "train"), folder / "model.pt")
    return folder


def trained(folder: Path) -> dict[str, object]:
    """Random weights; running statistics are those of the images with drop path on, after 100 batches."""
    import timm

    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=3, drop_path_rate=0.3)
    args = argparse.Namespace(
        model="test_resnet", num_classes=3, drop_path=0.3, input_size=[3, SIDE, SIDE], crop_pct=1.0
    )
    config = timm.data.resolve_data_config(vars(args), model=model)
    transform = timm.data.create_transform(**config)
    images = torch.stack([transform(Image.open(path)) for path in sorted(folder.iterdir())])
    model.train()
    with torch.no_grad():
        for _ in range(20):
            for batch in images[torch.randperm(len(images))].split(32):
                model(batch)
    return {"arch": "test_resnet", "state_dict": model.state_dict(), "args": args}


@pytest.fixture
def shop(prepared: Path, tmp_path: Path) -> tuple[Path, dict[str, str]]:
    """A folder of its own for one recipe, and an environment in which ``ckpt-fix`` is this source tree's."""
    shutil.copytree(prepared, tmp_path / "work")
    script = tmp_path / "bin" / "ckpt-fix"
    script.parent.mkdir()
    script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m ckpt_tools "$@"\n')
    script.chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{script.parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "adapters")]),
    }
    return tmp_path / "work", environment


def assert_corrected(folder: Path) -> None:
    """Only running variances differ, and they do."""
    before = torch.load(folder / "model.pt", weights_only=False)["state_dict"]
    after = load_file(folder / "model.bn.safetensors")
    differ = {key for key in before if not torch.equal(before[key], after[key])}
    assert set(after) == set(before)
    assert differ
    assert all(key.endswith("running_var") for key in differ)


def shell(lines: list[str], folder: Path, environment: dict[str, str]) -> None:
    done = subprocess.run(
        ["bash", "-e", "-o", "pipefail", "-c", "\n".join(lines)],
        cwd=folder, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_github(shop: tuple[Path, dict[str, str]]) -> None:
    folder, environment = shop
    (workflow,) = (found for text in blocks("yaml") if "jobs" in (found := yaml.safe_load(text)))
    (job,) = workflow["jobs"].values()
    lines = commands([step["run"] for step in job["steps"] if "run" in step])
    environment |= {"GITHUB_ACTIONS": "true", "GITHUB_STEP_SUMMARY": str(folder / "summary.md")}
    shell(lines, folder, environment)
    assert_corrected(folder)
    facts = json.loads((folder / "bn.json").read_text())
    assert facts["data"]["agreement"]["verdict"] == "agree"
    assert facts["output"]["sha256"] in (folder / "summary.md").read_text()
    (upload,) = (step["with"]["path"] for step in job["steps"] if "upload-artifact" in step.get("uses", ""))
    assert all((folder / name).is_file() for name in upload.split())


def test_gitlab(shop: tuple[Path, dict[str, str]]) -> None:
    (pipeline,) = (found for text in blocks("yaml") if "jobs" not in (found := yaml.safe_load(text)))
    (job,) = pipeline.values()
    shell(commands(job["script"]), *shop)
    assert_corrected(shop[0])
    assert all((shop[0] / name).is_file() for name in job["artifacts"]["paths"])
    assert job["allow_failure"]["exit_codes"] == 3


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make(shop: tuple[Path, dict[str, str]]) -> None:
    folder, environment = shop
    (text,) = blocks("make")
    (folder / "Makefile").write_text(text)
    shell(["make model.bn.safetensors"], folder, environment)
    assert_corrected(folder)
    shell(["make model.bn.safetensors | grep 'up to date'"], folder, environment)
