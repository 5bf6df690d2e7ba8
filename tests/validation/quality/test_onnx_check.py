"""The self-check: good exports pass, spoiled ones do not; onnxruntime-genai goes on with the same tokens."""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx_runs
import psutil
import pytest
import tiny_models
import torch
from onnx_runs import DECODE, G16, PREFILL, Models, coded_folder, drop_experts, graph_of, relative_error, tokens_of
from stage_runs import keep_of

from moepress.converters.onnx.export import OnnxRequest
from moepress.converters.onnx.folder import open_onnx
from moepress.converters.safetensors.artifact import open_source
from moepress.converters.safetensors.scheme import Scheme
from moepress.errors import MoepressError
from moepress.models.families.family import Part
from moepress.stages.export import onnx_stage
from moepress.stages.places import Output
from moepress.validation.quality.onnx_check import Checked, check_export, genai_greedy, own_logits
from moepress.validation.quality.onnx_session import Decoding, open_session

EXACT = 1e-4


@pytest.fixture(scope="module")
def models(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Models:
    return onnx_runs.models_of(tiny_model, tmp_path_factory)


def checked(source: Path, out: Path) -> Checked:
    found = check_export(open_source(source), out)
    assert isinstance(found, Checked)
    return found


def place_of(folder: Path, name: str) -> tuple[Path, int, int]:
    """File, first byte and number of bytes of a weight."""
    tensor = next(t for t in graph_of(folder).graph.initializer if re.fullmatch(name, t.name))
    place = {row.key: row.value for row in tensor.external_data}
    return folder / place["location"], int(place["offset"]), int(place["length"])


def spoil(folder: Path, name: str, change: Callable[[bytes], bytes]) -> None:
    """Change the bytes of a weight, and nothing else."""
    file, begin, length = place_of(folder, name)
    data = file.read_bytes()
    changed = change(data[begin : begin + length])
    assert len(changed) == length
    file.write_bytes(data[:begin] + changed + data[begin + length :])


@pytest.mark.parametrize("key", ["deepseek_v3", "qwen3_moe", "mixtral_window"])
def test_good_exports_pass(models: Models, key: str) -> None:
    for folder in (models.quantized(key), models.tiny(key)):
        found = checked(folder, models.onnx(folder))
        assert found.providers == ("CPUExecutionProvider",)
        assert found.compared_with == "the artifact's logits"
        assert (found.tokens, found.same_top1, found.genai_same, found.notes) == ((24, 8), 1.0, True, ())
        assert 0 < found.median_error <= max(found.prefill_error, found.decode_error) < EXACT


def test_what_is_rounded_by_choice_passes_with_its_error(models: Models) -> None:
    folder = models.quantized("deepseek_v3")
    half = checked(folder, models.onnx(folder, preset="cuda"))
    rounded = checked(folder, models.onnx(folder, accuracy_level=4))
    assert EXACT < half.median_error < 0.005
    assert half.genai_same is rounded.genai_same is None  # made for CUDA; other activations than those compared
    assert max(rounded.prefill_error, rounded.decode_error) < EXACT  # the same weights, with exact activations
    assert "accuracy level 0" in rounded.notes[0]
    names = {file.name for file in models.onnx(folder, accuracy_level=4).iterdir()}
    assert not [name for name in names if name.endswith(".tmp")]


def test_2_bits_in_one_layer_only_are_no_fault(models: Models, tmp_path: Path) -> None:
    """Their CPU kernel rounds activations, and the first layers' width does not tell it."""

    def scheme(module: str) -> Scheme:
        return Scheme(bits=2 if ".layers.2." in module else 4, group_size=32)

    folder = coded_folder(models.tiny("olmoe"), tmp_path / "mixed", scheme, [Part.ROUTED])
    result = onnx_stage(str(folder), Output(folder=tmp_path / "onnx"), OnnxRequest())
    assert result.checked.median_error > EXACT
    assert "kernel for 2-bit experts rounds activations to int8" in result.notes[0]


@pytest.mark.parametrize("key", ["olmoe", "deepseek_v3"])
def test_layers_of_unequal_counts_are_held_against_the_artifact_too(models: Models, tmp_path: Path, key: str) -> None:
    folder = models.coded(key, G16, parts=[Part.ROUTED])
    counts = ((0, 8), (2, 5)) if key == "olmoe" else ((1, 8), (2, 12))
    keep = {layer: keep_of(open_source(folder), count)[layer] for layer, count in counts}
    few = drop_experts(folder, tmp_path / "few", keep)
    found = onnx_stage(str(few), Output(folder=tmp_path / "onnx"), OnnxRequest()).checked
    assert (found.compared_with, found.notes) == ("the artifact's logits", ())
    assert max(found.prefill_error, found.decode_error) < EXACT
    spoil(tmp_path / "onnx", *SPOILED["codes of experts"])
    with pytest.raises(MoepressError, match="logits differ"):
        check_export(open_source(few), tmp_path / "onnx")


SPOILED = {
    "codes of experts": (r"model\.layers\.2\.mlp\.experts\.fc1_codes", lambda b: bytes(x ^ 0x88 for x in b)),
    "scales of experts": (r"model\.layers\.1\.mlp\.experts\.fc2_scales", lambda b: b[4:] + b[:4]),
    "codes of attention": (r"model\.layers\.1\.self_attn\.o_proj\.weight_codes", lambda b: b[::-1]),
    "rows of the router": (r"model\.layers\.1\.mlp\.gate\.weight", lambda b: b[256:] + b[:256]),
    "bias of the router": (r"model\.layers\.1\.mlp\.gate\.e_score_correction_bias", lambda b: b[4:] + b[:4]),
    "shared experts": (r"model\.layers\.1\.mlp\.shared_experts\.down_proj\.weight_scales", lambda b: bytes(len(b))),
    "order of the tokens": (r"model\.embed_tokens\.weight", lambda b: b[256:] + b[:256]),
    "angles": (r"model\.rotary_emb\.sin", lambda b: bytes(len(b))),
}


@pytest.mark.parametrize("what", list(SPOILED))
def test_a_spoiled_export_fails(models: Models, tmp_path: Path, what: str) -> None:
    source = models.quantized("deepseek_v3")
    folder = Path(shutil.copytree(models.onnx(source), tmp_path / "spoiled"))
    name, change = SPOILED[what]
    spoil(folder, name, change)
    with pytest.raises(MoepressError, match=r"logits differ from the artifact's logits .* so the export was not kept"):
        check_export(open_source(source), folder)


def test_a_single_wrong_code_of_one_used_expert_is_seen(models: Models, tmp_path: Path) -> None:
    source = models.coded("mixtral", Scheme(bits=8, group_size=32), parts=[Part.ROUTED])
    folder = Path(shutil.copytree(models.onnx(source), tmp_path / "spoiled"))
    before = checked(source, folder)
    spoil(folder, r"model\.layers\.0\.mlp\.experts\.fc2_codes", lambda b: bytes([b[0] ^ 0x80]) + b[1:])
    with pytest.raises(MoepressError, match="logits differ"):
        check_export(open_source(source), folder)
    assert max(before.prefill_error, before.decode_error) < EXACT


@pytest.mark.parametrize("request_", [{"preset": "cuda"}, {"accuracy_level": 4}], ids=str)
@pytest.mark.parametrize("what", ["codes of experts", "rows of the router", "bias of the router", "shared experts"])
def test_a_spoiled_rounded_export_fails_too(
    models: Models, tmp_path: Path, what: str, request_: dict[str, Any]
) -> None:
    """What rounding activations changes must not hide what a wrong weight changes."""
    source = models.quantized("deepseek_v3")
    folder = Path(shutil.copytree(models.onnx(source, **request_), tmp_path / "spoiled"))
    name, change = SPOILED[what]
    spoil(folder, name, change)
    with pytest.raises(MoepressError, match="so the export was not kept"):
        check_export(open_source(source), folder)


def test_a_cache_that_goes_wrong_fails(models: Models, tmp_path: Path) -> None:
    folder = models.coded("olmoe", G16, parts=[Part.ROUTED])
    few = drop_experts(folder, tmp_path / "few", {1: [0, 2, 4, 6, 7]})
    out = onnx_runs.to_onnx(few, tmp_path / "onnx")
    model = graph_of(out)
    first = next(node for node in model.graph.node if node.op_type == "GroupQueryAttention")
    other = [node for node in model.graph.node if node.op_type == "GroupQueryAttention"][1]
    first.input[3], other.input[3] = other.input[3], first.input[3]  # each layer looks at the other's keys
    (out / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(MoepressError, match="logits differ from the artifact's logits"):
        check_export(open_source(few), out)


def test_a_graph_that_is_not_valid_fails(models: Models, tmp_path: Path) -> None:
    source = models.quantized("mixtral")
    folder = Path(shutil.copytree(models.onnx(source), tmp_path / "spoiled"))
    model = graph_of(folder)
    model.graph.node[0].output[0] = "nobody reads this"
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(MoepressError, match="The exported graph is not valid"):
        check_export(open_source(source), folder)


def test_a_model_larger_than_memory_is_not_run(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    source = models.quantized("mixtral")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    found = check_export(open_source(source), models.onnx(source))
    assert isinstance(found, str)
    assert found.startswith("the session was not tried: the model has 0.0 GiB")


def test_own_logits_are_those_of_the_codes_in_fp32(models: Models) -> None:
    folder = models.coded("mixtral", Scheme(bits=4, group_size=32), parts=[Part.ROUTED], dtype=torch.float16)
    tokens = tokens_of(folder, 12)
    found = own_logits(open_source(folder), tokens[0])
    assert relative_error(found, models.own_logits(folder)[0, :12]) < 1e-6


def greedy(folder: Path, prompt: list[int], count: int) -> list[int]:
    decoding, found = Decoding(open_session(open_onnx(folder), "cpu")), list[int]()
    logits = decoding.step(torch.tensor([prompt]))
    while len(found) < count:
        found.append(int(logits[0, -1].argmax()))
        logits = decoding.step(torch.tensor([[found[-1]]]))
    return found


def ending_at(folder: Path, out: Path, token: int) -> Path:
    """A copy by links whose genai config has that token as the end of text."""
    shutil.copytree(folder, out, copy_function=os.symlink)
    config: dict[str, Any] = json.loads((out / "genai_config.json").read_text())
    config["model"]["eos_token_id"] = token
    (out / "genai_config.json").unlink()
    (out / "genai_config.json").write_text(json.dumps(config))
    return out


@pytest.mark.parametrize("key", tiny_models.KEYS)
def test_genai_goes_on_with_the_same_tokens(models: Models, tmp_path: Path, key: str) -> None:
    folder = models.onnx(models.quantized(key))
    prompt = tokens_of(folder, PREFILL)[0].tolist()
    ours = greedy(folder, prompt, DECODE)
    other = min(set(range(256)) - {*ours})
    assert genai_greedy(ending_at(folder, tmp_path / "copy", other), prompt, DECODE) == ours


def test_genai_stops_at_the_end_of_text(models: Models, tmp_path: Path) -> None:
    folder = models.onnx(models.quantized("olmoe"))
    prompt = tokens_of(folder, 5)[0].tolist()
    ours = greedy(folder, prompt, 8)
    found = genai_greedy(ending_at(folder, tmp_path / "copy", ours[4]), prompt, 8)
    assert found == ours[: ours.index(ours[4]) + 1]


def test_other_tokens_of_genai_fail(models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from moepress.validation.quality import onnx_check

    source = models.quantized("olmoe")
    plain = onnx_check.genai_greedy
    monkeypatch.setattr(onnx_check, "genai_greedy", lambda *a: [(plain(*a)[0] + 1) % 256, *plain(*a)[1:]])
    with pytest.raises(MoepressError, match="onnxruntime-genai goes on with other tokens"):
        check_export(open_source(source), models.onnx(source))
