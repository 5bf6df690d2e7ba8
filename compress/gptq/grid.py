"""Scales for symmetric codes: a grid search per output row and group, and the rounding that goes with it.

Shape letters: E experts, O output rows, I input columns, G groups (static: column i belongs to group i // (I / G)), g
columns of one group, R rows of a chunk. A code q in `[code_min, code_max]` stands for `q * scale`; scales are positive,
and always exactly what the disk will hold.
"""

import torch

from moepress.converters.safetensors.scheme import Scheme

DEFAULT_STEPS = 10
DEFAULT_LOWEST = 0.3
DEFAULT_HALVINGS = 2
_CHUNK_ELEMENTS = 1 << 20
"""Weights searched at a time: small enough for caches, large enough that threads need not be woken too often."""


def storable_scales(scales: torch.Tensor, scale_dtype: torch.dtype) -> torch.Tensor:
    """Round scales to what `scale_dtype` can hold, keeping them positive and finite.

    Args:
        scales: any shape, fp32, not NaN. Zero and negative values (nothing to represent) become 1.0.
        scale_dtype: torch.bfloat16, torch.float16 or torch.float32.

    Returns:
        fp32 tensor of the same shape, each value exactly representable in `scale_dtype`.
    """
    info = torch.finfo(scale_dtype)
    smallest = info.tiny * info.eps if scale_dtype == torch.float16 else info.tiny
    positive = torch.where(scales > 0, scales, 1.0).clamp(smallest, info.max)
    return positive.to(scale_dtype).float()


def absmax_scales(weight_EOI: torch.Tensor, scheme: Scheme, *, scale_dtype: torch.dtype) -> torch.Tensor:
    """The plain choice: the largest magnitude of a group falls on `code_max`, so nothing is clipped.

    Args:
        weight_EOI: [E, O, I] fp32.
        scheme: bits and group size.
        scale_dtype: dtype the scales are stored in.

    Returns:
        scales [E, O, G], fp32 values representable in `scale_dtype`.
    """
    experts, rows, columns = weight_EOI.shape
    grouped_EOGg = weight_EOI.reshape(experts, rows, scheme.groups(columns), -1)
    return storable_scales(grouped_EOGg.abs().amax(dim=-1).float() / scheme.code_max, scale_dtype)


def search_scales(
    weight_EOI: torch.Tensor,
    importance_EI: torch.Tensor,
    scheme: Scheme,
    *,
    scale_dtype: torch.dtype,
    steps: int = DEFAULT_STEPS,
    lowest: float = DEFAULT_LOWEST,
    halvings: int = DEFAULT_HALVINGS,
) -> torch.Tensor:
    """Find the scale of each row and group with the least weighted rounding error, by a search from coarse to fine.

    The coarse grid shrinks the scale that puts the largest magnitude on `code_max`, in equal steps down to the share
    `lowest`: clipping a few weights pays when the rest gets a finer grid. Codes reach one step further down than up, so
    the smallest scale that clips neither side is tried too (half as large at 2 bits, where the extreme weights are
    negative). Then both neighbours of the best at half the step, and again at half of that: at 2 to 4 bits as good as a
    grid of 48 in a third of the time. Candidates are rounded to `scale_dtype` before their error is measured; of equal
    ones the first tried wins.

    Args:
        weight_EOI: [E, O, I] fp32.
        importance_EI: [E, I] fp32, >= 0: weight of a column's squared error (the diagonal of H). Where it is zero on a
            whole group, all columns of that group count alike.
        scheme: bits and group size.
        scale_dtype: dtype the scales are stored in.
        steps: shrink factors of the coarse grid, >= 1.
        lowest: smallest shrink factor of it, in (0, 1].
        halvings: refinements, >= 0.

    Returns:
        scales [E, O, G], fp32 values representable in `scale_dtype`, positive; 1.0 for all-zero groups.

    Raises:
        ValueError: `steps`, `lowest` or `halvings` is out of range.
    """
    if steps < 1 or not 0 < lowest <= 1 or halvings < 0:
        raise ValueError(
            f"steps={steps}, lowest={lowest}, halvings={halvings}: need steps >= 1, 0 < lowest <= 1 and halvings >= 0."
        )
    experts, rows, columns = weight_EOI.shape
    groups = scheme.groups(columns)
    importance_EGg = importance_EI.reshape(experts, groups, -1).float()
    importance_EGg = torch.where(importance_EGg.amax(dim=-1, keepdim=True) > 0, importance_EGg, 1.0)
    importance_EGg = importance_EGg / importance_EGg.amax(dim=-1, keepdim=True)
    factors = torch.linspace(1.0, lowest, steps, dtype=torch.float64).tolist()
    flat_RGg = weight_EOI.reshape(experts * rows, groups, -1)
    scales_RG = flat_RGg.new_empty((experts * rows, groups))
    # Small chunks stay in a CPU's cache; a GPU wants few launches.
    chunk = max(1, (_CHUNK_ELEMENTS if weight_EOI.device.type == "cpu" else _CHUNK_ELEMENTS << 8) // columns)
    for start in range(0, experts * rows, chunk):
        stop = min(start + chunk, experts * rows)
        owner_R = torch.arange(start, stop, device=weight_EOI.device) // rows
        scales_RG[start:stop] = _search_chunk(
            flat_RGg[start:stop], importance_EGg[owner_R], scheme, scale_dtype, factors, halvings
        )
    return scales_RG.view(experts, rows, groups)


def _search_chunk(
    weight_RGg: torch.Tensor,
    importance_RGg: torch.Tensor,
    scheme: Scheme,
    scale_dtype: torch.dtype,
    factors: list[float],
    halvings: int,
) -> torch.Tensor:
    """Best scale [R, G] of a few rows R; see `search_scales`."""
    lowest_RG, highest_RG = weight_RGg.aminmax(dim=-1)
    base_RG = torch.maximum(highest_RG, -lowest_RG) / scheme.code_max
    unclipped_RG = torch.maximum(highest_RG / scheme.code_max, lowest_RG / scheme.code_min)
    best_RG = storable_scales(base_RG, scale_dtype)
    share_RG = torch.ones_like(best_RG)
    best_error_RG = torch.full_like(best_RG, torch.inf)
    scratch_RGg = torch.empty_like(weight_RGg)

    def attempt(factor: float | torch.Tensor) -> None:
        scale_RG = storable_scales(base_RG * factor, scale_dtype)
        scale_RG1 = scale_RG.unsqueeze(-1)
        torch.div(weight_RGg, scale_RG1, out=scratch_RGg)
        scratch_RGg.round_().clamp_(scheme.code_min, scheme.code_max).mul_(scale_RG1).sub_(weight_RGg)
        error_RG = scratch_RGg.square_().mul_(importance_RGg).sum(dim=-1)
        better_RG = error_RG < best_error_RG
        torch.where(better_RG, scale_RG, best_RG, out=best_RG)
        torch.where(better_RG, error_RG, best_error_RG, out=best_error_RG)
        torch.where(better_RG, torch.as_tensor(factor, dtype=share_RG.dtype), share_RG, out=share_RG)

    for factor in factors:
        attempt(factor)
    attempt(unclipped_RG / torch.where(base_RG > 0, base_RG, 1.0))
    step = factors[0] - factors[1] if len(factors) > 1 else 1 - DEFAULT_LOWEST
    for _ in range(halvings):
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
    grouped_EOGg = weight_EOI.reshape(*scales_EOG.shape, -1)
    codes_EOGg = (grouped_EOGg / scales_EOG.unsqueeze(-1)).round_().clamp_(scheme.code_min, scheme.code_max)
    return codes_EOGg.to(torch.int8).view(weight_EOI.shape)


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
