"""Experts and bits under a budget: every possible result's bytes and estimated loss, and the best of those that fit.

With bits by layer, each layer goes down its lower convex hull of (bytes, loss). The steps of all layers, in order of
loss saved per byte, are the solutions that a Lagrange multiplier finds, and the last that fits is taken. The
steps do not depend on the budget, so a larger budget never gives a larger loss.

What is quantized besides the experts has bits of its own, theirs, or bits to be chosen: every way to choose them is
tried with all else.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import pairwise
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, Field

from moepress.compress.gptq.include import Include
from moepress.errors import UsageError

GIB = 1 << 30
Width = int | None
"""Bits of the routed experts; None leaves them as they are."""
Key = TypeVar("Key")
Choice = TypeVar("Choice")


class Budget(BaseModel):
    """What the result may take, and what of it is spoken for already.

    Attributes:
        limit_bytes: the size given, or the target's memory.
        reserve_bytes: of it, what stays free for activations, the runtime, the screen.
        cache_bytes: of it, the KV cache of `context` tokens.
        predicting_bytes: of it, a multi-token-prediction layer that stays, at most.
        context: tokens in the KV cache; None for no cache.
        target: id of a GPU in the table.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    limit_bytes: int = Field(gt=0)
    reserve_bytes: int = Field(default=0, ge=0)
    cache_bytes: int = Field(default=0, ge=0)
    predicting_bytes: int = Field(default=0, ge=0)
    context: int | None = None
    target: str | None = None

    @property
    def weight_bytes(self) -> int:
        """What is left for weights; may be negative."""
        return self.limit_bytes - self.reserve_bytes - self.cache_bytes - self.predicting_bytes


class Unit(StrEnum):
    """What an estimated loss is: a share of the experts' squared output, or a KL divergence in nats per token."""

    SHARE = "share"
    NATS = "nats"

    def text(self, loss: float) -> str:
        """For people."""
        return f"{loss:.2%}" if self is Unit.SHARE else f"{loss:.2e} nats"


class Alternative(BaseModel):
    """One possible result.

    Attributes:
        experts: in every layer.
        bits: of the routed experts, their mean over layers where `mixed`; None: not quantized.
        mixed: bits differ by layer.
        weight_bytes: of all weights.
        loss: estimated, see `damage`.
        unit: of the loss.
        part_bits: of what is quantized besides, where they were to be chosen.
        fits: into the budget.
        chosen: this is the plan.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    experts: int = Field(gt=0)
    bits: float | None
    mixed: bool = False
    weight_bytes: int
    loss: float
    unit: Unit = Unit.SHARE
    part_bits: dict[Include, int] = {}
    fits: bool
    chosen: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Beside:
    """One way to quantize those parts whose bits are to be chosen.

    Attributes:
        include: their bits.
        size: their bytes.
        loss: what that costs.
    """

    include: Mapping[Include, int] = field(default_factory=dict)
    size: int = 0
    loss: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Space:
    """All that a choice depends on.

    Attributes:
        rest: count -> bytes of all that is not quantized.
        layer: count -> width -> bytes of what is quantized in one layer with experts.
        pruned: count -> loss by the experts that go.
        quantized: layer -> width -> loss by the bits.
        outside: width of most layers -> bytes of what is quantized outside of layers with experts.
        outside_losses: width of most layers -> loss by that.
        besides: ways to quantize parts whose bits are to be chosen, one at least.
        unit: of the losses.
    """

    rest: Mapping[int, int]
    layer: Mapping[int, Mapping[Width, int]]
    pruned: Mapping[int, float]
    quantized: Mapping[int, Mapping[Width, float]]
    outside: Mapping[Width, int] = field(default_factory=dict)
    outside_losses: Mapping[Width, float] = field(default_factory=dict)
    besides: Sequence[Beside] = (Beside(),)
    unit: Unit = Unit.SHARE


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One choice, its bytes and its loss.

    Attributes:
        count: experts in every layer.
        widths: layer -> bits.
        size: bytes of all weights.
        loss: estimated.
        part_bits: of what is quantized besides, where they were to be chosen.
    """

    count: int
    widths: Mapping[int, Width]
    part_bits: Mapping[Include, int] = field(default_factory=dict)
    size: int
    loss: float

    @property
    def mixed(self) -> bool:
        """Whether bits differ by layer."""
        return len(set(self.widths.values())) > 1

    @property
    def bits(self) -> float | None:
        """Mean bits over the layers, or None."""
        known = [width for width in self.widths.values() if width is not None]
        return sum(known) / len(known) if known else None


def most_common(widths: Mapping[int, Width]) -> Width:
    """The bits of most layers, of as many the larger: what is quantized outside of them has these."""
    found = Counter(width for width in widths.values() if width is not None)
    return max(found, key=lambda width: (found[width], width)) if found else None


def candidate(space: Space, count: int, widths: Mapping[int, Width], beside: Beside | None = None) -> Candidate:
    """A choice weighed; without a way to quantize the rest with the first."""
    way = beside or space.besides[0]
    outer = most_common(widths) if space.outside else None
    size = space.rest[count] + sum(space.layer[count][width] for width in widths.values())
    size += space.outside.get(outer, 0) + way.size
    loss = space.pruned[count] + sum(space.quantized[layer][width] for layer, width in widths.items())
    loss += space.outside_losses.get(outer, 0.0) + way.loss
    return Candidate(count=count, widths=widths, size=size, loss=loss, part_bits=way.include)


def uniform(space: Space) -> list[Candidate]:
    """Every count with every width, the same in all layers, and every way to quantize the rest."""
    return [
        candidate(space, count, dict.fromkeys(space.quantized, width), beside)
        for count, sizes in space.layer.items()
        for width in sizes
        for beside in space.besides
    ]


def by_layer(space: Space, count: int, limit: int, beside: Beside | None = None) -> Candidate | None:
    """The best bits by layer on the path of the Lagrange multiplier that fit, or None."""
    sizes, way = space.layer[count], beside or space.besides[0]
    hulls = {n: hull([(sizes[w], losses[w], w) for w in sizes]) for n, losses in space.quantized.items()}
    widths = {layer: points[0][2] for layer, points in hulls.items()}
    size, found = space.rest[count] + way.size + sum(points[0][0] for points in hulls.values()), None
    saved, best_saved = 0.0, 0.0
    # What is outside has the bits of most layers: with it sizes do not only grow along the path, nor losses only fall.
    for layer, more, width in [(None, 0, None), *descent(hulls)]:
        if layer is not None:
            saved += space.quantized[layer][widths[layer]] - space.quantized[layer][width]
            widths, size = widths | {layer: width}, size + more
        outer = most_common(widths) if space.outside else None
        if size + space.outside.get(outer, 0) <= limit:
            gained = saved - space.outside_losses.get(outer, 0.0)
            if found is None or gained >= best_saved:
                found, best_saved = widths, gained
    return None if found is None else candidate(space, count, found, way)


def descent(
    hulls: Mapping[Key, Sequence[tuple[int, float, Choice]]],
) -> list[tuple[Key, int, Choice]]:
    """The steps of all hulls as a multiplier takes them, those that save most per byte first: key, more bytes, choice.

    Of equal steps the first key's comes first.
    """
    steps = [
        (_slope(before, after), place, after[0] - before[0], key, after[2])
        for place, (key, points) in enumerate(hulls.items())
        for before, after in pairwise(points)
    ]
    return [(key, more, choice) for _, _, more, key, choice in sorted(steps, key=lambda step: step[:3])]


def hull(points: Iterable[tuple[int, float, Choice]]) -> list[tuple[int, float, Choice]]:
    """The points (bytes, loss) that a multiplier can choose, the fewest bytes first: each step saves less per byte."""
    found: list[tuple[int, float, Choice]] = []
    for point in sorted(points, key=lambda p: p[:2]):
        if found and point[1] >= found[-1][1]:
            continue
        while len(found) > 1 and _slope(found[-2], point) <= _slope(found[-2], found[-1]):
            found.pop()
        found.append(point)
    return found


def _slope(first: tuple[int, float, object], second: tuple[int, float, object]) -> float:
    return (second[1] - first[1]) / (second[0] - first[0])


def best(space: Space, limit: int, *, mixed: bool = False) -> Candidate | None:
    """The candidate of the smallest loss that fits; of equals the smaller, then the one with more experts."""
    found = [choice for choice in uniform(space) if choice.size <= limit]
    if mixed:
        ways = [by_layer(space, count, limit, beside) for count in space.layer for beside in space.besides]
        found += [choice for choice in ways if choice is not None]
    return min(found, key=lambda c: (c.loss, c.size, -c.count), default=None)


def choose(space: Space, budget: Budget, *, mixed: bool = False) -> tuple[Candidate, list[Alternative]]:
    """What a plan takes, and the table that it shows.

    Raises:
        UsageError: nothing fits; with the smallest size there is.
    """
    chosen = best(space, budget.weight_bytes, mixed=mixed)
    if chosen is None:
        least = min(uniform(space), key=lambda c: c.size)
        what = f"{least.count} experts" + ("" if least.bits is None else f" at {least.bits:g} bits")
        raise UsageError(too_small(budget, what, least.size))
    return chosen, alternatives(space, budget.weight_bytes, chosen)


def too_small(budget: Budget, what: str, size: int) -> str:
    """One sentence: what the smallest result is and takes, and what there is."""
    takes = f"The smallest possible result, {what}, takes {_size(size)}"
    if budget.cache_bytes:
        takes += f" beside {_size(budget.cache_bytes)} of KV cache"
    room = _size(budget.limit_bytes - budget.reserve_bytes)
    if budget.target is None:
        return f"{takes}, and the budget is {room}; give a larger one."
    return f"{takes}, and {budget.target} has {room} beside its reserve; choose a larger GPU."


def _size(size: float) -> str:
    return f"{size / GIB:.2f} GiB" if size >= GIB / 10 else f"{size / 2**20:.2f} MiB"


def alternatives(space: Space, limit: int, chosen: Candidate) -> list[Alternative]:
    """A few rows: at each width all experts, the most that fit and the fewest that do not; and what was chosen."""
    rows: dict[tuple[int, float | None], Candidate] = {}
    for c in uniform(space):
        rows[c.count, c.bits] = min(rows.get((c.count, c.bits), c), c, key=lambda c: _shown_first(c, limit))
    shown: dict[tuple[int, float | None], Candidate] = {}
    for bits in dict.fromkeys(bits for _, bits in rows):
        same = sorted((c for c in rows.values() if c.bits == bits), key=lambda c: c.count)
        fitting = [c for c in same if c.size <= limit]
        for c in (fitting[-1:] + [c for c in same if c.size > limit][:1]) + same[-1:]:
            shown[(c.count, c.bits)] = c
    if not chosen.mixed:
        shown[(chosen.count, chosen.bits)] = chosen
    ordered = sorted(shown.values(), key=lambda c: (-(c.bits or 99), -c.count))
    found = [
        _row(space, c, limit, chosen=not chosen.mixed and c.widths == chosen.widths and c.count == chosen.count)
        for c in ordered
    ]
    return [*found, _row(space, chosen, limit, chosen=True)] if chosen.mixed else found


def _shown_first(found: Candidate, limit: int) -> tuple[bool, float, float]:
    """Of one count and width the way to quantize the rest that loses least; where none fits the smallest."""
    fits = found.size <= limit
    return (not fits, found.loss, found.size) if fits else (True, found.size, found.loss)


def _row(space: Space, found: Candidate, limit: int, *, chosen: bool) -> Alternative:
    return Alternative(
        experts=found.count,
        bits=found.bits,
        mixed=found.mixed,
        weight_bytes=found.size,
        loss=found.loss,
        unit=space.unit,
        part_bits=dict(found.part_bits),
        fits=found.size <= limit,
        chosen=chosen,
    )


def verdict(space: Space, limit: int, chosen: Candidate) -> list[str]:
    """Whether fewer bits or fewer experts are the better use of these bytes, in a sentence; nothing where only one can
    be chosen."""
    if chosen.bits is None:
        return []
    fitting = [(c, c.count - chosen.count, (c.bits or 0) - chosen.bits) for c in uniform(space) if c.size <= limit]
    notes = []
    for lead, others in (
        ("Quantizing further beats pruning", [c for c, experts, bits in fitting if experts < 0 < bits]),
        ("Pruning beats quantizing further", [c for c, experts, bits in fitting if bits < 0 < experts]),
    ):
        if others:
            other = min(others, key=lambda c: c.loss)
            notes.append(
                f"{lead} at equal bytes: an estimated loss of {space.unit.text(chosen.loss)} with {_named(chosen)}, of "
                f"{space.unit.text(other.loss)} with {_named(other)}."
            )
    return notes


def _named(found: Candidate) -> str:
    return f"{found.count} experts at {found.bits:.3g} bits" + (" on average" if found.mixed else "")
