"""What llama.cpp calls a family and what it wants to know of it: one row per architecture, and its metadata.

Keys are those of the GGUF specification; what a loader has compiled in (whether the chosen weights are renormalised,
say) is not a key, so a model that says otherwise is refused. Source: llama.cpp's conversion scripts and
`src/llama-model.cpp` (b11434 to b11549), read; rows marked so in docs/formats.md were run.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from moepress.errors import InvalidInputError, UnsupportedError
from moepress.models.families.family import Family, Shape
from moepress.models.storage.checkpoint import Source

Value = int | float | bool | str | list[int]
_GATING = {"softmax": 1, "sigmoid": 2}  # expert_gating_func
MOST_EXPERTS = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """How a family is written for llama.cpp.

    Attributes:
        name: `general.architecture`.
        keys: metadata keys, without the architecture's name, and the config's attributes that they are.
        renormalises: whether its code divides the chosen experts' weights by their sum; None: a key says so.
        routing_keys: it reads gating function, scale and groups from the file; else softmax without either is meant.
        scale: it multiplies the experts' sum by expert_weights_scale.
        groups: it routes by groups of experts.
        interleaved: rotary embeddings turn neighbouring rows, so that q and k are written in that order.
        latent: multi-head latent attention.
        whole_norms: norms of queries and keys run over all heads at once.
        windows: it knows sliding windows; others must have none.
        leading: the first layers may be dense, as many as a key says; in others all have experts.
        delta: layers of linear attention (a gated delta rule) among the others.
        tiled: heads of values of a delta rule lie tiled over those of keys, where transformers' lie grouped by them.
        sections: rotary embeddings of several axes.
        one_more: its norms multiply by what is stored, where transformers' multiply by one more.
        own_head: its loader wants lm_head though it is the embeddings.
        renames: in transformers' names, before they are looked up.
    """

    name: str
    keys: tuple[tuple[str, str], ...] = ()
    renormalises: bool | None
    routing_keys: bool = False
    scale: bool = False
    groups: bool = False
    interleaved: bool = False
    latent: bool = False
    windows: bool = False
    leading: bool = False
    delta: bool = False
    tiled: bool = False
    sections: bool = False
    one_more: bool = False
    own_head: bool = False
    renames: tuple[tuple[str, str], ...] = ()


_WIDTH = ("expert_feed_forward_length", "moe_intermediate_size")
_CORRECTION = ((".e_score_correction_bias", ".e_score_correction.bias"),)
_LATENT = Architecture(
    name="deepseek2",
    keys=(
        _WIDTH,
        ("attention.q_lora_rank", "q_lora_rank"),
        ("attention.kv_lora_rank", "kv_lora_rank"),
        ("expert_shared_count", "n_shared_experts"),
    ),
    renormalises=None,
    routing_keys=True,
    scale=True,
    groups=True,
    latent=True,
    leading=True,
    renames=_CORRECTION,
)

_DELTA_KEYS = (
    _WIDTH,
    ("expert_shared_feed_forward_length", "shared_expert_intermediate_size"),
    ("ssm.conv_kernel", "linear_conv_kernel_dim"),
    ("ssm.state_size", "linear_key_head_dim"),
    ("ssm.group_count", "linear_num_key_heads"),
    ("ssm.time_step_rank", "linear_num_value_heads"),
)
_TILED = Architecture(
    name="qwen35moe",
    keys=_DELTA_KEYS,
    renormalises=True,
    delta=True,
    tiled=True,
    sections=True,
    one_more=True,
    renames=((".language_model.", "."), (".dt_bias", ".dt_proj.bias")),
)

ARCHITECTURES = {
    "qwen3_moe": Architecture(name="qwen3moe", keys=(_WIDTH,), renormalises=True),
    "qwen2_moe": Architecture(
        name="qwen2moe",
        keys=(_WIDTH, ("expert_shared_feed_forward_length", "shared_expert_intermediate_size")),
        renormalises=False,
        own_head=True,
    ),
    "mixtral": Architecture(name="llama", renormalises=True, interleaved=True),
    "olmoe": Architecture(name="olmoe", renormalises=False, own_head=True),
    "deepseek_v2": _LATENT,
    "deepseek_v3": _LATENT,
    "kimi_k2": _LATENT,
    "glm4_moe_lite": _LATENT,
    "glm4_moe": Architecture(
        name="glm4moe",
        keys=(_WIDTH, ("expert_shared_count", "n_shared_experts")),
        renormalises=None,
        routing_keys=True,
        scale=True,
        leading=True,
        renames=_CORRECTION,
    ),
    "gpt_oss": Architecture(
        name="gpt-oss",
        keys=(("expert_feed_forward_length", "intermediate_size"), ("attention.sliding_window", "sliding_window")),
        renormalises=True,
        windows=True,
        renames=((".self_attn.sinks", ".self_attn.sinks.weight"),),
    ),
    "qwen3_next": Architecture(
        name="qwen3next",
        keys=_DELTA_KEYS,
        renormalises=True,
        delta=True,
        one_more=True,
        renames=((".dt_bias", ".dt_proj.bias"),),
    ),
    "qwen3_5_moe": _TILED,
    "qwen3_5_moe_text": _TILED,
    "minimax_m2": Architecture(
        name="minimax-m2",
        keys=(("expert_feed_forward_length", "intermediate_size"),),
        renormalises=True,
        routing_keys=True,
        renames=_CORRECTION,
    ),
}
"""By `model_type`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Described:
    """A model as far as metadata goes.

    Attributes:
        family: what it is.
        config: config.json.
        shape: the numbers in it.
        moe_layers: layers with experts, ascending; empty where that is not known.
    """

    family: Family
    config: Mapping[str, Any]
    shape: Shape
    moe_layers: tuple[int, ...] = ()


def described(source: Source) -> Described:
    """What a folder says of itself."""
    return Described(
        family=source.family,
        config=source.config,
        shape=source.outline.shape,
        moe_layers=source.outline.moe_layers,
    )


def architecture_of(model: Described) -> Architecture:
    """The row of a model's family.

    Raises:
        UnsupportedError: there is none.
    """
    found = ARCHITECTURES.get(model.family.name)
    if found is None:
        raise UnsupportedError(
            f"Models of type {model.family.name} can not be exported to GGUF: moepress has no row for them; it has "
            f"{', '.join(sorted(ARCHITECTURES))}."
        )
    return found


def gguf_refusal(model: Described) -> str | None:
    """Why a model can not become a GGUF file that llama.cpp computes as transformers does, or None.

    By what config.json states alone, without transformers, so that commands may ask that start without it.
    """
    stated = Stated(model.family.text(model.config))
    try:
        row = architecture_of(model)
        for part in (_rope, _experts):
            dict(part(model, row, stated))
        _require_plain(model, row, stated)
    except UnsupportedError as error:
        return str(error)
    except (TypeError, KeyError, ValueError, ArithmeticError):
        # config.json leaves a number to transformers' defaults, or states none that can be: an export asks
        return None
    return None


class Stated:
    """A config's keys as attributes, None where it does not state one; transformers' names of rotary embeddings."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._config = config

    def __getattr__(self, name: str) -> Any:
        if name == "rope_parameters" and name not in self._config:
            scaling = self._config.get("rope_scaling")
            scaling = scaling if isinstance(scaling, dict) else {}
            return {**scaling, "rope_type": scaling.get("rope_type", scaling.get("type", "default"))}
        return self._config.get(name)


def metadata(model: Described, row: Architecture) -> dict[str, Value]:
    """The architecture's keys and values, with its name before them.

    Raises:
        UnsupportedError: the loader has something compiled in that this model does not do.
        InvalidInputError: a number in config.json can not be one.
    """
    from moepress.models.families.hf_config import hf_config

    config = hf_config(model.config).get_text_config()
    found: dict[str, Value] = {}
    for part in (_sizes, _rope, _experts, *([_delta] if row.delta else [])):
        try:
            found |= dict(part(model, row, config))
        except (TypeError, ValueError, ArithmeticError) as error:
            raise InvalidInputError(f"config.json states a number that can not be ({error}); restore it.") from error
    for key, attribute in row.keys:
        value = getattr(config, attribute, None)
        if value is not None:
            found[key] = value
    _require_plain(model, row, config)
    return {f"{row.name}.{key}": value for key, value in found.items()}


def _sizes(model: Described, row: Architecture, config: Any) -> Iterator[tuple[str, Value]]:
    heads = int(config.num_attention_heads)
    yield "block_count", model.shape.layers
    yield "context_length", model.shape.context
    yield "embedding_length", model.shape.hidden
    if getattr(config, "intermediate_size", None) is not None:
        yield "feed_forward_length", int(config.intermediate_size)
    yield "attention.head_count", heads
    yield "attention.layer_norm_rms_epsilon", float(config.rms_norm_eps)
    yield "vocab_size", model.shape.vocabulary
    if row.latent:
        latent, turned = int(config.kv_lora_rank), int(config.qk_rope_head_dim)
        yield "attention.head_count_kv", 1
        yield "attention.key_length", latent + turned
        yield "attention.value_length", latent
        yield "attention.key_length_mla", int(config.qk_nope_head_dim) + turned
        yield "attention.value_length_mla", int(config.v_head_dim)
        return
    yield "attention.head_count_kv", int(getattr(config, "num_key_value_heads", None) or heads)
    yield "attention.key_length", head_size(config)
    yield "attention.value_length", head_size(config)


def _delta(model: Described, row: Architecture, config: Any) -> Iterator[tuple[str, Value]]:
    """Linear attention: which layers have full attention instead, and how wide its values are."""
    yield "ssm.inner_size", int(config.linear_value_head_dim) * int(config.linear_num_value_heads)
    kinds = list(config.layer_types)
    every = next((n for n, kind in enumerate(kinds, start=1) if kind == "full_attention"), 0)
    if not every or any((kind == "full_attention") != ((n + 1) % every == 0) for n, kind in enumerate(kinds)):
        raise UnsupportedError(f"Layers of full attention that are not every so-manieth {_not(model, row)}.")
    yield "full_attention_interval", every


def head_size(config: Any) -> int:
    """Values of an attention head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _rope(model: Described, row: Architecture, config: Any) -> Iterator[tuple[str, Value]]:
    stated: Mapping[str, Any] = getattr(config, "rope_parameters", None) or {}
    if any(isinstance(value, dict) for value in stated.values()):
        raise UnsupportedError(f"Layers with rotary embeddings of their own {_not(model, row)}.")
    kind = stated.get("rope_type", "default")
    yield "rope.freq_base", float(stated.get("rope_theta", 10000.0))
    if row.latent:
        yield "rope.dimension_count", int(config.qk_rope_head_dim)
    else:
        share = stated.get("partial_rotary_factor", getattr(config, "partial_rotary_factor", None))
        turned = getattr(config, "rotary_dim", None)
        yield "rope.dimension_count", int(turned or head_size(config) * (1.0 if share is None else share))
    if row.sections:
        own = [int(size) for size in stated.get("mrope_section") or (11, 11, 10)]
        if sum(own) > head_size(config):
            raise UnsupportedError(f"Rotary sections of {sum(own)} in heads of {head_size(config)} {_not(model, row)}.")
        yield "rope.dimension_sections", [*own, *([0] * (4 - len(own)))]
    if kind == "default":
        return
    if kind not in ("linear", "yarn"):
        raise UnsupportedError(f"Rotary embeddings of type {kind!r} {_not(model, row)}; linear and yarn can.")
    yield "rope.scaling.type", kind
    yield "rope.scaling.factor", float(stated["factor"])
    if row.latent and kind == "linear":
        raise UnsupportedError(f"Latent attention with linear rotary embeddings {_not(model, row)}.")
    if kind == "yarn":
        yield from _yarn(model, row, stated)


def _yarn(model: Described, row: Architecture, stated: Mapping[str, Any]) -> Iterator[tuple[str, Value]]:
    every = stated.get("mscale_all_dim")
    trained = stated.get("original_max_position_embeddings") or model.shape.context
    yield "rope.scaling.original_context_length", int(trained)
    for name, usual in (("beta_fast", 32.0), ("beta_slow", 1.0)):
        if float(stated.get(name) or usual) != usual:  # tried: llama.cpp takes its own, whatever the file says
            raise UnsupportedError(f"A yarn embedding with {name} {stated[name]} {_not(model, row)}.")
    if row.latent:
        if not every:  # llama.cpp scales scores all the same
            raise UnsupportedError(f"Latent attention with yarn and without mscale_all_dim {_not(model, row)}.")
        yield "rope.scaling.yarn_log_multiplier", 0.1 * float(every)
    if stated.get("attention_factor") is not None or (stated.get("mscale") or every) != every:
        raise UnsupportedError(f"A yarn embedding with an attention factor of its own {_not(model, row)}.")


def _experts(model: Described, row: Architecture, config: Any) -> Iterator[tuple[str, Value]]:
    shape, rule = model.shape, model.family.known_rule
    if shape.experts > MOST_EXPERTS:
        raise UnsupportedError(f"{shape.experts} experts {_not(model, row)}: it takes {MOST_EXPERTS} at most.")
    if model.moe_layers:
        yield from _dense_layers(model, row)
    yield "expert_count", shape.experts
    yield "expert_used_count", shape.top_k
    text = model.family.text(model.config)
    key = rule.renormalise_key
    renormalised = bool(text.get(key, getattr(config, key, False))) if key else rule.renormalise
    scale = float(getattr(config, rule.scale_key, None) or 1.0) if rule.scale_key else rule.scale
    if row.renormalises is not None and renormalised != row.renormalises:
        word = "always" if row.renormalises else "never"
        raise UnsupportedError(
            f"Routing with {key or 'norm_topk_prob'}={str(renormalised).lower()} {_not(model, row)}, whose "
            f"{row.name} {word} renormalises the chosen experts' weights."
        )
    if not row.routing_keys:
        if rule.scoring != "softmax" or scale != 1.0:
            raise UnsupportedError(f"A router that scores by {rule.scoring}, times {scale:g}, {_not(model, row)}.")
        return
    if rule.scoring not in _GATING:
        raise UnsupportedError(f"A router that scores by {rule.scoring} {_not(model, row)}.")
    yield "expert_gating_func", _GATING[rule.scoring]
    if row.renormalises is None:
        yield "expert_weights_norm", renormalised
    if row.scale:
        yield "expert_weights_scale", scale
    elif scale != 1.0:
        raise UnsupportedError(f"A factor of {scale:g} on the experts' sum {_not(model, row)}.")
    yield from _groups(model, row)


def _dense_layers(model: Described, row: Architecture) -> Iterator[tuple[str, Value]]:
    """Layers without experts: the first ones, or none."""
    first = model.moe_layers[0]
    if model.moe_layers != tuple(range(first, model.shape.layers)) or (first and not row.leading):
        where = "other layers than the first ones" if first == 0 or row.leading else f"the first {first} layers"
        raise UnsupportedError(f"A model whose {where} are dense {_not(model, row)}.")
    if row.leading:
        yield "leading_dense_block_count", first


def _groups(model: Described, row: Architecture) -> Iterator[tuple[str, Value]]:
    """Groups of experts, where they exclude any: a file that states as many used as there are stops the process."""
    shape = model.shape
    if shape.groups <= 1 or shape.top_groups >= shape.groups:
        return
    if not row.groups:
        raise UnsupportedError(f"{shape.groups} groups of experts {_not(model, row)}.")
    if model.family.known_rule.group_score != "top2":
        raise UnsupportedError(
            f"Groups of experts that are ranked by their best one {_not(model, row)}, which adds the best two; "
            "prune with --groups degroup, or take a model without groups."
        )
    reason = group_fault(shape.experts, shape.groups, shape.top_groups)
    if reason:
        raise UnsupportedError(f"{reason}; llama.cpp would stop the process.")
    yield "expert_group_count", shape.groups
    yield "expert_group_used_count", shape.top_groups


def group_fault(experts: int, groups: int, used: int) -> str | None:
    """Which of the loader's assertions these numbers would fail, or None."""
    if experts % groups:
        return f"{experts} experts do not divide into {groups} groups"
    if experts <= groups:
        return f"{groups} groups of one expert each are not taken"
    if used >= groups:
        return f"all {groups} groups are used, which is to be written as no groups"
    return None


def _require_plain(model: Described, row: Architecture, config: Any) -> None:
    """What the config may say that no key of the architecture can."""
    window = getattr(config, "sliding_window", None)
    in_use = getattr(config, "use_sliding_window", True) is not False
    if not row.windows and isinstance(window, int) and in_use and window < model.shape.context:
        raise UnsupportedError(f"A sliding window of {window} tokens {_not(model, row)}.")
    if getattr(config, "clip_qkv", None):
        raise UnsupportedError(f"Clipped queries, keys and values (clip_qkv) {_not(model, row)}.")
    if row.latent and getattr(config, "rope_interleave", True) is False:
        raise UnsupportedError(f"Latent attention without rope_interleave {_not(model, row)}.")
    if row.latent:
        _require_lora(model, config)
    act = getattr(config, "hidden_act", None) or "silu"
    if act not in ("silu", "swish"):
        raise UnsupportedError(f"The activation {act!r} {_not(model, row)}.")


def _require_lora(model: Described, config: Any) -> None:
    """llama.cpp knows by the number of layers whether queries of deepseek2 have a rank, not by the key."""
    shape, ranked = model.shape, getattr(config, "q_lora_rank", None) is not None
    lite = shape.layers in (26, 27) or (shape.layers == 48 and shape.vocabulary == 128_256)
    if lite == ranked:
        word = "ignores q_lora_rank" if lite else "wants a q_lora_rank"
        raise UnsupportedError(
            f"{shape.layers} layers {'with' if ranked else 'without'} a q_lora_rank can not be exported to GGUF: "
            f"llama.cpp's deepseek2 {word} in models of so many layers."
        )


def _not(model: Described, row: Architecture) -> str:
    return f"can not be exported to GGUF ({model.family.name} as llama.cpp's {row.name})"
