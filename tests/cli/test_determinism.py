"""The same command gives the same bytes, whatever may differ beside it."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import nets
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors import safe_open

from ckpt_tools.cli import main
from ckpt_tools.data.sample_cache import PixelCache
from ckpt_tools.machine.precision import deterministic_kernels

SHAPE = (3, 8, 8)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, and images in two folders, one of them twice."""
    root = tmp_path_factory.mktemp("root")
    torch.manual_seed(0)
    batches = nets.batches(SHAPE)
    torch.save(nets.trained(nets.DenseNet(), batches).state_dict(), root / "model.pt")
    pixels = torch.cat(batches).mul(40).add(128).clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
    for number, image in enumerate(pixels):
        folder = root / "images" / "ab"[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.ascontiguousarray(image)).save(folder / f"{number:03}.png")
    return root


def arguments(root: Path, output: object, *more: object, source: object = None) -> list[str]:
    said = [
        "bn-reestimate",
        source or root / "model.pt",
        "--data",
        root / "images",
        "--arch",
        "nets:DenseNet",
        "-q",
    ]
    said += ["--input-size", "3,8,8", "--mean", "0.5,0.5,0.5", "--std", "0.157,0.157,0.157", "--crop-pct", 1]
    said += ["--interpolation", "bilinear", "--force", "--batch-size", 16, "--json", "--overwrite"]
    return [str(word) for word in [*said, *(("-o", output) if output else ()), *more]]


def run(root: Path, *more: object, source: object = None) -> tuple[bytes, dict[str, Any]]:
    """The output's bytes, and the report but for what took time and the command itself."""
    output = root / "out.safetensors"
    result = CliRunner().invoke(main, arguments(root, output, *more, source=source))
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    del report["seconds"], report["command"]
    return output.read_bytes(), report


@pytest.mark.parametrize("estimator", ["pooled", "exact", "ema"])
def test_whatever_the_number_of_workers(root: Path, estimator: str) -> None:
    alike = [run(root, "--workers", count, "--estimator", estimator) for count in (0, 1, 4)]
    assert alike[0] == alike[1] == alike[2]


def test_whatever_the_order_on_disk(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = run(root, "--limit", 50)
    scandir = os.scandir

    class Reversed:
        def __init__(self, path: Any = ".") -> None:
            with scandir(path) as found:
                self.entries = iter(sorted(found, key=lambda entry: entry.name, reverse=True))

        def __enter__(self) -> Reversed:
            return self

        def __exit__(self, *raised: object) -> None: ...

        def __iter__(self) -> Iterator[Any]:
            return self.entries

        def __next__(self) -> Any:
            return next(self.entries)

        def close(self) -> None: ...

    monkeypatch.setattr(os, "scandir", Reversed)
    assert [entry.name for entry in os.scandir(root / "images")] == ["b", "a"]
    assert run(root, "--limit", 50) == expected


def test_wherever_decoded_pixels_are_kept(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = run(root, "--estimator", "exact")
    for bounds in ({"memory": 0}, {"memory": 0, "disk": 0}):  # in a file; nowhere
        monkeypatch.setattr(PixelCache.__init__, "__kwdefaults__", {"memory": None, "disk": None, **bounds})
        assert run(root, "--estimator", "exact") == expected


def test_whatever_the_process_its_hash_seed_and_its_language(root: Path) -> None:
    """This process has another seed, has drawn random numbers, and can print more than ASCII."""
    torch.rand(7)
    expected, _ = run(root, "--limit", 60)
    output = root / "other.safetensors"
    environment = os.environ | {"PYTHONHASHSEED": "3" if os.environ.get("PYTHONHASHSEED") != "3" else "4"}
    path = os.pathsep.join(map(str, [Path(__file__).parents[1] / "support", *filter(None, sys.path)]))
    command = [sys.executable, "-m", "ckpt_tools", *arguments(root, output, "--limit", 60, "--workers", 2)]
    environment |= {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "TZ": "Asia/Tokyo", "HOME": str(root)}
    environment |= {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "SOURCE_DATE_EPOCH": "-1"}
    subprocess.run(command, env=environment, check=True, capture_output=True, cwd=root)
    assert output.read_bytes() == expected


def test_alone_or_among_many(root: Path) -> None:
    expected, _ = run(root)
    more = ("--output-dir", root / "many")
    assert CliRunner().invoke(main, arguments(root, None, *more)).exit_code == 0
    assert (root / "many" / "model.bn.safetensors").read_bytes() == expected


def test_on_disk_or_behind_a_url(root: Path) -> None:
    expected, _ = run(root)
    store = fsspec.filesystem("memory")
    store.pipe_file("/determinism/model.pt", (root / "model.pt").read_bytes())
    found, _ = run(root, source="memory://determinism/model.pt")
    assert found == expected


def test_an_output_says_nothing_of_time_place_or_user(root: Path) -> None:
    content, report = run(root)
    with safe_open(root / "out.safetensors", "pt") as file:
        provenance = json.loads(file.metadata()["ckpt_tools"])
    words = {"date", "time", "host", "user", "path", "seconds", "created"}
    assert not words & {part for key in provenance for part in key.split("_")}
    for secret in (str(root), str(Path.home()), os.uname().nodename):
        assert secret == "/" or secret.encode() not in content
    assert not {"date", "time", "host", "user", "created"} & set(report)


def test_deterministic_changes_nothing_on_a_cpu(root: Path) -> None:
    assert run(root, "--deterministic") == run(root)


def settings() -> tuple[object, ...]:
    cudnn = torch.backends.cudnn
    enabled = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    return *enabled, cudnn.benchmark, cudnn.deterministic, os.environ.get("CUBLAS_WORKSPACE_CONFIG")


def test_deterministic_kernels_are_asked_for_and_settings_come_back() -> None:
    """Settings alone: they can be made without a GPU."""
    before = settings()
    within: tuple[object, ...] = ()
    with contextlib.suppress(KeyboardInterrupt), deterministic_kernels(torch.device("cuda")):
        within = settings()
        raise KeyboardInterrupt
    assert within[:4] == (True, False, False, True)
    assert within[4]
    assert settings() == before
    with deterministic_kernels(torch.device("cpu")):
        assert settings() == before
    with contextlib.ExitStack() as first, contextlib.ExitStack() as second:  # models that take turns
        first.enter_context(deterministic_kernels(torch.device("cuda")))
        second.enter_context(deterministic_kernels(torch.device("cuda")))
        first.close()
        assert settings() == within
    assert settings() == before
