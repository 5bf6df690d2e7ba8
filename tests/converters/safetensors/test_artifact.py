"""Quantized folders read as dense ones: our dequantized weights and forward pass are those of transformers."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from stage_runs import G32, assert_near, keep_of, logits_of, quantized_folder, streamed_logits
from torch import Tensor
from transformers import AutoModelForCausalLM

from moepress.compress.gptq.include import Include
from moepress.converters.safetensors.artifact import dense, open_artifact, open_source
from moepress.converters.safetensors.export import check_target
from moepress.converters.safetensors.scheme import Scheme
from moepress.errors import InvalidInputError, MoepressError, UnsupportedError
from moepress.models.storage.checkpoint import Checkpoint, open_checkpoint

every_key = pytest.mark.parametrize("key", tiny_models.KEYS)


@pytest.fixture(scope="module")
def quantized(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`quantized(key, pruned=..., include=..., **options of the tiny model)`: a compressed-tensors folder."""
    made: dict[str, Path] = {}

    def get(key: str, *, pruned: bool = False, include: tuple[Include, ...] = (), **options: Any) -> Path:
        name = f"{key}{pruned}{include}{options}"
        if name not in made:
            made[name] = tmp_path_factory.mktemp(key) / "quantized"
            folder = tiny_model(key, **options)
            source = open_checkpoint(folder)
            keep = keep_of(source, source.shape.experts // 2) if pruned else None
            windows = tiny_models.windows(source.shape.vocabulary, count=3, length=16)
            scheme = Scheme(bits=4, group_size=16) if include else G32  # 16 divides a tiny q_lora_rank
            quantized_folder(folder, windows, made[name], keep=keep, include=include, scheme=scheme)
        return made[name]

    return get


def loaded(folder: Path, dtype: Any = torch.float32) -> Any:
    """transformers' model of a folder; no tensor may be missing, surplus or misfitting."""
    model, report = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="sdpa", output_loading_info=True
    )
    assert not any(report[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    return torch.nn.Module.float(model).eval()  # transformers refuses its own `float` for quantized models


ALL_PARTS = (Include.ATTENTION, Include.SHARED, Include.DENSE, Include.LM_HEAD)


@every_key
@pytest.mark.parametrize(
    ("pruned", "include", "fused"),
    [(False, (), False), (True, ALL_PARTS, False), (True, (), True)],
    ids=["experts", "pruned-everything", "pruned-fused"],
)
def test_transformers_loads_it_and_its_logits_are_ours(
    quantized: Callable[..., Path], tmp_path: Path, key: str, pruned: bool, include: tuple[Include, ...], fused: bool
) -> None:
    if key == "qwen2_moe":  # its lm_head is tied to the embeddings
        include = tuple(i for i in include if i is not Include.LM_HEAD)
    folder = quantized(key, pruned=pruned, include=include, fused=fused)
    artifact = open_artifact(folder)
    windows = tiny_models.windows(int(artifact.config["vocab_size"]), seed=8)
    theirs = logits_of(loaded(folder), windows)
    assert_near(streamed_logits(artifact, windows, tmp_path), theirs, 2e-5)


@pytest.mark.parametrize("key", ["deepseek_v3", "mixtral"])
def test_weights_of_a_bfloat16_model_are_bit_for_bit_those_of_transformers(
    quantized: Callable[..., Path], tmp_path: Path, key: str
) -> None:
    folder = quantized(key, dtype=torch.bfloat16)
    artifact, model = open_artifact(folder), loaded(folder, "auto")
    layer = max(artifact.outline.moe_layers)
    experts = model.model.layers[layer].mlp.experts
    for expert in range(int(experts.down_proj.shape[0])):
        gate, up, down = (artifact.read(name) for name in artifact.family.expert_names(layer, expert))
        assert gate.dtype == torch.bfloat16
        assert torch.equal(torch.cat((gate, up)).float(), experts.gate_up_proj[expert])
        assert torch.equal(down.float(), experts.down_proj[expert])
    windows = tiny_models.windows(256, seed=8)
    assert_near(streamed_logits(artifact, windows, tmp_path), logits_of(model, windows), 2e-5)


def unpacked(words: Tensor, scales: Tensor, shape: tuple[int, int], bits: int) -> Tensor:
    """Dense weights by the format's definition, one element at a time."""
    out = torch.zeros(shape)
    group = shape[1] // scales.shape[1]
    for row in range(shape[0]):
        stream = sum((int(word) & 0xFFFFFFFF) << (32 * n) for n, word in enumerate(words[row]))
        for column in range(shape[1]):
            code = (stream >> (bits * column) & (2**bits - 1)) - 2 ** (bits - 1)
            out[row, column] = code * float(scales[row, column // group])
    return out


def test_dense_weights_are_what_the_format_defines(quantized: Callable[..., Path]) -> None:
    artifact = open_artifact(quantized("deepseek_v3"))
    tensors = tiny_models.load_tensors(artifact.folder)
    for module in ("model.layers.1.mlp.experts.3.gate_proj", "model.layers.2.mlp.experts.15.down_proj"):
        words, scales = tensors[f"{module}.weight_packed"], tensors[f"{module}.weight_scale"]
        assert words.dtype == torch.int32
        assert tensors[f"{module}.weight_shape"].tolist() == [64, 64]
        assert torch.equal(artifact.read(f"{module}.weight"), unpacked(words, scales, (64, 64), 4))
        assert artifact.is_quantized(f"{module}.weight")
        codes, scales = artifact.codes(f"{module}.weight")
        assert torch.equal(dense(codes, scales), artifact.read(f"{module}.weight"))


def test_an_artifact_has_the_names_and_shapes_of_the_model_it_was_made_of(
    quantized: Callable[..., Path], tiny_model: Callable[..., Path]
) -> None:
    for key in ("deepseek_v3", "mixtral"):
        artifact = open_artifact(quantized(key))
        assert artifact.shapes == open_checkpoint(tiny_model(key)).shapes
        assert artifact.scheme == G32
        assert artifact.layout == "compressed-tensors"
        assert artifact.total_bytes == sum(t.nbytes for t in tiny_models.load_tensors(artifact.folder).values())


def test_any_folder_opens_as_what_it_is(
    quantized: Callable[..., Path], tiny_model: Callable[..., Path], tiny_copy: Callable[..., Path]
) -> None:
    assert isinstance(open_source(tiny_model("deepseek_v3")), Checkpoint)
    assert open_source(quantized("deepseek_v3")) == open_artifact(quantized("deepseek_v3"))
    folder = tiny_copy("deepseek_v3")
    tiny_models.to_fp8(folder)
    found = open_source(folder)
    assert isinstance(found, Checkpoint)
    assert found.block == (48, 40)


def test_a_folder_that_is_not_quantized_is_no_artifact(
    tiny_model: Callable[..., Path], tiny_copy: Callable[..., Path]
) -> None:
    with pytest.raises(UnsupportedError, match="make one with `moepress quantize`"):
        open_artifact(tiny_model("mixtral"))
    folder = tiny_copy("mixtral")
    tiny_models.edit_config(folder, quantization_config={"quant_method": "awq"})
    with pytest.raises(UnsupportedError, match="not 'awq'"):
        open_artifact(folder)
    tiny_models.edit_config(folder, quantization_config=["awq"])
    with pytest.raises(UnsupportedError):
        open_artifact(folder)


def test_a_quantized_folder_is_a_checkpoint_to_start_from(quantized: Callable[..., Path]) -> None:
    """Its weights are what the codes stand for, and pruning moves the codes."""
    folder = quantized("deepseek_v3")
    source, artifact = open_checkpoint(folder), dataclasses.replace(open_artifact(folder), exact=True)
    assert source.pressed_as == "int4"
    name = source.family.expert_names(1, 3)[0]
    assert torch.equal(source.read(name), artifact.read(name).float())


@pytest.fixture
def spoilt(quantized: Callable[..., Path], tmp_path: Path) -> Path:
    """A copy of a quantized folder that may be broken."""
    import shutil

    return Path(shutil.copytree(quantized("mixtral"), tmp_path / "spoilt"))


MODULE = "model.layers.1.block_sparse_moe.experts.2.w1"


@pytest.mark.parametrize("part", ["weight_scale", "weight_shape"])
def test_a_missing_part_is_named(spoilt: Path, part: str) -> None:
    tiny_models.rewrite(spoilt, lambda tensors: tensors.__delitem__(f"{MODULE}.{part}"))
    with pytest.raises(InvalidInputError, match=f"{MODULE}.{part}"):
        open_artifact(spoilt).read(f"{MODULE}.weight")


def test_a_missing_matrix_is_named_when_the_model_is_run(spoilt: Path, tmp_path: Path) -> None:
    def drop(tensors: dict[str, Tensor]) -> None:
        for part in ("weight_packed", "weight_scale", "weight_shape"):
            del tensors[f"{MODULE}.{part}"]

    tiny_models.rewrite(spoilt, drop)
    with pytest.raises(InvalidInputError, match=f"{MODULE}.weight is missing"):
        streamed_logits(open_artifact(spoilt), tiny_models.windows(256, count=1), tmp_path)


@pytest.mark.parametrize("shape", [[64, 128], [0, 64], [-1, 64], [1 << 40, 64], [64]])
def test_a_shape_that_does_not_fit_is_refused(spoilt: Path, shape: list[int]) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[f"{MODULE}.weight_shape"] = torch.tensor(shape)

    tiny_models.rewrite(spoilt, change)
    with pytest.raises(InvalidInputError, match=MODULE):
        open_artifact(spoilt).read(f"{MODULE}.weight")


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("weight_packed", lambda t: t.view(torch.float32)),
        ("weight_packed", lambda t: t.reshape(-1)),
        ("weight_scale", lambda t: t.to(torch.float64)),
        ("weight_scale", lambda t: t[None]),
        ("weight_shape", lambda t: t.to(torch.int32)),
        ("weight_shape", lambda t: t[None]),
    ],
)
def test_a_part_of_another_dtype_or_number_of_axes_is_refused_when_the_folder_is_opened(
    spoilt: Path, part: str, change: Callable[[Tensor], Tensor]
) -> None:
    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors[f"{MODULE}.{part}"] = change(tensors[f"{MODULE}.{part}"]).contiguous()

    tiny_models.rewrite(spoilt, spoil)
    with pytest.raises(InvalidInputError, match=rf"{MODULE}\.{part} is .*, where compressed-tensors has"):
        open_artifact(spoilt)


@pytest.mark.parametrize("method", [["gptq"], {"gptq": 1}, 3, None])
def test_a_method_that_is_no_name_is_no_layout(spoilt: Path, method: object) -> None:
    config = json.loads((spoilt / "config.json").read_text())
    config["quantization_config"]["quant_method"] = method
    (spoilt / "config.json").write_text(json.dumps(config))
    with pytest.raises(MoepressError):
        open_source(spoilt)


def test_scales_that_are_not_finite_are_refused_by_name(spoilt: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[f"{MODULE}.weight_scale"][3, 1] = float("nan")

    tiny_models.rewrite(spoilt, change)
    with pytest.raises(InvalidInputError, match=f"{MODULE}.weight_scale .* NaN or Inf"):
        open_artifact(spoilt).read(f"{MODULE}.weight")


def test_two_groups_for_the_same_modules_are_refused(spoilt: Path) -> None:
    config = json.loads((spoilt / "config.json").read_text())["quantization_config"]
    config["config_groups"]["group_1"] = config["config_groups"]["group_0"]
    tiny_models.edit_config(spoilt, quantization_config=config)
    with pytest.raises(UnsupportedError, match="2 config groups"):
        open_artifact(spoilt)


@pytest.mark.parametrize("scheme", [Scheme(bits=8, group_size=64), Scheme(bits=4, group_size=-1)], ids=str)
def test_other_schemes_load_too(tiny_model: Callable[..., Path], tmp_path: Path, scheme: Scheme) -> None:
    folder = tmp_path / "out"
    quantized_folder(tiny_model("olmoe"), tiny_models.windows(256, count=2), folder, scheme=scheme)
    artifact = open_artifact(folder)
    assert artifact.scheme == scheme
    windows = tiny_models.windows(256, seed=8)
    assert_near(streamed_logits(artifact, windows, tmp_path), logits_of(loaded(folder), windows), 2e-5)


def test_mixed_bits_are_read_layer_by_layer(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    """Layer 0 of an 8-bit folder in a 4-bit folder: both give the numbers that they had."""
    model, windows = tiny_model("olmoe"), tiny_models.windows(256, count=2)
    schemes = {bits: Scheme(bits=bits, group_size=32) for bits in (4, 8)}
    for bits, scheme in schemes.items():
        quantized_folder(model, windows, tmp_path / str(bits), scheme=scheme)
    folder, eight = tmp_path / "4", tiny_models.load_tensors(tmp_path / "8")
    names = [f"model.layers.{layer}.mlp.experts.2.gate_proj.weight" for layer in range(2)]
    before = [open_artifact(tmp_path / "8").read(names[0]), open_artifact(folder).read(names[1])]
    first = {n: t for n, t in eight.items() if n.startswith("model.layers.0.mlp.experts")}
    tiny_models.rewrite(folder, lambda tensors: tensors.update(first))
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    group = json.loads((tmp_path / "8" / "config.json").read_text())["quantization_config"]["config_groups"]["group_0"]
    config["config_groups"]["group_1"] = group | {"targets": ["re:model.layers.0.mlp.experts"]}
    tiny_models.edit_config(folder, quantization_config=config)
    mixed = open_artifact(folder)
    assert [mixed.scheme_of(name) for name in names] == [schemes[8], schemes[4]]
    assert all(torch.equal(mixed.read(name), weight) for name, weight in zip(names, before, strict=True))
    with pytest.raises(UnsupportedError, match="mixed bits"):
        check_target(mixed, "gptq")
