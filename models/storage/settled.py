"""What a folder states and does not hold, or holds and does not state: settled when it is opened, with a note each.

Everything that moepress computes and writes goes by the settled config, so that outputs do not carry an error on.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from moepress.errors import InvalidInputError
from moepress.models.families.family import Family
from moepress.models.storage.foreign import PLAIN_DTYPES, stated_method
from moepress.models.storage.safetensors_file import Stored, read_bytes

CACHE_SCALES = (
    *(".k_scale", ".v_scale", ".q_scale", ".prob_scale", ".kv_scale", ".kv_cache_scaling_factor"),
    *("k_proj.output_scale", "v_proj.output_scale"),
)
"""Suffixes of the scales of an fp8 KV cache: a runtime may use them, the weights do not need them."""

_QUANTIZATION_KEYS = ("quantization_config", "compression_config", "quantization")
_DTYPE_KEYS = ("dtype", "torch_dtype")
_SPELLINGS = {
    "float64": ("float64", "double", "fp64"),
    "float32": ("float32", "float", "fp32"),
    "float16": ("float16", "half", "fp16"),
    "bfloat16": ("bfloat16", "bf16"),
}
_DTYPES = {spelling: name for name, spellings in _SPELLINGS.items() for spelling in spellings}
_STORED_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_AT_ONCE = 1 << 24  # bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Settled:
    """A folder as it is worked with.

    Attributes:
        config: config.json, mended.
        stored: its tensors without those that are dropped.
        notes: what was mended, for people.
    """

    config: dict[str, Any]
    stored: dict[str, Stored]
    notes: tuple[str, ...] = field(default=())


def settle(family: Family, config: Mapping[str, Any], stored: Mapping[str, Stored]) -> Settled:
    """Settle what config and tensors disagree about, where there is one right answer.

    Raises:
        InvalidInputError: the dtype in the config is none.
    """
    out, kept, notes = dict(config), dict(stored), list[str]()
    for step in (_cache_scales, _quantization, _architectures, _dtype, _tied_head):
        notes += step(family, out, kept)
    return Settled(config=out, stored=kept, notes=tuple(notes))


def _cache_scales(_family: Family, _config: dict[str, Any], stored: dict[str, Stored]) -> Iterator[str]:
    scales = [name for name in stored if name.endswith(CACHE_SCALES)]
    for name in scales:
        del stored[name]
    if scales:
        yield (
            f"{len(scales)} scales of an fp8 KV cache ({scales[0]}, ...) are dropped: they were measured on the "
            "original "
            "model; runtimes take 1 in their place, or measure anew."
        )


def leftover_quantization(config: Mapping[str, Any], stored: Mapping[str, Stored]) -> str | None:
    """The quantization that a config states and no tensor shows; None where there is none, or it is true."""
    method = stated_method(config)
    if method is None or any(entry.dtype not in PLAIN_DTYPES for entry in stored.values()):
        return None
    return method


def _quantization(_family: Family, config: dict[str, Any], stored: dict[str, Stored]) -> Iterator[str]:
    method = leftover_quantization(config, stored)
    for key in [key for key in _QUANTIZATION_KEYS if key in config and method is not None]:
        del config[key]
        yield (
            f"config.json states a quantization ({method}) and no tensor is quantized; its {key} is left over from "
            "another copy, and dropped."
        )


def architectures_missing(config: Mapping[str, Any]) -> bool:
    """Whether a config names no class of a model."""
    named = config.get("architectures")
    return not (isinstance(named, list) and named and all(isinstance(name, str) and name for name in named))


def _architectures(family: Family, config: dict[str, Any], _stored: dict[str, Stored]) -> Iterator[str]:
    if architectures_missing(config):
        config["architectures"] = [family.architecture]
        yield f"config.json names no architectures; outputs name {family.architecture}, which vLLM and SGLang ask for."


def _dtype(_family: Family, config: dict[str, Any], stored: dict[str, Stored]) -> Iterator[str]:
    for key in _DTYPE_KEYS:
        stated = config.get(key)
        if stated is None:
            continue
        plain = settled_dtype(key, stated, stored)
        if plain != stated:
            config[key] = plain
            yield f"config.json: {key} {stated!r} is read, and written, as {plain}."


def settled_dtype(key: str, stated: object, stored: Mapping[str, Stored]) -> str:
    """The plain name of a dtype in a config; `auto` is what most of the bytes are stored in.

    Raises:
        InvalidInputError: it is none that weights have.
    """
    name = stated.removeprefix("torch.") if isinstance(stated, str) else ""
    if name == "auto":
        sizes: dict[str, int] = {}
        for entry in stored.values():
            sizes[entry.dtype] = sizes.get(entry.dtype, 0) + entry.bytes
        return _STORED_DTYPES.get(max(sizes, key=lambda dtype: sizes[dtype], default=""), "bfloat16")
    if name not in _DTYPES:
        raise InvalidInputError(
            f"config.json: {key} is {str(stated)[:80]!r}, which is no dtype of weights; write bfloat16, float16 or "
            "float32."
        )
    return _DTYPES[name]


def _tied_head(family: Family, config: dict[str, Any], stored: dict[str, Stored]) -> Iterator[str]:
    """transformers ties a head that equals the embeddings, and uses one that differs, whatever the config says."""
    head, table = family.head, family.embeddings
    text = config.get(family.text_key) if family.text_key else None
    holders = [config, *([text] if isinstance(text, dict) else [])]
    if not any(holder.get("tie_word_embeddings") for holder in holders) or head not in stored or table not in stored:
        return
    if same_data(stored[head], stored[table]):
        del stored[head]
        yield f"{head} is a copy of the embeddings, to which config.json ties it; the copy is dropped."
    else:
        config["tie_word_embeddings"] = False
        if isinstance(text, dict) and family.text_key:
            config[family.text_key] = text | {"tie_word_embeddings": False}
        yield (
            f"config.json ties lm_head to the embeddings, and {head} differs from them: it is used, as transformers "
            "does, and outputs say tie_word_embeddings false, so that vLLM does too."
        )


def same_data(one: Stored, other: Stored) -> bool:
    """Whether two tensors hold the same bytes; read in pieces."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    return all(
        read_bytes(one, at, min(_AT_ONCE, one.bytes - at)) == read_bytes(other, at, min(_AT_ONCE, one.bytes - at))
        for at in range(0, one.bytes, _AT_ONCE)
    )
