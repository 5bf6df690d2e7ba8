"""GPTQ for a batch of experts: error-compensated rounding, then a descent over codes and scales.

Shape letters: E experts (one batch), O output rows, I input columns, G groups, g columns of a group, B columns of a
block. `solve` minimises trace((W - Q) H (W - Q)^T) per expert, with H = sum_t a_t x_t x_t^T over its tokens:

1. `search_scales`: one scale per row and static group, so the order of the columns never matters to what is stored.
2. `_compensated_codes`: GPTQ (arXiv 2210.17323). Columns in order of decreasing diag H; the rounding error of each is
   spread over the columns to come, by the upper Cholesky factor of the damped H's inverse, lazily per block.
3. `descend`: sweeps of exact coordinate descent. Per group: the best scale for its codes, then the best code of each
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

from moepress.compress.gptq.columns import INNER_COLUMNS, inner_loops
from moepress.compress.gptq.descent import descend, quadratic, row_loss
from moepress.compress.gptq.factor import column_order, inverse_factor, mean_alive
from moepress.compress.gptq.grid import absmax_scales, round_to_nearest, search_scales
from moepress.compress.gptq.options import SolverOptions
from moepress.compress.gptq.parts import part_slices, side_by_side
from moepress.converters.safetensors.scheme import Scheme
from moepress.runs.phases import phase


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
        upper, damping, ridge: of `inverse_factor`, [E, I, I], [E]; damping times the mean of the diagonal, [E].
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
        self.order = column_order(self.diagonal, act_order=self.options.act_order)
        found = inverse_factor(self.hessian, self.diagonal, self.order, self.options.damp)
        self.upper, self.damping = found
        self.ridge = (self.damping * mean_alive(self.diagonal)).float()

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
        descend(*given, scheme, scale_dtype, self.options)

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
    loss_EO = row_loss(weight_EIO, hessian_EII, *found)
    nearest_loss_EO = row_loss(weight_EIO, hessian_EII, *nearest)
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


def _compensated_codes(
    weight_EIO: torch.Tensor,
    upper_EII: torch.Tensor,
    scales_EGO: torch.Tensor,
    order_EI: torch.Tensor,
    scheme: Scheme,
    block: int,
) -> torch.Tensor:
    """GPTQ's column loop: codes [E, I, O] int8, in the original column order.

    `upper_EII` and `order_EI` come from `inverse_factor` and `column_order`; scales are [E, G, O] fp32. The columns
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
        for first in range(0, stop - start, INNER_COLUMNS):
            last = min(first + INNER_COLUMNS, stop - start)
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
