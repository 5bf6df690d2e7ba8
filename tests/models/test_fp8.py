"""Block-scaled fp8 against a slow loop and against transformers."""

from types import SimpleNamespace

import pytest
import tiny_models
import torch
from torch import Tensor

from moepress.models.fp8 import dequantize_blocks


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
