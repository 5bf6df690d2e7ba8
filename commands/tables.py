"""Tables, sizes and times for people, on stdout, as several commands print them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from moepress.runs.text import printable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from moepress.compress.pruning.slack import Slack

EMBEDDED_NOTE = "Note: the embedded demo text was used for calibration; give --calibration with your own text."
_UNITS = (("days", 86400.0), ("h", 3600.0), ("min", 60.0))


def human_bytes(size: float) -> str:
    """A size with a binary unit."""
    for unit, factor in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if size >= factor:
            return f"{size / factor:,.2f} {unit}"
    return f"{size:.0f} B"


def rough_bytes(size: float) -> str:
    """A projected size, in two figures: 4.2 GiB, 350 MiB."""
    for unit, factor in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if size >= factor:
            return f"{float(f'{size / factor:.2g}'):,.{0 if size >= 9.95 * factor else 1}f} {unit}"
    return f"{size:.0f} B"


def human_seconds(seconds: float) -> str:
    """A time in two figures: 12 s, 4.5 h, 3.2 days."""
    for unit, length in _UNITS:
        if seconds >= 1.5 * length:
            return f"{seconds / length:.2g} {unit}" if seconds < 99.5 * length else f"{seconds / length:,.0f} {unit}"
    return f"{seconds:.2g} s"


def plain_console(*, markup: bool = False) -> Console:
    """stdout, for people: no colours for numbers, no lines broken."""
    from moepress.runs.terminal import console

    return console(soft_wrap=True, markup=markup)


def plain_table(*columns: str) -> Table:
    """A table without lines; the first column to the left, numbers to the right."""
    from rich.table import Table

    class Safe(Table):
        """A table whose cells may hold names from files."""

        def add_row(self, *cells: Any, **how: Any) -> None:
            super().add_row(*(printable(c) if isinstance(c, str) else c for c in cells), **how)

    table = Safe(box=None, pad_edge=False, header_style="bold")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", no_wrap=True)
    return table


def print_estimates(estimates: Mapping[str, Mapping[str, Any]]) -> None:
    """Time, memory and disk by stage, then the terms of each; stage -> an `Estimate` as plain data."""
    console = plain_console(markup=True)
    table = plain_table("projected", "time", "peak memory", "disk", "output", "tokens/expert")
    for stage, row in estimates.items():
        each = row["tokens_per_expert"]
        table.add_row(
            stage,
            human_seconds(row["seconds"]),
            rough_bytes(row["peak_memory_bytes"]),
            rough_bytes(row["disk_bytes"]),
            rough_bytes(row["output_bytes"]),
            "" if each is None else f"{each:,.0f}",
        )
    console.print(table)
    for stage, row in estimates.items():
        console.print(f"{stage}, time: {_terms(row['time'], human_seconds)}")
        console.print(f"{stage}, memory: {_terms(row['memory'], rough_bytes)}")
        console.print(f"{stage}, disk: {_terms(row['disk'], rough_bytes)}")
        if row["device_memory_bytes"] is not None:
            console.print(f"{stage}, memory of the GPU: {rough_bytes(row['device_memory_bytes'])}")
    for note in dict.fromkeys(note for row in estimates.values() for note in row["notes"]):
        console.print(f"Note: {note}")


def print_slack(slack: Slack) -> None:
    """What cuts to three quarters and half of the experts are likely to cost: of this model, and of others."""
    from moepress.compress.pruning.slack import kept_text

    console = plain_console()
    console.print(
        f"slack (projected): the work is spread as over {slack.effective_experts:.1f} experts of {slack.experts} that "
        "are used alike"
    )
    table = plain_table("cut", "experts", "reap-sum mass lost", "damage", "most in layer", "KL, nats a token")
    for cut in slack.cuts:
        low, high = cut.kl
        table.add_row(
            "this model, projected",
            f"{cut.experts} of {slack.experts}",
            f"{cut.reap_sum_mass:.1%}",
            f"{cut.damage:.2f}",
            f"{cut.worst_layer}: {cut.worst_mass:.1%}",
            f"{low:.3f} to {high:.3f}",
        )
    for row in slack.measured:
        name, experts = f"{row.model}, measured", f"{row.experts} of {row.before}"
        table.add_row(name, experts, "", f"{row.damage:.2f}", "", f"{row.kl:.3f} (perplexity {row.perplexity:+.1%})")
    console.print(table)
    for line in kept_text(slack.published) or ["No published result of a like model is known here."]:
        console.print(line)


def _terms(terms: Mapping[str, float], text: Any) -> str:
    whole = sum(terms.values())
    shown = [f"{name} {text(value)}" for name, value in terms.items() if value > 0.002 * whole]
    return ", ".join(shown) or "nothing"
