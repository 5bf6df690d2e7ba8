"""The solver in torch: all experts of a batch at once, on a GPU or wherever there are no native loops.

Inside, matrices lie as [E, I, O], so that a column of the weight is contiguous. Peak memory beyond the inputs, in fp32
copies: 3 of H while factoring, then 1 of H and 5 of W. Nothing is random, and nothing loops over experts.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from moepress.compress.gptq.annealing import anneal
from moepress.compress.gptq.columns import inner_loops
from moepress.compress.gptq.descent import Descent, above_zero, improve_codes, quadratic, refit, row_loss
from moepress.compress.gptq.factor import Factor, column_order, factor, ridge_of
from moepress.compress.gptq.levels import Grid
from moepress.compress.gptq.options import TORCH_ANNEALED, Task
from moepress.runs.phases import phase

_BLOCK = 128  # columns whose feedback from all behind them is one product


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """Codes int8 [E, O, I], scales fp32 [E, O, G], loss, energy and damping fp64 [E], as of `solver.Solved`."""

    codes: Tensor
    scales: Tensor
    loss: Tensor
    energy: Tensor
    damping: Tensor


def solve_batch(weight_EOI: Tensor, hessian_EII: Tensor, absmax_EOG: Tensor, task: Task) -> Found:
    """Quantize a batch; `absmax_EOG` are the scales where none are searched."""
    experts, columns = len(weight_EOI), weight_EOI.shape[2]
    product, options = float(weight_EOI.numel()) * columns, task.options
    importance_EI = hessian_EII.diagonal(dim1=1, dim2=2).clamp(min=0)
    back_EI = column_order(importance_EI, act_order=options.act_order).flip(1)
    loops = inner_loops(weight_EOI.device)
    with phase("factor", flops=experts * columns**3 / 3):
        found = factor(hessian_EII, importance_EI, back_EI, options.damp)
    with phase("scales"):
        turned_EIO = weight_EOI.mT.contiguous()
        if options.scale_search:
            given = (task.grid, task.group, task.dtype, task.search)
            scales_EGO = loops.search_scales(turned_EIO, importance_EI, *given)
        else:
            scales_EGO = absmax_EOG.mT.contiguous()
    raised_EIO = turned_EIO if task.zeros is None else task.raised(weight_EOI, absmax_EOG).mT.contiguous()
    zeros_EGO = None if task.zeros is None else task.zeros.mT.contiguous()
    with phase("columns", flops=product):
        values_EIO, errors_EIO = _compensated(raised_EIO, scales_EGO, found, back_EI, task)
    nearest = _nearest(raised_EIO, scales_EGO, task.grid), scales_EGO.clone()
    del raised_EIO
    sweeps = loops.sweeps if options.sweeps is None else options.sweeps
    if sweeps:
        with phase("slope", flops=product):
            place_EI = back_EI.argsort(dim=1)
            slope_EIO = _rows_of(found.unit.tril() @ errors_EIO, place_EI)
        del errors_EIO
        problem = Descent(
            hessian=hessian_EII,
            ridge=ridge_of(importance_EI, found.damping),
            grid=task.grid,
            group=task.group,
            dtype=task.dtype,
            sweeps=sweeps,
            lattice=task.lattice,
            zeros=zeros_EGO,
        )
        with phase("descent"):
            improve_codes(problem, slope_EIO, scales_EGO, values_EIO)
        if options.annealed:
            with phase("annealing"):
                anneal(problem, min(options.annealed, TORCH_ANNEALED), turned_EIO, slope_EIO, scales_EGO, values_EIO)
                improve_codes(problem, slope_EIO, scales_EGO, values_EIO)
        for _ in range(options.refits):
            with phase("refit", flops=2 * product):
                refit(problem, slope_EIO, scales_EGO, values_EIO)
            with phase("descent"):
                improve_codes(problem, slope_EIO, scales_EGO, values_EIO)
    with phase("losses", flops=3 * product):
        mine = values_EIO, scales_EGO
        return _better_rows(turned_EIO, hessian_EII, mine, nearest, found, task.grid, zeros_EGO)


def _rows_of(some_EIO: Tensor, index_EI: Tensor) -> Tensor:
    """The columns of the weight (rows here) of each expert by number."""
    return some_EIO[torch.arange(len(some_EIO), device=some_EIO.device)[:, None], index_EI]


def _compensated(
    turned_EIO: Tensor, scales_EGO: Tensor, found: Factor, back_EI: Tensor, task: Task
) -> tuple[Tensor, Tensor]:
    """GPTQ by feedback of residuals, as in `cpu`: levels in the columns' own order, errors in that of solving."""
    columns = turned_EIO.shape[1]
    loops = inner_loops(turned_EIO.device)
    weight_EIO, group_EI = _rows_of(turned_EIO, back_EI), back_EI // task.group
    residual_EIO, errors_EIO, values_EIO = (torch.empty_like(weight_EIO) for _ in range(3))
    for stop in range(columns, 0, -_BLOCK):
        start = max(0, stop - _BLOCK)
        target_EBO = weight_EIO[:, start:stop].clone()
        if stop < columns:
            target_EBO.baddbmm_(found.unit[:, stop:, start:stop].mT, residual_EIO[:, stop:])
        scales_EBO = _rows_of(scales_EGO, group_EI[:, start:stop])
        for last in range(stop, start, -loops.columns):
            block = slice(max(start, last - loops.columns), last)
            inner = slice(block.start - start, block.stop - start)
            loops.round_columns(
                target_EBO[:, inner],
                weight_EIO[:, block],
                found.unit[:, block, block],
                scales_EBO[:, inner],
                task.grid,
                values_EIO[:, block],
                residual_EIO[:, block],
                errors_EIO[:, block],
            )
            if block.start > start:
                before = slice(start, block.start)
                unit_EBB = found.unit[:, block, before].mT
                target_EBO[:, : inner.start].baddbmm_(unit_EBB, residual_EIO[:, block])
    errors_EIO.mul_(found.square[:, :, None])
    return _rows_of(values_EIO, back_EI.argsort(dim=1)), errors_EIO


def _nearest(turned_EIO: Tensor, scales_EGO: Tensor, grid: Grid) -> Tensor:
    """Levels of rounding to nearest."""
    experts, groups, rows = scales_EGO.shape
    grouped_EGgO = turned_EIO.view(experts, groups, -1, rows)
    return grid.nearest(grouped_EGgO / scales_EGO[:, :, None]).view(turned_EIO.shape)


def _better_rows(
    turned_EIO: Tensor,
    hessian_EII: Tensor,
    mine: tuple[Tensor, Tensor],
    nearest: tuple[Tensor, Tensor],
    found: Factor,
    grid: Grid,
    zeros_EGO: Tensor | None = None,
) -> Found:
    """Per row the better of two (levels [E, I, O], scales [E, G, O]); `nearest` where the damping is 0, or on a tie."""
    loss_EO, nearest_loss_EO = (
        row_loss(turned_EIO, hessian_EII, above_zero(levels, zeros_EGO), scales) for levels, scales in (mine, nearest)
    )
    keep_EO = (loss_EO < nearest_loss_EO) & (found.damping > 0)[:, None]
    values_EIO, scales_EGO = (torch.where(keep_EO[:, None], a, b) for a, b in zip(mine, nearest, strict=True))
    return Found(
        codes=grid.codes(values_EIO).mT.contiguous(),
        scales=scales_EGO.mT.contiguous(),
        loss=torch.where(keep_EO, loss_EO, nearest_loss_EO).sum(dim=1).clamp(min=0),
        energy=quadratic(turned_EIO, hessian_EII).sum(dim=1).clamp(min=0),
        damping=found.damping,
    )
