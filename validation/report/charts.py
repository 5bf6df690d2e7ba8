"""Bar charts of the report: size, perplexity, KL divergence, tokens per second. A subject has one colour in all."""

from collections.abc import Sequence
from math import isfinite
from typing import Any

from moepress.validation.quality.results import Estimate, ThroughputRow
from moepress.validation.report.cells import size_text, without_version
from moepress.validation.report.drawing import INK, mark, new_figure, short, styled, svg
from moepress.validation.report.schema import Report

Series = tuple[int, str, Sequence[Estimate | None]]
"""Number of its colour, name, a value for each row of the chart."""


def size_chart(report: Report) -> str:
    """Size on disk, a bar for each subject."""
    labels = [subject.label for subject in report.subjects]
    sizes = [subject.stored_bytes for subject in report.subjects]
    with styled():
        figure = new_figure(0.2 + 0.4 * len(labels))
        (axes,) = figure.axes
        for number, size in enumerate(sizes):
            _bars(axes, [number], [Estimate(value=size)], 0.7, number, labels[number])
            axes.annotate(size_text(size), (size, number), xytext=(4, 0), textcoords="offset points", va="center")
        _name_rows(axes, labels, "")
        axes.set_xlim(0, (max(sizes) or 1) * 1.3)
        axes.set_xticks([])
        axes.spines["bottom"].set_visible(False)
        spoken = "; ".join(f"{label} {size_text(size)}" for label, size in zip(labels, sizes, strict=True))
        return svg(figure, "size", f"Bar chart of size on disk: {spoken}")


def parts_chart(report: Report) -> str:
    """Size of every part of the model, a bar for each subject whose parts are known."""
    known = [(number, subject) for number, subject in enumerate(report.subjects) if subject.parts]
    parts = list(dict.fromkeys(part for _, subject in known for part in subject.parts))
    series = [
        (number, subject.label, [Estimate(value=subject.parts.get(part, 0)) for part in parts])
        for number, subject in known
    ]
    with styled():
        figure = _grouped_figure(parts, series, "size on disk")
        figure.axes[0].xaxis.set_major_locator(_few_ticks())
        figure.axes[0].xaxis.set_major_formatter(lambda size, _: size_text(round(size)) if size else "0")
        return svg(figure, "parts", _spoken("size on disk by part", parts, series, lambda size: size_text(round(size))))


def perplexity_chart(report: Report) -> str:
    """Perplexity by domain, a bar for each subject, with standard errors."""
    labels = [subject.label for subject in report.subjects]
    domains = [row.domain for row in report.quality.rows if row.subject == labels[0]]
    series = [
        (number, label, [report.quality.row(label, domain).perplexity for domain in domains])
        for number, label in enumerate(labels)
    ]
    with styled():
        figure = _grouped_figure(domains, series, "perplexity (lower is better)")
        return svg(figure, "perplexity", _spoken("perplexity by text", domains, series))


def divergence_chart(report: Report) -> str:
    """KL divergence from the reference by domain, a bar for each other subject, with standard errors."""
    labels = [subject.label for subject in report.subjects]
    domains = [row.domain for row in report.quality.rows if row.subject == labels[0]]
    series: list[Series] = []
    for number, label in enumerate(labels[1:], 1):
        paired = [report.quality.row(label, domain).paired for domain in domains]
        series.append((number, label, [None if pair is None else pair.kl for pair in paired]))
    with styled():
        figure = _grouped_figure(domains, series, "KL divergence, nats (lower is better)")
        figure.axes[0].xaxis.set_major_locator(_few_ticks())
        return svg(figure, "divergence", _spoken("KL divergence from the first model by text", domains, series))


def throughput_chart(report: Report) -> str:
    """Tokens per second, a picture for each test; rows are runtimes, bars subjects, with standard deviations."""
    assert report.throughput is not None
    measured = [row for row in report.throughput.rows if row.tokens_per_second is not None]
    tests, labels = (list(dict.fromkeys(getattr(row, name) for row in measured)) for name in ("test", "subject"))
    colours = {subject.label: number for number, subject in enumerate(report.subjects)}
    spoken, panels = [], []
    for test in tests:
        rows = [row for row in measured if row.test == test]
        places = list(dict.fromkeys(map(_place, rows)))
        found = {(row.subject, _place(row)): row.tokens_per_second for row in rows}
        series = [
            (colours.get(label, len(colours) + number), label, [found.get((label, place)) for place in places])
            for number, label in enumerate(labels)
        ]
        panels.append((places, series))
        spoken.append(f"{test}: {_values(places, series, '{:.3g}'.format)}")
    heights = [0.7 + len(places) * (0.18 + 0.22 * len(labels)) for places, _ in panels]
    with styled():
        figure = new_figure(sum(heights) + 0.4, rows=len(panels), ratios=heights)
        for axes, test, (places, series) in zip(figure.axes, tests, panels, strict=True):
            _grouped(axes, places, series, f"{test}: tokens per second (higher is better)")
        _legend(figure.axes[0], len(labels))
        return svg(figure, "throughput", f"Bar chart of tokens per second. {'; '.join(spoken)}")


def _place(row: ThroughputRow) -> str:
    return ", ".join(filter(None, (without_version(row.runtime), row.provider)))


def _few_ticks() -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(4)


def _grouped_figure(names: Sequence[str], series: Sequence[Series], title: str) -> Any:
    figure = new_figure(0.9 + len(names) * (0.18 + 0.22 * len(series)))
    _grouped(figure.axes[0], names, series, title)
    _legend(figure.axes[0], len(series))
    return figure


def _grouped(axes: Any, names: Sequence[str], series: Sequence[Series], title: str) -> None:
    """A group of bars for each name, in it a bar for each series that has a value."""
    thick = 0.8 / len(series)
    for place, (number, label, values) in enumerate(series):
        known = [(row, value) for row, value in enumerate(values) if value is not None and isfinite(value.value)]
        rows = [row + (place - (len(series) - 1) / 2) * thick for row, _ in known]
        _bars(axes, rows, [value for _, value in known], thick, number, label)
    _name_rows(axes, names, title)


def _legend(axes: Any, count: int) -> None:
    axes.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.3, 1.0), ncols=min(3, count))


def _bars(
    axes: Any, places: Sequence[float], values: Sequence[Estimate], thick: float, number: int, label: str
) -> None:
    errors = [value.error if value.error is not None and isfinite(value.error) else 0.0 for value in values]
    axes.barh(
        places,
        [value.value for value in values],
        height=thick * 0.9,
        xerr=errors if any(errors) else None,
        color=mark(number),
        ecolor=INK,
        error_kw={"elinewidth": 0.8, "capsize": 1.5, "capthick": 0.8},
        label=label,
    )


def _name_rows(axes: Any, names: Sequence[str], title: str) -> None:
    axes.set_yticks(range(len(names)), [short(name) for name in names])
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel(title)


def _spoken(what: str, names: Sequence[str], series: Sequence[Series], show: Any = "{:.3g}".format) -> str:
    return f"Bar chart of {what}. {_values(names, series, show)}"


def _values(names: Sequence[str], series: Sequence[Series], show: Any) -> str:
    parts = []
    for _, label, values in series:
        known = [f"{name} {show(v.value)}" for name, v in zip(names, values, strict=True) if v is not None]
        parts.append(f"{label}: {', '.join(known)}")
    return "; ".join(parts)
