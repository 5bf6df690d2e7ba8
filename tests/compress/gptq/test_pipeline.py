"""quantize: what it writes, what it calibrates on, and that it is worth more than rounding."""

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from stage_runs import (
    CPU,
    G32,
    LIMITS,
    assert_near,
    content,
    demo_costs,
    demo_windows,
    keep_of,
    logits_of,
    quantized_folder,
    streamed_logits,
)
from torch import Tensor
from transformers import AutoModelForCausalLM

from moepress.calibration.hessian import HessianOptions, hessian_for
from moepress.compress.gptq import experts, pieces
from moepress.compress.gptq import layer as gptq_layer
from moepress.compress.gptq.coded import QuantizeOptions
from moepress.compress.gptq.experts import solve_experts
from moepress.compress.gptq.grid import absmax_scales, round_to_nearest
from moepress.compress.gptq.include import Include
from moepress.compress.gptq.layer_bits import check_scheme
from moepress.compress.gptq.moments import pooled_hessian, pooled_inputs
from moepress.compress.gptq.pieces import layer_report
from moepress.converters.safetensors.artifact import open_artifact
from moepress.converters.safetensors.scheme import Scheme
from moepress.errors import UsageError
from moepress.models.families.family import Part, part_of
from moepress.models.forward import walk
from moepress.models.forward.streamed import StreamedModel, tokens_of
from moepress.models.forward.walk import Scratch, Stream, add_experts, first_step, open_stream, read_ahead
from moepress.models.storage.checkpoint import Source, open_checkpoint
from moepress.models.storage.experts import prune_source
from moepress.runs.pieces import Piece
from moepress.stages.places import model_folder

G16 = Scheme(bits=4, group_size=16)
EVERYTHING = tuple(Include)
KEYS = ("deepseek_v3", "deepseek_v2_lite", "qwen3_moe", "qwen2_moe", "mixtral", "olmoe")
WINDOWS = tiny_models.windows(256, count=6, length=16)


def untied(source: Source, include: tuple[Include, ...]) -> tuple[Include, ...]:
    """The parts to include, without an lm_head that is tied to the embeddings."""
    return tuple(i for i in include if i is not Include.LM_HEAD or "lm_head.weight" in source.shapes)


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("include", [(), EVERYTHING], ids=["experts", "everything"])
def test_what_is_written_is_what_was_asked_for(
    tiny_model: Callable[..., Path], tmp_path: Path, key: str, include: tuple[Include, ...]
) -> None:
    source = open_checkpoint(tiny_model(key))
    include = untied(source, include)
    quantized_folder(tiny_model(key), WINDOWS, tmp_path / "q", include=include, scheme=G16)
    tensors = tiny_models.load_tensors(tmp_path / "q")
    config = json.loads((tmp_path / "q" / "config.json").read_text())
    ignored = config.pop("quantization_config")["ignore"]
    assert config == source.config
    index = json.loads((tmp_path / "q" / tiny_models.INDEX).read_text())
    assert index["weight_map"].keys() == tensors.keys()
    expected = set()
    quantized_parts = {Part.ROUTED}
    if include:
        quantized_parts |= {Part.ATTENTION, Part.SHARED, Part.DENSE, Part.LM_HEAD}
    for name, shape in source.shapes.items():
        module = name.removesuffix(".weight")
        if len(shape) == 2 and part_of(source.family, name, 3) in quantized_parts and "kv_b_proj" not in name:
            expected |= {f"{module}.{part}" for part in ("weight_packed", "weight_scale", "weight_shape")}
            assert module not in ignored
            assert bool((tensors[f"{module}.weight_packed"] != tensors[f"{module}.weight_packed"][0, 0]).any()), name
        else:
            expected.add(name)
            assert torch.equal(tensors[name], source.read(name))
            if len(shape) == 2 and "embed_tokens" not in name:
                assert module in ignored
    assert tensors.keys() == expected


def test_the_same_input_gives_the_same_bytes(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    for name in ("one", "two"):
        quantized_folder(tiny_model("qwen3_moe"), WINDOWS, tmp_path / name, include=EVERYTHING)
    assert content(tmp_path / "one") == content(tmp_path / "two")


def unpopular(folder: Path, layer: int, expert: int) -> None:
    """Make the router never choose an expert."""

    def change(tensors: dict[str, Tensor]) -> None:
        tensors[f"model.layers.{layer}.mlp.gate.e_score_correction_bias"][expert] = -100.0

    tiny_models.rewrite(folder, change)


@pytest.mark.parametrize("key", ["deepseek_v3", "moonlight"])
def test_an_expert_that_saw_no_token_is_quantized_too(tiny_copy: Callable[..., Path], tmp_path: Path, key: str) -> None:
    folder = tiny_copy(key)
    unpopular(folder, 1, 5)
    windows = tiny_models.windows(256, count=24, length=32)
    result = quantized_folder(folder, windows, tmp_path / "q")
    assert result["experts_without_tokens"] == {"1": [5]}
    assert result["experts_rounded"] == {}
    source, artifact = open_checkpoint(folder), open_artifact(tmp_path / "q")
    for name in source.family.expert_names(1, 5):
        weight, found = source.read(name), artifact.read(name)
        nearest = round_to_nearest(weight[None], absmax_scales(weight[None], G32, scale_dtype=torch.float16), G32)
        assert nearest.shape[1:] == found.shape
        assert (found - weight).norm() < 0.2 * weight.norm()  # 4 bits, not zeros
    report = json.loads((tmp_path / "q" / "moepress.json").read_text())
    assert report["experts_without_tokens"] == {"1": [5]}


def walked(source: Source, layer: int, folder: Path) -> Stream:
    """A stream that stands before a layer."""
    model = StreamedModel(source, device=CPU, dtype=torch.float32)
    stream = open_stream(model, WINDOWS, Scratch(folder, LIMITS.memory_bytes), LIMITS, observe=False)
    for number in range(layer):
        model.load_layer(number)
        if first_step(stream, number):
            add_experts(stream, number)
        model.unload_layer(number)
    return stream


@pytest.mark.parametrize(
    ("key", "include"),
    [("deepseek_v3", ()), ("mixtral", ()), ("qwen2_moe", (Include.ATTENTION, Include.SHARED, Include.DENSE))],
)
def test_calibration_flows_through_the_pruned_and_quantized_layers(
    tiny_model: Callable[..., Path], tmp_path: Path, key: str, include: tuple[Include, ...]
) -> None:
    """The last layer is solved again on what the finished artifact gives in the layers before it: the same codes."""
    folder = tiny_model(key)
    checkpoint = open_checkpoint(folder)
    keep = keep_of(checkpoint, checkpoint.shape.experts // 2)
    quantized_folder(folder, WINDOWS, tmp_path / "q", keep=keep, include=include)
    artifact, source = open_artifact(tmp_path / "q"), prune_source(checkpoint, keep)
    options = QuantizeOptions(scheme=G32, scale_dtype=torch.float16, stored_dtype=torch.float32)
    experts = list(range(checkpoint.shape.experts // 2))

    def codes_from(before: Source) -> list[Tensor]:
        hidden = walked(before, 2, tmp_path).hidden
        stream = walked(source, 0, tmp_path)
        stream.hidden.copy_(hidden)
        linears = {
            n: artifact.read(n) for n in artifact.shapes if source.family.layer_of(n) == 2 and artifact.is_quantized(n)
        }
        stream.model.load_layer(2, linears)
        first_step(stream, 2)
        positions = tokens_of(stream.chosen, stream.model.shape.experts)
        pooled, sample = pooled_hessian(stream), pooled_inputs(stream, options.hessian)
        weights = dict(read_ahead(stream.model, 2, experts, torch.float32))
        solved = solve_experts(stream, 2, weights, positions, pooled, sample, options)
        return [matrix.codes for expert in solved for matrix in (expert.gate, expert.up, expert.down)]

    written = [artifact.codes(name)[0] for e in experts for name in source.family.expert_names(2, e)]
    with torch.inference_mode():
        assert all(torch.equal(a, b) for a, b in zip(codes_from(artifact), written, strict=True))
        other = codes_from(source)  # on the unquantized layers' output it would be another solution
    assert not all(torch.equal(a, b) for a, b in zip(other, written, strict=True))


@pytest.mark.parametrize("match", ["own", "original"])
@pytest.mark.parametrize("key", ["deepseek_v3", "qwen3_moe"])
def test_one_forward_pass_that_waits_gives_the_bytes_of_one_for_each_linear(
    tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str, match: str
) -> None:
    options = {"include": EVERYTHING, "scheme": G16, "hessian": hessian_for(match, 4, {})}
    quantized_folder(tiny_model(key), WINDOWS, tmp_path / "waits", **options)
    monkeypatch.setattr(gptq_layer, "steps_fit", lambda _stream, _reference: False)
    quantized_folder(tiny_model(key), WINDOWS, tmp_path / "again", **options)
    assert content(tmp_path / "waits") == content(tmp_path / "again")


def test_intermediates_that_were_kept_give_the_bytes_of_those_computed_again(
    tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantized_folder(tiny_model("deepseek_v3"), WINDOWS, tmp_path / "kept", scheme=G16)
    monkeypatch.setattr(experts, "_middles_fit", lambda _stream, _seen: False)
    quantized_folder(tiny_model("deepseek_v3"), WINDOWS, tmp_path / "again", scheme=G16)
    assert content(tmp_path / "kept") == content(tmp_path / "again")


@pytest.mark.parametrize("power", [1, 2])
def test_weighing_tokens_changes_the_solution(tiny_model: Callable[..., Path], tmp_path: Path, power: int) -> None:
    folder = tiny_model("mixtral")
    quantized_folder(folder, WINDOWS, tmp_path / "plain")
    quantized_folder(folder, WINDOWS, tmp_path / "weighed", hessian=HessianOptions(weight_power=power))
    names = [n for n in content(tmp_path / "plain") if n.endswith(".safetensors")]
    assert any((tmp_path / "plain" / n).read_bytes() != (tmp_path / "weighed" / n).read_bytes() for n in names)


class Interrupted(ThreadPoolExecutor):
    """Ctrl-C comes while the thread that reads ahead is waited for."""

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        raise KeyboardInterrupt


def test_an_interrupt_while_the_reading_ahead_ends_is_not_lost(
    tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(walk, "ThreadPoolExecutor", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        quantized_folder(tiny_model("qwen3_moe"), WINDOWS, tmp_path / "out")


@pytest.mark.parametrize("key", ["deepseek_v3", "mixtral"])
def test_a_large_layer_is_written_in_parts(
    tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    quantized_folder(tiny_model(key), WINDOWS, tmp_path / "whole")
    monkeypatch.setattr(pieces, "PIECE_BYTES", 3 * 7680 + 1)  # three experts of 3 * 64 * 64 weights at 5 bits
    quantized_folder(tiny_model(key), WINDOWS, tmp_path / "parts")
    whole, parts = (tiny_models.load_tensors(tmp_path / name) for name in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    experts = open_checkpoint(tiny_model(key)).shape.experts
    routed = len(open_checkpoint(tiny_model(key)).outline.moe_layers)
    files = list((tmp_path / "parts").glob("*.safetensors"))
    assert len(files) == routed * -(-experts // 3) + (3 - routed) + 1


def test_an_fp8_model_is_quantized_from_its_dequantized_weights(tiny_copy: Callable[..., Path], tmp_path: Path) -> None:
    folder = tiny_copy("deepseek_v3", dtype=torch.bfloat16)
    tiny_models.add_mtp(folder)
    tiny_models.to_fp8(folder)
    source = open_checkpoint(folder)
    result = quantized_folder(folder, WINDOWS, tmp_path / "q", keep=keep_of(source, 8))
    assert result["notes"][0].startswith("The multi-token-prediction layer was dropped")
    tensors = tiny_models.load_tensors(tmp_path / "q")
    assert not [n for n in tensors if "scale_inv" in n or "layers.3." in n]
    assert not [n for n, t in tensors.items() if t.dtype == torch.float8_e4m3fn]
    name = "model.layers.1.self_attn.kv_b_proj.weight"
    assert torch.equal(tensors[name], source.read(name).bfloat16())
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    assert tensors[name].dtype == torch.float32
    artifact = open_artifact(tmp_path / "q")
    assert artifact.config["num_nextn_predict_layers"] == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "q", dtype="auto", attn_implementation="sdpa")
    theirs = logits_of(torch.nn.Module.float(model).eval(), WINDOWS)
    assert_near(streamed_logits(artifact, WINDOWS, tmp_path), theirs, 2e-5)


def test_a_float32_router_of_an_fp8_model_stays_float32(tiny_copy: Callable[..., Path], tmp_path: Path) -> None:
    folder = tiny_copy("deepseek_v3", dtype=torch.bfloat16)
    name = "model.layers.1.mlp.gate.weight"
    exact = torch.randn(16, 64, generator=torch.Generator().manual_seed(4)) * 0.3
    tiny_models.rewrite(folder, lambda tensors: tensors.update({name: exact}))
    tiny_models.to_fp8(folder)
    quantized_folder(folder, WINDOWS, tmp_path / "q")
    assert torch.equal(tiny_models.load_tensors(tmp_path / "q")[name], exact)


@pytest.mark.parametrize(
    ("key", "group_size", "include", "message"),
    [
        ("deepseek_v3", 128, (), r"experts\.0\..*--group-size 128 does not divide the 64"),
        ("deepseek_v3", 64, (Include.ATTENTION,), r"q_b_proj.weight: --group-size 64 does not divide the 48"),
        ("mixtral", 48, (Include.LM_HEAD,), r"--group-size 48 does not divide the 64"),
    ],
)
def test_a_group_size_that_does_not_divide_is_refused_naming_the_matrix(
    tiny_model: Callable[..., Path], key: str, group_size: int, include: tuple[Include, ...], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        check_scheme(open_checkpoint(tiny_model(key)), Scheme(bits=4, group_size=group_size), include)


def test_a_tied_lm_head_cannot_be_included(tiny_model: Callable[..., Path]) -> None:
    with pytest.raises(UsageError, match="ties lm_head to its embeddings"):
        check_scheme(open_checkpoint(tiny_model("qwen2_moe")), Scheme(bits=4, group_size=32), [Include.LM_HEAD])


def test_errors_are_reported_for_every_layer_and_fall_with_more_bits(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    errors = []
    for bits in (2, 4, 8):
        scheme = Scheme(bits=bits, group_size=32)
        result = quantized_folder(tiny_model("mixtral"), WINDOWS, tmp_path / str(bits), scheme=scheme)
        assert set(result["layer_error"]) == {"0", "1", "2"}
        errors.append(max(result["layer_error"].values()))
    assert 0 < errors[2] < 1e-3 < errors[1] < 2e-2 < errors[0] < 1


class Rounded:
    """A source whose routed experts are rounded to nearest: what GPTQ has to beat."""

    def __init__(self, base: Source, scheme: Scheme) -> None:
        self.base, self.scheme = base, scheme
        self.config, self.family, self.outline, self.shapes = base.config, base.family, base.outline, base.shapes

    def read(self, name: str) -> Tensor:
        tensor = self.base.read(name)
        if part_of(self.family, name, int(self.config["num_hidden_layers"])) is not Part.ROUTED:
            return tensor
        weight = tensor.float()[None]
        scales = absmax_scales(weight, self.scheme, scale_dtype=tensor.dtype)
        codes = round_to_nearest(weight, scales, self.scheme)[0].float()
        return (codes * scales[0].repeat_interleave(self.scheme.group_size, dim=1)).to(tensor.dtype)

    def read_row(self, name: str, row: int) -> Tensor:
        return self.read(name)[row]


def test_quantizing_the_demo_model_beats_rounding_to_nearest(tmp_path: Path) -> None:
    folder, scheme = model_folder("demo"), Scheme(bits=3, group_size=64)
    quantized_folder(folder, demo_windows(), tmp_path / "q", scheme=scheme)
    sources = open_artifact(tmp_path / "q"), Rounded(open_checkpoint(folder), scheme)
    divergences, losses = zip(*(demo_costs(source, tmp_path) for source in sources), strict=True)
    assert 0 < divergences[0] < 0.7 * divergences[1]
    assert losses[0] < losses[1]


def test_a_report_does_not_depend_on_the_order_of_keys_in_a_journal() -> None:
    """A journal read back has its keys sorted as text; sums of floats would differ in the last bits."""

    def piece(experts: list[int], linears: list[str]) -> Piece:
        errors = {"a": 1e16, "b": 1.0, "c": -1e16}
        note = {
            "layer": 1,
            "experts": {str(e): [0, errors["abc"[e % 3]], 1.0, True] for e in experts},
            "linears": {name: errors[name] for name in linears},
        }
        return Piece(id="layer-1-0", name="x", bytes=0, sha256="", note=note)

    one, two = piece([0, 1, 2, 10, 11], ["a", "b", "c"]), piece([10, 11, 0, 2, 1], ["c", "a", "b"])
    assert layer_report([one]) == layer_report([two])
    assert layer_report([one])["experts_rounded"] == {"1": [0, 1, 2, 10, 11]}
