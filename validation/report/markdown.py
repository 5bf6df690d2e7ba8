"""The report in GitHub's Markdown."""

from html import escape

from moepress.runs.text import printable
from moepress.validation.report.cells import Table
from moepress.validation.report.contents import contents
from moepress.validation.report.headline import headlines, warnings
from moepress.validation.report.schema import Report
from moepress.validation.report.wording import imprint, plain_words


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
    parts.append(plain_text(imprint(report)))
    return "\n\n".join(parts) + "\n"


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
    return escape(printable(" ".join(text.split())), quote=False)


def _code(text: str, language: str) -> str:
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"
