"""Every format that the libraries save: read as saved, re-estimated as the plain state dict is, refused with a word."""

from __future__ import annotations

import contextlib
import json
import pickle
import random
import re
import zipfile
from pathlib import Path

import format_files
import numpy as np
import pytest
import torch
import torchvision
from click.testing import CliRunner
from format_files import FORMATS, ORDERED, Maker, Net
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ckpt_tools.cli import main
from ckpt_tools.contract import Checkpoint
from ckpt_tools.errors import CheckpointError
from ckpt_tools.storage.averages import averaged_copies
from ckpt_tools.storage.quantised import missing_batch_norm
from ckpt_tools.storage.read import read_checkpoint, sha256
from ckpt_tools.storage.write import save


@pytest.fixture
def model() -> nn.Module:
    model = Net().train()
    with torch.no_grad():
        for _ in range(3):
            model(torch.randn(8, 3, 8, 8) + 1)
    return model.eval()


def assert_holds(checkpoint: Checkpoint, state: dict[str, Tensor], prefix: str = "") -> None:
    assert set(checkpoint.tensors) == {prefix + key for key in state}
    for key, tensor in state.items():
        found = checkpoint.tensors[prefix + key]
        assert type(found) is Tensor
        assert not found.requires_grad
        assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(found, tensor)


def maker_id(maker: Maker) -> str:
    return maker.__name__


# --- every format ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("maker", FORMATS, ids=maker_id)
def test_the_state_dict_bit_for_bit(tmp_path: Path, model: nn.Module, maker: Maker) -> None:
    path = maker(model, tmp_path)
    checkpoint = read_checkpoint(path)
    assert_holds(checkpoint, model.state_dict())
    if maker in ORDERED:
        assert list(checkpoint.tensors) == list(model.state_dict())
    assert len(sha256(path)) == 64
    digest = save(tmp_path / "copy.safetensors", checkpoint, {}, provenance={})
    assert digest == sha256(tmp_path / "copy.safetensors")
    assert_holds(read_checkpoint(tmp_path / "copy.safetensors"), model.state_dict())


@pytest.mark.parametrize("maker", FORMATS, ids=maker_id)
def test_reestimated_as_the_plain_state_dict(tmp_path: Path, model: nn.Module, maker: Maker) -> None:
    np.save(tmp_path / "data.npy", torch.randn(24, 3, 8, 8).numpy())
    outputs = [reestimated(tmp_path, m(model, tmp_path)) for m in (format_files.state_dict, maker)]
    assert {key: tensor.tolist() for key, tensor in outputs[0].items()} == {
        k: t.tolist() for k, t in outputs[1].items()
    }
    assert not torch.equal(outputs[0]["body.5.running_var"], model.state_dict()["body.5.running_var"])


def reestimated(folder: Path, checkpoint: Path) -> dict[str, Tensor]:
    arguments = ["bn-reestimate", checkpoint, "--data", folder / "data.npy", "--arch", "format_files:Net", "-q"]
    output = folder / "out.safetensors"
    more = ["--model-kwargs", "rate=0.3", "--force", "--overwrite", "-o", output]
    result = CliRunner().invoke(main, [str(word) for word in (*arguments, *more)])
    assert result.exit_code == 0, result.output
    return load_file(output)


@pytest.mark.parametrize("maker", FORMATS, ids=maker_id)
def test_damage_is_one_clear_error(tmp_path: Path, model: nn.Module, maker: Maker) -> None:
    path = maker(model, tmp_path)
    files = [file for file in sorted(path.rglob("*")) if file.is_file()] if path.is_dir() else [path]
    chance = random.Random(0)
    for _ in range(40):
        file = chance.choice(files)
        whole = file.read_bytes()
        damaged = bytearray(whole[: chance.choice([len(whole), chance.randrange(len(whole))])])
        for _ in range(chance.choice([0, 1, 3])):
            at = chance.randrange(len(whole))
            damaged[at : at + 1] = bytes([chance.choice([0, 0x28, 0x2E, 0xFF])])
        file.write_bytes(damaged)
        with contextlib.suppress(CheckpointError):  # a weight may be hit, which nobody can tell
            read_checkpoint(path)
        file.write_bytes(whole)
    assert_holds(read_checkpoint(path), model.state_dict())


# --- whole modules ---------------------------------------------------------------------------------------------


def test_whole_module_says_its_class_and_rates(tmp_path: Path, model: nn.Module) -> None:
    said = read_checkpoint(format_files.whole_module(model, tmp_path)).words["module"]
    assert said == {"class": "format_files.Net", "rates": {"body.3": {"p": 0.3}}}
    said = read_checkpoint(format_files.scripted(model, tmp_path)).words["module"]
    assert said == {"class": "format_files.Net", "rates": {"body.3": {"p": 0.3}}}


def test_wrapped_module_says_what_is_inside(tmp_path: Path, model: nn.Module) -> None:
    said = read_checkpoint(format_files.data_parallel(model, tmp_path)).words
    # Paths are the file's own; the checkpoint's prefix tells what was removed from the keys.
    assert said == {"epoch": 3, "module": {"class": "format_files.Net", "rates": {"module.body.3": {"p": 0.3}}}}


@pytest.mark.parametrize("maker", [format_files.whole_module, format_files.data_parallel, format_files.ultralytics])
def test_trusted_module_is_handed_on(tmp_path: Path, model: nn.Module, maker: Maker) -> None:
    path = maker(model, tmp_path)
    assert read_checkpoint(path).module is None
    checkpoint = read_checkpoint(path, trust=True)
    assert isinstance(checkpoint.module, Net)
    assert_holds(checkpoint, checkpoint.module.state_dict())
    assert_holds(checkpoint, model.state_dict())


def test_model_beside_its_average(tmp_path: Path, model: nn.Module) -> None:
    torch.save({"model": Net(), "ema": model, "epoch": 3}, tmp_path / "x.pt")
    checkpoint = read_checkpoint(tmp_path / "x.pt")
    assert (checkpoint.weights, checkpoint.left_out, checkpoint.words["epoch"]) == ("ema", ("model",), 3)
    assert_holds(checkpoint, model.state_dict())
    assert read_checkpoint(tmp_path / "x.pt", weights="model").weights == "model"


def test_pair_of_state_dict_and_optimizer(tmp_path: Path, model: nn.Module) -> None:
    torch.save((model.state_dict(), format_files.optimizer_state(model)), tmp_path / "x.pt")
    checkpoint = read_checkpoint(tmp_path / "x.pt")
    assert (checkpoint.weights, checkpoint.left_out) == ("0", ("1",))
    assert_holds(checkpoint, model.state_dict())
    torch.save([model.state_dict(), model], tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=r"found 2 that could be meant: 0, 1\."):
        read_checkpoint(tmp_path / "x.pt")


class Learner:
    def __init__(self, model: nn.Module) -> None:
        self.model, self.lr = model, 0.1


class Sealed(Learner):
    def __reduce__(self) -> object:
        return Sealed, (self.model,)


def test_object_around_a_module(tmp_path: Path, model: nn.Module) -> None:
    torch.save(Learner(model), tmp_path / "x.pkl")
    checkpoint = read_checkpoint(tmp_path / "x.pkl")
    assert (checkpoint.weights, checkpoint.words["lr"]) == ("model", 0.1)
    assert_holds(checkpoint, model.state_dict())
    torch.save({"learner": Sealed(model)}, tmp_path / "x.pkl")
    with pytest.raises(CheckpointError, match=r"found none.*--trust.*test_formats\.Sealed"):
        read_checkpoint(tmp_path / "x.pkl")


# --- TorchScript -----------------------------------------------------------------------------------------------


class Extras(nn.Module):
    """What is no state: a plain tensor attribute, and a module that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.BatchNorm2d(3)
        self.again = self.first
        self.mean = torch.ones(3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.again(self.first(x - self.mean))


@pytest.mark.parametrize("script", [True, False])
def test_only_parameters_and_buffers_of_a_script(tmp_path: Path, script: bool) -> None:
    model = Extras().eval()
    with format_files.quietly():
        archive = torch.jit.script(model) if script else torch.jit.trace(model, torch.randn(2, 3, 4, 4))
        torch.jit.save(archive, tmp_path / "x.pt", _extra_files={"labels.txt": "a b"})
    assert_holds(read_checkpoint(tmp_path / "x.pt"), model.state_dict())


def test_frozen_script(tmp_path: Path, model: nn.Module) -> None:
    with pytest.raises(CheckpointError, match=r"freezing.*folds BatchNorm"):
        read_checkpoint(format_files.frozen(model, tmp_path))


# --- torch.export ----------------------------------------------------------------------------------------------


class Passing(nn.Module):
    """A buffer that is not saved, tied weights, an empty one, and one of another type."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(3, 3), nn.Linear(3, 3)
        self.two.weight = self.one.weight
        self.register_buffer("mask", torch.ones(3), persistent=False)
        self.register_buffer("wide", torch.arange(12).reshape(3, 4).t().bfloat16())
        self.register_buffer("empty", torch.ones(0, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x * self.mask)) + self.wide.sum() + self.empty.sum()


@pytest.mark.parametrize(
    "maker", [format_files.exported, format_files.exported_2_6, format_files.exported_2_8], ids=maker_id
)
def test_persistent_state_of_an_exported_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, maker: Maker) -> None:
    monkeypatch.setattr(format_files, "example", lambda: torch.randn(2, 3))
    model = Passing()
    checkpoint = read_checkpoint(maker(model, tmp_path))
    assert_holds(checkpoint, model.state_dict())
    assert checkpoint.format == "torch.export"


def rewritten(path: Path, name: str, change: object) -> Path:
    """The archive with one record (by the end of its name) changed by a function, or gone."""
    target = path.with_name("changed.pt2")
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(target, "w") as archive:
        for info in source.infolist():
            content = source.read(info)
            if info.filename.endswith(name):
                content = change(content) if callable(change) else None
            if content is not None:
                archive.writestr(info.filename, content)
    return target


CONFIG = "model_weights_config.json"


def edited(**changes: object) -> object:
    def change(content: bytes) -> bytes:
        config = json.loads(content)
        entry = config["config"]["head.weight"]
        (entry if "path_name" in changes else entry["tensor_meta"]).update(changes)
        return json.dumps(config).encode()

    return change


@pytest.mark.parametrize(
    ("name", "change"),
    [
        (CONFIG, edited(sizes=[{"as_int": 2**40}, {"as_int": 8}])),
        (CONFIG, edited(sizes=[{"as_int": -1}, {"as_int": 8}])),
        (CONFIG, edited(strides=[{"as_int": 0}, {"as_int": 0}], sizes=[{"as_int": 2**20}, {"as_int": 2**20}])),
        (CONFIG, edited(storage_offset={"as_int": 10})),
        (CONFIG, edited(storage_offset={"as_expr": "s0"})),
        (CONFIG, edited(dtype=99)),
        (CONFIG, edited(dtype=[])),
        (CONFIG, edited(layout=1)),
        (CONFIG, edited(path_name="../../etc/passwd")),
        (CONFIG, edited(path_name=3)),
        (CONFIG, lambda content: b"{"),
        (CONFIG, lambda content: b"[]"),
        (CONFIG, lambda content: b"[" * 100_000),
        (CONFIG, lambda content: b'{"config": {"a": null}}'),
        (CONFIG, None),
        ("weight_3", None),
        ("weight_3", lambda content: content[:-1]),
        ("byteorder", lambda content: b"big"),
    ],
)
def test_damaged_exported_program(tmp_path: Path, model: nn.Module, name: str, change: object) -> None:
    path = rewritten(format_files.exported(model, tmp_path), name, change)
    with pytest.raises(CheckpointError, match=r"expected the (archive|weights)"):
        read_checkpoint(path)


def test_truncated_archives(tmp_path: Path, model: nn.Module) -> None:
    for maker in (format_files.exported, format_files.scripted, format_files.whole_module):
        path = maker(model, tmp_path)
        path.write_bytes(path.read_bytes()[:-200])
        with pytest.raises(CheckpointError, match="cut short"):
            read_checkpoint(path)


def test_compiled_package(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.pt2", "w") as archive:
        for name in ("archive_format", "data/aotinductor/model/wrapper.so"):
            archive.writestr(f"x/{name}", b"pt2")
    with pytest.raises(CheckpointError, match="AOTInductor"):
        read_checkpoint(tmp_path / "x.pt2")


def test_compressed_export_is_read_by_copying(tmp_path: Path, model: nn.Module) -> None:
    path = format_files.exported(model, tmp_path)
    target = tmp_path / "packed.pt2"
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for info in source.infolist():
            archive.writestr(info.filename, source.read(info))
    assert_holds(read_checkpoint(target), model.state_dict())


# --- distributed checkpoints -----------------------------------------------------------------------------------


def test_distributed_words_and_optimizer(tmp_path: Path, model: nn.Module) -> None:
    checkpoint = read_checkpoint(format_files.distributed(model, tmp_path))
    assert (checkpoint.weights, checkpoint.left_out) == ("model", ("optim",))
    assert checkpoint.words == {"epoch": 3, "args": {"lr": 0.1}}
    assert read_checkpoint(tmp_path / "dcp" / ".metadata").words == checkpoint.words


def test_optimizer_states_stay_on_the_disk(tmp_path: Path, model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    from ckpt_tools.storage import distributed

    read: list[str] = []
    inner = distributed._read
    monkeypatch.setattr(
        distributed, "_read", lambda folder, name, piece: (read.append(name), inner(folder, name, piece))[1]
    )
    read_checkpoint(format_files.distributed(model, tmp_path))
    assert {name.partition(".")[0] for name in read} == {"model", "epoch", "args"}


def test_lightnings_words_beside_the_shards(tmp_path: Path, model: nn.Module) -> None:
    folder = format_files.distributed_two_ranks(model, tmp_path)
    torch.save({"hyper_parameters": {"arch": "resnet18"}, "epoch": 2}, folder / "meta.pt")
    words = read_checkpoint(folder).words
    assert words == {} or words["hyper_parameters"] == {"arch": "resnet18"}


def test_distributed_damage(tmp_path: Path, model: nn.Module) -> None:
    folder = format_files.distributed_two_ranks(model, tmp_path)
    shard = folder / "__1_0.distcp"
    whole = shard.read_bytes()
    with pytest.raises(CheckpointError, match="Give the folder"):
        read_checkpoint(shard)
    shard.write_bytes(whole[:-100])
    with pytest.raises(CheckpointError, match="cut short"):
        read_checkpoint(folder)
    shard.write_bytes(bytes(len(whole)))
    with pytest.raises(CheckpointError, match=r"__1_0\.distcp"):
        read_checkpoint(folder)
    shard.unlink()
    with pytest.raises(CheckpointError, match=r"expected the shard __1_0\.distcp"):
        read_checkpoint(folder)
    for content in (b"", b"junk", pickle.dumps({"a": 1}), (folder / ".metadata").read_bytes()[:-40]):
        (folder / ".metadata").write_bytes(content)
        with pytest.raises(CheckpointError, match=r"\.metadata"):
            read_checkpoint(folder)


def changed_metadata(folder: Path, change: object) -> Path:
    path = folder / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    assert callable(change)
    change(metadata)
    path.write_bytes(pickle.dumps(metadata))
    return folder


def first_info(metadata: object) -> object:
    return next(info for index, info in metadata.storage_data.items() if index.fqn == "model.head.weight")  # type: ignore[attr-defined]


def first_entry(metadata: object) -> object:
    return metadata.state_dict_metadata["model.head.weight"]  # type: ignore[attr-defined]


HOSTILE = {
    "outside": lambda m: setattr(first_info(m), "relative_path", "../secret.distcp"),
    "absolute": lambda m: setattr(first_info(m), "relative_path", "/etc/passwd"),
    "no text": lambda m: setattr(first_info(m), "relative_path", 3),
    "gone": lambda m: setattr(first_info(m), "relative_path", "__7_0.distcp"),
    "beyond": lambda m: setattr(first_info(m), "offset", 2**40),
    "negative": lambda m: setattr(first_info(m), "offset", -1),
    "long": lambda m: setattr(first_info(m), "length", 2**50),
    "claimed twice": lambda m: [
        setattr(x, "offset", 0) or setattr(x, "length", 50_000) for x in m.storage_data.values()
    ],
    "huge": lambda m: setattr(first_entry(m), "size", torch.Size([2**40, 8])),
    "chunk outside": lambda m: setattr(first_entry(m).chunks[0], "offsets", torch.Size([3, 3])),
    "huge chunk": lambda m: [
        setattr(first_entry(m), "size", torch.Size([2**40, 8])),
        setattr(first_entry(m).chunks[0], "sizes", torch.Size([2**40, 8])),
    ],
    "no chunks": lambda m: setattr(first_entry(m), "chunks", []),
    "another dtype": lambda m: setattr(first_entry(m).properties, "dtype", torch.float16),
    "no dtype": lambda m: setattr(first_entry(m), "properties", None),
    "no storage": lambda m: setattr(m, "storage_data", None),
    "no entry": lambda m: m.storage_data.clear(),
    "path of objects": lambda m: m.planner_data.update({"model.head.weight": (("a",), 1.5)}),
    "leaf and container": lambda m: m.planner_data.update({"model.head.weight": ("model",)}),
    "extension": lambda m: setattr(first_info(m), "transform_descriptors", ["zstd"]),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_metadata(tmp_path: Path, model: nn.Module, what: str) -> None:
    (tmp_path / "secret.distcp").write_bytes(b"secret")
    folder = changed_metadata(format_files.distributed(model, tmp_path), HOSTILE[what])
    with pytest.raises(CheckpointError, match="expected") as caught:
        read_checkpoint(folder)
    assert "secret'" not in str(caught.value)


# --- folders ---------------------------------------------------------------------------------------------------


def test_transformers_folder(tmp_path: Path) -> None:
    with format_files.quietly():
        from transformers import ConvNextImageProcessorPil, ResNetConfig, ResNetForImageClassification

        config = ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic", num_labels=3)
        model = ResNetForImageClassification(config)
        model.save_pretrained(tmp_path / "one")
        model.save_pretrained(tmp_path / "shards", max_shard_size="2KB")
        ConvNextImageProcessorPil(image_mean=[0.1, 0.2, 0.3]).save_pretrained(tmp_path / "one")
    for path in (tmp_path / "one", tmp_path / "one" / "model.safetensors", tmp_path / "shards"):
        checkpoint = read_checkpoint(path)
        assert_holds(checkpoint, model.state_dict())
        assert checkpoint.words["config"]["architectures"] == ["ResNetForImageClassification"]
        assert checkpoint.words.get("preprocessor", {}).get("image_mean") == (
            [0.1, 0.2, 0.3] if "one" in str(path) else None
        )
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1


@pytest.mark.parametrize("safe", [True, False, "both"])
def test_timm_hub_folder(tmp_path: Path, safe: object) -> None:
    import timm
    from timm.models import save_for_hf

    model = timm.create_model("test_byobnet", num_classes=7)
    with format_files.quietly():
        save_for_hf(model, str(tmp_path), model_args={"drop_rate": 0.2}, safe_serialization=safe)
    checkpoint = read_checkpoint(tmp_path)
    assert_holds(checkpoint, model.state_dict())
    assert checkpoint.format == ("torch.save" if safe is False else "safetensors")
    config = checkpoint.words["config"]
    assert (config["architecture"], config["num_classes"]) == ("test_byobnet", 7)
    assert config["model_args"]["drop_rate"] == 0.2
    file = tmp_path / ("pytorch_model.bin" if safe is False else "model.safetensors")
    assert read_checkpoint(file).words == checkpoint.words


def test_trainer_files_beside_the_weights(tmp_path: Path) -> None:
    save_file({"a.weight": torch.ones(2)}, tmp_path / "model.safetensors")
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin", "scaler.pt"):
        torch.save({"state": {}}, tmp_path / name)
    assert list(read_checkpoint(tmp_path).tensors) == ["a.weight"]


def test_unrelated_settings_do_not_mislead(tmp_path: Path) -> None:
    save_file({"a.weight": torch.ones(2)}, tmp_path / "model.safetensors")
    torch.save({"a.weight": torch.ones(2)}, tmp_path / "best.pt")
    (tmp_path / "config.json").write_text('{"learning_rate": 3}')
    assert read_checkpoint(tmp_path / "model.safetensors").words == {}
    (tmp_path / "config.json").write_text('{"architecture": "resnet50"}')
    assert read_checkpoint(tmp_path / "best.pt").words == {}
    assert read_checkpoint(tmp_path / "model.safetensors").words == {"config": {"architecture": "resnet50"}}


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "\udce4", "[" * 100_000, '{"a": ' + "1" * 5000 + "}"])
def test_damaged_config(tmp_path: Path, text: str) -> None:
    save_file({"a.weight": torch.ones(2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(CheckpointError, match=r"config\.json.*--arch"):
        read_checkpoint(tmp_path)


FOLDERS = {
    "SavedModel": ["saved_model.pb"],
    "TensorFlow checkpoint": ["checkpoint", "model.ckpt-5.index", "model.ckpt-5.data-00000-of-00001"],
    "Orbax": ["_METADATA", "manifest.ocdbt"],
    "without PyTorch weights": ["config.json", "flax_model.msgpack"],
    "mp_rank_00_model_states": ["latest", "zero_to_fp32.py"],
    r"without their \.metadata": ["__0_0.distcp"],
    "no checkpoint in it": ["notes.txt"],
    "2 candidates": ["a.pt", "b.pt"],
}


@pytest.mark.parametrize("what", FOLDERS)
def test_folders_of_others(tmp_path: Path, what: str) -> None:
    for name in FOLDERS[what]:
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(CheckpointError, match=what):
        read_checkpoint(tmp_path)


# --- Lightning -------------------------------------------------------------------------------------------------


def test_lightning_checkpoint_and_its_averaging(tmp_path: Path, model: nn.Module) -> None:
    with format_files.quietly():
        from lightning.pytorch.callbacks import EMAWeightAveraging

    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    plain = read_checkpoint(format_files.lightning_ckpt(model, tmp_path))
    assert_holds(plain, before, "model.")
    assert plain.words["hyper_parameters"] == {"arch": "resnet18", "lr": 0.0}
    path = format_files.lightning_ckpt(model, tmp_path, EMAWeightAveraging(decay=0.5))
    raw = torch.load(path, weights_only=False)
    assert {"state_dict", "current_model_state", "averaging_state"} <= set(raw)
    for choice, name in (("auto", "state_dict"), ("ema", "state_dict"), ("model", "current_model_state")):
        checkpoint = read_checkpoint(path, weights=choice)
        assert checkpoint.weights == name
        assert_holds(checkpoint, {key: tensor.detach() for key, tensor in raw[name].items()})


COPIES = {
    "ema_model": {"": "model.", "ema": "ema_model."},
    "model_ema.module": {"": "model.", "ema": "model_ema.module."},
    "ema": {"": "", "ema": "ema."},
    "model.ema": {"": "model.net.", "ema": "model.ema."},
    "ema.ema_model": {"": "ema.online_model.", "ema": "ema.ema_model."},
}


@pytest.mark.parametrize("name", ["ema_model", "model_ema.module", "ema", "model.ema"])
def test_averaged_copy_within_a_state_dict(tmp_path: Path, model: nn.Module, name: str) -> None:
    places = COPIES[name]
    average = {key: tensor + 1 for key, tensor in model.state_dict().items()}
    content = {places[""] + key: tensor for key, tensor in model.state_dict().items()}
    content |= {places["ema"] + key: tensor for key, tensor in average.items()}
    content |= {places["ema"].partition(".")[0] + ".n_averaged": torch.tensor(3)} if "module" in name else {}
    torch.save({"state_dict": content}, tmp_path / "x.ckpt")
    for choice in ("auto", "ema", f"state_dict.{name}"):
        checkpoint = read_checkpoint(tmp_path / "x.ckpt", weights=choice)
        assert checkpoint.weights == f"state_dict.{name}"
        assert_holds(checkpoint, average, places["ema"])
    raw = read_checkpoint(tmp_path / "x.ckpt", weights="model")
    assert_holds(raw, model.state_dict(), places[""])
    assert raw.left_out[0].endswith("tensors)")


def test_branches_with_similar_names_are_no_copies() -> None:
    branch = {"0.weight": torch.ones(2, 2), "1.running_var": torch.ones(2)}
    state = {f"{name}.{key}": tensor for name in ("avg_branch", "max_branch") for key, tensor in branch.items()}
    assert averaged_copies(state) == []
    without_statistics = {"ema.0.weight": torch.ones(2, 2), **branch}
    assert averaged_copies(without_statistics) == []


def test_timm_saver_after_reestimation_of_its_average(tmp_path: Path) -> None:
    import timm
    from timm.utils import CheckpointSaver, ModelEmaV3

    model = timm.create_model("test_byobnet", num_classes=4)
    ema = ModelEmaV3(model)
    args = __import__("argparse").Namespace(model="test_byobnet", drop=0.1, num_classes=4)
    saver = CheckpointSaver(model, torch.optim.SGD(model.parameters(), 0.1), args, ema, checkpoint_dir=str(tmp_path))
    saver.save_checkpoint(1, metric=1.0)
    checkpoint = read_checkpoint(tmp_path / "last.pth.tar")
    assert checkpoint.weights == "state_dict_ema"
    assert_holds(checkpoint, ema.module.state_dict())


# --- other files -----------------------------------------------------------------------------------------------

OTHERS = {
    "GGUF": b"GGUF\x03\x00\x00\x00" + bytes(40),
    "ONNX": b"\x08\x08\x12\x07pytorch\x1a\x052.1.0:" + bytes(99),
    "TensorFlow Lite": b"\x1c\x00\x00\x00TFL3" + bytes(99),
    "ExecuTorch": b"\x1c\x00\x00\x00ET12" + bytes(99),
    "SavedModel": b"\x08\x01\x12\xa0\x03" + bytes(99),
    "HDF5 file, as Keras": b"\x89HDF\r\n\x1a\n" + bytes(99),
    "msgpack file, as Flax": b"\x81\xa6params\x81\xa4conv" + b"\xff" * 99,
    "XML": b"<?xml version='1.0'?>",
    "zstd": b"\x28\xb5\x2f\xfd" + bytes(99),
}


@pytest.mark.parametrize("what", OTHERS)
def test_files_of_others(tmp_path: Path, what: str) -> None:
    (tmp_path / "x.bin").write_bytes(OTHERS[what])
    with pytest.raises(CheckpointError, match=rf"(?s)x\.bin: expected.*({what}).*\. [A-Z]"):
        read_checkpoint(tmp_path / "x.bin")


ARCHIVES = {
    "Keras": ["metadata.json", "config.json", "model.weights.h5"],
    r"\.npz": ["a.npy", "b.npy"],
    r"torch\.package": ["x/.data/extern_modules", "x/model/model.pkl"],
    r"PyTorch 1\.3": ["x/model.json", "x/tensors/0"],
    "torch.save did not write": ["readme.txt"],
}


@pytest.mark.parametrize("what", ARCHIVES)
def test_archives_of_others(tmp_path: Path, what: str) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for name in ARCHIVES[what]:
            archive.writestr(name, b"x")
    with pytest.raises(CheckpointError, match=what):
        read_checkpoint(tmp_path / "x.zip")


def test_real_numpy_archive(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", a=np.ones(3))
    with pytest.raises(CheckpointError, match=r"\.npz"):
        read_checkpoint(tmp_path / "x.npz")


# --- quantised models ------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")  # torch deprecates its own quantisation
def test_quantised_model_without_any_tensor_in_its_keys(tmp_path: Path) -> None:
    quantised = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(4, 4)), {nn.Linear})
    torch.save(quantised.state_dict(), tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="found a quantised model"):
        read_checkpoint(tmp_path / "x.pt")


def test_quantised_model(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
    with format_files.quietly():
        quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
        torch.save(quantised.state_dict(), tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="quantised"):
        read_checkpoint(tmp_path / "x.pt")


def test_whole_module_with_quantised_layers(tmp_path: Path) -> None:
    plain = torchvision.models.resnet18()
    with format_files.quietly():
        torch.save(torch.ao.quantization.quantize_dynamic(plain, {nn.Linear}), tmp_path / "x.pt")
        torch.save(torchvision.models.quantization.resnet18(quantize=False), tmp_path / "stubs.pt")
    with pytest.raises(CheckpointError, match=r"fc: torch\.ao\.nn\.quantized"):
        read_checkpoint(tmp_path / "x.pt")
    assert read_checkpoint(tmp_path / "stubs.pt").shapes == {
        key: tuple(tensor.shape) for key, tensor in plain.state_dict().items()
    }


def test_recorded_stochastic_depth(tmp_path: Path) -> None:
    torch.save(torchvision.models.efficientnet_b0(stochastic_depth_prob=0.3), tmp_path / "x.pt")
    rates = read_checkpoint(tmp_path / "x.pt").words["module"]["rates"]
    assert rates["features.7.0.stochastic_depth"] == {"p": pytest.approx(0.3 * 15 / 16)}


@pytest.mark.parametrize(
    "keys",
    [
        ["conv1.weight", "conv1.scale", "conv1.zero_point"],
        ["fc._packed_params._packed_params", "fc._packed_params.dtype"],
        ["a.weight", "a.weight.absmax", "a.weight.quant_map"],
        ["a.qweight", "a.qzeros", "a.scales", "a.g_idx"],
        ["a.weight", "a.weight_scale", "b.weight", "b.weight_scale"],
    ],
)
def test_quantised_keys(keys: list[str]) -> None:
    assert re.search("quantis", missing_batch_norm(keys) or "")
    assert missing_batch_norm([*keys, "bn.running_var"]) is None


@pytest.mark.parametrize("keys", [["a.weight", "a.scale"], ["norm.scale", "norm.bias"], ["conv.weight"], []])
def test_plain_keys_are_not_quantised(keys: list[str]) -> None:
    assert missing_batch_norm(keys) is None
