"""Rounding with a factor on both sides: codes Q that make tr(B (W - Q) H (W - Q)^T) small.

H [I, I] is the damped Hessian of the inputs; the side B [O, O] says what errors of two output rows cost together. With
B = 1 rows are independent, and this is what the solver minimises without sides (the two-sided rounding of YAQA, arXiv
2505.22988, with whole rows in the place of single numbers). Rows with the largest B_oo come first; then

1. Feedback. With B = U D U^T for small blocks of rows, U upper with 1 in the blocks of its diagonal, the loss is
   sum_b tr(D_b E_b H E_b^T) with E_b = T_b - Q_b and T_b = W_b + sum_{a < b} U_ab^T (W_a - Q_a): a block is to meet
   what it is plus what those before it have left. Its rows are solved as if D_b were 1, then as in 2 with B = D_b.
2. Sweeps. Given all others, a row's loss is B_oo times that of one row alone with the slope
   S_o = sum_p B_op / B_oo (w_p - q_p) H, on which its codes go down by the solver's own exact descent. By what that
   moves (w_o - q_o) H the slopes of all p move times B_po / B_pp. So S is kept true, and no other product is needed.

2 goes on from what 1 gave or from the codes without sides, whichever has the smaller loss, and never raises it.

Shape letters: E matrices, R rows of a block of the side, I input columns, G groups, B rows that are solved together.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moepress.compress.gptq.grid import above_zero
from moepress.compress.gptq.options import Task
from moepress.runs.phases import phase

Side = tuple[Tensor, ...]
"""B of a matrix: fp32 [R, R] blocks down its diagonal, each positive definite, whose sizes add up to O."""
Sides = Sequence[Side | None] | None
"""Of each matrix of a batch, None where B is 1; or None where it is 1 for all."""

_FED_ROWS, _FED_SWEEPS = 32, 4  # of a block of step 1, and in it
_WIDE = 1024  # columns from which on twice as many rows share what is read of H, which no cache holds any more
_ROWS, _ROUNDS = 64, 2  # of step 2: rows whose moves the other slopes take in one product, and rounds over them


@dataclass(frozen=True, slots=True, kw_only=True)
class Steps:
    """How rows are solved where the matrices are; tensors have E matrices in front.

    Attributes:
        solve: of targets [E, B, I], scales [E, B, G] and codes [E, B, I], both of which it finds (scales from those
            that are given where the task searches none), and the task of these rows; gives the slopes (target - Q) H.
        descend: rows one after the other, in so many rounds at most, of shares [E, B, B], scales, codes and slopes; the
            last two change. Gives the numbers of the rows that changed, and by what every row moved its own (W - Q) H.
        factor: lower Cholesky factors of a batch, which it may overwrite, and whether all were positive.
        tensor: an empty fp32 tensor by name and shape; one of a name lives until the next of it.
    """

    solve: Callable[[Tensor, Tensor, Tensor, Task], Tensor]
    descend: Callable[[int, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    factor: Callable[[Tensor], tuple[Tensor, bool]]
    tensor: Callable[..., Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """Rows of E matrices that a block of each one's side is about.

    Attributes:
        weight: [E, R, I], what codes are to meet.
        hessian, ridge: [E, I, I] and [E, I]; damped, the sum of both.
        side: [E, R, R].
        task: of these rows.
    """

    weight: Tensor
    hessian: Tensor
    ridge: Tensor
    side: Tensor
    task: Task

    def ordered(self, order: tuple[Tensor, Tensor]) -> "Problem":
        """With rows in that order."""
        matrix, row = order
        return Problem(
            weight=self.weight[order],
            hessian=self.hessian,
            ridge=self.ridge,
            side=self.side[matrix[:, :, None], row[:, :, None], row[:, None, :]],
            task=self.task.of(*order),
        )

    def quantized(self, block: slice, codes_EBI: Tensor, scales_EBG: Tensor) -> Tensor:
        """What codes of some rows stand for."""
        zeros = self.task.of(slice(None), block).zeros
        steps = above_zero(self.task.grid.values(codes_EBI), zeros).unflatten(-1, (scales_EBG.shape[-1], -1))
        values_EBI: Tensor = (steps * scales_EBG.unsqueeze(-1)).flatten(-2)
        return values_EBI


@dataclass(frozen=True, slots=True, kw_only=True)
class _Found:
    """Codes int8 [E, R, I], scales [E, R, G], S [E, R, I] and loss fp64 [E]."""

    codes: Tensor
    scales: Tensor
    slope: Tensor
    loss: Tensor


def check_sides(sides: Sequence[Side | None], matrices: int, rows: int) -> None:
    """Raises ValueError where sides do not fit matrices of so many rows."""
    if len(sides) != matrices:
        raise ValueError(f"{matrices} matrices and {len(sides)} sides.")
    for side in sides:
        shapes = [] if side is None else [tuple(block.shape) for block in side]
        square = all(len(set(shape)) == 1 for shape in shapes)
        if side is not None and (not square or sum(shape[0] for shape in shapes) != rows):
            raise ValueError(f"a side of blocks {shapes} does not fit a matrix of {rows} rows.")


def spans(side: Side) -> list[slice]:
    """The rows of each block."""
    stops = list(itertools.accumulate(len(block) for block in side))
    return [slice(*pair) for pair in itertools.pairwise([0, *stops])]


def improve(problem: Problem, codes_ERI: Tensor, scales_ERG: Tensor, steps: Steps) -> None:
    """From codes and scales that were found without sides to those with, in place.

    Raises:
        ValueError: a side is not positive definite.
    """
    row_ER = problem.side.diagonal(dim1=1, dim2=2).argsort(dim=1, descending=True, stable=True)
    order = torch.arange(len(row_ER), device=row_ER.device)[:, None], row_ER
    problem = problem.ordered(order)
    start = codes_ERI[order], scales_ERG[order]
    share_ERR = _shares(problem.side)
    with phase("rows' feedback"):
        fed = _fed(problem, start[1], steps)
        found = _better(fed, _given(problem, share_ERR, *start, steps))
    with phase("rows' sweeps"):
        _sweep(problem.task.options.row_sweeps, share_ERR, found, steps)
    codes_ERI[order], scales_ERG[order] = found.codes, found.scales


def _fed(problem: Problem, scales_ERG: Tensor, steps: Steps) -> _Found:
    """Step 1."""
    upper_ERR, shape, device = _upper(problem.side, steps), problem.weight.shape, problem.weight.device
    left_ERI, errors_ERI, slope_ERI = (steps.tensor(f"rows' {name}", *shape) for name in ("left", "errors", "slope"))
    codes_ERI, scales_ERG = torch.empty(shape, dtype=torch.int8, device=device), scales_ERG.clone()
    for block in _blocks(shape[1], _FED_ROWS if shape[2] < _WIDE else 2 * _FED_ROWS):
        weight_EBI, codes_EBI, scales_EBG = (m[:, block] for m in (problem.weight, codes_ERI, scales_ERG))
        own_EBB, target_EBI = upper_ERR[:, block, block], weight_EBI
        if block.start:
            before = slice(block.start)
            inverse_EBB = torch.linalg.solve_triangular(own_EBB, torch.eye(len(own_EBB[0]), device=device), upper=True)
            feed_EBI = upper_ERR[:, before, block].mT @ left_ERI[:, before]
            target_EBI = torch.baddbmm(target_EBI, inverse_EBB.mT, feed_EBI)
        error_EBI = steps.solve(target_EBI, scales_EBG, codes_EBI, problem.task.of(slice(None), block))
        share_EBB = _shares(own_EBB @ own_EBB.mT)
        _, moved_EBI = steps.descend(_FED_SWEEPS, share_EBB, scales_EBG, codes_EBI, share_EBB @ error_EBI)
        torch.bmm(own_EBB.mT, error_EBI.add_(moved_EBI), out=errors_ERI[:, block])
        torch.sub(weight_EBI, problem.quantized(block, codes_EBI, scales_EBG), out=left_ERI[:, block])
    upper_ERR /= problem.side.diagonal(dim1=1, dim2=2).unsqueeze(-1)
    for block in _blocks(shape[1], _ROWS):  # B (W - Q) H from E H: half of a product
        behind = slice(block.start, shape[1])
        torch.bmm(upper_ERR[:, block, behind], errors_ERI[:, behind], out=slope_ERI[:, block])
    return _weighed(problem, codes_ERI, scales_ERG, left_ERI, slope_ERI)


def _upper(side_ERR: Tensor, steps: Steps) -> Tensor:
    """A triangle U with U U^T = B, rows and columns in their own order."""
    lower_ERR, positive = steps.factor(side_ERR.flip(1, 2))
    if not positive:
        raise ValueError("a side is not positive definite.")
    return lower_ERR.flip(1, 2)


def _given(problem: Problem, share_ERR: Tensor, codes_ERI: Tensor, scales_ERG: Tensor, steps: Steps) -> _Found:
    """What was found without sides."""
    shape, everything = problem.weight.shape, slice(None)
    left_ERI, own_ERI = (steps.tensor(f"rows' {name}", *shape) for name in ("left", "errors"))
    torch.sub(problem.weight, problem.quantized(everything, codes_ERI, scales_ERG), out=left_ERI)
    torch.bmm(left_ERI, problem.hessian, out=own_ERI)
    own_ERI.addcmul_(left_ERI, problem.ridge[:, None])
    slope_ERI = torch.bmm(share_ERR, own_ERI, out=steps.tensor("rows' other slope", *shape))
    return _weighed(problem, codes_ERI, scales_ERG, left_ERI, slope_ERI)


def _shares(side_EBB: Tensor) -> Tensor:
    """B_op / B_oo."""
    return side_EBB / side_EBB.diagonal(dim1=1, dim2=2).unsqueeze(-1)


def _weighed(problem: Problem, codes_ERI: Tensor, scales_ERG: Tensor, left_ERI: Tensor, slope_ERI: Tensor) -> _Found:
    """With its loss; `left`, W - Q, is spoilt."""
    lost_ER = left_ERI.mul_(slope_ERI).sum(dim=2).mul_(problem.side.diagonal(dim1=1, dim2=2))
    loss_E = lost_ER.sum(dim=1, dtype=torch.float64)
    return _Found(codes=codes_ERI, scales=scales_ERG, slope=slope_ERI, loss=loss_E)


def _better(one: _Found, other: _Found) -> _Found:
    """Of every matrix the one with the smaller loss."""
    better_E = one.loss < other.loss
    if len(better_E) == 1:
        return one if bool(better_E) else other
    better_E11 = better_E[:, None, None]
    return _Found(
        codes=torch.where(better_E11, one.codes, other.codes),
        scales=torch.where(better_E11, one.scales, other.scales),
        slope=torch.where(better_E11, one.slope, other.slope),
        loss=torch.where(better_E, one.loss, other.loss),
    )


def _sweep(sweeps: int, share_ERR: Tensor, found: _Found, steps: Steps) -> None:
    """Step 2, until no code changes."""
    for _ in range(sweeps):
        ended = True
        for block in _blocks(share_ERR.shape[1], _ROWS):
            codes_EBI, scales_EBG, slope_EBI = (m[:, block] for m in (found.codes, found.scales, found.slope))
            given = (share_ERR[:, block, block], scales_EBG, codes_EBI, slope_EBI.clone())
            changed, moved_EBI = steps.descend(_ROUNDS, *given)
            if len(changed):
                found.slope.baddbmm_(share_ERR[:, :, block.start + changed], moved_EBI[:, changed])
                ended = False
        if ended:
            return


def _blocks(rows: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]
