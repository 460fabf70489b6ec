"""`scripts/run bench evidence`: its nets learn, finished cells are skipped, and its summary is right."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from scipy import stats

import ckpt_tools
from bench import refusals
from bench.evidence import command, continued_nets, net_training, summary
from bench.evidence.augmentations import TRAININGS
from bench.evidence.cell_records import Cell, Measurement, Record, read_records
from bench.evidence.cells import AUTO, BASE, IDEAL, POOLED, WAYS, measure
from bench.evidence.correction_inputs import NO_DATA, PLAIN, probe_inputs, training_inputs
from bench.evidence.net_training import Training
from bench.evidence.report import render_report
from bench.evidence.small_nets import NETS

# The differences between the seeds of a made-up condition; their mean is 0.
NOISE = (-0.02, -0.01, 0.0, 0.01, 0.02)


def make_records(net: str, augmentation: str, nll_changes: dict[tuple[str, str], float]) -> list[Record]:
    """Five seeds of a condition, with the mean change of the NLL for every correction of the bars."""
    records = []
    for seed, noise in enumerate(NOISE):
        measurements = {BASE: Measurement(10.0 + seed, 0.5 + 0.1 * seed)}
        for place, (way, change) in enumerate(nll_changes.items()):
            nll = 0.5 + 0.1 * seed + change + noise * (-1) ** place / 10
            measurements[way] = Measurement(10.0 + seed + 10 * change, nll, "ratio")
        records.append(Record(Cell("digits", net, augmentation, "final", seed), measurements))
    return records


def make_changes(ideal: float, plain: float, auto: float, no_data: float) -> dict[tuple[str, str], float]:
    return {IDEAL: ideal, (POOLED, PLAIN): plain, (AUTO, PLAIN): auto, (AUTO, NO_DATA): no_data}


@pytest.mark.parametrize("net", NETS)
def test_dropout_reaches_the_bn_layers_of_every_net(net):
    for channels in (1, 3):
        model = NETS[net].build(NETS[net].drop_rate, channels).eval()
        layers = ckpt_tools.walk(model, torch.zeros(2, channels, 8, 8)).batch_norms
        assert any(layer.downstream_of for layer in layers)
        assert model(torch.zeros(3, channels, 8, 8)).shape == (3, 10)


@pytest.mark.parametrize("augmentation", TRAININGS)
def test_inputs_are_normalised_images_of_one_shape(augmentation):
    training = Training("digits", "mlp", augmentation, 0)
    data = training.load_images()
    inputs = training_inputs(training, data) | probe_inputs(training, data)
    assert {tuple(batch.shape[1:]) for batches in inputs.values() for batch in batches} == {data.shape}
    assert sum(map(len, inputs["as in training"])) == 4 * sum(map(len, inputs[PLAIN])) == 2400
    assert len(torch.cat(inputs["32 plain"])) == 32
    plain = torch.cat(inputs[PLAIN])
    assert abs(float(plain.mean())) < 0.1
    assert abs(float(plain.std()) - 1) < 0.1
    assert torch.equal(torch.cat(training_inputs(training, data)[PLAIN]), plain)


def test_a_training_is_kept_and_repeatable(tmp_path, monkeypatch):
    training = Training("digits", "mlp", "mixup 0.8", 0)
    monkeypatch.setitem(net_training.NETS, "mlp", replace(NETS["mlp"], epochs=2))
    models = net_training.load_or_train(training, tmp_path)
    monkeypatch.setattr(net_training, "train", None)  # a second training would fail
    again = net_training.load_or_train(training, tmp_path)
    for moment, model in models.items():
        assert not model.training
        for key, value in model.state_dict().items():
            assert torch.equal(value, again[moment].state_dict()[key])
    weights = [model.state_dict()["1.weight"] for model in models.values()]
    assert not torch.equal(*weights)


@pytest.mark.parametrize("augmentation", ["none", "random greyscale"])
def test_wrong_inputs_are_unlike_the_right_ones(augmentation):
    training = Training("digits", "mlp", augmentation, 0)
    data = training.load_images()
    inputs = training_inputs(training, data)
    plain = torch.cat(inputs[PLAIN])
    for _, kind in WAYS["wrong"]:
        wrong = torch.cat(inputs[kind])
        assert wrong.shape == plain.shape
        assert not torch.allclose(wrong, plain, atol=0.1)
    assert float(torch.cat(inputs["0–255"]).max()) == pytest.approx(255)
    assert float(torch.cat(inputs["no normalisation"]).min()) >= 0


def test_continued_nets_differ_from_each_other(tmp_path, monkeypatch):
    monkeypatch.setitem(net_training.NETS, "mlp", replace(NETS["mlp"], epochs=2))
    monkeypatch.setattr(continued_nets, "EPOCHS", 1)
    training = Training("digits", "mlp", "none", 0)
    nets = continued_nets.continue_training(training, tmp_path)
    assert list(nets) == ["SWA", "EMA .99", "EMA .999", "frozen", "merged", "pruned"]
    assert not any(module.training for net in nets.values() for module in net.modules())
    weights = [net[1].weight for net in nets.values()]
    assert not any(torch.equal(one, other) for one, other in itertools.combinations(weights, 2))
    # Averages keep the statistics of the last step, as frozen and pruned nets do.
    variances = [nets[kind][2].running_var for kind in ("SWA", "EMA .99", "EMA .999", "frozen", "pruned")]
    assert all(torch.equal(variance, variances[0]) for variance in variances)
    assert not torch.equal(nets["merged"][2].running_var, variances[0])
    zeros = [
        float((module.weight == 0).double().mean()) for module in nets["pruned"] if hasattr(module, "weight")
    ]
    assert max(zeros) > 0.3


def test_refusals_are_counted_by_kind_of_data(tmp_path, monkeypatch):
    monkeypatch.setitem(net_training.NETS, "mlp", replace(NETS["mlp"], epochs=2))
    monkeypatch.setattr(continued_nets, "EPOCHS", 1)
    counts = list(refusals.count_refusals(tmp_path, 1, 3, "mlp-none"))
    right = [verdicts for _, kind, verdicts in counts if kind.startswith("right")]
    assert [verdicts.total() for verdicts in right] == [3] * 8
    wrong = {kind: verdicts for _, kind, verdicts in counts if not kind.startswith("right")}
    assert set(wrong) == {"no normalisation", "0–255", "another data set"}
    assert all(verdicts.total() == 2 for verdicts in wrong.values())


def test_finished_cells_are_skipped(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(net_training.NETS, "mlp", replace(NETS["mlp"], epochs=1))
    training, out = Training("digits", "mlp", "none", 0), tmp_path / "records.jsonl"
    command.run_cells([training], "final", (BASE,), tmp_path, out)
    command.run_cells([training], "final", (BASE, (POOLED, PLAIN)), tmp_path, out)
    (record,) = read_records(out).values()
    assert set(record.measurements) == {BASE, (POOLED, PLAIN)}
    monkeypatch.setattr(command, "measure", None)
    command.run_cells([training], "final", (BASE, (POOLED, PLAIN)), tmp_path, out)
    assert read_records(out) == {record.cell: record}
    assert capsys.readouterr().out.count("mlp, none, final, seed 0") == 2


def test_measurements_leave_the_net_as_it_is(tmp_path, monkeypatch):
    monkeypatch.setitem(net_training.NETS, "mlp", replace(NETS["mlp"], epochs=1))
    training = Training("digits", "mlp", "none", 0)
    model = net_training.load_or_train(training, tmp_path)["final"]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    record = measure(Cell.at(training, "final"), training, model, (BASE, IDEAL, (AUTO, PLAIN)))
    assert record.measurements[BASE].nll != record.measurements[IDEAL].nll
    assert record.measurements[AUTO, PLAIN].estimator in ("pooled", "ratio")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_changes_are_paired_by_seed():
    records = make_records("mlp", "none", make_changes(-0.1, -0.1, -0.05, 0.0))
    ((condition, group),) = summary.group_records(reversed(records), WAYS["bars"]).items()
    assert str(condition) == "mlp, none, final"
    change = summary.compare(group, IDEAL, BASE, "NLL")
    assert change.mean == pytest.approx(-0.1)
    assert change.standard_error == pytest.approx(math.sqrt(0.001 / 4 / 5) / 10)
    expected = stats.ttest_1samp(change.differences, 0, alternative="less").pvalue
    assert change.p_value(greater=False) == pytest.approx(expected)


def test_a_difference_in_the_last_digit_is_not_significant():
    assert summary.PairedChange((1e-5,) * 5).p_value(greater=True) > 0.2
    assert summary.PairedChange((0.0,) * 5).p_value(greater=True) == 0.5
    assert summary.PairedChange((0.01,) * 5).p_value(greater=True) < 1e-6


def test_holm_adjustment_is_that_of_the_textbook():
    assert summary.adjust_p_values([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert summary.adjust_p_values([0.9, 0.8]) == [1, 1]


def test_a_worse_condition_and_a_loss_are_named():
    records = [
        *make_records("mlp", "none", make_changes(-0.1, -0.1, -0.1, -0.08)),
        *make_records("wrn", "mixup 0.8", make_changes(-0.1, 0.1, 0.2, 0.05)),
    ]
    groups = summary.group_records(records, WAYS["bars"])
    (worse,) = summary.find_worse(groups, (AUTO, PLAIN), IDEAL, "NLL")
    assert worse.condition.net == "wrn"
    assert worse.change.mean == pytest.approx(0.3)
    assert worse.adjusted == pytest.approx(2 * worse.p_value)
    (loss,) = summary.find_losses(groups, (AUTO, NO_DATA))
    assert loss.net == "wrn"
    kept = summary.measure_kept_gain(groups, (AUTO, NO_DATA))
    assert (kept.reference, kept.kept) == pytest.approx((0.2, 0.03))
    against_pooled = summary.average_conditions(groups, (AUTO, PLAIN), (POOLED, PLAIN), "NLL")
    assert against_pooled.mean == pytest.approx(0.05)


def test_the_report_says_which_bars_are_broken():
    good = make_records("mlp", "mixup 0.8", make_changes(-0.1, -0.05, -0.1, -0.09))
    report = render_report(good)
    assert "BROKEN" not in report
    assert "| mlp | mixup 0.8 | 5 |" in report
    assert "without data 90 % of the gain" in report
    report = render_report(good + make_records("wrn", "none", make_changes(-0.1, -0.1, -0.1, 0.1)))
    assert report.count("BROKEN") == 2
    assert "    wrn, none, final: NLL +0.100" in report
