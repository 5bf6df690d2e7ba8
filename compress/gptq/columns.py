"""The solver's loops over the columns of a block, GPTQ's and the descent's: in torch, and fused where Triton works."""

import functools
import warnings
from collections.abc import Callable

import torch

from moepress.compress.gptq import fused

INNER_COLUMNS = 32  # columns of a block whose errors are spread one by one; those beyond it together


def round_columns(
    work_EBO: torch.Tensor,
    upper_EBB: torch.Tensor,
    scales_EBO: torch.Tensor,
    codes_EBO: torch.Tensor,
    errors_EBO: torch.Tensor,
    low: int,
    high: int,
) -> None:
    """Round the columns of a block in turn, spreading each one's error over those to come.

    Args:
        work_EBO: what is to be rounded, fp32; what is left in it does not matter.
        upper_EBB: the block's part of the inverse's factor.
        scales_EBO: of each weight.
        codes_EBO: gets the codes, as fp32.
        errors_EBO: gets the errors, divided by the factor's diagonal.
        low: smallest code.
        high: largest code.
    """
    pivot_EB1 = upper_EBB.diagonal(dim1=1, dim2=2).reciprocal().unsqueeze(-1)
    columns = zip(*(m.unbind(1) for m in (work_EBO, scales_EBO, codes_EBO, errors_EBO, pivot_EB1)), strict=True)
    for i, (value_EO, scale_EO, code_EO, error_EO, pivot_E1) in enumerate(columns):
        torch.div(value_EO, scale_EO, out=code_EO).round_().clamp_(low, high)
        torch.addcmul(value_EO, code_EO, scale_EO, value=-1, out=error_EO).mul_(pivot_E1)
        if i + 1 < work_EBO.shape[1]:
            work_EBO[:, i + 1 :].baddbmm_(upper_EBB[:, i, i + 1 :, None], error_EO[:, None], alpha=-1)


def improve_columns(
    hessian_EBB: torch.Tensor,
    slope_EBO: torch.Tensor,
    values_EBO: torch.Tensor,
    steps_EBO: torch.Tensor,
    low: int,
    high: int,
) -> None:
    """Best code of each column of a block in turn, given all others.

    Args:
        hessian_EBB: the block's part of the damped H.
        slope_EBO: S divided by the row's scale, fp32; what is left in it does not matter.
        values_EBO: the codes, as fp32; changed in place.
        steps_EBO: gets by how much they changed.
        low: smallest code.
        high: largest code.
    """
    diagonal_EB = hessian_EBB.diagonal(dim1=1, dim2=2)
    inverse_EB1 = torch.where(diagonal_EB > 0, diagonal_EB, torch.inf).reciprocal().unsqueeze(-1)
    steps_EBO.copy_(values_EBO)
    columns = zip(*(m.unbind(1) for m in (values_EBO, steps_EBO, slope_EBO, inverse_EB1)), strict=True)
    for i, (value_EO, step_EO, slope_EO, inverse_E1) in enumerate(columns):
        value_EO.addcmul_(slope_EO, inverse_E1).round_().clamp_(low, high)
        torch.sub(value_EO, step_EO, out=step_EO)
        if i + 1 < values_EBO.shape[1]:
            slope_EBO[:, i + 1 :].baddbmm_(hessian_EBB[:, i + 1 :, i, None], step_EO[:, None], alpha=-1)


@functools.cache
def inner_loops(device: torch.device) -> tuple[Callable[..., None], Callable[..., None]]:
    """`round_columns` and `improve_columns` for a device: fused kernels where they give what these give."""
    if fused.available(device):
        try:
            if fused.agrees(device, round_columns, improve_columns):
                return fused.round_columns, fused.improve_columns
            reason = "its codes differ from torch's"
        except Exception as error:  # Triton, its compiler and the driver raise many types: none of them may end a run
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        warnings.warn(f"{device}: no fused GPTQ kernels ({reason}); plain torch is slower.", stacklevel=2)
    return round_columns, improve_columns
