"""GGUF's block types: our bytes, taken apart and put together, against the `gguf` package's dequantizers."""

import gguf
import numpy as np
import pytest
import torch

from moepress.models.storage.block_types import BLOCK_SUFFIXES, TYPES
from moepress.models.storage.blocks import Blocks, group_scales, pack, unpack, values

ROWS, COLUMNS = 6, 512


def random_bytes(name: str, seed: int = 0) -> torch.Tensor:
    """Blocks with any codes and integers, and finite fp16 numbers."""
    kind, generator = TYPES[name], torch.Generator().manual_seed(seed)
    data = torch.randint(0, 256, (ROWS, kind.row_bytes(COLUMNS)), generator=generator, dtype=torch.uint8)
    found = unpack(kind, data)
    size = torch.rand(found.d.shape, generator=generator) * 0.01 - 0.005
    d = found.d % 140 + 50 if name == "MXFP4" else size.half()
    dmin = None if found.dmin is None else (torch.rand(found.dmin.shape, generator=generator) * 0.01).half()
    return pack(kind, Blocks(codes=found.codes, d=d, scales=found.scales, dmin=dmin, minima=found.minima))


@pytest.mark.parametrize("name", TYPES)
def test_the_gguf_package_reads_the_same_numbers_bit_for_bit(name: str) -> None:
    kind, data = TYPES[name], random_bytes(name)
    wanted = gguf.quants.dequantize(data.numpy(), gguf.GGMLQuantizationType(kind.number))
    found = values(kind, unpack(kind, data))
    assert found.shape == (ROWS, COLUMNS)
    np.testing.assert_array_equal(found.numpy(), wanted)


@pytest.mark.parametrize("name", TYPES)
def test_taking_apart_and_packing_gives_the_same_bytes(name: str) -> None:
    kind, data = TYPES[name], random_bytes(name, seed=1)
    assert torch.equal(pack(kind, unpack(kind, data)), data)


@pytest.mark.parametrize("name", TYPES)
def test_every_code_and_integer_has_a_place_of_its_own(name: str) -> None:
    kind = TYPES[name]
    found = unpack(kind, random_bytes(name))
    codes = torch.arange(ROWS * COLUMNS).view(ROWS, COLUMNS) % (1 << kind.bits)
    scales = (
        None
        if found.scales is None
        else torch.arange(found.scales.numel()).view_as(found.scales) % (1 << kind.scale_bits)
    )
    minima = (
        None
        if found.minima is None
        else (torch.arange(found.minima.numel()) * 5).view_as(found.minima) % (1 << kind.scale_bits)
    )
    blocks = Blocks(
        codes=codes.to(torch.uint8),
        d=found.d,
        scales=None if scales is None else scales.to(torch.uint8),
        dmin=found.dmin,
        minima=None if minima is None else minima.to(torch.uint8),
    )
    again = unpack(kind, pack(kind, blocks))
    for field in ("codes", "d", "scales", "dmin", "minima"):
        ours, theirs = getattr(blocks, field), getattr(again, field)
        assert (ours is None) == (theirs is None), field
        assert ours is None or torch.equal(ours, theirs), field


@pytest.mark.parametrize("name", TYPES)
def test_sizes_are_those_of_the_gguf_package(name: str) -> None:
    kind = TYPES[name]
    assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind.number)] == (kind.columns, kind.size)
    assert gguf.GGMLQuantizationType(kind.number).name == name


def test_rows_that_are_no_whole_blocks_are_refused() -> None:
    with pytest.raises(ValueError, match="800 columns"):
        TYPES["Q4_K"].row_bytes(800)
    assert TYPES["Q4_K"].row_bytes(768) == 3 * 144


def test_a_groups_scale_is_the_product_in_fp32() -> None:
    kind = TYPES["Q4_K"]
    found = unpack(kind, random_bytes("Q4_K"))
    scale, offset = group_scales(kind, found)
    assert scale.shape == (ROWS, COLUMNS // 32)
    assert offset is not None
    assert offset.le(0).all()
    assert found.scales is not None
    assert scale[0, 3] == found.d[0, 0].float() * found.scales[0, 3].float()


def test_suffixes_exclude_each_other() -> None:
    for suffix in BLOCK_SUFFIXES:
        assert [other for other in BLOCK_SUFFIXES if f"x.weight{suffix}".endswith(other)] == [suffix]
