"""The numbers of one model's routing rule, from its family and its config; `families.routing` computes by them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moepress.errors import UnsupportedError
from moepress.models.families.family import Family, Shape


@dataclass(frozen=True, slots=True, kw_only=True)
class Router:
    """The numbers of one model's routing rule (FORMULAS: Routing).

    Attributes:
        scoring: `sigmoid`, `softmax` or `sqrtsoftplus`.
        group_score: `top2`, `max` or None.
        groups, top_groups: number of groups, and how many of them a token may use.
        top_k: experts per token.
        renormalise: divide the chosen weights by their sum.
        scale: factor on the weights.
    """

    scoring: str
    group_score: str | None
    groups: int
    top_groups: int
    top_k: int
    renormalise: bool
    scale: float


def router_of(family: Family, config: Mapping[str, Any], shape: Shape) -> Router:
    """Read a model's routing rule from its family and config; `shape` holds the numbers of that config."""
    rule = family.rule
    if rule is None:
        raise UnsupportedError(
            f"How the router of {family.name} models chooses was not found out, so what an expert's absence would "
            "change can not be computed; choose another criterion than loo."
        )
    config = family.text(config)
    # DeepSeek-V2 chooses by groups only where its config says so; V3 has no other way.
    greedy = not family.derived and rule.group_score == "max" and _greedy(config)
    renormalise = rule.renormalise if rule.renormalise_key is None else bool(config.get(rule.renormalise_key, False))
    return Router(
        scoring=rule.scoring,
        group_score=None if greedy else rule.group_score,
        groups=shape.groups,
        top_groups=shape.top_groups,
        top_k=shape.top_k,
        renormalise=renormalise,
        scale=float(config.get(rule.scale_key, 1.0)) if rule.scale_key else rule.scale,
    )


def _greedy(config: Mapping[str, Any]) -> bool:
    return bool(config.get("topk_method", "greedy") == "greedy")
