"""What moepress needs to know of an architecture: one frozen row per family, and pure functions that read it."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import Any

from moepress.errors import InvalidInputError, UnsupportedError, UsageError
from moepress.models.families.routing_keys import COUNT_NAMES, RoutingKey, require_routing

Config = Mapping[str, Any]

MTP_KEYS = ("num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_layers")
"""Config keys of the number of multi-token-prediction layers."""


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
    TOWERS = "vision and other towers"


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterRule:
    """How a router turns logits into chosen experts and combine weights (FORMULAS: Routing).

    Attributes:
        scoring: `sigmoid` (DeepSeek-V3), `softmax`, or `sqrtsoftplus`, the root of log(1 + e^x).
        bias: a correction bias is added for the choice only, never to the weights.
        group_score: how a group is ranked: the sum of its two best choices, its best one, or no groups.
        renormalise_key: config key that says whether the chosen weights are divided by their sum; None: `renormalise`.
        renormalise: used when there is no key.
        scale_key: config key of the factor on the weights; None: `scale`.
        scale: used when there is no key.
    """

    scoring: str
    bias: bool = False
    group_score: str | None = None
    renormalise_key: str | None = None
    renormalise: bool = False
    scale_key: str | None = None
    scale: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Family:
    """One architecture: names on disk, the config keys that matter, and the router's rule.

    A row of `families.table` is written by hand; all others come from `families.derive`, which asks transformers. Names
    are those of the checkpoint on disk with `{layer}` and `{expert}`; `module_name` leads from a name on disk to the
    module's name in transformers 5. A parametrised test holds every family against transformers' own model.

    Attributes:
        name: `model_type` of config.json.
        architecture: the class in `architectures`.
        experts_keys: config keys that may hold the number of routed experts.
        rule: how the router chooses; None where it was not found out (`derive`): what needs it is then refused.
        expert_width_key: config key of F; None: `expert_width`.
        gate, up, down: weight names of one expert, shapes [F, D], [F, D], [D, F]; `gate` is empty where there is none.
        router: names of the tensors with an axis of experts; the first one is the router's weight [E, D].
        router_axes: which axis that is, in the order of `router`; 0 where not given.
        router_extra: rows of the router behind those of the experts, such as one for "no expert"; they stay.
        tables: names of tensors that hold expert numbers.
        fused_gate_up, fused_down: names of the experts of a layer in two tensors, [E, 2F, D] and [E, D, F]; where there
            is no gate the first is [E, F, D].
        fused_gate: where gates and ups are fused apart, the name of the gates; `fused_gate_up` is that of the ups.
        fused_transposed: the last two axes of both lie the other way round on disk.
        fused_interleaved: rows of the first are gate, up, gate, up, ..., not all of one and then all of the other.
        fused_biases: names of the biases of both, or empty.
        moe_module: module path of the MoE block inside a decoder layer in transformers.
        experts_module: that of the experts.
        groups_key, top_groups_key: config keys of the router's groups, or None.
        attention_groups: names of attention Linears in the order of the data, those with the same input together.
        mlp_groups: the same of shared experts and dense MLPs.
        never_quantize: Linear names that stay as they are, because a runtime trips over them.
        float32: suffixes of tensors that stay fp32 whatever the model's dtype.
        mtp: the family can carry multi-token-prediction layers behind the last decoder layer.
        mtp_at: the prefix of their names where it is not that of the layers, such as `mtp.layers.`.
        keys: the routing keys that its forward pass reads, and what their values may be.
        derived: made by `derive`, not a row.
        text_key: where the text model's config lies in config.json; None: it is config.json.
        layers_at: prefix of a decoder layer's names on disk, without its number; `module_layers_at` in transformers.
        embeddings, head, norm: the names on disk of the three tensors outside of the layers.
        moe_layers: which layers have experts; None: the routing keys say so.
        layers: how many decoder layers there are; only set by `derive`.
        expert_width: F; only set by `derive`.
        loads_single: transformers loads experts that are stored one by one, as quantized ones are.
        additive: experts' outputs are added to what the rest of a layer gives, and change nothing else in it.
        residual: the residual stream before the experts is known; else what they get stands for it.
        defaults: numbers that transformers takes where config.json does not state them.
        linears_outside: transformers' names of Linears outside of the decoder layers, such as those of towers.
        templates: of a derived family, (names on disk with `#` for numbers, the same in transformers, `Part`).
        correction: name of the tensor that is added to the router's scores for the choice; empty: the first of `router`
            that ends with `bias`, where the rule has one.
        converted: of `templates`, those that transformers makes its tensors of by more than another name.
    """

    name: str
    architecture: str
    experts_keys: tuple[str, ...]
    rule: RouterRule | None
    expert_width_key: str | None
    gate: str = "model.layers.{layer}.mlp.experts.{expert}.gate_proj.weight"
    up: str = "model.layers.{layer}.mlp.experts.{expert}.up_proj.weight"
    down: str = "model.layers.{layer}.mlp.experts.{expert}.down_proj.weight"
    router: tuple[str, ...] = ("model.layers.{layer}.mlp.gate.weight",)
    router_axes: tuple[int, ...] = ()
    router_extra: int = 0
    tables: tuple[str, ...] = ()
    fused_gate_up: str = "model.layers.{layer}.mlp.experts.gate_up_proj"
    fused_down: str = "model.layers.{layer}.mlp.experts.down_proj"
    fused_gate: str = ""
    fused_transposed: bool = False
    fused_interleaved: bool = False
    fused_biases: tuple[str, ...] = ()
    moe_module: str = "mlp"
    experts_module: str = "mlp.experts"
    renames: tuple[tuple[str, str], ...] = ()
    top_k_key: str = "num_experts_per_tok"
    groups_key: str | None = None
    top_groups_key: str | None = None
    attention_groups: tuple[tuple[str, ...], ...] = (("q_proj", "k_proj", "v_proj"), ("o_proj",))
    mlp_groups: tuple[tuple[str, ...], ...] = (("gate_proj", "up_proj"), ("down_proj",))
    never_quantize: tuple[str, ...] = ()
    float32: tuple[str, ...] = ()
    mtp: bool = False
    mtp_at: str = ""
    keys: tuple[RoutingKey, ...] = ()
    derived: bool = False
    text_key: str | None = None
    layers_at: str = "model.layers."
    module_layers_at: str = "model.layers."
    embeddings: str = "model.embed_tokens.weight"
    head: str = "lm_head.weight"
    norm: str = "model.norm.weight"
    moe_layers: tuple[int, ...] | None = None
    layers: int = 0
    expert_width: int = 0
    loads_single: bool = True
    additive: bool = True
    residual: bool = True
    defaults: tuple[tuple[str, int], ...] = ()
    linears_outside: tuple[str, ...] = ()
    templates: tuple[tuple[str, str, str], ...] = ()
    converted: tuple[str, ...] = ()
    correction: str = ""

    @property
    def known_rule(self) -> RouterRule:
        """How the router chooses, of a family that has it: rows do."""
        if self.rule is None:
            raise UnsupportedError(
                f"How the router of {self.name} models chooses was not found out; what needs that can not be done."
            )
        return self.rule

    def text(self, config: Config) -> Config:
        """The part of config.json that speaks of the text model."""
        return config[self.text_key] if self.text_key else config

    def layer_of(self, disk_name: str) -> int | None:
        """The decoder layer that a tensor belongs to, or None; layers of `mtp_at` count on behind the last.

        What lies beside those, such as `mtp.fc`, belongs to the first of them.
        """
        found = self._layer_pattern.match(disk_name)
        if found is None:
            return self.layers if self.mtp_at and disk_name.startswith(self.mtp_root) else None
        return int(found[1]) if found[1] is not None else self.layers + int(found[2])

    @property
    def mtp_root(self) -> str:
        """The prefix of all tensors of multi-token prediction where they have one of their own, such as `mtp.`."""
        return self.mtp_at.removesuffix("layers.")

    def by_layer(self, name: str) -> tuple[int, str]:
        """A key to sort tensors' or modules' names by: layers in order, then what lies outside of them."""
        layer = self.layer_of(f"{name}.")
        return (1 << 30 if layer is None else layer), name

    def module_name(self, disk_name: str) -> str:
        """The name in transformers' module tree of a tensor on disk; of an expert's own tensor the name on disk."""
        if self.templates:
            template, numbers = numbered(disk_name)
            if disk_name in self._modules:
                return self._modules[disk_name][0]
            found = self._modules.get(template)
            return disk_name if found is None else filled(found[0], numbers)
        for old, new in self.renames:
            disk_name = disk_name.replace(old, new)
        return disk_name

    def inner_name(self, disk_name: str, layer: int) -> str:
        """A tensor's name inside of transformers' decoder layer."""
        return self.module_name(disk_name).removeprefix(f"{self.module_layers_at}{layer}.")

    def excluded(self, weights: Iterable[str]) -> set[str]:
        """Modules whose weights stay plain, for the lists of quantization configs.

        By their names on disk, with which some runtimes compare, and by transformers'; of towers all that are Linears.
        """
        names = {name for weight in weights for name in (weight, self.module_name(weight))}
        outside = {name for name in self.linears_outside if not name.endswith("lm_head")}
        return {name.removesuffix(".weight") for name in names} | outside

    def part_of(self, disk_name: str) -> Part | None:
        """What `derive` found a tensor to be; None for names that it has not seen, and in rows."""
        found = self._modules.get(numbered(disk_name)[0]) if self.templates else None
        return None if found is None else found[1]

    def at(self, pattern: str, layer: int, **more: int) -> str:
        """A pattern's name in a layer; one of a layer behind the last has the prefix of those."""
        if self.mtp_at and layer >= self.layers:
            pattern, layer = self.mtp_at + pattern.removeprefix(self.layers_at), layer - self.layers
        return pattern.format(layer=layer, **more)

    def expert_names(self, layer: int, expert: int) -> tuple[str, ...]:
        """Disk names of one expert's gate (where there is one), up and down weights."""
        return tuple(self.at(p, layer, expert=expert) for p in (self.gate, self.up, self.down) if p)

    def router_names(self, layer: int) -> tuple[str, ...]:
        """Disk names of the tensors of a layer's router that have an expert axis."""
        return tuple(self.at(p, layer) for p in self.router)

    def fused_names(self, layer: int) -> tuple[str, ...]:
        """Disk names of a layer's fused experts: gate and up, down, biases of both; or up, down, gate."""
        names = (self.fused_gate_up, self.fused_down, *self.fused_biases, self.fused_gate)
        return tuple(self.at(p, layer) for p in names if p)

    def expert_of(self, disk_name: str) -> tuple[int, int, str] | None:
        """(layer, expert, rest of the name) when the tensor belongs to one routed expert, else None."""
        found = self._expert_pattern.match(disk_name)
        if found is None:
            return None
        layer = int(found[1]) if found[1] is not None else self.layers + int(found[2])
        return layer, int(found[3]), found[4]

    def renumber(self, layer: int, expert: int, rest: str) -> str:
        """The disk name of an expert's tensor: the inverse of `expert_of`."""
        return self.at(self.up.split("{expert}")[0], layer) + f"{expert}.{rest}"

    @cached_property
    def _layer_prefix(self) -> str:
        behind = f"|{re.escape(self.mtp_at)}(\\d+)" if self.mtp_at else "|(?!)()"
        return f"(?:{re.escape(self.layers_at)}(\\d+){behind})"

    @cached_property
    def _layer_pattern(self) -> re.Pattern[str]:
        return re.compile(rf"{self._layer_prefix}\.")

    @cached_property
    def _expert_pattern(self) -> re.Pattern[str]:
        infix = self.up.split("{layer}")[1].split("{expert}")[0]
        return re.compile(rf"{self._layer_prefix}{re.escape(infix)}(\d+)\.(.+)\Z")

    @cached_property
    def _modules(self) -> dict[str, tuple[str, Part]]:
        return {disk: (module, Part(part)) for disk, module, part in self.templates}


def numbered(name: str) -> tuple[str, tuple[str, ...]]:
    """A name with `#` for each part that is a number, and those numbers in order."""
    if not any(character.isdigit() for character in name):
        return name, ()
    pieces = name.split(".")
    numbers = tuple(piece for piece in pieces if piece.isdigit())
    return ".".join("#" if piece.isdigit() else piece for piece in pieces), numbers


def filled(template: str, numbers: Iterable[str]) -> str:
    """The inverse of `numbered`."""
    given = iter(numbers)
    return ".".join(next(given) if piece == "#" else piece for piece in template.split("."))


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


def strange_prefix(names: Iterable[str]) -> str | None:
    """What is to be said of names that all lie under another prefix than `model.`, or None."""
    for name in names:
        if name.startswith("model.layers."):
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
    layer = family.layer_of(disk_name)
    if family.derived:
        return Part.MTP if layer is not None and layer >= layers else _derived_part(family, disk_name)
    name = family.module_name(disk_name)
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


_PIECES = ("_blocks", "_scales", "_scale_inv", "_scale")


def _derived_part(family: Family, name: str) -> Part:
    """The part of a tensor, or of what stands in its place: codes, scales and the like."""
    if family.expert_of(name) is not None:
        return Part.ROUTED
    stems = (name, *(name.removesuffix(piece) for piece in _PIECES), f"{name.rpartition('.')[0]}.weight")
    return next((part for stem in stems if (part := family.part_of(stem)) is not None), Part.TOWERS)


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
        if key in family.text(config):
            return key
    raise InvalidInputError(
        f"config.json of this {family.name} model states no number of experts ({' or '.join(family.experts_keys)}); "
        "take config.json from the model's original folder."
    )


def with_experts(family: Family, config: Config, count: int) -> dict[str, Any]:
    """The config with another number of routed experts, under every name that it states the number by."""
    keys = family.experts_keys if family.derived else COUNT_NAMES
    return with_text(family, config, {key: count for key in keys if key in family.text(config)})


def with_text(family: Family, config: Config, changes: Mapping[str, Any]) -> dict[str, Any]:
    """The config with other values in the part that speaks of the text model; its nesting stays."""
    if family.text_key is None:
        return dict(config) | dict(changes)
    return dict(config) | {family.text_key: dict(config[family.text_key]) | dict(changes)}


def shape_of(family: Family, config: Config) -> Shape:
    """Read the numbers that moepress works with.

    Raises:
        InvalidInputError: a key is missing, or its value is none that the forward pass can compute with.
        UnsupportedError: the config asks for a routing that transformers' forward pass does not do.
    """
    counted_by = experts_key(family, config)
    config = family.text(config)
    if not family.derived:
        require_routing(family, config, counted_by)
    config = dict(family.defaults) | {key: value for key, value in config.items() if value is not None}
    groups = _integer(config, family.groups_key, default=1) if family.groups_key else 1
    top_groups = _integer(config, family.top_groups_key, default=1) if family.top_groups_key else 1
    return Shape(
        layers=family.layers or _integer(config, "num_hidden_layers"),
        hidden=_integer(config, "hidden_size"),
        experts=_integer(config, counted_by),
        top_k=_integer(config, family.top_k_key),
        expert_width=_integer(config, family.expert_width_key) if family.expert_width_key else family.expert_width,
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
