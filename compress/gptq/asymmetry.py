"""Targets from the original model's inputs: GPTAQ's asymmetric correction (arXiv 2504.02692), for any solver.

The inputs x of a matrix come through quantized layers; in the original model the same tokens give x~. The output to
aim at is then W x~ and not W x:

    min_Q sum_t a_t |Q x_t - W x~_t|^2  =  min_Q tr((Q - W') H (Q - W')^T) + a constant,
    W' = W + W C H^-1,    H = sum_t a_t x_t x_t^T,    C = sum_t a_t (x~_t - x_t) x_t^T,

so the solver stays as it is and gets another matrix to meet. H is damped as in the solver. GPTAQ itself folds the same
correction into its column loop, where it may only move columns to come, and takes a quarter of it. Here the share is
`asymmetry`; the whole step measured best.

Errors that are reported are against W all the same. With s = W' - W, whose s H is known, they follow from what the
solver tells of W', without another product with H:

    tr((W - Q) H (W - Q)^T) = tr((W' - Q) H (W' - Q)^T) - 2 tr((W - Q) H s^T) - tr(s H s^T)
    tr(W H W^T)             = tr(W' H W'^T)             - 2 tr(W H s^T)       - tr(s H s^T)

Letters: O output rows, I input columns.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from moepress.calibration.hessian import Moments
from moepress.compress.gptq.factor import DAMP_ATTEMPTS
from moepress.runs.phases import phase


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """The step s = W' - W of a matrix in terms of the loss.

    Attributes:
        pull: s H, fp32 [O, I], on the matrix's device.
        weight: tr(W H s^T).
        own: tr(s H s^T).
    """

    pull: Tensor
    weight: float
    own: float


def move_target(weight_OI: Tensor, moments: Moments, asymmetry: float, damp: float) -> Step | None:
    """Replace a matrix by what its codes are to meet, in place.

    Args:
        weight_OI: W, fp32; becomes W + asymmetry * W C H^-1.
        moments: H and C, of W's inputs.
        asymmetry: the share of the step, 0 to 1.
        damp: share of mean(diag H) added to the diagonal; times 10 on each failed Cholesky.

    Returns:
        The step; None where the matrix stays: without C, and where no damping makes H positive.
    """
    if moments.cross is None or asymmetry == 0:
        return None
    device, columns = weight_OI.device, weight_OI.shape[1]
    with phase("targets", flops=4 * weight_OI.numel() * columns + columns**3 / 3):
        hessian_II, cross_II = moments.hessian.to(device), moments.cross.to(device)
        factored = _factor(hessian_II, damp)
        if factored is None:
            return None
        lower_II, ridge = factored
        pull_OI = weight_OI @ cross_II
        step_OI = torch.cholesky_solve(pull_OI.T, lower_II).T
        pull_OI.add_(step_OI, alpha=-ridge).mul_(asymmetry)  # H without its damping
        step_OI.mul_(asymmetry)
        found = Step(pull=pull_OI, weight=_dot(weight_OI, pull_OI), own=_dot(step_OI, pull_OI))
        weight_OI.add_(step_OI)
        return found


def _dot(left_OI: Tensor, right_OI: Tensor) -> float:
    """tr(L R^T), summed in fp64."""
    return float((left_OI * right_OI).sum(dtype=torch.float64))


def _factor(hessian_II: Tensor, damp: float) -> tuple[Tensor, float] | None:
    """The lower Cholesky factor of the damped H, and the damping; None where there is none."""
    diagonal_I = hessian_II.diagonal().clamp(min=0).double()
    mean = float(diagonal_I.sum()) / max(int((diagonal_I > 0).sum()), 1)
    if mean <= 0:
        return None
    for attempt in range(DAMP_ATTEMPTS):
        damped_II = hessian_II.clone()
        ridge = damp * 10**attempt * mean
        damped_II.diagonal().add_(ridge)
        lower_II, info = torch.linalg.cholesky_ex(damped_II)
        if int(info) == 0 and bool(lower_II.isfinite().all()):
            return lower_II, ridge
    return None


def against_original(loss: float, energy: float, step: Step, off_OI: Tensor) -> tuple[float, float]:
    """tr((W - Q) H (W - Q)^T) and tr(W H W^T), for a matrix W that was moved.

    Args:
        loss, energy: tr((W' - Q) H (W' - Q)^T) and tr(W' H W'^T), as the solver tells them.
        step: from W to W'.
        off_OI: W - Q, fp32 on the step's device.
    """
    with phase("losses"):
        return loss - 2 * _dot(off_OI, step.pull) - step.own, energy - 2 * step.weight - step.own
