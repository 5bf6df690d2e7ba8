"""What a code may stand for: a grid is data, and the solver's loops take any.

Symmetric integers are consecutive levels; tables (IQ4_NL, FP4) are levels at any distance; K-quants are integers with a
minimum per group; a scale of either sign puts the long side of the integers where a group's largest weight is.
"""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from moepress.converters.safetensors.scheme import Codes, Scheme
from moepress.models.storage.unpack import E2M1


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """The numbers that codes stand for, before scale and minimum: w = level * scale + offset.

    Attributes:
        levels: ascending, at most 256. Codes are the levels themselves where those are consecutive integers, their
            numbers from 0 elsewhere.
        either_sign: scales may be negative.
        minimum: groups have an offset too.
        zero: groups have a zero point too, one of the levels but the lowest: w = (level - zero) * scale.
    """

    levels: tuple[float, ...]
    either_sign: bool = False
    minimum: bool = False
    zero: bool = False

    @classmethod
    def of(cls, scheme: Scheme, *, either_sign: bool = False) -> "Grid":
        """The codes of a scheme: integers, which reach one further down than up, so that scales of either sign turn
        them and zero points move them; or floats, whose sides are alike."""
        if scheme.floats:
            return cls(levels=_E2M1_LEVELS)
        levels = tuple(map(float, range(scheme.code_min, scheme.code_max + 1)))
        return cls(levels=levels, either_sign=either_sign and scheme.symmetric, zero=not scheme.symmetric)

    @property
    def low(self) -> float:
        """The least level."""
        return self.levels[0]

    @property
    def high(self) -> float:
        """The largest level."""
        return self.levels[-1]

    @property
    def integers(self) -> bool:
        """Whether levels are consecutive integers that int8 holds."""
        return _integers(self.levels)

    def table(self) -> Tensor:
        """The levels, fp32 on the CPU."""
        return _table(self.levels)

    def table_on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """The levels and the middles between them on a device, fp32."""
        return _table_on(self.levels, device)

    def nearest(self, wanted: Tensor) -> Tensor:
        """The nearest level of each number, fp32: of integers ties to even, of a table the lower one."""
        if self.integers:
            return wanted.round().clamp_(self.low, self.high)
        table, middles = self.table_on(wanted.device)
        return table[torch.bucketize(wanted.contiguous(), middles)]

    def beside(self, values: Tensor, up: Tensor) -> Tensor:
        """The next level above each level where `up`, else that below; at an end the level itself."""
        step = torch.where(up, 1, -1)
        if self.integers:
            return (values + step).clamp_(self.low, self.high)
        table, middles = self.table_on(values.device)
        return table[(torch.bucketize(values.contiguous(), middles) + step).clamp_(0, len(self.levels) - 1)]

    def codes(self, values: Tensor) -> Tensor:
        """Codes of levels, int8 (a table's numbers above 127 wrap)."""
        if self.integers:
            return values.to(torch.int8)
        return torch.bucketize(values.contiguous(), self.table_on(values.device)[1]).to(torch.uint8).view(torch.int8)

    def values(self, codes: Tensor) -> Tensor:
        """Levels of int8 codes, fp32."""
        if self.integers:
            return codes.float()
        return self.table_on(codes.device)[0][codes.view(torch.uint8).int()]


_E2M1_LEVELS = (*(-size for size in E2M1[:0:-1]), *E2M1)


@functools.cache
def _integers(levels: tuple[float, ...]) -> bool:
    first = levels[0]
    return (
        first >= -128
        and levels[-1] <= 127
        and levels == tuple(first + k for k in range(len(levels)))
        and (first == int(first))
    )


@functools.cache
def _table(levels: tuple[float, ...]) -> Tensor:
    return torch.tensor(levels, dtype=torch.float32)


@functools.cache
def _table_on(levels: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Kept, since a copy to a GPU waits for all that the GPU was told before."""
    table = _table(levels).to(device)
    return table, (table[:-1] + table[1:]) / 2


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchPlan:
    """Which scales a search tries, as shares of the one that puts the largest magnitude on the largest level.

    Attributes:
        factors: tried first, descending.
        halvings: how often both neighbours of the best are tried, each time at half the distance.
    """

    factors: tuple[float, ...]
    halvings: int

    @classmethod
    def even(cls, steps: int, lowest: float, halvings: int) -> "SearchPlan":
        """Equal steps from 1 down to `lowest`.

        Raises:
            ValueError: a number is out of range.
        """
        if steps < 1 or not 0 < lowest <= 1 or halvings < 0:
            raise ValueError(
                f"steps={steps}, lowest={lowest}, halvings={halvings}: need steps >= 1, 0 < lowest <= 1, halvings >= 0."
            )
        factors = torch.linspace(1.0, lowest, steps, dtype=torch.float64).tolist()
        return cls(factors=tuple(factors), halvings=halvings)

    @property
    def step(self) -> float:
        """The distance of two factors; with one factor, that to a share of 0.3."""
        return self.factors[0] - self.factors[1] if len(self.factors) > 1 else 0.7


DEFAULT_SEARCH = SearchPlan.even(10, 0.3, 2)
"""At 2 to 4 bits as good as a grid of 48 shares, in a third of the time."""
POWERS_SEARCH = SearchPlan(factors=(2.0, 1.0, 0.5), halvings=0)
"""Of scales that are powers of two: the nearest, and one on each side."""
FLOATS_SEARCH = SearchPlan(factors=tuple(torch.linspace(1.5, 0.6, 12, dtype=torch.float64).tolist()), halvings=2)
"""Of E2M1: 6 has no neighbour above and 4 as its nearest, so that the largest magnitude is often better off on 4."""


def search_plan(codes: Codes) -> SearchPlan:
    """What is tried for the scales of codes."""
    return {Codes.NVFP4: FLOATS_SEARCH, Codes.MXFP4: POWERS_SEARCH}.get(codes, DEFAULT_SEARCH)
