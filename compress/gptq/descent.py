"""After GPTQ: codes and scales that lower the exact loss, column by column and group by group."""

import torch

from moepress.compress.gptq.columns import INNER_COLUMNS, inner_loops
from moepress.compress.gptq.grid import storable_scales
from moepress.compress.gptq.options import SolverOptions
from moepress.converters.safetensors.scheme import Scheme

_SLOPE_COLUMNS = 512  # columns whose slopes one matrix product gives: thin products are slow


def descend(
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
    residual_EIO = residual(weight_EIO, codes_EIO, scales_EGO)
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
                refit_group(damped_Egg, slope_EgO, values_EgO, scale_EO, scale_dtype)
            improve_codes(damped_Egg, slope_EgO.div_(scale_EO.unsqueeze(1)), values_EgO, scheme)
            codes_EIO[:, span] = values_EgO
            after_EgO = torch.addcmul(weight_EIO[:, span], values_EgO, scale_EO.unsqueeze(1), value=-1)
            if last < right:
                change_EgO = residual_EgO.sub_(after_EgO)
                slope_EPO[:, last - left :].baddbmm_(hessian_EII[:, last:right, span], change_EgO, alpha=-1)
            residual_EgO.copy_(after_EgO)


def refit_group(
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


def improve_codes(hessian_Egg: torch.Tensor, slope_EgO: torch.Tensor, values_EgO: torch.Tensor, scheme: Scheme) -> None:
    """Best code of each column of a group in turn, given all others; codes and slope are changed in place.

    Args:
        hessian_Egg: the group's part of the damped H.
        slope_EgO: S divided by the row's scale, so that a code's best step is S_j / H_jj.
        values_EgO: the codes, as fp32.
        scheme: bits and group size.
    """
    columns = values_EgO.shape[1]
    _, inner_improve = inner_loops(values_EgO.device)
    for start in range(0, columns, INNER_COLUMNS):
        stop = min(start + INNER_COLUMNS, columns)
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


def residual(weight_EIO: torch.Tensor, codes_EIO: torch.Tensor, scales_EGO: torch.Tensor) -> torch.Tensor:
    """W - Q, [E, I, O] fp32."""
    experts, columns, rows = weight_EIO.shape
    codes_EGgO = codes_EIO.view(experts, scales_EGO.shape[1], -1, rows)
    return weight_EIO - (codes_EGgO * scales_EGO.unsqueeze(2)).view(experts, columns, rows)


def row_loss(
    weight_EIO: torch.Tensor, hessian_EII: torch.Tensor, codes_EIO: torch.Tensor, scales_EGO: torch.Tensor
) -> torch.Tensor:
    """(w - q) H (w - q)^T of every row, [E, O] fp64 (products in fp32, sums in fp64)."""
    return quadratic(residual(weight_EIO, codes_EIO, scales_EGO), hessian_EII)


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
