"""After GPTQ: codes and scales that lower the exact loss, column by column and group by group, in torch.

H stands for the damped H here. With the residual R = W - Q and the slope S = R H, moving a weight by d changes the loss
by d^2 H_jj - 2 d S_j, and moving a group's scale by d changes it by d^2 q H q - 2 d q S: both minima are exact. S is
kept true all the time, so no step ever works on an old one and no product tells the loss.

Matrices lie as [E, I, O], so that a column of the weight is contiguous.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from moepress.compress.gptq.columns import inner_loops
from moepress.compress.gptq.grid import storable_scales
from moepress.compress.gptq.levels import Grid
from moepress.compress.gptq.options import Lattice

_QUADRATIC_COLUMNS = 512  # thin products are slow


@dataclass(frozen=True, slots=True, kw_only=True)
class Descent:
    """What stays the same while a batch descends.

    Attributes:
        hessian: [E, I, I], not damped.
        ridge: [E, I], what damping adds to its diagonal.
        grid: what codes may stand for.
        group: columns that share a scale.
        dtype: what scales are rounded to.
        sweeps: over all codes, at most; ended when none changes.
        lattice: of which scales are taken, [E, O, G]; or None.
        zeros: [E, G, O] zero points; or None. The slope and what moves a code know nothing of them.
    """

    hessian: Tensor
    ridge: Tensor
    grid: Grid
    group: int
    dtype: torch.dtype
    sweeps: int
    lattice: Lattice | None = None
    zeros: Tensor | None = None

    def own(self, span: slice) -> Tensor:
        """The damped H of some columns among themselves, a copy."""
        found_EBB = self.hessian[:, span, span].clone()
        found_EBB.diagonal(dim1=1, dim2=2).add_(self.ridge[:, span])
        return found_EBB


def improve_codes(
    problem: Descent, slope_EIO: Tensor, scales_EGO: Tensor, values_EIO: Tensor, span: slice | None = None
) -> None:
    """Sweeps over the codes of all columns, or of one group of them, until none changes or all sweeps are spent.

    Levels change in place; the slope stays true, within the group where one is given. Whether codes still change is
    asked on the CPU alone: a GPU would be waited for, once a sweep.
    """
    inside, loops = span or slice(0, slope_EIO.shape[1]), inner_loops(slope_EIO.device)
    width, inner = loops.columns, min(loops.block_sweeps, problem.sweeps)
    blocks = [slice(start, min(start + width, inside.stop)) for start in range(inside.start, inside.stop, width)]
    within = len(blocks) == 1 and inner > 1  # one call makes all sweeps, and rows end by themselves
    asked = slope_EIO.device.type == "cpu"
    for _ in range(1 if within else problem.sweeps):
        moved = torch.zeros((), dtype=torch.bool)
        for block in blocks:
            slope_EBO, values_EBO = slope_EIO[:, block], values_EIO[:, block]
            groups_B = torch.arange(block.start, block.stop, device=slope_EIO.device) // problem.group
            moves_EBO, scales_EBO = torch.empty_like(slope_EBO), scales_EGO[:, groups_B]
            given = (problem.own(block), slope_EBO.clone(), scales_EBO, problem.grid, values_EBO, moves_EBO)
            loops.improve_columns(*given, problem.sweeps if within else inner)
            slope_EIO[:, inside].baddbmm_(problem.hessian[:, inside, block], moves_EBO, alpha=-1)
            slope_EBO.addcmul_(problem.ridge[:, block, None], moves_EBO, value=-1)
            if asked:
                moved |= moves_EBO.any()
        if asked and not bool(moved):
            break


def refit(problem: Descent, slope_EIO: Tensor, scales_EGO: Tensor, values_EIO: Tensor) -> None:
    """Every group's scales and then its codes, given all others; all three change in place.

    A group takes from the slope what those before it have moved, and when all are done what those behind it have: one
    product in all, and the slope is true again.
    """
    hessian_EII, columns, width = problem.hessian, slope_EIO.shape[1], problem.group
    change_EIO = torch.empty_like(slope_EIO)
    for start in range(0, columns, width):
        span = slice(start, start + width)
        slope_EgO, before_EO = slope_EIO[:, span], scales_EGO[:, start // width].clone()
        if start:
            slope_EgO.baddbmm_(hessian_EII[:, span, :start], change_EIO[:, :start], alpha=-1)
        zero_E1O = None if problem.zeros is None else problem.zeros[:, start // width, None]
        steps_EgO = above_zero(values_EIO[:, span], zero_E1O)
        torch.mul(steps_EgO, before_EO[:, None], out=change_EIO[:, span])
        refit_group(problem, span, slope_EgO, steps_EgO, scales_EGO[:, start // width])
        improve_codes(problem, slope_EIO, scales_EGO, values_EIO, span)
        after_EgO = above_zero(values_EIO[:, span], zero_E1O) * scales_EGO[:, start // width, None]
        change_EIO[:, span] = after_EgO - change_EIO[:, span]
    for start in range(0, columns - width, width):
        stop = start + width
        slope_EIO[:, start:stop].baddbmm_(hessian_EII[:, start:stop, stop:], change_EIO[:, stop:], alpha=-1)


def refit_group(problem: Descent, span: slice, slope_EgO: Tensor, values_EgO: Tensor, scale_EO: Tensor) -> None:
    """Move each row's scale of one group to the least-squares value; scale and slope are changed in place.

    `values` are levels less their zero points.
    """
    response_EgO = problem.own(span) @ values_EgO
    gain_EO = (values_EgO * slope_EgO).sum(dim=1)
    curvature_EO = (values_EgO * response_EgO).sum(dim=1)
    wanted_EO = scale_EO + gain_EO / torch.where(curvature_EO > 0, curvature_EO, 1.0)
    either = problem.grid.either_sign
    if problem.lattice is None:
        after_EO = storable_scales(wanted_EO, problem.dtype, either_sign=either)
    else:
        after_EO = problem.lattice.of(..., span.start // problem.group).nearest(wanted_EO)
    step_EO = after_EO - scale_EO
    better_EO = (wanted_EO * scale_EO > 0) & (curvature_EO > 0) & (after_EO != 0)
    better_EO &= step_EO * (step_EO * curvature_EO - 2 * gain_EO) < 0
    step_EO = torch.where(better_EO, step_EO, 0.0)
    scale_EO.add_(step_EO)
    slope_EgO.addcmul_(response_EgO, step_EO.unsqueeze(1), value=-1)


def above_zero(values_EIO: Tensor, zeros_EGO: Tensor | None) -> Tensor:
    """`grid.above_zero` of matrices that lie as [E, I, O]."""
    if zeros_EGO is None:
        return values_EIO
    grouped_EGgO = values_EIO.unflatten(1, (zeros_EGO.shape[1], -1))
    above_EIO: Tensor = (grouped_EGgO - zeros_EGO.unsqueeze(2)).flatten(1, 2)
    return above_EIO


def residual(weight_EIO: Tensor, values_EIO: Tensor, scales_EGO: Tensor) -> Tensor:
    """W - Q, [E, I, O] fp32."""
    experts, columns, rows = weight_EIO.shape
    values_EGgO = values_EIO.view(experts, scales_EGO.shape[1], -1, rows)
    return weight_EIO - (values_EGgO * scales_EGO.unsqueeze(2)).view(experts, columns, rows)


def row_loss(weight_EIO: Tensor, hessian_EII: Tensor, values_EIO: Tensor, scales_EGO: Tensor) -> Tensor:
    """(w - q) H (w - q)^T of every row, [E, O] fp64 (products in fp32, sums in fp64)."""
    return quadratic(residual(weight_EIO, values_EIO, scales_EGO), hessian_EII)


def quadratic(rows_EIO: Tensor, hessian_EII: Tensor) -> Tensor:
    """v H v^T of every row v, [E, O] fp64; of the symmetric H only the lower triangle is multiplied."""
    experts, columns, rows = rows_EIO.shape
    total_EO = torch.zeros(experts, rows, dtype=torch.float64, device=rows_EIO.device)
    for left in range(0, columns, _QUADRATIC_COLUMNS):
        span = slice(left, left + _QUADRATIC_COLUMNS)
        part_EPO = rows_EIO[:, span]
        product_EPO = hessian_EII[:, span, span] @ part_EPO
        if left:
            product_EPO.baddbmm_(hessian_EII[:, span, :left], rows_EIO[:, :left], alpha=2)
        total_EO += product_EPO.mul_(part_EPO).sum(dim=1, dtype=torch.float64)
    return total_EO
