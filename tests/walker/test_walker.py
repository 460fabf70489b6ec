"""The walk on nets that show one difficulty each, against switching dropout on and looking."""

from __future__ import annotations

import copy
import random

import nets
import pytest
import torch
from dropout_oracle import changed_by_dropout
from torch import nn

import ckpt_tools
from ckpt_tools.errors import ModelError

SHAPES = {"image": (3, 8, 8), "vector": (7,)}


NOISE = ["gaussian", "mask in place", "view in place", "item", "python random"]
CASES = {
    "densenet": (nets.DenseNet, (3, 8, 8)),
    "droppath": (nets.ResNet, (3, 8, 8)),
    "wide": (lambda: nets.ResNet(wide=True), (3, 8, 8)),
    "reused": (nets.Reused, (3, 8, 8)),
    "mlp": (nets.mlp, (10,)),
    "video": (nets.video, (2, 4, 6, 6)),
    "sequence": (nets.sequence, (4, 12)),
    **{kind: (lambda kind=kind: nets.Noisy(kind), (7,)) for kind in NOISE},
}


@pytest.mark.parametrize("case", CASES)
def test_downstream_is_what_changes(case: str) -> None:
    make, shape = CASES[case]
    model = make()
    x = torch.randn(8, *shape)
    walk = ckpt_tools.walk(model, x)
    found = {layer.name for layer in walk.batch_norms if layer.downstream_of}
    assert found == changed_by_dropout(model, x)
    assert found, "the case is meant to have a layer behind dropout"


def test_rates_names_and_order() -> None:
    walk = ckpt_tools.walk(nets.DenseNet(0.25, layers=2), torch.randn(2, 3, 8, 8))
    assert [layer.name for layer in walk.batch_norms] == ["norms.0", "norms.1", "norm"]
    assert [(site.op, site.rate) for site in walk.dropout_sites] == [("dropout", 0.25)] * 2
    assert [len(layer.downstream_of) for layer in walk.batch_norms] == [0, 1, 2]
    site = ckpt_tools.walk(nets.ResNet(0.3), torch.randn(2, 3, 8, 8)).dropout_sites[0]
    assert (site.name, site.op, site.rate) == ("0.drop", "DropPath", 0.3)


@pytest.mark.parametrize(
    "make", [nets.DenseNet, nets.ResNet, nets.mlp], ids=["functional", "DropPath", "module"]
)
def test_sites_at_rate_zero_are_potential(make: type[nn.Module]) -> None:
    shape = (10,) if make is nets.mlp else (3, 8, 8)
    off, on = (ckpt_tools.walk(make(rate), torch.randn(2, *shape)) for rate in (0.0, 0.5))
    assert not any(layer.downstream_of for layer in off.batch_norms)
    assert {site.rate for site in off.dropout_sites} == {0.0}
    assert [layer.potentially_downstream_of for layer in off.batch_norms] == [
        layer.downstream_of for layer in on.batch_norms
    ]


def test_rate_one_is_a_site() -> None:
    walk = ckpt_tools.walk(nets.mlp(1.0), torch.randn(2, 10))
    assert [bool(layer.downstream_of) for layer in walk.batch_norms] == [False, True, True]


def test_reused_and_unreached_layers() -> None:
    walk = ckpt_tools.walk(nets.Reused(), torch.randn(2, 3, 8, 8))
    assert {layer.name: layer.reached for layer in walk.batch_norms} == {
        "first": True,
        "shared": True,
        "unused": False,
    }
    assert [site.name for site in walk.dropout_sites] == ["drop"]


def test_a_layer_under_two_names_is_one_layer() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 3))
    model.append(model[0])
    (layer,) = ckpt_tools.walk(model, torch.randn(2, 3)).batch_norms
    assert (layer.name, layer.aliases) == ("0", ("2",))


def test_look_alikes_are_named_and_left_alone() -> None:
    from torchvision.ops import FrozenBatchNorm2d

    model = nn.Sequential(
        FrozenBatchNorm2d(3),
        nn.BatchNorm2d(3, track_running_stats=False),
        nn.InstanceNorm2d(3, track_running_stats=True),
    )
    walk = ckpt_tools.walk(model, torch.randn(2, 3, 4, 4))
    assert not walk.batch_norms
    assert {item.name for item in walk.left_alone} == {"0", "1", "2"}


def test_dropout_behind_the_last_layer_reaches_nothing() -> None:
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 4), nn.Dropout(0.5))
    (layer,) = ckpt_tools.walk(model, torch.randn(2, 4)).batch_norms
    assert not layer.downstream_of
    assert not layer.potentially_downstream_of


def test_values_do_not_flow_through_shapes() -> None:
    class Shape(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm1d(4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            noisy = nn.functional.dropout(x, 0.5, self.training)
            return self.bn(x + torch.zeros_like(noisy)) + noisy

    (layer,) = ckpt_tools.walk(Shape(), torch.randn(2, 4)).batch_norms
    assert not layer.downstream_of


def test_the_model_is_untouched() -> None:
    model = nets.DenseNet(0.0).train()
    model.norms[0].eval()
    before = copy.deepcopy(model.state_dict())
    flags = [module.training for module in model.modules()]
    ckpt_tools.walk(model, torch.randn(2, 3, 8, 8))
    assert [module.training for module in model.modules()] == flags
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert model.drop_rate == 0.0


@pytest.mark.parametrize("kind", ["item", "python random"])
def test_random_generators_come_back(kind: str) -> None:
    model, x = nets.Noisy(kind), torch.randn(4, 7)
    states = torch.get_rng_state(), random.getstate()
    ckpt_tools.walk(model, x)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]


@pytest.mark.parametrize("form", ["tuple", "dict", "list"])
def test_batches_in_any_form(form: str) -> None:
    model, x = nets.mlp(), torch.randn(4, 10)
    batch = {"tuple": (x, torch.zeros(4)), "list": [x, "label"], "dict": {"input": x}}[form]
    assert ckpt_tools.walk(model, batch) == ckpt_tools.walk(model, x)


def test_wrappers_are_looked_through() -> None:
    model = nets.mlp()
    assert ckpt_tools.walk(nn.DataParallel(model), torch.randn(4, 10)) == ckpt_tools.walk(
        model, torch.randn(4, 10)
    )


def test_a_model_that_does_not_run() -> None:
    with pytest.raises(ModelError, match=r"Sequential.*check its shape"):
        ckpt_tools.walk(nets.mlp(), torch.randn(4, 3))


def test_a_model_that_wants_targets_in_training_mode() -> None:
    class Detector(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nets.mlp()

        def forward(self, x: torch.Tensor, targets: torch.Tensor | None = None) -> torch.Tensor:
            if self.training and targets is None:
                raise ValueError("targets should not be none when in training mode")
            return self.body(x)

    walk = ckpt_tools.walk(Detector(), torch.randn(2, 10))
    assert not walk.containers_trained
    assert [bool(layer.downstream_of) for layer in walk.batch_norms] == [False, True, True]


@pytest.mark.filterwarnings("ignore")
def test_compiled_submodules() -> None:
    model = nets.mlp()
    expected = [bool(layer.downstream_of) for layer in ckpt_tools.walk(model, torch.randn(2, 10)).batch_norms]
    compiled = nn.Sequential(torch.compile(model, backend="eager"), nn.Identity())
    walk = ckpt_tools.walk(torch.compile(compiled, backend="eager"), torch.randn(2, 10))
    assert [bool(layer.downstream_of) for layer in walk.batch_norms] == expected


def test_layers_that_normalise_by_hand_are_left_alone() -> None:
    class ByHand(nn.BatchNorm1d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x - self.running_mean) / (self.running_var + self.eps).sqrt()

    walk = ckpt_tools.walk(nn.Sequential(nn.Dropout(0.5), ByHand(4), nn.BatchNorm1d(4)), torch.randn(2, 4))
    assert [layer.name for layer in walk.batch_norms] == ["2"]
    assert [item.name for item in walk.left_alone] == ["1"]


def test_zeros_that_are_no_rates() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.drop_tokens = 0
            self.drop, self.bn = nn.Dropout(0.0), nn.BatchNorm1d(4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.bn(self.drop(x[self.drop_tokens :]))

    (layer,) = ckpt_tools.walk(Tokens(), torch.randn(4, 4)).batch_norms
    assert layer.potentially_downstream_of == ("drop",)


def test_two_sites_in_one_module_keep_their_names() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn1, self.bn2 = nn.BatchNorm1d(4), nn.BatchNorm1d(4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.bn1(nn.functional.dropout(x, 0.0, self.training))
            return self.bn2(nn.functional.dropout(x, 0.3, self.training))

    first, second = ckpt_tools.walk(Two(), torch.randn(4, 4)).batch_norms
    assert (first.downstream_of, first.potentially_downstream_of) == ((), ("(root)",))
    assert (second.downstream_of, second.potentially_downstream_of) == (("(root):2",), ("(root)",))


def test_training_forwards_that_write_to_their_model() -> None:
    class Codebook(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.codes, self.bn = nn.Parameter(torch.zeros(4)), nn.BatchNorm1d(4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.training and x.sum().item() != 12345.0:
                self.codes.data += 1
            return self.bn(x)

    model = Codebook()
    assert ckpt_tools.walk(model, torch.randn(4, 4)).device == "cpu"
    assert not model.codes.any()


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
def test_what_cannot_be_walked() -> None:
    with pytest.raises(ModelError, match="lazy module"):
        ckpt_tools.walk(nn.LazyLinear(3), torch.randn(2, 4))
    with pytest.raises(ModelError, match="TorchScript"):
        ckpt_tools.walk(nn.Sequential(torch.jit.script(nn.BatchNorm1d(3))), torch.randn(2, 3))


def test_attributes_that_cannot_be_copied_are_shared() -> None:
    model = nets.mlp()
    expected = ckpt_tools.walk(model, torch.randn(2, 10))
    model.steps = (step for step in ())
    model[0].alias = model[4]
    found = ckpt_tools.walk(model, torch.randn(2, 10))
    assert (found.batch_norms, found.dropout_sites) == (expected.batch_norms, expected.dropout_sites)
    assert [layer.inputs for layer in found.weights][:2] == [(), ("0.weight",)]


@pytest.mark.parametrize("make", [nets.DenseNet, nets.ResNet])
def test_inference_mode_hides_nothing(make: type[nn.Module]) -> None:
    torch.manual_seed(0)
    expected = ckpt_tools.walk(make(), torch.randn(2, 3, 8, 8))
    with torch.inference_mode():
        torch.manual_seed(0)
        found = ckpt_tools.walk(make(), torch.randn(2, 3, 8, 8))
    assert found == expected
