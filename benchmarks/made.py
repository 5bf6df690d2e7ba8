"""Made checkpoints: true tensor names and dtypes, random weights, any number of layers and experts."""

import json
import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from moepress.compress.gptq.grid import absmax_scales, round_to_nearest
from moepress.compress.gptq.include import Include, linear_groups, unquantized_modules
from moepress.converters.safetensors.compressed_tensors import layer_tensors
from moepress.converters.safetensors.compressed_tensors_config import quantization_config
from moepress.converters.safetensors.scheme import Scheme
from moepress.models.families.family import Part, part_of
from moepress.models.storage.checkpoint import open_checkpoint
from moepress.models.storage.tensors import DTYPE_NAMES, read_tensor, tensor_bytes, tensor_entry
from moepress.models.storage.writer import Chunk, Entry, copy_companions, write_index, write_json, write_shard
from moepress.stages.places import model_folder

# With the routed experts: every Linear but routers, `lm_head` and what `quantize` never touches.
INCLUDE = frozenset({Include.ATTENTION, Include.SHARED, Include.DENSE})


def make_qwen3_moe(
    folder: Path, *, layers: int, experts: int, hidden: int = 256, width: int = 256, top_k: int = 4
) -> int:
    """Write a Qwen3-MoE checkpoint in bf16, one shard a layer, with the demo's tokenizer; returns its size in bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    heads, head, vocabulary = 4, 64, 2048
    config = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "dtype": "bfloat16",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": head,
        "intermediate_size": 2 * width,
        "moe_intermediate_size": width,
        "num_experts": experts,
        "num_experts_per_tok": top_k,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "max_position_embeddings": 2048,
        "vocab_size": vocabulary,
        "tie_word_embeddings": False,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(model_folder("demo") / name, folder / name)
    generator = torch.Generator().manual_seed(0)
    weight_map, total = {}, 0
    for shard, shapes in enumerate(_shards(layers, experts, hidden, width, heads * head, head, vocabulary)):
        name = f"model-{shard + 1:05d}-of-{layers + 1:05d}.safetensors"
        entries = [
            tensor_entry(tensor, _weight(tensor, shape, generator).to(torch.bfloat16))
            for tensor, shape in shapes.items()
        ]
        write_shard(folder / name, entries)
        weight_map |= dict.fromkeys(shapes, name)
        total += sum(entry.bytes for entry in entries)
    write_index(folder, weight_map, total)
    return total


def _weight(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    if len(shape) == 1:
        return torch.ones(shape)
    scale = 1.0 if "embed" in name else shape[-1] ** -0.5
    return torch.randn(shape, generator=generator) * scale


def _shards(
    layers: int, experts: int, hidden: int, width: int, inner: int, head: int, vocabulary: int
) -> list[dict[str, tuple[int, ...]]]:
    outer = {
        "model.embed_tokens.weight": (vocabulary, hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (vocabulary, hidden),
    }
    shards: list[dict[str, tuple[int, ...]]] = [outer]
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        tensors: dict[str, tuple[int, ...]] = {
            f"{prefix}input_layernorm.weight": (hidden,),
            f"{prefix}post_attention_layernorm.weight": (hidden,),
            f"{prefix}self_attn.q_norm.weight": (head,),
            f"{prefix}self_attn.k_norm.weight": (head,),
            f"{prefix}self_attn.o_proj.weight": (hidden, inner),
            f"{prefix}mlp.gate.weight": (experts, hidden),
        }
        tensors |= {f"{prefix}self_attn.{part}_proj.weight": (inner, hidden) for part in "qkv"}
        for expert in range(experts):
            for part, shape in (("gate", (width, hidden)), ("up", (width, hidden)), ("down", (hidden, width))):
                tensors[f"{prefix}mlp.experts.{expert}.{part}_proj.weight"] = shape
        shards.append(tensors)
    return shards


def make_olmoe(
    folder: Path,
    *,
    layers: int = 2,
    experts: int = 64,
    hidden: int = 2048,
    width: int = 1024,
    top_k: int = 8,
    head: int = 128,
    vocabulary: int | None = None,
) -> int:
    """Write an OLMoE checkpoint in bf16, one shard a layer, with the demo's tokenizer; returns its size in bytes.

    The defaults are OLMoE-1B-7B's own shape with fewer layers. Where no vocabulary is given it shrinks with them, so
    that `lm_head` has the share of a token's work that it has in the model of 16 layers.
    """
    vocabulary = vocabulary or max(2048, 50304 * layers // 16)
    _begin(
        folder,
        _config("olmoe", "OlmoeForCausalLM", layers, experts, hidden, hidden // head, vocabulary)
        | {"intermediate_size": width, "num_experts_per_tok": top_k, "norm_topk_prob": False},
    )
    shards = _shards(layers, experts, hidden, width, hidden, hidden, vocabulary)  # q and k norms span all heads
    generator = torch.Generator().manual_seed(0)
    return _write_all(folder, [[_drawn(name, shape, generator) for name, shape in s.items()] for s in shards])


def make_rounded(model: Path, folder: Path, scheme: Scheme) -> int:
    """Write a checkpoint as a compressed-tensors folder by rounding to nearest; returns its size in bytes.

    For speed, which does not depend on the codes: absmax scales, no calibration. Needs the memory of one shard.
    """
    base = open_checkpoint(model)
    layers = base.shape.layers
    names = {n for layer in range(layers) for g in linear_groups(base, layer, layers, INCLUDE) for n in g.names}
    names |= {n for n in base.shapes if part_of(base.family, n, layers) is Part.ROUTED}
    _begin(folder, base.config, scheme, unquantized_modules(base, layers, INCLUDE))
    copy_companions(model, folder)
    files: dict[Path, list[str]] = {}
    for name in base.shapes:
        files.setdefault(base.stored[name].file, []).append(name)

    def shard(tensors: list[str]) -> Iterator[Entry]:
        for name in tensors:
            weight = read_tensor(base.stored[name])
            made = _rounded(name, weight, scheme) if name in names else {name: weight}
            yield from (tensor_entry(*pair) for pair in made.items())

    return _write_all(folder, [shard(tensors) for tensors in files.values()])


def make_packed_qwen3_moe(
    folder: Path,
    scheme: Scheme,
    *,
    total_bytes: int,
    shard_bytes: int = 10**9,
    experts: int = 128,
    hidden: int = 2048,
    width: int = 768,
    heads: int = 16,
    head: int = 128,
    vocabulary: int = 151936,
) -> tuple[int, int]:
    """Write a quantized Qwen3-MoE folder of random codes, of at least that size; returns its layers and bytes.

    The defaults are the experts of Qwen3-30B-A3B, with half of its query heads and as many key heads; the layers are as
    many as the size asks for. Every Linear but routers and `lm_head` is codes. Needs the memory of one tensor.
    """
    generator = torch.Generator().manual_seed(0)
    outer, one = (
        sum(entry.bytes for name, size in tensors.items() for entry in _packed(name, size, scheme, generator))
        for tensors in _shards(1, experts, hidden, width, heads * head, head, vocabulary)
    )
    layers = max(1, math.ceil((total_bytes - outer) / one))
    config = _config("qwen3_moe", "Qwen3MoeForCausalLM", layers, experts, hidden, heads, vocabulary) | {
        "head_dim": head,
        "intermediate_size": 2 * width,
        "moe_intermediate_size": width,
        "num_experts_per_tok": min(8, experts),
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }
    ignored = ["lm_head", *(f"model.layers.{layer}.mlp.gate" for layer in range(layers))]
    _begin(folder, config, scheme, ignored)
    shards, filled = [list[Entry]()], 0
    for tensors in _shards(layers, experts, hidden, width, heads * head, head, vocabulary):
        for name, shape in tensors.items():
            entries = _packed(name, shape, scheme, generator)
            filled += sum(entry.bytes for entry in entries)
            if filled > shard_bytes * len(shards):
                shards.append([])
            shards[-1] += entries
    return layers, _write_all(folder, shards)


def _config(
    model_type: str, architecture: str, layers: int, experts: int, hidden: int, heads: int, vocabulary: int
) -> dict[str, Any]:
    return {
        "architectures": [architecture],
        "model_type": model_type,
        "dtype": "bfloat16",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "num_experts": experts,
        "max_position_embeddings": 4096,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "vocab_size": vocabulary,
        "tie_word_embeddings": False,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
    }


def _begin(folder: Path, config: dict[str, Any], scheme: Scheme | None = None, ignored: Sequence[str] = ()) -> None:
    """The folder with its config.json and the demo's tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    quantization = {} if scheme is None else {"quantization_config": quantization_config(scheme, ignored)}
    write_json(folder / "config.json", config | quantization)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(model_folder("demo") / name, folder / name)


def _write_all(folder: Path, shards: Sequence[Iterable[Entry]]) -> int:
    """Shard after shard, and their index; returns the bytes of all tensors."""
    weight_map, total = {}, 0
    for number, entries in enumerate(shards, start=1):
        name, listed = f"model-{number:05d}-of-{len(shards):05d}.safetensors", list(entries)
        write_shard(folder / name, listed)
        weight_map |= {entry.name: name for entry in listed}
        total += sum(entry.bytes for entry in listed)
    write_index(folder, weight_map, total)
    return total


def _rounded(name: str, weight: torch.Tensor, scheme: Scheme) -> dict[str, torch.Tensor]:
    """The tensors of one matrix, rounded to nearest."""
    batch = weight.float()[None]
    scales = absmax_scales(batch, scheme, scale_dtype=weight.dtype)
    codes = round_to_nearest(batch, scales, scheme)
    return layer_tensors(name.removesuffix(".weight"), codes[0], scales[0], scheme, weight.dtype)


def _drawn(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Entry:
    """A bf16 tensor that is drawn when it is written."""

    def data() -> Iterator[Chunk]:
        yield tensor_bytes(_weight(name, shape, generator).to(torch.bfloat16))

    return Entry(name=name, dtype="BF16", shape=shape, bytes=2 * math.prod(shape), data=data)


def _packed(name: str, shape: tuple[int, ...], scheme: Scheme, generator: torch.Generator) -> list[Entry]:
    """A matrix as random words and scales near what keeps the size of its input; other tensors as in `_drawn`."""
    if len(shape) == 1 or ".mlp.gate." in name or not name.startswith("model.layers."):
        return [_drawn(name, shape, generator)]
    rows, columns = shape
    words, groups = columns * scheme.bits // 32, scheme.groups(columns)
    size = columns**-0.5 / (0.29 * 2**scheme.bits)  # codes that are spread evenly deviate by 0.29 of their range

    def codes() -> torch.Tensor:
        return torch.randint(-(2**31), 2**31, (rows, words), generator=generator).to(torch.int32)

    def scales() -> torch.Tensor:
        return (size * (0.5 + torch.rand(rows, groups, generator=generator))).to(torch.bfloat16)

    module = name.removesuffix(".weight")
    made = (
        ("weight_packed", torch.int32, (rows, words), codes),
        ("weight_scale", torch.bfloat16, (rows, groups), scales),
        ("weight_shape", torch.int64, (2,), lambda: torch.tensor(shape)),
    )
    return [
        Entry(
            name=f"{module}.{suffix}",
            dtype=DTYPE_NAMES[dtype],
            shape=full,
            bytes=math.prod(full) * dtype.itemsize,
            data=partial(_once, make),
        )
        for suffix, dtype, full, make in made
    ]


def _once(make: Callable[[], torch.Tensor]) -> Iterator[Chunk]:
    yield tensor_bytes(make())
