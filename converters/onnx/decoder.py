"""A folder as one ONNX decoder: embedding, layers, norm, head, with a KV cache as inputs and outputs.

| input | dtype | shape |
|---|---|---|
| `input_ids` | int64 | [batch, sequence] |
| `attention_mask` | int64 | [batch, past + sequence] |
| `past_key_values.L.key`, `.value` | the graph's | [batch, heads, past, size] |

| output | dtype | shape |
|---|---|---|
| `logits` | float32 | [batch, sequence, vocabulary] |
| `present.L.key`, `.value` | the graph's | [batch, heads, past + sequence, size] |

These are the names of onnxruntime-genai's and optimum's decoders.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from onnx import ModelProto, TensorProto, ValueInfoProto, helper

from moepress.converters.onnx.attention import Cache, Inputs, attention, cache_of, shared_inputs
from moepress.converters.onnx.expressible import require_expressible
from moepress.converters.onnx.graph import ONNX_DTYPES, Graph
from moepress.converters.onnx.moe import moe_block
from moepress.converters.onnx.parts import Build, Kernel, gated_mlp, linear, rms_norm
from moepress.converters.onnx.weights import Weights, require_whole
from moepress.converters.safetensors.artifact import Artifact
from moepress.models.families.skeleton import build_skeleton
from moepress.models.storage.checkpoint import Checkpoint
from moepress.models.storage.experts import experts_by_layer, router_disk_names
from moepress.models.storage.writer import Entry

EMBEDDING_FILE, HEAD_FILE = "model.embedding.data", "model.head.data"


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoder:
    """A built graph.

    Attributes:
        model: the graph, its weights referring to `files`.
        files: file name -> weights to be written there.
        caches: the cache's shape, layer by layer.
        experts: number of routed experts in each MoE layer.
        config: transformers' config, which has a value where config.json states none.
        genai: what genai_config.json will hold; empty until `plan_onnx` fills it in.
    """

    model: ModelProto
    files: dict[str, list[Entry]]
    caches: tuple[Cache, ...]
    experts: dict[int, int]
    config: Any
    genai: dict[str, Any] = field(default_factory=dict)


def build_decoder(
    source: Checkpoint | Artifact, *, dtype: torch.dtype, kernel: Kernel, accuracy_level: int = 0
) -> Decoder:
    """Build the graph of a folder; reads no weights.

    Args:
        source: plain, fp8, pruned or quantized.
        dtype: float32 or float16, of activations, caches, scales and unquantized weights.
        kernel: `qmoe` or `loop`.
        accuracy_level: see `Build`.

    Raises:
        UnsupportedError: a width, a group size, or a part of the model that ONNX Runtime has no kernel for.
        InvalidInputError: a tensor is missing.
    """
    model = build_skeleton(source.config)
    require_expressible(source, model)
    if isinstance(source, Artifact):  # what is multiplied out here is multiplied out as ONNX Runtime does
        source = dataclasses.replace(source, exact=True)
    build = Build(
        graph=Graph(),
        weights=Weights(source=source, dtype=dtype),
        model=model,
        kernel=kernel,
        accuracy_level=accuracy_level,
    )
    shape = source.outline.shape
    _require_tensors(build, shape.layers)
    inputs = shared_inputs(build, EMBEDDING_FILE)
    hidden = _embed(build)
    experts = experts_by_layer(source)
    for layer in range(shape.layers):
        hidden = _layer(build, layer, hidden, inputs, routed=layer in experts)
    _head(build, hidden, inputs, shape.vocabulary)
    caches = tuple(cache_of(build, layer) for layer in range(shape.layers))
    given, given_back = _interface(build, caches, shape.vocabulary)
    return Decoder(
        model=build.graph.build(given, given_back, source.family.name),
        files=build.graph.files,
        caches=caches,
        experts=experts,
        config=model.config,
    )


def layer_file(layer: int) -> str:
    """The file that holds a layer's weights: a killed export goes on with the first layer that is missing."""
    return f"model.layer-{layer:03}.data"


def _require_tensors(build: Build, layers: int) -> None:
    """What every decoder has; experts are checked where they are used."""
    source = build.weights.source
    names = ["model.embed_tokens.weight", "model.norm.weight"]
    routers = {name for layer in source.outline.moe_layers for name in router_disk_names(source, layer)}
    routers = {source.family.module_name(name) for name in routers}
    stored = {name for name, tensor in build.model.state_dict().items() if tensor.numel()}
    expected = {name for name in stored - routers if ".experts." not in name}
    names += [n for n in sorted(expected) if n.startswith("model.layers.") and int(n.split(".")[2]) < layers]
    require_whole(source, names)


def _embed(build: Build) -> str:
    graph, name = build.graph, "model.embed_tokens.weight"
    entry = build.weights.plain(name, name, keep_dtype=build.weights.dtype == torch.float32)
    table = graph.weight(EMBEDDING_FILE, entry)
    flat = graph.node("Reshape", ["input_ids", graph.integers(-1)], "/model/embed_tokens/tokens")
    rows = graph.node("Gather", [table, flat], "/model/embed_tokens/Gather", axis=0)
    same = ONNX_DTYPES[entry.dtype] == build.onnx_dtype
    return rows if same else build.cast(rows, build.onnx_dtype, "/model/embed_tokens/Cast")


def _layer(build: Build, layer: int, hidden: str, inputs: Inputs, *, routed: bool) -> str:
    graph, file, scope, disk = build.graph, layer_file(layer), f"/model/layers.{layer}", f"model.layers.{layer}"
    module = build.model.model.layers[layer]
    eps = module.input_layernorm.variance_epsilon
    normed = rms_norm(build, file, f"{disk}.input_layernorm.weight", eps, hidden, f"{scope}/input_layernorm")
    hidden = graph.node("Add", [hidden, attention(build, file, layer, normed, inputs)], f"{scope}/AddAttention")
    eps = module.post_attention_layernorm.variance_epsilon
    normed = rms_norm(
        build, file, f"{disk}.post_attention_layernorm.weight", eps, hidden, f"{scope}/post_attention_layernorm"
    )
    if routed:
        out = moe_block(build, file, layer, normed)
    else:
        out = gated_mlp(build, file, f"{disk}.mlp", normed, f"{scope}/mlp")
    return graph.node("Add", [hidden, out], f"{scope}/AddMlp")


def _head(build: Build, hidden: str, inputs: Inputs, vocabulary: int) -> None:
    graph, weights = build.graph, build.weights
    eps = build.model.model.norm.variance_epsilon
    normed = rms_norm(build, HEAD_FILE, "model.norm.weight", eps, hidden, "/model/norm")
    name, table = "lm_head.weight", "model.embed_tokens.weight"
    if name in weights.source.shapes and weights.is_quantized(name):
        logits = linear(build, HEAD_FILE, name, normed, "/lm_head")
    else:
        if name not in weights.source.shapes:  # tied: the same numbers, in the dtype that a product needs
            logits_weight = graph.weight(HEAD_FILE, weights.plain(table, name))
        else:
            logits_weight = graph.weight(HEAD_FILE, weights.plain(name, name))
        logits = graph.node("Gemm", [normed, logits_weight], "/lm_head/Gemm", transB=1)
    if build.onnx_dtype != TensorProto.FLOAT:
        logits = build.cast(logits, TensorProto.FLOAT, "/lm_head/Cast")
    shape = graph.node("Concat", [inputs.batch_sequence, graph.integers(vocabulary)], "/lm_head/shape", axis=0)
    graph.named("Reshape", [logits, shape], "/lm_head/Reshape", "logits")


def _interface(
    build: Build, caches: Sequence[Cache], vocabulary: int
) -> tuple[list[ValueInfoProto], list[ValueInfoProto]]:
    """The graph's inputs and outputs."""
    info = helper.make_tensor_value_info
    batch, length, total = "batch_size", "sequence_length", "total_sequence_length"
    given = [
        info("input_ids", TensorProto.INT64, [batch, length]),
        info("attention_mask", TensorProto.INT64, [batch, total]),
    ]
    given_back = [info("logits", TensorProto.FLOAT, [batch, length, vocabulary])]
    for layer, cache in enumerate(caches):
        for part in ("key", "value"):
            past = [batch, cache.heads, "past_sequence_length", cache.size]
            present = [batch, cache.heads, total, cache.size]
            given.append(info(f"past_key_values.{layer}.{part}", build.onnx_dtype, past))
            given_back.append(info(f"present.{layer}.{part}", build.onnx_dtype, present))
    return given, given_back
