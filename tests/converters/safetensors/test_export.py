"""export: the same codes in another layout, and back again byte for byte."""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_models
import torch
from stage_runs import add_tokenizer, assert_near, content, keep_of, quantized_folder, streamed_logits
from torch import Tensor

from moepress.compress.gptq.include import Include
from moepress.converters.safetensors.artifact import open_artifact
from moepress.converters.safetensors.scheme import Scheme
from moepress.errors import UnsupportedError, UsageError
from moepress.models.families.family import Part, part_of
from moepress.models.storage.checkpoint import open_checkpoint
from moepress.stages.export import export_stage
from moepress.stages.places import Output

KEYS = ("deepseek_v3", "deepseek_v2", "qwen3_moe", "qwen2_moe", "mixtral", "olmoe")
WINDOWS = tiny_models.windows(256, count=3, length=16)


@pytest.fixture(scope="module")
def quantized(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`quantized(key)`: a pruned and quantized folder with a tokenizer."""
    made: dict[str, Path] = {}

    def get(key: str) -> Path:
        if key not in made:
            made[key] = tmp_path_factory.mktemp(key) / "quantized"
            source = open_checkpoint(tiny_model(key))
            keep = keep_of(source, source.shape.experts // 2)
            quantized_folder(tiny_model(key), WINDOWS, made[key], keep=keep)
            add_tokenizer(made[key])
            (made[key] / "LICENSE").write_bytes(b"licence\xff")
        return made[key]

    return get


def exported(folder: Path, out: Path, target: str = "gptq") -> Path:
    export_stage(str(folder), Output(folder=out), target)  # type: ignore[arg-type]
    return out


def slow_codes(words: Tensor, count: int, bits: int) -> Tensor:
    """Codes of a GPTQ matrix packed along its first axis: a little-endian bit stream per column, read bit by bit."""
    codes = torch.zeros(count, words.shape[1], dtype=torch.int64)
    for column in range(words.shape[1]):
        stream = sum((int(word) & 0xFFFFFFFF) << (32 * n) for n, word in enumerate(words[:, column]))
        for row in range(count):
            codes[row, column] = stream >> (bits * row) & (2**bits - 1)
    return codes


def slow_weight(tensors: dict[str, Tensor], module: str, bits: int) -> tuple[Tensor, Tensor]:
    """Codes q in two's range and dense weights [O, I], by the definition of the GPTQ v1 layout."""
    groups = tensors[f"{module}.g_idx"].long()
    outputs = tensors[f"{module}.scales"].shape[1]
    stored = slow_codes(tensors[f"{module}.qweight"], len(groups), bits)
    zeros = slow_codes(tensors[f"{module}.qzeros"].T, outputs, bits).T + 1  # v1 stores zero - 1
    codes = stored - zeros[groups]
    return codes.T, (codes * tensors[f"{module}.scales"].float()[groups]).T


@pytest.mark.parametrize("key", KEYS)
def test_gptq_holds_the_same_codes_and_scales(quantized: Callable[..., Path], tmp_path: Path, key: str) -> None:
    artifact = open_artifact(quantized(key))
    out = exported(artifact.folder, tmp_path / "gptq")
    tensors = tiny_models.load_tensors(out)
    modules = [n.removesuffix(".weight") for n in artifact.shapes if artifact.is_quantized(n)]
    assert {n.removesuffix(".qweight") for n in tensors if n.endswith(".qweight")} == set(modules)
    for module in modules[::7]:
        codes, scales = artifact.codes(f"{module}.weight")
        found, weight = slow_weight(tensors, module, 4)
        assert torch.equal(found, codes.long())
        assert torch.equal(weight, artifact.read(f"{module}.weight").float())
        assert torch.equal(tensors[f"{module}.scales"].float().T, scales.float())
        assert tensors[f"{module}.g_idx"].tolist() == [column // 32 for column in range(codes.shape[1])]
        assert tensors[f"{module}.qzeros"].flatten()[0] == 0x77777777
    for name in artifact.shapes:
        if not artifact.is_quantized(name):
            assert torch.equal(tensors[name], artifact.read(name))
            assert tensors[name].dtype == artifact.read(name).dtype


@pytest.mark.parametrize("key", KEYS)
def test_there_and_back_again_is_byte_identical(quantized: Callable[..., Path], tmp_path: Path, key: str) -> None:
    gptq = exported(quantized(key), tmp_path / "gptq")
    back = exported(gptq, tmp_path / "back", "compressed-tensors")
    before, after = content(quantized(key)), content(back)
    assert after.keys() == before.keys()
    for name in before.keys() - {"moepress.json"}:
        assert after[name] == before[name], name


@pytest.mark.parametrize("key", KEYS)
def test_an_exported_model_runs_as_before(quantized: Callable[..., Path], tmp_path: Path, key: str) -> None:
    out = exported(quantized(key), tmp_path / "gptq")
    expected = streamed_logits(open_artifact(quantized(key)), WINDOWS, tmp_path)
    found = streamed_logits(open_artifact(out), WINDOWS, tmp_path)
    assert_near(found, expected, 3e-3)  # this layout's kernels multiply codes and scales in fp16, an fp32 model's not


@pytest.mark.parametrize("key", KEYS)
def test_the_config_says_what_is_not_quantized(quantized: Callable[..., Path], tmp_path: Path, key: str) -> None:
    artifact = open_artifact(quantized(key))
    out = exported(artifact.folder, tmp_path / "gptq")
    config = json.loads((out / "config.json").read_text())
    quantization = config.pop("quantization_config")
    assert json.loads((out / "quantize_config.json").read_text()) == quantization
    assert config == {k: v for k, v in artifact.config.items() if k != "quantization_config"}
    wanted = {"bits": 4, "group_size": 32, "sym": True, "desc_act": False, "checkpoint_format": "gptq"}
    assert {k: quantization[k] for k in wanted} == wanted
    patterns = [pattern.removeprefix("-:") for pattern in quantization["dynamic"]]
    assert all(pattern.startswith("-:") for pattern in quantization["dynamic"])
    layers = int(config["num_hidden_layers"])
    for name, shape in artifact.shapes.items():
        part = part_of(artifact.family, name, layers)
        if len(shape) != 2 or part is Part.EMBEDDINGS:
            continue
        excluded = any(re.match(pattern, name.removesuffix(".weight")) for pattern in patterns)
        assert excluded == (part is not Part.ROUTED), name


def test_companions_go_along_and_the_work_folder_goes_away(quantized: Callable[..., Path], tmp_path: Path) -> None:
    out = exported(quantized("deepseek_v3"), tmp_path / "gptq")
    found = content(out)
    for name in ("LICENSE", "tokenizer.json", "tokenizer_config.json"):
        assert found[name] == content(quantized("deepseek_v3"))[name]
    assert json.loads(found["moepress.json"])["target"] == "gptq"
    assert [p.name for p in tmp_path.iterdir()] == ["gptq"]


def test_bits_3_survive_the_way_there_and_back(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    quantized_folder(tiny_model("mixtral"), WINDOWS, tmp_path / "q", scheme=Scheme(bits=3, group_size=32))
    out = exported(tmp_path / "q", tmp_path / "gptq")
    artifact, tensors = open_artifact(tmp_path / "q"), tiny_models.load_tensors(out)
    module = "model.layers.2.block_sparse_moe.experts.7.w2"
    codes, weight = slow_weight(tensors, module, 3)
    assert torch.equal(codes, artifact.codes(f"{module}.weight")[0].long())
    assert torch.equal(weight, artifact.read(f"{module}.weight").float())
    back = exported(out, tmp_path / "back", "compressed-tensors")
    name = "model-00001-of-00004.safetensors"
    assert content(back)[name] == content(tmp_path / "q")[name]


def test_scales_that_fp16_cannot_hold_exactly_are_reported(tiny_copy: Callable[..., Path], tmp_path: Path) -> None:
    """bf16 scales below 2**-14 lose bits in fp16; the export says by how much the worst one changes."""
    folder = tiny_copy("mixtral", dtype=torch.bfloat16)
    name = "model.layers.0.block_sparse_moe.experts.0.w1.weight"
    tiny_models.rewrite(folder, lambda tensors: tensors.update({name: tensors[name] * 2**-13}))
    quantized_folder(folder, WINDOWS, tmp_path / "q")
    artifact = open_artifact(tmp_path / "q")
    result = export_stage(str(tmp_path / "q"), Output(folder=tmp_path / "gptq"), "gptq")
    worst = 0.0
    for weight in artifact.shapes:
        if artifact.is_quantized(weight):
            scales = artifact.codes(weight)[1].double()
            worst = max(worst, float(((scales.half().double() - scales) / scales).abs().max()))
    assert worst > 0
    assert math.isclose(result.scale_error, worst, rel_tol=1e-3)
    assert len(result.notes) == 1
    assert "not exact in fp16" in result.notes[0]


def test_scales_of_zero_in_fp16_are_refused_by_name(tiny_copy: Callable[..., Path], tmp_path: Path) -> None:
    folder = tiny_copy("mixtral", dtype=torch.bfloat16)
    name = "model.layers.0.block_sparse_moe.experts.0.w1"
    tiny_models.rewrite(folder, lambda tensors: tensors.update({f"{name}.weight": tensors[f"{name}.weight"] * 2**-30}))
    quantized_folder(folder, WINDOWS, tmp_path / "q")
    with pytest.raises(UnsupportedError, match=name):
        exported(tmp_path / "q", tmp_path / "gptq")
    assert not (tmp_path / "gptq").exists()


def test_exporting_to_the_layout_it_has_is_refused(quantized: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is in the compressed-tensors layout already"):
        exported(quantized("mixtral"), tmp_path / "out", "compressed-tensors")
    assert list(tmp_path.iterdir()) == []


def test_a_quantized_lm_head_is_not_exported_to_gptq(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    quantized_folder(tiny_model("mixtral"), WINDOWS, tmp_path / "q", include=[Include.LM_HEAD])
    assert open_artifact(tmp_path / "q").is_quantized("lm_head.weight")
    with pytest.raises(UnsupportedError, match="lm_head"):
        exported(tmp_path / "q", tmp_path / "gptq")
    assert not (tmp_path / "gptq").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["q"]  # refused before anything was written


def test_plain_models_are_not_exported(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="make one with `moepress quantize`"):
        exported(tiny_model("mixtral"), tmp_path / "out")
