"""Charts as inline SVG: no fonts, scripts or addresses in it, text as text, colours from the page's style sheet.

matplotlib draws with marker colours, which are then replaced: the ink by `currentColor`, series by `var(--series-N)`.
"""

import io
import re
from collections.abc import Sequence
from contextlib import AbstractContextManager
from html import escape
from typing import Any

from moepress.validation.results import Estimate, QualityRow
from moepress.validation.schema import Report
from moepress.validation.tables import size_text

SERIES = 6  # colours in the style sheet; further subjects begin anew
_INK = "#010203"
_MARKS = tuple(f"#0a0b{number:02x}" for number in range(SERIES))
_WIDTH_INCHES = 5.0  # 360 points: on a phone the text has its natural size
_SETTINGS: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "moepress",
    "font.family": "sans-serif",
    "font.size": 11,
    "text.color": _INK,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def perplexity_chart(report: Report) -> str:
    """Perplexity by domain, a bar for each subject, with standard errors."""
    labels = [subject.label for subject in report.subjects]
    domains = [row.domain for row in report.quality.rows if row.subject == labels[0]]
    rows = [[report.quality.row(label, domain) for domain in domains] for label in labels]
    with _styled():
        figure, axes = _figure(0.9 + len(domains) * (0.18 + 0.22 * len(labels)))
        thick = 0.8 / len(labels)
        for number, (label, series) in enumerate(zip(labels, rows, strict=True)):
            places = [place + (number - (len(labels) - 1) / 2) * thick for place in range(len(domains))]
            _bars(axes, places, [row.perplexity for row in series], thick, number, label)
        _name_rows(axes, domains, "perplexity (lower is better)")
        axes.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.3, 1.0), ncols=min(3, len(labels)))
        return _svg(figure, "perplexity", _spoken(labels, rows))


def size_chart(report: Report) -> str:
    """Size on disk, a bar for each subject."""
    labels = [subject.label for subject in report.subjects]
    sizes = [subject.stored_bytes for subject in report.subjects]
    with _styled():
        figure, axes = _figure(0.2 + 0.4 * len(labels))
        for number, size in enumerate(sizes):
            _bars(axes, [number], [Estimate(value=size)], 0.7, number, labels[number])
            axes.annotate(size_text(size), (size, number), xytext=(4, 0), textcoords="offset points", va="center")
        _name_rows(axes, labels, "")
        axes.set_xlim(0, (max(sizes) or 1) * 1.3)
        axes.set_xticks([])
        axes.spines["bottom"].set_visible(False)
        spoken = "; ".join(f"{label} {size_text(size)}" for label, size in zip(labels, sizes, strict=True))
        return _svg(figure, "size", f"Bar chart of size on disk: {spoken}")


def _styled() -> AbstractContextManager[None]:
    """Our settings for as long as a chart is made: matplotlib takes some at once, others only when it draws."""
    import matplotlib as mpl

    return mpl.rc_context(_SETTINGS)


def _figure(height_inches: float) -> tuple[Any, Any]:
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH_INCHES, height_inches), layout="constrained")
    FigureCanvasSVG(figure)
    return figure, figure.subplots()


def _bars(
    axes: Any, places: Sequence[float], values: Sequence[Estimate], thick: float, number: int, label: str
) -> None:
    errors = [value.error or 0.0 for value in values]
    axes.barh(
        places,
        [value.value for value in values],
        height=thick * 0.9,
        xerr=errors if any(errors) else None,
        color=_MARKS[number % SERIES],
        ecolor=_INK,
        error_kw={"elinewidth": 0.8, "capsize": 1.5, "capthick": 0.8},
        label=label,
    )


def _name_rows(axes: Any, names: Sequence[str], title: str) -> None:
    axes.set_yticks(range(len(names)), [_short(name) for name in names])
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel(title)


def _short(name: str) -> str:
    return name if len(name) <= 18 else f"{name[:17]}…"


def _spoken(labels: Sequence[str], rows: Sequence[Sequence[QualityRow]]) -> str:
    parts = []
    for label, series in zip(labels, rows, strict=True):
        parts.append(f"{label}: " + ", ".join(f"{row.domain} {row.perplexity.value:.3g}" for row in series))
    return f"Bar chart of perplexity by text. {'; '.join(parts)}"


def _svg(figure: Any, name: str, spoken: str) -> str:
    """Draw, and make the drawing part of a page: own ids, no metadata, no addresses, the page's colours and font."""
    drawn = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(drawn, format="svg", transparent=True, metadata=nothing)
    text = drawn.getvalue()
    body = text[text.index(">", text.index("<svg")) + 1 :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r'\bid="', f'id="{name}-', body)
    body = re.sub(r'(xlink:)?href="#', f'href="#{name}-', body).replace("url(#", f"url(#{name}-")
    body = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", body)
    body = body.replace(_INK, "currentColor")
    for number, mark in enumerate(_MARKS):
        body = body.replace(mark, f"var(--series-{number + 1})")
    view = re.search(r'viewBox="([^"]+)"', text)
    assert view is not None, "matplotlib writes a viewBox"
    return f'<svg class="chart" role="img" aria-label="{escape(spoken)}" viewBox="{view[1]}">{body.strip()}'
