"""Remote paths: as local ones, nothing half-done, nothing left behind, no secret anywhere."""

from __future__ import annotations

import http.server
import io
import json
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import format_files
import fsspec
import nets
import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import known_implementations
from PIL import Image
from safetensors.torch import load, save_file
from stores import Fragile, Whole
from torch import nn

import ckpt_tools
from ckpt_tools.cli import main
from ckpt_tools.contract import InputSpec
from ckpt_tools.data.data_source import open_source
from ckpt_tools.data.images import remote_image_folder
from ckpt_tools.data.labels import read_class_map
from ckpt_tools.data.sample_order import Reading
from ckpt_tools.data.stream import BatchStream
from ckpt_tools.errors import OutputError, RemoteError, UsageError
from ckpt_tools.jobs.outputs import default_output_path
from ckpt_tools.location import Location
from ckpt_tools.machine.temporary_folders import new_temporary_name
from ckpt_tools.redaction import without_secrets
from ckpt_tools.remote.local_copies import fetch_file
from ckpt_tools.remote.mirror import open_mirror
from ckpt_tools.storage.discovery import find_checkpoints
from ckpt_tools.storage.provenance import read_provenance_entry
from ckpt_tools.storage.reading import read_checkpoint

ARCH = ["--arch", "nets:DenseNet", "--batch-size", 16]
SHAPE = (3, 8, 8)


def cli(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def ok(*arguments: object) -> Result:
    result = cli(*arguments)
    assert result.exit_code == 0, result.output
    return result


def failed(*arguments: object, code: int = 1) -> str:
    result = cli(*arguments)
    assert result.exit_code == code, result.output
    assert "written" not in result.stdout
    return result.stderr


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where copies go; at the end of every test nothing is there."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield folder
    assert not list(folder.glob("*ckpt-tools*"))


@pytest.fixture(autouse=True)
def stores() -> Iterator[None]:
    for store in (Fragile, Whole):
        fsspec.register_implementation(store.protocol, store, clobber=True)
    Fragile.reset()
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]
    yield
    assert not [name for name in (*Fragile.files, *MemoryFileSystem.store) if ".tmp" in name]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, its training data, and a folder of three models, made once."""
    folder = tmp_path_factory.mktemp("made")
    np.save(folder / "data.npy", torch.cat(nets.batches(SHAPE)).numpy())
    for number in range(3):
        torch.manual_seed(number)
        runs = folder / "runs" / f"{number % 2}"
        runs.mkdir(parents=True, exist_ok=True)
        torch.save(nets.trained(nets.DenseNet(), nets.batches(SHAPE)).state_dict(), runs / f"{number}.pt")
    return folder


@pytest.fixture
def files(tmp_path: Path, made: Path) -> Path:
    shutil.copy(made / "data.npy", tmp_path)
    shutil.copy(made / "runs/0/0.pt", tmp_path / "model.pt")
    return tmp_path


@pytest.fixture
def runs(files: Path, made: Path) -> Path:
    shutil.copytree(made / "runs", files / "runs")
    return files


@pytest.fixture
def model(made: Path) -> nn.Module:
    model = nets.DenseNet()
    model.load_state_dict(torch.load(made / "runs/0/0.pt"))
    return model


def upload(path: Path, url: str) -> str:
    fs, name = fsspec.core.url_to_fs(url)
    fs.pipe_file(name, path.read_bytes())
    return url


def content(url: str) -> bytes:
    fs, name = fsspec.core.url_to_fs(url)
    return fs.cat_file(name)


def stored(prefix: str = "") -> set[str]:
    return {name for name in MemoryFileSystem.store if name.startswith(prefix)}


@pytest.mark.parametrize("scheme", ["memory", "fragile"])
def test_a_remote_run_gives_the_bytes_of_a_local_one(files: Path, scheme: str) -> None:
    data = ["--data", files / "data.npy", *ARCH, "-q"]
    ok("bn-reestimate", files / "model.pt", *data)
    url = upload(files / "model.pt", f"{scheme}://bucket/my runs/model.pt")
    result = ok("bn-reestimate", url, *data)
    assert (
        content(f"{scheme}://bucket/my runs/model.bn.safetensors")
        == (files / "model.bn.safetensors").read_bytes()
    )
    assert f"checkpoint     {url} (torch.save)" in result.stdout
    assert f"written: {scheme}://bucket/my runs/model.bn.safetensors" in result.stdout
    assert "temporary" not in result.output


def test_outputs_go_where_they_are_told(files: Path) -> None:
    data = ["--data", files / "data.npy", *ARCH, "-q"]
    ok(
        "bn-reestimate",
        files / "model.pt",
        *data,
        "-o",
        "memory://out/x.safetensors",
        "--report",
        "memory://out/x.json",
    )
    url = upload(files / "model.pt", "memory://in/model.pt")
    result = ok("bn-reestimate", url, *data, "-o", files / "y.safetensors", "--json")
    assert content("memory://out/x.safetensors") == (files / "y.safetensors").read_bytes()
    facts = json.loads(result.stdout)
    assert facts["checkpoint"]["path"] == url
    assert facts["output"]["path"] == str(files / "y.safetensors")
    assert facts["command"].startswith(f"ckpt-fix bn-reestimate {url} ")
    assert json.loads(content("memory://out/x.json"))["output"]["path"] == "memory://out/x.safetensors"


def test_every_command_reads_urls(files: Path) -> None:
    url = upload(files / "model.pt", "memory://bucket/model.pt")
    shape = ["--arch", "nets:DenseNet", "--input-size", "3,8,8"]
    assert json.loads(ok("inspect", url, *shape, "--json").stdout)["checkpoint"]["path"] == url
    assert f"bn-reestimate {url} --data DATA" in ok("inspect", url, *shape).stdout
    ok("convert", url)
    assert "0 different" in ok("diff", url, "memory://bucket/model.safetensors", "--expect", "nothing").stdout
    torch.save(nets.DenseNet().state_dict(), files / "fresh.pt")
    fresh = upload(files / "fresh.pt", "memory://bucket/fresh.pt")
    assert "written: memory://bucket/fresh.init.safetensors" in ok("init-rewrite", fresh, *shape).stdout
    ok("diff", fresh, "memory://bucket/fresh.init.safetensors")
    assert f"should be as in {url}" in cli("diff", url, "memory://bucket/fresh.init.safetensors").stderr
    assert stored() == {f"/bucket/{name}" for name in ("model.pt", "model.safetensors", "fresh.pt", NEW)}


NEW = "fresh.init.safetensors"


def test_python_reads_and_writes_urls(files: Path) -> None:
    url = upload(files / "model.pt", "memory://bucket/model.pt")
    with open_mirror():
        loaded = ckpt_tools.load(url, "nets:DenseNet")
        ckpt_tools.save(
            "memory://bucket/copy.safetensors", loaded.checkpoint, {}, provenance={"expect": "nothing"}
        )
    assert set(load(content("memory://bucket/copy.safetensors"))) == set(torch.load(files / "model.pt"))


def test_file_urls_are_paths(files: Path) -> None:
    ok("convert", f"file://{files}/model.pt", "-o", f"file://{files}/x.safetensors")
    assert (
        "0 different" in ok("diff", files / "model.pt", files / "x.safetensors", "--expect", "nothing").stdout
    )


# Bad input


def job(files: Path, *more: object) -> list[object]:
    return ["bn-reestimate", *more, "--data", files / "data.npy", *ARCH, "-q"]


@pytest.mark.parametrize(
    ("url", "code", "said"),
    [
        (
            "memory://bucket/nothing.pt",
            1,
            "memory://bucket/nothing.pt: expected a file or folder there, found nothing",
        ),
        ("s4://bucket/model.pt", 2, "Did you mean s3?"),
        ("memory://bucket/../model.pt", 2, "without empty parts"),
        ("memory://", 2, "without empty parts"),
        ("lost://bucket/model.pt", 1, "reading lost:// needs a package"),
        ("gs://bucket/model.pt", 1, "pip install gcsfs"),
    ],
)
def test_urls_that_lead_nowhere(
    files: Path, url: str, code: int, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = {"class": "not_there.Store", "err": "Install it."}
    for scheme in ("lost", "gs"):
        monkeypatch.setitem(known_implementations, scheme, missing)
    for command in (job(files, url), ["inspect", url], ["convert", url], ["diff", url, files / "model.pt"]):
        assert said in failed(*command, code=code)


def test_a_connection_that_is_lost_while_reading(files: Path) -> None:
    url = upload(files / "model.pt", "fragile://bucket/model.pt")
    Fragile.read_limit = 1000
    said = failed(*job(files, url))
    assert "fragile://bucket/model.pt: cannot be reached (ConnectionResetError: the store went away)" in said
    assert set(Fragile.files) == {"bucket/model.pt"}


def test_a_store_that_may_not_be_written_is_found_out_before_the_data_is_read(files: Path) -> None:
    Fragile.read_only = True
    said = failed(
        "bn-reestimate", files / "model.pt", "--data", "nowhere", "-o", "fragile://bucket/x.safetensors"
    )
    assert "fragile://bucket/x.safetensors: cannot be written there (PermissionError: AccessDenied)" in said
    assert "Nothing was left behind" in said
    assert Fragile.files == {}


def test_a_connection_that_is_lost_while_writing(files: Path) -> None:
    Fragile.write_limit = 1000
    said = failed(*job(files, files / "model.pt", "-o", "fragile://bucket/x.safetensors"))
    assert (
        "cannot be written there (ConnectionResetError: the store went away). Nothing was left behind."
        in said
    )
    assert Fragile.files == {}


def test_a_leftover_that_cannot_be_removed_is_named(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Fragile, path: str) -> None:
        raise PermissionError(path)

    monkeypatch.setattr(Fragile, "rm_file", refuse)
    said = failed(*job(files, files / "model.pt", "-o", "fragile://bucket/x.safetensors"))
    (left,) = Fragile.files
    assert f"fragile://{left} may be left there; remove it." in said
    Fragile.files.clear()


@pytest.mark.parametrize("step", ["_open", "cp_file", "rm_file"])
def test_an_interruption_leaves_nothing(files: Path, step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    original, calls = getattr(Fragile, step), []

    def interrupted(self: Fragile, *arguments: object, **more: object) -> object:
        calls.append(arguments)
        if len(calls) == 2:  # the first is the probe's
            raise KeyboardInterrupt
        return original(self, *arguments, **more)

    monkeypatch.setattr(Fragile, step, interrupted)
    calls.extend([()] if step == "cp_file" else [])
    failed(*job(files, files / "model.pt", "-o", "fragile://bucket/x.safetensors"), code=130)
    assert Fragile.files == {}


def test_other_bytes_than_were_sent(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        Fragile, "put_file", lambda self, local, name, **more: self.pipe_file(name, b"rubbish")
    )
    said = failed("convert", files / "model.pt", "-o", "fragile://bucket/x.safetensors")
    assert "other bytes came back than were sent" in said
    assert Fragile.files == {}


def test_an_object_store_gets_an_output_in_one_step(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ok("convert", files / "model.pt", "-o", files / "local.safetensors")
    ok("convert", files / "model.pt", "-o", "s3://bucket/x.safetensors")
    assert Whole.files == {"bucket/x.safetensors": (files / "local.safetensors").read_bytes()}
    Fragile.files["bucket/x.safetensors"] = b"earlier"
    Fragile.write_limit = 1000
    again = ["convert", files / "model.pt", "-o", "s3://bucket/x.safetensors", "--overwrite"]
    assert "the store went away" in failed(*again)
    assert Whole.files == {"bucket/x.safetensors": b"earlier"}
    monkeypatch.setattr(Whole, "put_file", lambda self, local, name, **more: self.pipe_file(name, b"rubbish"))
    assert "other bytes came back than were sent" in failed(*again)
    assert Whole.files == {}


def test_an_existing_output_stays_without_overwrite(files: Path) -> None:
    url = upload(files / "data.npy", "memory://bucket/x.safetensors")
    said = failed(*job(files, files / "model.pt", "-o", url))
    assert f"{url}: expected no such file, found one. Pass --overwrite" in said
    assert content(url) == (files / "data.npy").read_bytes()
    ok(*job(files, files / "model.pt", "-o", url, "--overwrite"))
    assert recorded_of(content(url), files)["estimator"] == "pooled"


def recorded_of(output: bytes, folder: Path) -> dict:
    (folder / "output").write_bytes(output)
    found = read_provenance_entry(folder / "output")
    assert found is not None
    return found


def test_the_source_is_never_written_to(files: Path) -> None:
    with open_mirror():
        torch.save({"running_var": torch.ones(2)}, files / "x.pt")
        url = upload(files / "x.pt", "memory://bucket/x.safetensors")
        with pytest.raises(OutputError, match="never written to"):
            ckpt_tools.save(url, read_checkpoint(url), {}, provenance={}, overwrite=True)


def test_a_disk_without_room(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = upload(files / "model.pt", "memory://bucket/model.pt")
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 10}))
    assert "bytes, 10 bytes are free" in failed("inspect", url)


# Secrets


def test_secrets_are_shown_nowhere(files: Path) -> None:
    upload(files / "model.pt", "fragile://bucket/model.pt")
    upload(files / "data.npy", "fragile://bucket/data.npy")
    source, data = (
        "fragile://me:s3cr3t@bucket/model.pt?token=t0k3n",
        "fragile://me:s3cr3t@bucket/data.npy?token=t0k3n",
    )
    reports = [files / f"report.{kind}" for kind in ("json", "md", "html")]
    more = [*ARCH, *(f"--report={report}" for report in reports), "-q"]
    result = ok("bn-reestimate", source, "--data", data, *more)
    as_json = ok("bn-reestimate", source, "--data", data, *more, "--overwrite", "--json")
    output = content("fragile://bucket/model.bn.safetensors").decode("latin1")
    told_all = [result.output, as_json.output, output, *(report.read_text() for report in reports)]
    Fragile.read_limit = 10
    told_all.append(failed("bn-reestimate", source, "--data", data, *more))
    Fragile.read_limit = None
    told_all.append(
        failed("bn-reestimate", source, "--data", data.replace("data", "nothing"), *more, "--overwrite")
    )
    told_all.append(failed("inspect", source.replace("model", "nothing")))
    told_all.append(failed("inspect", "model.pt", source, code=2))
    for text in told_all:
        assert "s3cr3t" not in text
        assert "t0k3n" not in text
    assert "fragile://bucket/model.pt" in result.stdout
    assert "fragile://bucket/data.npy" in result.stdout


def test_places_are_told_as_urls() -> None:
    with open_mirror():
        one, other = (
            Location.of("https://me:pw@host/a/b.pt?sig=1"),
            Location.of("https://me:pw@host/a/b.pt?sig=2"),
        )
        assert one != other
        assert one == Location.of("https://me:pw@host/a/b.pt?sig=1")
        assert (str(one), str(one.parent)) == ("https://host/a/b.pt", "https://host/a")
        with (
            pytest.raises(RemoteError, match=r"^https://host/a/b\.pt: bad, in https://host/a$"),
            one.urls_in_errors(),
        ):
            raise RemoteError(f"{one.path}: bad, in {one.path.parent}")
        with pytest.raises(OSError, match=r"'https://host/a/b\.pt'"), one.urls_in_errors():
            one.path.stat()
        assert without_secrets("see https://me:pw@host/x?sig=1") == "see https://host/x"
    assert Location.of("plain/path") == Location(Path("plain/path"))


@pytest.mark.parametrize("url", ["s3://b//x", "s3://b/./x", "https://host/../../etc/passwd", "s3://"])
def test_places_stay_in_the_mirror(url: str) -> None:
    with open_mirror(), pytest.raises(UsageError, match="without empty parts"):
        Location.of(url)


# Checkpoints of several files


def sharded(folder: Path, model: nn.Module) -> Path:
    folder.mkdir()
    keys, parts = list(model.state_dict()), {}
    for number, some in enumerate((keys[:10], keys[10:])):
        name = f"model-{number}-of-2.safetensors"
        save_file({key: model.state_dict()[key].clone() for key in some}, folder / name)
        parts.update(dict.fromkeys(some, name))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": parts}))
    (folder / "config.json").write_text(json.dumps({"architecture": "resnet18"}))
    torch.save({}, folder / "optimizer.pt")
    return folder


def upload_all(folder: Path, url: str) -> str:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            upload(path, f"{url}/{path.relative_to(folder).as_posix()}")
    return url


@pytest.mark.parametrize("name", ["", "/model.safetensors.index.json"])
def test_a_folder_and_an_index_with_its_shards(tmp_path: Path, model: nn.Module, name: str) -> None:
    folder = sharded(tmp_path / "hub", model)
    url = upload_all(folder, "fragile://bucket/hub")
    with open_mirror():
        found, local = read_checkpoint(f"{url}{name}"), read_checkpoint(f"{folder}{name}")
        assert {key: tensor.tolist() for key, tensor in found.tensors.items()} == {
            key: tensor.tolist() for key, tensor in local.tensors.items()
        }
        assert (found.format, found.words) == (local.format, local.words)
        assert all("optimizer" not in asked for asked, *_ in Fragile.asked)


def test_a_distributed_checkpoint(tmp_path: Path, model: nn.Module) -> None:
    folder = format_files.distributed(model, tmp_path)
    url = upload_all(folder, "memory://bucket/step")
    with open_mirror():
        local = read_checkpoint(folder)
        for found in (read_checkpoint(url), read_checkpoint(f"{url}/.metadata")):
            assert all(torch.equal(found.tensors[key], local.tensors[key]) for key in local.tensors)


def test_a_folder_with_two_candidates_names_them(files: Path) -> None:
    for name in ("a", "b"):
        upload(files / "model.pt", f"memory://bucket/runs/{name}.pt")
    assert "memory://bucket/runs: expected a folder with one" in (
        said := failed("inspect", "memory://bucket/runs")
    )
    assert "2 candidates (a.pt, b.pt)" in said


def test_an_index_leads_nowhere_else(files: Path) -> None:
    (files / "evil.index.json").write_text(json.dumps({"weight_map": {"key": "../../../evil"}}))
    said = failed("inspect", upload(files / "evil.index.json", "fragile://bucket/evil.index.json"))
    assert "found '../../../evil'" in said
    assert {name for name, *_ in Fragile.asked} == {"bucket/evil.index.json"}


# Folders


@pytest.mark.parametrize("scheme", ["memory", "fragile"])
def test_a_remote_folder_is_done_as_a_local_one_and_only_once(runs: Path, scheme: str) -> None:
    ok(*job(runs, runs / "runs", "--output-dir", runs / "fixed"))
    url = upload_all(runs / "runs", f"{scheme}://bucket/runs")
    arguments = job(runs, url, "--output-dir", f"{scheme}://bucket/fixed")
    first = ok(*arguments)
    outputs = sorted((runs / "fixed").rglob("*.safetensors"))
    assert len(outputs) == 3
    for output in outputs:
        name = output.relative_to(runs / "fixed").as_posix()
        assert content(f"{scheme}://bucket/fixed/{name}") == output.read_bytes()
    Fragile.asked.clear()
    again = ok(*arguments, "--json")
    records = json.loads(again.stdout)["checkpoints"]
    assert [record["status"] for record in records] == ["done before"] * 3
    assert [record["checkpoint"] for record in records] == [
        f"{url}/{name}" for name in ("0/0.pt", "0/2.pt", "1/1.pt")
    ]
    assert all(record["report"] for record in records)  # from the manifest of the first run
    assert not [asked for asked in Fragile.asked if asked[0].endswith(".safetensors") and asked[2] is None]
    manifest = content(f"{scheme}://bucket/fixed/ckpt-fix.jsonl").decode()
    assert len(manifest.splitlines()) == 3
    assert f"manifest: {scheme}://bucket/fixed/ckpt-fix.jsonl" in first.stdout
    assert "temporary" not in first.output + again.output + manifest


def test_beside_the_checkpoints_and_by_patterns(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(runs)  # where the manifest of a pattern goes
    url = upload_all(runs / "runs", "memory://bucket/runs")
    ok(*job(runs, f"{url}/0/*.pt"))
    made = {f"/bucket/runs/0/{number}.bn.safetensors" for number in (0, 2)}
    assert {name for name in stored("/bucket") if "bn" in name} == made
    result = ok(*job(runs, url))
    assert result.stdout.count("done before") == 2
    assert len([name for name in stored("/bucket") if "bn" in name]) == 3


def test_one_failure_stops_no_other(runs: Path) -> None:
    (runs / "runs" / "bad.pt").write_bytes(b"nonsense")
    url = upload_all(runs / "runs", "memory://bucket/runs")
    result = cli(*job(runs, url, "--output-dir", runs / "fixed"))
    assert result.exit_code == 1
    assert "memory://bucket/runs/bad.pt: expected a checkpoint" in result.stdout
    assert len(list((runs / "fixed").rglob("*.safetensors"))) == 3


def test_copies_go_when_their_checkpoint_is_done(
    runs: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    most = []

    def counted(*arguments: object, **more: object) -> Path:
        found = fetch_file(*arguments, **more)
        most.append(
            len([path for path in temporary.rglob("*.pt") if path.is_file() and path.stat().st_blocks])
        )
        return found

    monkeypatch.setattr("ckpt_tools.storage.files.fetching.fetch_file", counted)
    monkeypatch.setattr("ckpt_tools.jobs.many.folder_run._MODEL_SHARE", 0)
    ok(*job(runs, upload_all(runs / "runs", "memory://bucket/runs")))
    assert max(most) == 1


def test_names_that_lead_out_of_a_folder_are_no_checkpoints(files: Path, temporary: Path) -> None:
    upload(files / "model.pt", "fragile://bucket/runs/a.pt")
    Fragile.files["bucket/runs/../../evil.pt"] = Fragile.files["bucket/runs/a.pt"]
    with open_mirror():
        (found,) = find_checkpoints([Location.of("fragile://bucket/runs")])
        assert found.place.as_posix() == "a.pt"
        assert not list(temporary.rglob("evil*"))


def test_checkpoints_of_two_stores(files: Path) -> None:
    url = upload(files / "model.pt", "memory://bucket/model.pt")
    said = failed(*job(files, files / "model.pt", url, "--output-dir", files / "fixed"), code=2)
    assert "found those of memory:// and this machine" in said


# Data


@pytest.fixture
def images(tmp_path: Path) -> Path:
    random = np.random.default_rng(0)
    for number in range(128):
        folder = tmp_path / "images" / str(number % 5)
        folder.mkdir(parents=True, exist_ok=True)
        pixels = random.integers(0, 255, (10, 12, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.{'png' if number % 2 else 'jpg'}")
    return tmp_path / "images"


@pytest.mark.parametrize("scheme", ["memory", "fragile"])
def test_images_of_a_remote_folder_are_those_of_a_local_one(images: Path, scheme: str) -> None:
    (images / "0" / "broken.png").write_bytes(b"no image")
    (images / "0" / ".hidden.png").write_bytes(b"no image")
    url = upload_all(images, f"{scheme}://bucket/images")
    for workers in (0, 2):
        streams = [batches(str(where), workers) for where in (images, url)]
        for one, other in zip(*streams, strict=True):
            assert torch.equal(one, other)
        assert streams[0].skipped_samples == streams[1].skipped_samples
        assert [item.name for item in streams[1].skipped_samples] == ["0/broken.png"]


def batches(spec: str, workers: int) -> BatchStream:
    return open_source(spec).batches(InputSpec(SHAPE), Reading(batch_size=32, workers=workers))


def test_runs_on_remote_data_and_labels(images: Path, files: Path) -> None:
    pytest.importorskip("torchmetrics")
    url = upload_all(images, "memory://bucket/images")
    more = [*ARCH, "--input-size", "3,8,8", "--force", "-q"]
    for data, output in ((images, "local"), (url, "remote")):
        arguments = ["--data", data, "--eval-data", data, "-o", files / f"{output}.safetensors", "--json"]
        result = ok("bn-reestimate", files / "model.pt", *arguments, *more)
        (files / output).write_text(result.stdout)
    facts = [json.loads((files / output).read_text()) for output in ("local", "remote")]
    assert facts[1]["data"]["spec"] == url
    assert facts[0]["metrics"]["before"] == facts[1]["metrics"]["before"]
    assert facts[0]["layers"] == facts[1]["layers"]


def test_a_network_that_drops_out_is_no_damaged_image(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_image_folder, "_RETRY_PAUSES", (0, 0))
    url = upload_all(images, "fragile://bucket/images")
    Fragile.read_limit, Fragile.faults = 0, 2
    stream = batches(url, 0)
    assert sum(len(batch) for batch in stream) == 128
    assert stream.skipped_samples == ()
    Fragile.faults = -1
    with pytest.raises(RemoteError, match="the store went away"):
        list(batches(url, 2))


def test_remote_arrays(files: Path) -> None:
    url = upload(files / "data.npy", "memory://bucket/data.npy")
    local = open_source(str(files / "data.npy"))
    with open_mirror():
        assert torch.equal(
            *(torch.cat(list(one.batches(None, Reading(batch_size=32)))) for one in (local, open_source(url)))
        )
    for spec, said in [
        (url.replace("data", "nothing"), "found nothing"),
        ("memory://bucket", "no image"),
        ("cifar10:memory://bucket", "a folder of this machine"),
        (upload(files / "model.pt", "memory://bucket/data.bin"), "expected a folder of images or an array"),
    ]:
        assert said in failed("bn-reestimate", files / "model.pt", "--data", spec)


def test_remote_class_maps(files: Path) -> None:
    (files / "classes.txt").write_text("cat\ndog\n")
    with open_mirror():
        found = read_class_map(Location.of(upload(files / "classes.txt", "memory://bucket/classes.txt")))
        assert found.numbers == {"cat": 0, "dog": 1}


# http


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    pytest.importorskip("aiohttp")
    (tmp_path / "served").mkdir()
    handler = partial(Quiet, directory=str(tmp_path / "served"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass

    def send_head(self) -> io.BytesIO | None:
        if "secret" in self.path and "token" not in self.path:
            self.send_error(403)
            return None
        if "lost" in self.path:
            self.send_response(200)
            self.send_header("Content-Length", "100000")
            self.end_headers()
            return io.BytesIO(b"short")
        return super().send_head()


def test_http_is_read_and_the_output_goes_to_the_current_folder(
    files: Path, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (files / "served" / "secret.pt").write_bytes((files / "model.pt").read_bytes())
    (files / "here").mkdir()
    monkeypatch.chdir(files / "here")
    result = ok(*job(files, f"{server}/secret.pt?token=xyzzy"))
    assert f"output         {files}/here/secret.bn.safetensors" in result.stdout
    assert "xyzzy" not in result.output
    ok(*job(files, files / "model.pt"))
    assert (files / "here" / "secret.bn.safetensors").exists()
    assert "0 different" in ok("diff", files / "model.bn.safetensors", "secret.bn.safetensors").stdout


def test_http_that_fails(files: Path, server: str) -> None:
    said = {
        f"{server}/nothing.pt": "expected a file or folder there, found nothing",
        f"{server}/secret.pt": "access is refused (ClientResponseError: 403",
        f"{server}/lost.pt": "cannot be reached",
        "http://127.0.0.1:9/model.pt": "cannot be reached (",
        f"{server}/served.pt?token=xyzzy": "found nothing",
    }
    for url, message in said.items():
        found = failed("inspect", url)
        assert message in found
        assert "xyzzy" not in found


def test_nothing_is_written_over_http(files: Path, server: str) -> None:
    said = failed("bn-reestimate", files / "model.pt", "--data", "nowhere", "-o", f"{server}/x.safetensors")
    assert f"{server}/x.safetensors: nothing can be written over http." in said


def test_nothing_is_written_unasked_over_http_or_into_a_repository(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with open_mirror():
        for url in ("http://host/a/model.pt", "hf://org/repo/model.pt"):
            assert default_output_path(Location.of(url), "bn") == Location(tmp_path / "model.bn.safetensors")
        assert (
            str(default_output_path(Location.of("s3://bucket/model.pt"))) == "s3://bucket/model.safetensors"
        )


def test_copies_of_killed_processes_are_removed(files: Path, temporary: Path) -> None:
    killed = temporary / new_temporary_name().replace(str(os.getpid()), "999999999")
    killed.mkdir()
    ok(
        "inspect",
        upload(files / "model.pt", "memory://bucket/model.pt"),
        "--arch",
        "nets:DenseNet",
        "--input-size",
        "3,8,8",
    )
    assert not killed.exists()


def test_images_over_http(images: Path, server: str) -> None:
    shutil.copytree(images, images.parent / "served" / "images")
    local, remote = batches(str(images), 0), batches(f"{server}/images", 2)
    assert torch.equal(torch.cat(list(local)), torch.cat(list(remote)))
    with pytest.raises(RemoteError, match="found nothing"):
        open_source(f"{server}/nothing")
