from __future__ import annotations

from importlib.metadata import version
from importlib.resources import files

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ckpt_tools.errors import ArchitectureError
from ckpt_tools.identify import plugins
from ckpt_tools.identify.architecture_index import (
    ArchitectureIndex,
    decode_index,
    encode_index,
    load_shipped_index,
    make_index_entry,
)
from ckpt_tools.identify.shape_digest import ModelPart, split_into_parts, top_attributes
from ckpt_tools.identify.skeleton import (
    CHANNEL_KEYWORDS,
    CLASS_KEYWORDS,
    build_skeleton,
    keys_depending_on,
    state_dict_shapes,
)

SMALL = [
    "timm:resnet10t",
    "timm:mobilenetv3_small_050",
    "timm:test_vit",
    "timm:test_efficientnet",
    "timm:test_convnext",
    "torchvision:shufflenet_v2_x0_5",
    "torchvision:squeezenet1_1",
    "torchvision:mnasnet0_5",
    "torchvision:densenet121",
]

keys = st.text("abc.", min_size=1, max_size=8)
shapes = st.dictionaries(keys, st.lists(st.integers(0, 9), max_size=4).map(tuple), min_size=1, max_size=12)


def built(architecture, **kwargs):
    adapter, name = plugins.resolve(architecture)
    return state_dict_shapes(build_skeleton(adapter, name, kwargs))


@given(shapes, st.randoms())
def test_a_digest_knows_no_order_and_no_counters(some, random):
    shuffled = list(some.items())
    random.shuffle(shuffled)
    assert ModelPart("", dict(shuffled)).full_digest == ModelPart("", some).full_digest
    assert ModelPart("", {**some, "x.num_batches_tracked": ()}).full_digest == ModelPart("", some).full_digest


@given(shapes, st.sets(keys))
def test_a_part_is_what_the_rest_adds_up_to(some, head):
    part = ModelPart("", some)
    assert (
        part.body_digest(head)
        == ModelPart("", {key: s for key, s in some.items() if key not in head}).full_digest
    )
    attributes = top_attributes(head)
    assert (
        part.trunk_digest(attributes)
        == ModelPart(
            "", {k: s for k, s in some.items() if top_attributes([k])[0] not in attributes}
        ).full_digest
    )
    wide = {
        k: s
        for k, s in some.items()
        if top_attributes([k])[0] not in attributes and k not in head and len(s) > 1
    }
    assert part.frame_digest(attributes, head) == ModelPart("", wide).full_digest


@given(shapes)
def test_another_shape_or_key_is_another_digest(some):
    key = next(iter(some))
    assert ModelPart("", {**some, key: (*some[key], 10)}).full_digest != ModelPart("", some).full_digest
    assert (
        ModelPart("", {(k + "x" if k == key else k): s for k, s in some.items()}).full_digest
        != ModelPart("", some).full_digest
    )


@settings(max_examples=30)
@given(st.lists(shapes, min_size=1, max_size=5))
def test_an_index_comes_back_as_it_was(many):
    entries = tuple(
        make_index_entry(f"lib:{i}", one, list(one)[:2], list(one)[2:3]) for i, one in enumerate(many)
    )
    index = ArchitectureIndex({"lib": "1.0"}, entries)
    assert decode_index(encode_index(index)) == index
    assert encode_index(index) == encode_index(decode_index(encode_index(index)))


def test_the_shipped_index_is_small_and_says_what_it_was_made_of():
    assert files("ckpt_tools.identify").joinpath("index.json.gz").stat().st_size < 60_000
    assert load_shipped_index().versions.keys() == {"timm", "torchvision"}
    assert len(load_shipped_index().entries) > 1400
    assert len({entry.architecture for entry in load_shipped_index().entries}) == len(
        load_shipped_index().entries
    )


@pytest.mark.parametrize("architecture", SMALL)
def test_the_shipped_index_says_what_the_libraries_build(architecture):
    library = architecture.partition(":")[0]
    if load_shipped_index().versions[library] != version(library):
        pytest.skip("built with another version; scripts/run build_index makes a new one")
    adapter, name = plugins.resolve(architecture)
    own = built(architecture)
    head, stem = (
        keys_depending_on(adapter, name, {}, words, own) for words in (CLASS_KEYWORDS, CHANNEL_KEYWORDS)
    )
    known = next(entry for entry in load_shipped_index().entries if entry.architecture == architecture)
    assert known == make_index_entry(architecture, own, head, stem)


@pytest.mark.parametrize("architecture", SMALL)
@pytest.mark.parametrize("prefix", ["", "model.", "net.backbone."])
def test_a_model_is_found_in_any_order_under_any_prefix(architecture, prefix):
    own = built(architecture)
    backwards = {prefix + key: own[key] for key in reversed(own)}
    first = next(load_shipped_index().find_matches(backwards))
    assert (first.prefix, first.level) == (prefix, "full")
    assert architecture in first.architectures


@pytest.mark.parametrize("architecture", SMALL)
def test_another_class_count_is_found_without_the_head(architecture):
    first = next(load_shipped_index().find_matches(built(architecture, num_classes=7)))
    assert first.level in ("body", "trunk")
    assert architecture in first.architectures


@pytest.mark.parametrize("architecture", [name for name in SMALL if name.startswith("timm")])
@pytest.mark.parametrize(
    "kwargs", [{"num_classes": 0}, {"in_chans": 1}, {"in_chans": 5, "num_classes": 3}], ids=str
)
def test_headless_and_other_channels_are_found(architecture, kwargs):
    assert any(
        architecture in match.architectures
        for match in load_shipped_index().find_matches(built(architecture, **kwargs))
    )


def test_folded_batch_norm_leaves_the_frame():
    own = built("timm:resnet10t")
    folded = {key: s for key, s in own.items() if len(s) > 1 or key.startswith("fc.")}
    folded |= {key.replace("weight", "bias"): s[:1] for key, s in folded.items() if len(s) == 4}
    first = next(load_shipped_index().find_matches(folded))
    assert (first.level, first.architectures) == ("frame", ("timm:resnet10t",))


@pytest.mark.parametrize("architecture", SMALL)
def test_the_nearest_of_a_changed_model_is_the_model(architecture):
    own = built(architecture)
    some = list(own)[len(own) // 2]
    changed = {(f"{key}.inner" if key == some else key): s for key, s in own.items()}
    near = load_shipped_index().nearest_entries(changed, 3)
    assert architecture in [one.entry.architecture for one in near]
    assert near[0].likeness > 0.7


@pytest.mark.parametrize(
    "some",
    [
        {},
        {"": ()},
        {".": (1,), "..": (2,), "a..b": (0, 0)},
        {"x": (2**62, 2**62)},
        {"\udcff\x00.w": (3,)},
        {"a." * 5000 + "w": (1,)},
        {f"{i}.weight": (i,) for i in range(3000)},
        {f"m.{'m.' * (i % 40)}w{i}": (1,) for i in range(2000)},
    ],
    ids=lambda some: f"{len(some)} keys",
)
def test_odd_shapes_match_nothing_and_break_nothing(some):
    assert list(load_shipped_index().find_matches(some)) == []
    load_shipped_index().nearest_entries(some, 3)


def test_prefixes_are_tried_only_where_much_stands():
    own = {f"{name}.{i}.w": (i,) for name in "abcdefgh" for i in range(4)}
    assert [part.prefix for part in split_into_parts(own)] == [""]


def test_what_follows_the_class_count_needs_no_list_of_heads():
    adapter, name = plugins.resolve("torchvision:inception_v3")
    assert top_attributes(keys_depending_on(adapter, name, {}, CLASS_KEYWORDS)) == ("AuxLogits.", "fc.")
    adapter, name = plugins.resolve("test_index:Headless")
    assert keys_depending_on(adapter, name, {}, CLASS_KEYWORDS) == frozenset()
    adapter, name = plugins.resolve("timm:resnet10t")
    assert keys_depending_on(adapter, name, {"num_classes": 5}, CHANNEL_KEYWORDS) == {"conv1.0.weight"}


class Headless(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(3)


def test_a_skeleton_that_needs_values_is_built_on_the_cpu():
    adapter, name = plugins.resolve("test_index:needs_values")
    assert not build_skeleton(adapter, name, {}).weight.is_meta
    with pytest.raises(ArchitectureError):
        build_skeleton(adapter, name, {"nonsense": 1})


def needs_values():
    assert torch.arange(3).tolist() == [0, 1, 2]
    return nn.Linear(2, 2)
