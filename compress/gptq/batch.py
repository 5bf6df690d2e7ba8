"""The solver in torch: all experts of a batch at once, on a GPU or wherever there are no native loops.

Inside, matrices lie as [E, I, O], so that a column of the weight is contiguous. Peak memory beyond the inputs, in fp32
copies: 3 of H while factoring, then 1 of H and 5 of W. Nothing is random, and nothing loops over experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moepress.compress.gptq.annealing import anneal
from moepress.compress.gptq.columns import inner_loops
from moepress.compress.gptq.descent import Descent, above_zero, improve_codes, quadratic, refit, row_loss
from moepress.compress.gptq.factor import Factor, cholesky, column_order, factor, ridge_of
from moepress.compress.gptq.grid import above_zero as above_zero_rows
from moepress.compress.gptq.levels import Grid
from moepress.compress.gptq.options import TORCH_ANNEALED, Task
from moepress.compress.gptq.two_sided import Problem, Side, Sides, Steps, improve, spans
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


def solve_batch(weight_EOI: Tensor, hessian_EII: Tensor, absmax_EOG: Tensor, task: Task, sides: Sides = None) -> Found:
    """Quantize a batch; `absmax_EOG` are the scales where none are searched."""
    experts, columns = len(weight_EOI), weight_EOI.shape[2]
    importance_EI = hessian_EII.diagonal(dim1=1, dim2=2).clamp(min=0)
    back_EI = column_order(importance_EI, act_order=task.options.act_order).flip(1)
    with phase("factor", flops=experts * columns**3 / 3):
        found = factor(hessian_EII, importance_EI, back_EI, task.options.damp)
    given = _Inputs(hessian=hessian_EII, importance=importance_EI, back=back_EI, factor=found)
    reached = _reach(given, weight_EOI, absmax_EOG, task)
    with phase("losses", flops=3 * float(weight_EOI.numel()) * columns):
        turned_EIO = weight_EOI.mT.contiguous()
        zeros_EGO = None if task.zeros is None else task.zeros.mT.contiguous()
        mine = reached.values, reached.scales
        solved = _better_rows(turned_EIO, hessian_EII, mine, reached.nearest, found, task.grid, zeros_EGO)
    return solved if sides is None else _with_sides(given, weight_EOI, solved, task, sides)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Inputs:
    """What is known of the inputs of a batch.

    Attributes:
        hessian: [E, I, I].
        importance: [E, I], diag H.
        back: [E, I], the column at each place, the one that is solved last first.
        factor: in that order.
    """

    hessian: Tensor
    importance: Tensor
    back: Tensor
    factor: Factor

    @property
    def ridge(self) -> Tensor:
        """What is added to diag H, [E, I]."""
        return ridge_of(self.importance, self.factor.damping)

    def of(self, some: Sequence[int]) -> "_Inputs":
        """Those of some experts."""
        if len(some) == len(self.hessian):
            return self
        index = torch.tensor(some, device=self.hessian.device)
        held = self.factor
        factor = Factor(unit=held.unit[index], square=held.square[index], damping=held.damping[index])
        hessian_FII, importance_FI, back_FI = self.hessian[index], self.importance[index], self.back[index]
        return _Inputs(hessian=hessian_FII, importance=importance_FI, back=back_FI, factor=factor)

    def descent(self, task: Task, sweeps: int) -> Descent:
        """Sweeps over codes."""
        return Descent(
            hessian=self.hessian,
            ridge=self.ridge,
            grid=task.grid,
            group=task.group,
            dtype=task.dtype,
            sweeps=sweeps,
            lattice=task.lattice,
            zeros=None if task.zeros is None else task.zeros.mT.contiguous(),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Reached:
    """What some rows came to, as [E, I, O].

    Attributes:
        values, scales: levels, and [E, G, O].
        nearest: those of rounding to nearest.
        slope: (W - Q)(H + ridge); None without sweeps, where it was not asked for.
    """

    values: Tensor
    scales: Tensor
    nearest: tuple[Tensor, Tensor]
    slope: Tensor | None


def _reach(given: _Inputs, weight_EOI: Tensor, absmax_EOG: Tensor, task: Task, *, sloped: bool = False) -> _Reached:
    """Codes and scales of some rows."""
    product, options = float(weight_EOI.numel()) * weight_EOI.shape[2], task.options
    loops = inner_loops(weight_EOI.device)
    with phase("scales"):
        turned_EIO = weight_EOI.mT.contiguous()
        if options.scale_search:
            searched = (task.grid, task.group, task.dtype, task.search)
            scales_EGO = loops.search_scales(turned_EIO, given.importance, *searched)
        else:
            scales_EGO = absmax_EOG.mT.contiguous()
    raised_EIO = turned_EIO if task.zeros is None else task.raised(weight_EOI, absmax_EOG).mT.contiguous()
    with phase("columns", flops=product):
        values_EIO, errors_EIO = _compensated(raised_EIO, scales_EGO, given.factor, given.back, task)
    nearest = _nearest(raised_EIO, scales_EGO, task.grid), scales_EGO.clone()
    del raised_EIO
    sweeps, slope_EIO = loops.sweeps if options.sweeps is None else options.sweeps, None
    if sweeps or sloped:
        with phase("slope", flops=product):
            place_EI = given.back.argsort(dim=1)
            slope_EIO = _rows_of(given.factor.unit.tril() @ errors_EIO, place_EI)
        del errors_EIO
    if sweeps and slope_EIO is not None:
        problem = given.descent(task, sweeps)
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
    return _Reached(values=values_EIO, scales=scales_EGO, nearest=nearest, slope=slope_EIO)


def _with_sides(given: _Inputs, weight_EOI: Tensor, solved: Found, task: Task, sides: Sequence[Side | None]) -> Found:
    """What was found without sides, improved by them; matrices whose sides are cut alike together."""
    alike: dict[tuple[int, ...], list[int]] = {}
    usable = (given.factor.damping > 0).tolist()
    for expert, side in enumerate(sides):
        if side is not None and usable[expert]:
            alike.setdefault(tuple(len(block) for block in side), []).append(expert)
    for some in alike.values():
        own, held = given.of(some), [side for side in (sides[expert] for expert in some) if side is not None]
        for number, block in enumerate(spans(held[0])):
            codes_FRI, scales_FRG = solved.codes[some, block], solved.scales[some, block]
            problem = Problem(
                weight=weight_EOI[some, block],
                hessian=own.hessian,
                ridge=own.ridge,
                side=torch.stack([side[number] for side in held]),
                task=task.of(some, block),
            )
            improve(problem, codes_FRI, scales_FRG, _steps(own, problem.task))
            solved.codes[some, block], solved.scales[some, block] = codes_FRI, scales_FRG
        with phase("losses"):
            values_FOI = above_zero_rows(task.grid.values(solved.codes[some]), task.of(some).zeros)
            turned = weight_EOI[some].mT, own.hessian, values_FOI.mT, solved.scales[some].mT
            solved.loss[some] = row_loss(*(m.contiguous() for m in turned)).sum(dim=1).clamp(min=0)
    return solved


def _steps(given: _Inputs, task: Task) -> Steps:
    """What `two_sided` does with these matrices. One round over rows is made at most, since in torch a row takes as
    long as many together."""
    device = given.hessian.device
    loops, asked = inner_loops(device), device.type == "cpu"
    problem = given.descent(task, loops.sweeps if task.options.sweeps is None else task.options.sweeps)
    damped_EI = given.importance + given.ridge

    def solve(target_ERI: Tensor, scales_ERG: Tensor, codes_ERI: Tensor, part: Task) -> Tensor:
        reached = _reach(given, target_ERI, scales_ERG, part, sloped=True)
        scales_ERG.copy_(reached.scales.mT)
        codes_ERI.copy_(part.grid.codes(reached.values).mT)
        assert reached.slope is not None
        return reached.slope.mT.contiguous()

    def at_rest(values_EI: Tensor, scales_EG: Tensor, slope_EI: Tensor) -> bool:
        wanted_EI = values_EI + slope_EI / (damped_EI * scales_EG.repeat_interleave(task.group, dim=1))
        return torch.equal(task.grid.nearest(wanted_EI), values_EI)

    def descend(
        rounds: int, share_ERR: Tensor, scales_ERG: Tensor, codes_ERI: Tensor, slope_ERI: Tensor
    ) -> tuple[Tensor, Tensor]:
        values_ERI, moved_ERI = task.grid.values(codes_ERI), torch.zeros_like(slope_ERI)
        changed = []
        for row in range(slope_ERI.shape[1] if rounds and problem.sweeps else 0):
            value_EI, scale_EG, slope_EI = values_ERI[:, row], scales_ERG[:, row], slope_ERI[:, row]
            if asked and at_rest(value_EI, scale_EG, slope_EI):
                continue
            after_EI1, value_EI1 = slope_EI.unsqueeze(-1).clone(), value_EI.unsqueeze(-1).contiguous()
            improve_codes(problem, after_EI1, scale_EG.unsqueeze(-1).contiguous(), value_EI1)
            moved_ERI[:, row] = after_EI1[..., 0] - slope_EI
            slope_ERI.addcmul_(share_ERR[:, :, row, None], moved_ERI[:, row, None])
            values_ERI[:, row] = value_EI1[..., 0]
            changed.append(row)
        codes_ERI.copy_(task.grid.codes(values_ERI))
        return torch.tensor(changed, dtype=torch.int64, device=device), moved_ERI

    def lower(matrix_ERR: Tensor) -> tuple[Tensor, bool]:
        lower_ERR, info_E = cholesky(matrix_ERR)
        return lower_ERR, not bool(info_E.any())

    def tensor(_: str, *shape: int) -> Tensor:
        return torch.empty(shape, device=device)

    return Steps(solve=solve, descend=descend, factor=lower, tensor=tensor)


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
