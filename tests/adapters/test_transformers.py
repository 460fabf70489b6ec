"""The adapter for transformers: its own folders, configs and image processors; no code, no downloads."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from ckpt_adapters.from_transformers import TransformersAdapter
from ckpt_tools import reestimate_bn, walk
from ckpt_tools.cli import main
from ckpt_tools.contract import InputSpec, LoadedModel
from ckpt_tools.data.images.transforms import ImageTransform, PixelScale
from ckpt_tools.errors import ArchitectureError
from ckpt_tools.identify import plugins
from ckpt_tools.identify.loading import identify_model
from ckpt_tools.storage.reading import read_checkpoint
from ckpt_tools.testing import Case, parametrize_checks

transformers = pytest.importorskip("transformers")

RESNET = {"depths": [1, 1], "hidden_sizes": [8, 16], "embedding_size": 8}
NARROW = {"hidden_sizes": [16, 24, 32], "image_size": 64}
HEADS = {"num_attention_heads": [1, 1, 1, 2], "depths": [1, 1, 1, 1]}
NETS = {
    "ResNetForImageClassification": RESNET,
    "ResNetModel": RESNET,
    "RegNetForImageClassification": {**RESNET, "groups_width": 8},
    "MobileNetV2ForImageClassification": {"depth_multiplier": 0.35, "image_size": 64},
    "EfficientNetForImageClassification": {
        "width_coefficient": 0.25,
        "depth_coefficient": 0.3,
        "hidden_dim": 320,
    },
    "LevitForImageClassification": {**NARROW, "num_attention_heads": [1, 2, 2], "depths": [1, 1, 1]},
    "CvtForImageClassification": {"embed_dim": [8, 12, 16], "num_heads": [1, 1, 2], "depth": [1, 2, 3]},
    "MobileViTForImageClassification": {**NARROW, "neck_hidden_sizes": [8, 8, 16, 16, 24, 24, 32]},
    "SwiftFormerForImageClassification": {
        "image_size": 64,
        "embed_dims": [8, 16, 24, 32],
        "depths": [1, 1, 1, 1],
    },
    "SegformerForSemanticSegmentation": {**HEADS, "hidden_sizes": [8, 16, 16, 32], "decoder_hidden_size": 16},
    "ConvNextForImageClassification": {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2},
}
CASES = [
    Case(
        TransformersAdapter,
        name,
        kwargs,
        resized={"num_channels": 1} if name == "ResNetModel" else {"num_labels": 3},
    )
    for name, kwargs in NETS.items()
    if name.startswith(("ResNet", "Cvt"))
]


@parametrize_checks(*CASES)
def test_conformance(check, case):
    check(case)


def built(name: str, **changes: object) -> nn.Module:
    cls = getattr(transformers, name)
    return cls(cls.config_class(**{**NETS[name], **changes})).eval()


def read_folder(folder: Path) -> dict[str, object]:
    """What the files beside the weights say."""
    beside = {"config": "config.json", "preprocessor": "preprocessor_config.json"}
    return {
        word: json.loads((folder / name).read_text())
        for word, name in beside.items()
        if (folder / name).exists()
    }


def loaded(folder: Path, **changes: object) -> LoadedModel:
    checkpoint = read_checkpoint(folder)
    return identify_model(replace(checkpoint, words={**read_folder(folder), **changes}))


# Segmentation and detection models are left out:
# the library saves their tensors under older names than it uses.
@pytest.mark.parametrize("name", [name for name in NETS if "Segmentation" not in name])
def test_a_saved_folder_comes_back_as_the_same_model(tmp_path: Path, name: str) -> None:
    model = built(name, **({} if name == "ResNetModel" else {"num_labels": 5}))
    model.save_pretrained(tmp_path)
    found = loaded(tmp_path)
    assert found.recipe.architecture == f"transformers:{name}"
    assert type(found.model) is type(model)
    expected = model.state_dict()
    assert found.model.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in found.model.state_dict().items())
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(found.model(x)[0], model(x)[0])


def test_rates_in_a_config_are_recorded(tmp_path: Path) -> None:
    for rate in (0.0, 0.2):
        built("SwiftFormerForImageClassification", drop_path_rate=rate).save_pretrained(tmp_path)
        found = loaded(tmp_path)
        assert (found.rates, found.recipe.kwargs["drop_path_rate"]) == ("recorded", rate)
        seen = walk(found.model, torch.zeros(2, 3, 64, 64), probe=found.probe)
        assert any(layer.downstream_of for layer in seen.batch_norms) == (rate > 0)
        assert any(layer.potentially_downstream_of for layer in seen.batch_norms)
    built("ResNetModel").save_pretrained(tmp_path / "resnet")
    assert loaded(tmp_path / "resnet").rates == "unknown"  # the library's ResNet has no dropout


def test_a_rate_for_all_stages_may_be_one_number() -> None:
    adapter, name = TransformersAdapter(), "CvtForImageClassification"
    assert {"drop_rate", "drop_path_rate", "attention_drop_rate"} <= {*adapter.rate_kwargs(name)}
    model = adapter.build(name, {**NETS[name], "drop_rate": 0.3})
    assert model.config.drop_rate == [0.3, 0.3, 0.3]


def test_the_pass_runs_on_model_outputs(tmp_path: Path) -> None:
    built("ResNetForImageClassification").save_pretrained(tmp_path)
    found = loaded(tmp_path)
    data = [torch.randn(8, 3, 32, 32) * 2 for _ in range(2)]
    before = {key: value.clone() for key, value in found.model.state_dict().items()}
    result = reestimate_bn(found.model, data, rates=found.rates, layers="all", force=True)
    assert len(result.rewritten) == 8
    first = found.model.resnet.embedder.embedder
    with torch.no_grad():
        truth = first.convolution(torch.cat(data)).var((0, 2, 3))
    torch.testing.assert_close(first.normalization.running_var, truth)
    changed = {key for key, value in found.model.state_dict().items() if not torch.equal(value, before[key])}
    assert {key.rpartition(".")[2] for key in changed} == {"running_var"}


def test_the_command_line_needs_nothing_but_the_folder(tmp_path: Path) -> None:
    model = built("MobileViTForImageClassification", num_labels=5)
    model.save_pretrained(tmp_path / "net")
    transformers.MobileViTImageProcessor(crop_size={"height": 64, "width": 64}).save_pretrained(
        tmp_path / "net"
    )
    data = torch.randn(12, 3, 64, 64)
    np.save(tmp_path / "data.npy", data.numpy())
    base = [
        str(tmp_path / "net"),
        "--data",
        str(tmp_path / "data.npy"),
        "-q",
        "--force",
        "--estimator",
        "pooled",
        "--batch-size",
        "6",
        "--json",
    ]
    result = CliRunner().invoke(main, ["bn-reestimate", *base])
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert (told["architecture"], told["rates"]["source"]) == (
        "transformers:MobileViTForImageClassification",
        "recorded",
    )
    expected = reestimate_bn(model, data.split(6), estimator="pooled", rates="recorded", force=True)
    written = load_file(tmp_path / "net.bn.safetensors")
    assert {layer["name"] for layer in told["layers"] if layer["rewritten"]} == {
        x.name for x in expected.rewritten
    }
    assert expected.rewritten
    assert all(torch.allclose(tensor, written[key], rtol=1e-4) for key, tensor in model.state_dict().items())


def test_the_class_may_be_missing_from_the_config(tmp_path: Path) -> None:
    built("ResNetModel").save_pretrained(tmp_path)
    config = read_folder(tmp_path)["config"]
    assert isinstance(config, dict)
    del config["architectures"]
    assert loaded(tmp_path, config=config).recipe.name == "ResNetModel"


STRANGE = [
    {"architectures": ["PretrainedConfig"]},
    {"architectures": ["__class__"]},
    {"architectures": ["os.system"]},
    {"architectures": ["models"]},
    {"architectures": ["AutoModel"]},
    {"architectures": ["MyNet"], "auto_map": {"AutoModel": "modeling_canary.MyNet"}},
    {"architectures": ["someone/repo--modeling.MyNet"]},
    {"hidden_sizes": "wide"},
    {"layer_type": "no such type"},
    {"embedding_size": -3},
    {"num_channels": None},
]


@pytest.mark.parametrize("changes", STRANGE, ids=str)
def test_what_a_config_cannot_make_us_do(tmp_path: Path, changes: Mapping[str, object]) -> None:
    built("ResNetForImageClassification").save_pretrained(tmp_path)
    (tmp_path / "modeling_canary.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w')")
    config = {**dict(read_folder(tmp_path)["config"]), **changes}
    recipe = TransformersAdapter().recognise({"config": config})
    assert recipe is not None
    with pytest.raises(ArchitectureError):
        TransformersAdapter().build(recipe.name, recipe.kwargs)
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize(
    "config", ["resnet", 3, {"model_type": 3, "architectures": ["ResNetModel"]}, {"model_type": "x"}]
)
def test_other_configs_are_not_ours(config: object) -> None:
    assert TransformersAdapter().recognise({"config": config}) is None


def test_nothing_is_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise AssertionError("a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    kwargs = {"use_pretrained_backbone": True, "use_timm_backbone": True, "backbone": "resnet18"}
    adapter = TransformersAdapter()
    known = {key: value for key, value in kwargs.items() if key in _fields("DetrForObjectDetection")}
    small = {"encoder_layers": 1, "decoder_layers": 1, "d_model": 32, "num_queries": 5}
    model = adapter.build("DetrForObjectDetection", {**known, **small})
    assert adapter.input_spec(model, "DetrForObjectDetection", {}).shape[0] == 3


def _fields(name: str) -> dict[str, object]:
    return getattr(transformers, name).config_class().to_dict()


def test_unknown_names_are_suggested() -> None:
    with pytest.raises(ArchitectureError, match="Did you mean ResNetForImageClassification"):
        TransformersAdapter().build("ResnetForImageClassification", {})


def photo() -> Image.Image:
    """Smooth, so that two ways of resizing it agree, and lopsided, so that two ways of cropping it do not."""
    y, x = np.mgrid[:300, :400]
    waves = np.stack([np.sin(x / 40) + y / 300, np.cos(y / 50), np.sin((x + y) / 60)], -1)
    return Image.fromarray(((waves + 2) / 4 * 255).astype(np.uint8))


def ours(spec: InputSpec) -> torch.Tensor:
    return PixelScale(spec)(ImageTransform(spec)(photo())[None])[0]


SQUARE = {"height": 96, "width": 96}
PROCESSORS = [
    ("ConvNextImageProcessor", {}),
    ("ConvNextImageProcessor", {"size": {"shortest_edge": 128}, "crop_pct": 0.8}),
    ("ViTImageProcessor", {"size": SQUARE}),
    ("ViTImageProcessor", {"size": SQUARE, "do_normalize": False}),
    (
        "ViTImageProcessor",
        {"size": SQUARE, "do_rescale": False, "image_mean": [120.0] * 3, "image_std": [60.0] * 3},
    ),
    ("ViTImageProcessor", {"size": SQUARE, "do_rescale": False, "do_normalize": False}),
    ("ViTImageProcessor", {"size": SQUARE, "rescale_factor": 1 / 127.5}),
    ("LevitImageProcessor", {}),
    ("MobileNetV2ImageProcessor", {"resample": 3}),
    ("BitImageProcessor", {}),
    ("PoolFormerImageProcessor", {}),
    ("EfficientNetImageProcessor", {}),
    (
        "EfficientNetImageProcessor",
        {"rescale_offset": True, "rescale_factor": 1 / 127.5, "include_top": False},
    ),
]


@pytest.mark.parametrize(("kind", "settings"), PROCESSORS, ids=str)
def test_images_become_what_the_librarys_processor_makes(tmp_path: Path, kind: str, settings: dict) -> None:
    processor = getattr(transformers, kind)(**settings)
    processor.save_pretrained(tmp_path)
    spec = TransformersAdapter().input_spec(built("ResNetModel"), "ResNetModel", read_folder(tmp_path))
    assert spec.origin == "preprocessor_config.json"
    theirs = processor(photo(), return_tensors="pt")["pixel_values"][0].float()
    assert spec.shape == tuple(theirs.shape)
    unit = theirs.std()
    assert (ours(spec) - theirs).abs().mean() < 0.01 * unit
    assert (ours(spec) - theirs).abs().max() < 0.1 * unit


@pytest.mark.parametrize(
    ("settings", "shape"),
    [
        (
            {"feature_extractor_type": "ConvNextFeatureExtractor", "size": 224, "crop_pct": 0.875},
            (3, 224, 224),
        ),
        ({"image_processor_type": "ViTImageProcessorFast", "size": 96}, (3, 96, 96)),
        (
            {
                "image_processor_type": "NoSuchProcessor",
                "size": 96,
                "image_mean": [0.5] * 3,
                "image_std": [1] * 3,
            },
            (3, 96, 96),
        ),
        ({"image_processor_type": "ViTImageProcessor", "size": [96, 128]}, (3, 96, 128)),
    ],
)
def test_older_and_newer_settings(settings: dict, shape: tuple[int, ...]) -> None:
    spec = TransformersAdapter().input_spec(built("ResNetModel"), "ResNetModel", {"preprocessor": settings})
    assert (spec.shape, spec.origin) == (shape, "preprocessor_config.json")


@pytest.mark.parametrize(
    "settings",
    [{"resample": 99}, {"image_mean": "grey"}, {"rescale_factor": 0}, {"size": 128, "crop_pct": "x"}],
)
def test_settings_of_another_meaning_leave_the_librarys(settings: dict) -> None:
    model = built("ResNetModel")
    own = TransformersAdapter().input_spec(model, "ResNetModel", {})
    assert TransformersAdapter().input_spec(model, "ResNetModel", {"preprocessor": settings}) == own


def test_the_models_own_size_goes_before_a_general_default() -> None:
    spec = TransformersAdapter().input_spec(built("LevitForImageClassification"), "", {})
    assert (spec.shape, spec.crop_pct) == ((3, 64, 64), 0.875)
    grey = built("ResNetModel", num_channels=1)
    spec = TransformersAdapter().input_spec(grey, "", {})
    assert spec.shape[0] == len(spec.mean) == 1


def test_wrapped_timm_models_are_timms(tmp_path: Path) -> None:
    config = transformers.TimmWrapperConfig(architecture="test_resnet", num_labels=4, label_names=["a"] * 4)
    model = transformers.TimmWrapperForImageClassification(config).eval()
    model.save_pretrained(tmp_path)
    found = loaded(tmp_path)
    assert found.recipe.architecture == "timm:test_resnet"
    assert found.checkpoint.prefix == "timm_model."
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(found.model(x), model(x).logits)


def test_the_library_is_imported_only_when_it_is_asked_for() -> None:
    script = (
        "import sys; from ckpt_tools.identify import plugins; found = plugins.adapters()\n"
        "assert not found['transformers'].architectures()\n"
        "assert not any(one.recognise({'arch': 'no_such_net'}) for one in found.values())\n"
        "assert 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    built("ResNetModel").save_pretrained(tmp_path)
    monkeypatch.setitem(sys.modules, "transformers", None)
    adapter = plugins.adapter("transformers")
    words = read_folder(tmp_path)
    recipe = adapter.recognise(words)
    assert recipe.name == "ResNetModel"
    monkeypatch.setattr("ckpt_adapters.from_transformers._model_class", _uncached())
    with pytest.raises(ArchitectureError, match=r"ckpt-tools\[transformers\]"):
        adapter.build(recipe.name, recipe.kwargs)


def _uncached():
    from ckpt_adapters.from_transformers import _model_class

    return _model_class.__wrapped__
