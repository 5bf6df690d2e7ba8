"""Pictures of what was decided and what it cost: error by layer, loss against size of the plan's alternatives."""

from collections.abc import Sequence
from typing import Any

from moepress.compress.budget.search import Alternative, Unit
from moepress.compress.gptq.include import parts_text
from moepress.validation.report.cells import share_text, size_text
from moepress.validation.report.drawing import INK, legend_above, mark, new_figure, styled, svg, width
from moepress.validation.report.schema import Choice, Quantization

_SHAPES = ("o", "s", "^", "D", "v", "P")


def layer_error_chart(made: Quantization, *, broad: bool = False) -> str:
    """Mean relative error of the quantized matrices, layer by layer."""
    from matplotlib.ticker import MaxNLocator

    layers = [row.layer for row in made.layers]
    errors = [row.mean_relative_error for row in made.layers]
    worst = max(made.layers, key=lambda row: row.mean_relative_error)
    with styled():
        figure = new_figure(2.4, width=width(broad=broad))
        (axes,) = figure.axes
        axes.plot(layers, errors, color=mark(1), linewidth=1, marker="o", markersize=4)
        axes.set_ylim(0, max(errors) * 1.15 or 1)
        axes.xaxis.set_major_locator(MaxNLocator(min(12, max(1, len(layers))), integer=True))
        axes.yaxis.set_major_formatter(lambda error, _: f"{error:g}")
        axes.set_xlabel("layer")
        spoken = (
            f"Line chart of the mean relative quantization error of {len(layers)} layers: from {min(errors):.3g} to "
            f"{max(errors):.3g}, the largest in layer {worst.layer}"
        )
        return svg(figure, "errors-broad" if broad else "errors", spoken)


def curve_chart(choice: Choice, *, broad: bool = False) -> str:
    """Estimated divergence against size, of the best mixes; the budget, and what was chosen."""
    from matplotlib.ticker import MaxNLocator, NullFormatter

    ordered = sorted(choice.curve, key=lambda point: point.weight_bytes)
    with styled():
        figure = new_figure(3.6, width=width(broad=broad))
        (axes,) = figure.axes
        sizes, kl = [point.weight_bytes for point in ordered], [point.kl for point in ordered]
        axes.plot(sizes, kl, color=mark(1), marker="o", markersize=5, linewidth=1, label="best mix")
        axes.axvline(choice.limit_bytes, color=INK, linewidth=1, linestyle=(0, (4, 3)), label="budget")
        chosen = [point for point in ordered if point.chosen]
        for point in chosen:
            at = (point.weight_bytes, point.kl)
            axes.plot(*at, "o", markersize=13, markerfacecolor="none", markeredgecolor=INK, label="chosen")
        if min(kl) > 0:
            axes.set_yscale("log")
            axes.yaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_major_formatter(lambda kl, _: f"{kl:g}")
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.xaxis.set_major_formatter(lambda size, _: size_text(round(size)) if size > 0 else "0")
        axes.set_xlabel("size of the file")
        legend_above(figure)
        taken = "".join(f"; chosen: {size_text(p.weight_bytes)}, {p.experts} experts, KL {p.kl:.2g}" for p in chosen)
        spoken = (
            f"Line chart of the estimated KL divergence of {len(ordered)} mixes against their size, budget "
            f"{size_text(choice.limit_bytes)}{taken}"
        )
        return svg(figure, "curve-broad" if broad else "curve", spoken)


def choice_chart(choice: Choice, *, broad: bool = False) -> str:
    """Estimated loss against size: a line for each number of bits, the budget, and what was chosen."""
    with styled():
        figure = new_figure(3.6, width=width(broad=broad))
        (axes,) = figure.axes
        for number, (name, rows) in enumerate(_by_bits(choice.rows).items()):
            ordered = sorted(rows, key=lambda row: row.weight_bytes)
            sizes, losses = [row.weight_bytes for row in ordered], [row.loss for row in ordered]
            shape = _SHAPES[number % len(_SHAPES)]
            axes.plot(sizes, losses, color=mark(number + 1), marker=shape, markersize=5, linewidth=1, label=name)
        axes.axvline(choice.limit_bytes, color=INK, linewidth=1, linestyle=(0, (4, 3)), label="budget")
        chosen = [row for row in choice.rows if row.chosen]
        for row in chosen:
            at = (row.weight_bytes, row.loss)
            axes.plot(*at, "o", markersize=13, markerfacecolor="none", markeredgecolor=INK, label="chosen")
        _scale(axes, choice.rows)
        legend_above(figure)
        taken = f"; chosen: {alternative_text(chosen[0])}" if chosen else ""
        spoken = (
            f"Line chart of estimated loss against size for {len(choice.rows)} alternatives, budget "
            f"{size_text(choice.limit_bytes)}{taken}"
        )
        return svg(figure, "choice-broad" if broad else "choice", spoken)


def alternative_text(row: Alternative) -> str:
    """One alternative in words."""
    parts = f", {parts_text(row.part_bits)}" if row.part_bits else ""
    size, loss = size_text(row.weight_bytes), loss_text(row)
    return f"{row.experts} experts, {bits_name(row)}{parts}, {size}, estimated loss {loss}"


def loss_text(row: Alternative) -> str:
    """An estimated loss, a share or a divergence."""
    return share_text(row.loss, digits=2) if row.unit is Unit.SHARE else row.unit.text(row.loss)


def bits_name(row: Alternative) -> str:
    """Bits of the routed experts, in words."""
    if row.bits is None:
        return "not quantized"
    return f"mixed, {row.bits:.2f} bits" if row.mixed else f"{row.bits:g} bits"


def _by_bits(rows: Sequence[Alternative]) -> dict[str, list[Alternative]]:
    found: dict[str, list[Alternative]] = {}
    for row in sorted(rows, key=lambda row: (row.mixed, row.bits is None, row.bits or 0.0)):
        found.setdefault(bits_name(row), []).append(row)
    return found


def _scale(axes: Any, rows: Sequence[Alternative]) -> None:
    """Losses span powers of ten, and one may be nothing at all."""
    from matplotlib.ticker import MaxNLocator, NullFormatter

    losses = [row.loss for row in rows]
    above = [loss for loss in losses if loss > 0]
    if above and len(above) == len(losses):
        axes.set_yscale("log")
    elif above:
        axes.set_yscale("symlog", linthresh=min(above))
    shares = all(row.unit is Unit.SHARE for row in rows)
    axes.yaxis.set_major_formatter(lambda loss, _: f"{loss * 100:g} %" if shares else f"{loss:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.xaxis.set_major_formatter(lambda size, _: size_text(round(size)) if size > 0 else "0")
    axes.set_xlabel("size of all weights")
