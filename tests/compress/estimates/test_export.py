"""Sizes of exports foretold from the original alone, against exports that were made."""

from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_models
import torch
from stage_runs import keep_of, quantized_folder

from moepress.compress.budget.sizes import included_linears
from moepress.compress.estimates.export import Pressed, gptq_bytes, onnx_bytes_after
from moepress.compress.estimates.figures import figures_of
from moepress.compress.gptq.include import Include
from moepress.compress.gptq.layer_bits import settle_bits
from moepress.converters.onnx.export import OnnxRequest, plan_onnx
from moepress.converters.safetensors.artifact import Artifact, open_artifact
from moepress.converters.safetensors.scheme import Scheme
from moepress.models.storage.checkpoint import Checkpoint, open_checkpoint
from moepress.stages.export import export_stage
from moepress.stages.places import Output

MLPS = (Include.SHARED, Include.DENSE)  # the tiny attention has widths that GPTQ does not pack
EVERYTHING = tuple(Include)


def weights_bytes(source: Checkpoint | Artifact) -> int:
    """Of all weights of the graph, without the graph and the gaps between pages."""
    return sum(entry.bytes for entries in plan_onnx(source, OnnxRequest()).files.values() for entry in entries)


def quantized(folder: Path, out: Path, bits: dict[int, int], include: tuple[Include, ...]) -> tuple[Artifact, Pressed]:
    """Pruned to half of the experts; groups of 16."""
    source, scheme = open_checkpoint(folder), Scheme(bits=bits.get(-1, 4), group_size=16)
    count = source.shape.experts // 2
    own = {layer: bits[layer] for layer in bits if layer in source.outline.moe_layers}
    own = own | {n: scheme.bits for n in source.outline.moe_layers if own and n not in own}
    settled = settle_bits(source, scheme, own, include)[1]
    windows = tiny_models.windows(source.shape.vocabulary, count=4, length=16)
    quantized_folder(
        folder, windows, out, keep=keep_of(source, count), scheme=scheme, include=include, layer_bits=settled
    )
    artifact = open_artifact(out)
    linears = included_linears(source, include)
    return artifact, Pressed(size=artifact.total_bytes, count=count, scheme=scheme, layer_bits=own, linears=linears)


@pytest.mark.parametrize("include", [(), EVERYTHING], ids=["experts", "all"])
@pytest.mark.parametrize("bits", [{}, {1: 8, 2: 2}], ids=["uniform", "mixed"])
@pytest.mark.parametrize("key", ["qwen2_moe", "deepseek_v3"])
def test_weights_of_an_onnx_export_are_foretold_to_the_byte(
    tiny_model: Callable[..., Path], tmp_path: Path, key: str, bits: dict[int, int], include: tuple[Include, ...]
) -> None:
    folder = tiny_model(key, dtype=torch.bfloat16)
    source = open_checkpoint(folder)
    tied = "lm_head.weight" not in source.shapes
    include = tuple(part for part in include if not (tied and part is Include.LM_HEAD))
    artifact, pressed = quantized(folder, tmp_path / "q", bits, include)
    bias = source.family.rule.bias
    found = onnx_bytes_after(weights_bytes(source), figures_of(source), pressed, bias=bias)
    assert found == weights_bytes(artifact)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("key", "dtype"), [("mixtral", torch.float32), ("deepseek_v3", torch.bfloat16)])
def test_a_gptq_export_is_foretold_to_the_byte(
    tiny_model: Callable[..., Path], tmp_path: Path, key: str, dtype: torch.dtype, bits: int
) -> None:
    folder = tiny_model(key, dtype=dtype)
    include = MLPS if bits == 4 else ()
    _, pressed = quantized(folder, tmp_path / "q", {-1: bits}, include)
    made = export_stage(str(tmp_path / "q"), Output(folder=tmp_path / "gptq"), "gptq")
    assert gptq_bytes(figures_of(open_checkpoint(folder)), pressed) == made.bytes_after
