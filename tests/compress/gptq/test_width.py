"""One expert of DeepSeek-R1 in its true width, from fp8 on disk to packed codes on disk and back, bit for bit."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationScheme
from r1_models import small_r1
from torch import Tensor
from transformers.integrations.finegrained_fp8 import _dequantize_fp8_weight

from moepress.calibration.hessian import gram, shares
from moepress.compress.gptq.grid import dequantize
from moepress.compress.gptq.options import SolverOptions
from moepress.compress.gptq.solver import Solved, solve
from moepress.converters.safetensors import compressed_tensors, compressed_tensors_config, gptq, gptq_config
from moepress.converters.safetensors.artifact import dense, open_artifact
from moepress.converters.safetensors.scheme import Scheme
from moepress.models.storage.checkpoint import Checkpoint, open_checkpoint
from moepress.models.storage.experts import read_expert
from moepress.models.storage.tensors import read_tensor, tensor_entry
from moepress.models.storage.writer import write_json, write_shard

HIDDEN, WIDTH = 7168, 2048
G128 = Scheme(bits=4, group_size=128)
# One MoE layer of one routed and one shared expert, 90 MB; everything that is not an expert is tiny.
ONE_EXPERT: dict[str, Any] = {
    "dense_layers": 0,
    "moe_layers": 1,
    "experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 1,
    "hidden_size": HIDDEN,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "vocab_size": 32,
}


def checkpoint(folder: Path, width: int) -> Checkpoint:
    return open_checkpoint(small_r1(folder, moe_intermediate_size=width, **ONE_EXPERT))


def by_transformers(source: Checkpoint, name: str) -> Tensor:
    """The stored bytes, dequantized by transformers."""
    weight, scale = (read_tensor(source.stored[n]) for n in (name, f"{name}_scale_inv"))
    assert weight.dtype == torch.float8_e4m3fn
    assert scale.unique().numel() > 0.9 * scale.numel()  # scales that are all alike could be mixed up unseen
    theirs: Tensor = _dequantize_fp8_weight(weight, scale, [128, 128], torch.float32)
    return theirs


@pytest.mark.parametrize("width", [WIDTH, WIDTH + 64], ids=["whole-blocks", "cut-off-blocks"])
def test_an_expert_is_read_as_by_transformers(tmp_path: Path, width: int) -> None:
    source = checkpoint(tmp_path / "r1", width)
    expert = read_expert(source, 0, 0)
    assert expert.gate.shape == expert.up.shape == (width, HIDDEN)
    assert expert.down.shape == (HIDDEN, width)
    for name, ours in zip(source.family.expert_names(0, 0), (expert.gate, expert.up, expert.down), strict=True):
        theirs = by_transformers(source, name)
        assert ours.dtype == torch.float32
        assert torch.equal(ours, theirs), name


def hessian(columns: int) -> Tensor:
    """Of 1,024 tokens whose columns are correlated and of different sizes, drawn towards that of 1,024 others."""
    generator = torch.Generator().manual_seed(columns)
    mixing = torch.randn(256, columns, generator=generator) / 16
    spread = torch.randn(columns, generator=generator).mul_(0.5).exp_()

    def tokens() -> Tensor:
        common = torch.randn(1024, 256, generator=generator) @ mixing
        return common.add_(torch.randn(1024, columns, generator=generator), alpha=0.3).mul_(spread)

    own, pooled = shares(1024, 1024.0, 128.0)
    return gram(tokens()).mul_(own).add_(gram(tokens()).div_(1024), alpha=pooled)


def solved_matrices(source: Checkpoint) -> dict[str, Solved]:
    """Gate and up as one matrix, as they are solved in a run, and down; by module name."""
    expert, names = read_expert(source, 0, 0), source.family.expert_names(0, 0)
    gate, up, down = (name.removesuffix(".weight") for name in names)
    options = SolverOptions(sweeps=0)
    both = solve(
        torch.cat((expert.gate, expert.up))[None],
        hessian(HIDDEN)[None],
        G128,
        scale_dtype=torch.bfloat16,
        options=options,
    )
    last = solve(expert.down[None], hessian(WIDTH)[None], G128, scale_dtype=torch.bfloat16, options=options)
    assert not both.rounded.any()
    assert not last.rounded.any()
    halves = (slice(0, WIDTH), slice(WIDTH, None))
    first, second = (replace(both, codes=both.codes[:, half], scales=both.scales[:, half]) for half in halves)
    return {gate: first, up: second, down: last}


def written(folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Path:
    folder.mkdir()
    write_shard(folder / "model.safetensors", [tensor_entry(name, tensor) for name, tensor in tensors.items()])
    write_json(folder / "config.json", config)
    return folder


def by_compressed_tensors(tensors: Mapping[str, Tensor], module: str) -> Tensor:
    """The library's own reading of one matrix."""
    config = compressed_tensors_config.quantization_config(G128, [])["config_groups"]["group_0"]
    parts = {suffix.removeprefix("."): tensors[module + suffix] for suffix in compressed_tensors_config.SUFFIXES}
    out = PackedQuantizationCompressor.decompress(parts, QuantizationScheme(**config))
    weight: Tensor = out["weight"]
    return weight


def by_formula(tensors: Mapping[str, Tensor], module: str) -> Tensor:
    """A 4-bit GPTQ matrix from the table in gptq_layout's docstring: 8 codes to a word, zeros stored less one."""
    words, zeros, scales, group = (tensors[f"{module}.{part}"] for part in ("qweight", "qzeros", "scales", "g_idx"))
    shifts = torch.arange(8, dtype=torch.int32) * 4
    codes_IO = (words[:, None, :] >> shifts[:, None] & 15).flatten(0, 1)
    zeros_GO = (zeros[:, :, None] >> shifts & 15).flatten(1) + 1
    return ((codes_IO - zeros_GO[group]).float() * scales.float()[group]).T


@pytest.mark.slow
def test_packed_codes_are_what_the_solver_said(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "r1", WIDTH)
    matrices = solved_matrices(source)
    packed: dict[str, Tensor] = {}
    halves: dict[str, Tensor] = {}
    for module, solved in matrices.items():
        codes, scales = solved.codes[0], solved.scales[0]
        packed |= compressed_tensors.layer_tensors(module, codes, scales, G128, torch.bfloat16)
        halves |= gptq.layer_tensors(module, codes, scales, G128)
        assert gptq.half_scale_error(scales) == 0
    plain = {key: value for key, value in source.config.items() if key != "quantization_config"}
    folders = (
        written(
            tmp_path / "ct",
            packed,
            plain | {"quantization_config": compressed_tensors_config.quantization_config(G128, [])},
        ),
        written(tmp_path / "gptq", halves, plain | {"quantization_config": gptq_config.quantize_config(G128)}),
    )
    for folder, layout, other_reader in zip(
        folders, ("compressed-tensors", "gptq"), (by_compressed_tensors, by_formula), strict=True
    ):
        artifact = open_artifact(folder)
        assert artifact.layout == layout
        tensors = {name: read_tensor(entry) for name, entry in artifact.stored.items()}
        for module, solved in matrices.items():
            name, expected = f"{module}.weight", dequantize(solved.codes, solved.scales, G128)[0]
            codes, scales = artifact.codes(name)
            assert torch.equal(codes, solved.codes[0])
            assert torch.equal(scales.float(), solved.scales[0])
            assert codes.unique().numel() == 16
            assert artifact.shapes[name] == expected.shape
            assert torch.equal(replace(artifact, exact=True).read(name), expected)
            rounded = dense(solved.codes[0], scales)  # as runtimes multiply: in the scales' dtype
            assert torch.equal(artifact.read(name), rounded)
            others = other_reader(tensors, module)
            assert torch.equal(
                others.to(torch.float32), (rounded if others.dtype == scales.dtype else expected).float()
            )
