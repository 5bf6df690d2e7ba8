"""What a graph can express, as data, and of a model the first thing that it can not, in one sentence.

A graph is built by a model's tensors and by what its modules compute, never by its name. What the names of tensors do
not tell is asked of the modules themselves, on a few numbers: a norm, an activation, what experts do between their
matrices. What neither tells (a factor on the residual, a layer without rotation) is the reason for the last question:
whether the tests hold graphs of that model type against transformers.

Nothing here imports onnx: `inspect` asks too.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

from torch import nn

from moepress.converters.onnx.modules import activation_of, is_latent, is_rms_norm, is_silu, rotary_of
from moepress.errors import UnsupportedError
from moepress.models.families.family import Family
from moepress.models.families.held import HELD_AGAINST_TRANSFORMERS
from moepress.models.families.skeleton import build_skeleton
from moepress.models.storage.checkpoint import Source
from moepress.models.storage.experts import router_disk_names

STATIC_ROPE = ("default", "linear", "yarn", "llama3")  # frequencies do not depend on the length of the text
_ROTATED, _AS_IS = 16, 8  # what GroupQueryAttention's head size must be a multiple of, when it rotates and always
_WINDOWS = ("full_attention", "sliding_attention")  # kinds of layers that GroupQueryAttention has
_SCORINGS = ("sigmoid", "softmax", "sqrtsoftplus")
_GROUP_SCORES = (None, "top2", "max")


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """A kind of module that a graph has nodes for, by the tensors in it.

    Attributes:
        always: names of tensors that it has.
        also: names that it may have.
    """

    always: frozenset[str]
    also: frozenset[str]

    def fits(self, names: frozenset[str]) -> bool:
        """Whether a module with these tensors is of this kind."""
        return self.always <= names <= self.always | self.also


def _kind(always: str, also: str) -> Kind:
    return Kind(always=frozenset(always.split()), also=frozenset(also.split()))


GROUPED = _kind(
    "q_proj.weight k_proj.weight v_proj.weight o_proj.weight",
    "q_proj.bias k_proj.bias v_proj.bias o_proj.bias q_norm.weight k_norm.weight sinks",
)
LATENT = _kind(
    "kv_a_proj_with_mqa.weight kv_a_layernorm.weight kv_b_proj.weight o_proj.weight",
    "q_proj.weight q_a_proj.weight q_a_proj.bias q_a_layernorm.weight q_b_proj.weight kv_a_proj_with_mqa.bias "
    "o_proj.bias",
)
_MLP = _kind("gate_proj.weight up_proj.weight down_proj.weight", "gate_proj.bias up_proj.bias down_proj.bias")
_LAYER = frozenset({"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"})
_BODY = frozenset({"embed_tokens", "layers", "norm", "rotary_emb"})
_SHARED = ("shared_experts", "shared_expert")
_NOT = "can not be exported to ONNX"


@dataclass(frozen=True, slots=True, kw_only=True)
class Lack:
    """A kind of layer that a graph has no nodes for.

    Attributes:
        marker: a regular expression that finds such a layer by the name of one of its tensors, inside of the layer.
        what: what it is.
        why: what is missing for it.
    """

    marker: str
    what: str
    why: str


_STATE = "the graph keeps keys and values between tokens, and has no inputs for the state of ONNX Runtime's {}"
_DELTA = "linear attention (a gated delta rule)"
LACKS = (
    Lack(
        marker=r"^(linear_attn|self_attn)\..*A_log$",
        what=_DELTA,
        why=_STATE.format("LinearAttention and CausalConvWithState"),
    ),
    Lack(
        marker=r"^self_attn\.slope_rate$",
        what="linear attention (with a decay)",
        why=_STATE.format("LinearAttention"),
    ),
    Lack(
        marker=r"A_log$",
        what="a state-space layer (Mamba)",
        why="ONNX Runtime's CPU provider has no operator of a selective scan",
    ),
    Lack(marker=r"^conv\.", what="a short convolution", why=_STATE.format("CausalConvWithState")),
    Lack(
        marker=r"\bindexer\.",
        what="attention that chooses tokens by an indexer",
        why="ONNX Runtime's CPU provider has no SparseAttentionIndexer",
    ),
)


def onnx_refusal(source: Source) -> str | None:
    """Why a folder can not be exported to ONNX, in one sentence, or None; reads no weights and needs no onnx.

    Widths of codes and the size of groups are another matter: `weights.block_size`.
    """
    try:
        require_expressible(source, build_skeleton(source.config))
    except UnsupportedError as error:
        return str(error)
    return None


def require_expressible(source: Source, model: Any) -> None:
    """Refuse a model with anything in it that a graph would not compute as transformers does.

    Args:
        source: the folder.
        model: transformers' model of its config on the meta device.

    Raises:
        UnsupportedError: the first such thing, and what is missing for it.
    """
    for why in _reasons(source, model):
        raise UnsupportedError(f"{why[0].upper()}{why[1:]}.")


def _reasons(source: Source, model: Any) -> Iterator[str]:
    """All that stands against a graph, what is asked first coming first."""
    family = source.family
    for layer, module in enumerate(model.get_submodule(family.module_layers_at.removesuffix("."))):
        yield from _lacks(layer, module)
    yield from _frame(family, model)
    layers = model.model.layers
    for layer, module in enumerate(layers):
        yield from _parts(layer, module)
    yield from _windows(model.config, len(layers))
    yield from _rotary(model)
    for layer, module in enumerate(layers):
        routed = layer in source.outline.moe_layers
        yield from _attention(model, layer, module.self_attn)
        yield from _norms(f"layer {layer}", module)
        yield from _experts(source, model, layer, module.mlp) if routed else _dense(model.config, layer, module.mlp)
    yield from _norms("the model", model.model)
    yield from _rule(family)
    yield from _names(source)
    if family.name not in HELD_AGAINST_TRANSFORMERS:
        yield (
            f"models of type {family.name} {_NOT}: their graphs have not been held against transformers, and what "
            "tensors do not show would be guessed; use compressed-tensors or gptq"
        )


def _frame(family: Family, model: Any) -> Iterator[str]:
    """Where the decoder lies, and what is around its layers."""
    if family.text_key is not None or family.module_layers_at != "model.layers.":
        yield (
            f"the decoder of {family.name} models is a part of a larger model, or does not lie in model.layers, and "
            f"{_NOT}: the graph is a decoder of tokens alone"
        )
        return
    around = {name for name, child in model.model.named_children() if name not in _BODY and _tensors(child)}
    around |= {name for name, child in model.named_children() if name not in ("model", "lm_head") and _tensors(child)}
    around |= {f"lm_head.{name}" for name in _tensors(model.lm_head) - {"weight"}}
    missing = sorted(name for name in _BODY if not hasattr(model.model, name))
    if around or missing:
        what = f"their {min(around)}" if around else f"a model without {missing[0]}"
        yield f"models of type {family.name} {_NOT}: the graph has no nodes for {what}"


def _tensors(module: nn.Module) -> frozenset[str]:
    """Names of the tensors in a module that have anything in them: a shared expert may have no width."""
    return frozenset(name for name, tensor in module.state_dict().items() if tensor.numel())


def _lacks(layer: int, module: nn.Module) -> Iterator[str]:
    """Kinds of layers that are known to be missing."""
    names = _tensors(module)
    for lack in LACKS:
        if any(re.search(lack.marker, name) for name in names):
            yield f"layer {layer} is {lack.what}, which {_NOT}: {lack.why}"


def _parts(layer: int, module: nn.Module) -> Iterator[str]:
    """What a decoder layer consists of."""
    names = _tensors(module)
    foreign = sorted(name for name in names if name.partition(".")[0] not in _LAYER)
    missing = sorted(_LAYER - {name.partition(".")[0] for name in names})
    if foreign or missing:
        what = f"with {foreign[0]}" if foreign else f"without {missing[0]}"
        yield f"layer {layer}, {what}, {_NOT}: the graph's layers are attention and an MLP, each behind a norm"


def _windows(config: Any, layers: int) -> Iterator[str]:
    for kind in (getattr(config, "layer_types", None) or ())[:layers]:
        if kind not in _WINDOWS:
            yield (
                f"layers of type {kind!r} {_NOT}: GroupQueryAttention looks back on all tokens or on a window of the "
                "last ones"
            )


def _rotary(model: Any) -> Iterator[str]:
    """One table of angles for all layers, that does not depend on the length of the text."""
    stated = getattr(model.config, "rope_parameters", None) or {}
    if any(isinstance(value, dict) for value in stated.values()):
        yield f"layers with rotary embeddings of their own {_NOT}: the graph has one table for all"
        return
    kind = stated.get("rope_type", "default")
    if kind not in STATIC_ROPE:
        yield (
            f"the rotary embedding of type {kind!r} changes with the length of the text and {_NOT}; supported are "
            f"{', '.join(STATIC_ROPE)}"
        )
    elif "mrope_section" in stated:
        yield f"rotary embeddings of several axes (mrope) {_NOT}: GroupQueryAttention has one axis"


def _attention(model: Any, layer: int, module: Any) -> Iterator[str]:
    names, kind = _tensors(module), LATENT if is_latent(module) else GROUPED
    if not kind.fits(names):
        odd = sorted((names - kind.always - kind.also) or (kind.always - names))
        word = "has" if names - kind.always - kind.also else "lacks"
        yield (
            f"the attention of layer {layer}, which {word} {odd[0]}, {_NOT}: ONNX Runtime's GroupQueryAttention is "
            "given queries, keys, values, norms of both and sinks"
        )
        return
    rotated = 2 * len(rotary_of(model).inv_freq) if layer == 0 else 0  # the same in all layers
    yield from _latent_sizes(module, rotated) if kind is LATENT else _grouped_sizes(model.config, module, rotated)
    yield from _norms(f"the attention of layer {layer}", module)


def _latent_sizes(module: Any, rotated: int) -> Iterator[str]:
    size = module.kv_lora_rank + module.qk_rope_head_dim
    yield from _multiple(size, _AS_IS, f"latent heads of {size} values (kv_lora_rank + qk_rope_head_dim)")
    if rotated not in (0, module.qk_rope_head_dim):
        yield f"{rotated} rotated values of {module.qk_rope_head_dim} in latent attention {_NOT}"


def _grouped_sizes(config: Any, module: Any, rotated: int) -> Iterator[str]:
    size, heads, shared = module.head_dim, config.num_attention_heads, config.num_key_value_heads
    yield from _multiple(size, _ROTATED, f"heads of {size} values")
    if rotated != size:
        yield from _multiple(rotated, _ROTATED, f"{rotated} rotated values of {size}")
    rows = [module.q_proj.out_features, module.k_proj.out_features, module.v_proj.out_features]
    if rows != [heads * size, shared * size, shared * size]:
        yield (
            f"queries, keys and values of {rows} rows {_NOT}: {heads} and {shared} heads of {size} values have others, "
            "so the attention does something else with them (such as a gate)"
        )


def _multiple(size: int, of: int, what: str) -> Iterator[str]:
    if size % of:
        yield (
            f"{what} {_NOT}: ONNX Runtime's GroupQueryAttention takes multiples of {of} there; "
            "run this model in another runtime"
        )


def _norms(where: str, module: nn.Module) -> Iterator[str]:
    """The norms right below a module are RMS norms with a factor."""
    for name, norm in module.named_children():
        if "norm" in name and not is_rms_norm(norm):
            yield f"the {name} of {where} {_NOT}: {type(norm).__name__} does not compute ONNX's RMSNormalization"


def _dense(config: Any, layer: int, module: Any) -> Iterator[str]:
    if not _MLP.fits(_tensors(module)):
        yield f"the MLP of layer {layer} {_NOT}: the graph's have gate, up and down projections"
    elif not is_silu(getattr(module, "act_fn", None)):
        yield _other_activation("MLPs", config)


def _other_activation(of: str, config: Any) -> str:
    return f"{of} with the activation {getattr(config, 'hidden_act', None)!r} have no ONNX kernel; use silu"


def _experts(source: Source, model: Any, layer: int, block: Any) -> Iterator[str]:
    family, names = source.family, _tensors(block)
    inner = family.experts_module.removeprefix(f"{family.moe_module}.")
    prefix = f"model.layers.{layer}.{family.moe_module}."
    routers = {family.module_name(name).removeprefix(prefix) for name in router_disk_names(source, layer)}
    rest = {name for name in names if not name.startswith(f"{inner}.")} - routers
    for shared in _SHARED:
        mine = frozenset(name.removeprefix(f"{shared}.") for name in rest if name.startswith(f"{shared}."))
        there = hasattr(block, shared)  # it may have no width, and then its gate counts for nothing
        rest -= {f"{shared}.{name}" for name in mine} | ({f"{shared}_gate.weight"} if there else set())
        if mine and not _MLP.fits(mine):
            yield f"the shared expert of layer {layer} {_NOT}: the graph's have gate, up and down projections"
        elif mine and not is_silu(getattr(getattr(block, shared), "act_fn", None)):
            yield _other_activation("shared experts", model.config)
    if rest or family.experts_module != "mlp.experts":
        odd = min(rest, default=family.experts_module)
        yield f"the experts of layer {layer} {_NOT}: the graph has no nodes for {odd} beside them"
    elif activation_of(getattr(block, inner), model.config) is None:
        yield _other_experts(layer, getattr(block, inner), model.config)


def _other_experts(layer: int, module: Any, config: Any) -> str:
    if getattr(module, "has_post_expert_norm", False):
        return f"the experts of layer {layer} {_NOT}: QMoE and MoE have no norm behind each expert"
    if not hasattr(module, "gate_up_proj"):
        return (
            f"the experts of layer {layer}, which have no gate, {_NOT}: ONNX Runtime's QMoE and MoE are exact for "
            "gated ones, and were not tried for others"
        )
    if is_silu(getattr(module, "act_fn", None)):
        return f"the experts of layer {layer} {_NOT}: what is between their matrices is not the swiglu of QMoE and MoE"
    return _other_activation("experts", config)


def _rule(family: Family) -> Iterator[str]:
    """Whether the graph's router can follow a rule; what it does not know of must be as if it were not there."""
    rule = family.rule
    if rule is None:
        yield (
            f"models of type {family.name} {_NOT}: how their router chooses was not found out, and a graph routes by "
            "itself; use compressed-tensors or gptq"
        )
        return
    odd = [
        field.name for field in fields(rule) if field.name not in _KNOWN and getattr(rule, field.name) != field.default
    ]
    if rule.scoring not in _SCORINGS or rule.group_score not in _GROUP_SCORES:
        odd.append(rule.scoring if rule.scoring not in _SCORINGS else str(rule.group_score))
    if odd or family.router_extra or family.tables:
        what = odd[0] if odd else "rows or tables beside the experts"
        yield f"the router of {family.name} models {_NOT}: the graph's router does not compute {what}"


_KNOWN = ("scoring", "bias", "group_score", "renormalise_key", "renormalise", "scale_key", "scale")


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterTensors:
    """Names on disk of a layer's router.

    Attributes:
        weight: [E, D].
        bias: added to the logits, [E], or None.
        correction: added to the scores for the choice alone, [E] or [1, E], or None.
    """

    weight: str
    bias: str | None
    correction: str | None


def router_tensors(source: Source, layer: int) -> RouterTensors:
    """What a layer's router consists of.

    Raises:
        UnsupportedError: a tensor that is none of these, or one that the family's rule does not speak of.
    """
    weight, *others = router_disk_names(source, layer)
    bias = next((name for name in others if name == f"{weight.removesuffix('weight')}bias"), None)
    corrections: Sequence[str] = [name for name in others if name != bias]
    family, rule = source.family, source.family.rule
    spoken = bool(rule and rule.bias) and family.correction in ("", *family.router[1:])
    if len(corrections) > 1 or (corrections and not spoken):
        raise UnsupportedError(
            f"The router's {corrections[-1]} {_NOT}: the rule of {source.family.name} models does not speak of it."
        )
    return RouterTensors(weight=weight, bias=bias, correction=corrections[0] if corrections else None)


def _names(source: Source) -> Iterator[str]:
    """Tensors are asked for by the names of transformers' modules; only routers and experts may have others."""
    family = source.family
    for layer in source.outline.moe_layers:
        router_tensors(source, layer)
    if not family.derived:
        return
    routers = {name for layer in source.outline.moe_layers for name in router_disk_names(source, layer)}
    for name in sorted(source.shapes):
        behind = (family.layer_of(name) or 0) >= source.outline.shape.layers
        if name in routers or behind or ".experts." in name or family.module_name(name) == name:
            continue
        yield f"the tensor {name} {_NOT}: the graph looks for {family.module_name(name)}"
        return
