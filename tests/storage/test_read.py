"""Reading: every format, place, prefix and kind of average; every bad file gets one clear error."""

from __future__ import annotations

import argparse
import collections
import contextlib
import datetime
import hashlib
import json
import os
import pathlib
import random
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from ckpt_tools.errors import CheckpointError
from ckpt_tools.storage.contents.state_dict_keys import strip_wrappers
from ckpt_tools.storage.reading import checkpoint_sha256, read_checkpoint

Tensors = dict[str, Tensor]


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4))


def weights(seed: int = 0) -> Tensors:
    return net(seed).state_dict()


def saved(folder: Path, content: object, name: str = "x.pt") -> Path:
    torch.save(content, folder / name)
    return folder / name


def trained() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    model(torch.randn(2, 3, 5, 5)).sum().backward()
    optimizer.step()
    return model, optimizer


def assert_same(found: object, expected: Tensors) -> None:
    assert isinstance(found, dict)
    assert list(found) == list(expected)
    for key, tensor in expected.items():
        assert type(found[key]) is Tensor
        assert not found[key].requires_grad
        assert found[key].dtype == tensor.dtype
        assert torch.equal(found[key], tensor)


# --- formats ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["m.pt", "m.pth", "m.bin", "m.ckpt", "m.pth.tar", "m", "m.safetensors"])
@pytest.mark.parametrize("legacy", [False, True])
def test_pickles_of_both_formats_under_any_name(tmp_path: Path, name: str, legacy: bool) -> None:
    torch.save(weights(), tmp_path / name, _use_new_zipfile_serialization=not legacy)
    checkpoint = read_checkpoint(tmp_path / name)
    assert_same(checkpoint.tensors, weights())
    assert checkpoint.format == ("torch.save (legacy)" if legacy else "torch.save")
    assert (checkpoint.weights, checkpoint.prefix, checkpoint.words, checkpoint.left_out) == ("", "", {}, ())


@pytest.mark.parametrize("name", ["m.safetensors", "m.bin"])
def test_safetensors_under_any_name_with_metadata(tmp_path: Path, name: str) -> None:
    save_file(weights(), tmp_path / name, {"format": "pt", "licence": "ä"})
    checkpoint = read_checkpoint(str(tmp_path / name))
    assert_same({key: checkpoint.tensors[key] for key in weights()}, weights())
    assert checkpoint.format == "safetensors"
    assert checkpoint.metadata == {"format": "pt", "licence": "ä"}


def repacked(path: Path, swaps: dict[bytes, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    target = path.with_name("repacked.pt")
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(target, "w", compression) as archive:
        for name in source.namelist():
            content = source.read(name)
            for old, new in swaps.items():
                content = content.replace(old, new)
            archive.writestr(name, content)
    return target


def test_repacked_archive_is_not_mapped_as_noise(tmp_path: Path) -> None:
    path = repacked(saved(tmp_path, weights()), {}, zipfile.ZIP_DEFLATED)
    assert_same(read_checkpoint(path).tensors, weights())


def test_half_precision_strides_and_shared_memory(tmp_path: Path) -> None:
    w = torch.randn(4, 6)
    state = {
        "h": w.half(),
        "b": w.bfloat16(),
        "t": w.t(),
        "tied": w,
        "n": torch.tensor(3),
        "empty": torch.empty(0, 2),
    }
    state["p"] = nn.Parameter(w)
    assert_same(read_checkpoint(saved(tmp_path, state)).tensors, {**state, "p": w})


def shard(folder: Path, index: str = "model.safetensors.index.json") -> dict[str, str]:
    state = weights()
    shard_of = {
        key: f"model-{i % 2}{'.bin' if 'bin' in index else '.safetensors'}" for i, key in enumerate(state)
    }
    for name in set(shard_of.values()):
        part = {key: state[key] for key in state if shard_of[key] == name}
        torch.save(part, folder / name) if "bin" in index else save_file(
            part, folder / name, {"format": "pt"}
        )
    (folder / index).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": shard_of}))
    return shard_of


@pytest.mark.parametrize("index", ["model.safetensors.index.json", "pytorch_model.bin.index.json"])
def test_shards_by_folder_and_by_index(tmp_path: Path, index: str) -> None:
    shard(tmp_path, index)
    (tmp_path / "config.json").write_text("{}")
    for path in (tmp_path, tmp_path / index):
        checkpoint = read_checkpoint(path)
        assert_same(checkpoint.tensors, weights())
        assert checkpoint.path == path
        assert "2 shards" in checkpoint.format


def test_both_kinds_of_shards_in_one_folder(tmp_path: Path) -> None:
    shard(tmp_path, "pytorch_model.bin.index.json")
    shard(tmp_path)
    assert "safetensors" in read_checkpoint(tmp_path).format


def test_folder_with_one_checkpoint(tmp_path: Path) -> None:
    saved(tmp_path, weights(), "pytorch_model.bin")
    (tmp_path / "README.md").write_text("hello")
    assert_same(read_checkpoint(tmp_path).tensors, weights())


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/etc/passwd", "a/b.safetensors", "..", "a\\b", "", 3, "gone.safetensors"]
)
def test_index_that_points_elsewhere(tmp_path: Path, name: object) -> None:
    save_file(weights(), tmp_path / "x.safetensors")
    (tmp_path / "sub").mkdir()
    index = tmp_path / "sub" / "m.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"0.weight": name}}))
    with pytest.raises(CheckpointError, match="beside"):
        read_checkpoint(tmp_path / "sub")


def test_index_with_a_tensor_that_no_shard_holds(tmp_path: Path) -> None:
    shard_of = shard(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {**shard_of, "ghost": "model-0.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"ghost in model-0\.safetensors"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"weight_map": {}}', "\udce4", "[" * 100_000])
def test_damaged_index(tmp_path: Path, text: str) -> None:
    index = tmp_path / "m.index.json"
    index.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(CheckpointError, match="index"):
        read_checkpoint(index)


def test_sha256_of_a_file_and_of_shards(tmp_path: Path) -> None:
    shard(tmp_path)
    one = tmp_path / "model-0.safetensors"
    assert checkpoint_sha256(one) == hashlib.sha256(one.read_bytes()).hexdigest()
    lines = [
        f"{hashlib.sha256(p.read_bytes()).hexdigest()}  {p.name}\n" for p in sorted(tmp_path.glob("model-*"))
    ]
    assert checkpoint_sha256(tmp_path) == hashlib.sha256("".join(lines).encode()).hexdigest()
    assert checkpoint_sha256(tmp_path) == checkpoint_sha256(tmp_path / "model.safetensors.index.json")


# --- where the state dict stands ----------------------------------------------------------------------------

NAMES = (  # noqa: SIM905
    "state_dict model model_state_dict net network weights params module whatever checkpoint.model a.b"
).split()


@pytest.mark.parametrize("name", NAMES)
def test_state_dict_under_a_name(tmp_path: Path, name: str) -> None:
    model, optimizer = trained()
    content: dict[str, object] = {
        "epoch": 3,
        "best_acc1": torch.tensor(0.5),
        "rng_state": torch.get_rng_state(),
    }
    content["optimizer"] = optimizer.state_dict()
    outer, _, inner = name.partition(".")
    content[outer] = {inner: model.state_dict(), "note": "hi"} if inner else model.state_dict()
    checkpoint = read_checkpoint(saved(tmp_path, content))
    assert_same(checkpoint.tensors, model.state_dict())
    assert checkpoint.weights == name
    assert checkpoint.words == {"epoch": 3, "best_acc1": 0.5, **({"note": "hi"} if inner else {})}
    assert set(checkpoint.left_out) == {"optimizer", "rng_state"}


@pytest.mark.parametrize(
    ("content", "auto", "model", "ema"),
    [
        (("state_dict", "state_dict_ema"), "state_dict_ema", "state_dict", "state_dict_ema"),
        (("model", "model_ema"), "model_ema", "model", "model_ema"),
        (("params", "params_ema"), "params_ema", "params", "params_ema"),
        (("ema", "net"), "ema", "net", "ema"),
        (("model_state_dict", "ema_state_dict"), "ema_state_dict", "model_state_dict", "ema_state_dict"),
        (("swa_model", "model"), "swa_model", "model", "swa_model"),
        (("ema.module", "model"), "ema.module", "model", "ema.module"),
        (("model", "teacher"), "model", "model", None),
        (("params_ema",), "params_ema", None, "params_ema"),
        (("",), "", "", None),
    ],
)
def test_averaged_weights(
    tmp_path: Path, content: tuple[str, ...], auto: str, model: str | None, ema: str | None
) -> None:
    whole: dict[str, object] = {"epoch": 1}
    states = {name: weights(seed) for seed, name in enumerate(content)}
    for name, state in states.items():
        outer, _, inner = name.partition(".")
        whole |= {outer: {inner: state, "decay": 0.99} if inner else state} if outer else state
    path = saved(tmp_path, whole)
    for choice, expected in (("auto", auto), ("model", model), ("ema", ema)):
        if expected is None:
            with pytest.raises(CheckpointError, match=f"found only {content[0] or '.top level.'}"):
                read_checkpoint(path, weights=choice)
            continue
        checkpoint = read_checkpoint(path, weights=choice)
        assert checkpoint.weights == expected
        assert_same(checkpoint.tensors, states[expected])
        assert {name.partition(".")[0] for name in states if name != expected} <= set(checkpoint.left_out)


def test_ambiguity_lists_the_candidates_and_a_name_resolves_it(tmp_path: Path) -> None:
    path = saved(tmp_path, {"netG": weights(1), "netD": weights(2), "epoch": 1})
    with pytest.raises(CheckpointError, match="netG, netD"):
        read_checkpoint(path)
    assert_same(read_checkpoint(path, weights="netD").tensors, weights(2))
    with pytest.raises(CheckpointError, match="found only netG, netD"):
        read_checkpoint(path, weights="netX")


@pytest.mark.parametrize(
    "content",
    [
        3,
        "text",
        [1],
        None,
        {},
        {"epoch": 1},
        {"state_dict": {}},
        {"state_dict": None},
        torch.ones(3),
        {1: torch.ones(2)},
    ],
)
def test_no_state_dict(tmp_path: Path, content: object) -> None:
    with pytest.raises(CheckpointError, match="found none"):
        read_checkpoint(saved(tmp_path, content))


def test_optimizer_alone_is_no_state_dict(tmp_path: Path) -> None:
    optimizer = trained()[1].state_dict()
    by_name = {"state": {"0.weight": {"exp_avg": torch.ones(3)}}, "param_groups": []}
    for content in (
        optimizer,
        {"optimizer": optimizer, "epoch": 1},
        {"optimizer": by_name},
        {"thing": by_name},
    ):
        with pytest.raises(CheckpointError, match="found none"):
            read_checkpoint(saved(tmp_path, content))


def test_odd_entries_are_left_out(tmp_path: Path) -> None:
    state = {**weights(), "1._extra_state": {"amax": torch.ones(3)}, "version": 2}
    checkpoint = read_checkpoint(saved(tmp_path, {"state_dict": state}))
    assert_same(checkpoint.tensors, weights())
    assert checkpoint.left_out == ("1._extra_state", "version")
    bare = read_checkpoint(saved(tmp_path, {**weights(), "arch": "resnet50"}))
    assert bare.left_out == ("arch",)
    assert bare.words == {"arch": "resnet50"}


# --- prefixes -----------------------------------------------------------------------------------------------


@given(
    st.lists(st.sampled_from(["module.", "_orig_mod."]), max_size=5),
    st.lists(
        st.from_regex(r"[a-l]{1,3}(\.[a-l0-9]{1,3}){0,2}", fullmatch=True),
        min_size=1,
        max_size=5,
        unique=True,
    ),
)
def test_any_nesting_of_wrappers_comes_off(wrappers: list[str], keys: list[str]) -> None:
    prefix = "".join(wrappers)
    tensors, found, left_out = strip_wrappers({prefix + key: torch.ones(1) for key in keys})
    assert (list(tensors), found, left_out) == (keys, prefix, [])


def test_a_prefix_of_only_some_keys_stays() -> None:
    keys = ["module.a", "b"]
    assert list(strip_wrappers({key: torch.ones(1) for key in keys})[0]) == keys


def test_compiled_submodule() -> None:
    tensors, prefix, _ = strip_wrappers(
        {"module.body._orig_mod.0.w": torch.ones(1), "module.head.w": torch.ones(1)}
    )
    assert (list(tensors), prefix) == (["body.0.w", "head.w"], "module.")
    twins = {"a._orig_mod.w": torch.ones(1), "a.w": torch.ones(1)}
    assert list(strip_wrappers(twins)[0]) == list(twins)


@pytest.mark.parametrize("order", ["plain", "compiled outside", "compiled inside", "both", "parallel"])
def test_real_wrappers(tmp_path: Path, order: str) -> None:
    average = torch.optim.swa_utils.AveragedModel
    model = net()
    wrapped: nn.Module = {
        "plain": lambda: average(model),
        "compiled outside": lambda: torch.compile(average(model)),
        "compiled inside": lambda: average(torch.compile(model)),
        "both": lambda: torch.compile(average(torch.compile(model))),
        "parallel": lambda: nn.DataParallel(average(nn.DataParallel(model))),
    }[order]()
    checkpoint = read_checkpoint(saved(tmp_path, wrapped.state_dict()))
    assert_same(checkpoint.tensors, model.state_dict())
    assert [name.rpartition(".")[2] for name in checkpoint.left_out] == ["n_averaged"]


def test_own_buffer_named_n_averaged_stays(tmp_path: Path) -> None:
    state = {**weights(), "n_averaged": torch.tensor(3)}
    assert_same(read_checkpoint(saved(tmp_path, state)).tensors, state)


# --- what real training scripts save ------------------------------------------------------------------------


def test_timm_checkpoint_saver(tmp_path: Path) -> None:
    from timm.utils import CheckpointSaver, ModelEmaV3, NativeScaler

    model, optimizer = trained()
    ema = ModelEmaV3(model, decay=0.5)
    ema.update(net(7))
    args = argparse.Namespace(
        model="resnet18", drop=0.1, drop_path=None, mean=(0.5, 0.5, 0.5), model_kwargs={"a": 1}
    )
    saver = CheckpointSaver(model, optimizer, args, ema, NativeScaler("cpu"), checkpoint_dir=str(tmp_path))
    saver.save_checkpoint(4, metric=np.float64(71.5))
    checkpoint = read_checkpoint(tmp_path / "last.pth.tar")
    assert checkpoint.weights == "state_dict_ema"
    assert_same(checkpoint.tensors, ema.module.state_dict())
    assert_same(read_checkpoint(tmp_path / "last.pth.tar", weights="model").tensors, model.state_dict())
    assert checkpoint.words["arch"] == "resnet18"
    assert checkpoint.words["args"] == {**vars(args), "mean": [0.5, 0.5, 0.5]}
    assert (checkpoint.words["epoch"], checkpoint.words["metric"]) == (4, 71.5)
    assert {"state_dict", "optimizer", "amp_scaler"} == set(checkpoint.left_out)
    assert set(checkpoint.words) == {"arch", "args", "epoch", "metric", "version", "saver"}


def test_torchvision_reference_dict(tmp_path: Path) -> None:
    model, optimizer = trained()
    warm = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=1)
    rest = torch.optim.lr_scheduler.MultiStepLR(optimizer, [3, 5])
    ema = torch.optim.swa_utils.AveragedModel(
        model, avg_fn=lambda avg, new, n: 0.5 * avg + 0.5 * new, use_buffers=True
    )
    ema.update_parameters(net(5))
    ema.update_parameters(net(6))
    content = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "lr_scheduler": torch.optim.lr_scheduler.SequentialLR(optimizer, [warm, rest], [2]).state_dict(),
        "epoch": 2,
        "args": argparse.Namespace(
            model="densenet121", data_path=pathlib.Path("/data"), device=torch.device("cuda")
        ),
        "model_ema": ema.state_dict(),
        "scaler": torch.amp.GradScaler("cpu").state_dict(),
    }
    checkpoint = read_checkpoint(saved(tmp_path, content, "checkpoint.pth"))
    assert (checkpoint.weights, checkpoint.prefix) == ("model_ema", "module.")
    assert_same(checkpoint.tensors, ema.module.state_dict())
    assert checkpoint.words == {
        "epoch": 2,
        "args": {"model": "densenet121", "data_path": "/data", "device": "cuda"},
    }
    assert set(checkpoint.left_out) == {"model", "optimizer", "lr_scheduler", "scaler", "n_averaged"}


def test_lightning_dict(tmp_path: Path) -> None:
    content = {
        "epoch": 9,
        "global_step": 90,
        "pytorch-lightning_version": "2.5.0",
        "state_dict": {f"model.{key}": tensor for key, tensor in weights().items()},
        "loops": {"fit_loop": {"state_dict": {}, "progress": {"total": collections.Counter(ready=3)}}},
        "callbacks": {
            "ModelCheckpoint{'monitor': 'x'}": {"best_model_score": torch.tensor(0.5), "k": torch.ones(2)}
        },
        "optimizer_states": [trained()[1].state_dict()],
        "lr_schedulers": [{"_step_count": 3}],
        "hparams_name": "kwargs",
        "hyper_parameters": {"lr": 0.1, "classes": torch.ones(3), "path": pathlib.Path("a")},
    }
    checkpoint = read_checkpoint(saved(tmp_path, content, "x.ckpt"))
    assert checkpoint.weights == "state_dict"
    assert checkpoint.words["hyper_parameters"] == {"lr": 0.1, "classes": "<torch.Tensor>", "path": "a"}
    assert checkpoint.words["loops"]["fit_loop"]["progress"] == {"total": {"ready": 3}}
    assert checkpoint.left_out == ("optimizer_states", "lr_schedulers")


def test_words_become_plain_values(tmp_path: Path) -> None:
    shared = [1]
    words = {
        "lr": np.float32(0.5),
        "steps": np.int64(3),
        "name": np.str_("abc"),
        "big": np.array([2.5], ">f8")[0],
        "flag": np.bool_(True),
        "state": np.random.RandomState(0).get_state(),
        "when": datetime.datetime(2024, 1, 2, 3, tzinfo=datetime.UTC),
        "took": datetime.timedelta(seconds=90),
        "ns": types.SimpleNamespace(a=argparse.Namespace(b=1)),
        "groups": collections.defaultdict(list, {"x": [1]}),
        "windows": pathlib.PureWindowsPath("C:/x"),
        "deque": collections.deque([1, 2]),
        "frozen": frozenset([1]),
        "type": torch.float16,
        "twice": [shared, shared],
        "bytes": b"ab",
    }
    found = read_checkpoint(saved(tmp_path, {"model": weights(), **words})).words
    assert found == {
        **words,
        "state": ["MT19937", "<numpy.ndarray>", 624, 0, 0.0],
        "when": "2024-01-02T03:00:00+00:00",
        "took": 90.0,
        "ns": {"a": {"b": 1}},
        "windows": "C:\\x",
        "deque": [1, 2],
        "frozen": [1],
        "type": "torch.float16",
    }
    assert type(found["lr"]) is float
    assert type(found["steps"]) is int
    assert type(found["name"]) is str
    assert type(found["groups"]) is dict


class AttributeDict(dict[str, object]):
    pass


def test_numpy_1_names_and_lightnings_dict(tmp_path: Path) -> None:
    content = {"model": weights(), "lr": np.float64(0.5), "hyper_parameters": AttributeDict(a=1)}
    swaps = {
        b"numpy._core.multiarray": b"numpy.core.multiarray",
        f"{__name__}\nAttributeDict".encode(): b"lightning.fabric.utilities.data\nAttributeDict",
    }
    path = repacked(saved(tmp_path, content), swaps)
    assert read_checkpoint(path).words == {"lr": 0.5, "hyper_parameters": {"a": 1}}


def test_words_that_hold_themselves(tmp_path: Path) -> None:
    loop: dict[str, object] = {"a": 1}
    loop["self"] = loop
    deep: list[object] = []
    wide: list[object] = [1]
    for _ in range(100):
        deep, wide = [deep], [wide, wide]
    words = read_checkpoint(
        saved(tmp_path, {"model": weights(), "loop": loop, "deep": deep, "wide": wide})
    ).words
    assert words["loop"] == {"a": 1, "self": "<...>"}
    assert str(words["deep"]).count("[") < 20
    assert set(words) == {"loop", "deep", "wide"}


# --- pickles that want to run code (many more in test_malicious.py) -----------------------------------------


class Touch:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> object:
        return (os.system, (f"touch {self.path}",))


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("place", ["top", "beside", "inside"])
def test_malicious_pickle_leaves_no_canary(tmp_path: Path, legacy: bool, place: str) -> None:
    canary = tmp_path / "canary"
    evil = Touch(canary)
    content = {
        "top": evil,
        "beside": {"model": weights(), "x": evil},
        "inside": {"model": {**weights(), "x": evil}},
    }
    torch.save(content[place], tmp_path / "x.pt", _use_new_zipfile_serialization=not legacy)
    if place == "top":
        with pytest.raises(CheckpointError, match="found none"):
            read_checkpoint(tmp_path / "x.pt")
    else:
        checkpoint = read_checkpoint(tmp_path / "x.pt")
        assert_same(checkpoint.tensors, weights())
        assert checkpoint.words == ({"x": "<posix.system>"} if place == "beside" else {})
    assert not canary.exists()


def test_whole_models_need_no_trust(tmp_path: Path) -> None:
    for content in (net(), {"model": net(), "epoch": 1}, nn.DataParallel(net())):
        path = saved(tmp_path, content)
        assert_same(read_checkpoint(path).tensors, weights())
        assert_same(read_checkpoint(path, trust=True).tensors, weights())


def test_trusted_pickle_whose_code_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = type("Gone", (nn.Linear,), {"__module__": __name__})
    monkeypatch.setitem(globals(), "Gone", gone)
    model = gone(2, 2)
    path = saved(tmp_path, model)
    monkeypatch.delitem(globals(), "Gone")
    with pytest.raises(CheckpointError, match=r"Gone.*PYTHONPATH"):
        read_checkpoint(path, trust=True)
    assert_same(read_checkpoint(path).tensors, model.state_dict())


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_other_pickle_protocols(tmp_path: Path, protocol: int) -> None:
    torch.save(weights(), tmp_path / "x.pt", pickle_protocol=protocol)
    assert_same(read_checkpoint(tmp_path / "x.pt").tensors, weights())


# --- bad files ----------------------------------------------------------------------------------------------

NO_CHECKPOINT = {
    "JPEG": b"\xff\xd8\xff\xe0" + bytes(600),
    "text file": b"hello {world}\n" * 99,
    "nothing but zeros": bytes(4000),
    "bytes of no known format": b"abc\0" * 999,
    "Git LFS": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
    "web page": b"<!DOCTYPE html><html></html>",
    "tar archive": b"a.txt" + bytes(252) + b"ustar" + bytes(900),
    "gzip": b"\x1f\x8b" + bytes(30),
    "no known format": b"\x00\x01\x02\x03" * 30 + b"\xff\xfe" * 300,
    "empty file": b"",
    "zip archive that torch.save did not write": None,
    "no instruction of a pickle": None,
}


@pytest.mark.parametrize("what", NO_CHECKPOINT)
@pytest.mark.parametrize("trust", [False, True])
def test_no_checkpoint_at_all(tmp_path: Path, what: str, trust: bool) -> None:
    path = tmp_path / "x.pt"
    content = NO_CHECKPOINT[what]
    if content is not None:
        path.write_bytes(content)
    else:
        with zipfile.ZipFile(path, "w") as archive:
            for name in ("m/data.pkl", "m/constants.pkl") if what.startswith("no instr") else ("readme.txt",):
                archive.writestr(name, b"x")
    with pytest.raises(CheckpointError, match=what):
        read_checkpoint(path, trust=trust)


def test_missing_file_and_odd_places(tmp_path: Path) -> None:
    for path in (
        tmp_path / "gone.pt",
        tmp_path / "gone" / "x.pt",
        tmp_path / ("x" * 300),
        Path("/dev/null"),
        tmp_path,
    ):
        with pytest.raises(CheckpointError, match=r"expected|cannot"):
            read_checkpoint(path)
    saved(tmp_path, weights(), "a.pt")
    saved(tmp_path, weights(), "b.pt")
    with pytest.raises(CheckpointError, match=r"2 candidates \(a\.pt, b\.pt\)"):
        read_checkpoint(tmp_path)


ODD = {
    "sparse": lambda: torch.eye(3).to_sparse(),
    "without values": lambda: torch.ones(3, device="meta"),
    "quantised": lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
}


@pytest.mark.filterwarnings("ignore")  # torch deprecates quantised tensors
@pytest.mark.parametrize("kind", ODD)
def test_tensors_that_are_not_dense(tmp_path: Path, kind: str) -> None:
    with pytest.raises(CheckpointError, match=f"1.odd: expected a dense tensor, found one that is {kind}"):
        read_checkpoint(saved(tmp_path, {**weights(), "1.odd": ODD[kind]()}))


def whole_files(folder: Path) -> dict[str, bytes]:
    model, optimizer = trained()
    content = {
        "state_dict": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "args": argparse.Namespace(a=1),
    }
    torch.save(content, folder / "zip")
    torch.save(content, folder / "legacy", _use_new_zipfile_serialization=False)
    save_file(weights(), folder / "safetensors", {"format": "pt"})
    return {name: (folder / name).read_bytes() for name in ("zip", "legacy", "safetensors")}


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_truncated_anywhere(tmp_path: Path, kind: str) -> None:
    content = whole_files(tmp_path)[kind]
    for length in {0, 1, 4, 8, 9, 40, *range(100, len(content), len(content) // 40), len(content) - 1}:
        (tmp_path / "cut").write_bytes(content[:length])
        with pytest.raises(CheckpointError):
            read_checkpoint(tmp_path / "cut")


def test_truncated_files_say_so(tmp_path: Path) -> None:
    files = whole_files(tmp_path)
    (tmp_path / "x.pt").write_bytes(files["zip"][:-100])
    with pytest.raises(CheckpointError, match="cut short"):
        read_checkpoint(tmp_path / "x.pt")
    size = len(files["safetensors"])
    (tmp_path / "x.safetensors").write_bytes(files["safetensors"][:-10])
    with pytest.raises(
        CheckpointError, match=rf"expected the {size:,} bytes .* found {size - 10:,} .* cut short"
    ):
        read_checkpoint(tmp_path / "x.safetensors")


@settings(max_examples=150)
@given(st.sampled_from(["zip", "legacy", "safetensors"]), st.integers(0, 2**32), st.integers(1, 4))
def test_damaged_bytes_raise_nothing_else(
    tmp_path_factory: pytest.TempPathFactory, kind: str, seed: int, flips: int
) -> None:
    folder = tmp_path_factory.getbasetemp()
    if not (folder / "zip").exists():
        whole_files(folder)
    content = bytearray((folder / kind).read_bytes())
    rng = random.Random(seed)
    for _ in range(flips):
        content[rng.randrange(min(len(content), 1500))] = rng.randrange(256)
    (folder / "damaged").write_bytes(content)
    with contextlib.suppress(CheckpointError):
        checkpoint = read_checkpoint(folder / "damaged")
        assert all(type(tensor) is Tensor for tensor in checkpoint.tensors.values())


def test_dict_that_hides_its_methods(tmp_path: Path) -> None:
    state = collections.OrderedDict(weights())
    state.hidden = 3  # type: ignore[attr-defined]
    path = repacked(saved(tmp_path, {"state_dict": state}), {b"\x06\0\0\0hidden": b"\x05\0\0\0items"})
    assert_same(read_checkpoint(path).tensors, weights())
