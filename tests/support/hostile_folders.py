"""Folders, indices, manifests and words that lead elsewhere: to another file, a server, or code beside them.

``FOLDERS`` has one entry a trick, which fills a folder.
``outside`` holds what nobody may open: a state dict in several forms and a Python file, whose names the
tricks give.
"""

from __future__ import annotations

import io
import json
import tarfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import timm
import torch
import torch.distributed.checkpoint as dcp
from malicious import CODE
from safetensors.torch import save_file

__all__ = ["DATA", "FOLDERS", "MANIFESTS", "WORDS", "fill_outside"]

Words = Callable[[Path], Mapping[str, object]]
STATE = {"w": torch.ones(2)}
RESNET = timm.create_model(
    "test_resnet", num_classes=5
).state_dict()  # for configs that fit it: a second a command
TINY = {
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "intermediate_size": 8,
    "vocab_size": 16,
}
SMALL_RESNET = {"embedding_size": 8, "hidden_sizes": [8], "depths": [1], "layer_type": "basic"}
SMALL_DETR = {
    "num_queries": 2,
    "d_model": 8,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 1,
}
SMALL_DETR |= {"decoder_attention_heads": 1, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8}
SERVER = "http://127.0.0.1:9/"


def fill_outside(outside: Path) -> list[Path]:
    """Write the files that the tricks name, and return them."""
    torch.save(STATE, outside / "secret.pt")
    save_file({"w": torch.ones(2)}, outside / "model.safetensors")
    for name in ("config.json", "preprocessor_config.json"):
        (outside / name).write_text(json.dumps({"architecture": "test_resnet", "model_type": "resnet"}))
    (outside / "evil.py").write_text(CODE)
    (outside / "sec.distc").write_bytes(bytes(4096))  # as long a name as those of a distributed checkpoint
    (outside / "images.npy").write_bytes(b"\x93NUMPY")
    return sorted(outside.iterdir())


def _timm(**more: object) -> dict[str, object]:
    return {
        "architecture": "test_resnet",
        "num_classes": 5,
        "pretrained_cfg": {"input_size": [3, 32, 32]},
        **more,
    }


def _wrapper(kind: str, **more: object) -> dict[str, object]:
    named = {"model_type": "resnet", **SMALL_RESNET, "architectures": [kind], "transformers_version": "5"}
    return {**named, **TINY, "num_labels": 5, "num_classes": 5, **more}


def _evil_map(*classes: str) -> dict[str, str]:
    return dict.fromkeys(
        classes or ("AutoConfig", "AutoModel", "AutoModelForImageClassification"), "evil.Model"
    )


# --- config.json --------------------------------------------------------------------------------------------

CONFIGS: dict[str, Words] = {
    "timm: checkpoint_path": lambda out: _timm(model_args={"checkpoint_path": str(out / "secret.pt")}),
    "timm: checkpoint_path among the settings": lambda out: _timm(checkpoint_path=str(out / "secret.pt")),
    "timm: pretrained, from a file": lambda out: _timm(
        model_args={"pretrained": True}, pretrained_cfg={"file": str(out / "secret.pt"), "custom_load": True}
    ),
    "timm: an overlay with a file": lambda out: _timm(
        model_args={"pretrained": True, "pretrained_cfg_overlay": {"file": str(out / "secret.pt")}}
    ),
    "timm: nested pretrained settings": lambda out: _timm(
        model_args={"pretrained_cfg": {"file": str(out / "secret.pt"), "url": SERVER}, "pretrained": 1}
    ),
    "timm: settings with a URL": lambda out: _timm(
        model_args={"pretrained": True}, pretrained_cfg={"url": SERVER + "x.pth", "hf_hub_id": None}
    ),
    "timm: settings with a repository": lambda out: _timm(
        model_args={"pretrained": True}, pretrained_cfg={"hf_hub_id": "evil/model", "source": "hf-hub"}
    ),
    "timm: cache_dir and weights_only": lambda out: _timm(
        model_args={"cache_dir": str(out), "weights_only": False, "pretrained_strict": False}
    ),
    "timm: a local folder as the architecture": lambda out: _timm(architecture=f"local-dir:{out}"),
    "timm: a repository as the architecture": lambda out: _timm(architecture="hf-hub:evil/model"),
    "timm: a repository with blanks and capitals": lambda out: _timm(architecture=" HF_HUB:evil/model"),
    "timm: a local folder among the arguments": lambda out: _timm(
        model_args={"model_name": f"local-dir:{out}"}
    ),
    "timm: layers by name": lambda out: _timm(
        model_args={"norm_layer": "evil.Model", "act_layer": "os.system"}
    ),
    "timm: a backbone in a backbone": lambda out: _timm(
        architecture="vit_base_resnet50_224_in21k", model_args={"backbone": f"local-dir:{out}"}
    ),
    "wrapper: checkpoint_path": lambda out: _wrapper(
        "TimmWrapperForImageClassification",
        architecture="test_resnet",
        model_args={"checkpoint_path": str(out / "secret.pt")},
    ),
    "wrapper: by its own type": lambda out: _wrapper(
        "TimmWrapperModel",
        model_type="timm_wrapper",
        architecture="test_resnet",
        model_args={"checkpoint_path": str(out / "secret.pt"), "pretrained": True},
    ),
    "wrapper: a local folder": lambda out: _wrapper(
        "TimmWrapperForImageClassification", model_type="timm_wrapper", architecture=f"local-dir:{out}"
    ),
    "wrapper: a repository": lambda out: _wrapper(
        "TimmWrapperForImageClassification", model_type="timm_wrapper", architecture="hf-hub:evil/model"
    ),
    "wrapper: without a class": lambda out: {
        "model_type": "timm_wrapper",
        "architecture": "test_resnet",
        "model_args": {"checkpoint_path": str(out / "secret.pt")},
        "transformers_version": "5",
    },
    "timm backbone: a local folder": lambda out: _wrapper(
        "TimmBackbone", model_type="timm_backbone", backbone=f"local-dir:{out}", use_pretrained_backbone=True
    ),
    "timm backbone: a repository": lambda out: _wrapper(
        "TimmBackbone", model_type="timm_backbone", backbone="hf-hub:evil/model"
    ),
    "detr: a backbone of timm that is downloaded": lambda out: _wrapper(
        "DetrForObjectDetection",
        model_type="detr",
        **SMALL_DETR,
        backbone="test_resnet",
        use_timm_backbone=True,
        use_pretrained_backbone=True,
    ),
    "detr: a backbone in a local folder": lambda out: _wrapper(
        "DetrForObjectDetection",
        model_type="detr",
        **SMALL_DETR,
        backbone=f"local-dir:{out}",
        use_timm_backbone=True,
    ),
    "upernet: a backbone of transformers elsewhere": lambda out: _wrapper(
        "UperNetForSemanticSegmentation",
        model_type="upernet",
        backbone=str(out),
        use_pretrained_backbone=True,
    ),
    "upernet: a nested backbone of timm": lambda out: _wrapper(
        "UperNetForSemanticSegmentation",
        model_type="upernet",
        backbone_config={"model_type": "timm_backbone", "backbone": f"local-dir:{out}"},
    ),
    "auto_map": lambda out: _wrapper("ResNetForImageClassification", auto_map=_evil_map()),
    "auto_map of a class of ours": lambda out: _wrapper("Model", model_type="evil", auto_map=_evil_map()),
    "auto_map in a repository": lambda out: _wrapper(
        "ResNetForImageClassification", auto_map={"AutoConfig": "evil/code--evil.Model"}
    ),
    "auto_map in a nested config": lambda out: _wrapper(
        "UperNetForSemanticSegmentation",
        model_type="upernet",
        backbone_config={
            "model_type": "bert",
            **TINY,
            "_name_or_path": ".",
            "name_or_path": ".",
            "auto_map": _evil_map("AutoBackbone", "AutoConfig"),
        },
    ),
    "auto_map in a nested config, by the folder's path": lambda out: _wrapper(
        "DepthAnythingForDepthEstimation",
        model_type="depth_anything",
        backbone_config={
            "model_type": "bert",
            **TINY,
            "_name_or_path": str(out),
            "name_or_path": str(out),
            "auto_map": _evil_map("AutoBackbone", "AutoConfig"),
        },
    ),
    "auto_map two levels down": lambda out: _wrapper(
        "MaskFormerForInstanceSegmentation",
        model_type="maskformer",
        backbone_config={"model_type": "swin", "text_config": {"auto_map": _evil_map(), "name_or_path": "."}},
    ),
    "auto_map in a vision and a text config": lambda out: _wrapper(
        "VisionTextDualEncoderModel",
        model_type="vision-text-dual-encoder",
        vision_config={
            "model_type": "resnet",
            **SMALL_RESNET,
            "auto_map": _evil_map(),
            "name_or_path": str(out),
        },
        text_config={"model_type": "bert", **TINY, "auto_map": _evil_map(), "name_or_path": str(out)},
    ),
    "a name that is a path": lambda out: _wrapper(
        "ResNetForImageClassification",
        _name_or_path=str(out),
        name_or_path=str(out),
        pretrained_model_name=str(out),
    ),
    "an encoder that is a path": lambda out: _wrapper(
        "VisionEncoderDecoderModel",
        model_type="vision-encoder-decoder",
        encoder={"model_type": "resnet", **SMALL_RESNET, "_name_or_path": str(out)},
        decoder={"model_type": "bert", **TINY, "_name_or_path": str(out)},
    ),
    "a tower by its name": lambda out: _wrapper(
        "LlavaForConditionalGeneration",
        model_type="llava",
        text_config={"model_type": "llama", **TINY},
        vision_config={"model_type": "clip_vision_model", **TINY, "image_size": 8, "patch_size": 4},
        vision_tower=str(out),
        mm_vision_tower="evil/model",
    ),
    "attention from a repository": lambda out: _wrapper(
        "ViTForImageClassification",
        model_type="vit",
        _attn_implementation="evil/kernel",
        attn_implementation="evil/kernel",
        _attn_implementation_internal="evil/kernel:run",
        use_kernels=True,
    ),
    "experts from a repository": lambda out: _wrapper(
        "ViTForImageClassification", model_type="vit", _experts_implementation="evil/kernel"
    ),
    "a quantiser with code": lambda out: _wrapper(
        "ResNetForImageClassification",
        quantization_config={"quant_method": "evil.Quantizer", "modules_to_not_convert": ["os.system"]},
    ),
    "a dtype that is code": lambda out: _wrapper(
        "ResNetForImageClassification", torch_dtype=CODE, dtype=CODE
    ),
    "an activation that is code": lambda out: _wrapper("ResNetForImageClassification", hidden_act=CODE),
    "a class by its dotted name": lambda out: _wrapper("os.system"),
    "a class by a path": lambda out: _wrapper("../../evil.Model"),
    "a class that is no model": lambda out: _wrapper("pipeline"),
    "a target of hydra": lambda out: {
        "_target_": "os.system",
        "model": {"_target_": "evil.Model"},
        "args": [CODE],
    },
    "words that are paths": lambda out: {
        name: str(out / "secret.pt")
        for name in (
            "model",
            "arch",
            "checkpoint",
            "resume",
            "initial_checkpoint",
            "pretrained",
            "weights",
            "config",
        )
    },
    "an adapter of another model": lambda out: {"base_model_name_or_path": str(out), "peft_type": "LORA"},
}

# --- words of the file itself -------------------------------------------------------------------------------

WORDS: dict[str, Words] = {
    "args: a local folder": lambda out: {"args": {"model": f"local-dir:{out}", "num_classes": 5}},
    "args: a repository": lambda out: {"args": {"model": "hf-hub:evil/model"}, "arch": "hf-hub:evil/model"},
    "args: paths of all kinds": lambda out: {
        "args": {
            "model": "test_resnet",
            "num_classes": 5,
            "pretrained": True,
            "checkpoint_path": str(out / "secret.pt"),
            "initial_checkpoint": str(out / "secret.pt"),
            "resume": str(out / "secret.pt"),
            "model_kwargs": {"checkpoint_path": str(out / "secret.pt"), "pretrained": True},
            "class_map": str(out / "secret.pt"),
            "data": str(out),
        }
    },
    "arch: a factory": lambda out: {"arch": "evil:Model", "architecture": "os:system", "model": "evil.Model"},
    "arch: an adapter": lambda out: {"arch": "evil:Adapter:name", "args": {"model": "evil:Adapter:name"}},
    "config: as a folder has it": lambda out: {"config": CONFIGS["wrapper: checkpoint_path"](out)},
    "config: with code": lambda out: {"config": CONFIGS["auto_map in a nested config"](out)},
    "hyper_parameters: a target": lambda out: {
        "hyper_parameters": {"model": {"_target_": "os.system"}, "arch": "test_resnet", "weights": str(out)},
        "pytorch-lightning_version": "2.0",
    },
    "a record of ours that names files": lambda out: {
        "ckpt_tools": {"source": str(out / "secret.pt"), "architecture": "evil:Model", "data": str(out)}
    },
}


def _with_config(words: Words, state: Mapping[str, torch.Tensor] = STATE) -> Callable[[Path, Path], None]:
    def fill(folder: Path, outside: Path) -> None:
        (folder / "config.json").write_text(json.dumps(words(outside)))
        preprocessor = {
            "image_processor_type": "Evil",
            "processor_class": "os.system",
            "auto_map": _evil_map("AutoImageProcessor"),
        }
        (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
        (folder / "evil.py").write_text(CODE)
        (folder / "__init__.py").write_text(CODE)
        save_file({**state}, folder / "model.safetensors", {"format": "pt"})

    return fill


def _index(name: str, file: Callable[[Path], str]) -> Callable[[Path, Path], None]:
    """An index of shards that names a file elsewhere."""

    def fill(folder: Path, outside: Path) -> None:
        second = f"model-00002-of-00002.{'safetensors' if 'safetensors' in name else 'bin'}"
        index = {"metadata": {"total_size": 16}, "weight_map": {"w": file(outside), "v": second}}
        (folder / name).write_text(json.dumps(index))
        (save_file if second.endswith(".safetensors") else torch.save)({"v": torch.ones(2)}, folder / second)

    return fill


def _distributed(folder: Path, outside: Path) -> None:
    """The metadata of a distributed checkpoint names its file by a path that leads out."""
    with warnings.catch_warnings(action="ignore"):
        dcp.save({"model": {"w": torch.ones(4)}}, checkpoint_id=folder, no_dist=True)
    metadata = (folder / ".metadata").read_bytes()
    assert b"__0_0.distcp" in metadata
    (folder / ".metadata").write_bytes(metadata.replace(b"__0_0.distcp", b"../sec.distc"))
    (folder.parent / "sec.distc").symlink_to(outside / "sec.distc")


FITTING = ("timm: checkpoint_path", "wrapper: by its own type")
FOLDERS: dict[str, Callable[[Path, Path], None]] = {
    **{f"config.json, {label}": _with_config(words) for label, words in CONFIGS.items()},
    **{f"config.json that fits, {label}": _with_config(CONFIGS[label], RESNET) for label in FITTING},
    "index: an absolute name": _index(
        "model.safetensors.index.json", lambda out: str(out / "model.safetensors")
    ),
    "index: a name that climbs": _index(
        "model.safetensors.index.json", lambda out: "../../../outside/model.safetensors"
    ),
    "index: a name that descends first": _index(
        "model.safetensors.index.json", lambda out: "x/../../../../outside/model.safetensors"
    ),
    "index: a URL": _index("model.safetensors.index.json", lambda out: SERVER + "model.safetensors"),
    "index: a URL of a file": _index(
        "model.safetensors.index.json", lambda out: f"file://{out}/model.safetensors"
    ),
    "index: of pickles": _index("pytorch_model.bin.index.json", lambda out: str(out / "secret.pt")),
    "index: of pickles, climbing": _index(
        "pytorch_model.bin.index.json", lambda out: "../../../outside/secret.pt"
    ),
    "distributed: a name that climbs": _distributed,
}


# --- manifests and data -------------------------------------------------------------------------------------


def _record(outside: Path, **more: object) -> dict[str, object]:
    report: dict[str, Any] = {"output": {"path": str(outside / "model.safetensors"), "sha256": "0" * 64}}
    return {
        "checkpoint": "a.pt",
        "status": "done",
        "output": str(outside / "model.safetensors"),
        "report": report,
    } | more


MANIFESTS: dict[str, Callable[[Path], list[Mapping[str, object]]]] = {
    "an output elsewhere": lambda out: [_record(out)],
    "a checkpoint elsewhere": lambda out: [_record(out, checkpoint=str(out / "secret.pt"))],
    "names that climb": lambda out: [
        _record(out, checkpoint="../../outside/secret.pt", output="../../outside/model.safetensors")
    ],
    "a URL": lambda out: [_record(out, checkpoint=SERVER, output=SERVER)],
}


def _tar(path: Path, members: Mapping[str, str | bytes]) -> None:
    """Members that are files, or links where the content is a text."""
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            if isinstance(content, str):
                info.type, info.linkname = tarfile.SYMTYPE, content
                archive.addfile(info)
            else:
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))


def _shards(folder: Path, outside: Path) -> str:
    secret = str(outside / "images.npy")
    _tar(
        folder / "train-000.tar",
        {"a.jpg": secret, "../../../outside/images.npy": b"x", secret: b"x", "b.npy": secret, "b.cls": b"1"},
    )
    return "train-000.tar"


def _shard_list(folder: Path, outside: Path) -> str:
    (folder / "index.json").write_text(
        json.dumps({"shards": [{"url": str(outside / "secret.pt"), "nsamples": 4}]})
    )
    (folder / "info.json").write_text(json.dumps({"shardlist": [{"url": "../../outside/secret.pt"}]}))
    return "."


def _linked_images(folder: Path, outside: Path) -> str:
    (folder / "class").mkdir()
    (folder / "class" / "..\\..\\evil.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    return "."


DATA: dict[str, Callable[[Path, Path], str]] = {
    "shards with links and names that climb": _shards,
    "lists of shards elsewhere": _shard_list,
    "images with names that climb": _linked_images,
}
