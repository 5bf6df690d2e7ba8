"""What a model weighs, part by part."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from moepress.hub.snapshot import origin_of
from moepress.models.families.family import Part, legal_counts, part_of
from moepress.models.families.hf_config import hf_config
from moepress.models.families.table import family_of, is_row
from moepress.models.storage.experts import mtp_layers
from moepress.runs.store.remote import url_of

if TYPE_CHECKING:
    from moepress.models.storage.checkpoint import Checkpoint

GIB = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Weight:
    """Parameters (block scales not counted) and stored bytes (with them) of one part of a model."""

    parameters: int
    bytes: int


def weigh(checkpoint: "Checkpoint") -> dict[Part, Weight]:
    """Parameters and bytes of every part that a checkpoint has, in the order of `Part`."""
    layers = checkpoint.shape.layers
    parameters = dict.fromkeys(Part, 0)
    sizes = dict.fromkeys(Part, 0)
    for name, shape in checkpoint.shapes.items():
        part = part_of(checkpoint.family, name, layers)
        sizes[part] += sum(checkpoint.stored[stored].bytes for stored in checkpoint.stored_names(name))
        parameters[part] += math.prod(shape)
    return {part: Weight(parameters=parameters[part], bytes=sizes[part]) for part in Part if sizes[part]}


def inventory(checkpoint: "Checkpoint") -> dict[str, Any]:
    """`weigh`, as plain JSON."""
    return {part.value: asdict(weight) for part, weight in weigh(checkpoint).items()}


def active_parameters(parts: Mapping[Part, Weight], experts: int, top_k: int) -> int:
    """Parameters that one token uses: everything but embeddings, and top-k of the routed experts."""
    rest = sum(w.parameters for p, w in parts.items() if p not in {Part.ROUTED, Part.EMBEDDINGS, Part.MTP})
    routed = parts[Part.ROUTED].parameters if Part.ROUTED in parts else 0
    return rest + routed * top_k // experts


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionShape:
    """Widths of a model's attention.

    Attributes:
        heads: query heads.
        key_width, value_width: of one head's query and key, and of its value.
        cached_values: numbers that a KV cache keeps per token and layer: keys and values of all key-value heads, or the
            latent vector and the rotated key where the attention is latent (MLA), as vLLM and SGLang keep it.
    """

    heads: int
    key_width: int
    value_width: int
    cached_values: int


def attention_shape(config: Mapping[str, Any]) -> AttentionShape:
    """Read the widths; what a config leaves out is what transformers takes, which is asked for that alone.

    Raises:
        InvalidInputError: transformers refuses the config.
    """
    if not is_row(config):
        return attention_of(hf_config(config).get_text_config())
    latent = any("kv_b_proj" in group for group in family_of(config).attention_groups)
    needed = _LATENT if latent else _GROUPED
    stated = all(isinstance(config.get(key), int) for key in needed)
    return attention_of(SimpleNamespace(**config) if stated else hf_config(config))


_GROUPED = ("num_attention_heads", "num_key_value_heads", "head_dim")
_LATENT = ("num_attention_heads", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")


def attention_of(parsed: Any) -> AttentionShape:
    """`attention_shape` of a config that transformers has parsed."""
    latent = _number(parsed, "kv_lora_rank")
    heads = _number(parsed, "num_attention_heads") or 1
    if latent:
        rotated = _number(parsed, "qk_rope_head_dim")
        return AttentionShape(
            heads=heads,
            key_width=_number(parsed, "qk_nope_head_dim") + rotated,
            value_width=_number(parsed, "v_head_dim"),
            cached_values=latent + rotated,
        )
    width = _number(parsed, "head_dim") or _number(parsed, "hidden_size") // heads
    cached = 2 * (_number(parsed, "num_key_value_heads") or heads) * width
    return AttentionShape(heads=heads, key_width=width, value_width=width, cached_values=cached)


def _number(parsed: Any, key: str) -> int:
    """A number of a config; the largest one where layers differ in it, 0 where there is none."""
    by_layer = getattr(parsed, "per_layer_config", None)
    if by_layer:
        found = [getattr(one, key, None) for one in by_layer]
        return max((int(value) for value in found if value), default=0)
    return int(getattr(parsed, key, None) or 0)


def cache_bytes(config: Mapping[str, Any], tokens: int) -> int:
    """Size of the KV cache of one sequence of that many tokens, in 16 bit; sliding windows are not taken off."""
    if is_row(config):
        layers = int(config["num_hidden_layers"])
    else:
        layers = int(hf_config(config).get_text_config().num_hidden_layers)
    return 2 * attention_shape(config).cached_values * layers * tokens


def describe(checkpoint: "Checkpoint") -> dict[str, Any]:
    """All that `inspect` tells, as plain JSON."""

    shape, parts = checkpoint.shape, weigh(checkpoint)
    dtypes: dict[str, int] = {}
    for entry in checkpoint.stored.values():
        dtypes[entry.dtype] = dtypes.get(entry.dtype, 0) + entry.bytes
    routed_layers = checkpoint.outline.moe_layers
    return {
        "model": str(origin_of(checkpoint.folder) or url_of(checkpoint.folder) or checkpoint.folder),
        "family": checkpoint.family.name,
        "architecture": checkpoint.family.architecture,
        "layers": shape.layers,
        "moe_layers": list(routed_layers),
        "experts": shape.experts,
        "top_k": shape.top_k,
        "groups": shape.groups,
        "top_groups": shape.top_groups,
        "hidden": shape.hidden,
        "expert_width": shape.expert_width,
        "vocabulary": shape.vocabulary,
        "context": shape.context,
        "shards": len(checkpoint.shards),
        "dtype_bytes": dict(sorted(dtypes.items())),
        "parts": {part.value: asdict(weight) for part, weight in parts.items()},
        "parameters": sum(w.parameters for w in parts.values()),
        "active_parameters": active_parameters(parts, shape.experts, shape.top_k),
        "bytes": checkpoint.total_bytes,
        "legal_expert_counts": list(legal_counts(shape)),
        "legal_expert_counts_degrouped": list(legal_counts(shape, degroup=True)) if shape.groups > 1 else None,
        "derived": checkpoint.family.derived,
        "stored_as": checkpoint.pressed_as or ("fp8" if checkpoint.block or checkpoint.packed else None),
        "never_quantized": ["router", "embeddings", "norms", *checkpoint.family.never_quantize],
        "mtp_layers": len(mtp_layers(checkpoint)),
        "layer_kinds": {
            "moe": len(routed_layers),
            "dense": checkpoint.outline.shape.layers - len(routed_layers),
        },
    }
