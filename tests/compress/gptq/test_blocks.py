"""GPTQ on GGUF's grids: what is searched lies on the grid, beats ggml's own, and the solver's codes beat rounding."""

from pathlib import Path

import gguf
import libgguf
import numpy as np
import pytest
import torch
from stage_runs import command
from torch import Tensor

from moepress.compress.gptq.block_choice import GRIDS, PRESETS, BlockChoice, fitting, role_of
from moepress.compress.gptq.block_scales import grid_of, search_blocks, stored_codes
from moepress.compress.gptq.block_solver import rounded_blocks, solve_blocks
from moepress.compress.gptq.options import SolverOptions
from moepress.errors import UsageError
from moepress.models.storage.block_types import TYPES, BlockType
from moepress.models.storage.blocks import pack, values
from moepress.models.storage.checkpoint import open_checkpoint

SOLVED = [name.upper() for name in GRIDS]


def problem(rows: int = 24, columns: int = 512, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Weights with some outliers, and the Hessian of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) * 0.02
    weight[torch.rand(rows, columns, generator=generator) < 0.01] *= 4
    inputs = torch.randn(1500, columns, generator=generator) * (0.3 + torch.rand(columns, generator=generator))
    inputs += torch.randn(1500, 6, generator=generator) @ torch.randn(6, columns, generator=generator)
    return weight, inputs.T @ inputs / 1500


def rounded(kind: BlockType, weight: Tensor, importance: Tensor) -> Tensor:
    """Rounding to nearest on the scales that were searched."""
    scales = search_blocks(kind, weight, importance)
    above = weight if scales.offset is None else weight - scales.offset.repeat_interleave(kind.group, dim=1)
    levels = grid_of(kind).nearest(above.unflatten(1, (-1, kind.group)) / scales.scale[..., None]).flatten(1)
    return values(kind, scales.blocks(stored_codes(kind, grid_of(kind).codes(levels))))


@pytest.mark.parametrize("name", SOLVED)
def test_the_search_is_no_worse_than_ggmls_own(name: str) -> None:
    kind, (weight, hessian) = TYPES[name], problem()
    importance = hessian.diagonal().clone()
    number = gguf.GGMLQuantizationType(kind.number)
    theirs = libgguf.quantize_rows(weight.numpy(), number, imatrix=importance.numpy())
    found = torch.from_numpy(gguf.quants.dequantize(np.asarray(theirs).view(np.uint8).reshape(24, -1), number))

    def error(other: Tensor) -> float:
        return float(((other - weight).square() * importance).sum())

    assert error(rounded(kind, weight, importance)) < 1.02 * error(found)


@pytest.mark.parametrize("name", SOLVED)
def test_what_is_stored_is_what_was_solved(name: str) -> None:
    kind, (weight, hessian) = TYPES[name], problem()
    found = solve_blocks(weight[None], hessian[None], kind, SolverOptions())
    matrix = found.matrix(0)
    dense = matrix.dense()
    data = pack(kind, matrix.blocks)
    number = gguf.GGMLQuantizationType(kind.number)
    np.testing.assert_array_equal(gguf.quants.dequantize(data.numpy(), number), dense.numpy())
    left = weight - dense
    assert float(((left @ hessian) * left).sum()) == pytest.approx(float(found.solved.loss[0]), rel=2e-3)


@pytest.mark.parametrize("name", SOLVED)
def test_solving_beats_rounding_by_far(name: str) -> None:
    kind, (weight, hessian) = TYPES[name], problem()

    def loss(dense: Tensor) -> float:
        left = weight - dense
        return float(((left @ hessian) * left).sum())

    nearest = loss(rounded(kind, weight, hessian.diagonal().clone()))
    plain = loss(solve_blocks(weight[None], hessian[None], kind, SolverOptions(refits=0)).matrix(0).dense())
    refitted = loss(solve_blocks(weight[None], hessian[None], kind, SolverOptions()).matrix(0).dense())
    assert plain < 0.75 * nearest
    assert refitted <= plain  # of K types a scale has 63 values, and may be the best of them already
    if not kind.scale_bits:
        assert refitted < plain


def test_a_group_of_zeros_stays_one() -> None:
    weight, _ = problem()
    weight[3, 32:64] = 0
    for name in ("Q4_K", "Q3_K", "Q2_K", "Q6_K", "IQ4_XS", "Q4_0"):
        kind = TYPES[name]
        assert float(rounded_blocks(kind, weight).dense()[3, 32:64].abs().max()) < 1e-3, name


def test_widths_take_what_llama_cpp_falls_back_to() -> None:
    assert [fitting(name, 1408).name for name in ("Q4_K", "Q3_K", "Q2_K", "Q5_K", "Q6_K", "IQ4_XS")] == [
        *("Q5_0", "Q4_0", "Q4_0", "Q5_1", "Q8_0", "IQ4_NL")
    ]
    assert fitting("Q4_K", 1024).name == "Q4_K"
    with pytest.raises(UsageError, match="100 columns"):
        fitting("Q4_K", 100)


def test_a_mix_gives_bits_where_llama_quantize_does() -> None:
    choice = BlockChoice(name="Q4_K_M", layers=16, experts=64, shared_heads=4)
    assert choice.of("model.layers.0.mlp.down_proj.weight", 0, 512).name == "Q6_K"
    assert choice.of("model.layers.3.mlp.down_proj.weight", 3, 512).name == "Q4_K"
    assert choice.of("lm_head.weight", None, 512).name == "Q6_K"
    assert choice.of("model.embed_tokens.weight", None, 512).name == "Q4_K"
    eight = BlockChoice(name="Q4_K_M", layers=16, experts=8, shared_heads=4)
    names = [f"model.layers.5.self_attn.{leaf}.weight" for leaf in ("v_proj", "k_proj", "o_proj")]
    assert [eight.of(name, 5, 512).name for name in names] == ["Q8_0", "Q8_0", "Q5_K"]
    assert {BlockChoice(name=name, layers=4, experts=4, shared_heads=1).bits for name in PRESETS} == {2, 3, 4, 5}
    assert role_of("model.layers.0.block_sparse_moe.experts.3.w2.weight") == "down"


@pytest.mark.parametrize("grid", ["q4_0", "q4_1", "Q4_K_M"])
def test_a_folder_of_blocks_is_read_like_any_other(grid: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, _, said = command("quantize", "demo", "--grid", grid, "-o", out, "--tokens", "2048", "--include", "attention")
    assert code == 0, said
    if grid == "Q4_K_M":
        code, _, said = command("export", out, "--to", "onnx", "-o", tmp_path / "onnx")
        assert code == 5
        assert "embeddings lie in blocks of GGUF" in said
    made, base = open_checkpoint(out), open_checkpoint(Path(__file__).parents[3] / "models" / "demo")
    name = (
        made.family.expert_names(0, 1)[0]
        if made.family.expert_names(0, 1)[0] in made.shapes
        else next(n for n in made.shapes if ".experts.1.gate_proj" in n)
    )
    exact = base.read(name).float()
    error = float((made.read(name) - exact).norm() / exact.norm())
    assert 0 < error < 0.15
    assert made.packed[name].kind is not None
    assert command("quantize", "demo", "--grid", grid, "--bits", "4", "-o", tmp_path / "x")[0] == 2


def test_a_killed_run_on_a_grid_ends_with_the_same_bytes(tmp_path: Path) -> None:
    arguments = ("--grid", "q4_0", "--tokens", "2048")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert command("quantize", "demo", *arguments, "-o", whole)[0] == 0
    for _ in range(20):
        assert command("quantize", "demo", *arguments, "-o", parts, "--max-pieces", "1", "--resume")[0] == 0
        if parts.exists():
            break
    for file in sorted(whole.glob("*.safetensors")):
        assert file.read_bytes() == (parts / file.name).read_bytes(), file.name
