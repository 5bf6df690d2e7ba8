"""Bits by layer: what is written, who reads it, resuming, sizes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.utils.match import match_targets
from stage_runs import G32, add_tokenizer, assert_near, command, content, logits_of, quantized_folder, streamed_logits

from moepress.compress.estimates.figures import figures_of
from moepress.compress.estimates.footprint import Workload
from moepress.compress.estimates.quantize import estimate_quantize
from moepress.compress.gptq import pieces
from moepress.compress.gptq.include import Include
from moepress.compress.gptq.layer_bits import config_groups, mixed_note, settle_bits
from moepress.converters.safetensors.artifact import open_artifact
from moepress.converters.safetensors.export import check_target
from moepress.converters.safetensors.scheme import Scheme
from moepress.converters.safetensors.targets import EXPERTS
from moepress.errors import UnsupportedError, UsageError
from moepress.models.families.table import DEEPSEEK_V3
from moepress.models.storage.checkpoint import open_checkpoint
from moepress.stages.places import Calibration, Machine, Output
from moepress.stages.quantize import QuantizeRequest, quantize_stage

WINDOWS = tiny_models.windows(256, count=6, length=16)
EVERYTHING = tuple(Include)
G16 = Scheme(bits=4, group_size=16)
BITS = {0: 8, 1: 2, 2: 4}


@pytest.fixture(scope="module")
def mixed(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("mixed") / "q"
    return folder, quantized_folder(
        tiny_model("deepseek_v3"), WINDOWS, folder, include=EVERYTHING, scheme=G16, layer_bits=BITS
    )


def test_every_layer_has_its_bits(mixed: tuple[Path, dict[str, Any]]) -> None:
    folder, result = mixed
    artifact = open_artifact(folder)
    widths: dict[int | None, set[int]] = {}
    for name in artifact.shapes:
        if artifact.is_quantized(name):
            codes, _ = artifact.codes(name)
            widths.setdefault(DEEPSEEK_V3.layer_of(name), set()).add(artifact.scheme_of(name).bits)
            assert int(codes.max()) < 1 << (artifact.scheme_of(name).bits - 1)
    assert widths == {0: {8}, 1: {2}, 2: {4}, None: {4}}
    said = json.loads((folder / "moepress.json").read_text())
    assert said["layer_bits"] == {"0": 8, "1": 2, "2": 4}
    assert said["scheme"] == {"bits": 4, "group_size": 16}
    assert any(note.startswith("Bits differ by layer (2, 4, 8)") for note in said["notes"])
    assert result["layer_error"]["0"] < result["layer_error"]["2"] < result["layer_error"]["1"]


def test_logits_are_those_of_the_dequantized_model(
    tiny_model: Callable[..., Path], mixed: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    """The dense weights that the codes stand for, in transformers' own model, against our reading of the folder."""
    folder, _ = mixed
    artifact, windows = open_artifact(folder), tiny_models.windows(256, seed=8)
    model = tiny_models.reference(tiny_model("deepseek_v3"))
    dense = tmp_path / "dense"
    dense.mkdir()
    for file in tiny_model("deepseek_v3").iterdir():
        if file.is_file():
            (dense / file.name).write_bytes(file.read_bytes())
    tiny_models.rewrite(
        dense, lambda tensors: tensors.update({n: artifact.read(n).to(t.dtype) for n, t in tensors.items()})
    )
    theirs = logits_of(tiny_models.reference(dense), windows)
    assert_near(streamed_logits(artifact, windows, tmp_path), theirs, 2e-5)
    assert (theirs - logits_of(model, windows)).abs().max() > 0.01


def test_compressed_tensors_finds_one_group_for_every_module(mixed: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = mixed
    artifact = open_artifact(folder)
    config = QuantizationConfig.model_validate(artifact.config["quantization_config"])
    linear = torch.nn.Linear(1, 1)
    for name in artifact.shapes:
        module = name.removesuffix(".weight")
        found = [
            group.weights.num_bits
            for group in config.config_groups.values()
            if match_targets(module, linear, group.targets)
        ]
        ignored = bool(match_targets(module, linear, config.ignore))
        if artifact.is_quantized(name):
            assert found == [artifact.scheme_of(name).bits]
            assert not ignored
        elif len(artifact.shapes[name]) == 2 and "embed_tokens" not in name:
            assert ignored


def test_a_layer_is_quantized_as_in_a_model_of_its_bits(
    tiny_model: Callable[..., Path], mixed: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    """Layer 0 comes first: nothing before it differs, so its codes are those of a folder all in 8 bits."""
    scheme = Scheme(bits=8, group_size=16)
    quantized_folder(tiny_model("deepseek_v3"), WINDOWS, tmp_path / "8", include=EVERYTHING, scheme=scheme)
    ours, theirs = tiny_models.load_tensors(mixed[0]), tiny_models.load_tensors(tmp_path / "8")
    names = [name for name in theirs if DEEPSEEK_V3.layer_of(name) == 0]
    assert len(names) > 10
    assert all(torch.equal(ours[name], theirs[name]) for name in names)


def test_a_run_in_sittings_ends_with_the_bytes_of_one(
    tiny_model: Callable[..., Path],
    mixed: tuple[Path, dict[str, Any]],
    tmp_path: Path,
) -> None:
    for _ in range(8):
        result = quantized_folder(
            tiny_model("deepseek_v3"),
            WINDOWS,
            tmp_path / "q",
            include=EVERYTHING,
            scheme=G16,
            layer_bits=BITS,
            max_pieces=1,
        )
        if result["finished"]:
            break
    assert content(tmp_path / "q") == content(mixed[0])


def test_pieces_are_cut_by_the_bits_of_their_layer(
    tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pieces, "PIECE_BYTES", 8 * 4608)  # eight experts of 3 * 64 * 64 weights at 2 + 1 bits
    quantized_folder(tiny_model("deepseek_v3"), WINDOWS, tmp_path / "q", layer_bits={1: 2, 2: 8})
    index = json.loads((tmp_path / "q" / tiny_models.INDEX).read_text())["weight_map"]
    files = {layer: {f for n, f in index.items() if DEEPSEEK_V3.layer_of(n) == layer} for layer in (1, 2)}
    assert [len(found) for found in files.values()] == [2, 8]


def test_a_gptq_export_is_refused(mixed: tuple[Path, dict[str, Any]]) -> None:
    with pytest.raises(UnsupportedError, match="mixed bits, which moepress lays out for ONNX only"):
        check_target(open_artifact(mixed[0]), "gptq")


def test_bits_are_brought_to_one_form(tiny_model: Callable[..., Path]) -> None:
    # Of parts without bits of their own nothing changes: tests of those are in test_part_bits.
    source, attention = open_checkpoint(tiny_model("deepseek_v3")), (Include.ATTENTION,)
    two = Scheme(bits=2, group_size=32)
    assert settle_bits(source, G32, {}, ())[:2] == (G32, {})
    assert settle_bits(source, G32, {1: 4, 2: 4}, attention)[:2] == (G32, {})
    assert settle_bits(source, G32, {1: 2, 2: 2}, ())[:2] == (two, {})  # layer 0 is dense: nothing of it is quantized
    assert settle_bits(source, G32, {1: 2, 2: 2}, attention)[:2] == (G32, {0: 4, 1: 2, 2: 2})
    assert settle_bits(source, G32, {1: 2, 2: 2}, (Include.LM_HEAD,))[:2] == (G32, {1: 2, 2: 2})
    assert settle_bits(source, G32, {1: 2}, ())[:2] == (G32, {1: 2, 2: 4})
    assert config_groups(source, G32, {}, ()) == ()
    assert mixed_note({}, ()) == []
    with pytest.raises(UsageError, match="given for layer 3, and the model has layers 0 to 2"):
        settle_bits(source, G32, {3: 4}, ())
    with pytest.raises(UsageError, match="--bits 5 is not supported"):
        settle_bits(source, G32, {1: 5}, ())


@pytest.mark.parametrize("include", [(), EVERYTHING], ids=["experts", "everything"])
def test_the_size_is_known_beforehand(
    tiny_model: Callable[..., Path], tmp_path: Path, include: tuple[Include, ...]
) -> None:
    folder, bits = tiny_model("deepseek_v3", dtype=torch.bfloat16), {1: 8, 2: 2}
    source = open_checkpoint(folder)
    work = Workload(tokens=96, window=16, device=torch.device("cpu"), dtype=torch.float32, memory_bytes=1 << 30)
    figures = figures_of(source)
    estimate = estimate_quantize(source, figures, 16, G16, work, include=include, layer_bits=bits)
    result = quantized_folder(folder, WINDOWS, tmp_path / "q", include=include, scheme=G16, layer_bits=bits)
    assert estimate.output_bytes == pytest.approx(result["bytes_after"], rel=0.01)
    plain = estimate_quantize(source, figures, 16, G16, work, include=include)
    assert abs(plain.output_bytes - result["bytes_after"]) > 0.02 * result["bytes_after"]


def test_a_plan_s_bits_are_taken_and_the_result_is_validated(tiny_copy: Callable[..., Path], tmp_path: Path) -> None:
    model, text, plan = tiny_copy("mixtral"), tmp_path / "text.txt", tmp_path / "plan.json"
    add_tokenizer(model)
    text.write_text("The cat sat on the mat, and the dog said no. " * 40)
    small = ["--domain", f"one={text}", "--tokens", "256", "--window", "16"]
    steps = [
        ["profile", model, "-o", tmp_path / "profile", *small],
        ["plan", tmp_path / "profile", "--experts", "6", "--group-size", "32", "-o", plan],
    ]
    for step in steps:
        code, _, errors = command(*step)
        assert code == 0, errors
    made = json.loads(plan.read_text())
    made["layer_bits"] = {"0": 8, "1": 2, "2": 4}
    plan.write_text(json.dumps(made))
    arguments = ["quantize", model, "--plan", plan, *small]
    code, printed, errors = command(*arguments, "-o", tmp_path / "q")
    assert code == 0, errors
    assert "Bits differ by layer (2, 4, 8)" in errors
    assert "2, 4 and 8 bit by layer" in printed
    artifact = open_artifact(tmp_path / "q")
    widths = [artifact.scheme_of(f"model.layers.{n}.block_sparse_moe.experts.0.w1.weight").bits for n in range(3)]
    assert widths == [8, 2, 4]
    code, printed, errors = command(
        "validate", model, tmp_path / "q", "--data", text, "--max-windows", "4", "--no-throughput"
    )
    assert code == 0, errors
    assert "KL" in printed
    code, _, errors = command("export", tmp_path / "q", "--to", "gptq", "-o", tmp_path / "gptq")
    assert code == 5
    assert "mixed bits" in errors
    code, _, errors = command(*arguments, "--bits", "4", "--group-size", "32", "-o", tmp_path / "plain")
    assert code == 0, errors
    assert "the plan's bits by layer are left aside" in errors
    assert open_artifact(tmp_path / "plain").schemes == (
        ((EXPERTS,), G32),
        (("Linear",), Scheme(bits=8, group_size=32)),
    )


def test_a_resume_with_other_bits_by_layer_is_refused(tiny_copy: Callable[..., Path], tmp_path: Path) -> None:
    model, text = tiny_copy("mixtral"), tmp_path / "text.txt"
    add_tokenizer(model)
    text.write_text("The cat sat on the mat, and the dog said no. " * 40)

    def quantize(bits: dict[int, int], *, resume: bool) -> dict[str, Any]:
        return quantize_stage(
            str(model),
            Output(folder=tmp_path / "q", resume=resume),
            None,
            QuantizeRequest(scheme=G32, layer_bits=bits),
            Calibration(domains=(f"one={text}",), tokens=256, window=16),
            Machine(device="cpu", memory_bytes=64 << 20),
            max_pieces=1,
        )

    assert not quantize({1: 8}, resume=False)["finished"]
    with pytest.raises(UsageError, match="other bits by layer"):
        quantize({1: 2}, resume=True)
    assert not quantize({1: 8}, resume=True)["finished"]
