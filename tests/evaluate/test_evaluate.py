"""Metrics, their errors and the temperature against scikit-learn, scipy and brute force."""

from __future__ import annotations

import importlib.util

import nets
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ckpt_tools.errors import CkptToolsError, DataError, ModelError
from ckpt_tools.evaluate.classifier import Evaluation, evaluate
from ckpt_tools.evaluate.metrics import changes, measure, per_image, require_torchmetrics
from ckpt_tools.evaluate.outcomes import Outcomes
from ckpt_tools.evaluate.temperature import HIGHEST, LOWEST, calibrate, fit_temperature


def classified(count: int = 400, classes: int = 8, heat: float = 2.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits of an overconfident classifier (by the factor ``heat``); labels drawn from the honest one."""
    generator = torch.Generator().manual_seed(seed)
    honest = torch.randn(count, classes, generator=generator) * 2
    labels = torch.multinomial(honest.softmax(1), 1, generator=generator)[:, 0]
    return honest * heat, labels


def test_metrics_are_those_of_scikit_learn_and_torchmetrics() -> None:
    from sklearn.metrics import accuracy_score, log_loss, top_k_accuracy_score
    from torchmetrics.classification import MulticlassCalibrationError

    logits, labels = classified()
    found = measure(Outcomes.of(logits, labels))
    p = logits.double().softmax(1).numpy()
    every = range(8)
    assert found["error"].value == pytest.approx(100 * (1 - accuracy_score(labels, p.argmax(1))))
    assert found["error5"].value == pytest.approx(
        100 * (1 - top_k_accuracy_score(labels, p, k=5, labels=every))
    )
    assert found["nll"].value == pytest.approx(log_loss(labels, p, labels=every))
    metric = MulticlassCalibrationError(8, n_bins=15, norm="l1")
    metric.update(torch.from_numpy(p), labels)
    assert found["ece"].value == pytest.approx(100 * float(metric.compute()), rel=1e-5)
    share = found["error"].value / 100
    assert found["error"].error == pytest.approx(100 * np.sqrt(share * (1 - share) / 399))


def test_the_standard_error_of_ece_is_the_jackknifes() -> None:
    from torchmetrics.functional.classification import binary_calibration_error

    now, labels = classified(80)
    was, _ = classified(80, seed=1)
    before, after = Outcomes.of(was, labels), Outcomes.of(now, labels)

    def without(outcomes: Outcomes) -> np.ndarray:
        rest = [torch.arange(80) != image for image in range(80)]
        return np.array(
            [
                100 * binary_calibration_error(outcomes.confidence[r], outcomes.correct[r].long()).item()
                for r in rest
            ]
        )

    def jackknife(values: np.ndarray) -> float:
        return float(np.sqrt(79 / 80 * ((values - values.mean()) ** 2).sum()))

    assert measure(after)["ece"].error == pytest.approx(jackknife(without(after)), rel=1e-4)
    assert changes(before, after)["ece"].error == pytest.approx(
        jackknife(without(after) - without(before)), rel=1e-4
    )


def test_changes_are_paired() -> None:
    logits, labels = classified()
    closer = logits + 0.1 * torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
    before, after = Outcomes.of(logits, labels), Outcomes.of(closer, labels)
    found = changes(before, after)
    difference = (after.nll - before.nll).numpy()
    assert found["nll"].value == pytest.approx(difference.mean())
    assert found["nll"].error == pytest.approx(difference.std(ddof=1) / np.sqrt(400))
    assert found["nll"].error < measure(after)["nll"].error / 5
    same = changes(before, before)
    assert all(one.value == one.error == 0 for one in same.values())


def test_small_heads_have_no_top_five_and_one_image_no_error() -> None:
    logits, labels = classified(classes=5)
    assert set(per_image(Outcomes.of(logits, labels))) == {"error", "nll", "ece"}
    assert measure(Outcomes.of(logits[:1], labels[:1]))["nll"].error == float("inf")


def test_a_constant_network_is_not_always_right() -> None:
    found = measure(Outcomes.of(torch.zeros(70, 7), torch.arange(70) % 7))
    assert found["error"].value == pytest.approx(100 * 6 / 7)
    assert found["error5"].value == pytest.approx(100 * 2 / 7)
    assert found["nll"].value == pytest.approx(np.log(7))
    assert found["ece"].value == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("heat", [0.1, 0.7, 1.0, 3.0, 25.0])
def test_the_temperature_is_scipys(heat: float) -> None:
    from scipy.optimize import minimize_scalar
    from scipy.special import log_softmax

    logits, labels = classified(heat=heat)

    def nll(log_t: float) -> float:
        return -log_softmax(logits.double().numpy() / np.exp(log_t), 1)[np.arange(400), labels].mean()

    best = minimize_scalar(nll, bounds=(-4.6, 4.6), method="bounded", options={"xatol": 1e-9})
    assert fit_temperature(logits, labels) == pytest.approx(np.exp(best.x), rel=1e-5)
    assert fit_temperature(logits * 1e-3 + 500, labels) == pytest.approx(
        max(np.exp(best.x) * 1e-3, LOWEST), rel=1e-3
    )


def test_temperatures_end_somewhere() -> None:
    logits, _ = classified(heat=1.0)
    assert fit_temperature(logits, logits.argmax(1)) == LOWEST
    assert fit_temperature(logits, logits.argmin(1)) == HIGHEST
    assert LOWEST <= fit_temperature(torch.zeros(9, 3), torch.zeros(9, dtype=torch.int64)) <= HIGHEST


def test_calibration_judges_on_what_it_was_not_fitted_on() -> None:
    logits, labels = classified(401, heat=2.5)
    found = calibrate(logits, labels, seed=3)
    order = torch.randperm(401, generator=torch.Generator().manual_seed(3))
    temperature = torch.empty(401, dtype=torch.float64)
    temperature[order[:200]] = fit_temperature(logits[order[200:]], labels[order[200:]])
    temperature[order[200:]] = fit_temperature(logits[order[:200]], labels[order[:200]])
    wanted = Outcomes.of(logits.double() / temperature[:, None], labels)
    assert torch.allclose(found.held_out.nll, wanted.nll)
    assert torch.equal(found.held_out.correct, Outcomes.of(logits, labels).correct)
    assert found.temperature == pytest.approx(fit_temperature(logits, labels))
    assert measure(found.held_out)["ece"].value < measure(Outcomes.of(logits, labels))["ece"].value / 2
    with pytest.raises(DataError, match="two images"):
        calibrate(logits[:1], labels[:1])


def pairs(inputs: list[Tensor], classes: int = 5) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [(batch, torch.randint(classes, (len(batch),), generator=generator)) for batch in inputs]


def logits_of(model: nn.Module, data: list[tuple[Tensor, Tensor]]) -> Tensor:
    with torch.no_grad():
        return torch.cat([model.eval()(batch) for batch, _ in data])


def kept(model: nn.Module, data: list[tuple[Tensor, Tensor]]) -> Evaluation:
    return evaluate(model, data, keep_logits=True)


class Head(nn.Module):
    """Gives a net's logits in the shape that ``wrap`` makes of them."""

    def __init__(self, wrap) -> None:
        super().__init__()
        self.net, self.wrap = nets.DenseNet(), wrap

    def forward(self, x: Tensor) -> object:
        return self.wrap(self.net(x))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda z: z,
        lambda z: (z, None),
        lambda z: {"loss": None, "logits": z},
        lambda z: z[:, :, None, None],
        lambda z: z.softmax(1),
    ],
)
def test_every_shape_of_logits(wrap) -> None:
    model, data = Head(wrap), pairs(nets.batches((3, 8, 8)))
    found = kept(model, data)
    assert torch.allclose(found.logits.softmax(1), logits_of(model.net, data).softmax(1), atol=1e-5)
    assert torch.equal(found.labels, torch.cat([labels for _, labels in data]))
    assert (found.classes, len(found.outcomes)) == (5, 128)


@pytest.mark.parametrize(
    ("wrap", "said"),
    [
        (lambda z: z.mean(), r"shape \(\)"),
        (lambda z: z[:, :1], r"shape \(32, 1\)"),
        (lambda z: [z, z][0][:, :, None, None].expand(-1, -1, 2, 2), r"shape \(32, 5, 2, 2\)"),
        (lambda z: {"boxes": z}, "dict"),
        (lambda z: z * float("nan"), "NaN"),
        (lambda z: z[:7], "32 labels"),
    ],
)
def test_what_is_no_classifier(wrap, said: str) -> None:
    with pytest.raises(ModelError, match=said):
        evaluate(Head(wrap), pairs(nets.batches((3, 8, 8))))


def test_the_model_comes_back_as_it_came() -> None:
    model, data = nets.DenseNet(0.5).train(), pairs(nets.batches((3, 8, 8)))
    model.norms[1].eval()
    flags = [module.training for module in model.modules()]
    state = {key: value.clone() for key, value in model.state_dict().items()}
    random = torch.get_rng_state()
    found = kept(model, data)
    assert [module.training for module in model.modules()] == flags
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.allclose(found.logits, logits_of(model, data), atol=1e-5)
    assert not found.logits.requires_grad


def test_batches_for_which_memory_is_short_come_in_parts() -> None:
    def short(z: Tensor) -> Tensor:
        if len(z) > 10:
            raise RuntimeError("CUDA out of memory")
        return z

    model, data = Head(short), pairs(nets.batches((3, 8, 8)))
    assert torch.allclose(kept(model, data).logits, logits_of(model.net, data), atol=1e-5)


def test_no_images() -> None:
    with pytest.raises(DataError, match="no image"):
        evaluate(nets.DenseNet(), [])


def test_a_missing_torchmetrics_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CkptToolsError, match=r"pip install 'ckpt-tools\[evaluate\]'"):
        require_torchmetrics()
