"""Weights that are quantized already, or stored otherwise, are named for what they are."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from torch import Tensor

from moepress.converters.safetensors.artifact import open_artifact, open_source
from moepress.errors import InvalidInputError, UnsupportedError
from moepress.models.storage.checkpoint import open_checkpoint
from moepress.models.storage.foreign import SIDECARS
from moepress.validation.rules.facts import Kind, read_facts

Factory = Callable[..., Path]
NAME = "model.layers.1.self_attn.q_proj"
Tensors = dict[str, Tensor]


@pytest.fixture
def folder(tiny_copy: Factory) -> Path:
    return tiny_copy("qwen3_moe")


def replaced(**parts: Tensor) -> Callable[[Tensors], None]:
    """A change of a folder: the weight of one Linear gives way to these parts, named with _ for their dots."""

    def change(tensors: Tensors) -> None:
        del tensors[f"{NAME}.weight"]
        tensors.update({f"{NAME}.{part}": tensor for part, tensor in parts.items()})

    return change


def bytes_of(*shape: int, dtype: torch.dtype = torch.uint8) -> Tensor:
    return torch.zeros(*shape, dtype=dtype)


WORDS = bytes_of(8, 128, dtype=torch.int32)
FP8 = torch.zeros(128, 128, dtype=torch.float8_e4m3fn)
FORMS: dict[str, tuple[dict[str, Tensor], dict[str, Any]]] = {
    "MLX": (
        {"weight": bytes_of(128, 16, dtype=torch.uint32), "scales": torch.ones(128, 4), "biases": torch.ones(128, 4)},
        {"quantization": {"group_size": 32, "bits": 4}},
    ),
    "GPTQ": (
        {"qweight": WORDS, "qzeros": WORDS, "scales": torch.ones(1, 128), "g_idx": bytes_of(128, dtype=torch.int32)},
        {},
    ),
    "AWQ": ({"qweight": WORDS, "qzeros": WORDS, "scales": torch.ones(1, 128)}, {}),
    "compressed-tensors": ({"weight_packed": WORDS, "weight_scale": torch.ones(128, 1)}, {}),
    "NVFP4 (compressed-tensors)": ({"weight_packed": bytes_of(8, 8), "weight_global_scale": torch.ones(1)}, {}),
    "NVFP4 by NVIDIA ModelOpt": (
        {"weight": bytes_of(128, 64), "weight_scale": FP8[:, :8], "weight_scale_2": torch.ones(())},
        {},
    ),
    "bitsandbytes": (
        {
            "weight": bytes_of(8192, 1),
            "weight.absmax": bytes_of(128),
            "weight.quant_state.bitsandbytes__nf4": bytes_of(70),
        },
        {"quantization_config": {"load_in_4bit": True}},
    ),
    "HQQ": ({"W_q": bytes_of(64, 128), "meta": torch.ones(1)}, {}),
    "optimum-quanto": ({"weight._data": bytes_of(64, 128), "weight._scale": torch.ones(128, 1)}, {}),
    "torchao": ({"_weight_qdata": bytes_of(64, 128), "_weight_scale": torch.ones(128, 4)}, {}),
    "ExLlamaV3": ({"trellis": bytes_of(8, 8, 8, dtype=torch.int16), "suh": torch.ones(8)}, {}),
    "fp8 with one scale per tensor": ({"weight": FP8, "weight_scale": torch.ones(())}, {}),
    "fp8 with scales in weight_scale": ({"weight": FP8, "weight_scale": torch.ones(128, 1)}, {}),
    "int8 with scales": ({"weight": bytes_of(128, 128, dtype=torch.int8), "weight_scale": torch.ones(128, 1)}, {}),
    "F8_E8M0 scales": (
        {"weight": FP8, "weight_scale_inv": torch.ones(4, 4).to(torch.float8_e8m0fnu)},
        {"quantization_config": {"quant_method": "fp8", "weight_block_size": [32, 32]}},
    ),
    "fp8 with one scale per tensor or row": ({"weight": FP8, "weight_scale_inv": torch.ones(())}, {}),
    "AMD Quark": (
        {"weight": bytes_of(128, 64), "other": torch.ones(1)},
        {"quantization_config": {"quant_method": "quark"}},
    ),
}


READABLE = ("GPTQ", "AWQ", "compressed-tensors", "NVFP4", "fp8", "F8_E8M0")


@pytest.mark.parametrize("form", [form for form in FORMS if form.startswith(READABLE)])
def test_a_form_that_is_read_is_named_and_its_parts_are_checked(folder: Path, form: str) -> None:
    parts, config = FORMS[form]
    tiny_models.rewrite(folder, replaced(**parts))
    tiny_models.edit_config(folder, **config)
    assert form in str(read_facts(folder).form)
    if form.startswith(("fp8", "F8", "NVFP4 by")):  # the others are made up, and their parts fit nothing
        assert open_checkpoint(folder).read(f"{NAME}.weight").shape == (128, 128)
        return
    with pytest.raises(InvalidInputError, match=NAME):
        open_checkpoint(folder)


@pytest.mark.parametrize("form", [form for form in FORMS if not form.startswith(READABLE)])
def test_each_form_of_quantized_weights_is_named(folder: Path, form: str) -> None:
    parts, config = FORMS[form]
    tiny_models.rewrite(folder, replaced(**parts))
    tiny_models.edit_config(folder, **config)
    for opening in (open_checkpoint, open_source):
        with pytest.raises(UnsupportedError) as caught:
            opening(folder)
        message = str(caught.value)
        assert form in message
        assert NAME in message
        assert "restore" not in message
        assert "\n" not in message
    if form != "AMD Quark":  # of which the config alone tells
        facts = read_facts(folder)
        assert facts.kind is (Kind.MLX if form == "MLX" else Kind.OTHER)
        assert form == "MLX" or form in str(facts.form)


@pytest.mark.parametrize(("leaf", "dtype"), [("gate_up_proj", torch.float8_e4m3fn), ("down_proj", torch.uint8)])
def test_fused_experts_in_fp8_and_in_mxfp4_are_read(tiny_copy: Factory, leaf: str, dtype: torch.dtype) -> None:
    folder = tiny_copy("qwen3_moe", fused=True)
    block = "model.layers.0.mlp.experts"

    def change(tensors: Tensors) -> None:
        weight = tensors.pop(f"{block}.{leaf}")
        if dtype is torch.uint8:
            tensors[f"{block}.{leaf}_blocks"] = torch.zeros(*weight.shape[:2], 2, 16, dtype=dtype)
            tensors[f"{block}.{leaf}_scales"] = torch.zeros(*weight.shape[:2], 2, dtype=dtype)
        else:
            tensors[f"{block}.{leaf}"] = weight.to(dtype)
            tensors[f"{block}.{leaf}_scale_inv"] = torch.ones(weight.shape[0], 4, 4)

    tiny_models.rewrite(folder, change)
    tiny_models.edit_config(folder, quantization_config={"quant_method": "fp8", "weight_block_size": [32, 32]})
    source = open_checkpoint(folder)
    name = f"{block}.{leaf}"
    assert source.packed_as(name) == ("mxfp4" if dtype is torch.uint8 else "fp8")
    assert torch.equal(source.read_row(name, 5), source.read(name)[5])


def test_settings_in_a_file_of_their_own_are_named_with_what_to_do(folder: Path) -> None:
    tiny_models.rewrite(folder, replaced(**FORMS["GPTQ"][0]))
    (folder / "quantize_config.json").write_text('{"bits": 4}')
    with pytest.raises(UnsupportedError, match=r"GPTQ, with its settings only in quantize_config\.json") as caught:
        open_artifact(folder)
    assert "copy the object in quantize_config.json into config.json" in str(caught.value)


@pytest.mark.parametrize("name", SIDECARS)
def test_settings_of_another_copy_are_noted(folder: Path, name: str) -> None:
    (folder / name).write_text("{}")
    (note,) = open_checkpoint(folder).notes
    assert f"{name} states a quantization that the weights do not have" in note


def test_a_single_tensor_of_integers_is_an_error_of_the_folder(folder: Path) -> None:
    tiny_models.rewrite(folder, lambda tensors: tensors.update({f"{NAME}.weight": WORDS}))
    with pytest.raises(InvalidInputError, match="has dtype I32"):
        open_checkpoint(folder)
