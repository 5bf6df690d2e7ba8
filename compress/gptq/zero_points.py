"""Zero points: w = (code - zero) * scale with an integer zero for each row and group, as asymmetric layouts have them.

Scale and zero point are searched first. What a zero point adds, zero * scale, is then a constant of its group, so that
rounding and descent meet the weights plus that and know nothing of it; only where a scale is refitted, and where a loss
is told, are zero points taken off the codes. Zero points themselves stay as they were found.

Letters: E experts, O output rows, I input columns, G groups, g columns of a group, R rows of a chunk.
"""

import torch
from torch import Tensor

from moepress.compress.gptq.grid import CHUNK_ELEMENTS, normalised, storable_scales
from moepress.compress.gptq.levels import Grid

_SHARES, _LOWEST, _HALVINGS = 8, 0.5, 2
"""At 2 to 4 bits within two thousandths of the error that three times as many shares leave."""


def search_with_zero(
    weight_EOI: Tensor, importance_EI: Tensor, grid: Grid, group: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Scale and zero point of each row and group with the least weighted rounding error, from coarse to fine.

    Tried are shares of the scale that spreads the levels over a group's range and 0, from the one at which no zero
    point clips anything, each with both zero points between which the middle of the range lies. Then both neighbours of
    the best at half the step, and at half of that; last the least-squares scale of the best's codes.

    Args:
        weight_EOI: fp32.
        importance_EI: as of `grid.search_scales_on`.
        grid: consecutive integers, with zero points.
        group: columns that share both; divides I.
        dtype: of scales as stored.

    Returns:
        scales [E, O, G], fp32, positive, representable in `dtype`, 1 for all-zero groups; zeros [E, O, G], fp32, levels
        of the grid but the lowest, which the GPTQ layout can not store.
    """
    experts, rows, columns = weight_EOI.shape
    importance_EGg = normalised(importance_EI.reshape(experts, columns // group, -1).float())
    flat_RGg = weight_EOI.reshape(experts * rows, columns // group, -1)
    found = weight_EOI.new_empty((2, experts * rows, columns // group))
    chunk = max(1, (CHUNK_ELEMENTS if weight_EOI.device.type == "cpu" else CHUNK_ELEMENTS << 8) // columns)
    for start in range(0, experts * rows, chunk):
        stop = min(start + chunk, experts * rows)
        owner_R = torch.arange(start, stop, device=weight_EOI.device) // rows
        search = _Search(flat_RGg[start:stop], importance_EGg[owner_R], grid, dtype)
        found[0, start:stop], found[1, start:stop] = search.best()
    scales_EOG, zeros_EOG = found.view(2, experts, rows, -1)
    return scales_EOG, zeros_EOG


class _Search:
    """The best scale and zero point so far of a few rows, [R, G]."""

    def __init__(self, weight_RGg: Tensor, importance_RGg: Tensor, grid: Grid, dtype: torch.dtype) -> None:
        self._weight, self._importance, self._grid, self._dtype = weight_RGg, importance_RGg, grid, dtype
        lowest_RG, highest_RG = weight_RGg.aminmax(dim=-1)
        lowest_RG, highest_RG = lowest_RG.clamp(max=0), highest_RG.clamp(min=0)  # a zero point is a code
        self._base = (highest_RG - lowest_RG) / (grid.high - grid.low)
        self._middle = (highest_RG + lowest_RG) / 2
        self.scale = storable_scales(self._base, dtype)
        self.zero = torch.zeros_like(self._base)
        self._share = torch.ones_like(self._base)
        self._error = torch.full_like(self._base, torch.inf)

    def best(self) -> tuple[Tensor, Tensor]:
        """Try all, and give scale and zero point."""
        factors = torch.linspace(
            1 + 1 / (self._grid.high - self._grid.low), _LOWEST, _SHARES, dtype=torch.float64
        ).tolist()
        for factor in factors:
            self._try_share(torch.full_like(self._share, factor))
        step = factors[0] - factors[1]
        for _ in range(_HALVINGS):
            step, middle = step / 2, self._share.clone()
            self._try_share(middle + step)
            self._try_share(middle - step)
        self._try(*self._fitted())
        return self.scale, self.zero

    def _try_share(self, share: Tensor) -> None:
        scale = storable_scales(self._base * share, self._dtype)
        below = ((self._grid.high + self._grid.low) / 2 - self._middle / scale).floor()
        self._try(scale, below, share)
        self._try(scale, below + 1, share)

    def _steps(self, scale: Tensor, zero: Tensor) -> Tensor:
        """How many scales the nearest weights are, [R, G, g]."""
        wanted = (self._weight * scale.reciprocal()[..., None]).add_(zero[..., None])
        return self._grid.nearest(wanted).sub_(zero[..., None])

    def _try(self, scale: Tensor, zero: Tensor, share: Tensor | None = None) -> None:
        zero = zero.clamp(self._grid.low + 1, self._grid.high)
        steps = self._steps(scale, zero)
        error = steps.mul_(scale[..., None]).sub_(self._weight).square_().mul_(self._importance).sum(dim=-1)
        better = error < self._error
        self._error = torch.where(better, error, self._error)
        self.scale = torch.where(better, scale, self.scale)
        self.zero = torch.where(better, zero, self.zero)
        if share is not None:
            self._share = torch.where(better, share, self._share)

    def _fitted(self) -> tuple[Tensor, Tensor]:
        """The least-squares scale of the best's codes, where it is positive."""
        steps = self._steps(self.scale, self.zero)
        power = (steps.square() * self._importance).sum(dim=-1)
        common = (steps * self._weight * self._importance).sum(dim=-1)
        usable = (power > 0) & (common > 0)
        wanted = common / torch.where(power > 0, power, 1.0)
        return torch.where(usable, storable_scales(wanted, self._dtype), self.scale), self.zero
