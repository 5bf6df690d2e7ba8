"""How the routing changed, layer by layer: the table, its picture, and a line for the terminal."""

from collections.abc import Sequence

from moepress.validation.quality.results import RoutingRow
from moepress.validation.report.cells import NONE, Table, share_estimate_text, share_text
from moepress.validation.report.drawing import legend_above, mark, new_figure, styled, svg, width
from moepress.validation.report.schema import Report

ROUTING = "Routing against the first model"


def routing_table(report: Report) -> Table:
    """A row for each layer and one for all; two columns for each model whose routers were seen."""
    found = _by_subject(report)
    layers = list(dict.fromkeys(row.layer for rows in found.values() for row in rows))
    cells = {(label, row.layer): row for label, rows in found.items() for row in rows}
    beside = "" if len(found) == 1 else ", {}"
    names = ("Tokens that choose otherwise", "Choices alike")
    header = [f"{name}{beside.format(label)}" for label in found for name in names]
    rows = [
        (
            "mean" if layer is None else str(layer),
            *(cell for label in found for cell in _cells(cells.get((label, layer)))),
        )
        for layer in layers
    ]
    tokens = report.quality.routing[0].tokens if found else 0
    note = (
        f"All {tokens:,} tokens of the test text. A token chooses otherwise where the model does not choose every "
        "expert that the first model chose for it and that it still has, in any order. Choices alike: the share of "
        "those choices that both make. A router with the weights that it had chooses otherwise because its inputs "
        "have moved, by what the layers before it lost. Between experts that suit a token about as well the choice "
        "changes easily and costs little."
    )
    return Table(title=ROUTING, header=("Layer", *header), rows=tuple(rows), note=note, numeric=len(header))


def _cells(row: RoutingRow | None) -> tuple[str, str]:
    if row is None:
        return NONE, NONE
    return share_estimate_text(row.changed), NONE if row.common is None else share_text(row.common)


def routing_lines(report: Report) -> tuple[str, ...]:
    """For each model whose routers were seen: how many tokens choose otherwise, and in which layer most."""
    found = _by_subject(report)
    return tuple(_line(rows) if len(found) == 1 else f"{label}: {_line(rows)}" for label, rows in found.items())


def _line(rows: Sequence[RoutingRow]) -> str:
    share = next(row for row in rows if row.layer is None).changed.value
    if not share:
        return "top-k of no token changed"
    worst = max(_layers(rows), key=lambda row: row.changed.value)
    most = f"layer {worst.layer}: {share_text(worst.changed.value)}, the most"
    return f"top-k of {share_text(share)} of tokens changed ({most})"


def routing_chart(report: Report, *, broad: bool = False) -> str:
    """The share of tokens that choose otherwise, layer by layer, a line for each model whose routers were seen."""
    from matplotlib.ticker import MaxNLocator

    numbers = {subject.label: number for number, subject in enumerate(report.subjects)}
    found = {label: _layers(rows) for label, rows in _by_subject(report).items()}
    most = max(row.changed.value for rows in found.values() for row in rows)
    with styled():
        figure = new_figure(2.6, width=width(broad=broad))
        (axes,) = figure.axes
        for label, rows in found.items():
            layers, shares = [row.layer for row in rows], [row.changed.value for row in rows]
            drawn = axes.plot(layers, shares, color=mark(numbers[label]), linewidth=1, marker="o", markersize=4)
            drawn[0].set(label=label, clip_on=False)  # a dot at nothing lies on the axis
        axes.set_ylim(0, most * 1.15 or 1)
        axes.xaxis.set_major_locator(MaxNLocator(min(12, max(map(len, found.values()))), integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(4))
        axes.yaxis.set_major_formatter(lambda share, _: f"{share * 100:g} %")
        axes.set_xlabel("layer")
        legend_above(figure)
        spoken = (
            f"Line chart of the share of tokens that choose otherwise, by layer. {'; '.join(routing_lines(report))}"
        )
        return svg(figure, "routing-broad" if broad else "routing", spoken)


def _by_subject(report: Report) -> dict[str, list[RoutingRow]]:
    found: dict[str, list[RoutingRow]] = {}
    for row in report.quality.routing:
        found.setdefault(row.subject, []).append(row)
    return found


def _layers(rows: Sequence[RoutingRow]) -> list[RoutingRow]:
    return [row for row in rows if row.layer is not None]
