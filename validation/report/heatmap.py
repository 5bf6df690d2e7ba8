"""How the text used the experts: a map of layers by experts for each domain, with the removed ones struck out.

Shape letters: L layers with experts, E experts, P pixels of a cell's side. Cells are pixels of one small image, since
DeepSeek-R1 has 58 x 256 of them; their strength is opacity, so that the map lies on light and dark paper alike.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moepress.validation.report.cells import share_text
from moepress.validation.report.drawing import (
    MAP_INCHES,
    NARROW_INCHES,
    Picture,
    new_figure,
    picture,
    styled,
    svg,
    width,
)
from moepress.validation.report.schema import DomainUsage, Usage

_KEPT, _REMOVED = (0x2F, 0x86, 0xE0), (0xD9, 0x66, 0x1F)
_STEPS = 31  # shades; few, so that the image packs well
FULL_SHARE = 4.0
"""Times an even share that has the full colour."""
_WIDE_EXPERTS = 48
_CAPTION = "How often each expert was chosen: {}"


def usage_maps(usage: Usage) -> tuple[Picture, ...]:
    """A map for each domain."""
    return tuple(_map(usage, domain, number) for number, domain in enumerate(usage.domains, 1))


def strengths(counts_LE: Sequence[Sequence[int]]) -> NDArray[np.float64]:
    """How strongly cells are coloured, fp64 [L, E] in 0..1: the root of the share; 1 from `FULL_SHARE` on."""
    counts = np.asarray(counts_LE, dtype=np.float64)
    even = np.maximum(counts.sum(axis=1, keepdims=True), 1.0) / counts.shape[1]
    roots: NDArray[np.float64] = np.sqrt(np.minimum(counts / even / FULL_SHARE, 1.0))
    return roots


def cells(strength_LE: NDArray[np.float64], kept_LE: NDArray[np.bool_], side: int) -> NDArray[np.uint8]:
    """The map's image, uint8 [L * P, E * P, 4]; `side` is P. Removed cells have another colour and a stroke."""
    layers, experts = strength_LE.shape
    image = np.zeros((layers, side, experts, side, 4), np.uint8)
    colours = np.where(kept_LE[..., None], np.array(_KEPT, np.uint8), np.array(_REMOVED, np.uint8))
    image[..., :3] = colours[:, None, :, None, :]
    opacity = np.round(np.round(strength_LE * _STEPS) * (255 / _STEPS)).astype(np.uint8)
    image[..., 3] = opacity[:, None, :, None]
    for pixel in range(side):
        stroke = image[:, side - 1 - pixel, :, pixel, 3]
        stroke[~kept_LE] = 255
    return image.reshape(layers * side, experts * side, 4)


def _map(usage: Usage, domain: DomainUsage, number: int) -> Picture:
    """Of many experts there is one drawing, which a phone moves sideways."""
    name = f"usage-{number}"
    if len(domain.counts[0]) <= _WIDE_EXPERTS:
        return picture(
            _CAPTION.format(domain.domain),
            lambda broad: _drawn(usage, domain, f"{name}-broad" if broad else name, width(broad=broad)),
        )
    return Picture(
        svg=_drawn(usage, domain, name, MAP_INCHES, wide=True), caption=_CAPTION.format(domain.domain), wide=True
    )


def _drawn(usage: Usage, domain: DomainUsage, name: str, inches: float, *, wide: bool = False) -> str:
    experts, layers = len(domain.counts[0]), len(usage.layers)
    kept = kept_cells(usage, experts)
    image = cells(strengths(domain.counts), kept, 5 if experts > 128 else 8 if wide else 12)
    tall = layers * min(16.0, max(4.5, 300 / layers)) / 72
    strip = 0.2 if kept.all() else 0.4
    with styled():
        figure = new_figure(tall + strip + 1.0, rows=2, width=inches, ratios=(tall, strip))
        axes, legend = figure.axes
        axes.imshow(image, interpolation="none", aspect="auto", extent=(-0.5, experts - 0.5, layers - 0.5, -0.5))
        step = -(-layers // 12)
        axes.set_yticks(range(0, layers, step), [str(layer) for layer in usage.layers[::step]])
        _whole_numbers(axes)
        axes.set_xlabel("expert")
        axes.set_ylabel("layer")
        _legend(legend, removed=not kept.all(), room=inches / NARROW_INCHES)
        return svg(figure, name, _spoken(usage, domain, kept), wide=wide)


def kept_cells(usage: Usage, experts: int) -> NDArray[np.bool_]:
    """Which experts stay, bool [L, E]; all of them where none is removed."""
    kept = np.ones((len(usage.layers), experts), np.bool_)
    for row, numbers in enumerate(usage.kept or ()):
        kept[row] = np.isin(np.arange(experts), numbers)
    return kept


def _whole_numbers(axes: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(12, integer=True))


def _legend(axes: Any, *, removed: bool, room: float) -> None:
    """Colours from never chosen to the full colour: a row for experts that stay, below it one for removed ones.

    Its cells are about as wide on a broad page, which has `room` for more.
    """
    shares = [0.0, 0.25, 0.5, 1.0, 2.0, FULL_SHARE]
    rows = 2 if removed else 1
    strength = np.sqrt(np.array([[share / FULL_SHARE for share in shares]] * rows))
    kept = np.array([[True] * len(shares), [False] * len(shares)][:rows])
    columns = len(shares)
    image = cells(strength, kept, 12)
    axes.imshow(image, interpolation="none", aspect="auto", extent=(-0.5, columns - 0.5, rows - 0.5, -0.5))
    names = [f"{share:g}" for share in shares]
    names[-1] += "+"
    axes.set_yticks(range(rows), ["stays", "removed"][:rows] if removed else [""])
    axes.set_xticks(range(columns), names)
    axes.tick_params(length=0)
    axes.set_xlim(-0.5, columns * room - 0.5)
    axes.set_xlabel("times an even share", loc="left")
    for spine in axes.spines.values():
        spine.set_visible(False)


def _spoken(usage: Usage, domain: DomainUsage, kept_LE: NDArray[np.bool_]) -> str:
    counts = np.asarray(domain.counts, dtype=np.float64)
    total = max(float(counts.sum()), 1.0)
    text = f"Heat map of the choices of {counts.shape[1]} experts in {len(usage.layers)} layers on {domain.domain}"
    if not kept_LE.all():
        removed = int((~kept_LE).sum())
        text += f"; {removed} removed experts had {share_text(float(counts[~kept_LE].sum()) / total)} of the choices"
    return f"{text}; {int((counts == 0).sum())} were never chosen"
