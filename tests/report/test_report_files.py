"""Reports as files: from the command line, by suffix, never in place of anything else, without secrets."""

from __future__ import annotations

import dataclasses
import html
import json
import shlex
from dataclasses import dataclass
from pathlib import Path

import nets
import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image
from report_facts import facts, records

from ckpt_tools.cli import main
from ckpt_tools.errors import OutputError, UsageError
from ckpt_tools.jobs.request import Request
from ckpt_tools.redaction import without_secrets
from ckpt_tools.report.pages.html_page import checkpoint_html
from ckpt_tools.report.repeat_command import repeating_command
from ckpt_tools.report.report_files import check_reports, write_report

RATE = ("--model-kwargs", "drop_rate=0.2")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A folder with model.pt and the training data as an array."""
    model = nets.trained(nets.DenseNet(), nets.batches((3, 8, 8)))
    torch.save(model.state_dict(), tmp_path / "model.pt")
    np.save(tmp_path / "data.npy", torch.cat(nets.batches((3, 8, 8))).numpy())
    return tmp_path


def job(files: Path, *more: object) -> list[object]:
    base = [
        "bn-reestimate",
        files / "model.pt",
        "--data",
        files / "data.npy",
        "--arch",
        "nets:DenseNet",
        "-q",
    ]
    return [*base, *RATE, *more]


def test_from_the_command_line(files: Path) -> None:
    names = [files / f"out.{suffix}" for suffix in ("html", "md", "json")]
    result = run(*job(files, *(word for name in names for word in ("--report", name))))
    assert result.exit_code == 0, result.output
    assert all(f"report: {name}" in result.stdout for name in names)
    told = json.loads(names[2].read_text())
    assert names[0].read_text() == checkpoint_html(told), "the page is made from the facts alone"
    assert [site["depth"] for site in told["dropout_sites"]] == [1, 2, 3, 4]
    assert all(site["active"] for site in told["dropout_sites"])
    again = run(*job(files, "--overwrite", "--json", "--report", names[2]))
    assert json.loads(names[2].read_text()) == json.loads(again.stdout)


def parsed(arguments: list[str]) -> Request:
    """What the command line makes of its arguments."""
    requests: list[Request] = []
    with pytest.MonkeyPatch.context() as patch:
        job = "ckpt_tools.cli.bn_reestimate_command._reestimate_checkpoint"
        patch.setattr(job, lambda request, *_, **__: requests.append(request))
        main.commands["bn-reestimate"].main(list(arguments), standalone_mode=False)
    (request,) = requests
    return request


@dataclass(frozen=True)
class Planned:
    """As much of a Plan as the command is made of."""

    request: Request
    batch_size: int


def test_the_command_repeats_the_run() -> None:
    pairs = ("drop_rate=0.2", "name=a b", "quoted='0.2'", "shape=(1, 2)")
    words = [
        "./-x.pt",
        "--data",
        "d d",
        "--limit",
        "100",
        "--seed",
        "3",
        "--mean",
        "-0.5,0.5,1",
        "--compile",
        "--keep-outliers",
    ]
    words += [
        "--statistics",
        "mean+variance",
        "--layers",
        "all",
        "--arch",
        "nets:DenseNet",
        "--tolerance",
        "0.05",
    ]
    words += ["--keep-outliers"]
    words += [word for pair in pairs for word in ("--model-kwargs", pair)]
    request = parsed(words)
    line = shlex.split(repeating_command(Planned(request, 17)))
    assert line[:2] == ["ckpt-fix", "bn-reestimate"]
    reading = dataclasses.replace(request.reading, batch_size=17)
    assert parsed(line[2:]) == dataclasses.replace(request, reading=reading)


def test_labelled_data_is_reported(files: Path) -> None:
    """From a real run: units, the gate and its verdict, and what could not be read."""
    folder = files / "val"
    for label in range(5):
        (folder / str(label)).mkdir(parents=True)
        for number in range(30):
            image = np.random.default_rng(30 * label + number).integers(0, 255, (8, 8, 3), np.uint8)
            Image.fromarray(image).save(folder / str(label) / f"{number}.png")
    (folder / "0" / "torn.png").write_bytes(b"\x89PNG")
    names = [files / f"out.{suffix}" for suffix in ("html", "md")]
    more = [word for name in names for word in ("--report", name)]
    gate = ("--eval-data", folder, "--gate", "error <= before + 100", "--calibrate", "--input-size", "3,8,8")
    np.save(files / "data.npy", np.random.default_rng(0).integers(0, 255, (200, 3, 8, 8), np.uint8))
    result = run(*job(files, "--force", *gate, *more))
    assert result.exit_code == 0, result.output
    for name in names:
        text = html.unescape(name.read_text().replace("\\", "").replace("<wbr>", ""))
        for said in ("The gate is passed: error <= before + 100", "percent, 15 bins", "nats", "torn.png",
                     "skipped (labelled data)", "calibration temperature"):  # fmt: skip
            assert said in text, (name, said)
        assert "every image could be read" not in text


@pytest.mark.parametrize("name", ["out.txt", "out", "out.html.gz"])
def test_other_suffixes_are_refused_before_any_work(
    files: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "ckpt_tools.jobs.plan.prepare_reestimation", lambda _: pytest.fail("nothing may be loaded")
    )
    result = run(*job(files, "--report", files / name))
    assert result.exit_code == 2
    assert ".html, .md or .json" in result.stderr


def test_a_refused_run_writes_nothing(files: Path) -> None:
    np.save(files / "data.npy", 50 * torch.cat(nets.batches((3, 8, 8))).numpy())
    result = run(*job(files, "--estimator", "pooled", "--report", files / "out.html"))
    assert result.exit_code == 4
    assert not (files / "out.html").exists()
    assert not list(files.glob(".*"))


def test_only_reports_are_replaced(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"mine": true}')
    with pytest.raises(OutputError, match="another file"):
        write_report(path, facts())
    assert path.read_text() == '{"mine": true}'
    for suffix in ("html", "md", "json"):
        for content in (facts(), records()):
            (tmp_path / f"new.{suffix}").touch()
            write_report(tmp_path / f"new.{suffix}", content)
    assert not list(tmp_path.glob(".*"))


def test_files_of_the_job_are_no_reports(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    with pytest.raises(UsageError, match="another file of this job"):
        check_reports([path], [None, tmp_path / "x" / ".." / "data.json"])
    with pytest.raises(UsageError, match="another file of this job"):
        check_reports([path, path])
    with pytest.raises(OutputError, match="expected the folder"):
        check_reports([tmp_path / "none" / "out.md"])


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("https://user:pw@host:8080/a/b.tar?sig=1#x", "https://host:8080/a/b.tar"),
        ("s3://KEY:SEC/RET@bucket/x", "s3://bucket/x"),
        ("zip://a.zip::s3://k:s@b/x?v=1", "zip://a.zip::s3://b/x"),
        ("token@host is no URL; http://token@host/x is", "token@host is no URL; http://host/x is"),
        ("http://host:80/a@b", "http://host:80/a@b"),
        ("'https://host/x?y=1' and \"ftp://a:b@c\"", "'https://host/x' and \"ftp://c\""),
        ("C:\\data\\x?", "C:\\data\\x?"),
        ({"a": ["http://u:p@h"], "b": 1}, {"a": ["http://h"], "b": 1}),
    ],
)
def test_secrets(given: object, expected: object) -> None:
    assert without_secrets(given) == expected
    assert without_secrets(expected) == expected
