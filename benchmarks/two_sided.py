"""Rounding with a factor on both sides: codes Q that make tr(B (W - Q) H (W - Q)^T) small.

H [I, I] is the Hessian of the inputs, as everywhere; B [O, O] says what errors of two output rows cost together. With
B = 1 rows are independent, and this is what the solver minimises. Two steps, both of which leave the solver as it is
(the two-sided rounding of YAQA, arXiv 2505.22988, with whole rows in the place of single numbers):

1. With B = L D L^T, rows from the last of that order to the first: a row is to meet what it is plus what the rows done
   have left, t_o = w_o + sum_p L_po r_p with r_p = w_p - q_p. Rows are solved in small blocks, since the native loops
   work on many rows at once; inside of a block they do not see each other.
2. Sweeps over rows: given all others a row's loss is that of one row alone that is to meet w_o + sum_p B_po / B_oo r_p,
   so its codes go down by the solver's own exact descent.

Shape letters: O output rows, I input columns, G groups, R rows of a block.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moepress.compress.gptq import cpu, native
from moepress.compress.gptq.options import Task

BLOCK_ROWS = 16
SWEEPS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Rounded:
    """Codes int8 [O, I] and scales fp32 [O, G]."""

    codes: Tensor
    scales: Tensor


def two_sided_loss(residual_OI: Tensor, hessian_II: Tensor, side_OO: Tensor) -> float:
    """tr(B R H R^T), summed in fp64."""
    return float(((side_OO @ residual_OI) * (residual_OI @ hessian_II)).sum(dtype=torch.float64))


def residual_of(weight_OI: Tensor, found: Rounded, task: Task) -> Tensor:
    """W - Q."""
    values_OGg = task.grid.values(found.codes).view(len(weight_OI), found.scales.shape[1], -1)
    return weight_OI - (values_OGg * found.scales[:, :, None]).view_as(weight_OI)


def solve_two_sided(
    weight_OI: Tensor, hessian_II: Tensor, side_OO: Tensor, task: Task, start: Rounded, sweeps: int = SWEEPS
) -> Rounded:
    """Round one matrix; `start` is what the solver gives without B, which stays where this is no better.

    Args:
        weight_OI: what the codes are to meet, fp32.
        hessian_II: fp32, positive semidefinite.
        side_OO: B, fp32, positive definite.
        task: as of the solver; with native loops.
        start: codes and scales to fall back to.
        sweeps: of step 2.
    """
    work = cpu.Workspace()
    factor = cpu.factored(work, hessian_II, task)
    if factor is None:
        return start
    damped_II = hessian_II + factor.ridge.diag()
    tried = [start, _by_feedback(work, weight_OI, factor, side_OO, task)]
    best = min(tried, key=lambda one: two_sided_loss(residual_of(weight_OI, one, task), damped_II, side_OO))
    best = Rounded(codes=best.codes.clone(), scales=best.scales.clone())
    _sweep(weight_OI, damped_II, factor, side_OO, task, best, sweeps)
    return best


def _by_feedback(work: cpu.Workspace, weight_OI: Tensor, factor: cpu.Factored, side_OO: Tensor, task: Task) -> Rounded:
    """Step 1. The rows that matter most are solved first, and so stand last."""
    rows, columns = weight_OI.shape
    back_O = side_OO.diagonal().argsort()
    lower_OO = torch.linalg.cholesky(side_OO[back_O][:, back_O].double())
    unit_OO = (lower_OO / lower_OO.diagonal()).float()
    turned_OI, left_OI = weight_OI[back_O], torch.zeros_like(weight_OI)
    codes_OI = torch.empty(rows, columns, dtype=torch.int8)
    scales_OG = torch.empty(rows, columns // task.group)
    for stop in range(rows, 0, -BLOCK_ROWS):
        block = slice(max(0, stop - BLOCK_ROWS), stop)
        target_RI = turned_OI[block] + unit_OO[stop:, block].T @ left_OI[stop:]
        cpu.solve_rows(work, target_RI, factor, scales_OG[block], codes_OI[block], task)
        found = Rounded(codes=codes_OI[block], scales=scales_OG[block])
        left_OI[block] = residual_of(turned_OI[block], found, task)
    place_O = back_O.argsort()
    return Rounded(codes=codes_OI[place_O], scales=scales_OG[place_O])


def _sweep(
    weight_OI: Tensor,
    damped_II: Tensor,
    factor: cpu.Factored,
    side_OO: Tensor,
    task: Task,
    found: Rounded,
    sweeps: int,
) -> None:
    """Step 2, in place."""
    share_OO = side_OO / side_OO.diagonal()[:, None]
    left_OI, unused_1 = residual_of(weight_OI, found, task), torch.zeros(1, dtype=torch.float64)
    order = side_OO.diagonal().argsort(descending=True).tolist()
    for _ in range(sweeps):
        before_OI = found.codes.clone()
        for row in order:
            own = slice(row, row + 1)
            slope_1I = (share_OO[own] @ left_OI) @ damped_II
            given = (factor.hessian, factor.inverse, factor.diagonal, factor.ridge, task.grid, task.sweeps)
            native.descend(*given, found.codes[own], found.scales[own], slope_1I, unused_1)
            part = replace(found, codes=found.codes[own], scales=found.scales[own])
            left_OI[own] = residual_of(weight_OI[own], part, task)
        if torch.equal(before_OI, found.codes):
            return
