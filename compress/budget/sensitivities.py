"""What was measured of a model's sensitivity, kind by kind of matrix: the rows that a profile holds. Without torch."""

import itertools
from collections.abc import Iterable, Mapping, Sequence

from pydantic import BaseModel, ConfigDict, Field

from moepress.compress.gptq.grid_rows import Layer
from moepress.compress.gptq.kinds import Kind

RANGES = 8
"""Ranges of layers that are told apart, at most; the first and the last layer are ranges of their own."""
TOKENS = 4096
"""Of the calibration text, in whole windows spread over it; two windows at least, for an error."""
ROUNDED = "rounded"
"""What losses of matrices that are merely rounded are called, beside those of GGUF's types."""

Key = tuple[Kind, tuple[int, int] | None]
"""A kind of matrix, and the range of layers (first, last) that it lies in, if in any."""


class KindLoss(BaseModel):
    """What rounding one kind costs.

    Attributes:
        kind: which; None: all kinds at once.
        layers: the first and the last; None: all of them, or none.
        kl: mean divergence from the model's own answers, in nats per token.
        error: its standard error over windows.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Kind | None
    layers: tuple[Layer, Layer] | None = None
    kl: float = Field(ge=0, allow_inf_nan=False)
    error: float = Field(ge=0, allow_inf_nan=False)


def ranges_of(layers: int) -> list[tuple[int, int]]:
    """Ranges of consecutive layers (first, last): single ones where they are few, else eight with both edges alone."""
    if layers <= RANGES:
        return [(n, n) for n in range(layers)]
    parts = RANGES - 2
    cuts = [1 + (layers - 2) * n // parts for n in range(parts + 1)]
    return [(0, 0), *((a, b - 1) for a, b in itertools.pairwise(cuts)), (layers - 1, layers - 1)]


def streams_at(layers: int) -> tuple[float, int]:
    """Ways through the model, mean over its layers, and at its end; with three kinds in a layer."""
    starts = [first for first, _ in ranges_of(layers)]
    mean = 3 + 3 * sum(layers - first for first in starts) / layers
    return mean, 3 + 3 * len(starts)


def together(rows: Sequence[KindLoss]) -> float:
    """What all kinds at once lose, over the sum of what each loses: 1 where divergences add up."""
    sums = sum(row.kl for row in rows if row.kind is not None)
    whole = next((row.kl for row in rows if row.kind is None), sums)
    return whole / sums if sums > 0 else 1.0


def by_kind(rows: Iterable[KindLoss]) -> Mapping[Key, KindLoss]:
    """Rows by what they are of."""
    return {(row.kind, row.layers): row for row in rows if row.kind is not None}
