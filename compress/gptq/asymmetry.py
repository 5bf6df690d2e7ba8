"""Targets from the original model's inputs: GPTAQ's asymmetric correction (arXiv 2504.02692), for any solver.

The inputs x of a matrix come through quantized layers; in the original model the same tokens give x~. The output to
aim at is then W x~ and not W x:

    min_Q sum_t a_t |Q x_t - W x~_t|^2  =  min_Q tr((Q - W') H (Q - W')^T) + a constant,
    W' = W + W C H^-1,    H = sum_t a_t x_t x_t^T,    C = sum_t a_t (x~_t - x_t) x_t^T,

so the solver stays as it is and gets another matrix to meet. H is damped as in the solver. GPTAQ itself folds the same
correction into its column loop, where it may only move columns to come, and takes a quarter of it. Here the share is
`asymmetry`; the whole step measured best.

Letters: O output rows, I input columns.
"""

import torch
from torch import Tensor

from moepress.calibration.hessian import Moments
from moepress.compress.gptq.descent import quadratic
from moepress.compress.gptq.factor import DAMP_ATTEMPTS
from moepress.runs.phases import phase


def move_target(weight_OI: Tensor, moments: Moments, asymmetry: float, damp: float) -> bool:
    """Replace a matrix by what its codes are to meet, in place.

    Args:
        weight_OI: W, fp32; becomes W + asymmetry * W C H^-1.
        moments: H and C, of W's inputs.
        asymmetry: the share of the step, 0 to 1.
        damp: share of mean(diag H) added to the diagonal; times 10 on each failed Cholesky.

    Returns:
        Whether the matrix was moved: not without C, and not where no damping makes H positive.
    """
    if moments.cross is None or asymmetry == 0:
        return False
    device, columns = weight_OI.device, weight_OI.shape[1]
    with phase("targets", flops=4 * weight_OI.numel() * columns + columns**3 / 3):
        hessian_II, cross_II = moments.hessian.to(device), moments.cross.to(device)
        lower_II = _factor(hessian_II, damp)
        if lower_II is None:
            return False
        step_IO = torch.cholesky_solve((weight_OI @ cross_II).T, lower_II)
        weight_OI.add_(step_IO.T, alpha=asymmetry)
        return True


def _factor(hessian_II: Tensor, damp: float) -> Tensor | None:
    """The lower Cholesky factor of the damped H; None where there is none."""
    diagonal_I = hessian_II.diagonal().clamp(min=0).double()
    mean = float(diagonal_I.sum()) / max(int((diagonal_I > 0).sum()), 1)
    if mean <= 0:
        return None
    for attempt in range(DAMP_ATTEMPTS):
        damped_II = hessian_II.clone()
        damped_II.diagonal().add_(damp * 10**attempt * mean)
        lower_II, info = torch.linalg.cholesky_ex(damped_II)
        if int(info) == 0 and bool(lower_II.isfinite().all()):
            return lower_II  # type: ignore[no-any-return]
    return None


def relative_error(weight_OI: Tensor, quantized_OI: Tensor, hessian_II: Tensor) -> float:
    """tr((W - Q) H (W - Q)^T) / tr(W H W^T), fp32 products, fp64 sums: against W whatever the codes were to meet."""
    with phase("losses", flops=2 * weight_OI.numel() * weight_OI.shape[1]):
        lost, whole = (
            float(quadratic(rows_OI.T[None], hessian_II[None]).sum())
            for rows_OI in (weight_OI - quantized_OI, weight_OI)
        )
        return max(lost, 0.0) / max(whole, 1e-300)
