"""What GitHub Actions sees: annotations on stderr, a summary in its file, and JSON alone on stdout."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import nets
import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image
from torch import nn

from ckpt_tools.cli import main
from ckpt_tools.cli.github import annotate, append_step_summary
from ckpt_tools.report.ci_summary import checkpoint_warnings, failure_markdown
from ckpt_tools.report.pages.markdown_page import checkpoint_markdown, evaluation_markdown

ARCH = ["--arch", "nets:DenseNet"]


@pytest.fixture
def files(tmp_path: Path) -> Path:
    model = nets.trained(nets.DenseNet(), nets.batches((3, 8, 8)))
    torch.save(model.state_dict(), tmp_path / "model.pt")
    images = torch.cat(nets.batches((3, 8, 8))).numpy()
    np.save(tmp_path / "data.npy", images)
    np.savez(tmp_path / "labelled.npz", images=images, labels=np.arange(len(images)) % 5)
    return tmp_path


@pytest.fixture
def summary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A job in GitHub Actions; its summary already holds a line."""
    path = tmp_path / "summary.md"
    path.write_text("before\n")
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(path))
    return path


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def job(files: Path, *more: object) -> Result:
    return run("bn-reestimate", files / "model.pt", "--data", files / "data.npy", *ARCH, "-q", *more)


def annotations(stderr: str) -> list[tuple[str, str, str]]:
    """Kind, title and message, read as the runner reads them: whole lines, escapes undone."""
    found = []
    for line in stderr.splitlines():
        if match := re.fullmatch(r"::(\w+) title=([^:,]*)::(.*)", line):
            kind, title, message = match.groups()
            for code, character in (("%3A", ":"), ("%2C", ","), ("%0D", "\r"), ("%0A", "\n"), ("%25", "%")):
                title = title.replace(code, character)
                message = message.replace(code, character) if code not in ("%3A", "%2C") else message
            found.append((kind, title, message))
    return found


def test_a_finished_job(files: Path, summary: Path) -> None:
    result = job(files, "--json", "--model-kwargs", "drop_rate=0.2")
    assert result.exit_code == 0, result.stderr
    facts = json.loads(result.stdout)
    assert annotations(result.stderr) == []
    assert summary.read_text() == f"before\n{checkpoint_markdown(facts)}\n"
    job(files, "--overwrite", "--model-kwargs", "drop_rate=0.2")
    assert summary.read_text().count(facts["output"]["sha256"]) == 2  # equal runs, equal bytes


@pytest.mark.parametrize(
    ("arguments", "code", "kind", "words"),
    [
        (["--model-kwargs", "drop_rate=0.0"], 3, "warning", "nothing to do"),
        (["--mean", "9,9,9", "--layers", "none"], 2, "error", "--layers"),
        (["--arch", "nets:Missing"], 1, "error", "Missing"),
        (["--no-such-option"], 2, "error", "--no-such-option"),
    ],
)
def test_errors(files: Path, summary: Path, arguments: list[str], code: int, kind: str, words: str) -> None:
    result = job(files, "--json", *arguments)
    assert (result.exit_code, result.stdout) == (code, "")
    ((found, title, message),) = annotations(result.stderr)
    assert (found, title) == (kind, "ckpt-fix")
    assert words in message
    assert message.splitlines()[0] in result.stderr.replace("Error: ", "")
    assert f"(exit code {code})" in summary.read_text()


def test_a_gate_that_says_no(files: Path, summary: Path) -> None:
    other = files / "other.pt"
    torch.save({key: value + 1 for key, value in torch.load(files / "model.pt").items()}, other)
    result = run("diff", files / "model.pt", other, "--json")
    assert result.exit_code == 4
    assert not json.loads(result.stdout)["ok"]
    ((kind, _, message),) = annotations(result.stderr)
    assert kind == "error"
    assert "other.pt" in message
    assert "(exit code 4)" in summary.read_text()


def test_wrong_data_that_is_forced_is_a_warning(files: Path, summary: Path) -> None:
    np.save(files / "data.npy", np.load(files / "data.npy") * 30 + 7)
    refused = job(files, "--json")
    assert refused.exit_code == 4
    assert [kind for kind, _, _ in annotations(refused.stderr)] == ["error"]
    forced = job(files, "--json", "--force", "--model-kwargs", "drop_rate=0.2")
    assert forced.exit_code == 0
    messages = [message for kind, _, message in annotations(forced.stderr) if kind == "warning"]
    assert any("does not look like the training data" in message for message in messages)
    assert "does not look like the training data" in " ".join(messages)
    assert "❌" in summary.read_text()


def test_skipped_images_are_a_warning(tmp_path: Path, summary: Path) -> None:
    torch.save(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).state_dict(), tmp_path / "model.pt")
    folder = tmp_path / "train"
    folder.mkdir()
    for number in range(120):
        Image.new("RGB", (9, 9), (2 * number, number, 255 - number)).save(folder / f"{number:03}.png")
    (folder / "broken,50%.png").write_bytes(b"\x89PNG")
    arguments = ["--arch", "plain:build", "--layers", "all", "--input-size", "3,8,8"]
    arguments += ["--force", "-q", "--json"]
    with pytest.MonkeyPatch.context() as patch:
        (tmp_path / "plain.py").write_text(
            "from torch import nn\ndef build(): return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))\n"
        )
        patch.syspath_prepend(str(tmp_path))
        result = run("bn-reestimate", tmp_path / "model.pt", "--data", folder, *arguments)
    assert result.exit_code == 0, result.stderr
    messages = [message for _, _, message in annotations(result.stderr)]
    assert any("1 unreadable sample" in message and "broken,50%.png" in message for message in messages)


def test_a_folder_names_what_failed_and_what_to_look_at(files: Path, summary: Path) -> None:
    runs = files / "runs"
    runs.mkdir()
    (files / "model.pt").rename(runs / "good.pt")
    (runs / "bad,\u202e.pt").write_bytes(b"nonsense")
    result = run("bn-reestimate", runs, "--data", files / "data.npy", *ARCH, "-q", "--json", "--force")
    assert result.exit_code == 1
    found = annotations(result.stderr)
    errors = [message for kind, _, message in found if kind == "error"]
    assert len(errors) == 2
    assert "bad,\\u202e.pt: expected a checkpoint" in errors[0]
    assert "1 of 2 checkpoints failed" in errors[1]
    (done,) = [record for record in json.loads(result.stdout)["checkpoints"] if record["status"] == "done"]
    warnings = [message for kind, _, message in found if kind == "warning"]
    assert warnings == [f"{runs / 'good.pt'}: {worry}" for worry in checkpoint_warnings(done["report"])]
    for number in range(30):
        (runs / f"bad{number}.pt").write_bytes(b"nonsense")
    many = run("bn-reestimate", runs, "--data", files / "data.npy", *ARCH, "-q", "--json", "--force")
    assert len([kind for kind, _, _ in annotations(many.stderr) if kind == "error"]) == 10


def test_an_evaluation(files: Path, summary: Path) -> None:
    arguments = ("evaluate", files / "model.pt", "--data", files / "labelled.npz", *ARCH, "-q", "--json")
    result = run(*arguments, "--gate", "error <= 100")
    assert result.exit_code == 0, result.stderr
    assert annotations(result.stderr) == []
    assert summary.read_text() == f"before\n{evaluation_markdown(json.loads(result.stdout))}\n"
    assert "✅ The gate is passed: error &lt;= 100" in summary.read_text()
    assert run(*arguments, "--gate", "error > 100").exit_code == 4
    assert "❌ The gate is not passed: error &gt; 100 (error" in summary.read_text()
    summary.write_text("")
    refused = job(files, "--eval-data", files / "labelled.npz", "--gate", "error < 0")
    assert refused.exit_code == 4
    assert "| error | " in summary.read_text()


def test_skipped_labelled_images_are_a_warning(files: Path, summary: Path) -> None:
    for number in range(120):
        folder = files / "val" / str(number % 5)
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (2 * number, number, 255 - number)).save(folder / f"{number}.png")
    (files / "val" / "0" / "torn.png").write_bytes(b"\x89PNG")
    result = run(
        "evaluate", files / "model.pt", "--data", files / "val", *ARCH, "--input-size", "3,8,8", "-q"
    )
    assert result.exit_code == 0, result.stderr
    ((kind, _, message),) = annotations(result.stderr)
    assert kind == "warning"
    assert "1 unreadable labelled image(s) skipped" in message
    assert "torn.png" in message
    assert "torn.png" in summary.read_text()


def test_a_name_that_is_no_text_is_summarised(summary: Path) -> None:
    append_step_summary("a\udcff.pt")
    assert summary.read_text() == "before\na?.pt\n"


def test_nothing_is_written_elsewhere(files: Path) -> None:
    before = sorted(files.iterdir())
    result = job(files, "--model-kwargs", "drop_rate=0.0")
    assert "::" not in result.stderr
    assert sorted(files.iterdir()) == before


def test_a_summary_that_cannot_be_written_is_no_failure(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(files))  # a folder
    result = job(files, "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout)
    assert "the summary cannot be written (Is a directory)" in result.stderr


def test_escapes(summary: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = "100 % of a: b, c\r\nnext\n::error::not a command"
    annotate("error", message)
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert annotations(line) == [("error", "ckpt-fix", message)]
    assert "&#124;" in failure_markdown("a | b", 1)
    assert "<b>" not in failure_markdown("<b>", 1)


EVERY = {
    "bn-reestimate": ["model.pt", "--data", "data.npy", "--arch", "talkative:build"],
    "convert": ["model.pt"],
    "diff": ["model.pt", "model.pt"],
    "evaluate": ["model.pt", "--data", "labelled.npz", "--arch", "talkative:build"],
    "init-rewrite": ["--arch", "talkative:build", "--input-size", "3,8,8", "-o", "init.safetensors"],
    "inspect": ["model.pt", "--arch", "talkative:build", "--input-size", "3,8,8"],
}


@pytest.mark.parametrize("name", sorted(set(main.commands) - {"demo"}))  # tests/cli/test_cli.py runs the demo
def test_json_is_alone_on_stdout(name: str, files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (files / "talkative.py").write_text(
        "import nets\ndef build():\n    print('building')\n    return nets.DenseNet()\n"
    )
    monkeypatch.syspath_prepend(files)
    monkeypatch.chdir(files)
    good = run(name, *EVERY[name], "--json")
    assert good.exit_code == 0, good.stderr
    assert json.loads(good.stdout)
    assert ("building" in good.stderr) == ("talkative:build" in EVERY[name])
    (files / "model.pt").write_bytes(b"no checkpoint")
    bad = run(name, *EVERY[name], "--json")
    assert bad.exit_code == 1
    assert bad.stdout == ""
    assert bad.stderr


@pytest.mark.parametrize("closed", ["", "<&-", "2>&-", "<&- >&- 2>&-"])
def test_json_is_alone_on_a_real_stdout(closed: str, files: Path) -> None:
    """Whatever writes to the descriptor, and whichever streams a daemon has closed."""
    (files / "loud.py").write_text(
        "import os, nets\n"
        "def build():\n    os.write(1, b'raw')\n    os.system('echo shell')\n    return nets.DenseNet()\n"
    )
    command = (
        f"{sys.executable} -m ckpt_tools evaluate model.pt --data labelled.npz "
        f"--arch loud:build --json {closed}"
    )
    paths = {"PYTHONPATH": os.pathsep.join(map(str, (files, *sys.path)))}
    result = subprocess.run(
        ["bash", "-c", command], cwd=files, env={**os.environ, **paths}, stdout=subprocess.PIPE, check=False
    )
    assert result.returncode == 0
    assert ">&- " in closed or json.loads(result.stdout)["metrics"]


def test_data_that_nothing_vouches_for() -> None:
    facts = {
        "data": {"skipped": [], "agreement": {"verdict": "none", "cause": "no counters"}},
        "controls": {"verdict": "none", "reason": "every layer is rewritten"},
    }
    assert checkpoint_warnings(facts) == (
        "nothing vouches for the data: no counters; no control layer (every layer is rewritten)",
    )
    facts["controls"] = {"verdict": "agree", "reason": ""}
    assert checkpoint_warnings(facts) == ()
