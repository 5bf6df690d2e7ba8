"""Attention of a graph: which heads ONNX Runtime takes, and rotary tables of any length."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_runs
import onnxruntime
import pytest
import tiny_models
import torch
from onnx_runs import PREFILL, Models, onnx_logits, relative_error, tokens_of

from moepress.converters.onnx.decoder import build_decoder
from moepress.converters.safetensors.artifact import open_source
from moepress.errors import UnsupportedError


@pytest.fixture(scope="module")
def models(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Models:
    return onnx_runs.models_of(tiny_model, tmp_path_factory)


def attends(size: int, *, rotary: bool) -> bool:
    """Whether ONNX Runtime's attention takes heads of that size."""
    info, shape = onnx.helper.make_tensor_value_info, {"q": [1, 2, 2 * size], "k": [1, 2, size], "v": [1, 2, size]}
    shape |= {"past_k": [1, 1, 0, size], "past_v": [1, 1, 0, size]}
    shape |= {"cos": [8, size // 2], "sin": [8, size // 2]} if rotary else {}
    feed: dict[str, Any] = {name: np.zeros(dims, dtype=np.float32) for name, dims in shape.items()}
    feed = {**dict(list(feed.items())[:5]), "last": np.array([1], np.int32), "total": np.array(2, np.int32), **feed}
    node = onnx.helper.make_node(
        *("GroupQueryAttention", list(feed), ["out", "new_k", "new_v"]),
        domain="com.microsoft",
        num_heads=2,
        kv_num_heads=1,
        do_rotary=int(rotary),
    )
    given = [info(n, onnx.helper.np_dtype_to_tensor_dtype(a.dtype), a.shape) for n, a in feed.items()]
    graph = onnx.helper.make_graph([node], "attention", given, [info("out", onnx.TensorProto.FLOAT, None)])
    opsets = [onnx.helper.make_opsetid("", 23), onnx.helper.make_opsetid("com.microsoft", 1)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=11)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        session.run(None, feed)
    except Exception as error:  # ONNX Runtime raises types of its own
        if "head_size" not in str(error):
            raise
        return False
    return True


def test_head_sizes_are_refused_as_the_runtime_refuses_them(models: Models) -> None:
    for size in (8, 12, 16, 20, 24, 40, 48, 80):
        assert attends(size, rotary=True) == (size % 16 == 0)
        assert attends(size, rotary=False) == (size % 8 == 0)
        planned = functools.partial(build_decoder, dtype=torch.float32, kernel="qmoe")
        heads = open_source(models.tiny("qwen3_moe", head_dim=size))
        latent = open_source(models.tiny("deepseek_v3", kv_lora_rank=size))  # with 16 rotated values beside
        if size % 16:
            with pytest.raises(UnsupportedError, match=f"Heads of {size} values can not be .* multiples of 16"):
                planned(heads)
        else:
            assert planned(heads).caches[0].size == size
        if size % 8:
            with pytest.raises(UnsupportedError, match=f"Latent heads of {size + 16} values .* multiples of 8"):
                planned(latent)
        else:
            assert planned(latent).caches[0].size == size + 16


@pytest.mark.parametrize(("key", "options"), [("qwen3_moe", {"head_dim": 48}), ("deepseek_v3", {"kv_lora_rank": 40})])
def test_unusual_head_sizes_run(models: Models, key: str, options: dict[str, int]) -> None:
    folder = models.tiny(key, **options)
    found = onnx_logits(models.onnx(folder), tokens_of(folder), PREFILL)
    assert relative_error(found, models.own_logits(folder)) < 1e-4


def test_rotary_tables_are_made_in_pieces(tiny_copy: Callable[..., Path]) -> None:
    folder, context = tiny_copy("qwen3_moe"), 400_001
    tiny_models.edit_config(folder, max_position_embeddings=context)
    decoder = build_decoder(open_source(folder), dtype=torch.float32, kernel="qmoe")
    (cos,) = (entry for entry in decoder.files["model.embedding.data"] if entry.name == "model.rotary_emb.cos")
    pieces = [torch.frombuffer(bytearray(piece), dtype=torch.float32) for piece in cos.data()]
    assert len(pieces) > 1
    assert max(piece.nbytes for piece in pieces) <= 16 << 20
    table = torch.cat(pieces).view(context, 16)
    frequencies = 1.0 / (10000.0 ** (torch.arange(0, 32, 2).float() / 32))  # fp32, as transformers makes them
    for position in (0, 1, 131_071, 131_072, 262_143, 262_144, context - 1):  # beside the seams too
        assert torch.allclose(table[position].double(), (position * frequencies.double()).cos(), atol=1e-6)
