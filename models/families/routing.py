"""Our own view of a router, held against the model's own one, family by family, in the tests.

Statistics never come from here: they are read from the model's router. What is here serves leave-one-out re-routing,
which needs the weights that a router *would* have given to another set of experts.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moepress.models.families.family import Family, Shape


@dataclass(frozen=True, slots=True, kw_only=True)
class Router:
    """The numbers of one model's routing rule (FORMULAS: Routing).

    Attributes:
        sigmoid: sigmoid scores instead of softmax.
        group_score: `top2`, `max` or None.
        groups, top_groups: number of groups, and how many of them a token may use.
        top_k: experts per token.
        renormalise: divide the chosen weights by their sum.
        scale: factor on the weights.
    """

    sigmoid: bool
    group_score: str | None
    groups: int
    top_groups: int
    top_k: int
    renormalise: bool
    scale: float


def router_of(family: Family, config: Mapping[str, Any], shape: Shape) -> Router:
    """Read a model's routing rule from its family and config; `shape` holds the numbers of that config."""
    rule = family.rule
    # DeepSeek-V2 chooses by groups only where its config says so; V3 has no other way.
    greedy = rule.group_score == "max" and config.get("topk_method", "greedy") == "greedy"
    renormalise = rule.renormalise if rule.renormalise_key is None else bool(config.get(rule.renormalise_key, False))
    return Router(
        sigmoid=rule.scoring == "sigmoid",
        group_score=None if greedy else rule.group_score,
        groups=shape.groups,
        top_groups=shape.top_groups,
        top_k=shape.top_k,
        renormalise=renormalise,
        scale=float(config.get(rule.scale_key, 1.0)) if rule.scale_key else 1.0,
    )


def scores(router: Router, logits_TE: Tensor) -> Tensor:
    """Scores in [0, 1], fp32 [T, E], before any bias."""
    logits = logits_TE.float()
    return logits.sigmoid() if router.sigmoid else logits.softmax(dim=-1)


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
