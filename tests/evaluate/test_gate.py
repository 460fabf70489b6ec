"""The gate's little language: it says what Python's arithmetic says, and what it cannot say is refused."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckpt_tools.errors import UsageError
from ckpt_tools.evaluate.gate import parse_gate

BEFORE = {"error": 8.0, "error5": 1.5, "nll": 0.25, "ece": 3.0}
AFTER = {"error": 4.0, "error5": 0.5, "nll": 0.125, "ece": 2.0}


def passes(text: str, before: dict[str, float] = BEFORE, after: dict[str, float] = AFTER) -> bool:
    return not parse_gate(text).failures(before, after)


@pytest.mark.parametrize(
    ("text", "holds"),
    [
        ("error <= before + 0.1", True),
        ("error<=4", True),
        ("error < 4", False),
        ("error >= 4", True),
        ("error > 4", False),
        ("nll <= before * 0.5", True),
        ("nll <= 0.5 * before - 1e-3", False),
        ("ece <= before.nll + 2", True),
        ("ece <= 2*(before.error - before) - 8.5", False),
        ("error <= before and nll <= before and ece <= before and error5 <= before", True),
        ("error <= before and ece <= 1", False),
        ("ece > -before + - - 1", True),
        ("  error\t<=  .5e1 ", True),
    ],
)
def test_what_it_says(text: str, holds: bool) -> None:
    assert passes(text) is holds


@pytest.mark.parametrize("error", [5.1, 0.3, 0.7, 12.6])
def test_rounding_of_floats_decides_nothing(error: float) -> None:
    before = {"error": error - 0.1}
    for value in (error - 1e-13, error, error + 1e-13):
        assert passes("error <= before + 0.1", before, {"error": value})
        assert not passes("error < before + 0.1", before, {"error": value})
    assert not passes("error <= before + 0.1", before, {"error": error + 1e-6})


sums = st.recursive(
    st.one_of(
        st.sampled_from(["before", *(f"before.{name}" for name in BEFORE)]),
        st.decimals(0, 99, places=2).map(str),
    ),
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from("+-*"), inner).map(" ".join),
        inner.map("({})".format),
        inner.map("-{}".format),
    ),
    max_leaves=12,
)


@given(metric=st.sampled_from(sorted(BEFORE)), comparison=st.sampled_from(["<=", ">=", "<", ">"]), bound=sums)
def test_python_reads_it_alike(metric: str, comparison: str, bound: str) -> None:
    class Before(float):
        pass

    before = Before(BEFORE[metric])
    vars(before).update(BEFORE)
    value = eval(bound, {"before": before})
    if abs(value - AFTER[metric]) > 1e-6 * max(1, abs(value)):
        expected = eval(f"after {comparison} value", {"after": AFTER[metric], "value": value})
        assert passes(f"{metric} {comparison} {bound}") is expected


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "the end"),
        ("error", "the end"),
        ("error <=", "the end"),
        ("accuracy >= 90", "'accuracy' at character 1"),
        ("error == 4", "'=' at character 7"),
        ("error =< 4", "'='"),
        ("error <= before + ", "the end"),
        ("error <= before + 0.1%", "'%' at character 22"),
        ("error <= after", "'after'"),
        ("error <= nll", "'nll'"),
        ("error <= before.accuracy", "'before.accuracy'"),
        ("error <= before.", "'before.'"),
        ("error <= 4 or nll <= 1", "'or'"),
        ("error <= 4 and", "the end"),
        ("error <= (4", "a closing bracket"),
        ("error <= 4)", "')'"),
        ("error <= 4 / 2", "'/'"),
        ("error <= 2 ** 3", "'*'"),
        ("error <= 1e", "'e'"),
        ("__import__('os')", "'__import__'"),
        ("error <= " + "(" * 100 + "1", "inside each other"),
        ("error <= " + "+".join(["1"] * 5000), "at most 500"),
        ("error <= 1e400", "'1e400'"),
    ],
)
def test_what_does_not_parse(text: str, named: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_gate(text)
    assert named in str(caught.value)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("text", "error", "holds"),
    [
        ("error >= 1e200 * 1e200", 5.0, False),
        ("error <= 1e200 * 1e200", 5.0, True),
        ("error <= 0 - 1e200 * 1e200", 5.0, False),
        ("error <= 1e200 * 1e200 - 1e200 * 1e200", 5.0, False),
        ("error <= 100", math.nan, False),
        ("error >= 0", math.nan, False),
        ("error <= 1000", math.inf, False),
        ("error < 1e200 * 1e200", math.inf, False),
    ],
)
def test_what_is_not_finite_is_compared_all_the_same(text: str, error: float, holds: bool) -> None:
    assert passes(text, after={**AFTER, "error": error}) is holds


def test_failures_tell_the_numbers() -> None:
    (told,) = parse_gate("error <= 5 and nll < before.nll * 0.5 and ece <= 9").failures(BEFORE, AFTER)
    assert told == "nll < before.nll * 0.5: nll is 0.125, the bound 0.125, nll before 0.25"


def test_what_a_gate_needs() -> None:
    assert not parse_gate("error <= 5 and ece <= 3").needs_before
    assert parse_gate("error <= 5 and ece <= before").needs_before
    gate = parse_gate("error <= 3 and ece <= before.error5")
    assert gate.metrics == {"error", "ece", "error5"}
