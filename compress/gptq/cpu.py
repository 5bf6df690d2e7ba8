"""The solver on the CPU with native loops: one matrix after the other, a block of its rows at a time.

What `batch` does for all experts of a batch at once in torch, in the form that a CPU wants. A thread takes a matrix,
factors its Hessian and solves its rows in blocks that stay in the cache; where there are fewer matrices than threads,
threads share the blocks of one. Buffers are a thread's own and are used again for the next matrix. Where a matrix has a
side, its rows are solved again with that (`two_sided`).

Inside of GPTQ matrices lie as [I, O] in the order of solving backwards, which is that of the factor; the descent wants
rows, [O, I], in their own order.
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from moepress.compress.gptq import native
from moepress.compress.gptq.annealing import allowances
from moepress.compress.gptq.batch import Found
from moepress.compress.gptq.cholesky import factor_in_place
from moepress.compress.gptq.costs import SKETCHED, solve_flops
from moepress.compress.gptq.descent import quadratic, row_loss
from moepress.compress.gptq.factor import DAMP_ATTEMPTS, column_order, mean_alive, ridge_of
from moepress.compress.gptq.grid import above_zero, nearest_levels, normalised, search_scales_on
from moepress.compress.gptq.options import Task
from moepress.compress.gptq.parts import side_by_side
from moepress.compress.gptq.two_sided import Problem, Sides, Steps, improve, spans
from moepress.compress.gptq.workspace import Workspace, Workspaces
from moepress.runs.phases import phase

_SLOPE_COLUMNS = 256  # of the triangle that one product takes
_BLOCK_BYTES = 1 << 20  # of one fp32 buffer of a block of rows: several of them are in use together
_LEAST_ROWS = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class Factored:
    """A Hessian and its factor H + diag(ridge) = U diag(square) U^T, U lower with a unit diagonal.

    Rows and columns of the factor are in the order of solving, the last one first.

    Attributes:
        hessian, unit: [I, I]; of `unit` what is above the diagonal means nothing outside of diagonal blocks of
            `_SLOPE_COLUMNS`, and nothing is there inside of them.
        square: [I].
        back, group: int32 [I]; the column at each place, and its group.
        ridge, diagonal, inverse: [I] in the columns' own order; diag H + ridge and 1 over it.
        importance: [I], diag H as a share of the largest of its group, as the search of scales weighs columns.
        sketch: [K, I], of `_sketch`.
        damping: the share of mean(diag H) that was needed.
    """

    hessian: Tensor
    unit: Tensor
    square: Tensor
    back: Tensor
    group: Tensor
    ridge: Tensor
    diagonal: Tensor
    inverse: Tensor
    importance: Tensor
    sketch: Tensor
    damping: float


def factored(work: Workspace, hessian_II: Tensor, task: Task) -> Factored | None:
    """Factor a Hessian into a buffer of the workspace; None where no damping makes it positive, or where it is zero."""
    with phase("factor", flops=solve_flops(0, len(hessian_II), task.group)["factor"]):
        return _factored(work, hessian_II, task)


def _factored(work: Workspace, hessian_II: Tensor, task: Task) -> Factored | None:
    columns = len(hessian_II)
    importance_I = hessian_II.diagonal().clamp(min=0)
    mean = float(mean_alive(importance_I[None]))
    if mean <= 0:
        return None
    back_I = column_order(importance_I[None], act_order=task.options.act_order)[0].flip(0)
    unit_II, inverses = work.tensor("unit", columns, columns), work.tensor("inverses", columns // 64 + 1, 64, 64)
    some = work.tensor("gathered", columns, columns)
    damping = task.options.damp
    for _ in range(DAMP_ATTEMPTS):
        torch.index_select(hessian_II, 0, back_I, out=some)
        torch.index_select(some, 1, back_I, out=unit_II)
        ridge_I = ridge_of(importance_I[None], torch.tensor([damping], dtype=torch.float64))[0]
        unit_II.mul_(1 / mean)
        unit_II.diagonal().copy_((importance_I + ridge_I)[back_I] / mean)
        if factor_in_place(unit_II, inverses) and bool(unit_II.diagonal().isfinite().all()):
            break
        damping *= 10
    else:
        return None
    pivot_I = unit_II.diagonal().clone()
    unit_II.div_(pivot_I)
    for start in range(0, columns, _SLOPE_COLUMNS):
        span = slice(start, start + _SLOPE_COLUMNS)
        unit_II[span, span].tril_()
    diagonal_I = importance_I + ridge_I
    return Factored(
        hessian=hessian_II,
        unit=unit_II,
        square=pivot_I.square().mul_(mean),
        back=back_I.int(),
        group=(back_I // task.group).int(),
        ridge=ridge_I,
        diagonal=diagonal_I,
        inverse=diagonal_I.reciprocal(),
        importance=normalised(importance_I.view(-1, task.group)).flatten(),
        sketch=_sketch(hessian_II, back_I),
        damping=damping,
    )


def row_blocks(rows: int, columns: int) -> list[slice]:
    """Rows that are solved together, whatever the number of threads, so that this changes no bit."""
    size = max(_LEAST_ROWS, _BLOCK_BYTES // (4 * columns) // 32 * 32)
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """What was lost of some rows, (w - q) H (w - q)^T, and of how much, w H w^T: fp64 [O], with the undamped H."""

    loss: Tensor
    energy: Tensor


def solve_rows(
    work: Workspace, weight_OI: Tensor, found: Factored, scales_OG: Tensor, codes_OI: Tensor, task: Task
) -> Rows:
    """Quantize some rows of a matrix.

    Args:
        work: this thread's.
        weight_OI: contiguous rows.
        found: the Hessian.
        scales_OG: given scales, where `scale_search` is off; becomes the scales.
        codes_OI: int8; becomes the codes.
        task: see `Task`.
    """
    reached = _reach(work, weight_OI, found, scales_OG, codes_OI, task)
    return _settled(work, weight_OI, reached, found, codes_OI, scales_OG, task)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Reached:
    """What some rows came to.

    Attributes:
        turned: [I, O], what bare codes were to meet.
        scales: [G, O], as they were before refits.
        slope: (W - Q)(H + ridge) [O, I]; None without sweeps, where it was not asked for.
        loss: fp64 [O], the damped one.
    """

    turned: Tensor
    scales: Tensor
    slope: Tensor | None
    loss: Tensor


def _reach(
    work: Workspace,
    weight_OI: Tensor,
    found: Factored,
    scales_OG: Tensor,
    codes_OI: Tensor,
    task: Task,
    *,
    sloped: bool = False,
) -> _Reached:
    """`solve_rows` without a look at rounding to nearest."""
    rows, columns = weight_OI.shape
    groups = columns // task.group
    loss_O = torch.zeros(rows, dtype=torch.float64)
    with phase("scales"):
        turned_IO = work.tensor("turned", columns, rows)
        turned_IO.copy_(task.raised(weight_OI, scales_OG).T)
        scales_GO = work.tensor("scales", groups, rows)
        if task.options.scale_search:
            search = native.search_scales
            search(turned_IO, found.importance, task.grid, task.search, task.group, task.dtype, scales_GO)
            scales_OG.copy_(scales_GO.T)
        else:
            scales_GO.copy_(scales_OG.T)
    codes_IO, errors_IO = _compensated(work, turned_IO, scales_GO, found, task, loss_O)
    with phase("columns"):
        native.turn(codes_IO, found.back, codes_OI)
    slope_OI = _slope(work, errors_IO, found) if task.sweeps or sloped else None
    if slope_OI is not None and task.sweeps:
        _descend(found, slope_OI, codes_OI, scales_OG, task, loss_O)
        if task.options.annealed:
            _anneal(found, slope_OI, codes_OI, scales_OG, task, loss_O)
        for _ in range(task.options.refits):
            _refit(work, found, slope_OI, codes_OI, scales_OG, task, loss_O)
            _descend(found, slope_OI, codes_OI, scales_OG, task, loss_O)
    return _Reached(turned=turned_IO, scales=scales_GO, slope=slope_OI, loss=loss_O)


def _compensated(
    work: Workspace, turned_IO: Tensor, scales_GO: Tensor, found: Factored, task: Task, loss_O: Tensor
) -> tuple[Tensor, Tensor]:
    """GPTQ by feedback of residuals: codes int8 and weighed errors [I, O] in the order of solving.

    Column p takes w_p + sum over the columns solved before it of U_kp r_k, with the residuals r = w - q: the same codes
    as spreading errors by the inverse's factor (QuIP, arXiv 2307.13304, theorem 6), and nothing is inverted. What is
    left of each column adds square * e^2 to the damped loss.
    """
    columns, rows = turned_IO.shape
    codes_IO = work.tensor("codes", columns, rows, dtype=torch.int8)
    residual_IO, errors_IO = work.tensor("residual", columns, rows), work.tensor("errors", columns, rows)
    with phase("columns", flops=float(rows) * columns * columns):
        for stop in range(columns, 0, -native.BLOCK_COLUMNS):
            block = slice(max(0, stop - native.BLOCK_COLUMNS), stop)
            feedback_BO = None
            if stop < columns:
                feedback_BO = work.tensor("feedback", block.stop - block.start, rows)
                torch.mm(found.unit[stop:, block].T, residual_IO[stop:], out=feedback_BO)
            native.round_block(
                feedback_BO,
                turned_IO,
                found.back[block],
                found.unit[block, block],
                found.square[block],
                found.group[block],
                scales_GO,
                task.grid,
                codes_IO[block],
                residual_IO[block],
                errors_IO[block],
                loss_O,
            )
    return codes_IO, errors_IO


def _slope(work: Workspace, errors_IO: Tensor, found: Factored) -> Tensor:
    """(W - Q)(H + ridge) [O, I] in the columns' own order: U times the weighed errors, half of a product."""
    columns, rows = errors_IO.shape
    slope_IO, slope_OI = work.tensor("residual", columns, rows), work.tensor("slope", rows, columns)
    with phase("slope", flops=float(rows) * columns * columns):
        for start in range(0, columns, _SLOPE_COLUMNS):
            stop = min(start + _SLOPE_COLUMNS, columns)
            torch.mm(found.unit[start:stop, :stop], errors_IO[:stop], out=slope_IO[start:stop])
        native.turn(slope_IO, found.back, slope_OI)
    return slope_OI


def _descend(
    found: Factored, slope_OI: Tensor, codes_OI: Tensor, scales_OG: Tensor, task: Task, loss_O: Tensor
) -> None:
    given = (found.hessian, found.inverse, found.diagonal, found.ridge, task.grid, task.sweeps)
    with phase("descent"):
        native.descend(*given, codes_OI, scales_OG, slope_OI, loss_O)


def _anneal(found: Factored, slope_OI: Tensor, codes_OI: Tensor, scales_OG: Tensor, task: Task, loss_O: Tensor) -> None:
    """`annealing.anneal`, and the descent again."""
    allowed_SI = allowances(task.options.annealed, slope_OI.shape[1])
    with phase("annealing"):
        given = (found.hessian, found.diagonal, found.ridge, task.grid, allowed_SI)
        native.anneal(*given, codes_OI, scales_OG, slope_OI, loss_O)
        _descend(found, slope_OI, codes_OI, scales_OG, task, loss_O)


def _refit(
    work: Workspace,
    found: Factored,
    slope_OI: Tensor,
    codes_OI: Tensor,
    scales_OG: Tensor,
    task: Task,
    loss_O: Tensor,
) -> None:
    """Each group's scales and then its codes, given all others; the slope is true again at the end.

    A group takes from the slope what those before it have moved, and when all are done what those behind it have: one
    product in all.
    """
    rows, columns = slope_OI.shape
    lattice = task.lattice
    change_OI, hessian_II, width = work.tensor("errors", rows, columns), found.hessian, task.group
    values_Og, response_Og = work.tensor("values", rows, width), work.tensor("response", rows, width)
    with phase("refit", flops=2.0 * rows * columns * columns):
        for start in range(0, columns, width):
            span = slice(start, start + width)
            slope_Og, own_gg = slope_OI[:, span], hessian_II[span, span]
            if start:
                slope_Og.addmm_(change_OI[:, :start], hessian_II[:start, span], alpha=-1)
            zero_O1 = None if task.zeros is None else task.zeros[:, start // width, None]
            values_Og.copy_(above_zero(task.grid.values(codes_OI[:, span]), zero_O1))
            torch.mm(values_Og, own_gg, out=response_Og)
            native.refit_group(
                own_gg,
                found.inverse[span],
                found.diagonal[span],
                found.ridge[span],
                task.grid,
                task.sweeps,
                task.dtype,
                response_Og,
                codes_OI[:, span],
                scales_OG[:, start // width, None],
                slope_Og,
                change_OI[:, span],
                None if lattice is None else (lattice.step[:, start // width, None], lattice.least, lattice.most),
                zero_O1,
                loss_O,
            )
        for start in range(0, columns - width, width):
            stop = start + width
            slope_OI[:, start:stop].addmm_(change_OI[:, stop:], hessian_II[stop:, start:stop], alpha=-1)


def _settled(
    work: Workspace,
    weight_OI: Tensor,
    reached: _Reached,
    found: Factored,
    codes_OI: Tensor,
    scales_OG: Tensor,
    task: Task,
) -> Rows:
    """Sums over what was found; rows that rounding to nearest serves better take its codes and scales."""
    turned_IO, scales_GO, damped_O = reached.turned, reached.scales, reached.loss
    rows, columns = weight_OI.shape
    left_O, whole_O = (torch.empty(rows, dtype=torch.float64) for _ in range(2))
    with phase("losses", flops=float(rows) * columns * columns):
        native.squares(weight_OI, codes_OI, scales_OG, task.zeros, task.grid, found.ridge, left_O, whole_O)
        loss_O = (damped_O - left_O).clamp_(min=0)
        doubted = (loss_O > _nearest_at_least(work, turned_IO, scales_GO, found, task)).nonzero()[:, 0]
        if len(doubted):
            some_RI, nearest_RG = weight_OI[doubted], scales_GO.T[doubted]
            zeros_RG = task.of(doubted).zeros
            nearest_RI = nearest_levels(some_RI, nearest_RG, task.grid, zeros_RG)
            codes = codes_OI[doubted], task.grid.codes(nearest_RI)
            scales = scales_OG[doubted], nearest_RG
            mine, theirs = (
                _loss(some_RI, above_zero(task.grid.values(q), zeros_RG), s, found.hessian)
                for q, s in zip(codes, scales, strict=True)
            )
            better_R = theirs <= mine
            codes_OI[doubted] = torch.where(better_R[:, None], codes[1], codes[0])
            scales_OG[doubted] = torch.where(better_R[:, None], scales[1], scales[0])
            loss_O[doubted] = torch.minimum(mine, theirs)
        if task.zeros is not None:
            turned_IO.copy_(weight_OI.T)
        return Rows(loss=loss_O, energy=_energy(work, turned_IO, found, whole_O))


def _nearest_at_least(work: Workspace, turned_IO: Tensor, scales_GO: Tensor, found: Factored, task: Task) -> Tensor:
    """A loss that rounding each row to nearest can not go below, fp64 [O].

    H - G M^-1 G^T is positive for G = H V, M = V^T H V with any V (Nystroem), so that what G alone sees of a row's
    rounding errors bounds its loss from below. With a few random V, which find what is large in H, that is for nearly
    every row more than what GPTQ reached, and the product that would tell exactly is saved.
    """
    columns, rows = turned_IO.shape
    residual_IO = work.tensor("residual", columns, rows)
    native.nearest(turned_IO, found.back, found.group, scales_GO, task.grid, residual_IO)
    seen_KO = torch.mm(found.sketch, residual_IO, out=work.tensor("slope", len(found.sketch), rows))
    total_O = torch.zeros(rows, dtype=torch.float64)
    native.add_squares(seen_KO, torch.ones(len(seen_KO)), total_O)
    return total_O


def _sketch(hessian_II: Tensor, back_I: Tensor) -> Tensor:
    """M^-1/2 G^T of `_nearest_at_least`, [K, I] in the order of solving."""
    columns = len(hessian_II)
    directions_IK = torch.randn(columns, min(SKETCHED, columns), generator=torch.Generator().manual_seed(0))
    seen_IK = hessian_II @ directions_IK
    middle_KK = directions_IK.double().T @ seen_IK.double()
    middle_KK.diagonal().add_(1e-5 * middle_KK.diagonal().mean())  # only ever lowers the bound
    lower_KK, info = torch.linalg.cholesky_ex(middle_KK)
    if int(info):
        return torch.zeros(1, columns)
    sketch_KI: Tensor = torch.linalg.solve_triangular(lower_KK, seen_IK[back_I].double().T, upper=False)
    return sketch_KI.float()


def _loss(weight_RI: Tensor, values_RI: Tensor, scales_RG: Tensor, hessian_II: Tensor) -> Tensor:
    """`descent.row_loss` of the rows of one matrix, fp64 [R]."""
    return row_loss(weight_RI.T[None], hessian_II[None], values_RI.T[None], scales_RG.T[None])[0]


def _energy(work: Workspace, turned_IO: Tensor, found: Factored, penalty_O: Tensor) -> Tensor:
    """w H w^T of every row, fp64 [O], from the factor: half of a product."""
    columns, rows = turned_IO.shape
    weight_IO = torch.index_select(turned_IO, 0, found.back, out=work.tensor("residual", columns, rows))
    spread_BO = work.tensor("errors", _SLOPE_COLUMNS, rows)
    total_O = -penalty_O
    for start in range(0, columns, _SLOPE_COLUMNS):
        stop = min(start + _SLOPE_COLUMNS, columns)
        part_BO = spread_BO[: stop - start]
        torch.mm(found.unit[start:, start:stop].T, weight_IO[start:], out=part_BO)
        native.add_squares(part_BO, found.square[start:stop], total_O)
    return total_O.clamp_(min=0)


def _steps(work: Workspace, found: Factored, task: Task) -> Steps:
    """What `two_sided` does with one matrix."""

    def solve(target_1RI: Tensor, scales_1RG: Tensor, codes_1RI: Tensor, part: Task) -> Tensor:
        given = target_1RI[0], found, scales_1RG[0], codes_1RI[0], part.of(0)
        slope_RI = _reach(work, *given, sloped=True).slope
        assert slope_RI is not None
        return slope_RI[None]

    def descend(
        rounds: int, share_1RR: Tensor, scales_1RG: Tensor, codes_1RI: Tensor, slope_1RI: Tensor
    ) -> tuple[Tensor, Tensor]:
        moved_RI = work.tensor("rows' moves", *slope_1RI.shape[1:])
        changed_R = torch.empty(len(moved_RI), dtype=torch.bool)
        given = (found.hessian, found.inverse, found.diagonal, found.ridge, task.grid, task.sweeps, rounds)
        native.descend_together(*given, share_1RR[0], codes_1RI[0], scales_1RG[0], slope_1RI[0], moved_RI, changed_R)
        return changed_R.nonzero()[:, 0], moved_RI[None]

    def factor(matrix_1RR: Tensor) -> tuple[Tensor, bool]:
        size = matrix_1RR.shape[1]
        positive = factor_in_place(matrix_1RR[0], work.tensor("inverses", size // 64 + 1, 64, 64))
        return matrix_1RR.tril_(), positive

    return Steps(solve=solve, descend=descend, factor=factor, tensor=work.tensor)


def solve_all(weight_EOI: Tensor, hessian_EII: Tensor, absmax_EOG: Tensor, task: Task, sides: Sides = None) -> Found:
    """`batch.solve_batch` on the CPU by native loops."""
    experts, rows, columns = weight_EOI.shape
    found = Found(
        codes=torch.empty(weight_EOI.shape, dtype=torch.int8),
        scales=absmax_EOG.clone(),
        loss=torch.zeros(experts, dtype=torch.float64),
        energy=torch.zeros(experts, dtype=torch.float64),
        damping=torch.zeros(experts, dtype=torch.float64),
    )
    weight_EOI, blocks, spaces = weight_EOI.contiguous(), row_blocks(rows, columns), Workspaces()

    def rows_of(index: int, factor: Factored, block: slice) -> Rows:
        given = weight_EOI[index, block], factor, found.scales[index, block], found.codes[index, block]
        return solve_rows(spaces.own, *given, task.of(index, block))

    def improved(index: int, factor: Factored, given: tuple[slice, Tensor]) -> float:
        """The loss of some rows, once they are solved with their block of the side."""
        block, side_RR = given
        weight_RI, codes_RI, scales_RG = (m[index, block] for m in (weight_EOI, found.codes, found.scales))
        part = task.of(index, block)
        problem = Problem(
            weight=weight_RI[None],
            hessian=factor.hessian[None],
            ridge=factor.ridge[None],
            side=side_RR[None],
            task=part.of(None),
        )
        improve(problem, codes_RI[None], scales_RG[None], _steps(spaces.own, factor, part))
        with phase("losses"):
            values_RI = above_zero(task.grid.values(codes_RI), part.zeros)
            return float(_loss(weight_RI, values_RI, scales_RG, factor.hessian).sum().clamp(min=0))

    def solve(threads: int, index: int) -> None:
        factor = factored(spaces.own, hessian_EII[index], task)
        if factor is None:
            _round(weight_EOI[index], hessian_EII[index], found, index, task.of(index))
            return
        with side_by_side(min(threads, len(blocks))) as each:
            parts = each(partial(rows_of, index, factor), blocks)
        found.loss[index] = sum(float(part.loss.sum()) for part in parts)
        found.energy[index] = sum(float(part.energy.sum()) for part in parts)
        found.damping[index] = factor.damping
        side = None if sides is None else sides[index]
        if side is not None:
            given = list(zip(spans(side), side, strict=True))
            with side_by_side(min(threads, len(given))) as each:
                found.loss[index] = sum(each(partial(improved, index, factor), given))

    threads = torch.get_num_threads()
    whole = experts // threads * threads if threads > 1 else experts
    if whole:
        with side_by_side(threads) as each:
            each(partial(solve, 1), range(whole))
    for index in range(whole, experts):  # fewer than threads: these share the rows of each
        solve(threads, index)
    return found


def _round(weight_OI: Tensor, hessian_II: Tensor, found: Found, index: int, task: Task) -> None:
    """Rounding to nearest, where there is no usable Hessian."""
    importance_I = hessian_II.diagonal().clamp(min=0)
    if task.options.scale_search:
        given = (weight_OI[None], importance_I[None], task.grid, task.group, task.dtype, task.search)
        found.scales[index] = search_scales_on(*given)[0]
    scales_OG = found.scales[index]
    values_OI = nearest_levels(weight_OI, scales_OG, task.grid, task.zeros)
    found.codes[index] = task.grid.codes(values_OI)
    found.loss[index] = _loss(weight_OI, above_zero(values_OI, task.zeros), scales_OG, hessian_II).sum().clamp(min=0)
    found.energy[index] = quadratic(weight_OI.T[None], hessian_II[None]).sum().clamp(min=0)
