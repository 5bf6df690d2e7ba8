"""The report as one page that needs nothing beside it."""

import re
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from moepress.runs.text import printable
from moepress.validation.report.cells import NONE
from moepress.validation.report.contents import contents
from moepress.validation.report.headline import headlines, warnings
from moepress.validation.report.pictures import pictures
from moepress.validation.report.schema import Report
from moepress.validation.report.wording import imprint, plain_words

if TYPE_CHECKING:
    from jinja2 import Template

_FOLDED_ROWS = 12  # a longer table is folded where a picture above it says the same


def html(report: Report) -> str:
    """The report as one self-contained page."""
    return _template().render(
        title=report.title or report.subjects[0].label,
        headlines=[_bound(line) for line in headlines(report)],
        words=[_bound(line) for line in plain_words(report)],
        notes=warnings(report),
        tables=contents(report),
        pictures=pictures(report),
        folded_rows=_FOLDED_ROWS,
        dash=NONE,
        bound=_cell,
        commands="\n".join(report.commands),
        recipe=report.recipe,
        imprint=imprint(report),
    )


def _bound(text: str) -> str:
    """The text with numbers bound to their units and errors, so that no line breaks between them."""
    return re.sub(r"(?<=\d) (?=[kMGT]?B\b|%)|(?<=\d) (?=± ?\d)|(?<=±) (?=\d)", "\N{NO-BREAK SPACE}", text)


def _cell(text: str) -> str:
    """The same, and both ends of an interval bound to each other and to the test that they are of."""
    text = re.sub(r"\b(tg|pp) (?=\d)", "\\1\N{NO-BREAK SPACE}", _bound(text))
    return re.sub(r"(?<=\d)-(?=\d)", "-\N{WORD JOINER}", text)


def _safe(value: Any) -> Any:
    """Text from files without control characters, which no page may hold; markup of our own stays."""
    return printable(value, lines=True) if type(value) is str else value


@cache
def _template() -> "Template":
    from jinja2 import Environment, StrictUndefined

    source = files("moepress.validation.report").joinpath("report.html").read_text(encoding="utf-8")
    return Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, finalize=_safe
    ).from_string(source)
