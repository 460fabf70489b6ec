"""Files that once crashed a reader, kept it busy for ever or asked for all memory, as small as they get."""

from __future__ import annotations

import contextlib
import copy
import gzip
import json
import os
import pickle
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import report_facts
import torch
from click.testing import CliRunner
from hostile_contents import ARRAYS, FILES
from pickle_assembler import call, value, whole
from safetensors.torch import save_file

from ckpt_tools.cli import main
from ckpt_tools.contract import InputSpec
from ckpt_tools.data.data_source import open_source
from ckpt_tools.data.labels import array_labels
from ckpt_tools.data.sample_order import Reading
from ckpt_tools.errors import CheckpointError, CkptToolsError, DataError
from ckpt_tools.report.pages.html_page import folder_html
from ckpt_tools.report.pages.markdown_page import folder_markdown
from ckpt_tools.report.text.folder_text import folder_text
from ckpt_tools.storage.contents.averaged_copies import find_averaged_copies
from ckpt_tools.storage.discovery import find_checkpoints
from ckpt_tools.storage.reading import read_checkpoint
from ckpt_tools.storage.tensor_bytes import raw_bytes
from fuzz.cases import limit_time

# --- checkpoints --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("label", FILES)
def test_checkpoints(tmp_path: Path, label: str) -> None:
    (tmp_path / "x.pt").write_bytes(FILES[label]())
    with limit_time(), contextlib.suppress(CheckpointError):
        read_checkpoint(tmp_path / "x.pt")


def test_keys_that_all_sound_like_averages() -> None:
    one = torch.ones(1)
    flat = {f"ema{i}.w": one for i in range(20_000)} | {f"a.{i}.running_var": one for i in range(10)}
    nested = {f"ema.{i}.w": one for i in range(20_000)} | {f"a{i}.w": one for i in range(20_000)}
    for state in (flat, nested):
        with limit_time():
            assert find_averaged_copies(state) == []


def test_a_setting_that_sounds_like_an_average(tmp_path: Path) -> None:
    torch.save({"ema.decay": 0.99, "w": torch.ones(2)}, tmp_path / "x.pt")
    assert list(read_checkpoint(tmp_path / "x.pt").tensors) == ["w"]


def test_metadata_that_unfolds_without_end(tmp_path: Path) -> None:
    lists: object = 1
    body = b"](" + b"K\x01" * 16 + b"e"
    for at in range(30):
        body += b"q" + bytes([at]) + b"0](" + (b"h" + bytes([at])) * 16 + b"e"
    kind = "torch.distributed.checkpoint.metadata."
    state = {"state_dict_metadata": {"w": body}, "storage_data": {}, "planner_data": None}
    (tmp_path / ".metadata").write_bytes(whole(call(f"{kind}Metadata") + value(state) + b"b"))
    with limit_time(), pytest.raises(CheckpointError, match="metadata"):
        read_checkpoint(tmp_path)
    assert lists


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.safetensors")
    os.mkfifo(tmp_path / "x.jpg")
    for found in find_checkpoints([tmp_path]):
        with pytest.raises(CheckpointError, match="neither a file"):
            read_checkpoint(found.location)
    with pytest.raises(DataError, match="no regular file"):
        list(open_source(str(tmp_path)).batches(InputSpec((3, 8, 8)), Reading(batch_size=2, workers=0)))


def test_one_number_with_a_stride_is_bytes() -> None:
    number = torch.arange(30.0)[3:4].as_strided((1, 1), (27, 5))
    assert raw_bytes(number).tobytes() == struct.pack("<f", 3.0)


# --- data ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("label", ARRAYS)
def test_arrays(tmp_path: Path, label: str) -> None:
    file, make = ARRAYS[label]
    (tmp_path / file).write_bytes(make())
    with limit_time(), pytest.raises(DataError, match=file.replace(".", r"\.")):
        list(open_source(str(tmp_path / file)).batches(None, Reading(batch_size=2)))


def test_cifar_is_read_without_numpys_pickles(tmp_path: Path) -> None:
    lists = b"](" + b"K\x01" * 16 + b"e"
    for at in range(3, 30):
        lists += b"q" + bytes([at]) + b"0](" + (b"h" + bytes([at])) * 16 + b"e"
    pixels = np.zeros((1, 3072), np.uint8)
    good = pickle.dumps({"data": pixels, "fine_labels": [1]}, 2)
    for content in (
        b"\x80\x02}r\xff\xff\xff\x7f.",  # Python's own machine makes room for two billion values
        good.replace(b"K\x01as", lists + b"s") if b"K\x01as" in good else whole(value({"data": b"N"})),
        pickle.dumps({"data": np.zeros((1, 3072), np.uint8), "fine_labels": [1 << 70]}, 2),
    ):
        (tmp_path / "cifar-100-python").mkdir(exist_ok=True)
        (tmp_path / "cifar-100-python" / "train").write_bytes(content)
        with limit_time(), pytest.raises(DataError):
            array_labels(open_source(f"cifar100:{tmp_path}").array)


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_mnist_that_announces_billions(tmp_path: Path, suffix: str) -> None:
    raw = struct.pack(">4I", 0x803, 0xFFFFFFFF, 1, 1) + bytes(784)
    (tmp_path / f"train-images-idx3-ubyte{suffix}").write_bytes(gzip.compress(raw) if suffix else raw)
    with pytest.raises(DataError, match="more than it holds"):
        open_source(f"mnist:{tmp_path}")


def test_svhn_of_any_damage(tmp_path: Path) -> None:
    from scipy import io as matlab

    path = tmp_path / "train_32x32.mat"
    matlab.savemat(path, {"X": np.zeros((2, 2, 3, 4), np.uint8), "y": np.ones((4, 1))})
    whole_file = path.read_bytes()
    for at in range(124, len(whole_file), 3):
        for field in (b"\xff\xff\xff\x7f", bytes(4), b"\x0e\0\0\0"):
            path.write_bytes(whole_file[:at] + field + whole_file[at + 4 :])
            try:
                source = open_source(f"svhn:{tmp_path}")
                list(source.batches(InputSpec((3, 2, 2)), Reading(batch_size=4, workers=0)))
                array_labels(source.array)
            except CkptToolsError:
                continue


def png(width: int, height: int) -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        )

    rows = zlib.compress(bytes(min(height * (width // 8 + 1), 10_000_000)))
    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(9000, 9000), (1, 2000), (2000, 1), (1 << 31, 1 << 31), (0, 5)])
def test_images_that_would_grow(tmp_path: Path, size: tuple[int, int]) -> None:
    (tmp_path / "a.png").write_bytes(png(*size))
    with limit_time(), pytest.raises(DataError, match=r"a\.png"):
        list(open_source(str(tmp_path)).batches(InputSpec((3, 224, 224)), Reading(batch_size=2, workers=0)))


# --- words and names ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "odd",
    [
        {"crop_pct": {"a": 1}},
        {"mean": ["x"]},
        {"std": []},
        {"input_size": [3, 10**6, 10**6]},
        {"input_size": [[]]},
    ],
)
def test_settings_that_mean_nothing_are_passed_over(odd: dict[str, object]) -> None:
    from ckpt_adapters.from_timm import TimmAdapter

    adapter = TimmAdapter()
    model = adapter.build("test_resnet", {})
    usual = adapter.input_spec(model, "test_resnet", {})
    words: list[dict[str, object]] = [
        {"args": odd},
        {"config": {"architecture": "test_resnet", "pretrained_cfg": odd}},
    ]
    for said in words:
        found = adapter.input_spec(model, "test_resnet", said)
        assert (found.shape, found.crop_pct, found.mean, found.std) == (
            usual.shape,
            usual.crop_pct,
            usual.mean,
            usual.std,
        )


@pytest.mark.parametrize(
    "odd", [10**400, "x", [], {"median": 10**400}, {"median": 1e-320}, {"median": 1e308}, None, True]
)
def test_a_manifest_of_somebody_elses(odd: object) -> None:
    """A later run takes the records of finished checkpoints over into its report."""
    keys = ("checkpoint", "status", "output", "error", "seconds", "report")
    layer = {"name": "a", "rewritten": True, "ratio": odd, "channels": odd, "relative_standard_error": odd}
    site = {"name": odd, "rate": odd, "depth": odd}
    report = {
        "layers": [layer],
        "dropout_sites": [site],
        "data": {"images": odd, "skipped": odd},
        "seconds": odd,
    }
    report["controls"] = dict.fromkeys(("names", "deviation", "worst", "shift"), odd) | {"verdict": "agree"}
    whole_record = {"checkpoint": "//a", "status": "done", "report": report}
    for records in (
        [dict.fromkeys(keys, odd)],
        [whole_record],
        [whole_record, whole_record | {"checkpoint": "/b"}],
    ):
        folder_html(records)
        folder_markdown(records)
        folder_text(records, Path("x"))


def places(value: object, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Where values stand in what JSON holds; of a list, in its first item."""
    if path:
        yield path
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from places(inner, (*path, key))
    elif isinstance(value, list) and value:
        yield from places(value[0], (*path, 0))


@pytest.mark.parametrize("odd", [{"a": 1}, [[]], -1, 1e308, 10**400, None])
def test_any_value_of_a_record_may_be_another(odd: object) -> None:
    record = report_facts.records()[0]
    for path in places(record):
        changed: Any = copy.deepcopy(record)
        holder = changed
        for key in path[:-1]:
            holder = holder[key]
        holder[path[-1]] = odd
        folder_html([changed])
        folder_markdown([changed])
        folder_text([changed], Path("x"))


def test_a_name_gives_no_orders_to_the_runner(tmp_path: Path) -> None:
    evil = tmp_path / "x\n ::stop-commands::y ##[add-mask]z\x1b[2J.pt"
    evil.write_bytes(b"no checkpoint")
    said = CliRunner().invoke(main, ["inspect", str(evil)]).stderr
    assert "stop-commands" in said
    assert not any(line.strip().startswith("::") for line in said.splitlines())
    assert "##[" not in said
    assert "\x1b" not in said


@pytest.mark.parametrize(
    "arguments", [["inspect"], ["convert"], ["bn-reestimate", "--data", "y"], ["diff", "z"]]
)
def test_a_path_that_no_system_takes(tmp_path: Path, arguments: list[str]) -> None:
    result = CliRunner().invoke(main, [arguments[0], "a" * 5000, *arguments[1:]])
    assert result.exit_code == 1
    assert "bug" not in result.output


def test_shards_of_a_thousand_characters(tmp_path: Path) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / "x.safetensors")
    index = {"weight_map": {"w": "n" * 1000 + ".safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError):
        read_checkpoint(tmp_path)
