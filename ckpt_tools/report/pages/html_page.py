"""A report as one page of HTML that asks nobody for anything: styles, script, pictures and icon stand in it.

Templates are jinja2's with autoescape on, since names of files and layers come from other people.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING, Any

from ckpt_tools.errors import UsageError
from ckpt_tools.report.marks import add_mark
from ckpt_tools.report.page_content import Page
from ckpt_tools.report.pages.chart import Drawing, draw_chart
from ckpt_tools.report.pages.checkpoint_page import checkpoint_page
from ckpt_tools.report.pages.folder_page import folder_page
from ckpt_tools.version import VERSION

if TYPE_CHECKING:
    from jinja2 import Environment
    from markupsafe import Markup

__all__ = ["checkpoint_html", "folder_html", "require_templates"]

_WIDE, _NARROW = (1000, 400), (360, 300)  # of the chart, in pixels: one of them is shown
_ICON = (  # a dot above a line, 16 × 16
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAABAAAAAQCAYAAAAf8/9hAAAAM0lEQVR4nGNgGAWjYGgBRgYGBgYuruj/"
    "xGr49m0pIxMpGrABJkptH3gDqO6F0TAYDYNRAAAk7AsBMfVQVQAAAABJRU5ErkJggg=="
)


def checkpoint_html(facts: Mapping[str, Any]) -> str:
    """The report of one checkpoint, from the facts of ``outcome_json``. Raises UsageError without jinja2."""
    page = checkpoint_page(facts)
    return _render_template("page.html", page=page, drawings=_drawings(page, hits=True))


def folder_html(records: Sequence[Mapping[str, Any]], title: str = "") -> str:
    """The report of many checkpoints, one record each: a sortable table, and every checkpoint's report below it.

    A record holds ``checkpoint``, ``status``, ``output``, ``error``, ``report`` (the facts of ``outcome_json`` or
    null) and ``seconds``. Raises UsageError without jinja2.
    """
    page = folder_page(records, title)
    pages = [(ident, item, _drawings(item, hits=False)) for ident, item in page.pages]
    return _render_template("folder.html", page=page, pages=pages)


def require_templates() -> None:
    """Raise UsageError if the pages cannot be made."""
    _environment()


def _drawings(page: Page, *, hits: bool) -> list[Drawing]:
    """The page's chart for a screen and for a phone."""
    facts = next((section.chart for section in page.sections if section.chart is not None), None)
    drawn = [draw_chart(facts, width=w, height=h, hits=hits) for w, h in (_WIDE, _NARROW)] if facts is not None else []
    return [drawing for drawing in drawn if drawing is not None]


def _render_template(name: str, **said: object) -> str:
    from markupsafe import Markup

    style, script = _text("style.css").strip(), _text("sort.js").strip()  # ours: nothing to escape
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    text = _environment().get_template(name).render(
        version=VERSION, icon=_ICON, style=Markup(style), script=Markup(script), script_hash=f"sha256-{digest}", **said
    )  # fmt: skip
    return add_mark(text.encode("utf-8", errors="replace"), ".html").decode()


@cache
def _environment() -> Environment:
    try:
        from jinja2 import DictLoader, Environment, StrictUndefined
    except ImportError as error:
        raise UsageError(
            "a report in HTML: expected jinja2 to write it with, found none. Run: pip install 'ckpt-tools[report]'"
        ) from error
    names = ("parts.html", "page.html", "folder.html")
    environment = Environment(
        loader=DictLoader({name: _text(name) for name in names}), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    environment.filters["anchor"] = lambda title: re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
    environment.filters["soft"] = _soft
    return environment


def _soft(name: str) -> Markup:
    """A name, escaped, that may be broken into lines behind its dots and slashes, but not within a number."""
    from markupsafe import Markup, escape

    return Markup(re.sub(r"((?<!\d)[./]|[./](?!\d))", r"\1<wbr>", str(escape(name))))


def _text(name: str) -> str:
    return resources.files("ckpt_tools.report").joinpath("templates", name).read_text(encoding="utf-8")
