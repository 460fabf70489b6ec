"""Which BN layers the user's patterns and the freezing of layers leave as they are."""

from __future__ import annotations

import copy

import nets
import pytest
import torch
from torch import nn

import ckpt_tools
from ckpt_tools import reestimate_bn
from ckpt_tools.errors import NothingToDo, UsageError
from ckpt_tools.method import Method
from ckpt_tools.reestimate.choice import choose
from ckpt_tools.reestimate.frozen import frozen_layers
from ckpt_tools.results import BatchNormLayer, Reestimation

SHAPE = (3, 8, 8)
BEHIND = ["norms.1", "norms.2", "norms.3", "norm"]  # the BN layers of nets.DenseNet behind dropout


@pytest.fixture
def model() -> nn.Module:
    return nets.trained(nets.DenseNet(), nets.batches(SHAPE))


def rewritten(result: Reestimation) -> list[str]:
    return [layer.name for layer in result.rewritten]


def reasons(result: Reestimation) -> dict[str, str]:
    return {layer.name: layer.reason for layer in result.layers}


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({}, BEHIND),
        ({"only": ["norms"]}, BEHIND[:3]),
        ({"only": "norms"}, BEHIND[:3]),  # a single text is one pattern
        ({"only": ["norms.[12]", "norm"]}, ["norms.1", "norms.2", "norm"]),
        ({"keep": ("norm",)}, BEHIND[:3]),
        ({"keep": ["nor?s"]}, ["norm"]),
        ({"only": ["*"], "keep": ["*.1", "*.3"]}, ["norms.2", "norm"]),
        ({"only": ["norms.0", "norm"]}, ["norm"]),  # norms.0 is not behind dropout
        ({"only": ["norms.0"], "layers": "all", "estimator": "pooled"}, ["norms.0"]),
    ],
)
def test_patterns(model: nn.Module, options: dict, names: list[str]) -> None:
    stored = copy.deepcopy(model.state_dict())
    result = reestimate_bn(model, nets.batches(SHAPE), **options)
    assert rewritten(result) == names
    changed = [key for key, value in model.state_dict().items() if not torch.equal(value, stored[key])]
    assert changed == [f"{name}.running_var" for name in names]


def test_the_results_say_why_a_layer_was_kept(model: nn.Module) -> None:
    result = reestimate_bn(model, nets.batches(SHAPE), only=["norms"], keep=["norms.2"])
    said = reasons(result)
    assert said["norms.1"] == "behind dropout"
    assert "asked for with keep" in said["norms.2"]
    assert "that only names" in said["norm"]
    assert said["norms.0"].startswith("control")
    assert "2 of them left as they are" in result.why
    assert "asked for with keep" in result.why


def test_the_patterns_are_no_settings_for_another_layer(model: nn.Module) -> None:
    """The layers that are rewritten get the values that they would get without the patterns."""
    other = copy.deepcopy(model)
    reestimate_bn(model, nets.batches(SHAPE), only=["norms.1"])
    reestimate_bn(other, nets.batches(SHAPE))
    assert torch.equal(model.norms[1].running_var, other.norms[1].running_var)


@pytest.mark.parametrize("option", ["only", "keep"])
@pytest.mark.parametrize(("pattern", "hint"), [("norm.1", "norms.1"), ("nrms", "norms"), ("zzz", "")])
def test_a_pattern_without_a_layer(model: nn.Module, option: str, pattern: str, hint: str) -> None:
    with pytest.raises(UsageError, match=pattern) as error:
        reestimate_bn(model, nets.batches(SHAPE), **{option: [pattern]})
    message = str(error.value)
    assert ("Did you mean" in message) == bool(hint)
    assert hint in message
    assert f"{option}=" in message
    assert "norms.0" in message


def test_nothing_is_left(model: nn.Module) -> None:
    with pytest.raises(NothingToDo, match="keep="):
        reestimate_bn(model, nets.batches(SHAPE), keep=["*"])


def test_a_model_without_bn_layers_is_told_so() -> None:
    with pytest.raises(NothingToDo, match="no BatchNorm layer"):
        reestimate_bn(nn.Sequential(nn.Linear(3, 3)), [torch.randn(8, 3)], keep=["layer4"])


def test_the_second_name_of_a_layer_serves_as_well() -> None:
    layers = [BatchNormLayer("a.bn", "BatchNorm1d", 3, True, aliases=("b.bn",))]
    from ckpt_tools.reestimate.layer_patterns import select_layers

    assert select_layers(layers, ["b"], "only") == {"a.bn"}


def test_a_method_holds_tuples() -> None:
    assert Method(only=["a", "b"], keep="c").only == ("a", "b")
    assert Method(keep="cd").keep == ("cd",)
    assert hash(Method(only=["a"])) == hash(Method(only=("a",)))


class Freezing(nets.DenseNet):
    """``train()`` leaves the first two BN layers in evaluation mode."""

    def train(self, mode: bool = True) -> Freezing:
        super().train(mode)
        self.norms[0].eval()
        self.norms[1].eval()
        return self


def walk_of(model: nn.Module) -> ckpt_tools.Walk:
    return ckpt_tools.walk(model, torch.zeros(2, *SHAPE))


def test_layers_that_train_leaves_in_evaluation_mode_are_kept() -> None:
    model = nets.trained(Freezing(), nets.batches(SHAPE))
    flags = [module.training for module in model.modules()]
    result = reestimate_bn(model, nets.batches(SHAPE), force=True)
    assert rewritten(result) == ["norms.2", "norms.3", "norm"]
    assert "train()" in reasons(result)["norms.1"]
    assert "1 frozen" in result.why
    assert result.controls.names == ()  # norms.0, the only layer that no dropout reaches, is frozen
    assert reasons(result)["norms.0"].startswith("frozen")
    assert [module.training for module in model.modules()] == flags


def test_only_rewrites_a_frozen_layer() -> None:
    model = nets.trained(Freezing(), nets.batches(SHAPE))
    result = reestimate_bn(model, nets.batches(SHAPE), only=["norms"], force=True)
    assert rewritten(result) == ["norms.1", "norms.2", "norms.3"]
    assert result.controls.names == ()


def test_flags_count_in_a_model_that_is_being_trained(model: nn.Module) -> None:
    walk = walk_of(model)
    assert not frozen_layers(model.eval(), walk)
    assert not frozen_layers(model.train(), walk)
    model.norms[2].eval()
    assert frozen_layers(model, walk).keys() == {"norms.2"}
    for module in model.modules():  # whoever did that to all of them may have had any reason
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    assert not frozen_layers(model, walk)


class Raising(nets.DenseNet):
    def train(self, mode: bool = True) -> Raising:
        if mode:
            raise RuntimeError("for inference alone")
        return super().train(mode)


class Deaf(nets.DenseNet):
    def train(self, mode: bool = True) -> Deaf:
        return self


class Careless(nets.DenseNet):
    """Writes to its buffers and draws random numbers when its mode is set."""

    def train(self, mode: bool = True) -> Careless:
        super().train(mode)
        if hasattr(self, "norm"):
            self.norm.running_var.mul_(2)
            torch.rand(3)
        return self


@pytest.mark.parametrize("kind", [Raising, Deaf, Careless])
def test_a_train_of_the_models_own(kind: type[nn.Module], model: nn.Module) -> None:
    own = kind()
    own.load_state_dict(model.state_dict())
    before = {key: value.clone() for key, value in own.state_dict().items()}
    chance = torch.get_rng_state()
    assert not frozen_layers(own, walk_of(model))
    assert all(torch.equal(value, before[key]) for key, value in own.state_dict().items())
    assert torch.equal(torch.get_rng_state(), chance)


class InOrder(nn.Sequential):
    """Four BN layers, one behind the other."""

    def __init__(self, counters: list[int], initial: tuple[int, ...] = ()) -> None:
        super().__init__(*(nn.BatchNorm1d(4) for _ in counters))
        for index, counter in enumerate(counters):
            self[index].num_batches_tracked.fill_(counter)
            if index not in initial:
                self[index].running_mean.normal_()


@pytest.mark.parametrize(
    ("counters", "initial", "frozen"),
    [
        ([0, 0, 0, 0], (), []),  # converted from a framework without counters
        ([0, 0, 9, 9], (), ["0", "1"]),  # a frozen backbone whose weights came without counters
        ([9, 9, 0, 9], (2,), ["2"]),  # never trained
        ([0, 9, 0, 9], (0,), ["0"]),
        ([0, 0, 9, 9], (0,), ["0", "1"]),
        ([9, 9, 0, 0], (), []),  # the moving average of a new head keeps counters of 0
        ([900, 900, 9, 9], (), []),  # a new head on a backbone that was trained for longer
        ([9, 9, 45, 45], (), []),  # a head that every batch reaches five times
        ([100, 70, 60, 40], (), []),  # whole blocks are skipped
        ([0, 0, 0, 0], (0, 1, 2, 3), []),  # as built
    ],
)
def test_what_counters_tell(counters: list[int], initial: tuple[int, ...], frozen: list[str]) -> None:
    model = InOrder(counters, initial)
    walk = ckpt_tools.walk(model, torch.randn(2, 4))
    assert list(frozen_layers(model, walk)) == frozen


def test_counters_of_layers_that_do_not_count() -> None:
    model = InOrder([0, 0, 9, 9])
    for layer in model:
        layer.num_batches_tracked = None
    assert not frozen_layers(model, ckpt_tools.walk(model, torch.randn(2, 4)))


def test_an_architecture_without_any_dropout_site_has_nothing_to_correct() -> None:
    plain = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))
    walk = ckpt_tools.walk(plain, torch.randn(4, 4))
    with pytest.raises(NothingToDo, match="no dropout site"):
        choose(walk, "auto", rates="unknown", statistics="variance")
    assert choose(walk, "all", rates="unknown", statistics="variance").rewrite == {"1"}
