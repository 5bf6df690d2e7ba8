"""Refit of a down projection after pruning, the arithmetic: what an expert adds comes nearer to what is lacking.

Pure functions on tensors. T tokens that an expert gets, F its intermediate size, D hidden size.

With m_t the expert's intermediate, w_t its combine weight, and r_t what the routed experts' output still lacks of a
token (see `repair`), all other experts as they are, the step S that its down projection takes is a ridge fit

    min_S  sum_t | r_t - S h_t |^2  +  sum_f p_f |S_f|^2,      h_t = w_t m_t,      p_f = ridge * (N_ff + mean_g N_gg)

with N = sum_t h_t h_t^T [F, F] and S_f a column of S: columns are pulled towards none by how large their own
intermediate is, and those that are next to nothing by the mean. A bias behind the projection stays as it is.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

RIDGE = 0.3
"""Pull of a step towards none, in units of the intermediates' squares."""


@dataclass(slots=True, kw_only=True)
class DownEquations:
    """Normal equations of one expert's step, fp64; sums over tokens.

    Attributes:
        gram: N [F, F].
        moment: sum_t h_t r_t^T, [F, D].
    """

    gram: Tensor
    moment: Tensor

    def add(self, scaled_TF: Tensor, lacking_TD: Tensor) -> None:
        """Add tokens: h, and r, both fp32 and on one device."""
        self.gram += (scaled_TF.T @ scaled_TF).to(self.gram.device, torch.float64)
        self.moment += (scaled_TF.T @ lacking_TD).to(self.moment.device, torch.float64)


def no_down_equations(width: int, hidden: int, device: torch.device) -> DownEquations:
    """The equations of F, D before any token."""
    gram = torch.zeros(width, width, dtype=torch.float64, device=device)
    return DownEquations(gram=gram, moment=torch.zeros(width, hidden, dtype=torch.float64, device=device))


def solve_step(equations: DownEquations, ridge: float = RIDGE) -> Tensor | None:
    """The step S, fp32 [D, F]; None where every intermediate is zero.

    Args:
        equations: of one expert.
        ridge: pull towards none, positive.
    """
    diagonal = equations.gram.diagonal()
    mean = diagonal.mean()
    if not float(mean) > 0:
        return None
    factor = torch.linalg.cholesky(equations.gram + torch.diag(ridge * (diagonal + mean)))
    return torch.cholesky_solve(equations.moment, factor).T.float()
