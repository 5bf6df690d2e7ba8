"""Block-scaled fp8 against a slow loop and against transformers."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny_models
import torch
from r1_models import DIVISIBLE, small_r1
from torch import Tensor

from moepress.models.storage.checkpoint import open_checkpoint
from moepress.models.storage.fp8 import dequantize_blocks


def slow(weight: Tensor, scale: Tensor, block: tuple[int, int]) -> Tensor:
    out = torch.empty(weight.shape, dtype=torch.float32)
    for i in range(weight.shape[0]):
        for j in range(weight.shape[1]):
            out[i, j] = weight[i, j].float() * scale[i // block[0], j // block[1]]
    return out


def random_matrix(rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows * 1000 + columns))


@pytest.mark.parametrize("size", [(16, 24), (17, 24), (16, 25), (9, 7), (1, 1), (8, 13), (3, 50)])
@pytest.mark.parametrize("block", [(8, 8), (8, 12), (128, 128), (1, 4)])
def test_blocks_are_dequantized_as_by_a_slow_loop(size: tuple[int, int], block: tuple[int, int]) -> None:
    weight, scale = tiny_models.fp8_blocks(random_matrix(*size), block)
    out = dequantize_blocks(weight, scale, block)
    assert out.dtype == torch.float32
    assert torch.equal(out, slow(weight, scale, block))


def test_dequantized_weights_are_near_the_original() -> None:
    matrix = random_matrix(50, 70)
    out = dequantize_blocks(*tiny_models.fp8_blocks(matrix, (16, 16)), (16, 16))
    # e4m3 has 3 bits of mantissa: half a step is 1/16 of the value; below 2^-6 of the scale steps are constant.
    assert ((out - matrix).abs() <= matrix.abs() / 16 + matrix.abs().max() / 448 / 512).all()


def test_bf16_scales_and_the_input_stay_as_they_are() -> None:
    weight, scale = tiny_models.fp8_blocks(random_matrix(8, 8), (4, 4))
    before = weight.clone()
    scale = scale.bfloat16()
    assert torch.equal(dequantize_blocks(weight, scale, (4, 4)), slow(weight, scale.float(), (4, 4)))
    assert torch.equal(weight.view(torch.uint8), before.view(torch.uint8))


def test_transformers_dequantizes_the_same() -> None:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    weight, scale = tiny_models.fp8_blocks(random_matrix(256, 384), (128, 128))
    theirs = Fp8Dequantize(SimpleNamespace())._dequantize_one(weight, scale, torch.float32)
    assert torch.equal(dequantize_blocks(weight, scale, (128, 128)), theirs.reshape(256, 384))


@pytest.mark.parametrize("shape", [(2, 1), (1, 2), (3, 2), (2, 2, 1)])
def test_scales_that_do_not_fit_are_refused(shape: tuple[int, ...]) -> None:
    weight, _ = tiny_models.fp8_blocks(random_matrix(9, 8), (8, 4))
    with pytest.raises(ValueError, match="block scales"):
        dequantize_blocks(weight, torch.ones(shape), (8, 4))


@pytest.mark.parametrize("size", [(256, 384), (576, 512), (300, 200), (64, 130)])
def test_cut_off_blocks_are_dequantized_as_by_transformers(size: tuple[int, int]) -> None:
    """576 rows are those of R1's kv_a_proj_with_mqa: four blocks and a half."""
    from transformers.integrations.finegrained_fp8 import _dequantize_fp8_weight

    weight, scale = tiny_models.fp8_blocks(random_matrix(*size), (128, 128))
    theirs = _dequantize_fp8_weight(weight, scale, [128, 128], torch.float32)
    assert torch.equal(dequantize_blocks(weight, scale, (128, 128)), theirs)


def test_transformers_loads_the_weights_that_we_read(tmp_path: Path) -> None:
    """Its own loader, on a made R1 whose blocks divide every matrix; other sizes it refuses."""
    from transformers import AutoModelForCausalLM, FineGrainedFP8Config

    folder = small_r1(tmp_path / "r1", **DIVISIBLE)
    source = open_checkpoint(folder)
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=FineGrainedFP8Config(dequantize=True), dtype=torch.float32
    )
    theirs = model.state_dict()
    stored = [name for name, entry in source.stored.items() if entry.dtype == "F8_E4M3"]
    assert len(stored) == 8 + 2 * (8 + 3 * 32)
    for name in stored:
        if ".experts." not in name:
            assert torch.equal(source.read(name), theirs[name]), name
    for layer, expert in ((1, 0), (1, 31), (2, 7)):
        gate, up, down = (source.read(name) for name in source.family.expert_names(layer, expert))
        block = f"model.layers.{layer}.mlp.experts"
        assert torch.equal(torch.cat((gate, up)), theirs[f"{block}.gate_up_proj"][expert])
        assert torch.equal(down, theirs[f"{block}.down_proj"][expert])
