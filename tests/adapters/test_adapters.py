from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from ckpt_adapters.from_factory import FactoryAdapter
from ckpt_adapters.from_timm import TimmAdapter
from ckpt_adapters.from_torchvision import TorchvisionAdapter
from ckpt_tools.contract import InputSpec
from ckpt_tools.errors import ArchitectureError
from ckpt_tools.testing import Case, parametrize_checks


class SmallNet(nn.Module):
    def __init__(
        self, num_classes: int = 10, in_chans: int = 3, width: int = 4, drop_rate: float = 0.0
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_chans, width, 3)
        self.norm = nn.BatchNorm2d(width)
        self.drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(width, num_classes)
        self.input_spec = InputSpec((in_chans, 8, 8), origin="SmallNet")

    def forward(self, x):
        return self.head(self.drop(self.norm(self.conv(x))).mean((2, 3)))


def hands_on(**kwargs):
    return SmallNet(**kwargs)


def needs_values(drop_rate=0.0, num_classes=5):
    net = SmallNet(num_classes=num_classes, drop_rate=drop_rate)
    assert torch.arange(3).tolist() == [0, 1, 2]  # fails on the meta device
    return net


def dict_spec():
    net = SmallNet()
    net.input_spec = {"shape": (3, 8, 8), "mean": (0.5, 0.5, 0.5), "std": (0.2, 0.2, 0.2)}
    return net


def cfg_spec():
    net = SmallNet()
    net.input_spec = None
    net.default_cfg = {"input_size": (3, 9, 9), "mean": [0.5] * 3, "std": [0.1] * 3, "crop_pct": 0.9}
    return net


def returns_nothing():
    return None


def raises():
    raise LookupError("no config at home")


number = 3

CASES = [
    Case(TimmAdapter, "resnet18", resized={"num_classes": 3, "in_chans": 1}),
    Case(TimmAdapter, "mobilenetv3_small_050", {"drop_rate": 0.1}, resized={"num_classes": 0}),
    Case(TimmAdapter, "densenet121", {"growth_rate": 8, "block_config": (2, 2)}),
    Case(TorchvisionAdapter, "mobilenet_v3_small"),
    Case(TorchvisionAdapter, "densenet121", {"memory_efficient": False}),
    Case(TorchvisionAdapter, "lraspp_mobilenet_v3_large"),
    Case(TorchvisionAdapter, "googlenet", {"aux_logits": False}),
    Case(FactoryAdapter, "test_adapters:SmallNet", {"width": 6}, resized={"num_classes": 3, "in_chans": 1}),
    Case(FactoryAdapter, "test_adapters:hands_on"),
]


@parametrize_checks(*CASES)
def test_conformance(check, case):
    check(case)


def shapes(model):
    return {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}


def meta(adapter, name, **kwargs):
    with torch.device("meta"):
        return adapter.build(name, kwargs)


TRAIN_PY = {  # what timm's train.py records, as far as it is about the model
    "model": "resnet18", "num_classes": 5, "gp": None, "img_size": None, "in_chans": None, "input_size": None,
    "crop_pct": None, "mean": None, "std": None, "interpolation": "", "drop": 0.0, "drop_connect": None,
    "drop_path": None, "drop_block": None, "bn_momentum": None, "bn_eps": None, "split_bn": False,
    "aug_splits": 0, "model_kwargs": {},
}  # fmt: skip


def train_py(**changes):
    args = {**TRAIN_PY, **changes}
    return {"arch": args["model"], "args": args, "epoch": 7, "version": 2, "metric": 70.1}


def test_timm_train_py_records_rates_even_when_they_are_zero():
    recipe = TimmAdapter().recognise(train_py())
    assert recipe.rates == "recorded"
    assert recipe.kwargs == {"drop_rate": 0.0, "num_classes": 5}


def test_timm_train_py_arguments_become_what_train_py_passes_on():
    words = train_py(
        drop=0.1, drop_connect=0.2, drop_block=0.3, input_size=[1, 96, 96], model_kwargs={"stem_width": 16}
    )
    kwargs = TimmAdapter().recognise(words).kwargs
    assert kwargs.items() >= {
        "drop_rate": 0.1, "drop_path_rate": 0.2, "drop_block_rate": 0.3, "in_chans": 1, "stem_width": 16,
    }.items()  # fmt: skip
    assert meta(TimmAdapter(), "resnet18", **kwargs).conv1.in_channels == 1


def test_timm_img_size_goes_to_models_of_fixed_size_only():
    adapter = TimmAdapter()
    assert adapter.recognise(train_py(model="vit_tiny_patch16_224", img_size=64)).kwargs["img_size"] == 64
    assert "img_size" not in adapter.recognise(train_py(img_size=64)).kwargs
    model = meta(adapter, "vit_tiny_patch16_224", img_size=64)
    assert adapter.input_spec(model, "vit_tiny_patch16_224", {}).shape == (3, 64, 64)


def test_timm_split_batch_norm_is_rebuilt():
    recipe = TimmAdapter().recognise(train_py(split_bn=True, aug_splits=3))
    model = meta(TimmAdapter(), "resnet18", **recipe.kwargs)
    assert len(model.bn1.aux_bn) == 2


@pytest.mark.parametrize(
    ("args", "rates", "kwargs"),
    [
        ({}, "unknown", {}),
        ({"drop_rate": 0.2}, "recorded", {"drop_rate": 0.2}),
        ({"drop_rate": "?"}, "unknown", {}),
    ],
)
def test_a_plain_script_records_rates_under_the_constructors_names(args, rates, kwargs):
    recipe = TorchvisionAdapter().recognise({"arch": "densenet121", "args": args})
    assert (recipe.rates, recipe.kwargs) == (rates, kwargs)


def test_words_that_ask_for_weights_do_not_get_any():
    words = {"arch": "resnet18", "model_kwargs": {"pretrained": True, "weights": "DEFAULT"}}
    for adapter in (TimmAdapter(), TorchvisionAdapter()):
        assert adapter.recognise(words).kwargs == {}
        for keyword in ("pretrained", "weights"):
            with pytest.raises(ArchitectureError, match=keyword):
                adapter.build("resnet18", {keyword: True})


def test_timm_leaves_the_words_of_torchvision_scripts_alone():
    reference = {"args": {"model": "resnet18", "val_crop_size": 224, "val_resize_size": 256}}
    for words in (reference, {"arch": "resnet18", "best_acc1": 70.0}):
        assert TimmAdapter().recognise(words) is None
        assert TorchvisionAdapter().recognise(words).name == "resnet18"


def test_timm_preprocessing_is_the_checkpoints_before_the_librarys():
    adapter = TimmAdapter()
    model = meta(adapter, "resnet18")
    own = timm.data.resolve_data_config(model=model)
    assert adapter.input_spec(model, "resnet18", train_py()).crop_pct == own["crop_pct"]
    words = train_py(input_size=[3, 96, 96], crop_pct=0.5, mean=[0.1, 0.2, 0.3], interpolation="bilinear")
    spec = adapter.input_spec(model, "resnet18", words)
    assert (spec.shape, spec.crop_pct, spec.mean, spec.interpolation) == (
        (3, 96, 96),
        0.5,
        (0.1, 0.2, 0.3),
        "bilinear",
    )
    assert "args" in spec.origin
    assert adapter.input_spec(model, "resnet18", train_py(input_size=96)).shape == (3, 96, 96)  # DeiT


@pytest.mark.parametrize(
    "args", [{"mean": "imagenet"}, {"mean": 0.5}, {"input_size": [32, 32]}, {"std": [1, 2]}]
)
def test_arguments_of_another_meaning_are_not_timms_preprocessing(args):
    model = meta(TimmAdapter(), "resnet18")
    own = TimmAdapter().input_spec(model, "resnet18", {})
    assert TimmAdapter().input_spec(model, "resnet18", {"args": args}) == own


def test_an_unknown_tag_in_the_words_is_an_error_only_when_it_is_built():
    recipe = TimmAdapter().recognise(train_py(model="resnet18.no_such_tag", input_size=[]))
    assert recipe.name == "resnet18.no_such_tag"


def test_timm_input_has_the_models_channels():
    adapter = TimmAdapter()
    spec = adapter.input_spec(meta(adapter, "resnet18", in_chans=2), "resnet18", {})
    assert spec.shape[0] == len(spec.mean) == len(spec.std) == 2


def test_timm_names_that_mean_a_download_are_refused():
    for name in ("hf-hub:timm/resnet18.a1_in1k", "local-dir:/tmp", "timm/resnet18"):
        with pytest.raises(ArchitectureError, match="expected one of timm's model names"):
            TimmAdapter().build(name, {})


def test_timm_words_may_name_a_model_as_on_the_hub():
    recipe = TimmAdapter().recognise(train_py(model="hf-hub:timm/resnet18.a1_in1k"))
    assert recipe.name == "resnet18.a1_in1k"
    assert TimmAdapter().recognise(train_py(model="hf-hub:me/my_own")) is None


def test_timm_tags_and_old_names_build():
    adapter = TimmAdapter()
    assert meta(adapter, "resnet18.a1_in1k").default_cfg["tag"] == "a1_in1k"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert meta(adapter, "tf_efficientnet_b0_ns").num_classes == 1000
    with pytest.raises(ArchitectureError, match="no_such_tag"):
        adapter.build("resnet18.no_such_tag", {})


def test_hidden_rates_are_found():
    assert "proj_drop_rate" in TimmAdapter().rate_kwargs("densenet121")
    assert {"drop_path_rate", "drop_block_rate"} <= {*TimmAdapter().rate_kwargs("resnet18")}
    assert TorchvisionAdapter().rate_kwargs("densenet121") == ("drop_rate",)
    assert set(TorchvisionAdapter().rate_kwargs("efficientnet_b0")) == {"dropout", "stochastic_depth_prob"}
    assert TorchvisionAdapter().rate_kwargs("resnet18") == ()
    assert TorchvisionAdapter().rate_kwargs("swin_t") == (
        "dropout",
        "attention_dropout",
    )  # the third is fixed


def test_a_fixed_argument_is_explained():
    with pytest.raises(ArchitectureError, match="stochastic_depth_prob is fixed"):
        TorchvisionAdapter().build("swin_t", {"stochastic_depth_prob": 0.1})


@pytest.mark.parametrize(
    "name", ["retinanet_resnet50_fpn", "fasterrcnn_mobilenet_v3_large_fpn", "ssd300_vgg16"]
)
def test_class_count_of_a_detector_is_read_through_its_anchors(name):
    adapter = TorchvisionAdapter()
    model = meta(adapter, name, num_classes=7)
    assert adapter.class_kwargs(shapes(model), name, {}) == {"num_classes": 7}
    assert adapter.input_spec(model, name, {}).mean == ()


@pytest.mark.parametrize(
    ("name", "keyword"),
    [("inception_v3", "aux_logits"), ("fcn_resnet50", "aux_loss"), ("googlenet", "aux_logits")],
)
@pytest.mark.parametrize("auxiliary", [True, False])
def test_auxiliary_heads_follow_the_keys(name, keyword, auxiliary):
    model = meta(TorchvisionAdapter(), name, **{keyword: auxiliary})
    assert TorchvisionAdapter().class_kwargs(shapes(model), name, {})[keyword] is auxiliary


def test_torchvision_preprocessing_is_that_of_the_default_weights_or_the_script():
    adapter = TorchvisionAdapter()
    model = nn.Identity()
    assert adapter.input_spec(model, "resnet50", {}).crop_pct == 224 / 232
    assert adapter.input_spec(model, "resnet50", {"best_acc1": 70.0}).crop_pct == 224 / 256
    args = {"val_crop_size": 64, "val_resize_size": 72, "interpolation": "bicubic", "model": "resnet50"}
    spec = adapter.input_spec(model, "resnet50", {"args": args})
    assert (spec.shape, spec.crop_pct, spec.interpolation) == ((3, 64, 64), 64 / 72, "bicubic")
    assert adapter.input_spec(model, "r3d_18", {}).shape == (3, 16, 112, 112)
    assert adapter.input_spec(model, "raft_small", {}) is None


def test_every_torchvision_name_has_a_readable_preset():
    adapter = TorchvisionAdapter()
    for name in adapter.architectures():
        spec = adapter.input_spec(nn.Identity(), name, {})
        assert spec is None or 0 < spec.crop_pct <= 1


def test_a_factory_that_computes_with_values_is_probed_on_the_cpu():
    adapter, name = FactoryAdapter(), "test_adapters:needs_values"
    assert adapter.rate_kwargs(name) == ("drop_rate",)
    assert adapter.class_kwargs(shapes(needs_values(num_classes=9)), name, {}) == {"num_classes": 9}


def test_a_factory_model_may_carry_its_input():
    adapter = FactoryAdapter()
    assert adapter.input_spec(SmallNet(), "x:y", {}).origin == "SmallNet"
    assert adapter.input_spec(dict_spec(), "x:y", {}).std == (0.2, 0.2, 0.2)
    assert adapter.input_spec(cfg_spec(), "x:y", {}).shape == (3, 9, 9)
    assert adapter.input_spec(nn.Identity(), "x:y", {}) is None


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("no_such_module_here:make", "no module named no_such_module_here"),
        ("test_adapters:SmalNet", "Did you mean SmallNet"),
        ("test_adapters:number", "expected a callable, found int"),
        ("test_adapters:returns_nothing", "it returned NoneType"),
        ("test_adapters:raises", "LookupError: no config at home"),
        ("test_adapters:", "found no name after a colon"),
        ("leaves:make", "SystemExit: 2"),
        ("breaks:make", "ZeroDivisionError"),
        ("imports:make", "no_such_dependency"),
    ],
)
def test_what_a_factory_can_do_wrong(name, said, tmp_path, monkeypatch):
    for module, source in {
        "leaves": "raise SystemExit(2)",
        "breaks": "1 / 0",
        "imports": "import no_such_dependency",
    }.items():
        Path(tmp_path, f"{module}.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ArchitectureError, match=said):
        FactoryAdapter().build(name, {})


def test_the_current_directory_is_importable_also_while_the_factory_runs(tmp_path, monkeypatch):
    Path(tmp_path, "lone_sibling.py").write_text("from torch.nn import Identity\n")
    Path(tmp_path, "lone_model.py").write_text(
        "def make():\n    from lone_sibling import Identity\n    return Identity()\n"
    )
    monkeypatch.chdir(tmp_path)
    assert isinstance(FactoryAdapter().build("lone_model:make", {}), nn.Identity)


def test_timms_own_folders_tell_name_input_and_preprocessing(tmp_path):
    from timm.models import save_for_hf

    model = timm.create_model("test_resnet", num_classes=5, in_chans=1)
    data = {
        "input_size": [1, 96, 96],
        "mean": [0.3],
        "std": [0.2],
        "crop_pct": 0.9,
        "interpolation": "bilinear",
    }
    save_for_hf(model, str(tmp_path), model_config={"pretrained_cfg": data}, safe_serialization=True)
    words = {"config": json.loads((tmp_path / "config.json").read_text())}
    adapter, stored = TimmAdapter(), words["config"]["pretrained_cfg"]
    recipe = adapter.recognise(words)
    assert (recipe.architecture, recipe.rates) == ("timm:test_resnet", "unknown")
    built = meta(adapter, recipe.name, **{**recipe.kwargs, "num_classes": 5, "in_chans": 1})
    assert shapes(built) == shapes(model)
    spec = adapter.input_spec(built, recipe.name, words)
    assert spec.origin.endswith("from config.json")
    assert list(spec.shape) == stored["input_size"]
    assert (list(spec.mean), list(spec.std), spec.crop_pct) == (
        stored["mean"],
        stored["std"],
        stored["crop_pct"],
    )
    assert TorchvisionAdapter().recognise(words) is None


@pytest.mark.parametrize("cfg", [{"mean": "grey"}, {"input_size": [3, 4]}, {"std": 3}, {"img_size": "?"}, []])
def test_a_timm_config_of_nonsense_is_not_followed(cfg):
    adapter = TimmAdapter()
    model = meta(adapter, "test_resnet")
    own = adapter.input_spec(model, "test_resnet", {})
    words = {"config": {"architecture": "test_resnet", "pretrained_cfg": cfg}}
    assert adapter.input_spec(model, "test_resnet", words) == own


def test_model_args_of_a_config_are_constructor_arguments():
    config = {
        "architecture": "resnet18",
        "pretrained_cfg": {},
        "model_args": {"drop_rate": 0.2, "pretrained": True},
    }
    recipe = TimmAdapter().recognise({"config": config})
    assert (recipe.kwargs, recipe.rates) == ({"drop_rate": 0.2}, "recorded")
    wrapped = {
        "architecture": "resnet18",
        "model_type": "timm_wrapper",
        "model_args": None,
        "transformers_version": "5",
    }
    assert TimmAdapter().recognise({"config": wrapped}).architecture == "timm:resnet18"
