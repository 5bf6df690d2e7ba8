"""Grids with a minimum per group, w = level * scale + offset (the K-quants of GGUF, zero points elsewhere).

With scale and offset of each group fixed beforehand, W less its offsets is a problem without them, and the solver stays
as it is: scales may still be refitted, offsets are not.
"""

import torch
from torch import Tensor

from moepress.compress.gptq.grid import normalised, storable_scales
from moepress.compress.gptq.levels import DEFAULT_SEARCH, Grid, SearchPlan


def search_with_minimum(
    weight_EOI: Tensor,
    importance_EI: Tensor,
    grid: Grid,
    group: int,
    dtype: torch.dtype,
    plan: SearchPlan = DEFAULT_SEARCH,
) -> tuple[Tensor, Tensor]:
    """Scale and offset of each row and group, by alternating: codes for a scale, then least squares for both.

    Args:
        weight_EOI: fp32.
        importance_EI: as of `grid.search_scales_on`.
        grid: with a minimum.
        group: columns that share both; divides I.
        dtype: of scales and offsets as stored.
        plan: its factors are the shares of the range of a group that the levels are spread over at first.

    Returns:
        Scales and offsets [E, O, G], fp32, representable in `dtype`; a constant group has scale 1.
    """
    grouped_EOGg = weight_EOI.unflatten(-1, (-1, group))
    weigh_E1Gg = normalised(importance_EI.unflatten(-1, (-1, group)).float())[:, None]
    least_EOG, most_EOG = grouped_EOGg.aminmax(dim=-1)
    middle_EOG, range_EOG = (least_EOG + most_EOG) / 2, (most_EOG - least_EOG) / (grid.high - grid.low)
    best = torch.ones_like(least_EOG), least_EOG.to(dtype).float()
    best_error_EOG = torch.full_like(least_EOG, torch.inf)

    def levels(scale_EOG: Tensor, offset_EOG: Tensor) -> Tensor:
        return grid.nearest((grouped_EOGg - offset_EOG[..., None]) / scale_EOG[..., None])

    for factor in plan.factors:
        scale_EOG = storable_scales(range_EOG * factor, dtype)
        middle_offset_EOG = middle_EOG - scale_EOG * (grid.high + grid.low) / 2
        for offset_EOG in (middle_offset_EOG, least_EOG - scale_EOG * grid.low):  # both ends clipped alike, or one
            found = scale_EOG, offset_EOG.to(dtype).float()
            for _ in range(2):
                error_EOG = _error(grouped_EOGg, levels(*found), *found, weigh_E1Gg)
                better_EOG = error_EOG < best_error_EOG
                best_error_EOG = torch.where(better_EOG, error_EOG, best_error_EOG)
                best = torch.where(better_EOG, found[0], best[0]), torch.where(better_EOG, found[1], best[1])
                found = _fitted(grouped_EOGg, levels(*found), weigh_E1Gg, dtype, found)
    return best


def _error(grouped: Tensor, levels: Tensor, scale: Tensor, offset: Tensor, weigh: Tensor) -> Tensor:
    return (levels * scale[..., None] + offset[..., None] - grouped).square_().mul_(weigh).sum(dim=-1)


def _fitted(
    grouped: Tensor, levels: Tensor, weigh: Tensor, dtype: torch.dtype, before: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Weighed least squares for scale and offset given the levels; where those are all one, what was before."""
    total = weigh.sum(dim=-1)
    mean_level, mean = (weigh * levels).sum(dim=-1) / total, (weigh * grouped).sum(dim=-1) / total
    spread = (weigh * (levels - mean_level[..., None]).square()).sum(dim=-1)
    common = (weigh * (levels - mean_level[..., None]) * grouped).sum(dim=-1)
    usable = (spread > 0) & (common > 0)
    scale = torch.where(usable, storable_scales(common / torch.where(spread > 0, spread, 1.0), dtype), before[0])
    return scale, torch.where(usable, mean - scale * mean_level, before[1]).to(dtype).float()


def spread(offset_EOG: Tensor, group: int) -> Tensor:
    """Offsets of every weight, [E, O, I]."""
    return offset_EOG.repeat_interleave(group, dim=-1)
