"""Cholesky factors on the CPU at the rate of matrix products: halves of halves, down to leaves of 64 columns.

torch's own (LAPACK's) reaches a quarter to a half of that rate at the widths of experts, since its panels are solved by
triangles. Here a triangle is solved by products with the inverses of its leaves, which `native.factor_leaf` gives.
"""

import torch
from torch import Tensor

from moepress.compress.gptq import native

_LEAF = native.LEAF_COLUMNS
_TORCH = 512  # columns below which torch's own is as fast
_SQUARE = 256  # columns of a symmetric update whose upper half is not worth leaving out


def factor_in_place(matrix_II: Tensor, inverses: Tensor) -> bool:
    """The lower factor of a symmetric matrix, in place; what is above the diagonal is left undefined.

    Args:
        matrix_II: fp32, its lower triangle.
        inverses: [leaves, 64, 64] fp32, for the inverses of the factor's leaves; at least I / 64 of them.

    Returns:
        Whether the matrix was positive; if not, it is spoiled.
    """
    if len(matrix_II) < _TORCH:
        lower_II, info = torch.linalg.cholesky_ex(matrix_II)
        matrix_II.copy_(lower_II)
        return int(info) == 0
    return _factor(matrix_II, inverses)


def _factor(matrix_II: Tensor, inverses: Tensor) -> bool:
    size = len(matrix_II)
    if size <= _LEAF:
        return native.factor_leaf(matrix_II, inverses[0])
    half = _half(size)
    first, corner, second = matrix_II[:half, :half], matrix_II[half:, :half], matrix_II[half:, half:]
    behind = inverses[half // _LEAF :]
    if not _factor(first, inverses):
        return False
    _divide(corner, first, inverses)
    _subtract_square(second, corner)
    return _factor(second, behind)


def _half(size: int) -> int:
    """About half of the columns, whole leaves."""
    return -(-size // (2 * _LEAF)) * _LEAF


def _divide(rows_RI: Tensor, lower_II: Tensor, inverses: Tensor) -> None:
    """rows := rows L^-T, in place."""
    size = len(lower_II)
    if size <= _LEAF:
        rows_RI.copy_(rows_RI @ inverses[0, :size, :size].T)
        return
    half = _half(size)
    left, right = rows_RI[:, :half], rows_RI[:, half:]
    _divide(left, lower_II[:half, :half], inverses)
    right.addmm_(left, lower_II[half:, :half].T, alpha=-1)
    _divide(right, lower_II[half:, half:], inverses[half // _LEAF :])


def _subtract_square(matrix_RR: Tensor, rows_RI: Tensor) -> None:
    """matrix -= rows rows^T, the lower half of it."""
    size = len(matrix_RR)
    if size <= _SQUARE:
        matrix_RR.addmm_(rows_RI, rows_RI.T, alpha=-1)
        return
    half = size // 2
    _subtract_square(matrix_RR[:half, :half], rows_RI[:half])
    matrix_RR[half:, :half].addmm_(rows_RI[half:], rows_RI[:half].T, alpha=-1)
    _subtract_square(matrix_RR[half:, half:], rows_RI[half:])
