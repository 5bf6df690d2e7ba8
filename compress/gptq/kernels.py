"""The kernels of `fused`, in Triton's language. Imports triton, so only `fused` imports this, where it is wanted."""

from typing import Any

import triton
import triton.language as tl


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def nearest(value: Any, low: Any, high: Any) -> Any:
    """The nearest code."""
    # Adding 1.5 * 2^23 leaves no bits behind the point: round to nearest, ties to even, as torch does.
    bounded = tl.minimum(tl.maximum(value, low - 1.0), high + 1.0)
    return tl.minimum(tl.maximum((bounded + 12582912.0) - 12582912.0, low), high)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def round_columns(
    work: Any, upper: Any, scales: Any, codes: Any, errors: Any,
    work_e: Any, upper_e: Any, scales_e: Any, codes_e: Any, errors_e: Any,
    work_c: Any, upper_c: Any, scales_c: Any, codes_c: Any, errors_c: Any,
    rows: Any, width: Any, low: Any, high: Any, B: tl.constexpr, R: tl.constexpr,
) -> None:  # fmt: skip
    """`columns.round_columns`; every tensor with its strides of experts and of columns."""
    expert, column = tl.program_id(0).to(tl.int64), tl.arange(0, B)
    row = tl.program_id(1) * R + tl.arange(0, R)
    inside = (column[:, None] < width) & (row[None, :] < rows)
    value = tl.load(work + expert * work_e + column[:, None] * work_c + row[None, :], mask=inside, other=0.0)
    scale = tl.load(scales + expert * scales_e + column[:, None] * scales_c + row[None, :], mask=inside, other=1.0)
    code = tl.zeros_like(value)
    error = tl.zeros_like(value)
    for i in range(width):
        here = column[:, None] == i
        value_i = tl.sum(tl.where(here, value, 0.0), axis=0)
        scale_i = tl.sum(tl.where(here, scale, 0.0), axis=0)
        spread = tl.load(upper + expert * upper_e + i * upper_c + column, mask=column < width, other=0.0)
        pivot = tl.sum(tl.where(column == i, spread, 0.0), axis=0)
        code_i = nearest(value_i / scale_i, low, high)
        error_i = (value_i - code_i * scale_i) / pivot
        code = tl.where(here, code_i[None, :], code)
        error = tl.where(here, error_i[None, :], error)
        value = value - tl.where(column > i, spread, 0.0)[:, None] * error_i[None, :]
    tl.store(codes + expert * codes_e + column[:, None] * codes_c + row[None, :], code, mask=inside)
    tl.store(errors + expert * errors_e + column[:, None] * errors_c + row[None, :], error, mask=inside)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def improve_columns(
    hessian: Any, slope: Any, values: Any, steps: Any,
    hessian_e: Any, slope_e: Any, values_e: Any, steps_e: Any,
    hessian_c: Any, slope_c: Any, values_c: Any, steps_c: Any,
    rows: Any, width: Any, low: Any, high: Any, B: tl.constexpr, R: tl.constexpr,
) -> None:  # fmt: skip
    """`columns.improve_columns`, likewise."""
    expert, column = tl.program_id(0).to(tl.int64), tl.arange(0, B)
    row = tl.program_id(1) * R + tl.arange(0, R)
    inside = (column[:, None] < width) & (row[None, :] < rows)
    place = expert * slope_e + column[:, None] * slope_c + row[None, :]
    steep = tl.load(slope + place, mask=inside, other=0.0)
    code = tl.load(values + expert * values_e + column[:, None] * values_c + row[None, :], mask=inside, other=0.0)
    moved = tl.zeros_like(steep)
    for i in range(width):
        here = column[:, None] == i
        spread = tl.load(hessian + expert * hessian_e + i * hessian_c + column, mask=column < width, other=0.0)
        curvature = tl.sum(tl.where(column == i, spread, 0.0), axis=0)
        inverse = tl.where(curvature > 0, 1.0 / tl.where(curvature > 0, curvature, 1.0), 0.0)
        before = tl.sum(tl.where(here, code, 0.0), axis=0)
        after = nearest(before + tl.sum(tl.where(here, steep, 0.0), axis=0) * inverse, low, high)
        step = after - before
        code = tl.where(here, after[None, :], code)
        moved = tl.where(here, step[None, :], moved)
        steep = steep - spread[:, None] * step[None, :]
    tl.store(values + expert * values_e + column[:, None] * values_c + row[None, :], code, mask=inside)
    tl.store(steps + expert * steps_e + column[:, None] * steps_c + row[None, :], moved, mask=inside)
