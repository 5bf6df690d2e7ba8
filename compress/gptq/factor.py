"""The order of columns, and the factor of a damped Hessian that the solver works with.

With H in the order of solving backwards, H + ridge = U D U^T for a lower U with a unit diagonal: one Cholesky, its
columns divided by their pivots. Nothing is inverted.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

DAMP_ATTEMPTS = 5
"""The first try, and up to 4 more with ten times the damping each."""


def column_order(diagonal_EI: Tensor, *, act_order: bool) -> Tensor:
    """Column to solve at each position, [E, I] int64; equal diagonals keep their own order."""
    if act_order:
        return diagonal_EI.argsort(dim=1, descending=True, stable=True)
    return torch.arange(diagonal_EI.shape[1], device=diagonal_EI.device).expand_as(diagonal_EI)


def ridge_of(importance_EI: Tensor, damping_E: Tensor) -> Tensor:
    """What is added to diag H, [E, I] fp32: a share of its mean; a dead column stands for itself, with the mean."""
    mean_E1 = mean_alive(importance_EI).float()[:, None]
    share_E1 = damping_E.to(importance_EI.dtype)[:, None]
    return torch.where(importance_EI > 0, share_E1 * mean_E1, (1 + share_E1) * mean_E1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Factor:
    """The factors of a batch.

    Attributes:
        unit: U [E, I, I] fp32, in the order of solving backwards; the identity for experts without a usable Hessian.
        square: diag D [E, I].
        damping: [E] fp64, the share of mean(diag H) that was needed; 0 for those.
    """

    unit: Tensor
    square: Tensor
    damping: Tensor


def factor(hessian_EII: Tensor, importance_EI: Tensor, back_EI: Tensor, damp: float) -> Factor:
    """Factor a batch of Hessians.

    Args:
        hessian_EII: fp32.
        importance_EI: diag H, >= 0.
        back_EI: the column at each place, the one that is solved last first.
        damp: of the first try.
    """
    experts, columns = importance_EI.shape
    device = back_EI.device
    mean_E = mean_alive(importance_EI)
    unit_E = torch.where(mean_E > 0, mean_E, 1.0).float()
    batch_E11 = torch.arange(experts, device=device)[:, None, None]
    work_EII = hessian_EII[batch_E11, back_EI[:, :, None], back_EI[:, None, :]].div_(unit_E[:, None, None])
    damping_E = torch.full((experts,), damp, dtype=torch.float64, device=device)

    def damped(some_F: Tensor) -> Tensor:
        diagonal_FI = (importance_EI + ridge_of(importance_EI, damping_E))[some_F].gather(1, back_EI[some_F])
        work_EII.diagonal(dim1=1, dim2=2)[some_F] = diagonal_FI / unit_E[some_F, None]
        return work_EII[some_F]

    lower_EII, info_E = cholesky(damped(torch.arange(experts, device=device)))
    failed_E = _failed(lower_EII, info_E)
    for _ in range(DAMP_ATTEMPTS - 1):
        again_F = failed_E.nonzero().flatten()
        if not again_F.numel():
            break
        damping_E[again_F] *= 10
        lower_EII[again_F], info_F = cholesky(damped(again_F))
        failed_E[again_F] = _failed(lower_EII[again_F], info_F)
    hopeless_E = failed_E | (mean_E <= 0)
    lower_EII = torch.where(hopeless_E[:, None, None], torch.eye(columns, device=device), lower_EII)
    pivot_EI = lower_EII.diagonal(dim1=1, dim2=2).clone()
    return Factor(
        unit=lower_EII.div_(pivot_EI[:, None, :]),
        square=pivot_EI.square().mul_(unit_E[:, None]),
        damping=torch.where(hopeless_E, 0.0, damping_E),
    )


def cholesky(matrix_FII: Tensor) -> tuple[Tensor, Tensor]:
    """Lower factors of a batch, and what of each is not positive (0: nothing), as of `torch.linalg.cholesky_ex`.

    GPUs factor small matrices fastest all at once and large ones one by one; where the border lies differs from card to
    card, so the first batch of about this many matrices of this width is factored both ways, and the faster stays.
    """
    count, columns, device = len(matrix_FII), matrix_FII.shape[-1], matrix_FII.device
    if device.type != "cuda" or count == 1:
        return at_once(matrix_FII)
    key = (device, columns, count.bit_length())
    if key not in _FASTER:
        _FASTER[key] = faster((at_once, one_by_one), matrix_FII)
    return _FASTER[key](matrix_FII)


_Cholesky = Callable[[Tensor], tuple[Tensor, Tensor]]
_FASTER: dict[tuple[torch.device, int, int], _Cholesky] = {}


def at_once(matrix_FII: Tensor) -> tuple[Tensor, Tensor]:
    """`cholesky` by one call of the library."""
    lower_FII, info_F = torch.linalg.cholesky_ex(matrix_FII)
    return lower_FII, info_F


def one_by_one(matrix_FII: Tensor) -> tuple[Tensor, Tensor]:
    """`cholesky` by a call for each."""
    lower_FII, found = torch.empty_like(matrix_FII), []
    for lower_II, matrix_II in zip(lower_FII, matrix_FII, strict=True):
        factored_II, info = torch.linalg.cholesky_ex(matrix_II)
        lower_II.copy_(factored_II)
        found.append(info)
    return lower_FII, torch.stack(found)


def faster(ways: Sequence[_Cholesky], matrix_FII: Tensor) -> _Cholesky:
    """Which of them takes least time here; each is run twice, since a first call loads libraries."""

    def seconds(way: _Cholesky) -> float:
        for _ in range(2):
            _wait(matrix_FII.device)
            start = time.perf_counter()
            way(matrix_FII)
            _wait(matrix_FII.device)
        return time.perf_counter() - start

    return min(ways, key=seconds)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def mean_alive(diagonal_EI: Tensor) -> Tensor:
    """Mean of the positive diagonal elements, [E] fp64; 0 where there is none."""
    return diagonal_EI.double().sum(dim=1) / (diagonal_EI > 0).sum(dim=1).clamp(min=1)


def _failed(lower_EII: Tensor, info_E: Tensor) -> Tensor:
    """Experts whose Cholesky factor is not usable, [E] bool."""
    return (info_E != 0) | ~lower_EII.isfinite().flatten(1).all(dim=1)
