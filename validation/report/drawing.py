"""How pictures become inline SVG: no fonts, scripts or addresses, text as text, colours from the page's style sheet.

matplotlib draws with marker colours, which are then replaced: the ink by `currentColor`, series by `var(--series-N)`.
The same figure gives the same bytes, and its ids begin with the picture's own name.
"""

import io
import re
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from html import escape
from typing import Any

SERIES = 6  # colours in the style sheet; further series begin anew
INK = "#010203"
_MARKS = tuple(f"#0a0b{number:02x}" for number in range(SERIES))
NARROW_INCHES = 5.0  # 360 points: on a phone the text has its natural size
BROAD_INCHES = 11.0  # 792 points: the page's column on a desk, its text a little larger
MAP_INCHES = 10.0  # what a phone moves sideways
_SETTINGS: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "moepress",
    "text.parse_math": False,  # a domain may be called `$x$`
    "font.family": "sans-serif",
    "font.size": 11,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """A picture of the page.

    Attributes:
        svg: the element for a narrow page, with its text alternative.
        caption: what a reader sees above it.
        broad: the same for a broad page; empty where the first one serves there too.
        wide: on a phone it is moved sideways in its frame, so that it stays legible.
    """

    svg: str
    caption: str
    broad: str = ""
    wide: bool = False


def picture(caption: str, draw: Callable[[bool], str]) -> Picture:
    """Draw for a narrow and for a broad page; the argument says for which."""
    return Picture(caption=caption, svg=draw(False), broad=draw(True))


def width(*, broad: bool) -> float:
    """A figure's width in inches."""
    return BROAD_INCHES if broad else NARROW_INCHES


def mark(number: int) -> str:
    """The colour to draw a series with; the page's style sheet has the one that is seen."""
    return _MARKS[number % SERIES]


def styled() -> AbstractContextManager[None]:
    """Our settings for as long as a picture is made: matplotlib takes some at once, others only when it draws."""
    import matplotlib as mpl

    return mpl.rc_context(_SETTINGS)


def new_figure(
    height_inches: float, *, rows: int = 1, width: float = NARROW_INCHES, ratios: Sequence[float] = ()
) -> Any:
    """A figure of that width in inches, with `rows` axes below each other, of these heights in proportion.

    Returns:
        The figure; its axes are `figure.axes`.
    """
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height_inches), layout="constrained")
    FigureCanvasSVG(figure)
    figure.subplots(rows, squeeze=False, gridspec_kw={"height_ratios": list(ratios) or None})
    return figure


def short(name: str) -> str:
    """A name that has room beside a picture."""
    return name if len(name) <= 18 else f"{name[:17]}…"


def legend_above(figure: Any) -> None:
    """One legend for all axes, above them, in as many columns as there is room for; none where nothing is named."""
    found: dict[str, Any] = {}
    for axes in figure.axes:
        handles, labels = axes.get_legend_handles_labels()
        found |= dict(zip(labels, handles, strict=True))
    if not found:
        return
    for columns in range(len(found), 0, -1):
        names = [name for column in range(columns) for name in list(found)[column::columns]]  # to be read by rows
        legend = figure.legend(
            [found[name] for name in names],
            list(map(short, names)),
            frameon=False,
            loc="outside upper left",
            ncols=columns,
            borderpad=0,
        )
        if columns == 1 or legend.get_window_extent().width <= figure.bbox.width:
            return
        legend.remove()


def svg(figure: Any, name: str, spoken: str, *, wide: bool = False) -> str:
    """Draw, and make the drawing part of a page: own ids, no metadata, no addresses, the page's colours and font.

    Args:
        figure: with `styled()` still in force.
        name: begins the ids; unique in the page, letters, digits and hyphens.
        spoken: what the picture shows, for those who do not see it.
        wide: see `Picture`.
    """
    drawn = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with warnings.catch_warnings():
        # matplotlib measures text with its own font; the page's may have the letters that this one lacks.
        warnings.filterwarnings("ignore", message="Glyph")
        figure.savefig(drawn, format="svg", transparent=True, metadata=nothing)
    text = drawn.getvalue()
    body = text[text.index(">", text.index("<svg")) + 1 :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r'\bid="', f'id="{name}-', body)
    body = re.sub(r'(xlink:)?href="#', f'href="#{name}-', body).replace("url(#", f"url(#{name}-")
    body = body.replace('xlink:href="data:', 'href="data:')
    body = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", body)
    body = body.replace(INK, "currentColor")
    for number, colour in enumerate(_MARKS):
        body = body.replace(colour, f"var(--series-{number + 1})")
    view = re.search(r'viewBox="([^"]+)"', text)
    assert view is not None, "matplotlib writes a viewBox"
    kind = "chart wide" if wide else "chart"
    return f'<svg class="{kind}" role="img" aria-label="{escape(spoken)}" viewBox="{view[1]}">{body.strip()}'
