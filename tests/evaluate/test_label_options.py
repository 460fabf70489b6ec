"""``--labels`` and ``--crop-mode`` on the command line: images without class folders, lines of text."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import nets
import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image

from ckpt_tools.cli import main
from ckpt_tools.data.preprocessing import Preprocessing
from ckpt_tools.jobs.request import EvaluationOptions, Request
from ckpt_tools.location import Location

COUNT = 40
ARCH = ("--arch", "nets:DenseNet", "--input-size", "3,8,8")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint, a flat folder of wide images, and what the network says of them, squashed."""
    monkeypatch.chdir(tmp_path)
    model = nets.trained(nets.DenseNet(), nets.batches((3, 8, 8)))
    pixels = np.random.default_rng(0).integers(0, 256, (COUNT, 8, 32, 3), np.uint8)
    Path("val").mkdir()
    inputs = []
    for number, image in enumerate(pixels):
        Image.fromarray(image).save(f"val/{number:02}.png")
        squashed = Image.fromarray(image).resize((8, 8), Image.Resampling.BILINEAR)
        inputs.append(torch.from_numpy(np.array(squashed)).permute(2, 0, 1) / 255)
    with torch.no_grad():
        logits = model.eval()(torch.stack(inputs))
        model.head.bias -= logits.mean(0)  # so that the classes differ
        classes = (logits - logits.mean(0)).argmax(1).tolist()
    torch.save(model.state_dict(), "model.pt")
    rows = [f"{number:02}.png,{label}" for number, label in enumerate(classes)]
    Path("labels.csv").write_text("\n".join(["name,label", *rows]))
    return tmp_path


def test_squashed_images_with_a_label_file(folder: Path) -> None:
    job = ("evaluate", "model.pt", "--data", "val", "--labels", "labels.csv", "-q", *ARCH)
    result = run(*job, "--crop-mode", "squash", "--json")
    assert result.exit_code == 0, result.output
    metrics = json.loads(result.stdout)["metrics"]
    # Labels are what the network says of squashed images, so that any other image or order shows.
    assert (metrics["images"], metrics["after"]["error"]["value"]) == (COUNT, 0)
    text = run(*job, "--crop-mode", "squash").output
    assert "squashed to 8×8" in text
    assert "labels      labels.csv" in text
    cropped = json.loads(run(*job, "--json").stdout)["metrics"]
    assert cropped["after"]["error"]["value"] > 0


def test_a_run_with_labelled_data_repeats_its_options(folder: Path) -> None:
    Path("val/notes.md").write_text("")
    job = ("bn-reestimate", "model.pt", "--data", "val", "--eval-data", "val", "--labels", "labels.csv", "-q")
    result = run(*job, *ARCH, "--estimator", "ratio", "--crop-mode", "border", "--json")
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    assert "--crop-mode border" in facts["command"]
    assert "--labels labels.csv" in facts["command"]
    assert facts["data"]["input"]["crop_mode"] == "border"
    assert facts["data"]["other_files"] == {".md": 1}
    assert facts["metrics"]["images"] == COUNT


@pytest.mark.parametrize(
    ("more", "code", "message"),
    [
        (["--crop-mode", "stretch"], 2, "'center', 'squash', 'border'"),
        (["--labels", "labels.csv"], 2, "--eval-data"),
        (["--eval-data", "val"], 1, "--labels FILE"),
        (["--eval-data", "val", "--labels", "none.csv"], 1, "none.csv"),
        (["--eval-data", "val.npz", "--labels", "labels.csv"], 2, "--labels is for a folder"),
        (["--report", "labels.csv", "--eval-data", "val", "--labels", "labels.csv"], 2, "labels.csv"),
    ],
)
def test_what_does_not_go_together(folder: Path, more: list[str], code: int, message: str) -> None:
    np.savez("val.npz", images=np.zeros((4, 3, 8, 8), np.float32), labels=[0, 1, 2, 3])
    before = Path("labels.csv").read_bytes()
    result = run("bn-reestimate", "model.pt", "--data", "val", "-q", *ARCH, *more)
    assert (result.exit_code, message in result.output) == (code, True), result.output
    assert Path("labels.csv").read_bytes() == before


def test_settings_count_in_the_digest_where_they_are_given(folder: Path) -> None:
    request = Request(Location(Path("model.pt")), "val", eval_data="val")
    labelled = replace(request, evaluation=EvaluationOptions(labels=Location(Path("labels.csv"))))
    squashed = replace(request, preprocessing=Preprocessing(crop_mode="squash"))
    digests = [item.settings_digest() for item in (request, labelled, squashed)]
    assert len(set(digests)) == 3
    assert "crop_mode" not in repr(request.preprocessing)  # else earlier outputs would be made again
    Path("copy.csv").write_bytes(Path("labels.csv").read_bytes())
    copied = replace(request, evaluation=EvaluationOptions(labels=Location(Path("copy.csv"))))
    assert copied.settings_digest() == digests[1]


def test_what_is_not_read_is_shown_by_every_command(folder: Path) -> None:
    Path("val/photo.heic").write_bytes(b"")
    Path("val/broken.png").write_bytes(b"")
    Path("labels.csv").write_text(Path("labels.csv").read_text() + "\nbroken.png,0")
    for command in (
        ("inspect", "model.pt", "--data", "val"),
        ("bn-reestimate", "model.pt", "--data", "val", "--estimator", "ratio", "-q"),
        ("evaluate", "model.pt", "--data", "val", "--labels", "labels.csv", "-q"),
    ):
        output = run(*command, *ARCH).output
        assert "1 other file: 1 × .heic" in output
        assert "WARNING: skipped 1 unreadable" in output
        assert "broken.png (empty file)" in output
