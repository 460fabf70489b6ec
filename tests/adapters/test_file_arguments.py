"""What a checkpoint records of constructor arguments cannot name anything, nor cost more than its tensors."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ckpt_adapters.from_timm import TimmAdapter
from ckpt_adapters.from_torchvision import TorchvisionAdapter
from ckpt_tools.contract import Checkpoint, Recipe
from ckpt_tools.errors import ArchitectureError
from ckpt_tools.identify.admission import ArgumentRefused, admit_recipe
from ckpt_tools.identify.loading import identify_model, load

transformers = pytest.importorskip("transformers")

from ckpt_adapters.from_transformers import TransformersAdapter  # noqa: E402

ADAPTERS = {
    "timm": (TimmAdapter(), "resnet18"),
    "torchvision": (TorchvisionAdapter(), "resnet18"),
    "transformers": (TransformersAdapter(), "UperNetForSemanticSegmentation"),
}
WIDE = 40  # the largest dimension of the tensors below
TENSORS = {f"{number}.weight": torch.zeros(WIDE, 3) for number in range(12)}
# Names that lead somewhere: files, folders, repositories, addresses, classes.
LEADING = [
    "/etc/passwd", "../model.pt", "./resnet50", "model.pth", "C:\\model.pt", "\\\\host\\share",
    "hf-hub:someone/net", "hf_hub:timm/resnet18", "local-dir:/tmp/net", "someone/net",
    "https://example.org/net.pth", "file:///tmp/net.pth",
    "os.system", "package.module:Class", "torch.nn.modules.linear.Linear", "__import__('os')",
    "someone/repo--net.Net",
]  # fmt: skip


def checkpoint(words: Mapping[str, object], tensors: Mapping[str, torch.Tensor] = TENSORS) -> Checkpoint:
    return Checkpoint(Path("stranger.pt"), "torch", dict(tensors), words=dict(words))


def hub_words(settings: Mapping[str, object]) -> dict[str, object]:
    config = {"model_type": "upernet", "architectures": ["UperNetForSemanticSegmentation"], **settings}
    return {"config": {"transformers_version": "5", **config}}


def words_for(library: str, arguments: Mapping[str, object]) -> dict[str, object]:
    """A file that records these constructor arguments in the way that the library's users do."""
    if library == "transformers":
        return hub_words(arguments)
    return {"arch": "resnet18", "model_kwargs": dict(arguments)}


def admitted(library: str, arguments: Mapping[str, object]) -> dict[str, object] | None:
    """The arguments that would reach the constructor; None where the file is refused."""
    adapter, _ = ADAPTERS[library]
    words = words_for(library, arguments)
    recipe = adapter.recognise(words)
    assert recipe is not None
    try:
        return dict(admit_recipe(checkpoint(words), adapter, recipe, {}).kwargs)
    except ArchitectureError as error:
        refusal = str(error)
    assert refusal.startswith("stranger.pt: ")
    assert len(refusal) < 1500
    return None


def leaves(value: object) -> Iterator[Any]:
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield name
            yield from leaves(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from leaves(item)
    else:
        yield value


def all_names(library: str) -> list[str]:
    adapter, name = ADAPTERS[library]
    others = [
        "checkpoint_path",
        "pretrained",
        "pretrained_cfg",
        "pretrained_cfg_overlay",
        "cache_dir",
        "weights",
    ]
    others += [
        "_name_or_path",
        "auto_map",
        "_target_",
        "backbone",
        "trust_remote_code",
        "attn_implementation",
        "class",
    ]
    return sorted({*adapter.file_arguments(name), *others})


@pytest.mark.parametrize("library", ADAPTERS)
@pytest.mark.parametrize("name", LEADING)
def test_no_argument_of_a_constructor_can_be_a_name_that_leads_somewhere(library: str, name: str) -> None:
    for argument in all_names(library):
        for value in (name, [name], {argument: name}, {"model_type": "resnet", argument: name}, (3, name)):
            arguments = admitted(library, {argument: value})
            assert arguments is None or name not in set(leaves(arguments)), argument


@settings(max_examples=150)
@given(data=st.data(), library=st.sampled_from(sorted(ADAPTERS)))
def test_whatever_a_file_records_only_bounded_numbers_and_listed_words_arrive(
    data: st.DataObject, library: str
) -> None:
    scalars = (
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats()
        | st.text(max_size=12)
        | st.sampled_from(LEADING)
    )
    values = st.recursive(
        scalars,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
        max_leaves=6,
    )
    names = st.sampled_from(all_names(library)) | st.text(max_size=10)
    arguments = admitted(library, data.draw(st.dictionaries(names, values, max_size=3)))
    for leaf in leaves(arguments or {}):
        if isinstance(leaf, str):
            assert leaf.replace("_", "").isalnum() or leaf == "", leaf
            assert leaf not in LEADING
        elif isinstance(leaf, int | float):
            assert abs(leaf) <= 1e6


@pytest.mark.parametrize(
    ("library", "name", "right", "wrong"),
    [
        ("timm", "num_heads", WIDE, WIDE + 1),
        ("timm", "depth", len(TENSORS), len(TENSORS) + 1),
        ("timm", "depths", [6, 6], [6, 7]),
        ("timm", "layers", [2, 2, 2, 2], [2, 2, 2, 10**9]),
        ("timm", "img_size", 8192, 8193),
        ("timm", "drop_rate", 1, 1.5),
        ("timm", "mlp_ratio", 4.0, 1e9),
        ("timm", "norm_eps", 1e-6, float("inf")),
        ("timm", "act_layer", "silu", "package.module:SiLU"),
        ("timm", "qkv_bias", True, "yes"),
        ("torchvision", "width_per_group", WIDE, 10**400),
        ("torchvision", "replace_stride_with_dilation", [False, True, True], [2, 3, 4]),
        ("transformers", "hidden_size", WIDE, WIDE * 1000),
        ("transformers", "auxiliary_num_convs", 1, 10**9),
    ],
)
def test_sizes_are_bounded_by_the_files_own_tensors(
    library: str, name: str, right: object, wrong: object
) -> None:
    assert admitted(library, {name: right}).items() >= {name: right}.items()
    assert admitted(library, {name: wrong}) is None


def test_a_refusal_names_the_file_the_argument_and_the_way_out() -> None:
    model = timm.create_model("test_resnet")
    words = {"arch": "test_resnet", "model_kwargs": {"act_layer": "/tmp/act.py"}}
    with pytest.raises(
        ArgumentRefused, match=r"stranger\.pt: .*act_layer='/tmp/act\.py'.*--model-kwargs act_layer="
    ):
        identify_model(checkpoint(words, model.state_dict()))
    # The user may give any argument, and then it is no matter what the file says of it.
    loaded = identify_model(checkpoint(words, model.state_dict()), None, {"act_layer": "relu"})
    assert loaded.recipe.architecture == "timm:test_resnet"


def test_wishes_for_published_weights_are_passed_over() -> None:
    model = timm.create_model("test_resnet", num_classes=5)
    wishes = {"pretrained": True, "checkpoint_path": "/etc/passwd", "pretrained_cfg": {"file": "/etc/passwd"}}
    loaded = identify_model(checkpoint({"arch": "test_resnet", "model_kwargs": wishes}, model.state_dict()))
    assert (loaded.recipe.kwargs["num_classes"], loaded.recognised_by) == (5, "checkpoint")


def test_classes_that_the_tensors_do_not_justify_are_read_off_the_shapes() -> None:
    model = timm.create_model("test_resnet", num_classes=0)
    args = {"model": "test_resnet", "drop": 0.2, "num_classes": 10**6}
    loaded = identify_model(checkpoint({"args": args}, model.state_dict()))
    assert (loaded.recipe.kwargs["num_classes"], loaded.rates) == (0, "recorded")


def test_without_a_list_of_its_own_an_adapter_takes_rates_alone() -> None:
    class Foreign:
        prefix = "foreign"

        def rate_kwargs(self, name: str) -> tuple[str, ...]:
            return ("dropout",)

    def admit(**arguments: object) -> Recipe:
        return admit_recipe(checkpoint({}), Foreign(), Recipe("foreign", "net", arguments), {})

    assert admit(dropout=0.5, num_classes=10).kwargs == {"dropout": 0.5}
    with pytest.raises(ArchitectureError, match="width=3"):
        admit(width=3)
    with pytest.raises(ArgumentRefused, match="dropout='a'"):
        admit(dropout="a")


def nested(depth: int) -> dict[str, object]:
    inner: dict[str, object] = {
        "model_type": "resnet",
        "hidden_sizes": [8, 8, 8, 8],
        "auto_map": {"AutoBackbone": "a.B"},
    }
    for _ in range(depth):
        inner = {
            "model_type": "upernet",
            "backbone_config": inner,
            "_name_or_path": "/tmp",
            "auto_map": {"AutoModel": "a.B"},
        }
    return inner


@pytest.mark.parametrize("depth", [0, 1, 2, 5])
def test_configurations_are_filtered_at_every_depth(depth: int) -> None:
    arguments = admitted("transformers", {"backbone_config": nested(depth), "auto_map": {"AutoModel": "a.B"}})
    names = set(leaves(arguments))
    assert names & {"auto_map", "_name_or_path", "/tmp", "a.B", "AutoModel"} == set()
    assert "hidden_sizes" in names


def test_configurations_end() -> None:
    assert admitted("transformers", {"backbone_config": nested(40)}) is None


@pytest.mark.parametrize("kind", ["timm_backbone", "timm_wrapper"])
@pytest.mark.parametrize("name", LEADING)
def test_models_of_timm_inside_transformers_are_named_by_timm(kind: str, name: str) -> None:
    key = "backbone" if kind == "timm_backbone" else "architecture"
    known = admitted(
        "transformers", {"backbone_config": {"model_type": kind, key: "resnet18", "model_args": {"a": name}}}
    )
    assert name not in set(leaves(known))
    assert admitted("transformers", {"backbone_config": {"model_type": kind, key: name}}) is None


@pytest.mark.parametrize("name", ["TimmWrapperForImageClassification", "TimmWrapperModel", "TimmBackbone"])
def test_covers_of_timm_are_not_built_by_transformers(name: str) -> None:
    adapter = TransformersAdapter()
    assert adapter.recognise(hub_words({"architectures": [name]})) is None
    with pytest.raises(ArchitectureError, match="timm"):
        adapter.build(name, {})


def test_a_folder_cannot_make_transformers_ask_or_run_its_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The nested `auto_map` would have AutoBackbone run `theirs.py`, after a question at the terminal."""
    config = transformers.UperNetConfig(
        backbone_config=transformers.ResNetConfig(
            embedding_size=8,
            hidden_sizes=[8, 8, 8, 8],
            depths=[1, 1, 1, 1],
            out_features=["stage1", "stage2"],
        ),
        hidden_size=8, pool_scales=[1], use_auxiliary_head=False, num_labels=3,
    )  # fmt: skip
    transformers.UperNetForSemanticSegmentation(config).save_pretrained(tmp_path)
    ran = tmp_path / "ran"
    (tmp_path / "theirs.py").write_text(f"open({str(ran)!r}, 'w')\nclass Net: pass\n")
    stored = json.loads((tmp_path / "config.json").read_text())
    stored["backbone_config"] |= {"auto_map": {"AutoBackbone": "theirs.Net"}, "_name_or_path": str(tmp_path)}
    (tmp_path / "config.json").write_text(json.dumps(stored))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question"))
    loaded = load(tmp_path)
    assert loaded.recipe.architecture == "transformers:UperNetForSemanticSegmentation"
    assert isinstance(loaded.model, nn.Module)
    assert not ran.exists()
