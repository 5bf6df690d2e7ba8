"""What moepress needs to know of an architecture: one frozen row per family, and pure functions that read it."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from moepress.errors import InvalidInputError, UsageError
from moepress.models.families.routing_keys import COUNT_NAMES, RoutingKey, require_routing

Config = Mapping[str, Any]


class Part(StrEnum):
    """The part of a model that a tensor belongs to."""

    ROUTED = "routed experts"
    SHARED = "shared experts"
    ROUTER = "router"
    ATTENTION = "attention"
    DENSE = "dense MLP"
    EMBEDDINGS = "embeddings"
    LM_HEAD = "lm_head"
    NORMS = "norms"
    MTP = "multi-token prediction"


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterRule:
    """How a router turns logits into chosen experts and combine weights (FORMULAS: Routing).

    Attributes:
        scoring: `sigmoid` (DeepSeek-V3) or `softmax`.
        bias: a correction bias is added for the choice only, never to the weights.
        group_score: how a group is ranked: the sum of its two best choices, its best one, or no groups.
        renormalise_key: config key that says whether the chosen weights are divided by their sum; None: `renormalise`.
        renormalise: used when there is no key.
        scale_key: config key of the factor on the weights.
    """

    scoring: str
    bias: bool = False
    group_score: str | None = None
    renormalise_key: str | None = None
    renormalise: bool = False
    scale_key: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One architecture: names on disk, the config keys that matter, and the router's rule.

    Names are those of the checkpoint on disk with `{layer}` and `{expert}`; `renames` leads from a name on disk to the
    module's name in transformers 5. The decoder layer must be `h + attention`, then `h + shared(x) + routed(x)` with
    `x = post_attention_layernorm(h)`; a parametrised test proves it for every row.

    Attributes:
        name: `model_type` of config.json.
        architecture: the class in `architectures`.
        experts_keys: config keys that may hold the number of routed experts.
        gate, up, down: weight names of one expert, shapes [F, D], [F, D], [D, F].
        router: names of the tensors whose first axis is the expert; the first one is the router's weight [E, D].
        moe_module: module path of the MoE block inside a decoder layer in transformers.
        expert_width_key: config key of F.
        groups_key, top_groups_key: config keys of the router's groups, or None.
        attention_groups: names of attention Linears in the order of the data, those with the same input together.
        never_quantize: Linear names that stay as they are, because a runtime trips over them.
        float32: suffixes of tensors that stay fp32 whatever the model's dtype.
        mtp: the family can carry multi-token-prediction layers behind the last decoder layer.
        keys: the routing keys that its forward pass reads, and what their values may be.
    """

    name: str
    architecture: str
    experts_keys: tuple[str, ...]
    rule: RouterRule
    expert_width_key: str
    gate: str = "model.layers.{layer}.mlp.experts.{expert}.gate_proj.weight"
    up: str = "model.layers.{layer}.mlp.experts.{expert}.up_proj.weight"
    down: str = "model.layers.{layer}.mlp.experts.{expert}.down_proj.weight"
    router: tuple[str, ...] = ("model.layers.{layer}.mlp.gate.weight",)
    fused_gate_up: str = "model.layers.{layer}.mlp.experts.gate_up_proj"
    fused_down: str = "model.layers.{layer}.mlp.experts.down_proj"
    moe_module: str = "mlp"
    renames: tuple[tuple[str, str], ...] = ()
    top_k_key: str = "num_experts_per_tok"
    groups_key: str | None = None
    top_groups_key: str | None = None
    attention_groups: tuple[tuple[str, ...], ...] = (("q_proj", "k_proj", "v_proj"), ("o_proj",))
    never_quantize: tuple[str, ...] = ()
    float32: tuple[str, ...] = ()
    mtp: bool = False
    keys: tuple[RoutingKey, ...] = ()

    def module_name(self, disk_name: str) -> str:
        """The name in transformers' module tree of a tensor on disk."""
        for old, new in self.renames:
            disk_name = disk_name.replace(old, new)
        return disk_name

    def expert_names(self, layer: int, expert: int) -> tuple[str, str, str]:
        """Disk names of one expert's gate, up and down weights."""
        return tuple(p.format(layer=layer, expert=expert) for p in (self.gate, self.up, self.down))  # type: ignore[return-value]

    def router_names(self, layer: int) -> tuple[str, ...]:
        """Disk names of the tensors of a layer's router that have an expert axis."""
        return tuple(p.format(layer=layer) for p in self.router)

    def expert_of(self, disk_name: str) -> tuple[int, int, str] | None:
        """(layer, expert, rest of the name) when the tensor belongs to one routed expert, else None."""
        prefix, infix = self.gate.split("{layer}")[0], self.gate.split("{layer}")[1].split("{expert}")[0]
        found = re.fullmatch(re.escape(prefix) + r"(\d+)" + re.escape(infix) + r"(\d+)\.(.+)", disk_name)
        return (int(found[1]), int(found[2]), found[3]) if found else None

    def renumber(self, layer: int, expert: int, rest: str) -> str:
        """The disk name of an expert's tensor: the inverse of `expert_of`."""
        return self.gate.split("{expert}")[0].format(layer=layer) + f"{expert}.{rest}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """The numbers of one model, read from its config and bounded by the tensors that are there."""

    layers: int
    hidden: int
    experts: int
    top_k: int
    expert_width: int
    groups: int
    top_groups: int
    vocabulary: int
    context: int


def layer_of(disk_name: str) -> int | None:
    """The decoder layer that a tensor belongs to, or None."""
    found = re.match(r"model\.layers\.(\d+)\.", disk_name)
    return int(found[1]) if found else None


def strange_prefix(names: Iterable[str]) -> str | None:
    """What is to be said of names that all lie under another prefix than `model.`, or None."""
    for name in names:
        if layer_of(name) is not None:
            return None
    found = next((m for name in names if (m := re.fullmatch(r"(.*?)layers\.\d+\.(.+)", name))), None)
    if found is None:
        return None
    if not found[1]:
        return (
            f"its tensors have no `model.` before their names ({found[0]}), as a model saved without its head has "
            "them; "
            "load it with AutoModelForCausalLM in transformers where lm_head is, and save it again"
        )
    return (
        f"its tensors have the prefix `{found[1]}` in place of `model.` ({found[0]}), as the language half of a larger "
        "model has them; save the causal language model alone, with its own config.json"
    )


def part_of(family: Family, disk_name: str, layers: int) -> Part:
    """Which part of the model a tensor belongs to; `layers` is `num_hidden_layers`."""
    name = family.module_name(disk_name)
    layer = layer_of(name)
    if layer is None:
        if name.startswith("lm_head"):
            return Part.LM_HEAD
        return Part.EMBEDDINGS if "embed_tokens" in name else Part.NORMS
    if layer >= layers:
        return Part.MTP
    for marker, part in _MARKERS:
        if marker in name:
            return part
    return Part.NORMS


_MARKERS = (
    (".mlp.experts.", Part.ROUTED),
    (".mlp.shared_expert_gate.", Part.ROUTER),
    (".mlp.shared_expert", Part.SHARED),
    (".mlp.gate.", Part.ROUTER),
    (".mlp.", Part.DENSE),
    ("layernorm", Part.NORMS),
    ("_norm.", Part.NORMS),
    (".self_attn.", Part.ATTENTION),
)


def experts_key(family: Family, config: Config) -> str:
    """The key under which this config states its number of routed experts.

    Raises:
        InvalidInputError: none of the family's keys is there.
    """
    for key in family.experts_keys:
        if key in config:
            return key
    raise InvalidInputError(
        f"config.json of this {family.name} model states no number of experts ({' or '.join(family.experts_keys)}); "
        "take config.json from the model's original folder."
    )


def with_experts(config: Config, count: int) -> dict[str, Any]:
    """The config with another number of routed experts, under every name that it states the number by."""
    return dict(config) | {key: count for key in COUNT_NAMES if key in config}


def shape_of(family: Family, config: Config) -> Shape:
    """Read the numbers that moepress works with.

    Raises:
        InvalidInputError: a key is missing, or its value is none that the forward pass can compute with.
        UnsupportedError: the config asks for a routing that transformers' forward pass does not do.
    """
    require_routing(family, config, experts_key(family, config))
    groups = _integer(config, family.groups_key, default=1) if family.groups_key else 1
    top_groups = _integer(config, family.top_groups_key, default=1) if family.top_groups_key else 1
    return Shape(
        layers=_integer(config, "num_hidden_layers"),
        hidden=_integer(config, "hidden_size"),
        experts=_integer(config, experts_key(family, config)),
        top_k=_integer(config, family.top_k_key),
        expert_width=_integer(config, family.expert_width_key),
        groups=groups,
        top_groups=top_groups,
        vocabulary=_integer(config, "vocab_size"),
        context=_integer(config, "max_position_embeddings", default=2048),
    )


def _integer(config: Config, key: str, default: int | None = None) -> int:
    value = config.get(key)
    if value is None and default is not None:
        return default
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 1 << 31:
        raise InvalidInputError(
            f"config.json: {key} is {value!r}, but a positive integer is needed; mend or restore it."
        )
    return value


def illegal_count(shape: Shape, count: int, *, degroup: bool = False) -> str | None:
    """Why a model of that shape cannot keep `count` experts per layer, or None when it can (FORMULAS: legal counts)."""
    groups, top_groups = (1, 1) if degroup else (shape.groups, shape.top_groups)
    if count > shape.experts:
        return f"the model has only {shape.experts}"
    if count < shape.top_k:
        return f"the router chooses {shape.top_k} experts for every token"
    if groups == 1:
        return None
    if count % groups:
        return f"the router's {groups} groups need a multiple of {groups}"
    if count // groups < 2:
        return f"each of the router's {groups} groups needs 2 experts"
    if top_groups * (count // groups) < shape.top_k:
        return f"the {top_groups} groups that a token may use would hold fewer than {shape.top_k} experts"
    return None


def legal_counts(shape: Shape, *, degroup: bool = False) -> tuple[int, ...]:
    """All expert counts that can be kept, ascending; always ends with the present count."""
    return tuple(n for n in range(1, shape.experts + 1) if illegal_count(shape, n, degroup=degroup) is None)


def require_legal(shape: Shape, count: int, *, degroup: bool = False) -> None:
    """Refuse an illegal expert count before any weight is read.

    Raises:
        UsageError: with the reason and the nearest legal counts.
    """
    reason = illegal_count(shape, count, degroup=degroup)
    if reason is None:
        return
    legal = sorted(legal_counts(shape, degroup=degroup), key=lambda n: (abs(n - count), n))[:4]
    hint = (
        f"the nearest legal counts are {', '.join(map(str, sorted(legal)))}" if legal else "no smaller count is legal"
    )
    if shape.groups > 1 and not degroup:
        hint += "; --groups degroup drops the groups and allows any count"
    raise UsageError(f"Cannot keep {count} of {shape.experts} experts: {reason}; {hint}.")
