from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
import torchvision
from torch import nn

from ckpt_tools.contract import Checkpoint
from ckpt_tools.errors import AmbiguousArchitecture, ArchitectureError, NothingToDo
from ckpt_tools.identify import plugins, resolution
from ckpt_tools.identify.architecture_index import ArchitectureIndex, load_shipped_index, make_index_entry
from ckpt_tools.identify.batch_norm_presence import require_batch_norm
from ckpt_tools.identify.candidate import load_candidate
from ckpt_tools.identify.closest_architectures import find_closest_architectures
from ckpt_tools.identify.equivalents import output_on_random_input
from ckpt_tools.identify.file_name_hints import guess_by_file_name
from ckpt_tools.identify.loading import identify_model, load
from ckpt_tools.identify.resolution import find_candidates
from ckpt_tools.identify.skeleton import state_dict_shapes


def meta(architecture, **kwargs):
    adapter, name = plugins.resolve(architecture)
    with torch.device("meta"):
        return adapter.build(name, kwargs)


def checkpoint(model_or_tensors, path="model.pt", prefix="", **words):
    tensors = model_or_tensors.state_dict() if isinstance(model_or_tensors, nn.Module) else model_or_tensors
    return Checkpoint(Path(path), "pickle", {prefix + key: t for key, t in tensors.items()}, words=words)


def trained(model):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape, generator=generator) * 0.1 + 0.01)
    return model.eval()


def same_function(loaded, model, channels=3):
    x = torch.rand(2, channels, 64, 64)
    with torch.no_grad():
        return torch.equal(loaded.model(x), model(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("prefix", ["", "model.", "net.encoder."])
def test_a_bare_state_dict_says_what_it_is(tmp_path, prefix, dtype):
    model = trained(timm.create_model("test_efficientnet", num_classes=7)).to(dtype)
    state = {prefix + key: t for key, t in reversed(model.state_dict().items())}
    torch.save(state | ({"criterion.weight": torch.ones(7)} if prefix else {}), tmp_path / "m.pt")
    loaded = load(tmp_path / "m.pt")
    assert (loaded.recipe.architecture, loaded.recognised_by) == (
        "timm:test_efficientnet",
        "shapes without head",
    )
    assert (loaded.rates, loaded.as_built, loaded.twins) == ("unknown", (), ())
    assert loaded.checkpoint.prefix == prefix
    assert same_function(loaded, model.float())


@pytest.mark.parametrize("architecture", [None, "timm:test_efficientnet"])
def test_a_loss_with_weights_of_its_own_is_no_part_of_the_model(architecture):
    model = trained(timm.create_model("test_efficientnet", num_classes=7))
    loaded = identify_model(
        checkpoint(model.state_dict() | {"criterion.weight": torch.ones(7)}), architecture
    )
    assert (loaded.recipe.architecture, loaded.as_built) == ("timm:test_efficientnet", ("criterion.",))
    assert "criterion.weight" in loaded.checkpoint.tensors
    assert same_function(loaded, model)
    with pytest.raises(ArchitectureError, match=r"attention\.weight"):
        identify_model(checkpoint(model.state_dict() | {"attention.weight": torch.ones(7)}), architecture)


@pytest.mark.parametrize(
    ("architecture", "kwargs"),
    [
        ("timm:resnet10t", {"num_classes": 0}),
        ("timm:resnet10t", {"in_chans": 1, "num_classes": 5}),
        ("timm:test_vit", {}),
        ("torchvision:shufflenet_v2_x0_5", {"num_classes": 3}),
        ("torchvision:squeezenet1_1", {"num_classes": 3}),
        ("torchvision:mnasnet0_5", {}),
    ],
    ids=str,
)
def test_small_models_of_both_libraries_are_told(architecture, kwargs):
    adapter, name = plugins.resolve(architecture)
    model = trained(adapter.build(name, kwargs))
    loaded = identify_model(checkpoint(model))
    assert architecture in (loaded.recipe.architecture, *loaded.twins)
    assert same_function(loaded, model, kwargs.get("in_chans", 3))


def test_files_from_before_the_counters_are_told():
    state = timm.create_model("resnet10t").state_dict()
    old = {key: t for key, t in state.items() if not key.endswith("num_batches_tracked")}
    assert identify_model(checkpoint(old)).recipe.architecture == "timm:resnet10t"


@pytest.mark.parametrize(
    ("architecture", "attribute", "head"),
    [
        ("timm:resnet10t", "fc", nn.Sequential(nn.Dropout(0.5), nn.Linear(512, 3))),
        ("torchvision:mobilenet_v3_small", "classifier", nn.Linear(576, 4)),
        ("torchvision:shufflenet_v2_x0_5", "fc", nn.Identity()),
    ],
    ids=lambda one: one if isinstance(one, str) else "",
)
def test_a_head_of_ones_own_is_left_aside(architecture, attribute, head):
    adapter, name = plugins.resolve(architecture)
    model = adapter.build(name, {})
    setattr(model, attribute, head)
    trained(model)
    loaded = identify_model(checkpoint(model))
    assert (loaded.recipe.architecture, loaded.as_built) == (architecture, (f"{attribute}.",))
    own, theirs = loaded.model.state_dict(), model.state_dict()
    assert all(torch.equal(own[key], t) for key, t in theirs.items() if not key.startswith(attribute))
    assert loaded.checkpoint.tensors.keys() == theirs.keys()
    # The same where the user says which architecture it is.
    assert identify_model(checkpoint(model), architecture).as_built == loaded.as_built


def test_a_head_with_batch_norm_is_not_left_aside():
    model = timm.create_model("resnet10t")
    model.fc = nn.Sequential(nn.Linear(512, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    with pytest.raises(ArchitectureError, match=r"Closest by its tensors:\n  timm:resnet10t"):
        identify_model(checkpoint(model))


def test_auxiliary_heads_may_be_there_or_not():
    without = meta("torchvision:googlenet", aux_logits=False, num_classes=3)
    found = find_candidates(checkpoint(without))
    assert [dict(one.recipe.kwargs) for one in found] == [{"aux_logits": False, "num_classes": 3}]
    with_aux = meta("torchvision:fcn_resnet50", aux_loss=True, num_classes=3)
    (found,) = find_candidates(checkpoint(with_aux))
    assert (found.architecture, found.prefix) == ("torchvision:fcn_resnet50", "")
    assert found.recipe.kwargs["aux_loss"] is True


def test_words_that_lie_are_overruled_by_the_tensors():
    model = timm.create_model("resnet10t", num_classes=4)
    loaded = identify_model(checkpoint(model, arch="resnet18", args={"drop_rate": 0.3}))
    assert (loaded.recipe.architecture, loaded.recognised_by) == ("timm:resnet10t", "shapes without head")
    assert (loaded.rates, loaded.recipe.kwargs["drop_rate"]) == ("recorded", 0.3)
    wrong = {"model": "resnet10t", "model_kwargs": {"stem_width": 64}}
    assert identify_model(checkpoint(model, args=wrong)).recipe.kwargs == {"num_classes": 4, "in_chans": 3}
    true = identify_model(checkpoint(model, arch="resnet10t"))
    assert (true.recipe.architecture, true.recognised_by) == ("timm:resnet10t", "checkpoint")


def test_the_users_arguments_hold_for_what_the_tensors_tell():
    state = timm.create_model("resnet10t").state_dict()
    assert identify_model(checkpoint(state), None, {"drop_rate": 0.2}).rates == "given"
    with pytest.raises(ArchitectureError, match="found 'no_such_thing'"):
        identify_model(checkpoint(state), None, {"no_such_thing": 1})


def test_a_backbone_in_a_larger_model_is_no_answer():
    neck = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)).state_dict()
    state = {
        f"backbone.{key}": t for key, t in timm.create_model("test_efficientnet").state_dict().items()
    } | neck
    with pytest.raises(
        ArchitectureError, match=r"timm:test_efficientnet \(.*first difference 0\.weight: only in"
    ):
        identify_model(checkpoint(state))
    copies = {
        p + key: t
        for p in ("a.", "b.")
        for key, t in timm.create_model("test_efficientnet").state_dict().items()
    }
    assert identify_model(checkpoint(copies)).checkpoint.prefix == "a."


def test_twins_of_one_function_are_one_answer():
    model = trained(torchvision.models.densenet121(num_classes=2))
    loaded = identify_model(checkpoint(model))
    assert (loaded.recipe.architecture, loaded.twins) == ("timm:densenet121", ("torchvision:densenet121",))
    assert same_function(loaded, model)
    published = identify_model(checkpoint(model, "densenet121-a639ec97.pth"))
    assert (published.recipe.architecture, published.twins) == (
        "torchvision:densenet121",
        ("timm:densenet121",),
    )
    pickled = identify_model(
        checkpoint(model, module={"class": "torchvision.models.densenet.DenseNet", "rates": {}})
    )
    assert pickled.recipe.adapter == "torchvision"


def test_the_class_of_a_pickled_module_goes_before_a_library_whose_headless_model_fits_better():
    model = torchvision.models.densenet121(num_classes=2)
    model.classifier = nn.Sequential(nn.Dropout(0.3), nn.Linear(1024, 2))
    pickled = identify_model(
        checkpoint(model, module={"class": "torchvision.models.densenet.DenseNet", "rates": {}})
    )
    assert (pickled.recipe.adapter, pickled.as_built) == ("torchvision", ("classifier.",))


def test_rates_that_mean_different_layers_in_twins_are_no_answer():
    model = torchvision.models.densenet121(num_classes=2)
    with pytest.raises(AmbiguousArchitecture, match="may mean different layers") as raised:
        identify_model(checkpoint(model, args={"drop_rate": 0.2}))
    assert raised.value.candidates == ("timm:densenet121", "torchvision:densenet121")


@pytest.fixture(scope="module")
def resnets():
    return find_candidates(checkpoint(meta("timm:resnet18")))


def test_several_functions_are_all_listed():
    some = checkpoint(timm.create_model("resnet18", num_classes=3), "runs/resnetblur18/best.pt")
    found = find_candidates(some)
    assert [one.architecture for one in found] == ["timm:resnet18", "timm:resnetblur18"]
    assert "torchvision:resnet18" in found[0].twins
    assert [load_candidate(some, one).recipe.kwargs["num_classes"] for one in found] == [3, 3]
    with pytest.raises(
        AmbiguousArchitecture, match=r"suggests timm:resnetblur18\. Choose.*--arch timm:resnetb"
    ) as raised:
        identify_model(some)
    assert raised.value.candidates == ("timm:resnet18", "timm:resnetblur18")
    assert identify_model(some, "timm:resnetblur18").recognised_by == "user"


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("resnet18.pt", "timm:resnet18"),
        ("my-ResNet18-3.pt", "timm:resnet18"),
        ("resnet18d.pt", None),
        ("resnetblur18/last.ckpt", "timm:resnetblur18"),
        ("resnet18/resnetblur18.pt", "timm:resnetblur18"),
        ("model.pt", None),
        ("resnet18_or_resnetblur18.pt", "timm:resnetblur18"),
    ],
)
def test_a_file_name_suggests(resnets, path, expected):
    found = guess_by_file_name(Path("/data") / path, resnets)
    assert (found and found.architecture) == expected


def test_other_padding_is_another_function_and_pruning_is_none():
    weights: dict[str, torch.Tensor] = {}

    def answers(*names):
        return [
            output_on_random_input(find_candidates(checkpoint(meta(name)), name)[0], (3, 64, 64), weights)
            for name in names
        ]

    plain, pruned, same = answers(
        "timm:efficientnet_es", "timm:efficientnet_es_pruned", "timm:tf_efficientnet_es"
    )
    assert torch.equal(plain, pruned)
    assert (plain - same).norm() > 0.1 * plain.norm()


def test_a_stale_index_names_nothing_that_is_not_there(monkeypatch):
    own = state_dict_shapes(meta("timm:resnet10t"))
    gone = make_index_entry("timm:resnet10_gone", own, (), ())
    changed = make_index_entry("timm:resnet14t", own, (), ())  # the library's has other tensors by now
    right = make_index_entry("timm:resnet10t", own, ("fc.weight", "fc.bias"), ())
    monkeypatch.setattr(
        resolution, "load_shipped_index", lambda: ArchitectureIndex({"timm": "0.0"}, (gone, changed, right))
    )
    (found,) = find_candidates(checkpoint(meta("timm:resnet10t")))
    assert found.architecture == "timm:resnet10t"


def test_the_closest_three_and_what_differs():
    state = timm.create_model("resnet10t").state_dict()
    state["layer3.0.se.fc1.weight"] = torch.ones(16, 256, 1, 1)
    with pytest.raises(ArchitectureError) as raised:
        identify_model(checkpoint(state))
    said = str(raised.value).splitlines()
    assert said[1:3] == [
        "Closest by its tensors:",
        "  timm:resnet10t (86 of 86 tensors fit; "
        "first difference layer3.0.se.fc1.weight: only in the checkpoint)",
    ]
    assert len(said) == 6
    assert "--arch" in said[-1]


def test_another_kernel_size_of_the_stem_is_named():
    own = state_dict_shapes(meta("torchvision:resnet18")) | {"conv1.weight": (64, 3, 3, 3)}
    found = find_closest_architectures(own)
    assert found[0].difference == "conv1.weight: (64, 3, 7, 7) there, (64, 3, 3, 3) in the checkpoint"
    assert not any("quantized_" in close.architecture for close in found)


def test_the_closest_is_found_whatever_the_head_and_the_prefix():
    own = {
        f"model.{key}": s
        for key, s in state_dict_shapes(meta("timm:test_efficientnet", num_classes=3, in_chans=1)).items()
    }
    own["model.blocks.1.0.conv_exp.weight"] = (9, 9, 9, 9)
    first = find_closest_architectures(own)[0]
    assert first.architecture == "timm:test_efficientnet"
    assert first.total - first.fitting == 1
    assert first.difference.endswith("there, (9, 9, 9, 9) in the checkpoint")


@pytest.mark.parametrize(
    "tensors",
    [
        {},
        {"a": torch.tensor(1.0)},
        {f"transformer.h.{i}.mlp.weight": torch.ones(4, 4) for i in range(20)},
        {"": torch.ones(2), ".": torch.ones(2), "a..b": torch.ones(0, 3)},
    ],
    ids=len,
)
def test_what_resembles_nothing_is_said_so(tensors):
    with pytest.raises(
        ArchitectureError, match=r"(?s)No architecture of timm .* or torchvision .* resembles it.*--arch"
    ):
        identify_model(checkpoint(tensors))


def folded(model):
    state = model.state_dict()
    kept = {key: t for key, t in state.items() if t.dim() > 1 or key.startswith("fc.")}
    return kept | {key.replace("weight", "bias"): t[:, 0, 0, 0] for key, t in kept.items() if t.dim() == 4}


def untracked(model):
    return {key: t for key, t in model.state_dict().items() if "running" not in key and "tracked" not in key}


UNKNOWN = {
    "a.conv.weight": torch.ones(4, 3, 1, 1),
    "a.BN2.weight": torch.ones(4),
    "a.BN2.bias": torch.ones(4),
}


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        (untracked(timm.create_model("resnet10t")), "track no statistics .*bn1.weight"),
        (untracked(timm.create_model("vit_tiny_r_s16_p8_224")), "no BatchNorm statistics in it"),
        (untracked(torchvision.models.squeezenet1_1()), "no BatchNorm statistics in it"),
        (untracked(torchvision.models.mobilenet_v2()), "track no statistics .*features"),
        (UNKNOWN, "track no statistics .*a.BN2.weight is there"),
        (timm.create_model("test_vit").state_dict(), "no BatchNorm statistics in it"),
        (nn.Linear(2, 2).state_dict(), "no BatchNorm statistics in it"),
        (folded(timm.create_model("resnet10t")), "looks like timm:resnet10t with its BatchNorm folded"),
        (
            {
                "fc.scale": torch.ones(1),
                "fc.zero_point": torch.ones(1),
                "fc._packed_params.dtype": torch.ones(1),
            },
            "quantised",
        ),
    ],
    ids=[
        "untracked",
        "no BN",
        "no BN either",
        "under other names",
        "unknown",
        "vit",
        "linear",
        "folded",
        "quantised",
    ],
)
def test_without_batch_norm_there_is_nothing_to_do(tensors, said):
    with pytest.raises(NothingToDo, match=said) as raised:
        require_batch_norm(checkpoint(tensors))
    assert raised.value.exit_code == 3
    assert len(str(raised.value).splitlines()) == 1


def test_with_batch_norm_there_is_something_to_do():
    require_batch_norm(checkpoint(nn.BatchNorm1d(2)))


def test_the_rates_of_a_pickled_module_are_set_where_they_belong():
    rates = {
        "": {"drop_rate": 0.1},
        "blocks.1.0.drop_path": {"drop_prob": 0.1},
        "blocks.2.0.drop_path": {"drop_prob": 0.3},
    }
    state = timm.create_model("test_efficientnet").state_dict()
    words = {
        "class": "timm.models.efficientnet.EfficientNet",
        "rates": rates | {"gone": {"p": 0.5, "odd": "x"}},
    }
    loaded = identify_model(checkpoint(state, module=words))
    assert (loaded.rates, loaded.recipe.kwargs["drop_path_rate"]) == ("recorded", 0.3)
    assert loaded.model.drop_rate == 0.1
    assert loaded.model.blocks[1][0].drop_path.drop_prob == 0.1
    assert loaded.model.blocks[2][0].drop_path.drop_prob == 0.3
    assert identify_model(checkpoint(state, module=words), None, {"drop_rate": 0.4}).rates == "given"


@pytest.mark.parametrize(
    "wrap", [nn.Sequential, nn.DataParallel, lambda model: nn.DataParallel(nn.Sequential(model))]
)
def test_the_rates_of_a_wrapped_module_are_found(tmp_path, wrap):
    torch.save(wrap(torchvision.models.densenet121(drop_rate=0.2)), tmp_path / "m.pt")
    loaded = load(tmp_path / "m.pt")
    assert loaded.rates == "recorded"
    assert loaded.model.features.denseblock1.denselayer1.drop_rate == 0.2


@pytest.mark.parametrize(
    "rates", [{"drop_block_rate": 0.1}, {"drop_block_rate": 0.1, "drop_path_rate": 0.2}], ids=str
)
def test_drop_blocks_are_no_drop_paths(tmp_path, rates):
    model = timm.create_model("resnet26d", **rates)
    torch.save(model, tmp_path / "m.pt")
    loaded = load(tmp_path / "m.pt", "timm:resnet26d")
    assert loaded.rates == "recorded"
    assert {key: value for key, value in loaded.recipe.kwargs.items() if "drop" in key} == rates
    own, found = [
        [(n, m.drop_prob) for n, m in x.named_modules() if hasattr(m, "drop_prob")]
        for x in (model, loaded.model)
    ]
    assert own == found


def test_rates_of_layers_that_the_architecture_has_not_leave_the_others_unknown():
    words = {"class": "mine.Net", "rates": {"features.drop_path": {"drop_prob": 0.3}}}
    assert (
        identify_model(checkpoint(torchvision.models.shufflenet_v2_x0_5(), module=words)).rates == "unknown"
    )


@pytest.mark.parametrize(
    "words", [None, 3, {"rates": [1]}, {"class": 5, "rates": {"a": 3, 4: {"p": 1}}}], ids=str
)
def test_hostile_words_about_a_module_are_no_words(words):
    assert identify_model(checkpoint(timm.create_model("resnet10t"), module=words)).rates == "unknown"


def test_a_trusted_module_is_the_model_itself():
    model = trained(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.3)))
    some = Checkpoint(
        Path("m.pt"), "pickle", model.state_dict(), module=nn.DataParallel(model), prefix="module."
    )
    loaded = identify_model(some)
    assert (loaded.recognised_by, loaded.rates, loaded.recipe.name) == ("module", "model", "Sequential")
    assert same_function(loaded, model)
    loaded.model[1].running_var.zero_()
    assert some.tensors["1.running_var"].all()


def test_the_shipped_index_is_read_once():
    assert load_shipped_index() is load_shipped_index()
