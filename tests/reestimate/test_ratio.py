"""The paired measurement: stored · V_off / V_on, with inputs of any kind."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ckpt_tools
from ckpt_tools import reestimate_bn
from ckpt_tools.errors import NothingToDo, UsageError
from ckpt_tools.observation.evidence import Evidence, merge_all
from ckpt_tools.reestimate.shares import pack_evidence, unpack_evidence


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Net(nn.Module):
    """Convolution, BN, dropout, convolution, BN, classes."""

    def __init__(self, rate: float = 0.3) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(rate),
            nn.Conv2d(8, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).mean((2, 3)))


def settled(model: nn.Module, x: Tensor, steps: int = 200) -> nn.Module:
    """The model with the statistics that a training with these inputs leaves, all of them averaged."""
    norms = [m for m in model.modules() if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d))]
    for norm in norms:
        norm.momentum = None
    model.train()
    with torch.no_grad():
        for _ in range(steps):
            model(x)
    for norm in norms:
        norm.momentum = 0.1
    return model.eval()


def have_equal_variances(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(variances(one).values(), variances(other).values(), strict=True)
    return all(torch.equal(mine, theirs) for mine, theirs in pairs)


def variances(model: nn.Module) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in model.state_dict().items() if name.endswith("running_var")}


def test_dropout_in_front_of_bn_is_taken_out_as_the_formula_says() -> None:
    """Inverted dropout turns E[x²] into E[x²]/(1 − p) and keeps E[x] (Srivastava et al. 2014, section 10)."""
    torch.manual_seed(0)
    x, rate = normal(4096, 6) * torch.arange(1, 7) + torch.arange(6), 0.3
    model = settled(nn.Sequential(nn.Dropout(rate), nn.BatchNorm1d(6)), x)
    stored = model[1].running_var.numpy().copy()
    result = reestimate_bn(model, list(x.split(512)), estimator="ratio")
    values = x.double().numpy()
    expected = stored * values.var(0) / ((values**2).mean(0) / (1 - rate) - values.mean(0) ** 2)
    np.testing.assert_allclose(model[1].running_var, expected, rtol=0.02)
    assert result.estimator == "ratio"
    assert result.layers[0].dropout_shift is not None
    assert result.layers[0].dropout_shift.low > 1


def sweep(model: nn.Module, batches: list[Tensor], dropout: bool, repeats: int) -> dict[str, Tensor]:
    """The oracle: PyTorch's own training mode, which averages batch variances with momentum None."""
    model = copy.deepcopy(model).train(dropout)
    norms = {name: m for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}
    for norm in norms.values():
        norm.train()
        norm.momentum = None
        norm.reset_running_stats()
    with torch.no_grad():
        for _ in range(repeats):
            for batch in batches:
                model(batch)
    return {f"{name}.running_var": norm.running_var for name, norm in norms.items()}


def random_images(x: Tensor) -> Tensor:
    return normal(*x.shape, seed=5)


@pytest.mark.parametrize(
    "change", [lambda x: x, lambda x: 0.5 * x + 0.3, random_images], ids=["right", "wrong", "noise"]
)
def test_the_inputs_cancel(change) -> None:
    """The correction is that of the right inputs, and that of a sweep in PyTorch's training mode."""
    torch.manual_seed(1)
    x = F.avg_pool2d(normal(512, 1, 12, 12), 3, 1, 1) * 3
    model = settled(Net(), x)
    stored = variances(model)
    inputs = change(x)
    corrected = copy.deepcopy(model)
    reestimate_bn(corrected, list(inputs.split(128)), estimator="ratio")
    new = variances(corrected)
    assert torch.equal(new["features.1.running_var"], stored["features.1.running_var"])  # before dropout
    on, off = (sweep(model, list(inputs.split(128)), dropout, 12) for dropout in (True, False))
    key = "features.5.running_var"
    torch.testing.assert_close(new[key], stored[key] * off[key] / on[key], rtol=0.02, atol=0)
    right = copy.deepcopy(model)
    reestimate_bn(right, list(x.split(128)), estimator="pooled")
    paper = variances(right)[key]
    assert (new[key] / paper).log().abs().mean() < 0.5 * (stored[key] / paper).log().abs().mean()


def test_auto_takes_the_paper_on_matching_data_and_the_ratio_otherwise() -> None:
    torch.manual_seed(2)
    x = normal(600, 1, 8, 8)
    model = settled(Net(), x)
    batches = list(x.split(100))
    automatic, paper = copy.deepcopy(model), copy.deepcopy(model)
    result = reestimate_bn(automatic, batches)
    assert result.estimator == "pooled"
    assert result.verdict is not None
    assert result.verdict.level == "agree"
    assert "nothing speaks against the data" in result.estimator_reason
    reestimate_bn(paper, batches, estimator="pooled")
    assert all(
        torch.equal(a, b)
        for a, b in zip(variances(automatic).values(), variances(paper).values(), strict=True)
    )
    other = reestimate_bn(copy.deepcopy(model), [2 * batch + 1 for batch in batches])
    assert other.estimator == "ratio"
    assert other.verdict is not None
    assert other.verdict.level == "doubt"
    assert all(layer.mismatch is not None for layer in other.layers)


def test_no_data_is_needed() -> None:
    torch.manual_seed(3)
    model = settled(Net(), normal(512, 1, 12, 12))
    stored = variances(model)
    result = reestimate_bn(model, input_shape=(1, 12, 12))
    assert result.estimator == "ratio"
    assert result.verdict is None
    assert not torch.equal(variances(model)["features.5.running_var"], stored["features.5.running_var"])
    with pytest.raises(UsageError, match="pooled"):
        reestimate_bn(model, estimator="pooled", input_shape=(1, 12, 12))
    state = ckpt_tools.corrected_state_dict(model, input_shape=(1, 12, 12))
    assert not torch.equal(state["features.5.running_var"], variances(model)["features.5.running_var"])


def test_a_one_shot_iterator_is_enough_for_auto() -> None:
    torch.manual_seed(4)
    x = normal(1200, 1, 8, 8)
    model = settled(Net(), x[:600])
    once, again = copy.deepcopy(model), copy.deepcopy(model)
    result = reestimate_bn(once, iter(x.split(100)))
    assert result.images == 1200
    reestimate_bn(again, list(x.split(100)))
    assert all(
        torch.equal(a, b) for a, b in zip(variances(once).values(), variances(again).values(), strict=True)
    )


def test_the_model_and_the_generators_come_back() -> None:
    model = settled(Net(), normal(256, 1, 8, 8))
    model.features[3].train()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    flags = [module.training for module in model.modules()]
    torch.manual_seed(9)
    expected = torch.rand(3)
    torch.manual_seed(9)
    reestimate_bn(model, [normal(256, 1, 8, 8)], estimator="ratio")
    assert torch.equal(torch.rand(3), expected)
    assert [module.training for module in model.modules()] == flags
    changed = {name for name, t in model.state_dict().items() if not torch.equal(t, before[name])}
    assert changed == {"features.5.running_var"}


def test_frozen_layers_stay_as_they_are() -> None:
    class Frozen(Net):
        def train(self, mode: bool = True) -> nn.Module:
            super().train(mode)
            self.features[5].eval()
            return self

    model = settled(Frozen(), normal(256, 1, 8, 8))
    with pytest.raises(NothingToDo, match="frozen"):
        reestimate_bn(model, [normal(256, 1, 8, 8)], estimator="ratio")


def test_dead_channels_keep_what_they_have() -> None:
    model = settled(Net(), normal(256, 1, 8, 8))
    with torch.no_grad():
        model.features[4].weight[3] = 0
        model.features[4].bias[3] = 0
    stored = variances(model)["features.5.running_var"]
    reestimate_bn(model, [normal(256, 1, 8, 8)], estimator="ratio")
    new = variances(model)["features.5.running_var"]
    assert new[3] == stored[3]
    assert (new != stored).sum() == 11
    assert bool(new.isfinite().all())


def test_without_noise_there_is_nothing_to_do() -> None:
    model = settled(Net(0.3), normal(256, 1, 8, 8))
    walk = ckpt_tools.walk(model, normal(2, 1, 8, 8))
    model.features[3].p = 0.0
    with pytest.raises(NothingToDo, match="no noise"):
        reestimate_bn(model, [normal(256, 1, 8, 8)], estimator="ratio", walk=walk)


def test_a_tolerance_ends_the_measurement_and_the_error_holds() -> None:
    x = normal(4000, 1, 8, 8)
    model = settled(Net(), x[:500])
    result = reestimate_bn(copy.deepcopy(model), list(x.split(50)), estimator="ratio", tolerance=0.05)
    assert result.stopped_early
    assert 128 <= result.images < 4000
    assert max(layer.error.median for layer in result.rewritten if layer.error) <= 0.05


def test_an_outlier_is_left_out_of_both_conditions() -> None:
    x = normal(400, 1, 8, 8)
    model = settled(Net(), x)
    spoiled = x.clone()
    spoiled[7] *= 300
    clean, dirty = copy.deepcopy(model), copy.deepcopy(model)
    kept = [row for row in range(400) if row != 7]
    reestimate_bn(clean, [x[kept]], estimator="ratio")
    result = reestimate_bn(dirty, [spoiled], estimator="ratio", rows_are_samples=True)
    assert [outlier.name for outlier in result.outliers] == ["sample 7 of batch 0"]
    torch.testing.assert_close(
        variances(dirty)["features.5.running_var"],
        variances(clean)["features.5.running_var"],
        rtol=0.02,
        atol=0,
    )


def test_statistics_that_are_replaced_do_not_judge_the_data() -> None:
    model = settled(Net(), normal(256, 1, 8, 8))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.zero_()
            module.running_var.fill_(1)
    result = reestimate_bn(model, [5 * normal(256, 1, 8, 8) + 3], statistics="mean+variance")
    assert len(result.rewritten) == 2


def test_paired_evidence_is_exchanged_without_loss() -> None:
    def evidence(seed: int) -> Evidence:
        from ckpt_tools.moments import Clusters, batch_moments

        x, zero = normal(8, 3, 4, seed=seed), torch.zeros(3, dtype=torch.float64)
        test, training = batch_moments(x, zero, 8), batch_moments(x + normal(8, 3, 4, seed=seed + 9), zero, 8)
        sums = torch.cat([test.sums, training.sums])
        return Evidence(
            test.moments, Clusters.of(sums), Clusters.of(sums.sum(1, keepdim=True)), training.moments
        )

    parts = [evidence(0), None, evidence(1)]
    back = unpack_evidence(pack_evidence(parts, [3, 2, 3], paired=True), [3, 2, 3], paired=True)
    assert back[1] is None
    one, other = merge_all(parts), merge_all(back)
    assert one is not None
    assert other is not None
    zero = torch.zeros(3, dtype=torch.float64)
    assert torch.equal(one.relative_error(zero), other.relative_error(zero))
    assert other.training is not None
