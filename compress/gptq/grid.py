"""Scales for symmetric codes: a grid search per output row and group, and the rounding that goes with it.

Shape letters: E experts, O output rows, I input columns, G groups (static: column i belongs to group i // (I / G)), g
columns of one group, R rows of a chunk. A code q in `[code_min, code_max]` stands for `q * scale`; scales are positive,
and always exactly what the disk will hold.
"""

import torch

from moepress.compress.gptq.levels import DEFAULT_SEARCH, Grid, SearchPlan
from moepress.converters.safetensors.scheme import Scheme

CHUNK_ELEMENTS = 1 << 20
"""Weights searched at a time: small enough for caches, large enough that threads need not be woken too often."""


def storable_scales(scales: torch.Tensor, scale_dtype: torch.dtype, *, either_sign: bool = False) -> torch.Tensor:
    """Round scales to what `scale_dtype` can hold, keeping them finite and off zero.

    Args:
        scales: any shape, fp32, not NaN. Zero (nothing to represent) becomes 1.0, and so do negative ones.
        scale_dtype: torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn, or torch.float8_e8m0fnu for
            powers of two, of which the nearest is taken, and of two the larger.
        either_sign: negative scales stay so.

    Returns:
        fp32 tensor of the same shape, each value exactly representable in `scale_dtype`.
    """
    size = scales.abs() if either_sign else scales
    positive = torch.where(size > 0, size, 1.0).clamp(*_scale_range(scale_dtype))
    if scale_dtype == torch.float8_e8m0fnu:
        positive = (positive.view(torch.int32) + _HALF_A_MANTISSA & _EXPONENT).view(torch.float32)
    else:
        positive = positive.to(scale_dtype).float()
    return torch.where(scales < 0, -positive, positive) if either_sign else positive


_HALF_A_MANTISSA, _EXPONENT = 0x00400000, 0x7F800000  # of fp32


def _scale_range(scale_dtype: torch.dtype) -> tuple[float, float]:
    """The least and the largest scale. A power of two leaves room for six times it, and is a normal number of fp32."""
    if scale_dtype == torch.float8_e8m0fnu:
        return 2.0**-126, 2.0**125
    info = torch.finfo(scale_dtype)
    small = scale_dtype in (torch.float16, torch.float8_e4m3fn)  # whose subnormal numbers are wanted too
    return (info.tiny * info.eps if small else info.tiny), info.max


def absmax_scales(weight_EOI: torch.Tensor, scheme: Scheme, *, scale_dtype: torch.dtype) -> torch.Tensor:
    """The plain choice: the largest magnitude of a group falls on the largest level, so nothing is clipped.

    Args:
        weight_EOI: [E, O, I] fp32.
        scheme: bits, group size and what codes are.
        scale_dtype: dtype the scales are stored in.

    Returns:
        scales [E, O, G], fp32 values representable in `scale_dtype`.
    """
    experts, rows, columns = weight_EOI.shape
    grouped_EOGg = weight_EOI.reshape(experts, rows, scheme.groups(columns), -1)
    return storable_scales(grouped_EOGg.abs().amax(dim=-1).float() / Grid.of(scheme).high, scale_dtype)


def search_scales(
    weight_EOI: torch.Tensor,
    importance_EI: torch.Tensor,
    scheme: Scheme,
    *,
    scale_dtype: torch.dtype,
    plan: SearchPlan = DEFAULT_SEARCH,
) -> torch.Tensor:
    """`search_scales_on` the symmetric integers of a scheme: positive scales [E, O, G]."""
    group = scheme.columns_per_group(weight_EOI.shape[-1])
    return search_scales_on(weight_EOI, importance_EI, Grid.of(scheme), group, scale_dtype, plan)


def search_scales_on(
    weight_EOI: torch.Tensor,
    importance_EI: torch.Tensor,
    grid: Grid,
    group: int,
    scale_dtype: torch.dtype,
    plan: SearchPlan = DEFAULT_SEARCH,
) -> torch.Tensor:
    """Find the scale of each row and group with the least weighted rounding error, by a search from coarse to fine.

    The coarse shares shrink the scale that puts the largest magnitude on the largest level: clipping a few weights pays
    when the rest gets a finer grid. Levels may reach further down than up, so the smallest scale that clips neither
    side is tried too (half as large at 2 bits, where the extreme weights are negative), and where scales may have
    either sign the shares the other way round. Then both neighbours of the best at half the step, and again at half of
    that. Candidates are rounded to `scale_dtype` before their error is measured; of equal ones the first tried wins.

    Args:
        weight_EOI: [E, O, I] fp32.
        importance_EI: [E, I] fp32, >= 0: weight of a column's squared error (the diagonal of H). Where it is zero on a
            whole group, all columns of that group count alike.
        grid: what codes may stand for; without a minimum.
        group: columns that share a scale; divides I.
        scale_dtype: dtype the scales are stored in.
        plan: the shares.

    Returns:
        scales [E, O, G], fp32 values representable in `scale_dtype`, not zero; 1.0 for all-zero groups.
    """
    experts, rows, columns = weight_EOI.shape
    importance_EGg = normalised(importance_EI.reshape(experts, columns // group, -1).float())
    flat_RGg = weight_EOI.reshape(experts * rows, columns // group, -1)
    scales_RG = flat_RGg.new_empty((experts * rows, columns // group))
    # Small chunks stay in a CPU's cache; a GPU wants few launches.
    chunk = max(1, (CHUNK_ELEMENTS if weight_EOI.device.type == "cpu" else CHUNK_ELEMENTS << 8) // columns)
    for start in range(0, experts * rows, chunk):
        stop = min(start + chunk, experts * rows)
        owner_R = torch.arange(start, stop, device=weight_EOI.device) // rows
        scales_RG[start:stop] = _search_chunk(flat_RGg[start:stop], importance_EGg[owner_R], grid, scale_dtype, plan)
    return scales_RG.view(experts, rows, -1)


def normalised(importance_Gg: torch.Tensor) -> torch.Tensor:
    """Importance with the largest of each group (last dimension) 1; ones where a whole group has 0."""
    importance_Gg = torch.where(importance_Gg.amax(dim=-1, keepdim=True) > 0, importance_Gg, 1.0)
    return importance_Gg / importance_Gg.amax(dim=-1, keepdim=True)


def _search_chunk(
    weight_RGg: torch.Tensor, importance_RGg: torch.Tensor, grid: Grid, scale_dtype: torch.dtype, plan: SearchPlan
) -> torch.Tensor:
    """Best scale [R, G] of a few rows R; see `search_scales_on`."""
    up, down, either = grid.high, grid.low, grid.either_sign
    lowest_RG, highest_RG = weight_RGg.aminmax(dim=-1)
    base_RG = torch.maximum(highest_RG, -lowest_RG) / up
    unclipped_RG = torch.maximum(highest_RG / up, lowest_RG / down)
    best_RG = storable_scales(base_RG, scale_dtype)
    share_RG = torch.ones_like(best_RG)
    best_error_RG = torch.full_like(best_RG, torch.inf)

    def attempt(factor: float | torch.Tensor) -> None:
        scale_RG = storable_scales(base_RG * factor, scale_dtype, either_sign=either)
        level_RGg = grid.nearest(weight_RGg * scale_RG.reciprocal().unsqueeze(-1))
        error_RGg = level_RGg.mul_(scale_RG.unsqueeze(-1)).sub_(weight_RGg).square_().mul_(importance_RGg)
        error_RG = error_RGg.sum(dim=-1)
        better_RG = error_RG < best_error_RG
        torch.where(better_RG, scale_RG, best_RG, out=best_RG)
        torch.where(better_RG, error_RG, best_error_RG, out=best_error_RG)
        torch.where(better_RG, torch.as_tensor(factor, dtype=share_RG.dtype), share_RG, out=share_RG)

    for factor in plan.factors:
        attempt(factor)
    attempt(unclipped_RG / torch.where(base_RG > 0, base_RG, 1.0))
    if either:
        for factor in plan.factors:
            attempt(-factor * min(1.0, up / max(up, -down)))
    step = plan.step
    for _ in range(plan.halvings):
        step, middle_RG = step / 2, share_RG.clone()
        attempt(middle_RG + step)
        attempt(middle_RG - step)
    return best_RG


def round_to_nearest(weight_EOI: torch.Tensor, scales_EOG: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """Codes of the nearest representable weights (ties to even).

    Args:
        weight_EOI: [E, O, I] fp32.
        scales_EOG: [E, O, G] fp32, positive.
        scheme: bits and group size.

    Returns:
        codes [E, O, I], int8, within `[code_min, code_max]`.
    """
    grid = Grid.of(scheme)
    return grid.codes(nearest_levels(weight_EOI, scales_EOG, grid))


def nearest_levels(
    weight: torch.Tensor, scales: torch.Tensor, grid: Grid, zeros: torch.Tensor | None = None
) -> torch.Tensor:
    """Levels of the nearest representable weights, fp32 [..., O, I]; `scales` and `zeros` are [..., O, G]."""
    wanted = weight.reshape(*scales.shape, -1) / scales.unsqueeze(-1)
    if zeros is not None:
        wanted = wanted + zeros.unsqueeze(-1)
    return grid.nearest(wanted).view(weight.shape)


def above_zero(levels: torch.Tensor, zeros: torch.Tensor | None) -> torch.Tensor:
    """Levels [..., O, I] less their zero points [..., O, G]: how many scales a weight is."""
    if zeros is None:
        return levels
    above: torch.Tensor = (levels.unflatten(-1, (zeros.shape[-1], -1)) - zeros.unsqueeze(-1)).flatten(-2)
    return above


def dequantize(codes_EOI: torch.Tensor, scales_EOG: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """The weights that codes and scales stand for.

    Args:
        codes_EOI: [E, O, I] int8.
        scales_EOG: [E, O, G], fp32.
        scheme: bits and group size; must agree with the shapes.

    Returns:
        weight [E, O, I], fp32, `codes * scales`.

    Raises:
        ValueError: the number of scales does not fit the scheme.
    """
    groups = scheme.groups(codes_EOI.shape[-1])
    if scales_EOG.shape != (*codes_EOI.shape[:-1], groups):
        raise ValueError(
            f"scales {tuple(scales_EOG.shape)} do not fit codes {tuple(codes_EOI.shape)} in {groups} groups."
        )
    grouped_EOGg = codes_EOI.reshape(*scales_EOG.shape, -1).float()
    return grouped_EOGg.mul_(scales_EOG.unsqueeze(-1)).view(codes_EOI.shape)
