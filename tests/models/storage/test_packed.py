"""Packed weights against the libraries that write them, and GPTQ and AWQ against slow loops by their layouts."""

import itertools
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from moepress.errors import InvalidInputError, MoepressError, UnsupportedError
from moepress.models.storage import unpack
from moepress.models.storage.packed import Packed, Packing, find_packed
from moepress.models.storage.placed import onto
from moepress.models.storage.safetensors_file import Stored, read_header
from moepress.models.storage.tensors import DTYPE_NAMES, tensor_bytes
from moepress.models.storage.writer import Entry, write_shard

Tensors = dict[str, Tensor]
E8M0, E4M3 = torch.float8_e8m0fnu, torch.float8_e4m3fn
NAMES = {**DTYPE_NAMES, E8M0: "F8_E8M0"}
MODULE = "model.layers.0.mlp.experts.3.up_proj"
WEIGHT = f"{MODULE}.weight"
FUSED = "model.layers.0.mlp.experts.gate_up_proj"
FP8_CONFIG = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
GPTQ_CONFIG = {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": True}}


def stored_in(folder: Path, tensors: Mapping[str, Tensor], as_f4: str = "") -> dict[str, Stored]:
    """The header of a file of these tensors; one may be written as F4, which torch counts by pairs."""
    entries = []
    for name, tensor in tensors.items():
        data, shape = tensor_bytes(tensor), tuple(tensor.shape)
        entries.append(
            Entry(
                name=name,
                dtype="F4" if name == as_f4 else NAMES[tensor.dtype],
                shape=(*shape[:-1], 2 * shape[-1]) if name == as_f4 else shape,
                bytes=data.nbytes,
                data=lambda data=data: iter((data,)),  # type: ignore[misc]
            )
        )
    file = folder / "model.safetensors"
    write_shard(file, entries)
    return read_header(file)


def only(config: Mapping[str, Any], stored: Mapping[str, Stored]) -> Packed:
    (found,) = find_packed(config, stored).values()
    assert set(found.part_names) == set(stored)
    return found


def dequantize(packed: Packed, index: int | None = None, *, allow_nonfinite: bool = False) -> Tensor:
    """`unpack.dequantize`, and the same on a device that has no numbers: all that it works with must be there."""
    dense = unpack.dequantize(packed, index, allow_nonfinite=allow_nonfinite)
    with onto(torch.device("meta")):
        placed = unpack.dequantize(packed, index, allow_nonfinite=allow_nonfinite)
    assert (placed.device.type, placed.shape, placed.dtype) == ("meta", dense.shape, dense.dtype)
    return dense


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(7)


def bytes_of(*shape: int, high: int = 256) -> Tensor:
    return torch.randint(0, high, shape, generator=generator(), dtype=torch.uint8)


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=generator())


def fp8_of(*shape: int) -> Tensor:
    return normal(*shape).mul(50).to(E4M3)


def powers(*shape: int) -> Tensor:
    """E8M0 scales near one."""
    return torch.randint(120, 132, shape, generator=generator(), dtype=torch.uint8)


def words_of(*shape: int) -> Tensor:
    return torch.randint(-(2**31), 2**31, shape, generator=generator(), dtype=torch.int64).to(torch.int32)


# fp8


def slow_fp8(codes: Tensor, scales: Tensor, block: tuple[int, int]) -> Tensor:
    grown = scales.float().repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    return codes.float() * grown[: codes.shape[0], : codes.shape[1]]


@pytest.mark.parametrize("spelling", [f"{WEIGHT}_scale_inv", f"{WEIGHT}_scale", f"{MODULE}.scale"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, E8M0, torch.uint8])
def test_fp8_blocks_are_read_as_by_transformers(tmp_path: Path, spelling: str, dtype: torch.dtype) -> None:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    codes, exponents = fp8_of(256, 384), powers(2, 3)
    scales = exponents if dtype == torch.uint8 else exponents.view(E8M0).to(dtype)
    found = only(FP8_CONFIG, stored_in(tmp_path, {WEIGHT: codes, spelling: scales}))
    assert (found.packing, found.name, found.shape, found.block) == (Packing.FP8, WEIGHT, (256, 384), (128, 128))
    theirs = Fp8Dequantize(SimpleNamespace())._dequantize_one(codes, scales, torch.float32)
    assert torch.equal(dequantize(found), theirs)


@pytest.mark.parametrize("shape", [(), (1,), (200,), (200, 1), (2, 3)])
def test_the_number_of_fp8_scales_tells_what_they_stand_for(tmp_path: Path, shape: tuple[int, ...]) -> None:
    codes, scales = fp8_of(200, 300), normal(*shape).abs()
    block = {(): (200, 300), (1,): (200, 300), (200,): (1, 300), (200, 1): (1, 300)}.get(shape, (128, 128))
    parts = {WEIGHT: codes, f"{WEIGHT}_scale": scales, f"{MODULE}.input_scale": torch.ones(1)}
    found = only({}, stored_in(tmp_path, parts))
    grid = scales.reshape(-1, 1) if len(shape) < 2 else scales
    assert torch.equal(dequantize(found), slow_fp8(codes, grid, block))


@pytest.mark.parametrize("shape", [(4, 2, 3), (4,), (4, 1, 1), (4, 200), (4, 200, 1), (4, 1, 300), (4, 300, 1), (1,)])
def test_rows_of_fused_fp8_experts(tmp_path: Path, shape: tuple[int, ...]) -> None:
    codes, scales = fp8_of(4, 200, 300), normal(*shape).abs()
    blocks = {(4, 2, 3): (128, 128), (4, 200): (1, 300), (4, 200, 1): (1, 300)}
    block = (200, 1) if 300 in shape else blocks.get(shape, (200, 300))
    found = only(FP8_CONFIG, stored_in(tmp_path, {FUSED: codes, f"{FUSED}_scale_inv": scales}))
    assert (found.name, found.shape) == (FUSED, (4, 200, 300))
    grids = scales.expand(4) if shape == (1,) else scales
    grid = {(200, 300): (1, 1), (1, 300): (200, 1), (200, 1): (1, 300), (128, 128): (2, 3)}[block]
    want = torch.stack([slow_fp8(codes[e], grids[e].reshape(grid), block) for e in range(4)])
    assert torch.equal(dequantize(found), want)
    for expert in range(4):
        assert torch.equal(dequantize(found, expert), want[expert])


def test_fp8_blocks_of_another_size_are_those_of_the_config(tmp_path: Path) -> None:
    codes, scales = fp8_of(50, 70), normal(4, 3).abs()
    weights = {"num_bits": 8, "strategy": "block", "block_structure": [16, 32]}
    config = {"text_config": {"quantization_config": {"config_groups": {"group_0": {"weights": weights}}}}}
    stored = stored_in(tmp_path, {WEIGHT: codes, f"{WEIGHT}_scale": scales})
    assert torch.equal(dequantize(only(config, stored)), slow_fp8(codes, scales, (16, 32)))
    with pytest.raises(InvalidInputError, match="does not fit"):
        find_packed({}, stored)


# 4-bit floats


def test_mxfp4_experts_are_the_transpose_of_transformers(tmp_path: Path) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks, scales = bytes_of(3, 40, 2, 16), powers(3, 40, 2)
    found = only({}, stored_in(tmp_path, {f"{FUSED}_blocks": blocks, f"{FUSED}_scales": scales}))
    assert (found.packing, found.name, found.shape, found.bits) == (Packing.MXFP4, FUSED, (3, 40, 64), 4)
    theirs = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    assert torch.equal(dequantize(found), theirs.mT)
    assert torch.equal(dequantize(found, 2), theirs[2].mT)


@pytest.mark.parametrize("codes", ["I8", "U8", "F4"])
@pytest.mark.parametrize("scales", [E8M0, torch.uint8])
@pytest.mark.parametrize("suffix", [".scale", ".weight_scale_inv", ".weight_scale"])
def test_mxfp4_matrices_are_read_as_by_transformers(
    tmp_path: Path, codes: str, scales: torch.dtype, suffix: str
) -> None:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    packed_bytes, exponents = bytes_of(24, 48), powers(24, 3).view(scales)
    parts = {WEIGHT: packed_bytes.view(torch.int8) if codes == "I8" else packed_bytes, MODULE + suffix: exponents}
    found = only({}, stored_in(tmp_path, parts, as_f4=WEIGHT if codes == "F4" else ""))
    assert (found.packing, found.shape, found.block) == (Packing.MXFP4, (24, 96), (1, 32))
    theirs = Fp8Dequantize(SimpleNamespace())._dequantize_one(packed_bytes.view(torch.int8), exponents, torch.float32)
    assert torch.equal(dequantize(found), theirs)


def test_every_exponent_is_torchs() -> None:
    every = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(unpack.exponents(every[:255]), every[:255].view(E8M0).float())
    assert unpack.exponents(every[255:]).isnan().all()


def of_compressed_tensors(args: dict[str, Any], tensors: Tensors) -> tuple[Tensors, Tensor]:
    """What the library writes for a weight, and what it reads of it."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    kind = (
        "pack-quantized" if args["type"] == "int" else f"{'nv' if args['group_size'] == 16 else 'mx'}fp4-pack-quantized"
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**args))
    compressor = BaseCompressor.get_value_from_registry(kind)
    written = compressor.compress(dict(tensors), scheme)
    read = compressor.decompress(dict(written), scheme)["weight"]
    return {f"{MODULE}.{part}": tensor for part, tensor in written.items()}, read


def test_nvfp4_of_compressed_tensors(tmp_path: Path) -> None:
    weight = normal(24, 64)
    top = torch.tensor([448 * 6 / float(weight.abs().max())])
    scales = (weight.unflatten(1, (-1, 16)).abs().amax(-1) / 6 * top).to(E4M3).float()
    args = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "symmetric": True}
    parts, theirs = of_compressed_tensors(args, {"weight": weight, "weight_scale": scales, "weight_global_scale": top})
    parts[f"{MODULE}.input_global_scale"] = torch.ones(1)
    found = only({}, stored_in(tmp_path, parts))
    assert (found.packing, found.name, found.shape, found.block) == (Packing.NVFP4, WEIGHT, (24, 64), (1, 16))
    out = dequantize(found)
    assert torch.allclose(out, theirs.float(), rtol=2**-7, atol=0)  # the library computes in bf16
    assert (out - weight).abs().max() < weight.abs().max() / 6


def test_mxfp4_of_compressed_tensors(tmp_path: Path) -> None:
    weight = normal(24, 64)
    scales = weight.unflatten(1, (-1, 32)).abs().amax(-1).div(4).log2().floor().exp2()
    args = {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32, "symmetric": True}
    parts, theirs = of_compressed_tensors(args, {"weight": weight, "weight_scale": scales})
    found = only({}, stored_in(tmp_path, parts))
    assert found.packing is Packing.MXFP4
    assert torch.equal(dequantize(found), theirs.float())


def test_nvfp4_of_modelopt(tmp_path: Path) -> None:
    codes, scales, second = bytes_of(24, 32), normal(24, 4).abs().to(E4M3), torch.tensor(0.37)
    parts = {WEIGHT: codes, f"{WEIGHT}_scale": scales, f"{WEIGHT}_scale_2": second}
    found = only({}, stored_in(tmp_path, {**parts, f"{MODULE}.input_scale": torch.tensor(1.0)}))
    assert (found.packing, found.shape) == (Packing.NVFP4, (24, 64))
    value = [0, 0.5, 1, 1.5, 2, 3, 4, 6]  # E2M1 by its magnitudes; bit 3 is the sign, the low nibble comes first
    want = torch.zeros(24, 64)
    for row, column in itertools.product(range(24), range(64)):
        nibble = int(codes[row, column // 2]) >> 4 * (column % 2) & 15
        scale = scales[row, column // 16].float() * second
        want[row, column] = value[nibble & 7] * (-1 if nibble & 8 else 1) * scale
    assert torch.equal(dequantize(found), want)


# integers of compressed-tensors


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [32, None])
@pytest.mark.parametrize("symmetric", [True, False])
def test_integers_of_compressed_tensors(tmp_path: Path, bits: int, group: int | None, symmetric: bool) -> None:
    weight, groups = normal(20, 96), 96 // (group or 96)
    scales = weight.unflatten(1, (groups, -1)).abs().amax(-1) / 2 ** (bits - 1)
    tensors = {"weight": weight, "weight_scale": scales}
    half = 2 ** (bits - 1)
    if not symmetric:
        shape = (20, groups)
        tensors["weight_zero_point"] = torch.randint(-half, half, shape, generator=generator()).to(torch.int8)
    args = {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": "group" if group else "channel"}
    parts, theirs = of_compressed_tensors({**args, "group_size": group}, tensors)
    config = {"quantization_config": {"config_groups": {"group_0": {"weights": {**args, "group_size": group}}}}}
    for stated in (config, {}):
        found = only(stated, stored_in(tmp_path, parts))
        assert (found.packing, found.name, found.shape) == (Packing.INT4, WEIGHT, (20, 96))
        assert (found.bits, found.block) == (bits, (1, group or 96))
        assert torch.equal(dequantize(found), theirs)


def test_groups_that_the_config_does_not_know_are_refused(tmp_path: Path) -> None:
    stored = stored_in(tmp_path, int4_parts())
    assert only({"quantization_config": {"group_size": 32}}, stored).block == (1, 32)
    with pytest.raises(InvalidInputError, match="weight_scale is F32"):
        find_packed({"quantization_config": {"group_size": 64}}, stored)


def test_a_row_that_fills_its_last_word_in_part(tmp_path: Path) -> None:
    args = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "channel"}
    weight = normal(6, 30)
    parts, theirs = of_compressed_tensors(args, {"weight": weight, "weight_scale": weight.abs().amax(1, True) / 8})
    assert torch.equal(dequantize(only({}, stored_in(tmp_path, parts))), theirs)


def test_a_weight_shape_that_differs_from_its_likes_is_found_when_it_is_read(tmp_path: Path) -> None:
    one, other = "experts.0.up_proj", "experts.1.up_proj"
    parts = {name.replace(MODULE, module): t for module in (one, other) for name, t in int4_parts().items()}
    parts[f"{other}.weight_shape"] = torch.tensor([20, 95])
    found = find_packed({}, stored_in(tmp_path, parts))
    dequantize(found[f"{one}.weight"])
    with pytest.raises(InvalidInputError, match=r"experts\.1\.up_proj\.weight_shape"):
        dequantize(found[f"{other}.weight"])


# GPTQ and AWQ


def slow_gptq(parts: Tensors, bits: int, added: int) -> Tensor:
    """AutoGPTQ 0.7.1, `qlinear_cuda_old.QuantLinear.pack`: code j of a word at bits j * bits; zeros stored less one."""
    words, zeros, scales = (parts[f"{MODULE}.{name}"] for name in ("qweight", "qzeros", "scales"))
    order, per_word = parts[f"{MODULE}.g_idx"], 32 // bits
    inputs, outputs = words.shape[0] * per_word, words.shape[1]
    out = torch.zeros(outputs, inputs)
    for o, i in itertools.product(range(outputs), range(inputs)):
        group = int(order[i])
        code = (int(words[i // per_word, o]) >> bits * (i % per_word)) & (1 << bits) - 1
        zero = ((int(zeros[group, o // per_word]) >> bits * (o % per_word)) & (1 << bits) - 1) + added
        out[o, i] = (code - zero) * scales[group, o].float()
    return out


def gptq_parts(bits: int = 4, *, in_order: bool = False) -> Tensors:
    """Codes of a 48 x 64 matrix in 4 groups, none of whose zeros is the highest code."""
    order = torch.arange(64) // 16
    if not in_order:
        order = order[torch.randperm(64, generator=generator())]
    zeros = words_of(4, 48 * bits // 32) & sum((1 << bits) - 2 << shift for shift in range(0, 31, bits)) % 2**31
    return {
        f"{MODULE}.qweight": words_of(64 * bits // 32, 48),
        f"{MODULE}.qzeros": zeros,
        f"{MODULE}.scales": normal(4, 48).half(),
        f"{MODULE}.g_idx": order.to(torch.int32),
    }


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
def test_gptq_against_a_slow_loop(tmp_path: Path, bits: int, version: str) -> None:
    parts = gptq_parts(bits)
    config = {"quantization_config": {"quant_method": "gptq", "checkpoint_format": version, "desc_act": True}}
    found = only(config, stored_in(tmp_path, parts))
    assert (found.packing, found.name, found.shape, found.bits) == (Packing.GPTQ, WEIGHT, (48, 64), bits)
    assert torch.equal(dequantize(found), slow_gptq(parts, bits, 1 if version == "gptq" else 0))


def test_gptq_groups_in_order_need_no_list_of_them(tmp_path: Path) -> None:
    parts = gptq_parts(in_order=True)
    want = slow_gptq(parts, 4, 1)
    del parts[f"{MODULE}.g_idx"]
    stored = stored_in(tmp_path, parts)
    sidecar = {"bits": 4, "group_size": 16, "desc_act": False}
    assert torch.equal(dequantize(only(sidecar, stored)), want)
    with pytest.raises(InvalidInputError, match="g_idx"):
        find_packed(GPTQ_CONFIG, stored)


@pytest.mark.parametrize(("form", "added"), [("auto_round:auto_gptq", 1), ("auto_round", 0)])
def test_autoround_says_whether_zeros_are_stored_less_one(tmp_path: Path, form: str, added: int) -> None:
    parts = gptq_parts(in_order=True)
    config = {"quantization_config": {"quant_method": "auto-round", "packing_format": form, "group_size": 16}}
    assert torch.equal(dequantize(only(config, stored_in(tmp_path, parts))), slow_gptq(parts, 4, added))


def test_a_v1_zero_of_0_borrows_from_the_next_as_in_gptqmodel() -> None:
    v2 = torch.tensor([0x10F00780 - 2**31, 0x0888_8880], dtype=torch.int64).to(torch.int32)
    v1 = v2 - 0x1111_1111
    assert torch.equal(unpack.one_more(v1, 4), v2)


def awq_parts() -> Tensors:
    return {
        f"{MODULE}.qweight": words_of(64, 5),
        f"{MODULE}.qzeros": words_of(4, 5),
        f"{MODULE}.scales": normal(4, 40).half(),
    }


def test_awq_against_a_slow_loop(tmp_path: Path) -> None:
    """AutoAWQ 0.2, `WQLinear_GEMM.from_linear`: nibble n of a word is output `[0, 2, 4, 6, 1, 3, 5, 7][n]` of eight."""
    parts = awq_parts()
    words, zeros, scales = parts.values()
    want = torch.zeros(40, 64)
    for i, word, nibble in itertools.product(range(64), range(5), range(8)):
        o = 8 * word + [0, 2, 4, 6, 1, 3, 5, 7][nibble]
        code, zero = (int(t) >> 4 * nibble & 15 for t in (words[i, word], zeros[i // 16, word]))
        want[o, i] = (code - zero) * scales[i // 16, o].float()
    config = {"quantization_config": {"quant_method": "awq", "version": "gemm", "group_size": 16}}
    for stated in (config, {}, {"zero_point": True, "q_group_size": 16, "w_bit": 4, "version": "GEMM"}):
        found = only(stated, stored_in(tmp_path, parts))
        assert (found.packing, found.name, found.shape) == (Packing.AWQ, WEIGHT, (40, 64))
        assert torch.equal(dequantize(found), want)
    with pytest.raises(UnsupportedError, match="gemv"):
        find_packed({"quant_method": "awq", "version": "gemv"}, stored_in(tmp_path, parts))


# Damage


def int4_parts() -> Tensors:
    return {
        f"{MODULE}.weight_packed": words_of(20, 12),
        f"{MODULE}.weight_scale": normal(20, 3),
        f"{MODULE}.weight_shape": torch.tensor([20, 96]),
    }


def fp8_parts() -> Tensors:
    return {WEIGHT: fp8_of(256, 256), f"{WEIGHT}_scale_inv": normal(2, 2)}


def fused_parts() -> Tensors:
    return {FUSED: fp8_of(4, 256, 256), f"{FUSED}_scale_inv": normal(4, 2, 2)}


def mxfp4_parts() -> Tensors:
    return {f"{FUSED}_blocks": bytes_of(3, 40, 2, 16), f"{FUSED}_scales": powers(3, 40, 2)}


def v4_parts() -> Tensors:
    return {WEIGHT: bytes_of(24, 48).view(torch.int8), f"{MODULE}.scale": powers(24, 3).view(E8M0)}


def modelopt_parts() -> Tensors:
    scales = normal(24, 4).abs().to(E4M3)
    return {WEIGHT: bytes_of(24, 32), f"{WEIGHT}_scale": scales, f"{WEIGHT}_scale_2": torch.tensor(0.5)}


def nvfp4_parts() -> Tensors:
    codes, scales, second = modelopt_parts().values()
    return {
        f"{MODULE}.weight_packed": codes,
        f"{MODULE}.weight_scale": scales,
        f"{MODULE}.weight_global_scale": second[None],
    }


ALL: dict[str, Callable[[], Tensors]] = {
    "fp8": fp8_parts,
    "fused fp8": fused_parts,
    "mxfp4": mxfp4_parts,
    "deepseek_v4": v4_parts,
    "modelopt": modelopt_parts,
    "nvfp4": nvfp4_parts,
    "int4": int4_parts,
    "gptq": gptq_parts,
    "awq": awq_parts,
}
EVERY_PART = [
    pytest.param(make, part, id=f"{form}-{part}") for form, make in ALL.items() for part in range(len(make()))
]


@pytest.mark.parametrize(("make", "part"), EVERY_PART)
def test_a_missing_part_is_named(tmp_path: Path, make: Callable[[], Tensors], part: int) -> None:
    parts = make()
    gone = list(parts)[part]
    del parts[gone]
    with pytest.raises(InvalidInputError, match=r"missing|belongs to no|does not fit"):
        find_packed(GPTQ_CONFIG, stored_in(tmp_path, parts))


@pytest.mark.parametrize(("make", "part"), EVERY_PART)
@pytest.mark.parametrize("axis", [0, -1])
def test_parts_that_do_not_fit_are_refused(tmp_path: Path, make: Callable[[], Tensors], part: int, axis: int) -> None:
    parts = make()
    name, whole = list(parts.items())[part]
    if whole.dim() == 0:
        parts[name] = torch.ones(3)
    else:
        cut = whole.shape[axis] // 2 if whole.shape[axis] > 2 else whole.shape[axis] + 1
        raw = whole.view(torch.uint8) if whole.dtype in (E8M0, E4M3) else whole
        index = torch.arange(cut) % whole.shape[axis]
        parts[name] = raw.index_select(axis, index).contiguous().view(whole.dtype)
    with pytest.raises(InvalidInputError, match=r"does not fit|no rows and columns"):
        find_packed({"bits": 4, "group_size": 32 if make is int4_parts else 16}, stored_in(tmp_path, parts))


@pytest.mark.parametrize("make", ALL.values(), ids=ALL)
def test_a_scale_that_is_not_finite_is_refused(tmp_path: Path, make: Callable[[], Tensors]) -> None:
    parts = make()
    name = next(name for name in parts if name.endswith(("scale", "scale_inv", "scales")))
    raw = parts[name].contiguous()
    if raw.dtype in (torch.uint8, E8M0, E4M3):
        raw.view(torch.uint8).view(-1)[-1] = 0x7F if raw.dtype == E4M3 else 0xFF
    else:
        raw.view(-1)[-1] = torch.nan
    parts[name] = raw
    stored = stored_in(tmp_path, parts)
    found = only({}, stored)
    with pytest.raises(InvalidInputError, match="NaN or Inf") as refused:
        dequantize(found)
    assert name in str(refused.value)
    assert dequantize(found, allow_nonfinite=True).isnan().any()
    if len(found.shape) == 3:
        assert dequantize(found, 0).isfinite().all()
        with pytest.raises(InvalidInputError, match=rf"\(expert {found.shape[0] - 1}\)"):
            dequantize(found, found.shape[0] - 1)


def test_an_fp8_code_that_is_nan_is_refused(tmp_path: Path) -> None:
    parts = fp8_parts()
    parts[WEIGHT].view(torch.uint8)[3, 5] = 0xFF
    found = only({}, stored_in(tmp_path, parts))
    with pytest.raises(InvalidInputError, match="NaN or Inf"):
        dequantize(found)
    assert dequantize(found, allow_nonfinite=True)[3, 5].isnan()


def test_groups_out_of_range_are_refused(tmp_path: Path) -> None:
    parts = gptq_parts()
    parts[f"{MODULE}.g_idx"][7] = 4
    with pytest.raises(InvalidInputError, match="g_idx names groups"):
        dequantize(only({}, stored_in(tmp_path, parts)))


REFUSED: dict[str, tuple[Tensors, type[MoepressError]]] = {
    "columns grouped out of order": (
        {**int4_parts(), f"{MODULE}.weight_g_idx": torch.zeros(96).int()},
        UnsupportedError,
    ),
    "8-bit integers": ({WEIGHT: torch.zeros(8, 8).char(), f"{WEIGHT}_scale": torch.ones(8, 1)}, UnsupportedError),
    "F8_E5M2": ({WEIGHT: torch.zeros(8, 8).to(torch.float8_e5m2), f"{WEIGHT}_scale": torch.ones(1)}, UnsupportedError),
    "one NVFP4 tensor": (
        {FUSED: bytes_of(2, 8, 8), f"{FUSED}_weight_scale": bytes_of(2, 8, 1).view(E4M3)},
        UnsupportedError,
    ),
    "stored more than once": ({**int4_parts(), WEIGHT: normal(20, 96)}, InvalidInputError),
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_is_not_read_is_called_by_its_name(tmp_path: Path, words: str) -> None:
    tensors, error = REFUSED[words]
    with pytest.raises(error, match=words):
        find_packed({}, stored_in(tmp_path, tensors))


def test_what_is_not_packed_is_left_alone(tmp_path: Path) -> None:
    plain = {
        "model.norm.weight": torch.ones(8),
        "model.layers.0.hc.scale": torch.ones(3),
        "model.layers.0.self_attn.k_scale": torch.tensor(1.0),
        "model.layers.0.mask": torch.ones(4).bool(),
        "model.layers.0.table": bytes_of(4),
        "model.position_ids": torch.arange(9),
    }
    assert find_packed({}, stored_in(tmp_path, plain)) == {}


def test_a_row_is_read_without_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found, read = only({}, stored_in(tmp_path, mxfp4_parts())), []
    monkeypatch.setattr("moepress.models.storage.tensors.read_bytes", counting(read))
    unpack.dequantize(found, 1)
    assert read == [40 * 2, 40 * 32]
    with pytest.raises(ValueError, match="no experts"):
        dequantize(only({}, stored_in(tmp_path, fp8_parts())), 0)


def counting(read: list[int]) -> Callable[..., bytearray]:
    from moepress.models.storage.safetensors_file import read_bytes

    def wrapped(entry: Stored, begin: int = 0, length: int | None = None) -> bytearray:
        data = read_bytes(entry, begin, length)
        read.append(len(data))
        return data

    return wrapped


def test_large_matrices_are_decoded_in_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for make in ALL.values():
        found = only({}, stored_in(tmp_path, make()))
        whole = dequantize(found)
        with monkeypatch.context() as patch:
            patch.setattr(unpack, "_AT_ONCE", 100)
            assert torch.equal(dequantize(found), whole)


@pytest.mark.parametrize("make", [fp8_parts, int4_parts, gptq_parts], ids=["fp8", "int4", "gptq"])
def test_a_hundred_thousand_names_take_little_time(tmp_path: Path, make: Callable[[], Tensors]) -> None:
    parts = stored_in(tmp_path, make())
    many = {}
    for index, entry in itertools.product(range(92_000 // len(parts)), parts.values()):
        name = entry.name.replace("experts.3", f"experts.{index}")
        many[name] = Stored(
            name=name, file=entry.file, dtype=entry.dtype, shape=entry.shape, begin=entry.begin, end=entry.end
        )
    begin = time.perf_counter()
    found = find_packed(FP8_CONFIG if make is fp8_parts else {}, many)
    assert time.perf_counter() - begin < 5
    assert len(found) == len(many) // len(parts)
