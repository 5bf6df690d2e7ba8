"""The inner loops of loops.cpp, where an installation could build them: functions on tensors, without copies.

Built once per instruction set by setup.py; which one is used is what torch says of this processor. Where there is none
(no compiler when it was installed, another version of the source) everything runs in torch alone, with the same codes
but for the order of sums, only slower: `status` says which.

Letters: O output rows, I input columns, G groups, g columns of a group, B columns of a block. Tensors are fp32 on the
CPU with contiguous rows unless said otherwise; a function waits without Python's lock.
"""

import ctypes
import functools
import os
from pathlib import Path

import torch
from torch import Tensor

from moepress.compress.gptq.levels import Grid, SearchPlan

VERSION = 6
BLOCK_COLUMNS = 64
"""Columns that `round_block` takes at most."""
LEAF_COLUMNS = 64
"""Columns that `factor_leaf` takes at most."""
_KINDS = {
    torch.float32: 0,
    torch.bfloat16: 1,
    torch.float16: 2,
    torch.float8_e4m3fn: 3,
    torch.float8_e8m0fnu: 4,
}
_BUILDS = {"AVX512": ("avx512", "avx2", "base"), "AVX2": ("avx2", "base")}
_I, _S, _F, _P = ctypes.c_int, ctypes.c_int64, ctypes.c_float, ctypes.c_void_p
_GRID = (_F, _F, _P, _I)
_SIGNATURES = {
    "factor_leaf": (_P, _S, _I, _P),
    "search_scales": (*_GRID, _P, _S, _P, _I, _I, _S, _I, _I, _P, _I, _F, _I, _P, _S),
    "round_block": (
        *_GRID, *(_P, _S) * 2, _P, _P, _S, _P, _P, _P, _S, _I, _S, *(_P, _S) * 3, _P,
    ),
    "descend": (*_GRID, _P, _S, _P, _P, _P, _I, _I, _S, _I, *(_P, _S) * 3, _P),
    "descend_together": (*_GRID, _P, _S, _P, _P, _P, _I, _I, _S, _I, _I, *(_P, _S) * 5, _P),
    "anneal": (*_GRID, _P, _S, _P, _P, _I, _I, _S, _I, *(_P, _S) * 4, _P),
    "refit_group": (*_GRID, _P, _S, _P, _P, _P, _I, _S, _I, _I, _I, *(_P, _S) * 7, _F, _F, _P),
    "nearest": (*_GRID, _P, _S, _P, _P, _P, _S, _I, _S, _P, _S),
    "squares": (*_GRID, *(_P, _S) * 4, _I, _I, _S, *(_P,) * 3),
    "add_squares": (_P, _S, _P, _I, _S, _P),
    "turn_floats": (_P, _S, _P, _I, _S, _P, _S),
    "turn_codes": (_P, _S, _P, _I, _S, _P, _S),
}  # fmt: skip


@functools.cache
def library() -> ctypes.CDLL | None:
    """The build for this processor; None where there is none, or where MOEPRESS_NATIVE is 0."""
    return _open()[0]


def status() -> str:
    """What `library` found, in words."""
    return _open()[1]


@functools.cache
def _open() -> tuple[ctypes.CDLL | None, str]:
    if os.environ.get("MOEPRESS_NATIVE") == "0":
        return None, "not used, since MOEPRESS_NATIVE is 0"
    found = "not built: no compiler when moepress was installed"
    for build in _BUILDS.get(torch.backends.cpu.get_cpu_capability(), ("base",)):
        for file in sorted(Path(__file__).parent.glob(f"_loops_{build}.native")):
            try:
                opened = ctypes.CDLL(str(file))
                version = opened.moepress_version()
            except (OSError, AttributeError) as error:
                found = f"{file.name} does not load: {error}"
                continue
            if version != VERSION:
                found = f"{file.name} is of another version ({version}, not {VERSION}): install moepress again"
                continue
            for name, types in _SIGNATURES.items():
                function = getattr(opened, f"moepress_{name}")
                function.argtypes, function.restype = types, _I if name == "factor_leaf" else None
            return opened, build
    return None, found


def _call(name: str, *arguments: object) -> int | None:
    opened = library()
    assert opened is not None, "no native loops: ask `library` first"
    return getattr(opened, f"moepress_{name}")(*arguments)  # type: ignore[no-any-return]


def _rows(tensor: Tensor | None) -> tuple[int | None, int]:
    """Where a matrix lies, and the distance of its rows; a vector's is 0."""
    if tensor is None:
        return None, 0
    assert tensor.stride(-1) == 1 or tensor.shape[-1] <= 1, "rows must be contiguous"
    return tensor.data_ptr(), tensor.stride(0) if tensor.ndim > 1 else 0


def _column(tensor_O1: Tensor | None) -> tuple[int | None, int]:
    """Where a column of a matrix lies, and the distance of its numbers."""
    return (None, 0) if tensor_O1 is None else (tensor_O1.data_ptr(), tensor_O1.stride(0))


def _grid(grid: Grid) -> tuple[float, float, int | None, int]:
    if grid.integers:
        return grid.low, grid.high, None, 0
    return grid.low, grid.high, grid.table().data_ptr(), len(grid.levels)


def factor_leaf(matrix_BB: Tensor, inverse_BB: Tensor) -> bool:
    """Lower Cholesky factor of a symmetric matrix in place (B <= 64; what is above the diagonal stays).

    Args:
        matrix_BB: its lower triangle.
        inverse_BB: [64, 64], gets the factor's inverse, with zeros above the diagonal and beyond B.

    Returns:
        Whether it was positive.
    """
    return _call("factor_leaf", *_rows(matrix_BB), len(matrix_BB), inverse_BB.data_ptr()) == 0


def search_scales(
    weight_IO: Tensor,
    importance_I: Tensor,
    grid: Grid,
    plan: SearchPlan,
    group: int,
    dtype: torch.dtype,
    out_GO: Tensor,
) -> None:
    """`grid.search_scales` of one matrix that lies column by column, importance normalised already."""
    factors = plan.factors
    given = torch.tensor(factors, dtype=torch.float32)
    columns, rows = weight_IO.shape
    _call(
        "search_scales", *_grid(grid), *_rows(weight_IO), importance_I.data_ptr(), columns // group, group, rows,
        _KINDS[dtype], grid.either_sign, given.data_ptr(), len(factors), plan.step, plan.halvings, *_rows(out_GO),
    )  # fmt: skip


def round_block(
    feedback_BO: Tensor | None,
    weight_IO: Tensor,
    column_B: Tensor,
    unit_BB: Tensor,
    square_B: Tensor,
    group_B: Tensor,
    scales_GO: Tensor,
    grid: Grid,
    codes_BO: Tensor,
    residual_BO: Tensor,
    errors_BO: Tensor,
    loss_O: Tensor,
) -> None:
    """`columns.round_block` of one matrix; `column_B` and `group_B` are int32, `codes_BO` int8, `loss_O` fp64."""
    width, rows = residual_BO.shape
    _call(
        "round_block", *_grid(grid), *_rows(feedback_BO), *_rows(weight_IO), column_B.data_ptr(), *_rows(unit_BB),
        square_B.data_ptr(), group_B.data_ptr(), *_rows(scales_GO),
        width, rows, *_rows(codes_BO), *_rows(residual_BO), *_rows(errors_BO), loss_O.data_ptr(),
    )  # fmt: skip


def descend(
    hessian_II: Tensor,
    inverse_I: Tensor,
    diagonal_I: Tensor,
    ridge_I: Tensor,
    grid: Grid,
    sweeps: int,
    codes_OI: Tensor,
    scales_OG: Tensor,
    slope_OI: Tensor,
    loss_O: Tensor,
) -> None:
    """Sweeps over the codes of each row until none changes, at most so many: `descent.improve_codes`.

    Args:
        hessian_II: not damped.
        inverse_I: 1 / (diag H + ridge).
        diagonal_I: diag H + ridge.
        ridge_I: what is added to the diagonal.
        grid: what codes may stand for.
        sweeps: at most.
        codes_OI: int8, changed.
        scales_OG: of the codes.
        slope_OI: (W - Q)(H + ridge), kept true.
        loss_O: fp64, gets the exact change.
    """
    rows, columns = slope_OI.shape
    _call(
        "descend", *_grid(grid), *_rows(hessian_II), inverse_I.data_ptr(), diagonal_I.data_ptr(),
        ridge_I.data_ptr(), columns,
        columns // scales_OG.shape[1], rows, sweeps, *_rows(codes_OI), *_rows(scales_OG), *_rows(slope_OI),
        loss_O.data_ptr(),
    )  # fmt: skip


def descend_together(
    hessian_II: Tensor,
    inverse_I: Tensor,
    diagonal_I: Tensor,
    ridge_I: Tensor,
    grid: Grid,
    sweeps: int,
    rounds: int,
    share_RR: Tensor,
    codes_RI: Tensor,
    scales_RG: Tensor,
    slope_RI: Tensor,
    moved_RI: Tensor,
    changed_R: Tensor,
) -> None:
    """`descend` of rows one after the other, each given all others: `two_sided`.

    Args:
        hessian_II, inverse_I, diagonal_I, ridge_I, grid, sweeps, codes_RI, scales_RG: as of `descend`.
        rounds: over all rows, at most; ended when no code changes.
        share_RR: what a row (first) takes of what another moves.
        slope_RI: of each row given all others, kept true.
        moved_RI: gets by how much each row moved its own (W - Q)(H + ridge).
        changed_R: bool, gets whether it did.
    """
    rows, columns = slope_RI.shape
    _call(
        "descend_together", *_grid(grid), *_rows(hessian_II), inverse_I.data_ptr(), diagonal_I.data_ptr(),
        ridge_I.data_ptr(), columns, columns // scales_RG.shape[1], rows, sweeps, rounds, *_rows(share_RR),
        *_rows(codes_RI), *_rows(scales_RG), *_rows(slope_RI), *_rows(moved_RI), changed_R.data_ptr(),
    )  # fmt: skip


def anneal(
    hessian_II: Tensor,
    diagonal_I: Tensor,
    ridge_I: Tensor,
    grid: Grid,
    allowed_SI: Tensor,
    codes_OI: Tensor,
    scales_OG: Tensor,
    slope_OI: Tensor,
    loss_O: Tensor,
) -> None:
    """Sweeps in which codes may raise the loss by so much: `annealing.anneal`.

    Args:
        hessian_II, diagonal_I, ridge_I, grid, codes_OI, scales_OG, slope_OI, loss_O: as of `descend`.
        allowed_SI: for each sweep and column, as a share of a row's loss a column, which `loss_O` tells.
    """
    rows, columns = slope_OI.shape
    _call(
        "anneal", *_grid(grid), *_rows(hessian_II), diagonal_I.data_ptr(), ridge_I.data_ptr(), columns,
        columns // scales_OG.shape[1], rows, len(allowed_SI), *_rows(allowed_SI), *_rows(codes_OI), *_rows(scales_OG),
        *_rows(slope_OI), loss_O.data_ptr(),
    )  # fmt: skip


def refit_group(
    hessian_gg: Tensor,
    inverse_g: Tensor,
    diagonal_g: Tensor,
    ridge_g: Tensor,
    grid: Grid,
    sweeps: int,
    dtype: torch.dtype,
    response_Og: Tensor,
    codes_Og: Tensor,
    scale_O1: Tensor,
    slope_Og: Tensor,
    change_Og: Tensor,
    lattice: tuple[Tensor, float, float] | None,
    zero_O1: Tensor | None,
    loss_O: Tensor,
) -> None:
    """Least-squares scales of one group and then its codes: `descent.refit_group`.

    Args:
        hessian_gg, inverse_g, diagonal_g, ridge_g, grid, sweeps, loss_O: as of `descend`, of the group's columns.
        dtype: what scales are stored in.
        response_Og: (the codes' values less zero points) times the group's H, not damped.
        codes_Og: int8, changed.
        scale_O1: changed.
        slope_Og: kept true inside of the group.
        change_Og: gets how much the dequantized weights moved.
        lattice: steps [O, 1] of which scales are multiples, by integers from one number to another; or None.
        zero_O1: zero points of the group; or None.
    """
    rows, group = slope_Og.shape
    step_O1, least, most = lattice or (None, 0.0, 0.0)
    _call(
        "refit_group", *_grid(grid), *_rows(hessian_gg), inverse_g.data_ptr(), diagonal_g.data_ptr(),
        ridge_g.data_ptr(), group, rows, sweeps, _KINDS[dtype], grid.either_sign, *_rows(response_Og), *_rows(codes_Og),
        scale_O1.data_ptr(), scale_O1.stride(0), *_rows(slope_Og), *_rows(change_Og), *_column(step_O1),
        *_column(zero_O1), least, most, loss_O.data_ptr(),
    )  # fmt: skip


def nearest(
    weight_IO: Tensor, column_I: Tensor, group_I: Tensor, scales_GO: Tensor, grid: Grid, residual_IO: Tensor
) -> None:
    """What rounding to nearest leaves of these columns."""
    columns, rows = residual_IO.shape
    _call(
        "nearest", *_grid(grid), *_rows(weight_IO), column_I.data_ptr(), group_I.data_ptr(), *_rows(scales_GO), columns,
        rows, *_rows(residual_IO),
    )  # fmt: skip


def squares(
    weight_OI: Tensor,
    codes_OI: Tensor,
    scales_OG: Tensor,
    zeros_OG: Tensor | None,
    grid: Grid,
    ridge_I: Tensor,
    left_O: Tensor,
    whole_O: Tensor,
) -> None:
    """Of every row, fp64: the sum of ridge * (w - q)^2, and of ridge * w^2."""
    rows, columns = weight_OI.shape
    _call(
        "squares", *_grid(grid), *_rows(weight_OI), *_rows(codes_OI), *_rows(scales_OG), *_rows(zeros_OG),
        columns, columns // scales_OG.shape[1], rows, ridge_I.data_ptr(),
        left_O.data_ptr(), whole_O.data_ptr(),
    )  # fmt: skip


def add_squares(given_BO: Tensor, weight_B: Tensor, total_O: Tensor) -> None:
    """Add the weighed squares of a few columns to each row's total (fp64)."""
    _call("add_squares", *_rows(given_BO), weight_B.data_ptr(), *given_BO.shape, total_O.data_ptr())


def turn(given_IO: Tensor, index_I: Tensor, out_OI: Tensor) -> None:
    """out[o, index[i]] = given[i, o], for fp32 or int8; `index_I` is int32."""
    name = "turn_codes" if given_IO.dtype == torch.int8 else "turn_floats"
    _call(name, *_rows(given_IO), index_I.data_ptr(), *given_IO.shape, *_rows(out_OI))
