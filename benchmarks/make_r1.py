"""Write a checkpoint as DeepSeek-R1's is, but with few layers: its config, names, shapes, dtypes and sharding.

    python benchmarks/make_r1.py OUT
    python benchmarks/make_r1.py OUT --dense-layers 1 --moe-layers 2 --experts 64 --mtp

All keys of config.json are those of deepseek-ai/DeepSeek-R1; names, shapes and dtypes are those of its 91,991 tensors:
fp8 with fp32 `weight_scale_inv` for every Linear of the decoder layers, bf16 for router, norms, embeddings, lm_head and
eh_proj, fp32 for e_score_correction_bias. The default, 1 dense and 1 MoE layer of 256 experts, is 15.8 GB. 3.7 GB of
that are embeddings and lm_head; --vocab 2048 leaves 12.2 GB.

The weights are not trained, but not all alike either: experts differ in size, blocks of a matrix in their scales, some
columns are copies of others and some are outliers; the router has groups of similar rows and rows of different norms;
tokens fall into clusters; norms have outlier channels. So routing, Hessians and scales differ between experts.

Every value comes from a pool of random bytes, at an offset that the tensor's name gives: nothing is drawn per element,
the memory is that of a pool and a part of one tensor, and a layer's bytes do not depend on how many layers there are.
The tokenizer is the demo's (its 2,048 ids fit any vocabulary), so that commands run as on a real model.
"""

import argparse
import math
import shutil
import time
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moepress.models.storage.tensors import tensor_bytes
from moepress.models.storage.writer import Chunk, Entry, write_index, write_json, write_shard
from moepress.stages.places import model_folder

CONFIG: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {
        "AutoConfig": "configuration_deepseek.DeepseekV3Config",
        "AutoModel": "modeling_deepseek.DeepseekV3Model",
        "AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM",
    },
    "bos_token_id": 0,
    "eos_token_id": 1,
    "ep_size": 1,
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "initializer_range": 0.02,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    },
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.46.3",
    "use_cache": True,
    "v_head_dim": 128,
    "vocab_size": 129280,
}
SHARD_BYTES = 4_302_000_000  # most of the original's 163 shards have this size
BYTES = {"F8_E4M3": 1, "BF16": 2, "F32": 4}
_PART_BYTES = 32 << 20
_POOL = (1 << 24) + 4099  # elements; not a multiple of any width, so that rows never line up
_FP8_STD = 448 / 4.2 / 4  # 4.2: the largest of 16,384 normal values; 4: outlier columns
_CLUSTERS = 64

Row = tuple[str, str, tuple[int, ...]]  # name, dtype, shape


def r1_config(*, dense_layers: int, moe_layers: int, experts: int, mtp: bool, **overrides: Any) -> dict[str, Any]:
    """R1's config with these numbers; `overrides` are keys that it has."""
    unknown = overrides.keys() - CONFIG.keys()
    if unknown:
        raise ValueError(f"R1's config has no {sorted(unknown)}")
    return CONFIG | {
        "num_hidden_layers": dense_layers + moe_layers,
        "first_k_dense_replace": dense_layers,
        "n_routed_experts": experts,
        "num_nextn_predict_layers": int(mtp),
        **overrides,
    }


def r1_tensors(config: Mapping[str, Any]) -> Iterator[Row]:
    """Every tensor of a model of that config in the order of the layers, as the published checkpoint has them."""
    hidden, layers = config["hidden_size"], config["num_hidden_layers"]
    vocabulary = (config["vocab_size"], hidden)
    yield "model.embed_tokens.weight", "BF16", vocabulary
    for layer in range(layers):
        yield from _layer(config, layer)
    yield "model.norm.weight", "BF16", (hidden,)
    yield "lm_head.weight", "BF16", vocabulary
    for layer in range(layers, layers + config["num_nextn_predict_layers"]):
        prefix = f"model.layers.{layer}."
        yield f"{prefix}embed_tokens.weight", "BF16", vocabulary
        yield f"{prefix}enorm.weight", "BF16", (hidden,)
        yield f"{prefix}hnorm.weight", "BF16", (hidden,)
        yield f"{prefix}eh_proj.weight", "BF16", (hidden, 2 * hidden)
        yield from _layer(config, layer)
        yield f"{prefix}shared_head.norm.weight", "BF16", (hidden,)
        yield f"{prefix}shared_head.head.weight", "BF16", vocabulary


def _layer(config: Mapping[str, Any], layer: int) -> Iterator[Row]:
    hidden, heads, prefix = config["hidden_size"], config["num_attention_heads"], f"model.layers.{layer}."
    q_rank, kv_rank, rope = config["q_lora_rank"], config["kv_lora_rank"], config["qk_rope_head_dim"]
    nope, value = config["qk_nope_head_dim"], config["v_head_dim"]
    block = config["quantization_config"]["weight_block_size"]
    linear = partial(_linear, block)
    yield f"{prefix}input_layernorm.weight", "BF16", (hidden,)
    yield from linear(f"{prefix}self_attn.q_a_proj", q_rank, hidden)
    yield f"{prefix}self_attn.q_a_layernorm.weight", "BF16", (q_rank,)
    yield from linear(f"{prefix}self_attn.q_b_proj", heads * (nope + rope), q_rank)
    yield from linear(f"{prefix}self_attn.kv_a_proj_with_mqa", kv_rank + rope, hidden)
    yield f"{prefix}self_attn.kv_a_layernorm.weight", "BF16", (kv_rank,)
    yield from linear(f"{prefix}self_attn.kv_b_proj", heads * (nope + value), kv_rank)
    yield from linear(f"{prefix}self_attn.o_proj", hidden, heads * value)
    yield f"{prefix}post_attention_layernorm.weight", "BF16", (hidden,)
    if layer < config["first_k_dense_replace"]:
        yield from _mlp(linear, f"{prefix}mlp.", hidden, config["intermediate_size"])
        return
    experts, width = config["n_routed_experts"], config["moe_intermediate_size"]
    yield f"{prefix}mlp.gate.weight", "BF16", (experts, hidden)
    yield f"{prefix}mlp.gate.e_score_correction_bias", "F32", (experts,)
    for expert in range(experts):
        yield from _mlp(linear, f"{prefix}mlp.experts.{expert}.", hidden, width)
    yield from _mlp(linear, f"{prefix}mlp.shared_experts.", hidden, width * config["n_shared_experts"])


def _mlp(linear: Any, prefix: str, hidden: int, width: int) -> Iterator[Row]:
    yield from linear(f"{prefix}gate_proj", width, hidden)
    yield from linear(f"{prefix}up_proj", width, hidden)
    yield from linear(f"{prefix}down_proj", hidden, width)


def _linear(block: list[int], module: str, rows: int, columns: int) -> Iterator[Row]:
    yield f"{module}.weight", "F8_E4M3", (rows, columns)
    yield f"{module}.weight_scale_inv", "F32", (-(-rows // block[0]), -(-columns // block[1]))


def make_r1(
    folder: Path,
    *,
    dense_layers: int = 1,
    moe_layers: int = 1,
    experts: int = 256,
    mtp: bool = False,
    seed: int = 0,
    shard_bytes: int = SHARD_BYTES,
    **overrides: Any,
) -> int:
    """Write the checkpoint; returns the bytes of its tensors.

    Args:
        folder: made here.
        dense_layers: layers without experts, the first ones.
        moe_layers: layers with experts.
        experts: routed experts of each of them.
        mtp: with the multi-token-prediction layer.
        seed: of the weights.
        shard_bytes: a shard takes tensors up to this size.
        overrides: other keys of config.json, such as hidden_size for a tiny model.
    """
    config = r1_config(dense_layers=dense_layers, moe_layers=moe_layers, experts=experts, mtp=mtp, **overrides)
    folder.mkdir(parents=True, exist_ok=True)
    pools = _make_pools(seed)
    shards: list[list[Entry]] = [[]]
    filled = 0
    for row in r1_tensors(config):
        entry = _entry(pools, config, *row)
        if shards[-1] and filled + entry.bytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(entry)
        filled += entry.bytes
    weight_map, total = {}, 0
    for number, entries in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):06d}.safetensors"  # the original's second number has six digits
        write_shard(folder / name, entries)
        weight_map |= dict.fromkeys((entry.name for entry in entries), name)
        total += sum(entry.bytes for entry in entries)
    write_index(folder, weight_map, total)
    write_json(folder / "config.json", config)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(model_folder("demo") / name, folder / name)
    return total


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pools:
    """Random values to copy from: normal ones; fp8 with a standard deviation that leaves room for outliers."""

    seed: int
    fp8: np.ndarray[Any, Any]
    bf16: Mapping[float, np.ndarray[Any, Any]]  # standard deviation -> bf16 values as uint16


def _make_pools(seed: int) -> _Pools:
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(_POOL, generator=generator)
    fp8 = (normal * _FP8_STD).clamp_(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    return _Pools(seed=seed, fp8=fp8, bf16={std: _bits(normal * std) for std in (1.0, 1 / 64, 1 / 128)})


def _bits(values: torch.Tensor) -> np.ndarray[Any, Any]:
    return np.asarray(values.to(torch.bfloat16).view(torch.uint16).numpy())


def _entry(pools: _Pools, config: Mapping[str, Any], name: str, dtype: str, shape: tuple[int, ...]) -> Entry:
    data: Any
    if dtype == "F8_E4M3":
        data = partial(_fp8, pools, name, shape)
    elif name.endswith(("embed_tokens.weight", "lm_head.weight", "shared_head.head.weight", "eh_proj.weight")):
        data = partial(_table, pools, name, shape)
    else:
        data = partial(_small, pools.seed, config, name, shape)
    return Entry(name=name, dtype=dtype, shape=shape, bytes=math.prod(shape) * BYTES[dtype], data=data)


def _draws(seed: int, name: str) -> np.random.Generator:
    return np.random.default_rng([seed, zlib.crc32(name.encode())])


def _fp8(pools: _Pools, name: str, shape: tuple[int, int]) -> Iterator[Chunk]:
    """Rows from the pool; some columns are outliers (four times as large), some are copies of others."""
    draws, (_rows, columns) = _draws(pools.seed, name), shape
    outliers = draws.choice(columns, max(1, columns // 1024), replace=False)
    copies, originals = np.split(draws.choice(columns, 2 * max(1, columns // 64), replace=False), 2)
    for part in _parts(pools.fp8, shape, draws):
        part[:, copies] = part[:, originals]
        large = part[:, outliers]
        # e4m3: sign, four bits of exponent, three of mantissa. Two more in the exponent are four times as much; what
        # would pass the largest number, 0x7E, becomes it, for 0x7F is NaN.
        part[:, outliers] = np.where((large & 0x7F) < 0x68, large + 0x10, large & 0x80 | 0x7E)
        yield part.data.cast("B")


def _parts(pool: np.ndarray[Any, Any], shape: tuple[int, int], draws: np.random.Generator) -> Iterator[Any]:
    """A matrix from the pool, some rows at a time; every part begins somewhere else in the pool."""
    rows, columns = shape
    step = max(1, min(_PART_BYTES // pool.itemsize, len(pool) // 2) // columns)
    for start in range(0, rows, step):
        count = min(step, rows - start)
        offset = int(draws.integers(len(pool) - count * columns + 1))
        yield pool[offset : offset + count * columns].reshape(count, columns).copy()


def _table(pools: _Pools, name: str, shape: tuple[int, int]) -> Iterator[Chunk]:
    """Embeddings, lm_head and eh_proj. Tokens are in clusters, which share the first quarter of their embedding."""
    shared = "model.embed_tokens.weight" if "embed_tokens" in name else "lm_head.weight"
    embeddings, joint = "embed_tokens" in name, name.endswith("eh_proj.weight")
    # The original's multi-token-prediction layer holds copies of the embeddings and of lm_head.
    draws = _draws(pools.seed, name if joint else shared)
    quarter, row = shape[1] // 4, 0
    centres = pools.bf16[1.0][: _CLUSTERS * quarter].reshape(_CLUSTERS, quarter)
    for part in _parts(pools.bf16[1.0 if embeddings else 1 / 128 if joint else 1 / 64], shape, draws):
        if embeddings:
            part[:, :quarter] = centres[np.arange(row, row + len(part)) % _CLUSTERS]
        row += len(part)
        yield part.data.cast("B")


def _small(seed: int, config: Mapping[str, Any], name: str, shape: tuple[int, ...]) -> Iterator[Chunk]:
    draws = _draws(seed, name)
    if name.endswith("weight_scale_inv"):
        values = _scales(config, name, shape, draws)
    elif name.endswith("e_score_correction_bias"):
        values = 0.05 * draws.standard_normal(shape)
    elif name.endswith("mlp.gate.weight"):
        values = _router(config, shape, draws)
    else:  # norms
        values = 1 + 0.1 * draws.standard_normal(shape)
        values[draws.choice(len(values), max(1, len(values) // 1024), replace=False)] *= 6
    dtype = torch.float32 if name.endswith(("weight_scale_inv", "bias")) else torch.bfloat16
    yield tensor_bytes(torch.from_numpy(values).to(dtype))


def _scales(config: Mapping[str, Any], name: str, shape: tuple[int, ...], draws: np.random.Generator) -> Any:
    """So that outputs are about as large as inputs; matrices, bands of rows and blocks differ in size."""
    block = config["quantization_config"]["weight_block_size"]
    inputs = shape[1] * block[1]
    size = inputs**-0.5 / _FP8_STD * np.exp(0.35 * draws.standard_normal())
    bands, blocks = draws.standard_normal((shape[0], 1)), draws.standard_normal(shape)
    return size * np.exp(0.3 * bands + 0.2 * blocks)


def _router(config: Mapping[str, Any], shape: tuple[int, ...], draws: np.random.Generator) -> Any:
    """Logits of about 1.5; neighbours in groups of eight look for similar tokens, and some experts are pickier."""
    experts, hidden = shape
    likes = np.repeat(draws.standard_normal((-(-experts // 8), hidden)), 8, axis=0)[:experts]
    size = 1.5 * hidden**-0.5 * np.exp(0.25 * draws.standard_normal((experts, 1)))
    return size * (0.6 * likes + 0.8 * draws.standard_normal(shape))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to be made; must not be there or be empty")
    parser.add_argument("--dense-layers", type=int, default=1, help="layers without experts (R1: 3)")
    parser.add_argument("--moe-layers", type=int, default=1, help="layers with experts (R1: 58)")
    parser.add_argument("--experts", type=int, default=256, help="routed experts of a layer, a multiple of 8 (R1: 256)")
    parser.add_argument(
        "--mtp", action=argparse.BooleanOptionalAction, default=False, help="with the layer behind the last"
    )
    parser.add_argument("--vocab", type=int, default=129280, help="rows of embeddings and lm_head, at least 2048")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    if min(given.dense_layers, given.moe_layers - 1) < 0 or given.experts < 16 or given.experts % 8:
        parser.error("one MoE layer or more, and 16 experts or more in 8 equal groups")
    if given.vocab < 2048:
        parser.error("--vocab is at least 2048, the ids of the demo's tokenizer")
    if given.out.exists() and any(given.out.iterdir()):
        parser.error(f"{given.out} is not empty")
    start = time.perf_counter()
    total = make_r1(
        given.out,
        dense_layers=given.dense_layers,
        moe_layers=given.moe_layers,
        experts=given.experts,
        mtp=given.mtp,
        seed=given.seed,
        vocab_size=given.vocab,
    )
    seconds = time.perf_counter() - start
    print(f"{given.out}: {total / 1e9:.1f} GB in {seconds:.0f} s, {total / 1e6 / seconds:.0f} MB/s")


if __name__ == "__main__":
    main()
