"""`scripts/run bench rates`: recorded nets are skipped, and its bars count what they say."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bench import rate_recovery
from bench.evidence import net_training
from bench.evidence.small_nets import NETS
from bench.rate_recovery import Recovery, TrainingAtRate, judge, list_trainings, render_report

EXACT = Recovery("wrn", "none", 0.3, 0, estimate=0.3, error=0.005, is_clear=True)


@pytest.mark.parametrize(
    ("augmentation", "estimate", "is_close"),
    [
        ("none", 0.33, True),
        ("none", 0.27, True),
        ("none", 0.335, False),
        ("shift and zoom", 0.37, True),
        ("shift and zoom", 0.225, False),
    ],
)
def test_the_tolerance_depends_on_the_augmentation(augmentation, estimate, is_close):
    assert replace(EXACT, augmentation=augmentation, estimate=estimate).is_close == is_close


def test_nine_of_ten_pass():
    wrong = replace(EXACT, estimate=0.4)
    assert judge([EXACT] * 9 + [wrong]).is_passed
    assert not judge([EXACT] * 8 + [wrong] * 2).is_passed
    assert str(judge([EXACT] * 8 + [wrong] * 2)) == "8 of 10 (80 %)"


def test_unclear_answers_are_counted_apart():
    wrong_but_unclear = replace(EXACT, seed=1, estimate=0.2, error=0.08, is_clear=False)
    report = render_report([wrong_but_unclear, EXACT])
    assert "| wrn | none | 0.3 | 0.300 ± 0.005 | unknown (0.200 ± 0.080) |" in report
    assert "passed: 1 of 1 (100 %) of the clear answers are within 0.03" in report
    assert "1 of 2 (50 %) with the unclear ones, of which there are 1" in report
    assert "BROKEN: 0 of 1" in render_report([replace(wrong_but_unclear, is_clear=True)])


def test_every_training_has_its_own_file():
    trainings = list(list_trainings(2))
    assert len({training.file_name for training in trainings}) == len(trainings) == 60
    assert all(training.small_net.drop_rate == training.drop_rate for training in trainings)


def test_recorded_nets_are_skipped(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(net_training.NETS, "wrn", replace(NETS["wrn"], epochs=4))
    training, out = TrainingAtRate("digits", "wrn", "none", 0, 0.3), tmp_path / "records.json"
    rate_recovery.measure_trainings([training], tmp_path, out)
    monkeypatch.setattr(rate_recovery, "recover_rate", None)  # a second fit would fail
    rate_recovery.measure_trainings([training], tmp_path, out)
    (recovery,) = rate_recovery.read_recoveries(out)
    assert (recovery.net, recovery.truth) == ("wrn", 0.3)
    assert 0.1 < recovery.estimate < 0.5
    assert capsys.readouterr().out.count("rate0.3-digits-wrn-none-seed0.pt") == 1
