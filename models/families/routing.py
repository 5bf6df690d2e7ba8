"""Our own view of a router, held against the model's own one, family by family, in the tests.

Statistics never come from here: they are read from the model's router. What is here serves leave-one-out re-routing,
which needs the weights that a router *would* have given to another set of experts.
"""

import torch
from torch import Tensor

from moepress.models.families.router import Router


def scores(router: Router, logits_TE: Tensor) -> Tensor:
    """Scores, 0 or more, fp32 [T, E], before any bias."""
    logits = logits_TE.float()
    if router.scoring == "sqrtsoftplus":
        return torch.nn.functional.softplus(logits).sqrt()
    return logits.sigmoid() if router.scoring == "sigmoid" else logits.softmax(dim=-1)


def choice_scores(router: Router, scores_TE: Tensor, bias_E: Tensor | None) -> Tensor:
    """What the top-k is taken of: biased scores, -inf outside the allowed groups; fp32 [T, E]."""
    choice = scores_TE if bias_E is None else scores_TE + bias_E
    if router.group_score is None or router.groups == 1:
        return choice
    grouped = choice.view(len(choice), router.groups, -1)
    best = 2 if router.group_score == "top2" else 1
    group_TG = grouped.topk(best, dim=-1).values.sum(dim=-1)
    allowed = torch.zeros_like(group_TG).scatter_(1, group_TG.topk(router.top_groups, dim=-1).indices, 1.0)
    return choice.masked_fill(allowed.repeat_interleave(grouped.shape[2], dim=1) == 0, float("-inf"))


def combine_weights(router: Router, scores_TE: Tensor, chosen_TK: Tensor) -> Tensor:
    """The weights that a chosen set of experts gets; fp32 [T, K]."""
    weights = scores_TE.gather(1, chosen_TK)
    if router.renormalise:
        weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
    return weights * router.scale


def route(router: Router, logits_TE: Tensor, bias_E: Tensor | None) -> tuple[Tensor, Tensor]:
    """Chosen experts int64 [T, K] (best first) and their weights fp32 [T, K]."""
    scored = scores(router, logits_TE)
    chosen = choice_scores(router, scored, bias_E).topk(router.top_k, dim=-1).indices
    return chosen, combine_weights(router, scored, chosen)
