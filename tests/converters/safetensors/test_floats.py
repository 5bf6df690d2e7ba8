"""4-bit floats in compressed-tensors' layouts, held against compressed-tensors itself."""

from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme
from compressed_tensors.quantization.utils.helpers import generate_gparam
from torch import Tensor

from moepress.converters.safetensors.compressed_tensors_config import FORMATS, parse_config, quantization_config
from moepress.converters.safetensors.floats import (
    dense,
    divisors,
    from_levels,
    layer_tensors,
    pack,
    power_bytes,
    read_layer,
    unpack,
    values,
)
from moepress.converters.safetensors.scheme import Codes, Scheme
from moepress.errors import InvalidInputError, UnsupportedError
from moepress.models.storage.unpack import exponents

SCHEMES = {codes: Scheme.of_floats(codes) for codes in (Codes.NVFP4, Codes.MXFP4)}
PRESETS = {Codes.NVFP4: "NVFP4A16", Codes.MXFP4: "MXFP4A16"}
each_format = pytest.mark.parametrize("codes", SCHEMES)


def matrix(codes: Codes, rows: int = 24, columns: int = 96) -> dict[str, Tensor]:
    """Random codes, -0 among them, and scales of all that the format holds."""
    generator = torch.Generator().manual_seed(3)
    found = torch.randint(0, 16, (rows, columns), generator=generator).to(torch.int8)
    shape = (rows, SCHEMES[codes].groups(columns))
    if codes is Codes.MXFP4:
        return layer_tensors(
            "m", found, exponents(torch.randint(60, 160, shape, generator=generator)), None, SCHEMES[codes]
        )
    bytes_OG = torch.randint(1, 0x7F, shape, generator=generator).to(torch.uint8)
    scales = bytes_OG.view(torch.float8_e4m3fn).float()
    return layer_tensors("m", found, scales, torch.tensor(1234.5), SCHEMES[codes])


def test_packing_turns_round() -> None:
    every = torch.arange(256, dtype=torch.uint8).view(4, 64)
    assert torch.equal(pack(unpack(every)), every)
    codes = unpack(every)
    assert (codes[0, 2], codes[0, 3]) == (1, 0), "the low half comes first"
    assert torch.equal(unpack(pack(codes)), codes)


def test_numbers_of_ascending_levels_become_codes_of_the_same_values() -> None:
    ascending = values(from_levels(torch.arange(15, dtype=torch.int8)))
    assert ascending.tolist() == [-6, -4, -3, -2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2, 3, 4, 6]


def test_bytes_of_powers_are_the_inverse_of_their_reading() -> None:
    every = torch.arange(255, dtype=torch.uint8)  # 0 is 2^-127, which fp32 holds as no normal number
    assert torch.equal(power_bytes(exponents(every)), every)


@each_format
def test_compressed_tensors_decompresses_to_what_we_read(codes: Codes) -> None:
    tensors, scheme = matrix(codes), preset_name_to_scheme(PRESETS[codes], ["Linear"])
    compressor = BaseCompressor.get_value_from_registry(FORMATS[codes])
    theirs = compressor.decompress({name.removeprefix("m."): tensor for name, tensor in tensors.items()}, scheme)
    ours = dense(*read_layer("m", tensors, SCHEMES[codes]))
    assert theirs["weight"].dtype == ours.dtype
    assert torch.equal(theirs["weight"], ours)


@each_format
def test_compressed_tensors_packs_what_we_read_to_our_bytes(codes: Codes) -> None:
    tensors, scheme = matrix(codes), preset_name_to_scheme(PRESETS[codes], ["Linear"])
    given = {"weight": dense(*read_layer("m", tensors, SCHEMES[codes]), exact=True)}
    divisor = tensors.get("m.weight_global_scale")
    scales = read_layer("m", tensors, SCHEMES[codes])[1]
    given |= {"weight_scale": scales} if divisor is None else {"weight_global_scale": divisor}
    if divisor is not None:
        given["weight_scale"] = tensors["m.weight_scale"].float()
    theirs = BaseCompressor.get_value_from_registry(FORMATS[codes]).compress(given, scheme)
    for name, tensor in theirs.items():
        stored = tensors[f"m.{name}"]
        if name == "weight_packed":  # -0 becomes 0 where its product does
            assert torch.equal(values(unpack(tensor)), values(unpack(stored)))
        else:
            assert tensor.dtype == stored.dtype
            assert torch.equal(tensor.view(torch.uint8), stored.view(torch.uint8))


@each_format
def test_the_config_is_the_preset_of_weights_alone(codes: Codes) -> None:
    config = quantization_config(SCHEMES[codes], ["lm_head"])
    theirs = QuantizationConfig.model_validate(config)
    group = theirs.config_groups["group_0"]
    wanted = preset_name_to_scheme(PRESETS[codes], ["Linear"])
    assert group.weights is not None
    assert wanted.weights is not None
    differs = {"observer"}  # which is for measuring scales, and says nothing of stored ones
    assert group.weights.model_dump(exclude=differs) == wanted.weights.model_dump(exclude=differs)
    assert group.input_activations is None
    assert parse_config(config) == (SCHEMES[codes], ("lm_head",))


@each_format
@pytest.mark.parametrize(
    ("place", "setting", "value"),
    [
        ("weights", "group_size", 64),
        ("weights", "type", "int"),
        ("weights", "strategy", "channel"),
        ("weights", "scale_dtype", "torch.bfloat16"),
        ("group", "input_activations", {"num_bits": 4}),
        ("group", "format", "pack-quantized"),
    ],
)
def test_a_config_that_means_other_bytes_is_refused(codes: Codes, place: str, setting: str, value: Any) -> None:
    config = quantization_config(SCHEMES[codes], [])
    group = config["config_groups"]["group_0"]
    (group["weights"] if place == "weights" else group)[setting] = value
    with pytest.raises(UnsupportedError, match=setting):
        parse_config(config)


def test_the_divisor_is_the_one_of_compressed_tensors() -> None:
    largest = torch.tensor([0.37, 2.0, 1e-3, 5.0])
    theirs = [generate_gparam(-one, one * 0.5) for one in largest]
    assert torch.equal(divisors(largest), torch.cat(theirs))
    assert divisors(torch.tensor([0.0])).tolist() == [1.0]


@each_format
def test_scales_that_are_not_exact_are_refused(codes: Codes) -> None:
    found, shape = torch.zeros(4, 32, dtype=torch.int8), (4, SCHEMES[codes].groups(32))
    with pytest.raises(ValueError, match="not exact"):
        layer_tensors("m", found, torch.full(shape, 1.03), torch.tensor(1.0), SCHEMES[codes])


@each_format
def test_what_holds_no_number_is_refused(codes: Codes) -> None:
    tensors = matrix(codes)
    spoiled = tensors["m.weight_scale"].clone()
    spoiled.view(torch.uint8)[0, 0] = 0xFF  # NaN in both formats
    with pytest.raises(InvalidInputError, match="NaN"):
        read_layer("m", tensors | {"m.weight_scale": spoiled}, SCHEMES[codes])
    with pytest.raises(InvalidInputError, match="missing"):
        read_layer("m", {"m.weight_packed": tensors["m.weight_packed"]}, SCHEMES[codes])
    with pytest.raises(InvalidInputError, match="not of one model"):
        read_layer("m", tensors | {"m.weight_scale": tensors["m.weight_scale"][:, :-1]}, SCHEMES[codes])
    if codes is Codes.NVFP4:
        with pytest.raises(InvalidInputError, match="no positive number"):
            read_layer("m", tensors | {"m.weight_global_scale": torch.zeros(1)}, SCHEMES[codes])
