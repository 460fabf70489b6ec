"""Names in reports come from others' files: whatever they are, the page is built as with harmless ones."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from hostile_facts import FOREIGN, filled
from hypothesis import given, settings
from hypothesis import strategies as st
from report_facts import HOSTILE, facts, records, with_metrics

from ckpt_tools.report.ci_summary import failure_markdown
from ckpt_tools.report.pages.html_page import checkpoint_html, folder_html
from ckpt_tools.report.pages.markdown_page import checkpoint_markdown, folder_markdown
from ckpt_tools.report.text.folder_text import folder_text

FOREIGN |= {"origin", "error", "sha256", "device", "cause", "checkpoint", "output"}
FRAGMENTS = (
    *HOSTILE,
    *(
        "<",
        ">",
        "&",
        '"',
        "'",
        "`",
        "|",
        "\\",
        "\n",
        "\r",
        "\t",
        "\0",
        "#",
        "- ",
        "1. ",
        "```",
        "~~~",
        "$$",
        "{{x}}",
    ),
    *(
        "</pre></code>",
        "<svg onload=alert(1)>",
        "--><script>",
        "{% raw %}",
        "&lt;b&gt;",
        "![x](http://x)",
        "<!--",
    ),
    *("javascript:alert(1)", '" onmouseover="alert(1)', "</title>", "</details>", "\u2028", "<img src=x>"),
    "::error::x",
)
hostile = st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=5), min_size=1, max_size=4).map("".join)
several = st.lists(hostile, min_size=7, max_size=7)
Page = Callable[[Any], str]


class Skeleton(HTMLParser):
    """The tags of a page with the names of their attributes, and the values that a browser acts on."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, ...]] = []
        self.acting: set[str] = set()
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag != "wbr":
            self.tags.append((tag, *(name for name, _ in attributes)))
        self.acting |= {
            value or "" for name, value in attributes if name in ("href", "src", "style", "class")
        }

    def handle_endtag(self, tag: str) -> None:
        self.tags.append((f"/{tag}",))

    def handle_decl(self, declaration: str) -> None:
        self.tags.append((declaration,))

    def handle_comment(self, text: str) -> None:
        self.tags.append(("comment",))


@settings(max_examples=15)
@given(several)
def test_a_page_has_no_element_of_somebody_elses(texts: list[str]) -> None:
    pages: tuple[tuple[Page, Any], ...] = (
        (checkpoint_html, with_metrics(facts())),
        (folder_html, records()[:7:3]),
    )
    for page, given_facts in pages:
        found = Skeleton(page(filled(given_facts, itertools.cycle(texts).__next__)))
        usual = Skeleton(page(filled(given_facts, lambda: "b")))
        assert found.tags == usual.tags
        assert found.acting == usual.acting
        names = {name for _, *attributes in found.tags for name in attributes}
        assert not [name for name in names if name.startswith("on")]


def plain(markdown: str) -> str:
    """Without fenced blocks, which show what is in them as it is."""
    lines, fence = [], ""
    for line in markdown.split("\n"):
        run = re.match(r"`{3,}", line)
        if fence and line.strip() == fence:
            fence = ""
        elif run and not fence:
            fence = run[0]
        elif not fence:
            lines.append(line)
    assert not fence, "a block that is never closed"
    return "\n".join(lines)


def shape(markdown: str) -> list[int | str]:
    """Of every line: the cells, if it is a row of a table; else its mark, if it has one."""
    lines = plain(markdown).split("\n")
    return [
        len(re.findall(r"(?<!\\)\|", x)) if x.startswith("|") else re.match(r"[#<>*-]*", x)[0] for x in lines
    ]


@settings(max_examples=15)
@given(several)
def test_markdown_has_no_markup_of_somebody_elses(texts: list[str]) -> None:
    pages: tuple[tuple[Page, Any], ...] = (
        (checkpoint_markdown, with_metrics(facts())),
        (folder_markdown, records()[:7:3]),
    )
    for page, given_facts in pages:
        found = page(filled(given_facts, itertools.cycle(texts).__next__))
        usual = page(filled(given_facts, lambda: "b"))
        assert shape(found) == shape(usual)
        assert Skeleton(plain(found)).tags == Skeleton(plain(usual)).tags


@given(hostile)
def test_a_failure_is_text(text: str) -> None:
    assert (
        Skeleton(plain(failure_markdown(f"a{text}", 1))).tags
        == Skeleton(plain(failure_markdown("a", 1))).tags
    )


@settings(max_examples=15)
@given(several)
def test_terminals_are_shown_no_control_characters(texts: list[str]) -> None:
    text = folder_text(filled(records(), itertools.cycle(texts).__next__), Path("x"))
    assert all(line.isprintable() for line in text.split("\n"))
