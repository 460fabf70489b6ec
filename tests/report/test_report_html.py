"""Reports as HTML: well-formed, self-contained, safe against names, legible, and true to the facts."""

from __future__ import annotations

import base64
import hashlib
import itertools
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from report_facts import HOSTILE, facts, layer, records, with_metrics

from ckpt_tools.report.pages.html_page import checkpoint_html, folder_html

VOID = {"meta", "link", "wbr", "img", "br", "hr", "input"}


class Document(HTMLParser):
    """Elements with their attributes and text; refuses tags that do not close as they opened."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str], list[str]]] = []
        self.texts: list[list[str]] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attributes}
        assert len(found) == len(attributes), "an attribute twice"
        self.elements.append((tag, found, []))
        if tag not in VOID:
            self.open.append(tag)
            self.texts.append(self.elements[-1][2])

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attributes}, []))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        self.texts.pop()

    def handle_data(self, data: str) -> None:
        for text in self.texts:
            text.append(data)

    def all(self, tag: str, **wanted: str) -> list[tuple[dict[str, str], str]]:
        return [
            (attributes, "".join(text).strip())
            for name, attributes, text in self.elements
            if name == tag and all(attributes.get(key) == value for key, value in wanted.items())
        ]


PAGES = {
    "one": lambda: checkpoint_html(with_metrics(facts())),
    "hostile": lambda: checkpoint_html(facts(names=HOSTILE, path=f"/runs/{HOSTILE[1]}")),
    "long": lambda: checkpoint_html(facts(layers=200)),
    "bare": lambda: checkpoint_html({}),
    "folder": lambda: folder_html(records()),
    "empty folder": lambda: folder_html([]),
}


@pytest.fixture(params=PAGES, scope="module")
def page(request: pytest.FixtureRequest) -> str:
    return PAGES[request.param]()


def test_well_formed_and_accessible(page: str) -> None:
    found = Document(page)
    ids = [attributes["id"] for _, attributes, _ in found.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    for _, attributes, _ in found.elements:
        assert set(attributes.get("aria-labelledby", "").split()) <= set(ids)
        if attributes.get("href", "").startswith("#"):
            assert attributes["href"][1:] in ids
    levels = [int(tag[1]) for tag, _, _ in found.elements if re.fullmatch(r"h\d", tag)]
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    pictures = found.all("svg", role="img")
    assert all(attributes["aria-labelledby"] for attributes, _ in pictures)
    assert found.all("html", lang="en")
    for attributes, _ in found.all("div", **{"class": "scroll"}):
        assert (attributes["role"], attributes["tabindex"]) == ("region", "0")
        assert attributes["aria-label"]


def test_nothing_is_fetched_and_only_our_script_runs(page: str) -> None:
    found = Document(page)
    for _, attributes, _ in found.elements:
        assert not any(name.startswith("on") or name == "style" for name in attributes)
        for name in ("src", "href", "action", "data", "srcset"):
            assert re.match(r"#|data:image/png|$", attributes.get(name, ""))
    ((_, script),) = found.all("script")
    digest = base64.b64encode(
        hashlib.sha256(re.search("<script>(.*?)</script>", page, re.DOTALL)[1].encode()).digest()
    )
    (policy,) = [attributes["content"] for attributes, _ in found.all("meta") if "http-equiv" in attributes]
    assert f"script-src 'sha256-{digest.decode()}'" in policy
    assert policy.startswith("default-src 'none'")
    assert "url(" not in page
    assert "@import" not in page
    assert script


def test_secrets_stay_at_home(page: str) -> None:
    assert not re.search("hush|SEC/RET|KEY|me:pw|key=1", page)


def test_names_are_text() -> None:
    found = Document(checkpoint_html(facts(names=HOSTILE, path=f"/runs/{HOSTILE[0]}")))
    assert len(found.all("script")) == 1
    assert not found.all("img")
    heads = {text for _, text in found.all("th", scope="row")}
    assert set(HOSTILE[:4]) <= heads
    assert "\\u202etxt.exe\\x1b[31m" in heads, "what would turn the line around is shown as its escape"


def test_the_table_carries_the_facts() -> None:
    given = facts()
    found = Document(checkpoint_html(given))
    text = "".join("".join(text) for tag, _, text in found.elements if tag == "main")
    for row in given["layers"]:
        ratio = row["ratio"]
        assert all(f"{ratio[key]:.3f}" in text for key in ("median", "min", "max"))
        assert row["name"] in text
    expected = (
        "a" * 64,
        "b" * 64,
        given["command"],
        "torn.png",
        "1,234",
        "drop2",
        "not known",
        "agrees with the data",
    )
    for said in expected:
        assert said in text


def test_before_and_after() -> None:
    found = Document(checkpoint_html(with_metrics(facts())))
    cells = [text for _, text in found.all("td")]
    assert "8.97 ± 0.31" in cells
    assert "−5.82 ± 0.31" in cells
    assert "−0.25" in cells


def path_of(page: str, chart: str, mark: str) -> list[tuple[float, float]]:
    svg = re.search(f'<svg class="{chart}".*?</svg>', page, re.DOTALL)[0]
    path = re.search(f'<path class="{mark}"[^>]* d="([^"]*)"', svg)
    return [(float(x), float(y)) for x, y in re.findall(r"M([\d.]+) ([\d.]+)", path[1])] if path else []


@pytest.mark.parametrize("chart", ["wide", "narrow"])
def test_marks_stand_where_the_axis_says(chart: str) -> None:
    """The labels of the log axis are the oracle: a line through them maps ln(ratio) to pixels."""
    given = facts(layers=30)
    given["layers"][7] |= {"rewritten": False}
    given["layers"][9] = layer("unreached", None)
    page = checkpoint_html(given)
    svg = re.search(f'<svg class="{chart}".*?</svg>', page, re.DOTALL)[0]
    ticks = re.search('<g class="ticks end">(.*?)</g>', svg)[1]
    labels = [(float(y), float(text)) for y, text in re.findall(r'y="([\d.]+)">([\d.]+)<', ticks)]
    slope, start = np.polyfit([math.log(value) for _, value in labels], [y - 4 for y, _ in labels], 1)
    rows = [row for row in given["layers"] if row["ratio"] and row["rewritten"]]
    dots = path_of(page, chart, "rewritten")
    assert [x for x, _ in dots] == sorted(x for x, _ in dots)
    for (_, y), row in zip(dots, rows, strict=True):
        assert y == pytest.approx(start + slope * math.log(row["ratio"]["median"]), abs=0.2)
    assert len(path_of(page, chart, "control")) == 1
    assert len(path_of(page, chart, "kept")) == 1
    assert len(path_of(page, chart, "ranges")) == len(path_of(page, chart, "errors")) == 29
    assert len(path_of(page, chart, "sites")) == 2
    assert len(path_of(page, chart, "inactive")) == 1
    (first, *_), (dot, *_) = path_of(page, chart, "sites"), dots
    assert first[0] < dot[0], "the first dropout site stands before the first rewritten layer"


@pytest.mark.parametrize("ratio", [1e-30, 1e-3, 0.999, 1.0, 7.0, 1e6, 1e30])
def test_any_ratio_can_be_drawn(ratio: float) -> None:
    given = facts()
    given["layers"][3]["ratio"] = {"median": ratio, "min": ratio / 1e4, "max": ratio * 1e4}
    given["layers"][4]["relative_standard_error"] = {"median": None, "max": None}
    page = checkpoint_html(given)
    numbers = re.findall(r"[MVHv ,](-?[\d.]+)", " ".join(re.findall(r' d="([^"]*)"', page)))
    assert all(-50 <= float(number) <= 1050 for number in numbers)
    assert not re.search(r"\b(nan|inf)\b", page, re.IGNORECASE)
    labels = re.findall(r"<text[^>]*>([^<]*)</text>", re.search('<g class="ticks end">(.*?)</g>', page)[1])
    assert 2 <= len(labels) <= 8


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))


def contrast(one: str, other: str) -> float:
    dark, light = sorted(map(luminance, (one, other)))
    return (light + 0.05) / (dark + 0.05)


def test_contrast_in_every_theme() -> None:
    """WCAG 2.2 AA: 4.5 for text, 3 for what a chart is read by."""
    blocks = re.findall(r":root \{(.*?)\}", PAGES["bare"](), re.DOTALL)
    themes = [dict(re.findall(r"--(\w+): (#\w{6})", block)) for block in blocks]
    assert len(themes) == 3, "light, dark, print"
    for theme in themes:
        for ground in (theme["paper"], theme["wash"]):
            assert all(
                contrast(theme[name], ground) >= 4.5 for name in ("ink", "soft", "accent", "good", "bad")
            )
        assert all(contrast(theme[name], theme["paper"]) >= 3 for name in ("range", "control", "dropout"))


def test_folder() -> None:
    found = Document(folder_html(records()))
    table = found.all("table")[0][1]
    assert "sweep" in found.all("h1")[0][1]
    assert table.count("done") == 9
    assert table.count("failed") == 2
    assert "nothing to do" in table
    links = [
        attributes["href"]
        for attributes, text in found.all("a")
        if attributes["href"].startswith("#checkpoint-")
    ]
    assert {f"#checkpoint-{place}" for place in range(1, 13)} <= set(links)
    assert len(found.all("details", **{"class": "checkpoint"})) == 12
    assert "https://host/x" in table
    images = [attributes["data-order"] for attributes, text in found.all("td") if text == "1,234"]
    assert images == ["1234.0"] * 9
