"""What reports say of verdict, warnings and effect, and that no tick stands over layers that moved."""

from __future__ import annotations

import html
from typing import Any

import pytest
from report_facts import facts, records

from ckpt_tools.report.ci_summary import checkpoint_warnings, folder_warnings
from ckpt_tools.report.pages.checkpoint_page import checkpoint_page
from ckpt_tools.report.pages.html_page import checkpoint_html
from ckpt_tools.report.pages.markdown_page import checkpoint_markdown
from ckpt_tools.report.text.folder_text import folder_text

MEASURED = {"median": 1.31, "min": 1.1, "max": 1.6, "standard_error": 0.012}
REASON = "distance 0.133 from the stored statistics, expected 0.05 at most"


def paired(level: str = "agree", **more: Any) -> dict[str, Any]:
    """The facts of a run with a paired measurement."""
    found = facts()
    for layer in found["layers"]:
        layer |= {"mismatch": MEASURED, "dropout_shift": MEASURED}
    estimator = "pooled" if level == "agree" else "ratio"
    return found | {
        "estimator": estimator,
        "estimator_reason": "because of the data",
        "verdict": {"level": level, "reason": REASON, "score": 0.133, "limit": 0.05, "images": 512},
        "effect": {
            "images": 256,
            "changed": 0.125,
            "confidence_before": 0.46,
            "confidence_after": 0.58,
            "relative_change": 0.3,
        },
        "warnings": [],
        **more,
    }


def sections(found: dict[str, Any]) -> dict[str, Any]:
    return {section.title: section for section in checkpoint_page(found).sections}


def test_a_page_says_what_was_used_why_and_what_it_changes() -> None:
    page = sections(paired())
    assert page["Estimator"].sentences[0] == "pooled: because of the data."
    assert page["Data"].tone == page["Control layers"].tone == "good"
    assert REASON in page["Data"].sentences[0]
    assert dict(page["Effect on the outputs"].pairs)["Predictions that change"] == "12.5 %"
    table = page["Every layer"].table
    assert [column.title for column in table.columns[-2:]] == ["Mismatch", "Dropout shift"]
    assert table.rows[0][-1].text == "1.310 ± 0.012"


def test_facts_without_a_paired_measurement_have_no_empty_columns() -> None:
    page = sections(facts())
    assert not page.keys() & {"Estimator", "Effect on the outputs", "Warnings"}
    assert page["Every layer"].table.columns[-1].title == "Worst"


def test_no_tick_stands_over_layers_that_moved() -> None:
    found = paired("doubt")
    page = sections(found)
    assert (page["Data"].tone, page["Control layers"].tone) == ("doubt", "quiet")
    assert "agree" not in page["Control layers"].sentences[0]
    reason = "2 of 3 control layer(s) moved (worst: layer2.0.bn1, stored / measured variance 0.80 ± 0.02)"
    found["controls"] |= {"verdict": "doubt", "reason": reason, "worst_ratio": MEASURED, "worst_layer": "bn"}
    controls = sections(found)["Control layers"]
    assert (controls.tone, controls.sentences[0]) == ("doubt", f"{reason}.")
    assert "✅" not in checkpoint_markdown(found).partition("Control layers")[2].partition("##")[0]
    assert "✓" not in html.unescape(checkpoint_html(found))
    assert any(reason in warning for warning in checkpoint_warnings(found))
    assert any(REASON in warning for warning in checkpoint_warnings(found))


def test_what_speaks_against_the_data_is_shown() -> None:
    found = paired("agree")
    found["data"]["agreement"] |= {"verdict": "doubt", "cause": "the first layer is 0.13 off"}
    assert "the first layer is 0.13 off" in sections(found)["Data"].sentences[0]
    found["data"]["agreement"] |= {"verdict": "refuse", "cause": "these are values of 0–255"}
    assert sections(found)["Data"].tone == "bad"
    assert "forced" in checkpoint_page(found).headline
    found["estimator"] = "ratio"
    assert "forced" not in checkpoint_page(found).headline
    assert "does not depend on that" in sections(found)["Data"].sentences[0]


def test_warnings_come_first_and_are_loud() -> None:
    found = paired(warnings=["the correction changes 90% of the predictions"])
    page = checkpoint_page(found)
    assert page.tone == "bad"
    assert page.headline.startswith("Look at the warnings")
    assert page.sections[0].title == "Warnings"
    assert page.sections[0].sentences == ("The correction changes 90% of the predictions.",)
    assert "the correction changes 90% of the predictions" in checkpoint_warnings(found)
    rows = records()
    rows[0]["report"] = found
    assert "1 WARNING:" in folder_text(rows, "manifest.jsonl")
    assert any("90%" in warning for warning in folder_warnings(rows))


def test_inputs_that_were_made_up() -> None:
    found = paired("none", estimator="ratio", verdict=None)
    found["data"] |= {"kind": "synthetic", "agreement": {"verdict": "none", "cause": "there is no data"}}
    found["controls"] = {"names": [], "verdict": "none", "reason": "the inputs are synthetic"}
    assert "Effect on the outputs" not in sections(found)
    assert not [warning for warning in checkpoint_warnings(found) if "vouches" in warning]


@pytest.mark.parametrize("render", [checkpoint_html, checkpoint_markdown])
def test_a_dry_run_has_no_output(render: Any) -> None:
    assert "No checkpoint was written" in html.unescape(render(paired(output=None)).replace("\\", ""))
