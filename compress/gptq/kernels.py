"""The kernels of `fused`, in Triton's language. Imports triton, so only `fused` imports this, where it is wanted.

A program takes one expert and R of its rows, keeps what the columns of the block are given in registers, and goes over
the columns; all else is read and written a column at a time. Rows lie next to each other in memory. Divisions are
IEEE's, as torch's are, so that what should be a tie is one. Levels are integers where STEPS is 0: adding 1.5 * 2^23
leaves no bits behind the point, rounding to nearest, ties to even.

Arguments that end in _e, _c, _g and _r are strides of experts, columns, groups and rows of a matrix.
"""

# Triton reads annotations, and knows none but its own.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import triton
import triton.language as tl

_WHOLE: tl.constexpr = tl.constexpr(12582912.0)


@triton.jit
def of_table(wanted, levels, STEPS: tl.constexpr):
    """The nearest of 2^STEPS levels, by halves; `levels` holds them, and behind them the middle above each."""
    count: tl.constexpr = 2**STEPS
    index = tl.zeros_like(wanted).to(tl.int32)
    for n in tl.static_range(STEPS):
        half = count >> (n + 1)
        index += tl.where(wanted > tl.load(levels + count - 1 + half + index), half, 0)
    return tl.load(levels + index)


@triton.jit(do_not_specialize=["width"])
def round_columns(
    target, weight, unit, scales, values, residual, errors, levels,
    target_e, weight_e, unit_e, scales_e, values_e, residual_e, errors_e,
    target_c, weight_c, unit_c, scales_c, values_c, residual_c, errors_c,
    unit_r, rows, width, low, high, STEPS: tl.constexpr, B: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """`columns.round_columns`."""
    expert, column = tl.program_id(0).to(tl.int64), tl.arange(0, B)
    row = tl.program_id(1) * R + tl.arange(0, R)
    there = row < rows
    unit += expert * unit_e + column * unit_c
    weight += expert * weight_e + row
    scales += expert * scales_e + row
    values += expert * values_e + row
    residual += expert * residual_e + row
    errors += expert * errors_e + row
    inside = (column[:, None] < width) & there[None, :]
    wanted = tl.load(target + expert * target_e + column[:, None] * target_c + row[None, :], mask=inside, other=0.0)
    for step in range(width):
        i = width - 1 - step
        scale_i = tl.load(scales + i * scales_c, mask=there, other=1.0)
        weight_i = tl.load(weight + i * weight_c, mask=there, other=0.0)
        feedback = tl.load(unit + i * unit_r, mask=column < i, other=0.0)
        target_i = tl.sum(tl.where(column[:, None] == i, wanted, 0.0), axis=0)
        value_i = tl.div_rn(target_i, scale_i)
        if STEPS == 0:
            value_i = (tl.minimum(tl.maximum(value_i, low), high) + _WHOLE) - _WHOLE
        else:
            value_i = of_table(value_i, levels, STEPS)
        residual_i = weight_i - value_i * scale_i
        tl.store(values + i * values_c, value_i, mask=there)
        tl.store(residual + i * residual_c, residual_i, mask=there)
        tl.store(errors + i * errors_c, target_i - value_i * scale_i, mask=there)
        wanted += feedback[:, None] * residual_i[None, :]


@triton.jit(do_not_specialize=["width", "sweeps"])
def improve_columns(
    hessian, slope, scales, values, moves, levels,
    hessian_e, slope_e, scales_e, values_e, moves_e,
    hessian_c, slope_c, scales_c, values_c, moves_c,
    hessian_r, rows, width, sweeps, low, high,
    STEPS: tl.constexpr, B: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """`columns.improve_columns`; ends when none of the program's rows changes."""
    expert, column = tl.program_id(0).to(tl.int64), tl.arange(0, B)
    row = tl.program_id(1) * R + tl.arange(0, R)
    there = row < rows
    hessian += expert * hessian_e
    scales += expert * scales_e + row
    values += expert * values_e + row
    moves += expert * moves_e + row
    inside = (column[:, None] < width) & there[None, :]
    steep = tl.load(slope + expert * slope_e + column[:, None] * slope_c + row[None, :], mask=inside, other=0.0)
    sweep, going = 0, 1
    while (sweep < sweeps) & (going > 0):
        changed = tl.zeros([R], tl.int32)
        for i in range(width):
            scale_i = tl.load(scales + i * scales_c, mask=there, other=1.0)
            before = tl.load(values + i * values_c, mask=there, other=0.0)
            earlier = tl.load(moves + i * moves_c, mask=there & (sweep > 0), other=0.0)
            curvature = tl.load(hessian + i * (hessian_r + hessian_c))
            spread = tl.load(hessian + i * hessian_r + column * hessian_c, mask=column < width, other=0.0)
            steep_i = tl.sum(tl.where(column[:, None] == i, steep, 0.0), axis=0)
            after = before + steep_i * (tl.div_rn(1.0, curvature) * tl.div_rn(1.0, scale_i))
            if STEPS == 0:
                after = (tl.minimum(tl.maximum(after, low), high) + _WHOLE) - _WHOLE
            else:
                after = of_table(after, levels, STEPS)
            move = (after - before) * scale_i
            tl.store(values + i * values_c, after, mask=there)
            tl.store(moves + i * moves_c, earlier + move, mask=there)
            changed = changed | (there & (after != before)).to(tl.int32)
            steep -= spread[:, None] * move[None, :]
        going = tl.max(changed, axis=0)
        sweep += 1
        tl.debug_barrier()  # the next sweep reads what other threads wrote


@triton.jit
def storable(scale, smallest, largest, KIND: tl.constexpr, EITHER: tl.constexpr):
    """`grid.storable_scales`; KIND is 0 for fp32, 1 for bf16, 2 for fp16."""
    size = tl.abs(scale) if EITHER else scale
    held = tl.minimum(tl.maximum(tl.where(size > 0, size, 1.0), smallest), largest)
    if KIND == 1:  # by its bits: to nearest, ties to even, in Triton's interpreter too
        bits = held.to(tl.int32, bitcast=True)
        held = ((bits + 32767 + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
    if KIND == 2:
        held = held.to(tl.float16).to(tl.float32)
    return tl.where(scale < 0, -held, held) if EITHER else held


@triton.jit(do_not_specialize=["turn", "later", "tries"])
def search_scales(
    weight, importance, out, levels, shares,
    weight_e, importance_e, out_e, weight_c, out_g,
    rows, group, turn, later, tries, low, high, smallest, largest,
    KIND: tl.constexpr, EITHER: tl.constexpr, STEPS: tl.constexpr, C: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """`grid.search_scales_on`, a program for one group of one expert and R rows, C columns at a time.

    `shares` holds what is tried: number `turn` is the scale that clips nothing, whatever stands there, and those from
    `later` on come in pairs, both at some distance of the best share before them.
    """
    expert, number = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    row = tl.program_id(2) * R + tl.arange(0, R)
    there = row < rows
    weight += expert * weight_e + number * group * weight_c + row
    importance += expert * importance_e + number * group
    lowest, highest = tl.full([R], float("inf"), tl.float32), tl.full([R], float("-inf"), tl.float32)
    for start in range(0, group, C):
        column = start + tl.arange(0, C)
        column = tl.where(column < group, column, 0)  # those that are not there stand for the group's first
        given = tl.load(weight[None, :] + column[:, None] * weight_c, mask=there[None, :], other=0.0)
        lowest, highest = tl.minimum(lowest, tl.min(given, axis=0)), tl.maximum(highest, tl.max(given, axis=0))
    base = tl.div_rn(tl.maximum(highest, -lowest), high)
    unclipped = tl.maximum(tl.div_rn(highest, high), tl.div_rn(lowest, low))
    unclipped = tl.div_rn(unclipped, tl.where(base > 0, base, 1.0))
    best, best_error = storable(base, smallest, largest, KIND, False), tl.full([R], float("inf"), tl.float32)
    best_share = tl.zeros_like(base) + 1.0
    middle = best_share
    for t in range(tries):
        told = tl.load(shares + t)
        middle = tl.where((t >= later) & ((t - later) % 2 == 0), best_share, middle)
        share = tl.where(t == turn, unclipped, tl.where(t >= later, middle + told, told))
        scale = storable(base * share, smallest, largest, KIND, EITHER)
        inverse, error = tl.div_rn(1.0, scale), tl.zeros_like(base)
        for start in range(0, group, C):
            column = start + tl.arange(0, C)
            inside = (column[:, None] < group) & there[None, :]
            given = tl.load(weight[None, :] + column[:, None] * weight_c, mask=inside, other=0.0)
            counts = tl.load(importance + column, mask=column < group, other=0.0)
            level = given * inverse[None, :]
            if STEPS == 0:
                level = (tl.minimum(tl.maximum(level, low), high) + _WHOLE) - _WHOLE
            else:
                level = of_table(level, levels, STEPS)
            away = level * scale[None, :] - given
            error += tl.sum(away * away * counts[:, None], axis=0)
        better = error < best_error
        best, best_error = tl.where(better, scale, best), tl.where(better, error, best_error)
        best_share = tl.where(better, share, best_share)
    tl.store(out + expert * out_e + number * out_g + row, best, mask=there)
