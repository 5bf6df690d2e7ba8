"""GPTQ for a batch of experts: error-compensated rounding, then a descent over codes and scales.

Shape letters: E experts (one batch), O output rows, I input columns, G groups, g columns of a group, B columns of a
block. `solve` minimises trace((W - Q) H (W - Q)^T) per expert, with H = sum_t a_t x_t x_t^T over its tokens:

1. `search_scales`: one scale per row and static group, so the order of the columns never matters to what is stored.
2. `_compensated_codes`: GPTQ (arXiv 2210.17323). Columns in order of decreasing diag H; the rounding error of each is
   spread over the columns to come, by the upper Cholesky factor of the damped H's inverse, lazily per block.
3. `_descend`: sweeps of exact coordinate descent. Per group: the best scale for its codes, then the best code of each
   column given all others. No step can raise the loss that it works on, which is the damped one: with fewer tokens
   than columns the undamped one says nothing about most directions, and following it costs quality on new text.
4. Rows that are no better than their round-to-nearest codes take those: the undamped loss never exceeds theirs.

Inside, matrices lie as [E, I, O], so that a column of the weight is contiguous. Peak memory beyond the inputs, in fp32
copies: 3 of H while factoring, then 1 of H and 3 of W, then 4 of W (per-channel scales: 6). Nothing is random, and
nothing loops over experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields

import torch

from moepress.compress.gptq.columns import inner_loops
from moepress.compress.gptq.grid import absmax_scales, round_to_nearest, search_scales, storable_scales
from moepress.compress.gptq.parts import part_slices, side_by_side
from moepress.converters.safetensors.scheme import Scheme
from moepress.runs.phases import phase

_SLOPE_COLUMNS = 512  # columns whose slopes one matrix product gives: thin products are slow
_INNER_COLUMNS = 32  # columns of a block whose errors are spread one by one; those beyond it together
_INVERTED_AT_ONCE = 512  # columns of a triangle that one library call inverts
DAMP_ATTEMPTS = 5
"""The first try, and up to 4 more with ten times the damping each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SolverOptions:
    """How to solve; the defaults are what measured best at about three times the time of plain GPTQ.

    Attributes:
        damp: share of mean(diag H) added to the diagonal; times 10 on each failed Cholesky. Measured on new text, 0.03
            is never worse than 0.01; with about one token per column and no pooled H mixed in, 0.1 is better still.
        act_order: columns in order of decreasing diag H instead of their own order.
        block: columns between two lazy updates.
        scale_search: grid search weighted by diag H instead of absmax scales.
        refit_scales: let the descent move the scales too.
        sweeps: coordinate-descent sweeps after GPTQ; 0 leaves plain GPTQ.
    """

    damp: float = 0.03
    act_order: bool = True
    block: int = 128
    scale_search: bool = True
    refit_scales: bool = True
    sweeps: int = 3

    def __post_init__(self) -> None:
        if not 0 < self.damp < 1 or self.block < 1 or self.sweeps < 0:
            raise ValueError(f"{self}: need 0 < damp < 1, block >= 1 and sweeps >= 0.")


PLAIN = SolverOptions(damp=0.01, act_order=False, scale_search=False, refit_scales=False, sweeps=0)
"""GPTQ as in the paper, with absmax scales fixed beforehand."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Solved:
    """Quantized weights of a batch of experts.

    Attributes:
        codes: [E, O, I] int8, within the scheme's range.
        scales: [E, O, G] fp32, positive, each exactly representable in the dtype they were asked for.
        loss: [E] fp64, trace((W - Q) H (W - Q)^T) with the undamped H.
        energy: [E] fp64, trace(W H W^T): what the loss is a share of.
        damping: [E] fp64, the share of mean(diag H) that was needed; 0 where `rounded`.
        rounded: [E] bool, no usable Hessian (no token, or not positive even when damped): rounded to nearest.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    loss: torch.Tensor
    energy: torch.Tensor
    damping: torch.Tensor
    rounded: torch.Tensor


def solve(
    weight_EOI: torch.Tensor,
    hessian_EII: torch.Tensor,
    scheme: Scheme,
    *,
    scale_dtype: torch.dtype,
    options: SolverOptions | None = None,
) -> Solved:
    """Quantize a batch of weight matrices, each with its own Hessian.

    Args:
        weight_EOI: [E, O, I] fp32; not changed.
        hessian_EII: [E, I, I] fp32, symmetric, positive semidefinite; not changed. A column whose diagonal is 0 is
            rounded to nearest; so is an expert whose H is all zero, with unweighted scales.
        scheme: bits and group size.
        scale_dtype: dtype the scales will be stored in; they are rounded to it before codes are chosen.
        options: see `SolverOptions`.

    Returns:
        Codes, scales and figures.

    Raises:
        ValueError: shapes do not fit, or W or H holds NaN or infinity.
    """
    options = options or SolverOptions()
    _check(weight_EOI, hessian_EII)
    slices = part_slices(len(weight_EOI), weight_EOI.device)
    parts = [_Part(weight=weight_EOI[part], hessian=hessian_EII[part], options=options) for part in slices]
    product = weight_EOI.numel() * hessian_EII.shape[1]  # multiply-adds of W H
    with side_by_side(len(parts)) as each:
        with phase("factor", flops=2 / 3 * hessian_EII.numel() * hessian_EII.shape[1]):
            each(_Part.factor, parts)
        with phase("scales"):
            each(lambda part: part.choose_scales(scheme, scale_dtype), parts)
        with phase("columns", flops=product):
            each(lambda part: part.compensate(scheme), parts)
        for _ in range(options.sweeps):
            with phase("sweeps", flops=2 * product):
                each(lambda part: part.descend(scheme, scale_dtype), parts)
        with phase("losses", flops=3 * product):
            found = each(_Part.better_rows, parts)
    return found[0] if len(found) == 1 else _joined(found)


@dataclass(slots=True, kw_only=True)
class _Part:
    """Some experts of a batch, from step to step; nothing of one part depends on another.

    Attributes:
        weight, hessian: [E, O, I], [E, I, I].
        diagonal, order: of H [E, I], and the columns in the order in which they are solved.
        upper, damping, ridge: of `_inverse_factor`, [E, I, I], [E]; damping times the mean of the diagonal, [E].
        first_scales: [E, O, G], as searched.
        turned, codes, scales: weight and codes [E, I, O], scales [E, G, O] as they come to be.
        nearest: codes and scales of rounding to nearest.
    """

    weight: torch.Tensor
    hessian: torch.Tensor
    options: SolverOptions
    diagonal: torch.Tensor = field(init=False)
    order: torch.Tensor = field(init=False)
    upper: torch.Tensor = field(init=False)
    damping: torch.Tensor = field(init=False)
    ridge: torch.Tensor = field(init=False)
    first_scales: torch.Tensor = field(init=False)
    turned: torch.Tensor = field(init=False)
    codes: torch.Tensor = field(init=False)
    scales: torch.Tensor = field(init=False)
    nearest: tuple[torch.Tensor, torch.Tensor] = field(init=False)

    def factor(self) -> None:
        self.diagonal = self.hessian.diagonal(dim1=1, dim2=2).clamp(min=0)
        self.order = _column_order(self.diagonal, act_order=self.options.act_order)
        found = _inverse_factor(self.hessian, self.diagonal, self.order, self.options.damp)
        self.upper, self.damping = found
        self.ridge = (self.damping * _mean_alive(self.diagonal)).float()

    def choose_scales(self, scheme: Scheme, scale_dtype: torch.dtype) -> None:
        if self.options.scale_search:
            self.first_scales = search_scales(self.weight, self.diagonal, scheme, scale_dtype=scale_dtype)
        else:
            self.first_scales = absmax_scales(self.weight, scheme, scale_dtype=scale_dtype)

    def compensate(self, scheme: Scheme) -> None:
        self.turned = self.weight.mT.contiguous()
        self.scales = self.first_scales.mT.contiguous()
        given = (self.turned, self.upper, self.scales, self.order)
        self.codes = _compensated_codes(*given, scheme, self.options.block)
        del given, self.upper  # as large as H
        codes_EIO = round_to_nearest(self.weight, self.first_scales, scheme).mT.contiguous()
        self.nearest = codes_EIO, self.scales.clone()

    def descend(self, scheme: Scheme, scale_dtype: torch.dtype) -> None:
        given = (self.turned, self.hessian, self.ridge, self.codes, self.scales)
        _descend(*given, scheme, scale_dtype, self.options)

    def better_rows(self) -> Solved:
        found = self.codes, self.scales
        return _better_rows(self.turned, self.hessian, found, self.nearest, self.damping)


def _joined(parts: Sequence[Solved]) -> Solved:
    """Parts of a batch as one."""
    return Solved(**{each.name: torch.cat([getattr(part, each.name) for part in parts]) for each in fields(Solved)})


def _better_rows(
    weight_EIO: torch.Tensor,
    hessian_EII: torch.Tensor,
    found: tuple[torch.Tensor, torch.Tensor],
    nearest: tuple[torch.Tensor, torch.Tensor],
    damping_E: torch.Tensor,
) -> Solved:
    """Per row the better of two (codes [E, I, O], scales [E, G, O]); `nearest` where the damping is 0, or on a tie."""
    rounded_E = damping_E == 0
    loss_EO = _row_loss(weight_EIO, hessian_EII, *found)
    nearest_loss_EO = _row_loss(weight_EIO, hessian_EII, *nearest)
    keep_EO = (loss_EO < nearest_loss_EO) & ~rounded_E[:, None]
    return Solved(
        codes=torch.where(keep_EO[:, None], found[0], nearest[0]).mT.contiguous(),
        scales=torch.where(keep_EO[:, None], found[1], nearest[1]).mT.contiguous(),
        loss=torch.where(keep_EO, loss_EO, nearest_loss_EO).sum(dim=1).clamp(min=0),
        energy=quadratic(weight_EIO, hessian_EII).sum(dim=1).clamp(min=0),
        damping=damping_E,
        rounded=rounded_E,
    )


def _check(weight_EOI: torch.Tensor, hessian_EII: torch.Tensor) -> None:
    if weight_EOI.ndim != 3 or hessian_EII.shape != (weight_EOI.shape[0], weight_EOI.shape[2], weight_EOI.shape[2]):
        raise ValueError(
            f"weight {tuple(weight_EOI.shape)}, Hessian {tuple(hessian_EII.shape)}: need [E, O, I] and [E, I, I]."
        )
    for name, tensor in (("weight", weight_EOI), ("Hessian", hessian_EII)):
        if tensor.dtype != torch.float32:
            raise ValueError(f"the {name} is {tensor.dtype}; pass float32.")
        if not bool(tensor.isfinite().all()):
            experts = (~tensor.isfinite().flatten(1).all(dim=1)).nonzero().flatten().tolist()
            raise ValueError(
                f"the {name} holds NaN or infinity in experts {experts}; check the checkpoint and the calibration pass."
            )


def _column_order(diagonal_EI: torch.Tensor, *, act_order: bool) -> torch.Tensor:
    """Column to solve at each position, [E, I] int64; equal diagonals keep their own order."""
    if act_order:
        return diagonal_EI.argsort(dim=1, descending=True, stable=True)
    return torch.arange(diagonal_EI.shape[1], device=diagonal_EI.device).expand_as(diagonal_EI)


def _inverse_factor(
    hessian_EII: torch.Tensor, diagonal_EI: torch.Tensor, order_EI: torch.Tensor, damp: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Upper factor U of each damped, reordered inverse Hessian, U^T U = inverse(H).

    Factoring H back to front takes one Cholesky and one triangular solve, and H itself is never inverted: with J the
    reversal, J H J = L L^T means inverse(H) = U^T U for U = J inverse(L) J, which is upper triangular.

    Returns:
        upper [E, I, I] fp32, the identity (no compensation) for experts without a usable Hessian; damping [E] fp64, 0
        for those.
    """
    experts, columns = diagonal_EI.shape
    alive_EI = diagonal_EI > 0
    mean_E = _mean_alive(diagonal_EI)
    unit_E = torch.where(mean_E > 0, mean_E, 1.0).float()
    backward_EI = order_EI.flip(1)
    batch_E11 = torch.arange(experts, device=order_EI.device)[:, None, None]
    work_EII = hessian_EII[batch_E11, backward_EI[:, :, None], backward_EI[:, None, :]].div_(unit_E[:, None, None])
    work_diagonal_EI = work_EII.diagonal(dim1=1, dim2=2)
    work_diagonal_EI.copy_(torch.where(alive_EI, diagonal_EI / unit_E[:, None], 1.0).gather(1, backward_EI))
    work_diagonal_EI.add_(damp)
    lower_EII, info_E = torch.linalg.cholesky_ex(work_EII)
    damping_E = torch.full((experts,), damp, dtype=torch.float64, device=order_EI.device)
    failed_E = _failed(lower_EII, info_E)
    for _ in range(DAMP_ATTEMPTS - 1):
        again_F = failed_E.nonzero().flatten()
        if not again_F.numel():
            break
        work_diagonal_EI[again_F] += 9 * damping_E[again_F, None].float()
        damping_E[again_F] *= 10
        lower_EII[again_F], info_F = torch.linalg.cholesky_ex(work_EII[again_F])
        failed_E[again_F] = _failed(lower_EII[again_F], info_F)
    del work_EII, work_diagonal_EI
    hopeless_E = failed_E | ~alive_EI.any(dim=1)
    identity_II = torch.eye(columns, device=order_EI.device)
    lower_EII[hopeless_E] = identity_II
    damping_E[hopeless_E] = 0
    del identity_II
    _invert_lower(lower_EII)
    return lower_EII.flip(1, 2), damping_E


def _invert_lower(lower_EII: torch.Tensor) -> None:
    """Invert lower triangular matrices in place, with a third of the work of solving for the identity.

    With L = [[A, 0], [B, C]] the inverse is [[A', 0], [-C' B A', C']]; the halves are inverted the same way.
    """
    columns = lower_EII.shape[1]
    if columns <= _INVERTED_AT_ONCE:
        identity_II = torch.eye(columns, device=lower_EII.device).expand_as(lower_EII)
        lower_EII.copy_(torch.linalg.solve_triangular(lower_EII, identity_II, upper=False))
        return
    half = columns // 2
    first, corner, second = lower_EII[:, :half, :half], lower_EII[:, half:, :half], lower_EII[:, half:, half:]
    solved = torch.linalg.solve_triangular(second, corner, upper=False)
    solved = torch.linalg.solve_triangular(first, solved, upper=False, left=False)
    corner.copy_(solved.neg_())
    del solved
    _invert_lower(first)
    _invert_lower(second)


def _mean_alive(diagonal_EI: torch.Tensor) -> torch.Tensor:
    """Mean of the positive diagonal elements, [E] fp64; 0 where there is none."""
    return diagonal_EI.double().sum(dim=1) / (diagonal_EI > 0).sum(dim=1).clamp(min=1)


def _failed(lower_EII: torch.Tensor, info_E: torch.Tensor) -> torch.Tensor:
    """Experts whose Cholesky factor is not usable, [E] bool."""
    return (info_E != 0) | ~lower_EII.isfinite().flatten(1).all(dim=1)


def _compensated_codes(
    weight_EIO: torch.Tensor,
    upper_EII: torch.Tensor,
    scales_EGO: torch.Tensor,
    order_EI: torch.Tensor,
    scheme: Scheme,
    block: int,
) -> torch.Tensor:
    """GPTQ's column loop: codes [E, I, O] int8, in the original column order.

    `upper_EII` and `order_EI` come from `_inverse_factor` and `_column_order`; scales are [E, G, O] fp32. The columns
    beyond a block are updated at its end, all at once.
    """
    columns, rows = weight_EIO.shape[1:]
    batch_E1 = torch.arange(weight_EIO.shape[0], device=weight_EIO.device)[:, None]
    group_EI = order_EI // scheme.columns_per_group(columns)
    work_EIO = weight_EIO[batch_E1, order_EI]
    codes_EIO = torch.empty(weight_EIO.shape, dtype=torch.int8, device=weight_EIO.device)
    inner_round, _ = inner_loops(weight_EIO.device)
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        work_EBO, order_EB = work_EIO[:, start:stop], order_EI[:, start:stop]
        upper_EBB = upper_EII[:, start:stop, start:stop]
        scales_EBO = scales_EGO.gather(1, group_EI[:, start:stop, None].expand(-1, -1, rows))
        error_EBO, values_EBO = torch.empty_like(scales_EBO), torch.empty_like(scales_EBO)
        for first in range(0, stop - start, _INNER_COLUMNS):
            last = min(first + _INNER_COLUMNS, stop - start)
            inner = slice(first, last)
            inner_round(
                work_EBO[:, inner],
                upper_EBB[:, inner, inner],
                scales_EBO[:, inner],
                values_EBO[:, inner],
                error_EBO[:, inner],
                scheme.code_min,
                scheme.code_max,
            )
            if last < stop - start:
                work_EBO[:, last:].baddbmm_(upper_EBB[:, first:last, last:].mT, error_EBO[:, first:last], alpha=-1)
        codes_EIO[batch_E1, order_EB] = values_EBO.to(torch.int8)
        if stop < columns:
            work_EIO[:, stop:].baddbmm_(upper_EII[:, start:stop, stop:].mT, error_EBO, alpha=-1)
    return codes_EIO


def _descend(
    weight_EIO: torch.Tensor,
    hessian_EII: torch.Tensor,
    ridge_E: torch.Tensor,
    codes_EIO: torch.Tensor,
    scales_EGO: torch.Tensor,
    scheme: Scheme,
    scale_dtype: torch.dtype,
    options: SolverOptions,
) -> None:
    """One sweep of coordinate descent over scales and codes, both changed in place.

    H stands for the damped H here, H + ridge I. With the residual R = W - Q and the slope S = H R, moving a group's
    scale by d changes the loss by d^2 q^T H q - 2 d q^T S, and moving a code by k steps of scale s by
    (k s)^2 H_jj - 2 k s S_j: both minima are exact.
    """
    columns = weight_EIO.shape[1]
    width = scheme.columns_per_group(columns)
    panel = max(width, _SLOPE_COLUMNS // width * width)
    residual_EIO = _residual(weight_EIO, codes_EIO, scales_EGO)
    for left in range(0, columns, panel):
        right = min(left + panel, columns)
        slope_EPO = hessian_EII[:, left:right] @ residual_EIO
        for first in range(left, right, width):
            last = first + width
            span, group = slice(first, last), first // width
            residual_EgO, scale_EO = residual_EIO[:, span], scales_EGO[:, group]
            damped_Egg = hessian_EII[:, span, span].clone()
            damped_Egg.diagonal(dim1=1, dim2=2).add_(ridge_E[:, None])
            slope_EgO = slope_EPO[:, first - left : last - left]
            slope_EgO.addcmul_(residual_EgO, ridge_E[:, None, None])
            values_EgO = codes_EIO[:, span].float()
            if options.refit_scales:
                _refit_group(damped_Egg, slope_EgO, values_EgO, scale_EO, scale_dtype)
            _improve_codes(damped_Egg, slope_EgO.div_(scale_EO.unsqueeze(1)), values_EgO, scheme)
            codes_EIO[:, span] = values_EgO
            after_EgO = torch.addcmul(weight_EIO[:, span], values_EgO, scale_EO.unsqueeze(1), value=-1)
            if last < right:
                change_EgO = residual_EgO.sub_(after_EgO)
                slope_EPO[:, last - left :].baddbmm_(hessian_EII[:, last:right, span], change_EgO, alpha=-1)
            residual_EgO.copy_(after_EgO)


def _refit_group(
    hessian_Egg: torch.Tensor,
    slope_EgO: torch.Tensor,
    values_EgO: torch.Tensor,
    scale_EO: torch.Tensor,
    scale_dtype: torch.dtype,
) -> None:
    """Move each row's scale of one group to the least-squares value; scale and slope are changed in place.

    `values_EgO` are the codes, as fp32.
    """
    response_EgO = hessian_Egg @ values_EgO
    gain_EO = (values_EgO * slope_EgO).sum(dim=1)
    curvature_EO = (values_EgO * response_EgO).sum(dim=1)
    wanted_EO = scale_EO + gain_EO / torch.where(curvature_EO > 0, curvature_EO, 1.0)
    step_EO = storable_scales(wanted_EO, scale_dtype) - scale_EO
    better_EO = (wanted_EO > 0) & (curvature_EO > 0) & (step_EO * (step_EO * curvature_EO - 2 * gain_EO) < 0)
    step_EO = torch.where(better_EO, step_EO, 0.0)
    scale_EO.add_(step_EO)
    slope_EgO.addcmul_(response_EgO, step_EO.unsqueeze(1), value=-1)


def _improve_codes(
    hessian_Egg: torch.Tensor, slope_EgO: torch.Tensor, values_EgO: torch.Tensor, scheme: Scheme
) -> None:
    """Best code of each column of a group in turn, given all others; codes and slope are changed in place.

    Args:
        hessian_Egg: the group's part of the damped H.
        slope_EgO: S divided by the row's scale, so that a code's best step is S_j / H_jj.
        values_EgO: the codes, as fp32.
        scheme: bits and group size.
    """
    columns = values_EgO.shape[1]
    _, inner_improve = inner_loops(values_EgO.device)
    for start in range(0, columns, _INNER_COLUMNS):
        stop = min(start + _INNER_COLUMNS, columns)
        inner = slice(start, stop)
        step_EBO = torch.empty_like(values_EgO[:, inner])
        inner_improve(
            hessian_Egg[:, inner, inner],
            slope_EgO[:, inner],
            values_EgO[:, inner],
            step_EBO,
            scheme.code_min,
            scheme.code_max,
        )
        if stop < columns:
            slope_EgO[:, stop:].baddbmm_(hessian_Egg[:, stop:, inner], step_EBO, alpha=-1)


def _residual(weight_EIO: torch.Tensor, codes_EIO: torch.Tensor, scales_EGO: torch.Tensor) -> torch.Tensor:
    """W - Q, [E, I, O] fp32."""
    experts, columns, rows = weight_EIO.shape
    codes_EGgO = codes_EIO.view(experts, scales_EGO.shape[1], -1, rows)
    return weight_EIO - (codes_EGgO * scales_EGO.unsqueeze(2)).view(experts, columns, rows)


def _row_loss(
    weight_EIO: torch.Tensor, hessian_EII: torch.Tensor, codes_EIO: torch.Tensor, scales_EGO: torch.Tensor
) -> torch.Tensor:
    """(w - q) H (w - q)^T of every row, [E, O] fp64 (products in fp32, sums in fp64)."""
    return quadratic(_residual(weight_EIO, codes_EIO, scales_EGO), hessian_EII)


def quadratic(rows_EIO: torch.Tensor, hessian_EII: torch.Tensor) -> torch.Tensor:
    """v H v^T of every row v, [E, O] fp64; of the symmetric H only the lower triangle is multiplied."""
    experts, columns, rows = rows_EIO.shape
    total_EO = torch.zeros(experts, rows, dtype=torch.float64, device=rows_EIO.device)
    for left in range(0, columns, _SLOPE_COLUMNS):
        span = slice(left, left + _SLOPE_COLUMNS)
        part_EPO = rows_EIO[:, span]
        product_EPO = hessian_EII[:, span, span] @ part_EPO
        if left:
            product_EPO.baddbmm_(hessian_EII[:, span, :left], rows_EIO[:, :left], alpha=2)
        total_EO += product_EPO.mul_(part_EPO).sum(dim=1, dtype=torch.float64)
    return total_EO
