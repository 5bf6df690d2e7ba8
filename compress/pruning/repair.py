"""Repair after pruning, the arithmetic: a gain for every kept expert, and a router bias that evens the loads out.

A router's rows are refitted in `refit`, down projections in `refit_down`.

Pure functions on tensors. T tokens, K experts that a token gets, E experts that were kept, D hidden size.

The pruned layer's routed output of a token is sum_e w'_te f_te, over the experts that the pruned router chooses. Let
y_t be what that would have to be for the layer's output to be the original's: the original's own routed output, and
what the streams before it differ by. With a gain g_e for every expert, folded into its down projection, the best are

    min_g  sum_t | y_t - sum_e g_e w'_te f_te |^2  +  ridge * sum_e A_ee (g_e - 1)^2,     A = sum_t (w' f)(w' f)^T

The error without the ridge is then never above that of g = 1: the minimum of the whole is not, and the ridge's term is
zero at 1.
"""

from dataclasses import dataclass, field
from enum import StrEnum

import torch
from torch import Tensor

from moepress.models.families.router import Router
from moepress.models.families.routing import choice_scores

RIDGE = 0.01
"""Pull of the gains towards 1, in units of an expert's own squared output."""
BIAS_STEPS, BIAS_STEP = 30, 0.02


class Repair(StrEnum):
    """What may be repaired after pruning."""

    GAIN = "gain"
    BIAS = "bias"
    ROUTER = "router"
    DOWN = "down"


@dataclass(slots=True, kw_only=True)
class Equations:
    """Normal equations of one layer's gains, fp64; sums over tokens.

    Attributes:
        gram: A [E, E].
        moment: sum_t w'_te <f_te, y_t>, [E].
        squared: sum_t |y_t|^2.
    """

    gram: Tensor
    moment: Tensor
    squared: float = field(default=0.0)

    def add(self, chosen_TK: Tensor, weights_TK: Tensor, outputs_TKD: Tensor, target_TD: Tensor) -> None:
        """Add tokens: experts that the pruned router chose, its weights, their outputs, what these ought to be."""
        experts = len(self.moment)
        scaled = outputs_TKD.float() * weights_TK[:, :, None].float()
        products = torch.bmm(scaled, scaled.mT).double()
        pairs = chosen_TK[:, :, None] * experts + chosen_TK[:, None, :]
        self.gram.view(-1).index_add_(0, pairs.reshape(-1), products.reshape(-1))
        along = torch.bmm(scaled, target_TD.float()[:, :, None]).double()
        self.moment.index_add_(0, chosen_TK.reshape(-1), along.reshape(-1))
        self.squared += float(target_TD.double().square().sum())

    def error(self, gains_E: Tensor) -> float:
        """sum_t |y_t - sum_e g_e w'_te f_te|^2 as a share of sum_t |y_t|^2."""
        gains = gains_E.double()
        rest = self.squared - 2 * float(self.moment @ gains) + float(gains @ self.gram @ gains)
        return max(rest, 0.0) / self.squared if self.squared else 0.0


def no_equations(experts: int) -> Equations:
    """The equations before any token."""
    return Equations(
        gram=torch.zeros(experts, experts, dtype=torch.float64), moment=torch.zeros(experts, dtype=torch.float64)
    )


def solve_gains(equations: Equations, ridge: float = RIDGE) -> Tensor:
    """The gains, fp32 [E]; 1 for experts that no token chose.

    Args:
        equations: of one layer.
        ridge: pull towards 1, positive.
    """
    diagonal = equations.gram.diagonal()
    used = torch.nonzero(diagonal > 0).flatten()
    gains = torch.ones(len(diagonal), dtype=torch.float64)
    if len(used):
        pull = ridge * diagonal[used]
        gram = equations.gram[used][:, used] + torch.diag(pull)
        gains[used] = torch.linalg.solve(gram, equations.moment[used] + pull)
    return gains.float()


def loads(chosen_TK: Tensor, experts: int) -> Tensor:
    """Share of all choices that every expert gets, fp64 [E]."""
    return torch.bincount(chosen_TK.reshape(-1), minlength=experts).double() / max(chosen_TK.numel(), 1)


def balanced_bias(
    router: Router,
    scores_TE: Tensor,
    bias_E: Tensor,
    wanted_E: Tensor,
    *,
    steps: int = BIAS_STEPS,
    step: float = BIAS_STEP,
) -> Tensor:
    """The correction bias under which the kept experts' loads are nearest to those wanted, fp32 [E].

    A damped fixed point: a bias grows by the logarithm of how much too small its expert's load is; steps shrink to
    nothing, and the best bias that was seen is taken, the one given among them.

    Args:
        router: the pruned model's routing rule, with its groups.
        scores_TE: the kept experts' scores, before the bias.
        bias_E: the bias so far, fp32.
        wanted_E: shares of all choices, positive, sum 1.
        steps: how often the tokens are routed.
        step: the first step.
    """
    experts, bias = len(bias_E), bias_E.clone()
    wanted, floor = wanted_E.double(), 1.0 / max(scores_TE.shape[0] * router.top_k, 1)
    best, nearest = bias.clone(), float("inf")
    for count in range(steps):
        chosen = choice_scores(router, scores_TE, bias).topk(router.top_k, dim=-1).indices
        load = loads(chosen, experts)
        distance = float((load - wanted).abs().sum())
        if distance < nearest:
            best, nearest = bias.clone(), distance
        short = torch.log((wanted + floor) / (load + floor)).clamp(-2, 2)
        bias = bias + (step * (1 - count / steps) * short).float()
    return best
