"""Models with all keys and names of DeepSeek-R1 in small: made by benchmarks/make_r1.py, or of headers alone."""

import importlib.util
import json
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from moepress.models.storage.writer import write_index, write_json

_SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "make_r1.py"


def _load() -> ModuleType:
    """benchmarks/ is no package; its scripts are loaded by their path."""
    if "make_r1" not in sys.modules:
        spec = importlib.util.spec_from_file_location("make_r1", _SCRIPT)
        assert spec is not None
        assert spec.loader is not None
        sys.modules["make_r1"] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules["make_r1"]


make_r1 = _load()

# Blocks of 128 x 128 divide no matrix but the last two of these; kv_a_proj_with_mqa is cut off in R1 itself (576 rows).
SMALL: dict[str, Any] = {
    "hidden_size": 192,
    "intermediate_size": 160,
    "moe_intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 96,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "vocab_size": 256,
}
# Blocks divide every matrix, as transformers' loader wants it.
DIVISIBLE = {
    **SMALL,
    "hidden_size": 256,
    "intermediate_size": 256,
    "moe_intermediate_size": 128,
    "q_lora_rank": 128,
    "kv_lora_rank": 112,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
}


def small_r1(folder: Path, *, moe_layers: int = 2, experts: int = 32, **options: Any) -> Path:
    """R1 with one dense layer and a few MoE layers, in several shards; `options` are those of `make_r1` and keys."""
    make_r1.make_r1(folder, moe_layers=moe_layers, experts=experts, **{"shard_bytes": 1 << 20, **SMALL, **options})
    return folder


def hollow_r1(folder: Path, *, moe_layers: int, experts: int = 256, shards: int = 163) -> Path:
    """All tensors of R1 with its MTP layer, tiny, in so many shards; their data is a hole that reads as zeros."""
    tiny = {**SMALL, "hidden_size": 32, "intermediate_size": 32, "moe_intermediate_size": 32, "q_lora_rank": 16}
    config = make_r1.r1_config(dense_layers=3, moe_layers=moe_layers, experts=experts, mtp=True, **tiny)
    rows = list(make_r1.r1_tensors(config))
    folder.mkdir()
    each, weight_map, total = -(-len(rows) // shards), {}, 0
    for number, start in enumerate(range(0, len(rows), each), start=1):
        name, header, position = f"model-{number:05d}-of-{shards:06d}.safetensors", {}, 0
        for tensor, dtype, shape in rows[start : start + each]:
            size = math.prod(shape) * make_r1.BYTES[dtype]
            header[tensor] = {"dtype": dtype, "shape": shape, "data_offsets": [position, position + size]}
            position += size
            weight_map[tensor] = name
        raw = json.dumps(header).encode()
        with (folder / name).open("wb") as stream:
            stream.write(len(raw).to_bytes(8, "little") + raw)
            stream.truncate(8 + len(raw) + position)
        total += position
    write_index(folder, weight_map, total)
    write_json(folder / "config.json", config)
    return folder
