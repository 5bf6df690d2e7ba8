"""Routing keys of a config, held against what transformers' forward pass of the family really does with them.

A key that the forward pass reads must have a value that it can compute with. A key that it does not read, but other
runtimes or the authors' own code do, must say what the forward pass does anyway: otherwise they compute other models.
Source: `modeling_*.py` and `configuration_*.py` of transformers 5.23.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from moepress.errors import InvalidInputError, UnsupportedError

if TYPE_CHECKING:
    from moepress.models.families.family import Family

Config = Mapping[str, Any]

COUNT_NAMES = ("n_routed_experts", "num_experts", "num_local_experts")
"""Names of the number of routed experts: transformers takes one for the other, so all that are stated must agree."""


class Sort(StrEnum):
    """What the value of a routing key is."""

    COUNT = "an integer above 0"
    NUMBER = "an integer, 0 or more"
    FLAG = "true or false"
    SCALE = "a number above 0"
    LAYERS = "a list of layer numbers"
    CHOICE = "one of the methods"


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingKey:
    """One key that the forward pass reads.

    Attributes:
        name: in config.json.
        sort: what its value must be.
        default: what transformers takes where it is not stated.
        neutral: what moepress takes there; where the two differ the key must be stated.
        choices: of Sort.CHOICE, those that are computed.
        nullable: null is a value that the forward pass can take.
    """

    name: str
    sort: Sort
    default: Any
    neutral: Any
    choices: tuple[str, ...] = ()
    nullable: bool = False


# Keys of other runtimes and of authors' own code -> values under which they do what a family without them does.
_UNREAD: Mapping[str, tuple[Any, ...]] = {
    "n_group": (0, 1),
    "topk_group": (0, 1),
    "routed_scaling_factor": (1,),
    "moe_layer_freq": (1,),
    "decoder_sparse_step": (1,),
    "mlp_only_layers": ([],),
}


def require_routing(family: "Family", config: Config, counted_by: str) -> None:
    """Refuse routing keys that transformers' forward pass cannot honour, or that contradict each other.

    Raises:
        InvalidInputError: a value is none, missing where it would be guessed, or contradicts another one.
        UnsupportedError: a real variant of the routing that the forward pass does not compute.
    """
    for name in COUNT_NAMES:
        if name in config and config[name] != config[counted_by]:
            raise InvalidInputError(
                f"config.json states {_shown(config[counted_by])} experts by {counted_by} and {_shown(config[name])} "
                "by "
                f"{name}; mend the one that does not fit the tensors."
            )
    for key in family.keys:
        _require_value(family, config, key)
    for name, honoured in _implied(family).items():
        value = config.get(name)
        if value is not None and not any(_same(value, allowed) for allowed in honoured):
            raise UnsupportedError(
                f"config.json: {name} is {_shown(value)}, and the forward pass of {family.name} in transformers does "
                "not "
                f"read that key (it computes as with {_shown(honoured[-1])}): other runtimes would compute another "
                "model "
                "than moepress; it cannot be pressed here."
            )
    _require_groups(family, config)


def _require_value(family: "Family", config: Config, key: RoutingKey) -> None:
    if key.name not in config:
        if key.default != key.neutral:
            raise InvalidInputError(
                f"config.json does not state {key.name} (transformers takes {_shown(key.default)}, moepress "
                f"{_shown(key.neutral)}); write it down as the model was trained."
            )
        return
    value = config[key.name]
    if value is None and key.nullable:
        return
    if key.sort is Sort.CHOICE and isinstance(value, str) and value not in key.choices:
        raise UnsupportedError(
            f"config.json: {key.name} is {_shown(value)}, which the forward pass of {family.name} in transformers does "
            f"not compute (it knows {' and '.join(key.choices)}); such a model cannot be pressed here."
        )
    if not _fits(key, value):
        what = " or ".join(key.choices) if key.sort is Sort.CHOICE else key.sort.value
        raise InvalidInputError(
            f"config.json: {key.name} is {_shown(value)}, with which the forward pass of {family.name} in transformers "
            "cannot compute; it must be "
            f"{what}{' (1 for none)' if key.name in (family.groups_key, family.top_groups_key) else ''}."
        )


def _fits(key: RoutingKey, value: Any) -> bool:
    if key.sort is Sort.FLAG:
        return isinstance(value, bool)
    if key.sort is Sort.CHOICE:
        return value in key.choices
    if key.sort is Sort.LAYERS:
        return isinstance(value, list) and all(_whole(item, 0) for item in value)
    if key.sort is Sort.SCALE:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return number and 0 < value < 1e30 and math.isfinite(value)
    return _whole(value, 1 if key.sort is Sort.COUNT else 0)


def _whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value < 1 << 31


def _same(value: Any, allowed: Any) -> bool:
    return type(value) is not bool and value == allowed if type(allowed) is not bool else value is allowed


def _implied(family: "Family") -> dict[str, tuple[Any, ...]]:
    """Keys that the family's forward pass does not read -> values that say what it does."""
    rule, read = family.known_rule, {key.name for key in family.keys}
    methods = {"top2": ("noaux_tc",), None: ("greedy", "topk")}.get(rule.group_score, ())
    found = {
        **_UNREAD,
        "scoring_func": (rule.scoring,),
        "topk_method": methods,
        "norm_topk_prob": (rule.renormalise,),
    }
    return {name: honoured for name, honoured in found.items() if name not in read}


def _require_groups(family: "Family", config: Config) -> None:
    """Groups that are stated are those that the router goes by."""
    if family.groups_key is None or family.top_groups_key is None:
        return
    groups, top = config.get(family.groups_key) or 1, config.get(family.top_groups_key) or 1
    if top > groups:
        raise InvalidInputError(
            f"config.json: {family.top_groups_key} is {top}, more than the {groups} groups of {family.groups_key}; "
            "mend "
            "or restore it."
        )
    if family.known_rule.group_score != "max":
        return
    method = config.get("topk_method", "greedy")
    if method == "greedy" and groups > 1:
        raise InvalidInputError(
            f"config.json: topk_method is 'greedy', which has no groups, and {family.groups_key} is {groups}: "
            "transformers goes by the one, vLLM by the other; write group_limited_greedy, or 1 group."
        )
    lacking = [key for key in (family.groups_key, family.top_groups_key) if config.get(key) is None]
    if method != "greedy" and lacking:
        raise InvalidInputError(
            f"config.json: {lacking[0]} is {_shown(config.get(lacking[0]))}, and topk_method {method} needs the "
            "number; "
            "take it from the original folder."
        )


_LAYER_KEYS = ("first_k_dense_replace", "decoder_sparse_step", "mlp_only_layers")


def _layer_values(family: "Family", config: Config) -> dict[str, Any]:
    defaults = {key.name: key.default for key in family.keys if key.name in _LAYER_KEYS}
    return {name: config.get(name, default) for name, default in defaults.items()}


def is_moe_layer(family: "Family", config: Config, layer: int) -> bool:
    """Whether transformers builds that decoder layer with experts."""
    if family.moe_layers is not None:
        return layer in family.moe_layers
    values = _layer_values(family, config)
    return (
        layer >= values.get("first_k_dense_replace", 0)
        and (layer + 1) % values.get("decoder_sparse_step", 1) == 0
        and layer not in (values.get("mlp_only_layers") or [])
    )


def layer_keys(family: "Family", config: Config) -> str:
    """The keys that decide it, with their values, for messages."""
    values = _layer_values(family, config)
    return ", ".join(f"{name} = {_shown(value)}" for name, value in values.items()) or "all layers have experts"


def _shown(value: Any) -> str:
    return "null" if value is None else repr(value)[:80]
