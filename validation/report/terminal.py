"""The report's tables on a terminal."""

from typing import TYPE_CHECKING

from moepress.runs.text import printable
from moepress.validation.report.headline import headlines, warnings
from moepress.validation.report.remarks import mark_of
from moepress.validation.report.routing import routing_lines
from moepress.validation.report.schema import Report
from moepress.validation.report.tables import console_tables

if TYPE_CHECKING:
    from rich.console import Console


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
        for number, row in enumerate(table.rows):
            mark = mark_of(table, number)
            name = f"{row[0]} ({mark})" if mark else row[0]
            drawn.add_row(*(literal(printable(cell)) for cell in (name, *row[1:])))
        console.print(drawn, highlight=False)
        for mark, text in table.remarks:
            console.print(f"({mark}) {literal(printable(text))}", highlight=False)
    console.print()
    for line in routing_lines(report):
        console.print(f"Routing: {literal(printable(line))}", highlight=False)
    for note in warnings(report):
        console.print(f"Note: {literal(note)}", highlight=False)
