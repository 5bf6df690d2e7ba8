"""Attention with a KV cache, in two kinds: grouped queries, and latent (MLA).

Both end in ONNX Runtime's GroupQueryAttention, which the CPU and CUDA providers and onnxruntime-genai share. Latent
attention keeps what it has compressed: its cache holds one head of [latent | rotated key] instead of all heads' keys
and values, queries are carried into the latent space by the key half of kv_b_proj, outputs out of it by the value half.
Per token and layer of DeepSeek-V3 that is 2 x 576 values instead of 128 x (192 + 128).

Source: DeepSeek-V2 (https://arxiv.org/abs/2405.04434), section 2.1 and appendix C (weight absorption).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from moepress.converters.onnx import modules
from moepress.converters.onnx.graph import CONTRIB
from moepress.converters.onnx.parts import Build, linear, reshape, rms_norm
from moepress.errors import InvalidInputError

_LAST_INT64 = (1 << 63) - 1
_CHUNK_BYTES = 16 << 20  # of angles in fp64


@dataclass(frozen=True, slots=True, kw_only=True)
class Cache:
    """Shape of one layer's cache, [B, heads, S, size], the same for keys and values."""

    heads: int
    size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """Values that all layers share.

    Attributes:
        batch_sequence: int64 [2], batch and sequence of the tokens given.
        seqlens: int32 [B], tokens so far less one.
        total: int32 scalar, tokens so far of the longest row.
        positions: int64 [B, S] of the tokens given.
        cos, sin: rotary tables [context, rotary size / 2].
    """

    batch_sequence: str
    seqlens: str
    total: str
    positions: str
    cos: str
    sin: str


def is_latent(build: Build, layer: int) -> bool:
    """Whether a layer's attention is latent (MLA)."""
    return modules.is_latent(build.model.model.layers[layer].self_attn)


def cache_of(build: Build, layer: int) -> Cache:
    """The cache's shape of a layer."""
    attention, config = build.model.model.layers[layer].self_attn, build.model.config
    if is_latent(build, layer):
        return Cache(heads=1, size=attention.kv_lora_rank + attention.qk_rope_head_dim)
    return Cache(heads=config.num_key_value_heads, size=attention.head_dim)


def context_of(config: Any) -> int:
    """Tokens that the rotary tables are made for: transformers' default where config.json states no number.

    Args:
        config: transformers' config object.

    Raises:
        InvalidInputError: neither states one.
    """
    context = config.max_position_embeddings
    if not isinstance(context, int) or context < 1:
        raise InvalidInputError(
            f"config.json: max_position_embeddings is {context!r}, and rotary tables need a number; mend the file."
        )
    return context


def shared_inputs(build: Build, file: str) -> Inputs:
    """Nodes that turn `input_ids` and `attention_mask` into what the layers need."""
    graph, scope = build.graph, "/model/inputs"
    mask = "attention_mask"
    tokens = graph.node("Shape", ["input_ids"], f"{scope}/tokens")
    counts = graph.node("ReduceSum", [mask, graph.integers(1)], f"{scope}/counts", keepdims=0)
    seqlens = graph.node("Sub", [counts, graph.integers(1)], f"{scope}/last")
    width = graph.node("Shape", [mask], f"{scope}/width", start=1, end=2)
    # Positions count the tokens that the mask lets through: rows of unequal length, padded on the right, share a batch.
    running = graph.node(
        "CumSum", [mask, graph.constant("/constants/axis_1", np.array(1, dtype=np.int64))], f"{scope}/running"
    )
    before = graph.node("Sub", [running, graph.integers(1)], f"{scope}/before")
    positive = graph.node("Max", [before, graph.integers(0)], f"{scope}/positive")
    length = graph.node("Slice", [tokens, graph.integers(1), graph.integers(2)], f"{scope}/length")
    start = graph.node("Neg", [length], f"{scope}/start")
    positions = graph.node(
        "Slice", [positive, start, graph.integers(_LAST_INT64), graph.integers(1)], f"{scope}/positions"
    )
    scalar = graph.node("Squeeze", [width], f"{scope}/total")
    cos, sin = _rotary_tables(build, file)
    return Inputs(
        batch_sequence=tokens,
        seqlens=build.cast(seqlens, 6, f"{scope}/seqlens_k"),
        total=build.cast(scalar, 6, f"{scope}/total_sequence_length"),
        positions=positions,
        cos=cos,
        sin=sin,
    )


def _rotary_tables(build: Build, file: str) -> tuple[str, str]:
    """cos and sin of every position, from the frequencies and the factor of transformers' own rotary module."""
    rotary = modules.rotary_of(build.model)
    frequencies, factor = rotary.inv_freq.double(), float(rotary.attention_scaling)
    context = context_of(build.model.config)
    step = max(1, _CHUNK_BYTES // (8 * len(frequencies)))

    def rows(of: str) -> Iterator[torch.Tensor]:
        for begin in range(0, context, step):
            positions = torch.arange(begin, min(begin + step, context), dtype=torch.float64)
            angles = torch.outer(positions, frequencies)
            yield (angles.cos() if of == "cos" else angles.sin()) * factor

    shape = (context, len(frequencies))
    tables = [build.weights.streamed(f"model.rotary_emb.{of}", shape, partial(rows, of)) for of in ("cos", "sin")]
    names = [build.graph.weight(file, entry) for entry in tables]
    return names[0], names[1]


def attention(build: Build, file: str, layer: int, value: str, inputs: Inputs) -> str:
    """The attention of one layer: normed [T, D] to [T, D]."""
    return (_latent if is_latent(build, layer) else _grouped)(build, file, layer, value, inputs)


def _grouped(build: Build, file: str, layer: int, value: str, inputs: Inputs) -> str:
    graph, module = build.graph, build.model.model.layers[layer].self_attn
    cache = cache_of(build, layer)
    heads = build.model.config.num_attention_heads
    scope, disk = f"/model/layers.{layer}/attn", f"model.layers.{layer}.self_attn"
    parts = {}
    for part, count in (("q", heads), ("k", cache.heads), ("v", cache.heads)):
        out = linear(build, file, f"{disk}.{part}_proj.weight", value, f"{scope}/{part}_proj")
        parts[part] = _head_norm(build, file, layer, part, count, out)
    limit = getattr(build.model.config, "clip_qkv", None)
    if limit is not None:
        bounds = [
            graph.constant(f"/constants/clip_{sign}", np.array(edge, dtype=_numpy(build)))
            for sign, edge in (("low", -limit), ("high", limit))
        ]
        parts = {part: graph.node("Clip", [out, *bounds], f"{scope}/{part}_clip") for part, out in parts.items()}
    rows = [_as_batch(build, parts[p], inputs, n * cache.size, f"{scope}/{p}_batch") for p, n in _heads(heads, cache)]
    out = graph.node(
        "GroupQueryAttention",
        [*rows, *_past(layer), inputs.seqlens, inputs.total, inputs.cos, inputs.sin, *_sinks(build, file, layer)],
        f"{scope}/GroupQueryAttention",
        outputs=3,
        domain=CONTRIB,
        num_heads=heads,
        kv_num_heads=cache.heads,
        scale=float(module.scaling),
        do_rotary=1,
        rotary_interleaved=0,
        local_window_size=_window(build, layer),
    )
    _name_cache(build, layer)
    flat = reshape(graph, out, graph.integers(-1, heads * cache.size), f"{scope}/flat")
    return linear(build, file, f"{disk}.o_proj.weight", flat, f"{scope}/o_proj")


def _sinks(build: Build, file: str, layer: int) -> tuple[str, ...]:
    """Inputs that follow the rotary tables: positions and a bias, which are not given, and what each head's softmax
    has beside its scores, where the model has that (gpt-oss)."""
    name = f"model.layers.{layer}.self_attn.sinks"
    return ("", "", build.graph.weight(file, build.weights.plain(name, name))) if build.has(name) else ()


def _heads(heads: int, cache: Cache) -> tuple[tuple[str, int], ...]:
    return (("q", heads), ("k", cache.heads), ("v", cache.heads))


def _head_norm(build: Build, file: str, layer: int, part: str, heads: int, value: str) -> str:
    """The norm of queries or keys where the model has one: over each head (Qwen3) or over all of them (OLMoE)."""
    disk, scope = f"model.layers.{layer}.self_attn.{part}_norm.weight", f"/model/layers.{layer}/attn/{part}_norm"
    if not build.has(disk):
        return value
    module = getattr(build.model.model.layers[layer].self_attn, f"{part}_norm")
    width = build.weights.source.shapes[disk][0]
    size = cache_of(build, layer).size
    if width == heads * size:
        return rms_norm(build, file, disk, module.variance_epsilon, value, scope)
    split = reshape(build.graph, value, build.graph.integers(-1, heads, size), f"{scope}/split")
    normed = rms_norm(build, file, disk, module.variance_epsilon, split, scope)
    return reshape(build.graph, normed, build.graph.integers(-1, heads * size), f"{scope}/join")


def _latent(build: Build, file: str, layer: int, value: str, inputs: Inputs) -> str:
    graph, module = build.graph, build.model.model.layers[layer].self_attn
    scope, disk = f"/model/layers.{layer}/attn", f"model.layers.{layer}.self_attn"
    heads, rope, latent = module.num_heads, module.qk_rope_head_dim, module.kv_lora_rank
    into, out_of = _absorbed(build, file, layer)

    split_q = graph.integers(module.qk_nope_head_dim, rope)
    queries = reshape(
        graph, _queries(build, file, layer, value), graph.integers(-1, heads, module.qk_head_dim), f"{scope}/q_heads"
    )
    nope = graph.node("Split", [queries, split_q], f"{scope}/q_split", outputs=2, axis=-1)
    carried = _by_head(build, nope, into, f"{scope}/q_latent")
    q_rope = _rotated(build, layer, graph.output(f"{scope}/q_split", 1), heads, inputs, "q")
    query = graph.node("Concat", [carried, q_rope], f"{scope}/q", axis=-1)

    compressed = linear(build, file, f"{disk}.kv_a_proj_with_mqa.weight", value, f"{scope}/kv_a_proj")
    kv = graph.node("Split", [compressed, graph.integers(latent, rope)], f"{scope}/kv_split", outputs=2, axis=-1)
    eps = module.kv_a_layernorm.variance_epsilon
    normed = rms_norm(build, file, f"{disk}.kv_a_layernorm.weight", eps, kv, f"{scope}/kv_a_norm")
    k_rope = _rotated(build, layer, graph.output(f"{scope}/kv_split", 1), 1, inputs, "k")
    k_flat = reshape(graph, k_rope, graph.integers(-1, rope), f"{scope}/k_rope_flat")
    key = graph.node("Concat", [normed, k_flat], f"{scope}/k", axis=-1)

    size = latent + rope
    query = _as_batch(build, query, inputs, heads * size, f"{scope}/q_batch")
    key = _as_batch(build, key, inputs, size, f"{scope}/k_batch")
    out = graph.node(
        "GroupQueryAttention",
        [query, key, key, *_past(layer), inputs.seqlens, inputs.total],
        f"{scope}/GroupQueryAttention",
        outputs=3,
        domain=CONTRIB,
        num_heads=heads,
        kv_num_heads=1,
        scale=float(module.scaling),
        local_window_size=_window(build, layer),
    )
    _name_cache(build, layer)
    per_head = reshape(graph, out, graph.integers(-1, heads, size), f"{scope}/out_heads")
    latent_out = graph.node(
        "Slice", [per_head, graph.integers(0), graph.integers(latent), graph.integers(2)], f"{scope}/out_latent"
    )
    values = _by_head(build, latent_out, out_of, f"{scope}/out_values")
    flat = reshape(graph, values, graph.integers(-1, heads * module.v_head_dim), f"{scope}/flat")
    return linear(build, file, f"{disk}.o_proj.weight", flat, f"{scope}/o_proj")


def _queries(build: Build, file: str, layer: int, value: str) -> str:
    scope, disk = f"/model/layers.{layer}/attn", f"model.layers.{layer}.self_attn"
    if build.has(f"{disk}.q_proj.weight"):
        return linear(build, file, f"{disk}.q_proj.weight", value, f"{scope}/q_proj")
    module = build.model.model.layers[layer].self_attn
    small = linear(build, file, f"{disk}.q_a_proj.weight", value, f"{scope}/q_a_proj")
    eps = module.q_a_layernorm.variance_epsilon
    normed = rms_norm(build, file, f"{disk}.q_a_layernorm.weight", eps, small, f"{scope}/q_a_norm")
    return linear(build, file, f"{disk}.q_b_proj.weight", normed, f"{scope}/q_b_proj")


def _absorbed(build: Build, file: str, layer: int) -> tuple[str, str]:
    """kv_b_proj [heads * (nope + v), latent] as two batches: [heads, nope, latent] and [heads, latent, v]."""
    module = build.model.model.layers[layer].self_attn
    name = f"model.layers.{layer}.self_attn.kv_b_proj.weight"
    heads, nope, latent, v_size = module.num_heads, module.qk_nope_head_dim, module.kv_lora_rank, module.v_head_dim
    source = build.weights.source

    def halves() -> torch.Tensor:
        return source.read(name).view(heads, nope + v_size, latent)

    keys = build.weights.made(
        name.replace("kv_b_proj", "k_b_proj"), (heads, nope, latent), lambda: halves()[:, :nope].contiguous()
    )
    values = build.weights.made(
        name.replace("kv_b_proj", "v_b_proj"), (heads, latent, v_size), lambda: halves()[:, nope:].mT.contiguous()
    )
    return build.graph.weight(file, keys), build.graph.weight(file, values)


def _by_head(build: Build, value: str, weight: str, scope: str) -> str:
    """Each head's rows times its own matrix: [T, heads, I] x [heads, I, O] to [T, heads, O]."""
    graph = build.graph
    turned = graph.node("Transpose", [value], f"{scope}/by_head", perm=[1, 0, 2])
    product = graph.node("MatMul", [turned, weight], f"{scope}/MatMul")
    return graph.node("Transpose", [product], f"{scope}/by_token", perm=[1, 0, 2])


def _rotated(build: Build, layer: int, value: str, heads: int, inputs: Inputs, part: str) -> str:
    """Rotary embedding of [T, heads * rope] or [T, heads, rope]; gives [T, heads, rope]."""
    graph, module = build.graph, build.model.model.layers[layer].self_attn
    rope, scope = module.qk_rope_head_dim, f"/model/layers.{layer}/attn/{part}_rope"
    rows = _as_batch(build, value, inputs, heads * rope, f"{scope}/batch")
    rotated = graph.node(
        "RotaryEmbedding",
        [rows, inputs.positions, inputs.cos, inputs.sin],
        f"{scope}/RotaryEmbedding",
        domain=CONTRIB,
        interleaved=int(getattr(build.model.config, "rope_interleave", True)),
    )
    return reshape(graph, rotated, graph.integers(-1, heads, rope), f"{scope}/heads")


def _as_batch(build: Build, value: str, inputs: Inputs, width: int, name: str) -> str:
    """[T, ..] as [B, S, width]."""
    graph = build.graph
    shape = graph.shared(
        f"/model/inputs/shape_{width}",
        lambda own: graph.node("Concat", [inputs.batch_sequence, graph.integers(width)], own, axis=0),
    )
    return reshape(graph, value, shape, name)


def _past(layer: int) -> tuple[str, str]:
    return f"past_key_values.{layer}.key", f"past_key_values.{layer}.value"


def _name_cache(build: Build, layer: int) -> None:
    """Give the attention's second and third output the names that the graph's outputs have."""
    node = build.graph.nodes[-1]
    node.output[1], node.output[2] = f"present.{layer}.key", f"present.{layer}.value"


def _window(build: Build, layer: int) -> int:
    """Tokens that a layer looks back on, itself included; -1 for all."""
    config = build.model.config
    if build.weights.source.family.derived:  # not every architecture reads what its config states
        return int(getattr(build.model.model.layers[layer].self_attn, "sliding_window", None) or -1)
    kinds = getattr(config, "layer_types", None)
    slides = kinds is None or kinds[layer] == "sliding_attention"
    return int((getattr(config, "sliding_window", None) if slides else None) or -1)


def _numpy(build: Build) -> type[np.floating]:
    return np.float32 if build.weights.dtype == torch.float32 else np.float16
