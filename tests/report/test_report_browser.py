"""Reports in a real browser: no error, no request, sorting, the keyboard, both themes, a phone, paper.

Skips where chromium or playwright is missing.
Screenshots go to the folder named by CKPT_FIX_SCREENSHOTS, if it is set.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from report_facts import HOSTILE, facts, records, with_metrics

from ckpt_tools.report.report_files import write_report

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium")
QUIET = (
    "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
    "--disable-sync", "--no-first-run",
)  # fmt: skip
VIEWS = [("light", 1280), ("dark", 1280), ("light", 390), ("dark", 390)]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=list(QUIET))
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reports")
    write_report(
        folder / "one.html", with_metrics(facts(layers=60, names=HOSTILE, path=f"/runs/{HOSTILE[0]}"))
    )
    write_report(folder / "folder.html", records())
    write_report(folder / "short.html", records()[:2])
    return folder


class Tab:
    """A page that keeps what it complained about and what it asked for."""

    def __init__(
        self, browser: Any, path: Path, theme: str = "light", width: int = 1280, scripts: bool = True
    ) -> None:
        size = {"width": width, "height": 900}
        self.context = browser.new_context(viewport=size, color_scheme=theme, java_script_enabled=scripts)
        self.page = self.context.new_page()
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("dialog", lambda dialog: self.complaints.append(dialog.message))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(path.as_uri())

    def __enter__(self) -> Tab:
        return self

    def __exit__(self, *_: object) -> None:
        self.context.close()


def column(page: Any, number: int) -> list[str]:
    rows = page.locator("section:has(> #checkpoints) tbody tr")
    found: list[str] = rows.evaluate_all(
        "(rows, number) => rows.map((row) => row.cells[number].innerText)", number
    )
    return found


@pytest.mark.parametrize("name", ["one", "folder"])
@pytest.mark.parametrize(("theme", "width"), VIEWS)
def test_every_view(browser: Any, reports: Path, tmp_path: Path, name: str, theme: str, width: int) -> None:
    with Tab(browser, reports / f"{name}.html", theme, width) as tab:
        size = tab.page.evaluate(
            "[document.documentElement.scrollWidth, document.documentElement.clientWidth]"
        )
        assert size == [width, width], "no sideways scrolling of the page"
        style = "getComputedStyle(document.body)"
        colours = tab.page.evaluate(f"[{style}.backgroundColor, {style}.color]")
        dark = [sum(map(int, colour[4:-1].split(","))) < 384 for colour in colours]
        assert dark == [theme == "dark", theme == "light"]
        charts = tab.page.locator("main figure > svg")
        if name == "one":
            assert [chart.is_visible() for chart in charts.all()] == [width > 640, width <= 640]
        shot = Path(os.environ.get("CKPT_FIX_SCREENSHOTS", tmp_path)) / f"{name}-{theme}-{width}.png"
        tab.page.screenshot(path=shot)
        assert shot.stat().st_size > 10_000
        assert not tab.complaints
        assert tab.requests == [(reports / f"{name}.html").as_uri()]


def test_sorting(browser: Any, reports: Path) -> None:
    with Tab(browser, reports / "folder.html") as tab:
        page = tab.page
        head = page.locator("th", has=page.get_by_role("button", name="Largest change"))
        before = column(page, 4)
        for direction in ("ascending", "descending"):
            page.get_by_role("button", name="Largest change").click()
            assert head.get_attribute("aria-sort") == direction
            assert page.locator("#announcement").inner_text() == f"Sorted by Largest change, {direction}."
            found = column(page, 4)
            numbers = [float(text) for text in found if text != "–"]
            assert numbers == sorted(numbers, reverse=direction == "descending")
            assert found[len(numbers) :] == ["–"] * 3, "what is unknown stays last"
            assert sorted(found) == sorted(before)
        page.get_by_role("button", name="Outcome").click()
        assert head.get_attribute("aria-sort") == "none"
        assert column(page, 1) == sorted(column(page, 1))
        assert not tab.complaints


def test_keyboard(browser: Any, reports: Path) -> None:
    """Tab reaches every head in order, Enter sorts, a row's link opens the details of its checkpoint."""
    with Tab(browser, reports / "folder.html") as tab:
        page = tab.page
        names, expected = [], page.locator("section:has(> #checkpoints) th button").all_inner_texts()
        for _ in range(60):
            page.keyboard.press("Tab")
            tag, text, outline = page.evaluate(
                "(e => [e.tagName, e.innerText, getComputedStyle(e).outlineStyle])(document.activeElement)"
            )
            assert outline == "solid", f"the focus shows on {tag} {text}"
            names += [text] if tag == "BUTTON" else []
            if len(names) == len(expected):
                break
        assert names == expected
        page.keyboard.press("Shift+Tab")
        page.keyboard.press("Enter")
        assert page.evaluate("document.activeElement.parentElement.getAttribute('aria-sort')") == "ascending"
        link = page.locator("tbody a", has_text="epoch-11.pt")
        link.focus()
        page.keyboard.press("Enter")
        details = page.locator("#checkpoint-12-details")
        assert details.get_attribute("open") is not None
        assert details.get_by_role("heading", name="Provenance").is_visible()
        assert page.locator("#checkpoint-12").is_visible()


def test_names_stay_text(browser: Any, reports: Path) -> None:
    with Tab(browser, reports / "folder.html") as tab:
        assert tab.page.locator("script").count() == 1
        assert tab.page.locator("main img, main iframe").count() == 0
        assert {HOSTILE[0], HOSTILE[1]} & {text.removeprefix("/sweep/") for text in column(tab.page, 0)}
        assert not tab.complaints


def test_without_scripts(browser: Any, reports: Path) -> None:
    with Tab(browser, reports / "one.html", scripts=False) as tab:
        assert tab.page.locator("tbody tr").count() > 60
        assert tab.page.locator("th button:enabled").count() == 0, "no button that does nothing"
        assert tab.page.locator("svg.wide").is_visible()


def test_the_chart_speaks(browser: Any, reports: Path) -> None:
    with Tab(browser, reports / "one.html") as tab:
        chart = tab.page.get_by_role(
            "img", name="Stored over new running variance of every BatchNorm layer, by depth"
        )
        assert chart.count() == 1
        assert "60 layers" in chart.locator("desc").text_content()


def test_paper(browser: Any, reports: Path, tmp_path: Path) -> None:
    with Tab(browser, reports / "short.html", "dark") as tab:
        tab.page.emulate_media(media="print", color_scheme="dark")
        assert tab.page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        assert tab.page.locator("#checkpoint-1").is_visible(), "folded parts are printed"
        paper = tmp_path / "folder.pdf"
        tab.page.pdf(path=paper, format="A4")
        assert paper.read_bytes().startswith(b"%PDF")
        assert not tab.complaints
