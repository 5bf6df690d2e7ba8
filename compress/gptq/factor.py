"""The order of columns, and the Cholesky factor of a damped inverse Hessian."""

import torch

_INVERTED_AT_ONCE = 512  # columns of a triangle that one library call inverts
DAMP_ATTEMPTS = 5
"""The first try, and up to 4 more with ten times the damping each."""


def column_order(diagonal_EI: torch.Tensor, *, act_order: bool) -> torch.Tensor:
    """Column to solve at each position, [E, I] int64; equal diagonals keep their own order."""
    if act_order:
        return diagonal_EI.argsort(dim=1, descending=True, stable=True)
    return torch.arange(diagonal_EI.shape[1], device=diagonal_EI.device).expand_as(diagonal_EI)


def inverse_factor(
    hessian_EII: torch.Tensor, diagonal_EI: torch.Tensor, order_EI: torch.Tensor, damp: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Upper factor U of each damped, reordered inverse Hessian, U^T U = inverse(H).

    Factoring H back to front takes one Cholesky and one triangular solve, and H itself is never inverted: with J the
    reversal, J H J = L L^T means inverse(H) = U^T U for U = J inverse(L) J, which is upper triangular.

    Returns:
        upper [E, I, I] fp32, the identity (no compensation) for experts without a usable Hessian; damping [E] fp64, 0
        for those.
    """
    experts, columns = diagonal_EI.shape
    alive_EI = diagonal_EI > 0
    mean_E = mean_alive(diagonal_EI)
    unit_E = torch.where(mean_E > 0, mean_E, 1.0).float()
    backward_EI = order_EI.flip(1)
    batch_E11 = torch.arange(experts, device=order_EI.device)[:, None, None]
    work_EII = hessian_EII[batch_E11, backward_EI[:, :, None], backward_EI[:, None, :]].div_(unit_E[:, None, None])
    work_diagonal_EI = work_EII.diagonal(dim1=1, dim2=2)
    work_diagonal_EI.copy_(torch.where(alive_EI, diagonal_EI / unit_E[:, None], 1.0).gather(1, backward_EI))
    work_diagonal_EI.add_(damp)
    lower_EII, info_E = torch.linalg.cholesky_ex(work_EII)
    damping_E = torch.full((experts,), damp, dtype=torch.float64, device=order_EI.device)
    failed_E = _failed(lower_EII, info_E)
    for _ in range(DAMP_ATTEMPTS - 1):
        again_F = failed_E.nonzero().flatten()
        if not again_F.numel():
            break
        work_diagonal_EI[again_F] += 9 * damping_E[again_F, None].float()
        damping_E[again_F] *= 10
        lower_EII[again_F], info_F = torch.linalg.cholesky_ex(work_EII[again_F])
        failed_E[again_F] = _failed(lower_EII[again_F], info_F)
    del work_EII, work_diagonal_EI
    hopeless_E = failed_E | ~alive_EI.any(dim=1)
    identity_II = torch.eye(columns, device=order_EI.device)
    lower_EII[hopeless_E] = identity_II
    damping_E[hopeless_E] = 0
    del identity_II
    _invert_lower(lower_EII)
    return lower_EII.flip(1, 2), damping_E


def _invert_lower(lower_EII: torch.Tensor) -> None:
    """Invert lower triangular matrices in place, with a third of the work of solving for the identity.

    With L = [[A, 0], [B, C]] the inverse is [[A', 0], [-C' B A', C']]; the halves are inverted the same way.
    """
    columns = lower_EII.shape[1]
    if columns <= _INVERTED_AT_ONCE:
        identity_II = torch.eye(columns, device=lower_EII.device).expand_as(lower_EII)
        lower_EII.copy_(torch.linalg.solve_triangular(lower_EII, identity_II, upper=False))
        return
    half = columns // 2
    first, corner, second = lower_EII[:, :half, :half], lower_EII[:, half:, :half], lower_EII[:, half:, half:]
    solved = torch.linalg.solve_triangular(second, corner, upper=False)
    solved = torch.linalg.solve_triangular(first, solved, upper=False, left=False)
    corner.copy_(solved.neg_())
    del solved
    _invert_lower(first)
    _invert_lower(second)


def mean_alive(diagonal_EI: torch.Tensor) -> torch.Tensor:
    """Mean of the positive diagonal elements, [E] fp64; 0 where there is none."""
    return diagonal_EI.double().sum(dim=1) / (diagonal_EI > 0).sum(dim=1).clamp(min=1)


def _failed(lower_EII: torch.Tensor, info_E: torch.Tensor) -> torch.Tensor:
    """Experts whose Cholesky factor is not usable, [E] bool."""
    return (info_E != 0) | ~lower_EII.isfinite().flatten(1).all(dim=1)
