"""Annealed sweeps over codes: a code may also move to the next level where that raises the loss a little.

A descent ends where no code can move by itself, and nearly all better solutions are several moves away. Simulated
annealing (Kirkpatrick, Gelatt and Vecchi, Science 220, 1983) gets there: a move that changes the loss by d is made
where d < -T log u with u uniform in (0, 1), while T falls from sweep to sweep. The unit of T is a row's own damped loss
for each of its columns. What each sweep and column may cost is drawn once and is the same for all rows, whose slopes
differ: so results hang neither on threads nor on how rows are cut into blocks.

Matrices lie as [E, I, O] here.
"""

import functools

import torch
from torch import Tensor

from moepress.compress.gptq.descent import Descent, above_zero, residual

_HOT, _COLD = 1.5, 0.7
_COLUMNS = 32  # that take from each other one by one; those beyond take from them together


@functools.lru_cache(maxsize=8)
def allowances(sweeps: int, columns: int) -> Tensor:
    """What a move may cost in each sweep and column, [S, I] fp32, as shares of a row's loss for each column."""
    drawn_SI = torch.empty(sweeps, columns).exponential_(generator=torch.Generator().manual_seed(0))
    falling_S = _HOT * (_COLD / _HOT) ** torch.linspace(0, 1, sweeps)
    return drawn_SI * falling_S[:, None]


def anneal(
    problem: Descent, sweeps: int, weight_EIO: Tensor, slope_EIO: Tensor, scales_EGO: Tensor, values_EIO: Tensor
) -> None:
    """Annealed sweeps over all codes; levels change in place, and the slope stays true.

    Args:
        problem: see `Descent`.
        sweeps: how many.
        weight_EIO: W.
        slope_EIO: (W - Q) times the damped H.
        scales_EGO: of the codes.
        values_EIO: levels.
    """
    columns = slope_EIO.shape[1]
    allowed_SI = allowances(sweeps, columns).to(slope_EIO.device)
    above_EIO = above_zero(values_EIO, problem.zeros)
    loss_EO = (residual(weight_EIO, above_EIO, scales_EGO) * slope_EIO).sum(dim=1).clamp(min=0)
    share_EO = loss_EO / columns
    for allowed_I in allowed_SI:
        for start in range(0, columns, _COLUMNS):
            block = slice(start, min(start + _COLUMNS, columns))
            groups_B = torch.arange(block.start, block.stop, device=slope_EIO.device) // problem.group
            moves_EBO = _block(
                problem, block, share_EO, allowed_I[block], slope_EIO, scales_EGO[:, groups_B], values_EIO
            )
            slope_EIO.baddbmm_(problem.hessian[:, :, block], moves_EBO, alpha=-1)
            slope_EIO[:, block].addcmul_(problem.ridge[:, block, None], moves_EBO, value=-1)


def _block(
    problem: Descent,
    block: slice,
    share_EO: Tensor,
    allowed_B: Tensor,
    slope_EIO: Tensor,
    scales_EBO: Tensor,
    values_EIO: Tensor,
) -> Tensor:
    """A sweep over some columns: by how much the dequantized weights moved, [E, B, O]."""
    own_EBB, slope_EBO, moves_EBO = problem.own(block), slope_EIO[:, block].clone(), torch.empty_like(scales_EBO)
    diagonal_EB = own_EBB.diagonal(dim1=1, dim2=2)
    for i in range(slope_EBO.shape[1]):
        value_EO, scale_EO, steep_EO = values_EIO[:, block.start + i], scales_EBO[:, i], slope_EBO[:, i]
        beside_EO = problem.grid.beside(value_EO, steep_EO * scale_EO > 0)
        by_EO = (beside_EO - value_EO) * scale_EO
        raised_EO = by_EO * (by_EO * diagonal_EB[:, i, None] - 2 * steep_EO)
        moves_EO = (by_EO != 0) & (raised_EO < share_EO * allowed_B[i])
        value_EO.copy_(torch.where(moves_EO, beside_EO, value_EO))
        moves_EBO[:, i] = torch.where(moves_EO, by_EO, 0.0)
        slope_EBO[:, i + 1 :].baddbmm_(own_EBB[:, i + 1 :, i, None], moves_EBO[:, i, None], alpha=-1)
    return moves_EBO
