"""The solver's column loops and its search of scales as Triton kernels, for CUDA, where launches would cost most.

Every output row of every expert is independent of the others, so a program takes one expert and some rows, keeps what
the block's columns are given in registers and goes over them. The plain torch loops in `columns`, and `grid`, are the
reference: the kernels are used where they give the same as those on a small problem, tried once per device.
"""

import functools
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moepress.compress.gptq.grid import normalised, search_scales_on
from moepress.compress.gptq.levels import Grid, SearchPlan

COLUMNS = 128
"""Columns that one launch takes."""
ROWS = 32
"""Output rows of a program: 128 columns of them are 32 registers of each of its 128 threads."""
_INTERPRETED_ROWS = 256  # Triton's interpreter takes as long for many as for few
_SEARCHED = 64  # columns of a group that a program holds at a time while it searches scales
_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def round_columns(
    target_EBO: Tensor,
    weight_EBO: Tensor,
    unit_EBB: Tensor,
    scales_EBO: Tensor,
    grid: Grid,
    values_EBO: Tensor,
    residual_EBO: Tensor,
    errors_EBO: Tensor,
) -> None:
    """`columns.round_columns` in one launch; the target stays."""
    tensors = (target_EBO, weight_EBO, unit_EBB, scales_EBO, values_EBO, residual_EBO, errors_EBO)
    _launch("round_columns", tensors, 2, grid, ())


def improve_columns(
    hessian_EBB: Tensor,
    slope_EBO: Tensor,
    scales_EBO: Tensor,
    grid: Grid,
    values_EBO: Tensor,
    moves_EBO: Tensor,
    sweeps: int = 1,
) -> None:
    """`columns.improve_columns` in one launch; the slope stays."""
    _launch("improve_columns", (hessian_EBB, slope_EBO, scales_EBO, values_EBO, moves_EBO), 0, grid, (sweeps,))


def _launch(name: str, tensors: tuple[Tensor, ...], square: int, grid: Grid, more: tuple[int, ...]) -> None:
    """Start a kernel over [E, B, O] tensors, of which number `square` is [E, B, B]."""
    experts, width, rows = tensors[-1].shape
    assert width <= COLUMNS, f"{width} columns in one launch"
    assert all(t.stride(2) == 1 for n, t in enumerate(tensors) if n != square), "rows must lie next to each other"
    matrix = tensors[square]
    columns = [matrix.stride(2) if t is matrix else t.stride(1) for t in tensors]
    triton, kernels = _language()
    block, height = max(2, triton.next_power_of_2(width)), _height(matrix.device)
    getattr(kernels, name)[(experts, triton.cdiv(rows, height))](
        *tensors, _levels(grid, matrix.device), *(t.stride(0) for t in tensors), *columns, matrix.stride(1),
        rows, width, *more, grid.low, grid.high, STEPS=_steps(grid), B=block, R=height,
    )  # fmt: skip


def search_scales(
    weight_EIO: Tensor, importance_EI: Tensor, grid: Grid, group: int, dtype: torch.dtype, plan: SearchPlan
) -> Tensor:
    """`grid.search_scales_on` in one launch.

    Args:
        weight_EIO: fp32, with contiguous rows.
        importance_EI: of its columns.
        grid, group, dtype, plan: as there.

    Returns:
        scales [E, G, O] fp32; of dtypes that the kernel does not round to, by torch.
    """
    if dtype not in _KINDS:
        return search_scales_on(weight_EIO.mT, importance_EI, grid, group, dtype, plan).mT.contiguous()
    experts, columns, rows = weight_EIO.shape
    groups, info = columns // group, torch.finfo(dtype)
    out_EGO = weight_EIO.new_empty((experts, groups, rows))
    importance_EI = normalised(importance_EI.reshape(experts, groups, -1).float()).view(experts, columns)
    shares, turn, later = _tried(grid, plan, weight_EIO.device)
    (triton, kernels), height = _language(), _height(weight_EIO.device)
    assert weight_EIO.stride(2) == 1, "rows must lie next to each other"
    kernels.search_scales[(experts, groups, triton.cdiv(rows, height))](
        weight_EIO, importance_EI, out_EGO, _levels(grid, weight_EIO.device), shares,
        weight_EIO.stride(0), importance_EI.stride(0), out_EGO.stride(0), weight_EIO.stride(1), out_EGO.stride(1),
        rows, group, turn, later, len(shares), grid.low, grid.high,
        info.tiny * info.eps if dtype == torch.float16 else info.tiny, info.max,
        KIND=_KINDS[dtype], EITHER=grid.either_sign, STEPS=_steps(grid),
        C=min(_SEARCHED, triton.next_power_of_2(group)), R=height,
    )  # fmt: skip
    return out_EGO


def _height(device: torch.device) -> int:
    """Rows of a program."""
    return ROWS if device.type == "cuda" else _INTERPRETED_ROWS


@functools.cache
def _tried(grid: Grid, plan: SearchPlan, device: torch.device) -> tuple[Tensor, int, int]:
    """What a search tries, as the kernel wants it: shares, and the numbers `turn` and `later`."""
    shares = [*plan.factors, 0.0]
    if grid.either_sign:
        other = min(1.0, grid.high / max(grid.high, -grid.low))
        shares += [-factor * other for factor in plan.factors]
    later = len(shares)
    shares += [side * plan.step / 2 ** (n + 1) for n in range(plan.halvings) for side in (1, -1)]
    return torch.tensor(shares, dtype=torch.float32, device=device), len(plan.factors), later


def _steps(grid: Grid) -> int:
    """How often the kernels halve a table to find a level in it; never where levels are integers."""
    return 0 if grid.integers else max(1, (len(grid.levels) - 1).bit_length())


@functools.cache
def _levels(grid: Grid, device: torch.device) -> Tensor:
    """Levels and the middle above each, one behind the other, filled up to powers of two with what is never reached."""
    table, size = grid.table(), 1 << _steps(grid)
    padded = torch.full((2, size), torch.inf)
    if not grid.integers:
        padded[0, : len(table)], padded[1, : len(table) - 1] = table, (table[:-1] + table[1:]) / 2
    return padded.flatten().to(device)


@functools.cache
def _language() -> tuple[Any, Any]:
    """Triton and the kernels, imported where they are wanted."""
    import triton

    from moepress.compress.gptq import kernels

    return triton, kernels


def available(device: torch.device) -> bool:
    """Whether the kernels may be tried there: CUDA, or Triton's interpreter for tests."""
    return device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"


def agrees(device: torch.device, reference_round: Callable[..., None], reference_improve: Callable[..., None]) -> bool:
    """Whether all kernels give what the references give, to the bit, on small problems with exact sums.

    Every number is an integer times a power of two with few bits, so that the order of additions changes nothing.
    """
    grids = Grid(levels=tuple(map(float, range(-8, 8)))), Grid(levels=(-6.0, -3.0, -1.5, 0.0, 1.0, 4.0))
    turned = Grid(levels=grids[0].levels, either_sign=True)
    return all(
        _same_columns(device, grid, reference_round, reference_improve) and _same_scales(device, grid)
        for grid in (*grids, turned)
    )


def _integers(device: torch.device, least: int, largest: int, *shape: int) -> Tensor:
    """Random ones, as fp32, the same on every device."""
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randint(least, largest + 1, shape, generator=generator).float().to(device)


def _same_columns(device: torch.device, grid: Grid, *references: Callable[..., None]) -> bool:
    """Both loops over the columns of a block.

    Slopes are odd multiples of 2^-12, and what moves change them by are even ones, as is half of any curvature times
    scale: no step of the descent is ever a tie, which a last bit of a quotient would settle.
    """
    experts, width, rows = (2, COLUMNS - 1, 3 * ROWS - 1) if device.type == "cuda" else (1, 6, 20)
    sign = 1 - 2 * _integers(device, 0, 1, experts, width, rows) if grid.either_sign else 1
    scales = _integers(device, 256, 511, experts, width, rows) / 1024 * sign
    weight = (2 * _integers(device, -2048, 2047, experts, width, rows) + 1) / 4096
    slope = (2 * _integers(device, -2048, 2047, experts, width, rows) + 1) / 4096
    unit = (_integers(device, -1, 1, experts, width, width) / 4).tril(-1) + torch.eye(width, device=device)
    hessian = _integers(device, -1, 1, experts, width, width).tril(-1)
    hessian = hessian + hessian.mT + torch.diag_embed(_integers(device, 3, 9, experts, width))
    found: list[tuple[Tensor, ...]] = []
    for rounding, improving in (references, (round_columns, improve_columns)):
        values, residual, errors, moves = (torch.empty_like(weight) for _ in range(4))
        rounding(weight.clone(), weight, unit, scales, grid, values, residual, errors)
        improved = [values.clone()]
        improving(hessian, slope.clone(), scales, grid, improved[0], moves)
        improved += [moves.clone(), values.clone()]
        improving(hessian, slope.clone(), scales, grid, improved[2], moves, 3)
        found.append((values, residual, errors, *improved, moves))
    return all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def _same_scales(device: torch.device, grid: Grid) -> bool:
    """The search, over groups whose squares fp32 adds exactly."""
    experts, groups, rows = (2, 3, 2 * ROWS - 1) if device.type == "cuda" else (1, 1, 9)
    weight = _integers(device, -7, 7, experts, 8 * groups, rows)
    importance = 1 + _integers(device, 0, 1, experts, 8 * groups)
    importance[:, ::8] = 2  # so that the largest of a group is a power of two
    plan = SearchPlan(factors=(1.0, 0.75, 0.5), halvings=2)
    for dtype in (torch.bfloat16, torch.float16):
        expected = search_scales_on(weight.mT, importance, grid, 8, dtype, plan)
        found = search_scales(weight, importance, grid, 8, dtype, plan)
        if not torch.equal(found.mT, expected):
            return False
    return True
