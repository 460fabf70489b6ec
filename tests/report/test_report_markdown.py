"""Reports as Markdown: whole tables whatever the names are, no HTML but ours, the same facts as the page."""

from __future__ import annotations

import html
import itertools
import re

import pytest
from report_facts import HOSTILE, facts, records, with_metrics

from ckpt_tools.report.pages.checkpoint_page import checkpoint_page
from ckpt_tools.report.pages.folder_page import folder_page
from ckpt_tools.report.pages.markdown_page import checkpoint_markdown, escape_markdown, folder_markdown

TEXTS = {
    "one": lambda: checkpoint_markdown(with_metrics(facts())),
    "hostile": lambda: checkpoint_markdown(facts(names=HOSTILE, path=f"/runs/{HOSTILE[3]}")),
    "long": lambda: checkpoint_markdown(facts(layers=80)),
    "bare": lambda: checkpoint_markdown({}),
    "folder": lambda: folder_markdown(records()),
}


@pytest.fixture(params=TEXTS)
def text(request: pytest.FixtureRequest) -> str:
    return TEXTS[request.param]()


def cells(row: str) -> list[str]:
    """The cells of a row, as GitHub splits it: at pipes without a backslash."""
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]]


def read(cell: str) -> str:
    """What a reader sees of an escaped text."""
    return html.unescape(re.sub(r"\\([!-/:-@\[-`{-~])", r"\1", cell))


def tables(text: str) -> list[list[list[str]]]:
    lines = itertools.groupby(text.splitlines(), lambda line: line.startswith("|"))
    blocks = [list(block) for piped, block in lines if piped]
    return [[cells(line) for line in lines] for lines in blocks]


def test_every_table_is_whole(text: str) -> None:
    for table in tables(text):
        assert len({len(row) for row in table}) == 1
        assert all(re.fullmatch(r"-+:?", cell) for cell in table[1])


def test_no_html_but_ours(text: str) -> None:
    prose = re.sub(r"^(`{3,})sh\n.*?\n\1$", "", text, flags=re.DOTALL | re.MULTILINE)
    ours = {
        "<details>",
        "</details>",
        "<summary>",
        "</summary>",
        *re.findall("<!-- ckpt-tools .*? -->", prose[:60]),
    }
    assert set(re.findall(r"</?[a-z!][^>]*>", prose)) <= ours
    assert prose.count("<details>") == prose.count("</details>")


def test_secrets_stay_at_home(text: str) -> None:
    assert not re.search("hush|SEC/RET|KEY|me:pw|key=1", text)


@pytest.mark.parametrize(
    "name", [*HOSTILE[:4], "_a_b_", "1. a", "# a", "- a", "a\\", "x_y_z", "a`b``c", "&lt;"]
)
def test_escaping_is_read_back(name: str) -> None:
    assert read(escape_markdown(name)) == " ".join(name.split())
    assert "\n" not in escape_markdown(name)
    assert not re.search(r"(?<!\\)[`*|\[<>]", escape_markdown(name))


def test_plain_names_stay_readable() -> None:
    assert escape_markdown("features.denseblock1.norm_1 1.039") == "features.denseblock1.norm_1 1.039"


def test_the_same_facts_as_the_page() -> None:
    page = checkpoint_page(with_metrics(facts()))
    shown = {read(cell) for table in tables(TEXTS["one"]()) for row in table for cell in row}
    for section in page.sections:
        assert {text for pair in section.pairs for text in pair} <= shown
        for row in section.table.rows if section.table else ():
            assert {cell.text for cell in row} <= shown
    assert facts()["command"] in TEXTS["one"]()


def test_a_folder_has_a_row_a_checkpoint() -> None:
    table = next(table for table in tables(TEXTS["folder"]()) if table[0][0] == "Checkpoint")
    assert len(table) == 2 + 12
    expected = [row[0].text for row in folder_page(records()).table.rows]
    assert [read(row[0]) for row in table[2:]] == [" ".join(name.split()) for name in expected]
    assert sum(row[1] == "failed" for row in table) == 2


def test_a_command_with_fences_stays_inside() -> None:
    given = facts()
    given["command"] = "ckpt-fix bn-reestimate '```\n# not a heading\n````'"
    text = checkpoint_markdown(given)
    fence = re.search(r"^(`+)sh$", text, re.MULTILINE)[1]
    assert len(fence) > 4
    assert text.count(f"\n{fence}\n") == 1


@pytest.mark.parametrize(
    ("layers", "copies", "left_out"), [(3, 1, ""), (60, 200, "Layers"), (3, 500, "reports are")]
)
def test_a_folder_fits_into_a_summary(layers: int, copies: int, left_out: str) -> None:
    """GitHub refuses more than 1 MiB."""
    record = {"checkpoint": "/a/b.pt", "status": "done", "report": facts(layers=layers), "seconds": 1.0}
    text = folder_markdown([record] * copies)
    assert len(text.encode()) <= 2**20
    assert left_out in text
    assert ("left out" in text) == bool(left_out)
    assert text.count("| b.pt |") == copies
