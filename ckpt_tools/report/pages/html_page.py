"""A report as one page of HTML that loads nothing: styles, script, chart and icon stand in it.

So it can be sent by mail or kept for years. The templates are jinja2's with autoescape on, since
the names of files and layers come from other people.
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

_CHART_SIZES = (
    (1000, 400),
    (360, 300),
)  # in pixels, for a screen and for a phone: the style sheet shows one of them
_ICON = (  # a dot above a line, 16 × 16
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAABAAAAAQCAYAAAAf8/9hAAAAM0lEQVR4nGNgGAWjYGgBRgYGBgYuruj/"
    "xGr49m0pIxMpGrABJkptH3gDqO6F0TAYDYNRAAAk7AsBMfVQVQAAAABJRU5ErkJggg=="
)


def checkpoint_html(facts: Mapping[str, Any]) -> str:
    """Return the report of one checkpoint from the facts of ``outcome_json``.

    Raises UsageError without jinja2.
    """
    page = checkpoint_page(facts)
    return _render_template("page.html", page=page, drawings=_drawings(page, tooltips=True))


def folder_html(records: Sequence[Mapping[str, Any]], title: str = "") -> str:
    """Return the report of many checkpoints: a sortable table, and below it a report for each.

    A record holds ``checkpoint``, ``status``, ``output``, ``error``, ``report`` (the facts of
    ``outcome_json`` or null) and ``seconds``. Raises UsageError without jinja2.
    """
    page = folder_page(records, title)
    # Without tooltips: there may be hundreds of checkpoints with hundreds of layers each.
    pages = [(anchor, item, _drawings(item, tooltips=False)) for anchor, item in page.pages]
    return _render_template("folder.html", page=page, pages=pages)


def require_templates() -> None:
    """Raise UsageError if jinja2, an optional dependency, is missing.

    Commands call this before they begin, since a run may take hours before its report is written.
    """
    _environment()


def _drawings(page: Page, *, tooltips: bool) -> list[Drawing]:
    """Return the page's chart in every size, an empty list if it has none."""
    charts = [section.chart for section in page.sections if section.chart is not None]
    drawings = (
        draw_chart(facts, width=width, height=height, tooltips=tooltips)
        for facts in charts[:1]
        for width, height in _CHART_SIZES
    )
    return [drawing for drawing in drawings if drawing is not None]


def _render_template(name: str, **variables: object) -> str:
    from markupsafe import Markup

    # Style and script are our own files, so they are not escaped.
    style, script = _template_text("style.css").strip(), _template_text("sort.js").strip()
    # The page's content security policy allows the script with this digest, and no other.
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    text = _environment().get_template(name).render(
        version=VERSION, icon=_ICON, style=Markup(style), script=Markup(script),
        script_hash=f"sha256-{digest}", **variables,
    )  # fmt: skip
    # The name of a file may hold lone surrogates, which UTF-8 cannot encode.
    return add_mark(text.encode("utf-8", errors="replace"), ".html").decode()


@cache
def _environment() -> Environment:
    try:
        from jinja2 import DictLoader, Environment, StrictUndefined
    except ImportError as error:
        raise UsageError(
            "a report in HTML: expected jinja2, found none. Run: pip install 'ckpt-tools[report]'"
        ) from error
    # A missing variable is an error here, and not an empty text: StrictUndefined.
    names = ("parts.html", "page.html", "folder.html")
    environment = Environment(
        loader=DictLoader({name: _template_text(name) for name in names}), autoescape=True,
        undefined=StrictUndefined, trim_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    environment.filters["anchor"] = lambda title: re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
    environment.filters["soft"] = _allow_line_breaks
    return environment


def _allow_line_breaks(name: str) -> Markup:
    """Return a name, escaped, that may be broken behind dots and slashes outside of numbers.

    Names of layers are long words of many parts: without a place to break they would widen a
    phone's page.
    """
    from markupsafe import Markup, escape

    return Markup(re.sub(r"((?<!\d)[./]|[./](?!\d))", r"\1<wbr>", str(escape(name))))


def _template_text(name: str) -> str:
    return resources.files("ckpt_tools.report").joinpath("templates", name).read_text(encoding="utf-8")
