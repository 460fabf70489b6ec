"""The pass against an oracle that shares no code: which numbers come out, and that nothing else changes."""

from __future__ import annotations

import copy
import functools

import nets
import oracle
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ckpt_tools import reestimate_bn
from ckpt_tools.errors import CheckFailed, DataError, ModelError, NothingToDo, UsageError
from ckpt_tools.results import Spread

NETS = {
    "densenet": (nets.DenseNet, (3, 8, 8)),
    "droppath": (nets.ResNet, (3, 8, 8)),
    "wide": (functools.partial(nets.ResNet, wide=True), (3, 8, 8)),
    "mlp": (nets.mlp, (10,)),
    "reused": (nets.Reused, (3, 8, 8)),
    "sequence": (nets.sequence, (4, 12)),
    "video": (nets.video, (2, 4, 6, 6)),
}


def case(name: str) -> tuple[nn.Module, list[torch.Tensor]]:
    make, shape = NETS[name]
    data = nets.batches(shape)
    return nets.trained(make(), data), data


def variances(model: nn.Module) -> dict[str, torch.Tensor]:
    return {
        name: module.running_var.clone()
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
    }


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("layers", ["downstream", "all"])
def test_exact_is_the_oracle(name: str, layers: str) -> None:
    model, data = case(name)
    stored = copy.deepcopy(model)
    result = reestimate_bn(model, data, estimator="exact", layers=layers)
    names = {layer.name for layer in result.rewritten}
    truth = oracle.corrected(stored, torch.cat(data), names, sweeps=30 if name == "reused" else 1)
    assert names == set(truth)
    assert oracle.relative_difference(variances(model), truth).max() < 1e-3


def test_one_batch_of_everything_is_exact_up_to_its_bias() -> None:
    model, data = case("densenet")
    stored = copy.deepcopy(model)
    x = torch.cat(data)
    names = {layer.name for layer in reestimate_bn(model, [x]).rewritten}
    assert oracle.relative_difference(variances(model), oracle.corrected(stored, x, names)).max() < 1e-3


def test_the_order_of_batches_does_not_matter() -> None:
    model, data = case("densenet")
    again = copy.deepcopy(model)
    reestimate_bn(model, data)
    reestimate_bn(again, data[::-1])
    assert oracle.relative_difference(variances(model), variances(again)).max() < 1e-5


def test_ema_is_the_authors_average() -> None:
    """Momentum average of unbiased batch variances while batch statistics normalise, as BN in training."""
    model, data = case("densenet")
    by_torch = copy.deepcopy(model)
    names = {
        layer.name for layer in reestimate_bn(model, data, estimator="ema", momentum=0.2, epochs=2).rewritten
    }
    for name, module in by_torch.named_modules():
        if name in names:
            module.training, module.momentum = True, 0.2
    with torch.no_grad():
        for batch in data * 2:
            by_torch(batch)
    expected = {name: variance for name, variance in variances(by_torch).items() if name in names}
    assert oracle.relative_difference(variances(model), expected).max() < 1e-4


@pytest.mark.parametrize("estimator", ["pooled", "exact", "ema"])
@pytest.mark.parametrize("statistics", ["variance", "mean+variance"])
def test_nothing_else_changes(estimator: str, statistics: str) -> None:
    model, data = case("densenet")
    model.train()
    model.norms[1].eval()
    flags = [module.training for module in model.modules()]
    before = copy.deepcopy(model.state_dict())
    result = reestimate_bn(model, data, estimator=estimator, statistics=statistics)
    buffers = ("running_var",) if statistics == "variance" else ("running_var", "running_mean")
    allowed = {f"{layer.name}.{buffer}" for layer in result.rewritten for buffer in buffers}
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == allowed
    assert [module.training for module in model.modules()] == flags
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_model_that_raises_comes_back_as_it_came() -> None:
    model, data = case("densenet")
    model.train()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ModelError, match="batch 1"):
        reestimate_bn(model, [data[0], data[1][:, :2]])
    with pytest.raises(KeyboardInterrupt):
        reestimate_bn(model, data, progress=lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert all(module.training for module in model.modules())


def test_dropout_that_ignores_the_mode_is_off() -> None:
    class Always(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self[1](nn.functional.dropout(self[0](x), 0.5, training=True))

    data = nets.batches((6,))
    model = nets.trained(Always(nn.Linear(6, 6), nn.BatchNorm1d(6)), data)
    reestimate_bn(model, data)
    with torch.no_grad():
        expected = model[0](torch.cat(data)).var(0)
    torch.testing.assert_close(model[1].running_var, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", ["affine", "momentum", "sync", "act", "split", "double", "frozen half"])
def test_kinds_of_batch_norm(kind: str) -> None:
    from timm.layers import BatchNormAct2d, SplitBatchNorm2d

    layer = {
        "affine": lambda: nn.BatchNorm2d(6, affine=False),
        "momentum": lambda: nn.BatchNorm2d(6, momentum=None),
        "sync": lambda: nn.SyncBatchNorm(6),
        "act": lambda: BatchNormAct2d(6, drop_layer=nn.Dropout),
        "split": lambda: SplitBatchNorm2d(6, num_splits=2),
        "double": lambda: nn.BatchNorm2d(6),
        "frozen half": lambda: nn.BatchNorm2d(6).requires_grad_(False),
    }[kind]()
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Dropout2d(0.3), layer).eval()
    data = nets.batches((3, 6, 6))
    if kind == "double":
        model, data = model.double(), [batch.double() for batch in data]
    with torch.no_grad():
        expected = model[:2](torch.cat(data)).transpose(0, 1).flatten(1).var(1)
    result = reestimate_bn(model, data)
    assert [item.name for item in result.rewritten] == ["2"]
    torch.testing.assert_close(layer.running_var, expected, rtol=1e-4, atol=0)
    assert int(layer.num_batches_tracked) == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights(dtype: torch.dtype) -> None:
    model, data = case("densenet")
    full = copy.deepcopy(model)
    reestimate_bn(full, data)
    half = model.to(dtype)
    reestimate_bn(half, [batch.to(dtype) for batch in data])
    assert half.norm.running_var.dtype == dtype
    assert oracle.relative_difference(variances(half), variances(full)).max() < 0.1


def test_layers_that_the_data_never_reaches_keep_their_variance() -> None:
    model, data = case("reused")
    before = model.unused.running_var.clone()
    result = reestimate_bn(model, data, layers="all")
    assert "unused" not in {layer.name for layer in result.rewritten}
    assert torch.equal(model.unused.running_var, before)
    assert next(layer for layer in result.layers if layer.name == "unused").reason.startswith("never reached")


class TestPreciseBN:
    """fvcore's cases (tests/test_precise_bn.py): all ranks, varying batch sizes, fvcore itself as a peer."""

    @pytest.mark.parametrize(
        ("kind", "shape"),
        [
            (nn.BatchNorm1d, (16, 8, 24)),
            (nn.BatchNorm2d, (16, 8, 24, 8)),
            (nn.BatchNorm3d, (16, 8, 4, 12, 6)),
        ],
    )
    def test_population_statistics(self, kind: type[nn.Module], shape: tuple[int, ...]) -> None:
        tensors = [torch.randn(shape) for _ in range(8)]
        together = torch.cat(tensors).transpose(0, 1).flatten(1)
        for batches in (tensors, torch.split(torch.cat(tensors), [2, 2, 4, 8, 16, 32, 64])):
            model = kind(shape[1])
            reestimate_bn(model, batches, statistics="mean+variance")
            torch.testing.assert_close(model.running_mean, together.mean(1), rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(
                model.running_var, together.var(1, unbiased=False), rtol=1e-5, atol=1e-8
            )

    @pytest.mark.filterwarnings("ignore")
    def test_same_as_fvcore(self) -> None:
        from fvcore.nn.precise_bn import update_bn_stats

        model, data = case("densenet")
        model.drop_rate = 0.0
        theirs = copy.deepcopy(model)
        for module in theirs.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.train()
        update_bn_stats(theirs, data, len(data))
        reestimate_bn(model, data, statistics="mean+variance")
        for key, value in theirs.state_dict().items():
            if "running" in key:
                torch.testing.assert_close(model.state_dict()[key], value, rtol=2e-4, atol=1e-5)


def test_stated_errors_are_those_of_repeated_samples() -> None:
    """Behind normalised layers too, where they are half of what single images let expect."""
    torch.manual_seed(0)
    layers = [[nn.Conv2d(width, 12, 3, bias=False), nn.BatchNorm2d(12), nn.ReLU()] for width in (3, 12, 12)]
    model = nn.Sequential(*(module for layer in layers for module in layer)).eval()

    def sample(count: int) -> list[torch.Tensor]:
        contrast = torch.empty(count, 1, 1, 1).log_normal_(0, 0.4)
        return list((torch.randn(count, 3, 9, 9) * contrast).split(32))

    def estimate(batches: list[torch.Tensor]) -> list[tuple[torch.Tensor, Spread]]:
        again = copy.deepcopy(model)
        result = reestimate_bn(again, batches, layers="all", force=True)
        errors = [layer.error for layer in result.rewritten]
        return list(zip(variances(again).values(), errors, strict=True))

    truth = [variance for variance, _ in estimate(sample(20_000))]
    trials = [estimate(sample(320)) for _ in range(30)]
    for number, true in enumerate(truth):
        off = torch.stack([(trial[number][0] / true - 1) / trial[number][1].median for trial in trials])
        assert 0.75 < float(off.square().mean().sqrt()) < 1.4


def test_batches_of_like_images_are_less_sure() -> None:
    """As many images, but each batch shows one scene: the error is that of eight samples, not of 128."""
    model = nn.Sequential(nn.BatchNorm2d(4)).eval()
    scenes = torch.randn(8, 4, 5, 5) * torch.linspace(0.5, 2, 8)[:, None, None, None]
    like = [scene.expand(16, -1, -1, -1) + 0.01 * torch.randn(16, 4, 5, 5) for scene in scenes]
    mixed = list(torch.cat(like)[torch.randperm(128)].split(16))
    errors = [
        reestimate_bn(copy.deepcopy(model), batches, layers="all", force=True).rewritten[0].error.median
        for batches in (like, mixed)
    ]
    assert errors[0] > 2.5 * errors[1]


def test_tolerance_stops_early() -> None:
    model, _ = case("densenet")
    data = nets.batches((3, 8, 8), count=60)
    result = reestimate_bn(model, data, tolerance=0.1)
    assert result.stopped_early
    assert 128 <= result.images < 60 * 32
    assert max(layer.error.median for layer in result.rewritten if layer.error) <= 0.1
    assert not reestimate_bn(model, data[:3], tolerance=0.1).stopped_early


def test_progress_and_loader_with_labels() -> None:
    model, data = case("densenet")
    x = torch.cat(data)
    seen = []
    loader = DataLoader(TensorDataset(x, torch.zeros(len(x))), batch_size=50)
    result = reestimate_bn(model, loader, progress=seen.append)
    assert [(step.pass_number, step.images) for step in seen] == [
        (number, images) for number in (1, 2) for images in (50, 100, 128)
    ]
    assert seen[2].bound <= seen[0].bound
    assert seen[-1].bound <= seen[3].bound
    assert (result.images, result.batches, result.passes) == (128, 3, 1)


def test_one_shot_iterators() -> None:
    model, data = case("densenet")
    again = copy.deepcopy(model)
    reestimate_bn(model, iter(data))
    reestimate_bn(again, data)
    torch.testing.assert_close(model.norm.running_var, again.norm.running_var)  # another layout in memory
    with pytest.raises(UsageError, match="one-shot"):
        reestimate_bn(model, iter(data), estimator="exact")


def test_which_layers() -> None:
    model, data = case("densenet")
    auto = reestimate_bn(copy.deepcopy(model), data)
    assert {layer.name for layer in auto.layers} - {layer.name for layer in auto.rewritten} == {"norms.0"}
    everything = reestimate_bn(copy.deepcopy(model), data, layers="all")
    assert len(everything.rewritten) == len(everything.layers)
    unknown = reestimate_bn(nets.trained(nets.DenseNet(0.0), data), data, rates="unknown")
    assert len(unknown.rewritten) == len(unknown.layers)
    assert "not recorded" in unknown.why
    assert unknown.controls.names == ("norms.0",)
    with pytest.raises(NothingToDo, match="layers='all'"):
        reestimate_bn(nets.DenseNet(0.0), data)
    with pytest.raises(NothingToDo, match="no BatchNorm"):
        reestimate_bn(nn.Conv2d(3, 3, 1), data)
    with pytest.raises(NothingToDo, match="no BN layer lies behind"):
        reestimate_bn(nn.Sequential(nn.BatchNorm2d(3), nn.Dropout(0.5)), data)


def test_controls_refuse_other_data() -> None:
    model, data = case("densenet")
    before = copy.deepcopy(model.state_dict())
    assert reestimate_bn(copy.deepcopy(model), data, estimator="pooled").controls.verdict == "agree"
    with pytest.raises(CheckFailed, match=r"norms\.0.*force=True"):
        reestimate_bn(model, [batch * 4 for batch in data], estimator="pooled")
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    forced = reestimate_bn(model, [batch * 4 for batch in data], estimator="pooled", force=True)
    assert forced.controls.verdict == "disagree"


def test_untrained_statistics_are_no_controls() -> None:
    result = reestimate_bn(nets.DenseNet(), nets.batches((3, 8, 8)))
    assert result.controls.verdict == "none"


@pytest.mark.parametrize(
    ("spoil", "error", "words"),
    [
        (lambda model, data: data[2].fill_(float("nan")), DataError, "batch 2.*NaN"),
        (lambda model, data: model.convs[1].weight.data.fill_(float("inf")), ModelError, r"convs\.1\.weight"),
        (lambda model, data: data.clear(), DataError, "no batch"),
    ],
)
def test_what_is_not_finite_is_refused(spoil, error: type[Exception], words: str) -> None:
    model, data = case("densenet")
    spoil(model, data)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=words):
        reestimate_bn(model, data)
    assert all(
        torch.equal(before[key], value) or key.startswith("convs.1")
        for key, value in model.state_dict().items()
    )


def test_one_value_per_channel() -> None:
    model, data = case("mlp")
    with pytest.raises(DataError, match=r"one value per channel.*more samples"):
        reestimate_bn(model, [data[1][:1]], estimator="pooled")


@pytest.mark.parametrize(
    "arguments", [{"tolerance": 0.0}, {"tolerance": 0.1, "estimator": "ema"}, {"momentum": 0}, {"epochs": 0}]
)
def test_arguments_that_mean_nothing(arguments: dict[str, object]) -> None:
    model, data = case("mlp")
    with pytest.raises(UsageError):
        reestimate_bn(model, data, **arguments)


class Merging(nn.Linear):
    """A layer whose ``train`` does more than set a flag, as LoRA layers do, and whose forward counts."""

    def __init__(self) -> None:
        super().__init__(6, 6)
        self.register_buffer("seen", torch.zeros(()))

    def train(self, mode: bool = True) -> nn.Module:
        with torch.no_grad():
            self.weight.add_(0.0 if mode else 1.0)
        return super().train(mode)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen += 1
        return super().forward(x)


def test_state_that_a_forward_or_eval_changes_comes_back() -> None:
    model = nn.Sequential(Merging(), nn.Dropout(0.5), nn.BatchNorm1d(6))
    before = copy.deepcopy(model.state_dict())
    reestimate_bn(model, nets.batches((6,)))
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {"2.running_var"}


def test_attention_that_ignores_the_mode_is_off() -> None:
    class Attending(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm1d(4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.bn(nn.functional.scaled_dot_product_attention(x, x, x, None, 0.5).transpose(1, 2))

    data = [batch.transpose(1, 2) for batch in nets.batches((4, 5))]
    results = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = Attending()
        reestimate_bn(model, data, layers="all")
        results.append(model.bn.running_var)
    assert torch.equal(*results)


def test_exact_notices_other_samples() -> None:
    model, data = case("densenet")
    loader = DataLoader(torch.cat(data), batch_size=50, shuffle=True, drop_last=True)
    with pytest.raises(DataError, match="other samples"):
        reestimate_bn(model, loader, estimator="exact")


@pytest.mark.parametrize("batches", [torch.zeros(4, 3, 8, 8), {"x": 1}, TensorDataset(torch.zeros(4, 3))])
def test_what_is_no_iterable_of_batches(batches: object) -> None:
    with pytest.raises(UsageError, match="expected"):
        reestimate_bn(nets.DenseNet(), batches)


@pytest.mark.parametrize("name", ["estimator", "layers", "statistics"])
def test_misspelt_choices(name: str) -> None:
    with pytest.raises(UsageError, match=f"{name}='al'"):
        reestimate_bn(nets.DenseNet(), nets.batches((3, 8, 8)), **{name: "al"})


def test_a_variance_that_half_precision_cannot_hold() -> None:
    model = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(3)).half()
    before = model[1].running_var.clone()
    with pytest.raises(ModelError, match=r"1: .*float16"):
        reestimate_bn(model, [torch.randn(64, 3).half() * 1000])
    assert torch.equal(model[1].running_var, before)


def test_one_sample_proves_nothing_about_the_data() -> None:
    model, data = case("densenet")
    assert reestimate_bn(model, [data[0][:1] * 50]).controls.verdict == "none"


def test_controls_notice_a_shift() -> None:
    """Another --mean moves the inputs and leaves the variance of the first layer alone."""
    data = nets.batches((6,))
    model = nn.Sequential(nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.3), nn.Linear(6, 6), nn.BatchNorm1d(6))
    nets.trained(model, data)
    assert reestimate_bn(copy.deepcopy(model), data).controls.verdict == "agree"
    with pytest.raises(CheckFailed, match="standard deviations"):
        reestimate_bn(model, [batch + 3 for batch in data], estimator="pooled")


def test_detection_batches_count_their_images() -> None:
    class Detector(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm2d(3)

        def forward(self, images: list[torch.Tensor]) -> torch.Tensor:
            return self.bn(nn.functional.dropout(torch.stack(images), 0.2, self.training))

    batches = [(list(batch), ["targets"]) for batch in nets.batches((3, 8, 8))]
    assert reestimate_bn(Detector(), batches).images == 128


def test_a_batch_that_only_forward_understands() -> None:
    class Graph:
        def __init__(self, x: torch.Tensor) -> None:
            self.x = x

    model, data = case("densenet")
    again = copy.deepcopy(model)
    reestimate_bn(model, [Graph(batch) for batch in data], forward=lambda model, graph: model(graph.x))
    reestimate_bn(again, data)
    torch.testing.assert_close(model.norm.running_var, again.norm.running_var)  # another layout in memory


def test_models_made_in_inference_mode() -> None:
    with torch.inference_mode():
        model = nets.mlp()
    before = model[5].running_var.clone()
    reestimate_bn(model, nets.batches((10,)))
    assert not torch.equal(model[5].running_var, before)


def test_an_error_of_any_kind_in_a_batch() -> None:
    model, data = case("densenet")
    with pytest.raises(ModelError, match="batch 1"):
        reestimate_bn(model, [data[0], data[1][0, 0]])


def test_layers_that_share_their_variance_are_one() -> None:
    model = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(4), nn.Linear(4, 4), nn.BatchNorm1d(4))
    model[3].running_var = model[1].running_var
    result = reestimate_bn(model, nets.batches((4,)))
    assert [layer.name for layer in result.rewritten] == ["1"]
    assert not result.left_alone
