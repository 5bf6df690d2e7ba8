"""Bits by part: what is asked for, what is written, and that transformers reads every matrix with its own width."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_models
import torch
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.utils.match import match_targets
from stage_runs import command, content, logits_of, quantized_folder
from transformers import AutoModelForCausalLM
from transformers.utils.quantization_config import CompressedTensorsConfig

from moepress.commands.options import parse_bits
from moepress.compress.budget.sizes import included_linears, settled_parts
from moepress.compress.gptq.include import IN_LAYERS, Asked, Include, Included, asked_for, included
from moepress.compress.gptq.layer_bits import config_groups, mixed_note, settle_bits
from moepress.converters.safetensors.artifact import open_artifact
from moepress.converters.safetensors.scheme import Scheme
from moepress.errors import UsageError
from moepress.models.families.family import Part, part_of
from moepress.models.storage.checkpoint import open_checkpoint

WINDOWS = tiny_models.windows(256, count=6, length=16)
G16 = Scheme(bits=4, group_size=16)
USUAL: Included = {Include.ATTENTION: 8, Include.DENSE: 8, Include.SHARED: 8}
SEVERAL: Included = {Include.ATTENTION: 8, Include.DENSE: None, Include.SHARED: 2, Include.LM_HEAD: 8}
FAMILIES = ("deepseek_v3", "qwen2_moe", "mixtral", "olmoe")


def made(tiny_model: Callable[..., Path], family: str, parts: Included, out: Path) -> Path:
    quantized_folder(tiny_model(family, dtype=torch.bfloat16), WINDOWS, out, include=parts, scheme=G16)
    return out


def expected_bits(part: Part, parts: Included) -> int:
    named = {Part.ATTENTION: Include.ATTENTION, Part.DENSE: Include.DENSE, Part.SHARED: Include.SHARED}
    named[Part.LM_HEAD] = Include.LM_HEAD
    return 4 if part is Part.ROUTED else parts[named[part]] or 4


@pytest.mark.parametrize("parts", [USUAL, SEVERAL], ids=["usual", "several"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_reader_finds_the_width_that_a_matrix_has(
    family: str, parts: Included, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    if (source := open_checkpoint(tiny_model(family))).family.head not in source.shapes:
        parts = {kind: bits for kind, bits in parts.items() if kind is not Include.LM_HEAD}
    artifact = open_artifact(made(tiny_model, family, parts, tmp_path / "q"))
    config, linear = QuantizationConfig.model_validate(artifact.config["quantization_config"]), torch.nn.Linear(1, 1)
    seen = set()
    for name in artifact.shapes:
        if not artifact.is_quantized(name):
            continue
        part, module = part_of(artifact.family, name, artifact.outline.shape.layers), name.removesuffix(".weight")
        bits = expected_bits(part, parts)
        assert artifact.scheme_of(name).bits == bits, name
        assert (4 if bits == 4 else 99) >= int(artifact.codes(name)[0].abs().max()).bit_length()
        # Readers try names and patterns first and `Linear` last: exactly one group is left.
        found = [g.weights.num_bits for g in config.config_groups.values() if match_targets(module, linear, g.targets)]
        own = [g.weights.num_bits for g in config.config_groups.values() if _named(module, linear, g.targets)]
        assert len(own) < 2
        assert (own or found) == [bits], name
        seen.add(part)
    assert {Part.ROUTED, Part.ATTENTION} <= seen


def _named(module: str, linear: torch.nn.Module, targets: list[str]) -> list[str]:
    return match_targets(module, linear, [target for target in targets if target != "Linear"])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dequantize", [False, True])
def test_transformers_computes_what_the_codes_stand_for(
    family: str, dequantize: bool, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    """Against the dense weights that the codes stand for, in the same model: both in bf16, as the folder is."""
    folder, tokens = made(tiny_model, family, USUAL, tmp_path / "q"), tiny_models.windows(256, seed=8)
    dense, artifact = tmp_path / "dense", open_artifact(folder)
    shutil.copytree(tiny_model(family, dtype=torch.bfloat16), dense)
    tiny_models.rewrite(dense, lambda found: found.update({name: artifact.read(name) for name in found}))
    options = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if dequantize else {}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **options).eval()
    assert torch.equal(logits_of(model, tokens), logits_of(tiny_models.reference(dense, torch.bfloat16), tokens))


def test_moepress_json_and_a_resume_know_them(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    model = tiny_model("deepseek_v3", dtype=torch.bfloat16)
    whole = made(tiny_model, "deepseek_v3", USUAL, tmp_path / "whole")
    said = json.loads((whole / "moepress.json").read_text())
    assert (said["include"], said["part_bits"]) == (
        ["attention", "dense", "shared"], {"attention": 8, "dense": 8, "shared": 8},
    )  # fmt: skip
    for _ in range(9):
        options = {"include": USUAL, "scheme": G16, "max_pieces": 1}
        if quantized_folder(model, WINDOWS, tmp_path / "parts", **options)["finished"]:
            break
    assert content(tmp_path / "parts") == content(whole)


def test_bits_of_layers_and_of_parts_go_together(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    parts: Included = {Include.ATTENTION: 8, Include.SHARED: None, Include.DENSE: None}
    layers = {0: 4, 1: 2, 2: 4}
    quantized_folder(
        tiny_model("deepseek_v3"), WINDOWS, tmp_path / "q", include=parts, scheme=G16, layer_bits=layers
    )  # fmt: skip
    artifact = open_artifact(tmp_path / "q")
    for name in artifact.shapes:
        if artifact.is_quantized(name):
            layer = artifact.family.layer_of(name)
            attention = part_of(artifact.family, name, 3) is Part.ATTENTION
            assert artifact.scheme_of(name).bits == (8 if attention else layers[layer or 0]), name


def test_bits_are_brought_to_one_form(tiny_model: Callable[..., Path]) -> None:
    source, eight = open_checkpoint(tiny_model("deepseek_v3")), Scheme(bits=8, group_size=32)
    assert settle_bits(source, eight, {}, USUAL) == (eight, {}, dict.fromkeys(sorted(USUAL)))
    assert config_groups(source, eight, {}, dict.fromkeys(USUAL)) == ()
    assert settle_bits(source, G16, {}, USUAL) == (G16, {}, dict(sorted(USUAL.items())))
    assert settle_bits(source, G16, {1: 2, 2: 2}, USUAL)[:2] == (Scheme(bits=2, group_size=16), {})
    with pytest.raises(UsageError, match="--bits 5 is not supported"):
        settle_bits(source, G16, {}, {Include.SHARED: 5})
    assert mixed_note({}, USUAL) == []
    assert "dequantize=True" in mixed_note({}, SEVERAL)[0]


@pytest.mark.parametrize(
    ("text", "bits", "parts"),
    [
        ("4", 4, {}),
        ("3,attention=8", 3, {"attention": 8}),
        ("attention=4, shared=8", None, {"attention": 4, "shared": 8}),
        ("lm_head=8,2", 2, {"lm_head": 8}),
    ],
)
def test_bits_are_read(text: str, bits: int | None, parts: dict[str, int]) -> None:
    assert parse_bits(text) == (bits, parts)


@pytest.mark.parametrize(
    "text", ["", "four", "4,8", "4,down=5", "4,attention", "4,attention=", "4,attention=8.5", "-4"]
)
def test_what_is_no_number_of_bits_is_refused(text: str, tmp_path: Path) -> None:
    code, _, said = command("quantize", "demo", "--bits", text, "-o", tmp_path / "q")
    assert code == 2
    assert "--bits" in said
    assert "write for example 4,attention=8" in said
    assert not (tmp_path / "q").exists()


def test_what_is_asked_for() -> None:
    assert asked_for(("auto",), {}) == Asked(auto=True)
    assert asked_for(("none",), {}) == Asked()
    assert asked_for(("attention",), {"shared": 8}) == Asked(parts={Include.ATTENTION: None, Include.SHARED: 8})
    assert asked_for(("auto",), {"attention": 4}) == Asked(auto=True, parts={Include.ATTENTION: 4})
    for names, bits in ((("none", "attention"), {}), (("none",), {"shared": 8})):
        with pytest.raises(UsageError, match="--include none"):
            asked_for(names, bits)


def test_auto_takes_what_there_is_and_fits(tiny_model: Callable[..., Path]) -> None:
    auto = Asked(auto=True)
    every = {key: included_linears(open_checkpoint(tiny_model(key)), IN_LAYERS) for key in FAMILIES}
    both: Included = {Include.ATTENTION: 8, Include.DENSE: 8, Include.SHARED: 8}
    for size in (16, -1):
        assert settled_parts(auto, every["qwen2_moe"], size) == (both, [])
        assert settled_parts(auto, every["mixtral"], size) == ({Include.ATTENTION: 8}, [])
    own: Included = {Include.ATTENTION: 4, Include.LM_HEAD: None}
    assert settled_parts(Asked(auto=True, parts=own), every["qwen2_moe"], 16)[0] == included(both | own)
    assert settled_parts(Asked(parts=own), every["qwen2_moe"], 16) == (own, [])
    assert settled_parts(auto, every["qwen2_moe"], 16, floats=True) == (dict.fromkeys(both), [])
    assert settled_parts(Asked(parts=own), every["qwen2_moe"], 16, floats=True) == (dict.fromkeys(own), [])
    parts, notes = settled_parts(auto, every["deepseek_v3"], 16)  # 32 + 16 rows of kv_a_proj_with_mqa
    assert parts == {Include.DENSE: 8, Include.SHARED: 8}
    assert notes == ["Attention stays as it is: a matrix has 48 rows, and packed layouts want multiples of 32."]
    parts, notes = settled_parts(auto, every["qwen2_moe"], 48)
    assert parts == {}
    assert notes[0] == "Attention stays as it is: groups of 48 do not divide 64 columns."


def test_the_default_quantizes_the_whole_model_and_none_the_experts_alone(tmp_path: Path) -> None:
    few = ("--group-size", "64", "--tokens", "2048")
    for name, words in (("auto", ()), ("none", ("--include", "none")), ("own", ("--bits", "4,attention=4"))):
        code, shown, said = command("quantize", "demo", *few, *words, "-o", tmp_path / name)
        assert code == 0, said
        if name == "auto":
            assert "4 bit, attention, dense and shared 8 bit" in shown
    found = {n: json.loads((tmp_path / n / "moepress.json").read_text()) for n in ("auto", "none", "own")}
    assert found["auto"]["part_bits"] == {"attention": 8, "dense": 8, "shared": 8}
    assert found["none"]["include"] == []
    assert "part_bits" not in found["none"]
    assert found["own"]["part_bits"] == {"dense": 8, "shared": 8}
    assert found["own"]["bytes_after"] < found["auto"]["bytes_after"] < found["none"]["bytes_after"]


def test_the_gptq_layout_has_them_and_goes_back(tmp_path: Path) -> None:
    few = ("--group-size", "64", "--tokens", "2048")
    assert command("quantize", "demo", *few, "-o", tmp_path / "q")[0] == 0
    assert command("export", tmp_path / "q", "--to", "gptq", "-o", tmp_path / "gptq")[0] == 0
    assert command("export", tmp_path / "gptq", "--to", "compressed-tensors", "-o", tmp_path / "back")[0] == 0
    one, gptq, back = (open_artifact(tmp_path / name) for name in ("q", "gptq", "back"))
    dynamic = json.loads((tmp_path / "gptq" / "quantize_config.json").read_text())["dynamic"]
    own = {pattern: row for pattern, row in dynamic.items() if pattern.startswith("+:")}
    assert all(row == {"bits": 8, "group_size": 64} for row in own.values())
    assert any("fused_qkv_a_proj" in pattern for pattern in own)  # the name under which vLLM asks for it
    for name in one.shapes:
        if one.is_quantized(name):
            assert one.scheme_of(name) == gptq.scheme_of(name) == back.scheme_of(name)
            assert torch.equal(one.codes(name)[0], gptq.codes(name)[0])
            assert torch.equal(one.codes(name)[0], back.codes(name)[0])
    assert one.config["quantization_config"]["config_groups"] == back.config["quantization_config"]["config_groups"]
    for folder in ("q", "gptq"):
        assert command("check", tmp_path / folder)[0] == 0


def test_check_knows_which_group_transformers_takes_for_experts(tmp_path: Path) -> None:
    few = ("--group-size", "64", "--tokens", "2048")
    assert command("quantize", "demo", *few, "-o", tmp_path / "q")[0] == 0
    found = json.loads(command("check", tmp_path / "q", "--json")[1])["findings"]
    assert [(r["runtime"], r["effect"]) for r in found if r["rule"] == "mixed-bits-by-part"] == [
        ("llama.cpp", "wants an export")
    ]
    config = json.loads((tmp_path / "q" / "config.json").read_text())
    groups = config["quantization_config"]["config_groups"]
    shared = {**groups["group_1"], "targets": [r"re:.*shared_experts.*"]}
    config["quantization_config"]["config_groups"] = {
        "group_0": shared,
        "group_1": groups["group_0"],
        "group_2": groups["group_1"],
    }
    (tmp_path / "q" / "config.json").write_text(json.dumps(config))
    code, shown, _ = command("check", tmp_path / "q", "--runtime", "transformers", "--json")
    wrong = [r["rule"] for r in json.loads(shown)["findings"] if r["effect"] == "silently wrong"]
    assert code == 4, shown
    assert wrong == ["mixed-bits-by-part"]
