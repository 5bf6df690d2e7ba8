"""The solver's loops over the columns of a block, GPTQ's and the descent's: in torch, and fused where Triton works.

These say what the native loops (`native`) and the kernels (`fused`) compute, and are what both are held against.
"""

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from moepress.compress.gptq import fused
from moepress.compress.gptq.grid import search_scales_on
from moepress.compress.gptq.levels import Grid, SearchPlan


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
    """Round the columns of a block, the last first; each takes from the residuals of those behind it.

    Args:
        target_EBO: weights and what the blocks behind feed back, fp32; what is left in it does not matter.
        weight_EBO: the weights alone.
        unit_EBB: the block's part of the factor, lower with a unit diagonal.
        scales_EBO: of each weight.
        grid: what codes may stand for.
        values_EBO: gets the levels.
        residual_EBO: gets weight - level * scale.
        errors_EBO: gets target - level * scale.
    """
    columns = zip(
        *(m.unbind(1) for m in (target_EBO, weight_EBO, scales_EBO, values_EBO, residual_EBO, errors_EBO)), strict=True
    )
    for i, (target_EO, weight_EO, scale_EO, value_EO, residual_EO, error_EO) in reversed(list(enumerate(columns))):
        value_EO.copy_(grid.nearest(target_EO / scale_EO))
        torch.addcmul(target_EO, value_EO, scale_EO, value=-1, out=error_EO)
        torch.addcmul(weight_EO, value_EO, scale_EO, value=-1, out=residual_EO)
        if i:
            target_EBO[:, :i].baddbmm_(unit_EBB[:, i, :i, None], residual_EO[:, None])


def improve_columns(
    hessian_EBB: Tensor,
    slope_EBO: Tensor,
    scales_EBO: Tensor,
    grid: Grid,
    values_EBO: Tensor,
    moves_EBO: Tensor,
    sweeps: int = 1,
) -> None:
    """Best level of each column of a block in turn, given all others.

    Args:
        hessian_EBB: the block's part of the damped H, its diagonal positive.
        slope_EBO: (W - Q) H, fp32; what is left in it does not matter.
        scales_EBO: of each weight.
        grid: what codes may stand for.
        values_EBO: the levels; changed in place.
        moves_EBO: gets by how much the dequantized weights moved.
        sweeps: over the block's columns.
    """
    if sweeps > 1:
        before_EBO = values_EBO.clone()
        for _ in range(sweeps):
            improve_columns(hessian_EBB, slope_EBO.clone(), scales_EBO, grid, values_EBO, moves_EBO)
            slope_EBO.baddbmm_(hessian_EBB, moves_EBO, alpha=-1)
        torch.sub(values_EBO, before_EBO, out=moves_EBO).mul_(scales_EBO)
        return
    diagonal_EB1 = hessian_EBB.diagonal(dim1=1, dim2=2).unsqueeze(-1)
    factor_EBO = diagonal_EB1.reciprocal() * scales_EBO.reciprocal()
    columns = zip(*(m.unbind(1) for m in (slope_EBO, scales_EBO, values_EBO, moves_EBO, factor_EBO)), strict=True)
    for i, (slope_EO, scale_EO, value_EO, move_EO, factor_EO) in enumerate(columns):
        wanted_EO = grid.nearest(torch.addcmul(value_EO, slope_EO, factor_EO))
        torch.sub(wanted_EO, value_EO, out=move_EO).mul_(scale_EO)
        value_EO.copy_(wanted_EO)
        if i + 1 < slope_EBO.shape[1]:
            slope_EBO[:, i + 1 :].baddbmm_(hessian_EBB[:, i + 1 :, i, None], move_EO[:, None], alpha=-1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Loops:
    """What does the solver's column loops on a device.

    Attributes:
        round_columns, improve_columns: those of this module, or what gives the same.
        search_scales: of [E, I, O] weights and [E, I] importance, like `grid.search_scales_on`; scales [E, G, O].
        columns: that a call takes at most.
        block_sweeps: sweeps over a block's codes before the other blocks take from what moved.
        sweeps: over all codes, where options leave it open.
    """

    round_columns: Callable[..., None]
    improve_columns: Callable[..., None]
    search_scales: Callable[[Tensor, Tensor, Grid, int, torch.dtype, SearchPlan], Tensor]
    columns: int
    block_sweeps: int
    sweeps: int


def _search(
    weight_EIO: Tensor, importance_EI: Tensor, grid: Grid, group: int, dtype: torch.dtype, plan: SearchPlan
) -> Tensor:
    return search_scales_on(weight_EIO.mT, importance_EI, grid, group, dtype, plan).mT.contiguous()


PLAIN_LOOPS = Loops(
    round_columns=round_columns,
    improve_columns=improve_columns,
    search_scales=_search,
    columns=32,  # that take from each other one by one; those beyond take from them together
    block_sweeps=1,
    sweeps=1,
)
"""In torch alone."""
FUSED_LOOPS = Loops(
    round_columns=fused.round_columns,
    improve_columns=fused.improve_columns,
    search_scales=fused.search_scales,
    columns=fused.COLUMNS,
    block_sweeps=4,
    sweeps=8,
)
"""In a kernel the sweeps over a block cost next to nothing, and then fewer over all codes do: at 2 bits, where most
remain, these leave a hundredth of what the descent gains, at 4 bits nothing."""


@functools.cache
def inner_loops(device: torch.device) -> Loops:
    """Fused kernels where they give what torch gives, else torch."""
    if fused.available(device):
        try:
            if fused.agrees(device, round_columns, improve_columns):
                return FUSED_LOOPS
            reason = "its codes differ from torch's"
        except Exception as error:  # Triton, its compiler and the driver raise many types: none of them may end a run
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        warnings.warn(f"{device}: no fused GPTQ kernels ({reason}); plain torch is slower.", stacklevel=2)
    return PLAIN_LOOPS
