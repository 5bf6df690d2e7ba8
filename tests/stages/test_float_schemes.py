"""`quantize --scheme`: 4-bit floats from the command line to what other libraries read of them."""

import json
from collections.abc import Callable
from pathlib import Path

import every_family
import gguf
import numpy as np
import pytest
import tiny_models
import tiny_storages
import torch
from byte_tokenizer import byte_tokenizer
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from safetensors.torch import load_file
from stage_runs import add_tokenizer, command, content, keep_of, plan_of

from moepress.compress.gptq import pieces
from moepress.compress.pruning.plan import plan_text
from moepress.converters.safetensors.artifact import open_artifact
from moepress.models.storage.checkpoint import open_checkpoint
from moepress.models.storage.experts import read_expert
from moepress.validation.report.model_card import plain_card

FORMATS = ("nvfp4", "mxfp4")
each_format = pytest.mark.parametrize("name", FORMATS)
WORDS = ("--tokens", "1024", "--window", "64")
QUANTIZE = ("quantize", "demo", *WORDS, "--include", "attention", "--include", "shared")
Pressed = Callable[[str], Path]


@pytest.fixture(scope="module")
def pressed(tmp_path_factory: pytest.TempPathFactory) -> Pressed:
    """The demo in a format, made once; not to be changed."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp("floats") / name
            code, _, said = command(*QUANTIZE, "--scheme", name, "-o", made[name])
            assert code == 0, said
        return made[name]

    return get


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@each_format
def test_compressed_tensors_reads_every_matrix_as_we_do(name: str, pressed: Pressed) -> None:
    artifact, tensors = open_artifact(pressed(name)), tensors_of(pressed(name))
    config = QuantizationConfig.model_validate(artifact.config["quantization_config"])
    compressor = BaseCompressor.get_value_from_registry(config.format)
    again, coded = open_checkpoint(artifact.folder), 0
    for weight in artifact.shapes:
        if artifact.is_quantized(weight):
            module = f"{weight.removesuffix('weight')}"
            own = {part.removeprefix(module): tensors[part] for part in tensors if part.startswith(f"{module}weight_")}
            theirs = compressor.decompress(own, config.config_groups["group_0"])["weight"]
            assert torch.equal(theirs, artifact.read(weight))
            assert torch.equal(again.read(weight).to(theirs.dtype), theirs)  # as an input of prune and quantize
            coded += 1
    assert coded == 4 * 16 * 3 + 4 * 3 + 5 * 4


def test_what_runtimes_join_has_one_divisor(pressed: Pressed) -> None:
    tensors = tensors_of(pressed("nvfp4"))
    joined = [("gate_proj", "up_proj"), ("q_a_proj", "kv_a_proj_with_mqa")]
    found = 0
    for first, second in joined:
        for name in [n for n in tensors if n.endswith(f"{first}.weight_global_scale")]:
            assert torch.equal(tensors[name], tensors[name.replace(first, second)])
            found += 1
    assert found == 4 * 16 + 4 + 5
    every = {float(t) for n, t in tensors.items() if n.endswith("down_proj.weight_global_scale")}
    assert len(every) > 16, "others have their own"


@each_format
def test_check_finds_it_sound_for_vllm_and_tells_of_the_others(name: str, pressed: Pressed) -> None:
    code, shown, said = command("check", pressed(name), "--runtime", "vllm", "--json")
    assert code == 0, said
    assert json.loads(shown)["findings"] == []
    findings = json.loads(command("check", pressed(name), "--json")[1])["findings"]
    wrong = {(f["rule"], f["runtime"]) for f in findings if f["effect"] in ("refuses", "silently wrong")}
    assert wrong == ({("divided-scales", "transformers")} if name == "nvfp4" else {("layout", "llama.cpp")})


def test_check_finds_a_part_that_does_not_fit(pressed: Pressed, tmp_path: Path) -> None:
    folder = tmp_path / "spoiled"
    folder.mkdir()
    for file in pressed("nvfp4").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    part = "model.layers.1.mlp.experts.3.up_proj.weight_global_scale"
    tiny_models.rewrite(folder, lambda tensors: tensors.update({part: torch.ones(2)}) if part in tensors else None)
    found = json.loads(command("check", folder, "--runtime", "vllm", "--json")[1])["findings"]
    assert any(f["rule"] == "codes-complete" and part.removesuffix(".weight_global_scale") in f["what"] for f in found)


def test_transformers_loads_mxfp4_as_it_is_and_leaves_the_divisor_of_nvfp4_out(pressed: Pressed) -> None:
    from transformers import AutoModelForCausalLM

    for name in FORMATS:
        artifact = open_artifact(pressed(name))
        model = AutoModelForCausalLM.from_pretrained(artifact.folder, dtype=torch.bfloat16)
        for expert in (0, 7):
            down = f"model.layers.2.mlp.experts.{expert}.down_proj"
            theirs, ours = model.model.layers[2].mlp.experts.down_proj[expert], artifact.read(f"{down}.weight")
            if name == "nvfp4":  # when this ends, the rule `divided-scales` has to go
                divisor = tensors_of(artifact.folder)[f"{down}.weight_global_scale"]
                torch.testing.assert_close(theirs.float(), ours.float() * divisor, rtol=0.02, atol=0)
            else:
                assert torch.equal(theirs, ours)


@each_format
def test_a_card_without_a_report_proposes_what_loads_it(name: str, pressed: Pressed) -> None:
    card = plain_card(pressed(name), pressed(name))
    assert "vllm serve path/to/this/folder" in card
    assert ("from_pretrained" in card) == (name == "mxfp4")


@each_format
def test_layouts_of_integers_refuse_it_and_say_what_works(name: str, pressed: Pressed, tmp_path: Path) -> None:
    for target in ("gptq", "mlx", "onnx", *(("gguf",) if name == "nvfp4" else ())):
        code, _, said = command("export", pressed(name), "--to", target, "-o", tmp_path / target)
        assert code == 5, said
        assert f"{name} floats" in said
        assert "vLLM" in said
        assert "--bits" in said


def test_mxfp4_becomes_the_same_weights_in_a_gguf_file(pressed: Pressed, tmp_path: Path) -> None:
    code, _, said = command("export", pressed("mxfp4"), "--to", "gguf", "-o", tmp_path / "demo.gguf")
    assert code == 0, said
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "demo.gguf").tensors}
    artifact = open_artifact(pressed("mxfp4"))
    stack = tensors["blk.2.ffn_down_exps.weight"]
    assert stack.tensor_type.name == "MXFP4"
    theirs = gguf.quants.dequantize(stack.data, stack.tensor_type)
    for expert in range(16):
        ours = artifact.read(f"model.layers.2.mlp.experts.{expert}.down_proj.weight").float()
        assert np.array_equal(theirs[expert], ours.numpy())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--grid", "q4_0"), "--grid does not go with --scheme"),
        (("--bits", "4"), "--bits and --group-size do not go with --scheme"),
        (("--bits", "attention=8"), "--bits and --group-size do not go with --scheme"),
        (("--group-size", "32"), "--bits and --group-size do not go with --scheme"),
        (("--positive-scales",), "always positive"),
        (("--asymmetric",), "no zero points"),
    ],
)
def test_what_makes_no_sense_together_is_refused(options: tuple[str, ...], message: str, tmp_path: Path) -> None:
    code, _, said = command("quantize", "demo", "--scheme", "nvfp4", *options, "-o", tmp_path / "x")
    assert code == 2
    assert message in said


def test_columns_that_groups_do_not_divide_are_refused(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    folder = tiny_model("qwen3_moe", moe_intermediate_size=48)
    code, _, said = command("quantize", folder, "--scheme", "mxfp4", "-o", tmp_path / "x")
    assert code == 2
    assert "mxfp4 has groups of 32 columns, which do not divide the 48 input columns" in said


@each_format
def test_in_sittings_it_ends_with_the_same_bytes(
    name: str, tiny_copy: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_copy("deepseek_v3")
    add_tokenizer(folder)
    text = tmp_path / "text.txt"
    text.write_text("The same words again and again, and others between them. " * 60)
    monkeypatch.setattr(pieces, "PIECE_BYTES", 6 * 7680 + 1)  # a sitting may end within a layer
    words = ("quantize", folder, "--scheme", name, "--include", "shared", "--calibration", text, "--tokens", "512")
    words = (*words, "--window", "32")
    code, _, said = command(*words, "-o", tmp_path / "whole")
    assert code == 0, said
    out = tmp_path / "sittings"
    assert command(*words, "-o", out, "--max-pieces", "2")[0] == 0
    other = FORMATS[1 - FORMATS.index(name)]
    code, _, said = command(*words, "--scheme", other, "-o", out, "--resume")
    assert code == 2
    assert f"--scheme was {name}, now {other}" in said
    for _ in range(20):
        code, _, said = command(*words, "-o", out, "--max-pieces", "2", "--resume")
        assert code == 0, said
        if out.exists():
            break
    assert content(out) == content(tmp_path / "whole")


@pytest.mark.parametrize("pruned", [False, True])
def test_experts_that_are_mxfp4_keep_their_codes_and_scales(pruned: bool, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    every_family.save(every_family.build("gpt_oss"), folder, dtype=torch.bfloat16)
    tiny_storages.to_mxfp4(folder)
    byte_tokenizer(folder)
    source, words = open_checkpoint(folder), ("quantize", folder, "--scheme", "mxfp4", *WORDS, "--include", "none")
    keep = {layer: list(range(source.shape.experts)) for layer in source.outline.moe_layers}
    if pruned:
        keep = keep_of(source, source.shape.experts // 2)
        (tmp_path / "plan.json").write_text(plan_text(plan_of(source, keep)))
        words = (*words, "--plan", tmp_path / "plan.json")
    code, _, said = command(*words, "-o", tmp_path / "pressed")
    assert code == 0, said
    assert "keep their codes and scales" in said
    before, after = tensors_of(folder), tensors_of(tmp_path / "pressed")
    artifact = open_artifact(tmp_path / "pressed")
    for layer, kept in keep.items():
        for new, old in enumerate(kept):
            gate, up, down = (name.removesuffix("weight") for name in artifact.family.expert_names(layer, new))
            rows = {gate: slice(0, None, 2), up: slice(1, None, 2), down: slice(None)}
            for module, own in rows.items():
                stored = f"model.layers.{layer}.mlp.experts.{'down' if module == down else 'gate_up'}_proj"
                assert torch.equal(after[f"{module}weight_packed"], before[f"{stored}_blocks"][old][own].flatten(1))
                assert torch.equal(after[f"{module}weight_scale"], before[f"{stored}_scales"][old][own])
            exact = read_expert(source, layer, old)
            for name, weight in zip((gate, up, down), exact.matrices, strict=True):
                assert torch.equal(artifact.read(f"{name}weight").float(), weight)
    report = json.loads((tmp_path / "pressed" / "moepress.json").read_text())
    assert set(report["layer_error"].values()) == {0.0}
    assert report["scheme"] == {"bits": 4, "group_size": 32, "codes": "mxfp4"}
