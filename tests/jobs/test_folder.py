"""Many checkpoints in one run: as each alone, every outcome on record, nothing twice, whatever is killed."""

from __future__ import annotations

import json
import os
import random
import signal
from dataclasses import replace
from pathlib import Path

import nets
import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file

from ckpt_tools.cli import main
from ckpt_tools.cli.many_checkpoints import _data_files
from ckpt_tools.data.arrays.array_files import StoredArray
from ckpt_tools.data.preprocessing import Preprocessing
from ckpt_tools.data.shared_stream import read_together
from ckpt_tools.errors import OutputError
from ckpt_tools.jobs.many.folder_items import plan_items
from ckpt_tools.jobs.many.folder_run import reestimate_items
from ckpt_tools.jobs.request import EvaluationOptions, ModelChoice, ReadingOptions, Request
from ckpt_tools.location import Location
from ckpt_tools.method import Method
from ckpt_tools.report.records.manifest import Manifest, make_record, parse_records
from ckpt_tools.storage.discovery import find_checkpoints
from ckpt_tools.walker.downstream import walk

SHAPE = (3, 8, 8)


def cli(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def job(root: Path, *more: object) -> list[object]:
    data = ["--data", root / "data.npy", "--arch", "nets:DenseNet", "--batch-size", 16]
    return ["bn-reestimate", *more, *data, "-q"]


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)  # where manifests go that are given no place
    batches = nets.batches(SHAPE)
    np.save(tmp_path / "data.npy", torch.cat(batches).numpy())
    for number in range(4):
        torch.manual_seed(number)
        folder = tmp_path / "runs" / f"{number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(nets.trained(nets.DenseNet(), batches).state_dict(), folder / f"{number}.pt")
    return tmp_path


def lines(manifest: Path) -> list[dict]:
    return [json.loads(line) for line in manifest.read_text().splitlines()]


@pytest.mark.parametrize("estimator", ["pooled", "exact"])
def test_outputs_equal_those_of_single_runs(root: Path, estimator: str) -> None:
    more = ("--estimator", estimator)
    assert cli(*job(root, root / "runs", *more), "--output-dir", root / "fixed").exit_code == 0
    for number in (0, 3):
        source = root / "runs" / f"{number % 2}" / f"{number}.pt"
        assert cli(*job(root, source, *more), "-o", root / "single.safetensors", "--overwrite").exit_code == 0
        together = root / "fixed" / f"{number % 2}" / f"{number}.bn.safetensors"
        assert together.read_bytes() == (root / "single.safetensors").read_bytes()


def test_names_that_cannot_be_read_stop_no_other(root: Path) -> None:
    runs = root / "runs"
    weights = (runs / "0" / "0.pt").read_bytes()
    (runs / "self.pt").symlink_to("self.pt")
    (runs / "gone.pt").symlink_to("nothing")
    (runs / "again").symlink_to(".")
    os.mkfifo(runs / "pipe.pt")
    (runs / ("n" * 252 + ".pt")).write_bytes(weights)  # there is no room for .bn.safetensors
    (runs / os.fsdecode(b"\xff.pt")).write_bytes(weights)
    result = cli(*job(root, runs, "--output-dir", root / "fixed", "--report", root / "r.html", "--json"))
    assert result.exit_code == 1
    assert "4 of 9 checkpoints failed" in result.stderr
    records = {Path(record["checkpoint"]).name: record for record in json.loads(result.stdout)["checkpoints"]}
    wrong = {name[:7]: record["error"] for name, record in records.items() if record["status"] == "failed"}
    assert {*wrong} == {"self.pt", "gone.pt", "pipe.pt", "nnnnnnn"}
    assert "symbolic links" in wrong["self.pt"]
    assert "a link to nothing, which is not there" in wrong["gone.pt"]
    assert "neither a file nor a folder" in wrong["pipe.pt"]
    assert "File name too long" in wrong["nnnnnnn"]
    assert len(list((root / "fixed").rglob("*.safetensors"))) == 5


def test_hard_links_are_one_checkpoint(root: Path) -> None:
    runs = root / "runs" / "0"
    (runs / "last.pt").hardlink_to(runs / "2.pt")
    (runs / "best.pt").symlink_to("2.pt")
    arguments = job(root, root / "runs", "--output-dir", root / "fixed")
    result = cli(*arguments, "--report", root / "report.md")
    assert result.exit_code == 0
    said = "One file, processed once, that is also named best.pt, last.pt."
    assert f"{runs / '2.pt'}: {said}" in result.stdout
    assert said in (root / "report.md").read_text()
    assert sorted(path.name for path in (root / "fixed").rglob("*.safetensors")) == [
        f"{n}.bn.safetensors" for n in range(4)
    ]
    again = json.loads(cli(*arguments, "--json").stdout)["checkpoints"]
    for record in (*lines(root / "fixed" / "ckpt-fix.jsonl"), *again):
        also = [str(runs / "best.pt"), str(runs / "last.pt")] if record["checkpoint"].endswith("2.pt") else []
        assert record["also_named"] == also
    assert [record["status"] for record in again] == ["done before"] * 4


def test_a_bad_file_stops_no_other(root: Path) -> None:
    (root / "runs" / "bad.pt").write_bytes(b"nonsense")
    torch.save({"weight": torch.ones(2)}, root / "runs" / "other.pt")
    result = cli(*job(root, root / "runs", "--output-dir", root / "fixed"))
    assert result.exit_code == 1
    assert "1 of 6 checkpoints failed" in result.stderr
    assert "expected a checkpoint" in result.stdout
    records = {Path(line["checkpoint"]).name: line for line in lines(root / "fixed" / "ckpt-fix.jsonl")}
    assert {name for name, record in records.items() if record["status"] == "done"} == {
        f"{n}.pt" for n in range(4)
    }
    assert records["bad.pt"]["status"] == "failed"
    assert records["other.pt"]["status"] == "nothing to do"  # it has no BN layer
    assert records["0.pt"]["report"]["output"]["path"] == records["0.pt"]["output"]


def test_a_second_run_skips_what_is_done(root: Path) -> None:
    command = (*job(root, root / "runs"), "--output-dir", root / "fixed", "--json")
    cli(*command)
    stamps = {path: path.stat().st_mtime_ns for path in (root / "fixed").rglob("*.safetensors")}
    torch.save(nets.trained(nets.DenseNet(), nets.batches(SHAPE)).state_dict(), root / "runs" / "new.pt")
    records = json.loads(cli(*command).stdout)["checkpoints"]
    assert sorted(record["status"] for record in records) == ["done", *["done before"] * 4]
    assert all(record["report"] for record in records)
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps


def test_what_has_changed_is_refused_or_with_overwrite_done_again(root: Path) -> None:
    command = (*job(root, root / "runs"), "--output-dir", root / "fixed", "--json")
    cli(*command)
    torch.save(nets.trained(nets.DenseNet(), nets.batches(SHAPE)).state_dict(), root / "runs" / "0" / "0.pt")
    result = cli(*command)
    assert result.exit_code == 1
    failed = [record for record in json.loads(result.stdout)["checkpoints"] if record["status"] == "failed"]
    assert len(failed) == 1
    assert "--overwrite" in failed[0]["error"]
    assert cli(*command, "--overwrite").exit_code == 0
    assert cli(*command, "--seed", 1).exit_code == 1  # other settings


def test_two_that_would_share_an_output_keep_their_suffix(root: Path) -> None:
    first = root / "runs" / "0" / "0.pt"
    first.with_suffix(".pth").write_bytes(first.read_bytes())
    items = plan_items(find_checkpoints([root / "runs" / "0"]), root / "fixed")
    assert [item.output.name for item in items] == [
        "0.pt.bn.safetensors",
        "0.pth.bn.safetensors",
        "2.bn.safetensors",
    ]


def test_no_output_takes_the_place_of_a_checkpoint(root: Path) -> None:
    first = root / "runs" / "0" / "0.pt"
    names = ("0.pth", "0.pt.pt", "2.bn.safetensors")
    for name in names[:2]:
        (first.parent / name).write_bytes(first.read_bytes())
    save_file(torch.load(first), first.parent / names[2])  # somebody's own
    before = {path: path.read_bytes() for path in first.parent.iterdir()}
    assert cli(*job(root, first.parent), "--overwrite").exit_code == 0
    assert {path: path.read_bytes() for path in before} == before
    outputs = {path.name for path in first.parent.glob("*.bn.safetensors")} - set(names)
    assert outputs == {
        *("0.pt.bn.safetensors", "0.pth.bn.safetensors", "0.pt.pt.bn.safetensors"),
        *("2.pt.bn.safetensors", "2.bn.bn.safetensors"),
    }


def test_earlier_outputs_are_no_checkpoints_though_a_pattern_names_them(root: Path) -> None:
    folder = root / "runs" / "0"
    for name in ("0", "2"):
        save_file(torch.load(folder / f"{name}.pt"), folder / f"{name}.safetensors")
        (folder / f"{name}.pt").unlink()
    assert cli(*job(root, folder / "*.safetensors")).exit_code == 0
    written = sorted(folder.glob("*.safetensors"))
    for paths in ([folder / "*.safetensors"], written):
        result = cli(*job(root, *paths, "--json", "--manifest", folder / "m.jsonl"))
        assert [record["status"] for record in json.loads(result.stdout)["checkpoints"]] == [
            "done before"
        ] * 2
    assert sorted(folder.glob("*.safetensors")) == written


def test_earlier_outputs_with_their_suffixes_are_none_either(root: Path) -> None:
    folder = root / "runs" / "0"
    (folder / "0.pth").write_bytes((folder / "0.pt").read_bytes())
    assert cli(*job(root, folder / "0.pt", folder / "0.pth")).exit_code == 0
    written = sorted(folder.glob("*.safetensors"))
    result = cli(*job(root, folder / "0.pt", folder / "0.pth", *written, "--json"))
    assert [record["status"] for record in json.loads(result.stdout)["checkpoints"]] == ["done before"] * 2


def test_shards_beside_the_checkpoints_are_none(root: Path) -> None:
    names = [root / "runs" / f"train-{number:03}.tar" for number in range(2)]
    for name in names:
        name.write_bytes(b"a shard")
    request = Request(Location(Path()), str(root / "runs" / "train-{000..001}.tar"))
    assert set(names) <= {location.path for location in _data_files(request)}


def test_reports_of_earlier_runs_are_kept_however_the_folder_is_named(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(root)
    cli(*job(root, "runs"), "--output-dir", "fixed")
    size = len(lines(root / "fixed" / "ckpt-fix.jsonl"))
    for runs, fixed in (
        ("runs", "../" + root.name + "/fixed"),
        (root / "runs", "fixed"),
        ("runs", root / "fixed"),
    ):
        result = cli(*job(root, runs), "--output-dir", fixed, "--json")
        records = json.loads(result.stdout)["checkpoints"]
        assert all(record["report"] and record["status"] == "done before" for record in records)
        assert all(record["checkpoint"].startswith(str(runs)) for record in records)
    assert len(lines(root / "fixed" / "ckpt-fix.jsonl")) == size
    (root / "fixed" / "ckpt-fix.jsonl").unlink()
    for _ in range(2):
        cli(*job(root, "runs"), "--output-dir", "fixed")
    assert len(lines(root / "fixed" / "ckpt-fix.jsonl")) == size


def test_reports_go_into_a_new_folder_of_outputs(root: Path) -> None:
    result = cli(
        *job(root, root / "runs", "--output-dir", root / "new", "--report", root / "new" / "report.html")
    )
    assert result.exit_code == 0, result.output
    assert (root / "new" / "report.html").is_file()
    again = cli(
        *job(root, root / "runs", "--output-dir", root / "new", "--report", root / "new" / "report.md")
    )
    assert "4 of 4, 4 of them before" in (root / "new" / "report.md").read_text()
    assert again.exit_code == 0


def test_data_is_read_once_and_is_no_checkpoint(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.from_numpy(np.load(root / "data.npy"))
    torch.save(images, root / "runs" / "data.pt")
    reads = []
    load = StoredArray.load
    monkeypatch.setattr(StoredArray, "load", lambda self: reads.append(self.label) or load(self))
    more = ["--data", root / "runs" / "data.pt", "--eval-data", labelled(root)]
    result = cli(*job(root, root / "runs", "--output-dir", root / "fixed"), *more)
    assert result.exit_code == 0, result.output
    assert sorted(label for label in reads if "labels" not in label) == [
        str(root / "runs" / "data.pt"),
        f"{root / 'val.npz'}[images]",
    ]
    assert "error, %" in result.stdout


def test_nothing_to_do_anywhere(root: Path) -> None:
    result = cli(*job(root, root / "runs"), "--output-dir", root / "fixed", "--model-kwargs", "drop_rate=0.0")
    assert result.exit_code == 3
    assert {line["status"] for line in lines(root / "fixed" / "ckpt-fix.jsonl")} == {"nothing to do"}


def test_bad_use(root: Path) -> None:
    (root / "empty").mkdir()
    (root / "texts").mkdir()
    (root / "texts" / "readme.txt").write_text("x")
    for folder in ("empty", "texts"):
        result = cli(*job(root, root / folder), "--output-dir", root / "fixed")
        assert result.exit_code == 1
        assert "found none" in result.stderr
    assert cli(*job(root, root / "runs"), "-o", root / "x.safetensors").exit_code == 2
    (root / "file").write_text("in the way")
    assert cli(*job(root, root / "runs"), "--output-dir", root / "file").exit_code == 1
    assert not (root / "fixed").exists()


def _killed_run(root: Path, seconds: float) -> None:
    """The run in a forked child, which the kernel ends in its midst: no handler, no clean-up."""
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, seconds)
        whole_run(root)
        os._exit(0)
    os.waitpid(child, 0)


def whole_run(root: Path) -> list[str]:
    items = plan_items(find_checkpoints([root / "runs"]), root / "fixed")
    log = Manifest(root / "fixed" / "ckpt-fix.jsonl")
    request = Request(
        Location(Path()),
        str(root / "data.npy"),
        model=ModelChoice("nets:DenseNet"),
        reading=ReadingOptions(batch_size=16),
    )
    seen: list[str] = []
    reestimate_items(
        items, request, lambda result: seen.append(log.add_record(make_record(result))["status"])
    )
    return seen


def test_killed_at_random_moments(root: Path) -> None:
    whole_run(root)
    expected = {
        path.relative_to(root / "fixed"): load_file(path) for path in (root / "fixed").rglob("*.safetensors")
    }
    (root / "fixed").rename(root / "reference")
    source = random.Random(0)
    for _ in range(20):
        _killed_run(root, source.uniform(0.001, 0.5))
        for path in (root / "fixed").rglob("*.safetensors"):
            found = load_file(path)
            assert all(
                torch.equal(found[key], value)
                for key, value in expected[path.relative_to(root / "fixed")].items()
            )
    assert set(whole_run(root)) <= {"done", "done before"}
    assert len(list((root / "fixed").rglob("*.safetensors"))) == 4
    assert not list((root / "fixed").rglob("*.tmp"))
    done = [
        line["checkpoint"] for line in lines(root / "fixed" / "ckpt-fix.jsonl") if line["status"] == "done"
    ]
    assert len(done) == len(set(done))


def test_models_that_do_not_fit_together_go_one_by_one(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole_run(root)
    together = {path.name: path.read_bytes() for path in (root / "fixed").rglob("*.safetensors")}
    (root / "fixed").rename(root / "together")
    monkeypatch.setattr("ckpt_tools.jobs.many.folder_run.available_bytes", lambda: 0)
    rounds: list[int] = []

    def watched(stream: object, jobs: list[object], watch: object) -> None:
        rounds.append(len(jobs))
        read_together(stream, jobs, watch)

    monkeypatch.setattr("ckpt_tools.jobs.many.folder_run.read_together", watched)
    assert whole_run(root) == ["done"] * 4
    assert rounds == [1] * 4
    assert {path.name: path.read_bytes() for path in (root / "fixed").rglob("*.safetensors")} == together


def test_the_compiler_is_left_as_it_was(root: Path) -> None:
    """Models in turns, each in a thread, enter and leave in another order than a stack's."""
    graphs: list[object] = []

    def backend(graph: torch.fx.GraphModule, inputs: object) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    torch.compile(lambda x: x + 1, backend=backend)(torch.ones(3))  # from here on there is a compiler
    assert whole_run(root) == ["done"] * 4
    torch.compile(lambda x: x + 2, backend=backend)(torch.ones(3))
    assert len(graphs) == 2


def test_equal_architectures_are_walked_once_unless_their_rates_differ(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    walked: list[float] = []

    def counted(model: nets.DenseNet, *arguments: object, **more: object) -> object:
        walked.append(model.drop_rate)
        return walk(model, *arguments, **more)

    monkeypatch.setattr("ckpt_tools.jobs.walk_cache.walk", counted)
    assert whole_run(root) == ["done"] * 4
    assert len(walked) == 1
    state = torch.load(root / "runs" / "0" / "0.pt")
    for rate in (0.3, 0.4):
        torch.save({"state_dict": state, "args": {"drop_rate": rate}}, root / "runs" / f"{rate}.pt")
    assert sorted(whole_run(root)) == ["done"] * 2 + ["done before"] * 4
    assert walked[1:] == [0.3, 0.4]


def labelled(root: Path) -> Path:
    """Labelled data of the kind that the checkpoints of ``root`` take."""
    images = np.load(root / "data.npy")
    np.savez(root / "val.npz", images=images, labels=np.arange(len(images)) % 5)
    return root / "val.npz"


SAID_BEFORE_ANY_DATA = [
    (["--eval-data", "val.npz", "--gate", "error >"], 2, "--gate 'error >'"),
    (["--gate", "error < 5"], 2, "Give --eval-data"),
    (["--eval-data", "val.npz", "--class-map", "none.json"], 1, "none.json"),
    (["--tolerance", "0.1", "--estimator", "ema"], 2, "not the ema estimator"),
]
SAID_WHERE_IT_RUNS = [
    (["--eval-data", "none.npz"], 1, "none.npz"),
    (["--device", "cuda:99"], 1, "no such CUDA device"),
    (["--data", "none"], 1, "none"),
]


@pytest.mark.parametrize(
    ("engine", "more", "code", "said"),
    [
        *(("local", *case) for case in SAID_BEFORE_ANY_DATA + SAID_WHERE_IT_RUNS),
        *(("ray", *case) for case in SAID_BEFORE_ANY_DATA),
    ],
)
def test_what_concerns_all_is_said_once(
    root: Path, engine: str, more: list[str], code: int, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(root)
    labelled(root)
    before = sorted(root.rglob("*"))
    result = cli(*job(root, root / "runs", "--engine", engine), *more)
    assert (result.exit_code, result.stdout) == (code, ""), result.output
    assert said in result.stderr
    assert sorted(root.rglob("*")) == before


def test_a_gate_that_says_no_to_all(root: Path) -> None:
    gate = ("--eval-data", labelled(root), "--gate", "error < before - 50")
    result = cli(
        *job(root, root / "runs"), "--output-dir", root / "fixed", *gate, "--report", root / "r.md", "--json"
    )
    assert result.exit_code == 4
    assert "4 of 4 checkpoints failed" in result.stderr
    assert not list((root / "fixed").rglob("*.safetensors"))
    for record in json.loads(result.stdout)["checkpoints"]:
        assert record["metrics"]["gate"]["passed"] is False
        assert record["exit_code"] == 4
    assert (root / "r.md").read_text().count("The gate is not passed") == 4
    (root / "runs" / "bad.pt").write_bytes(b"nonsense")
    assert cli(*job(root, root / "runs"), "--output-dir", root / "fixed", *gate).exit_code == 1


def test_done_before_has_the_report_of_the_output_that_is_there(root: Path) -> None:
    first = (*job(root, root / "runs"), "--output-dir", root / "fixed", "--json")
    cli(*first)
    cli(
        *first, "--seed", 1, "--overwrite", "--manifest", root / "other.jsonl"
    )  # the outputs are other ones now
    records = json.loads(cli(*first, "--seed", 1).stdout)["checkpoints"]
    assert [(record["status"], record["report"]) for record in records] == [("done before", None)] * 4
    assert all(Path(record["output"]).is_file() for record in records)


def test_settings_are_equal_however_data_is_named(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root)
    labelled(root)
    (root / "sub").mkdir()
    (root / "map.json").write_text('["a", "b"]')
    (root / "copy.txt").write_text("a\nb\n")
    request = Request(
        Location(Path("x.pt")),
        "data.npy",
        eval_data="val.npz",
        evaluation=EvaluationOptions(class_map=Location(Path("map.json"))),
    )
    digest = request.settings_digest()
    for changes in (
        {"data": "./data.npy"},
        {"eval_data": f"{root}/sub/../val.npz"},
        {"evaluation": EvaluationOptions(class_map=Location(Path("copy.txt")))},
    ):
        assert replace(request, **changes).settings_digest() == digest
    (root / "map.json").write_text('["b", "a"]')
    assert request.settings_digest() != digest


def test_settings_have_the_digest_of_earlier_versions() -> None:
    request = Request(
        Location(Path("m.pt")),
        "x.npy",
        model=ModelChoice("timm:resnet18", {"a": 1, "b": "x"}, "ema", trust=True),
        preprocessing=Preprocessing(input_size=(3, 8, 8), crop_pct=0.9),
        method=Method(
            "ema", "all", momentum=0.2, epochs=2, precision="bf16", compile=True, keep_outliers=True
        ),
        reading=ReadingOptions(limit=7, seed=3, device="cpu", batch_size=4, workers=2),
        eval_data="s3://b/x",
        evaluation=EvaluationOptions(calibrate=True, gate="error<5"),
    )
    assert request.settings_digest() == "06eecee964dfcd32"
    earlier_default = Request(Location(Path("m.pt")), "data.npy", method=Method("pooled"))
    assert earlier_default.settings_digest() == "4486c235a273a139"


def test_a_manifest_has_a_file_of_its_own(root: Path) -> None:
    (root / "empty.txt").touch()
    for taken in (root / "data.npy", root / "runs" / "0" / "0.pt", root / "runs" / ".." / "data.npy"):
        content = taken.read_bytes()
        result = cli(*job(root, root / "runs"), "--manifest", taken)
        assert result.exit_code == 2
        assert "a file of its own" in result.stderr
        assert taken.read_bytes() == content


def test_a_manifest_is_not_appended_to_other_files(tmp_path: Path) -> None:
    for name, content in {
        "model.pt": b"PK\x03\x04 1\n2",
        "short": b"PK",
        "config.json": b'{"a":\n1}\n',
    }.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(OutputError, match="another file"):
            Manifest(tmp_path / name)
        assert (tmp_path / name).read_bytes() == content
    (tmp_path / "killed.jsonl").write_bytes(b'{"checkpoint": "a.p')
    Manifest(tmp_path / "killed.jsonl").add_record({"checkpoint": "b\udcff.pt", "status": "failed"})
    names = [record["checkpoint"] for record in parse_records((tmp_path / "killed.jsonl").read_bytes())]
    assert names == ["b\udcff.pt"]
