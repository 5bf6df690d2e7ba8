"""GPTQ for a batch of experts: error-compensated rounding, then a descent over codes and scales.

Shape letters: E experts (one batch), O output rows, I input columns, G groups, g columns of a group. `solve` minimises
trace((W - Q) H (W - Q)^T) per expert, with H = sum_t a_t x_t x_t^T over its tokens:

1. `factor`: H + ridge = U D U^T, in the order of solving backwards. Columns in order of decreasing diag H.
2. `search_scales_on`: one scale per row and static group, so the order of the columns never matters to what is stored;
   with zero points `search_with_zero`.
3. GPTQ (arXiv 2210.17323) in the form of LDLQ (QuIP, arXiv 2307.13304): a column is rounded after it has taken from the
   residuals of those before it, by U. The same codes as spreading errors by the inverse's factor, and no inverse.
4. The slope of the loss from the loop's own errors, and sweeps of exact coordinate descent over the codes of each row.
5. `refits` times: every scale to its least-squares value, and the codes again. No step can raise the loss that it works
   on, which is the damped one: with fewer tokens than columns the undamped one says nothing about most directions, and
   following it costs quality on new text.
6. Rows that are no better than their round-to-nearest codes take those: the undamped loss never exceeds theirs.
7. With a side B, what errors of two output rows cost together, rows are solved again by `two_sided`, which lowers
   trace(B (W - Q) H (W - Q)^T) and with that may raise the loss above.

`cpu` does that matrix by matrix with native loops, `batch` for all at once in torch. Nothing is random.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moepress.compress.gptq import cpu, native
from moepress.compress.gptq.batch import Found, solve_batch
from moepress.compress.gptq.descent import quadratic
from moepress.compress.gptq.grid import absmax_scales
from moepress.compress.gptq.levels import Grid, search_plan
from moepress.compress.gptq.minimum import search_with_minimum, spread
from moepress.compress.gptq.options import SolverOptions, Task
from moepress.compress.gptq.parts import side_by_side
from moepress.compress.gptq.two_sided import Sides, check_sides
from moepress.compress.gptq.zero_points import search_with_zero
from moepress.converters.safetensors.floats import divisors
from moepress.converters.safetensors.scheme import Codes, Scheme
from moepress.runs.phases import phase

_SCALE_DTYPES = {Codes.NVFP4: torch.float8_e4m3fn, Codes.MXFP4: torch.float8_e8m0fnu}  # of codes that say it
_AT_ONCE = 2  # experts that a thread solves together in torch: more are no faster, and do not stay in a cache


@dataclass(frozen=True, slots=True, kw_only=True)
class Solved:
    """Quantized weights of a batch of experts.

    Attributes:
        codes: [E, O, I] int8, of the grid.
        scales: [E, O, G] fp32, each exactly representable in the dtype they were asked for; positive, unless the grid
            has scales of either sign.
        loss: [E] fp64, trace((W - Q) H (W - Q)^T) with the undamped H.
        energy: [E] fp64, trace(W H W^T): what the loss is a share of.
        damping: [E] fp64, the share of mean(diag H) that was needed; 0 where `rounded`.
        rounded: [E] bool, no usable Hessian (no token, or not positive even when damped): rounded to nearest.
        offsets: [E, O, G] fp32, of grids with a minimum: the weight is level * scale + offset.
        divisor: [E] fp32, of NVFP4: the weight is level * scale / divisor.
        zeros: [E, O, G] int16, of grids with zero points: the weight is (level - zero) * scale.
    """

    codes: Tensor
    scales: Tensor
    loss: Tensor
    energy: Tensor
    damping: Tensor
    rounded: Tensor
    offsets: Tensor | None = None
    divisor: Tensor | None = None
    zeros: Tensor | None = None


def solve(
    weight_EOI: Tensor,
    hessian_EII: Tensor,
    scheme: Scheme,
    *,
    scale_dtype: torch.dtype,
    options: SolverOptions | None = None,
    grid: Grid | None = None,
    sides: Sides = None,
) -> Solved:
    """Quantize a batch of weight matrices, each with its own Hessian.

    Args:
        weight_EOI: [E, O, I] fp32; not changed.
        hessian_EII: [E, I, I] fp32, symmetric, positive semidefinite; not changed. A column whose diagonal is 0 is
            rounded to nearest; so is an expert whose H is all zero, with unweighted scales.
        scheme: bits, group size, what codes are and whether there are zero points.
        scale_dtype: dtype the scales will be stored in, where codes are integers; they are rounded to it before codes
            are chosen.
        options: see `SolverOptions`.
        grid: what codes stand for, where it is not the integers of the scheme's bits.
        sides: B of each matrix, fp32 on its device, or None for 1: then tr(B (W - Q) H (W - Q)^T) with the damped H is
            what is minimised, and never above what it is without.

    Returns:
        Codes, scales, zero points where the scheme has them, and figures.

    Raises:
        ValueError: shapes do not fit, W or H holds NaN or infinity, or a side is not positive definite.
    """
    _check(weight_EOI, hessian_EII)
    group = scheme.columns_per_group(weight_EOI.shape[2])
    options = options or SolverOptions()
    signed = options.signed and options.scale_search  # the plain scales are of one sign, and a refit keeps it
    grid = grid or Grid.of(scheme, either_sign=signed)
    dtype = _SCALE_DTYPES.get(scheme.codes, scale_dtype)
    task = Task(grid=grid, group=group, dtype=dtype, options=options, search=search_plan(scheme.codes))
    if task.grid.minimum:
        return _solve_above(weight_EOI, hessian_EII, task, sides)
    if task.grid.zero:
        return _solve_around(weight_EOI, hessian_EII, task, sides)
    if scheme.codes is Codes.NVFP4:
        return _solve_divided(weight_EOI, hessian_EII, scheme, task, sides)
    return _solve_scaled(weight_EOI, hessian_EII, scheme, task, sides)


def _solve_scaled(weight_EOI: Tensor, hessian_EII: Tensor, scheme: Scheme, task: Task, sides: Sides) -> Solved:
    """With a scale per group and no more."""
    if task.options.scale_search:  # which writes them
        scales_EOG = weight_EOI.new_empty((*weight_EOI.shape[:2], scheme.groups(weight_EOI.shape[2])))
    else:
        scales_EOG = absmax_scales(weight_EOI, scheme, scale_dtype=task.dtype)
    return solve_fixed(weight_EOI, hessian_EII, scales_EOG, task, sides)


def _solve_divided(weight_EOI: Tensor, hessian_EII: Tensor, scheme: Scheme, task: Task, sides: Sides) -> Solved:
    """With a divisor of every matrix besides: its multiple is solved, whose scales are fp8 numbers and no more."""
    divisor_E = divisors(weight_EOI.abs().amax(dim=(1, 2)))
    solved = _solve_scaled(weight_EOI * divisor_E[:, None, None], hessian_EII, scheme, task, sides)
    squared_E = divisor_E.double().square()
    return replace(solved, divisor=divisor_E, loss=solved.loss / squared_E, energy=solved.energy / squared_E)


def _solve_above(weight_EOI: Tensor, hessian_EII: Tensor, task: Task, sides: Sides) -> Solved:
    """With a minimum per group: what is above it is solved."""
    importance_EI = hessian_EII.diagonal(dim1=1, dim2=2).clamp(min=0)
    scales_EOG, offsets_EOG = search_with_minimum(weight_EOI, importance_EI, task.grid, task.group, task.dtype)
    above = replace(task, options=replace(task.options, scale_search=False))
    solved = solve_fixed(weight_EOI - spread(offsets_EOG, task.group), hessian_EII, scales_EOG, above, sides)
    energy_E = quadratic(weight_EOI.mT, hessian_EII).sum(dim=1).clamp(min=0)
    return replace(solved, offsets=offsets_EOG, energy=energy_E)


def _solve_around(weight_EOI: Tensor, hessian_EII: Tensor, task: Task, sides: Sides) -> Solved:
    """With a zero point per group, searched with its scale; `scale_search` has no say, there is no plain choice."""
    importance_EI = hessian_EII.diagonal(dim1=1, dim2=2).clamp(min=0)
    with phase("scales"):
        scales_EOG, zeros_EOG = search_with_zero(weight_EOI, importance_EI, task.grid, task.group, task.dtype)
    plain = replace(task.options, scale_search=False)
    around = replace(task, options=plain, zeros=zeros_EOG)
    solved = solve_fixed(weight_EOI, hessian_EII, scales_EOG, around, sides)
    return replace(solved, zeros=zeros_EOG.to(torch.int16))


def solve_fixed(weight_EOI: Tensor, hessian_EII: Tensor, scales_EOG: Tensor, task: Task, sides: Sides = None) -> Solved:
    """`solve` of a task, with scales that are given where the task searches none.

    Args:
        weight_EOI: as of `solve`.
        hessian_EII: as of `solve`.
        scales_EOG: fp32, not 0; of either sign where the grid has both.
        task: see `Task`; its grid has no minimum.
        sides: as of `solve`.
    """
    if sides is not None:
        check_sides(sides, *weight_EOI.shape[:2])
    if weight_EOI.device.type != "cpu":
        found = [solve_batch(weight_EOI, hessian_EII, scales_EOG, task, sides)]
    elif native.library() is not None:
        found = [cpu.solve_all(weight_EOI, hessian_EII, scales_EOG, task, sides)]
    else:
        given = [slice(start, start + _AT_ONCE) for start in range(0, len(weight_EOI), _AT_ONCE)]

        def some(part: slice) -> Found:
            own = None if sides is None else sides[part]
            return solve_batch(weight_EOI[part], hessian_EII[part], scales_EOG[part], task.of(part), own)

        with side_by_side(min(len(given), torch.get_num_threads())) as each:
            found = each(some, given)
    return _joined(found)


def _joined(parts: Sequence[Found]) -> Solved:
    """Parts of a batch as one."""

    def whole(name: str) -> Tensor:
        found = [getattr(part, name) for part in parts]
        return found[0] if len(found) == 1 else torch.cat(found)

    damping_E = whole("damping")
    return Solved(
        codes=whole("codes"),
        scales=whole("scales"),
        loss=whole("loss"),
        energy=whole("energy"),
        damping=damping_E,
        rounded=damping_E == 0,
    )


def _check(weight_EOI: Tensor, hessian_EII: Tensor) -> None:
    if weight_EOI.ndim != 3 or hessian_EII.shape != (weight_EOI.shape[0], weight_EOI.shape[2], weight_EOI.shape[2]):
        raise ValueError(
            f"weight {tuple(weight_EOI.shape)}, Hessian {tuple(hessian_EII.shape)}: need [E, O, I] and [E, I, I]."
        )
    for name, tensor in (("weight", weight_EOI), ("Hessian", hessian_EII)):
        if tensor.dtype != torch.float32:
            raise ValueError(f"the {name} is {tensor.dtype}; pass float32.")
        if not _finite(tensor):
            experts = (~tensor.isfinite().flatten(1).all(dim=1)).nonzero().flatten().tolist()
            raise ValueError(
                f"the {name} holds NaN or infinity in experts {experts}; check the checkpoint and the calibration pass."
            )


def _finite(tensor: Tensor) -> bool:
    """Whether all numbers are finite: the least and the largest tell, and need no other tensor."""
    if not tensor.numel():
        return True
    least, largest = tensor.aminmax()
    return bool(least.isfinite() & largest.isfinite())
