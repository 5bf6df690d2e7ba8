"""The report in all its forms: report.json and junit.xml for machines, report.md and report.html for people, tables."""

import re
from functools import cache
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from moepress.runs.journal import write_atomically
from moepress.validation.report.ci import JUNIT_NAME, junit_xml
from moepress.validation.report.contents import contents
from moepress.validation.report.schema import Report
from moepress.validation.report.tables import Table, console_tables, headlines, warnings
from moepress.validation.report.wording import plain_words

if TYPE_CHECKING:
    from jinja2 import Template
    from rich.console import Console

JSON_NAME, MARKDOWN_NAME, HTML_NAME = "report.json", "report.md", "report.html"
_FOLDED_ROWS = 12  # a longer table is folded where a picture above it says the same


def write_report(report: Report, folder: Path) -> tuple[Path, ...]:
    """Write the report in its forms, each file atomically, into a folder that is made if need be.

    Returns:
        The files' paths: JSON, Markdown, HTML, and the thresholds as JUnit XML.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, text in (
        (JSON_NAME, report.model_dump_json(indent=2) + "\n"),
        (MARKDOWN_NAME, markdown(report)),
        (HTML_NAME, html(report)),
        (JUNIT_NAME, junit_xml(report)),
    ):
        write_atomically(folder / name, text)
        written.append(folder / name)
    return tuple(written)


def markdown(report: Report) -> str:
    """The report in GitHub's Markdown."""
    parts = [
        f"# {plain_text(line)}" if not number else f"**{plain_text(line)}**"
        for number, line in enumerate(headlines(report))
    ]
    words = plain_words(report)
    parts += [plain_text(" ".join(words))] if words else []
    notes = warnings(report)
    if notes:
        parts.append("> **Note**\n>\n" + "\n".join(f"> - {plain_text(note)}" for note in notes))
    for table in contents(report):
        parts += [f"## {plain_text(table.title)}", _markdown_table(table)]
        parts += [plain_text(table.note)] if table.note else []
    if report.commands:
        parts += ["## To reproduce", _code("\n".join(report.commands), "sh")]
    if report.recipe:
        parts += ["Recipe:", _code(report.recipe, "yaml")]
    parts.append(plain_text(_imprint(report)))
    return "\n\n".join(parts) + "\n"


def html(report: Report) -> str:
    """The report as one self-contained page."""
    from moepress.validation.report.pictures import pictures

    return _template().render(
        title=report.title or report.subjects[0].label,
        headlines=[_bound(line) for line in headlines(report)],
        words=[_bound(line) for line in plain_words(report)],
        notes=warnings(report),
        tables=contents(report),
        pictures=pictures(report),
        folded_rows=_FOLDED_ROWS,
        commands="\n".join(report.commands),
        recipe=report.recipe,
        imprint=_imprint(report),
    )


def print_tables(report: Report, console: "Console") -> None:
    """Print headline, before/after tables and notes."""
    from rich.markup import escape as literal
    from rich.table import Table as RichTable

    for line in headlines(report):
        console.print(f"[bold]{literal(line)}[/bold]", highlight=False)
    for table in console_tables(report):
        console.print(f"\n[bold]{literal(table.title)}[/bold]", highlight=False)
        drawn = RichTable(box=None, pad_edge=False)
        for column, name in enumerate(table.header):
            drawn.add_column(literal(name), justify="right" if table.is_numeric(column) else "left")
        for row in table.rows:
            drawn.add_row(*(literal(cell) for cell in row))
        console.print(drawn, highlight=False)
    console.print()
    for note in warnings(report):
        console.print(f"Note: {literal(note)}", highlight=False)


def _bound(text: str) -> str:
    """The text with numbers bound to their units, so that no line breaks between them."""
    return re.sub(r"(?<=\d) (?=[kMGT]?B\b|%)", "\N{NO-BREAK SPACE}", text)


def _imprint(report: Report) -> str:
    tool = f"moepress {report.tool_version}" if report.tool_version else "moepress"
    when = f", {report.created}" if report.created else ""
    return f"Made by {tool}{when}; report schema {report.schema_version}."


def _markdown_table(table: Table) -> str:
    rules = ["---:" if table.is_numeric(column) else "---" for column in range(len(table.header))]
    return "\n".join(
        f"| {' | '.join(cells)} |" for cells in ([plain_text(c) for c in table.header], rules, *_cells(table))
    )


def _cells(table: Table) -> list[list[str]]:
    return [[plain_text(cell) for cell in row] for row in table.rows]


def plain_text(text: str) -> str:
    """Text on one line that Markdown shows as it is: no markup, no new table cell, no HTML."""
    for sign in "\\`*_[]|#":
        text = text.replace(sign, f"\\{sign}")
    return escape(" ".join(text.split()), quote=False)


def _code(text: str, language: str) -> str:
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


@cache
def _template() -> "Template":
    from jinja2 import Environment, StrictUndefined

    source = files("moepress.validation.report").joinpath("report.html").read_text(encoding="utf-8")
    return Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True).from_string(
        source
    )


__all__ = [
    "HTML_NAME",
    "JSON_NAME",
    "MARKDOWN_NAME",
    "Report",
    "html",
    "markdown",
    "plain_text",
    "print_tables",
    "write_report",
]
