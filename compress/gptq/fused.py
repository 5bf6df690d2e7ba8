"""The solver's column loops as one Triton kernel per block of columns, for CUDA, where launches would cost most.

Every output row of every expert is independent of the others inside of a block, so a program takes one expert and some
rows, keeps the block's columns in registers and goes over them. The plain torch loops in `columns` are the reference:
the kernels are used where they give the same codes as those on a small problem, tried once per device.
"""

import os
from collections.abc import Callable

import torch

_ROWS = 64  # output rows of a program
COLUMNS = 128
"""Columns that one launch takes."""


def _launch(name: int, tensors: tuple[torch.Tensor, ...], shape: tuple[int, int, int], low: int, high: int) -> None:
    import triton

    from moepress.compress.gptq import kernels

    loops = (kernels.round_columns, kernels.improve_columns)
    experts, width, rows = shape
    assert all(t.stride(2) == 1 for t in tensors)
    strides = [t.stride(0) for t in tensors] + [t.stride(1) for t in tensors]
    grid = (experts, triton.cdiv(rows, _ROWS))
    block = max(2, triton.next_power_of_2(width))
    loops[name][grid](*tensors, *strides, rows, width, float(low), float(high), B=block, R=_ROWS)


def round_columns(
    work_EBO: torch.Tensor,
    upper_EBB: torch.Tensor,
    scales_EBO: torch.Tensor,
    codes_EBO: torch.Tensor,
    errors_EBO: torch.Tensor,
    low: int,
    high: int,
) -> None:
    """GPTQ over the columns of a block: codes and errors are written, the weights stay. See `columns.round_columns`."""
    # A Cholesky factor may lie column by column.
    tensors = (work_EBO, upper_EBB.contiguous(), scales_EBO, codes_EBO, errors_EBO)
    _launch(0, tensors, (work_EBO.shape[0], work_EBO.shape[1], work_EBO.shape[2]), low, high)


def improve_columns(
    hessian_EBB: torch.Tensor,
    slope_EBO: torch.Tensor,
    values_EBO: torch.Tensor,
    steps_EBO: torch.Tensor,
    low: int,
    high: int,
) -> None:
    """Coordinate descent over a block's columns: codes change, steps are written. See `columns.improve_columns`."""
    tensors = (hessian_EBB.contiguous(), slope_EBO, values_EBO, steps_EBO)
    _launch(1, tensors, (slope_EBO.shape[0], slope_EBO.shape[1], slope_EBO.shape[2]), low, high)


def available(device: torch.device) -> bool:
    """Whether the kernels may be tried there: CUDA, or Triton's interpreter for tests."""
    return device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"


def agrees(device: torch.device, reference_round: Callable[..., None], reference_improve: Callable[..., None]) -> bool:
    """Whether both kernels give the references' codes on a small problem with exact sums.

    All numbers are small multiples of powers of two, so that the order of additions changes nothing and codes must be
    equal, not nearly so.
    """
    generator = torch.Generator().manual_seed(0)

    def halves(*shape: int) -> torch.Tensor:
        return torch.randint(-8, 9, shape, generator=generator).float().div(4).to(device)

    square = halves(2, 32, 32).tril().mul(0.25)
    square.diagonal(dim1=1, dim2=2).fill_(2.0)
    upper, symmetric, work = square.mT.contiguous(), square + square.tril(-1).mT, halves(2, 32, 80).mul(4)
    scales = torch.full_like(work, 0.5)
    found: list[tuple[torch.Tensor, ...]] = []
    for rounding, improving in ((reference_round, reference_improve), (round_columns, improve_columns)):
        codes, errors, steps = torch.empty_like(work), torch.empty_like(work), torch.empty_like(work)
        rounding(work.clone(), upper, scales, codes, errors, -8, 7)
        values = codes.clone()
        improving(symmetric, work.clone(), values, steps, -8, 7)
        found.append((codes, errors, values, steps))
    return all(torch.allclose(a, b, atol=1e-4) for a, b in zip(*found, strict=True))
