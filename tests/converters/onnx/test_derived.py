"""Families that nobody wrote down, as ONNX decoders: ONNX Runtime's logits are transformers' own."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import every_family
import onnx
import onnx_runs
import pytest
import tiny_models
import torch
from onnx_runs import (
    DECODE,
    G16,
    PREFILL,
    exact_source,
    graph_of,
    onnx_logits,
    padded_run,
    relative_error,
    to_onnx,
    token_errors,
)
from stage_runs import keep_of, quantized_folder
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from moepress.converters.onnx.export import OnnxRequest
from moepress.converters.onnx.folder import open_onnx
from moepress.models.families.shrunk import VOCABULARY, implementations
from moepress.models.storage.checkpoint import open_checkpoint
from moepress.models.storage.experts import Expert, experts_by_layer, read_expert
from moepress.stages.export import onnx_stage
from moepress.stages.places import Output
from moepress.validation.quality.onnx_check import Checked

EXACT = 2e-5  # relative; 5e-6 is what was seen
# Name of a case -> model type and what differs from its tiny config.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "glm4_moe": (
        "glm4_moe",
        {"head_dim": 32, "attention_bias": True, "use_qk_norm": True, "routed_scaling_factor": 2.5},
    ),
    "glm4_moe_plain": ("glm4_moe", {"head_dim": 64, "partial_rotary_factor": 0.25, "norm_topk_prob": False}),
    "glm4_moe_groups": ("glm4_moe", {"head_dim": 32, "n_group": 4, "topk_group": 2}),
    "glm4_moe_lite": ("glm4_moe_lite", {}),
    "glm4_moe_lite_bias": ("glm4_moe_lite", {"attention_bias": True, "q_lora_rank": None}),
    "dots1": ("dots1", {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 3}),
    "solar_open": ("solar_open", {"head_dim": 32}),
    "minimax_m2": ("minimax_m2", {"head_dim": 32}),
    "gpt_oss": ("gpt_oss", {}),
    "gpt_oss_clamped": ("gpt_oss", {"swiglu_limit": 0.5, "swiglu_alpha": 1.0, "sliding_window": 3}),
}
FAMILIES = ("glm4_moe", "glm4_moe_lite", "gpt_oss_clamped", "minimax_m2")
Made = Callable[[str], Path]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A tiny model's folder by its case."""
    made: dict[str, Path] = {}

    def get(case: str) -> Path:
        if case not in made:
            kind, changes = CASES[case]
            made[case] = every_family.save(every_family.build(kind, **changes), tmp_path_factory.mktemp(case) / "model")
        return made[case]

    return get


@pytest.fixture(scope="module")
def pressed(model: Made, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """The same, pruned to half of its experts and with 4 bits in groups of 16."""
    made: dict[str, Path] = {}

    def get(case: str) -> Path:
        if case not in made:
            source, out = open_checkpoint(model(case)), tmp_path_factory.mktemp(f"pressed-{case}") / "model"
            keep = keep_of(source, source.shape.experts // 2)
            windows = tiny_models.windows(every_family.TEXT_VOCAB, count=3, length=24, seed=1)
            quantized_folder(
                source.folder, windows, out, keep=keep, scheme=G16, include=["attention", "shared", "dense"]
            )  # type: ignore[list-item]
            made[case] = out
        return made[case]

    return get


def tokens(length: int = PREFILL + 4) -> Tensor:
    """Two rows of tokens; a shorter text begins the longer."""
    return tiny_models.windows(every_family.TEXT_VOCAB, count=2, length=PREFILL + DECODE, seed=5)[:, :length]


def theirs(folder: Path, length: int = PREFILL + 4) -> Tensor:
    """transformers' logits of a folder, its codes multiplied out: experts are put into its modules one by one, for it
    does not load all that moepress writes."""
    source = exact_source(folder)
    config = {key: value for key, value in source.config.items() if key != "quantization_config"}
    parsed = CONFIG_MAPPING[config["model_type"]].from_dict(config)
    model = AutoModelForCausalLM.from_config(
        parsed, dtype=torch.float32, **implementations(AutoModelForCausalLM, parsed)
    ).eval()
    state = {source.family.module_name(n): source.read(n).float() for n in source.shapes if ".experts." not in n}
    for layer, count in experts_by_layer(source).items():
        path = f"model.layers.{layer}.{source.family.experts_module}"
        experts = [read_expert(source, layer, expert) for expert in range(count)]
        state |= {f"{path}.{n}": tensor for n, tensor in fused(model.get_submodule(path), experts).items()}
    model.load_state_dict(state)
    return every_family.logits(model, tokens(length))


def fused(module: Any, experts: list[Expert]) -> Mapping[str, Tensor]:
    """The tensors of transformers' experts module."""

    def both(gate: Any, up: Any) -> Tensor:
        return torch.cat((gate, up)) if module.is_concatenated else torch.stack((gate, up), dim=1).flatten(0, 1)

    def turned(matrix: Tensor) -> Tensor:
        return matrix.float().mT if module.is_transposed else matrix.float()

    found = {
        "gate_up_proj": torch.stack([turned(both(e.gate, e.up)) for e in experts]),
        "down_proj": torch.stack([turned(e.down) for e in experts]),
    }
    if experts[0].up_bias is not None:
        found["gate_up_proj_bias"] = torch.stack([both(e.gate_bias, e.up_bias).float() for e in experts])
        found["down_proj_bias"] = torch.stack([e.down_bias.float() for e in experts if e.down_bias is not None])
    return found


def operators(folder: Path) -> set[str]:
    """The operators of an ONNX folder's graph."""
    return {node.op_type for node in graph_of(folder).graph.node}


def require_equal(found: Tensor, wanted: Tensor) -> None:
    """The logits are the same, but for the last bits."""
    assert relative_error(found, wanted) < EXACT


@pytest.mark.parametrize("kernel", ["qmoe", "loop"])
@pytest.mark.parametrize("case", CASES)
def test_dense_folders_give_the_logits_of_transformers(model: Made, tmp_path: Path, case: str, kernel: str) -> None:
    out = to_onnx(model(case), tmp_path / "onnx", kernel=kernel)
    assert ("MoE" in operators(out)) == (kernel == "qmoe")
    length = PREFILL + DECODE
    wanted = every_family.logits(every_family.load(model(case)), tokens(length))
    require_equal(onnx_logits(out, tokens(length), PREFILL), wanted)


@pytest.mark.parametrize("kernel", ["qmoe", "loop"])
@pytest.mark.parametrize("case", FAMILIES)
def test_pressed_folders_give_the_logits_of_transformers(pressed: Made, tmp_path: Path, case: str, kernel: str) -> None:
    out = to_onnx(pressed(case), tmp_path / "onnx", kernel=kernel)
    onnx.checker.check_model(str(out / "model.onnx"), full_check=True)
    assert ("QMoE" if kernel == "qmoe" else "MatMulNBits") in operators(out)
    require_equal(onnx_logits(out, tokens(), PREFILL), theirs(pressed(case)))


@pytest.mark.parametrize("case", FAMILIES)
def test_an_export_passes_its_own_check_and_onnxruntime_genai(pressed: Made, tmp_path: Path, case: str) -> None:
    pytest.importorskip("onnxruntime_genai")
    result = onnx_stage(str(pressed(case)), Output(folder=tmp_path / "onnx"), OnnxRequest())
    assert isinstance(result.checked, Checked)
    assert max(result.checked.prefill_error, result.checked.decode_error) < EXACT
    assert result.checked.genai_same
    opened = open_onnx(tmp_path / "onnx")
    assert opened.summary["experts_bits"]
    assert opened.vocabulary == VOCABULARY


@pytest.mark.parametrize("case", FAMILIES)
def test_an_fp16_graph_is_near(pressed: Made, tmp_path: Path, case: str) -> None:
    out = to_onnx(pressed(case), tmp_path / "onnx", preset="cuda")
    onnx.checker.check_model(str(out / "model.onnx"), full_check=True)
    assert float(token_errors(onnx_logits(out, tokens(), PREFILL), theirs(pressed(case))).median()) < 0.01


@pytest.mark.parametrize("kernel", ["qmoe", "loop"])
def test_mxfp4_experts_are_multiplied_out(model: Made, tmp_path: Path, kernel: str) -> None:
    """gpt-oss as it is published: blocks of 32 4-bit floats with an exponent."""
    folder, generator = tmp_path / "mxfp4", torch.Generator().manual_seed(0)
    every_family.save(every_family.build("gpt_oss"), folder)

    def pack(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
            experts, columns, rows = tensors.pop(name).shape  # transformers' is the transpose of what is stored
            shape = (experts, rows, columns // 32)
            tensors[f"{name}_blocks"] = torch.randint(0, 256, (*shape, 16), generator=generator).to(torch.uint8)
            tensors[f"{name}_scales"] = torch.randint(122, 125, shape, generator=generator).to(torch.uint8)

    tiny_models.rewrite(folder, pack)
    tiny_models.edit_config(folder, quantization_config={"quant_method": "mxfp4"})
    out = to_onnx(folder, tmp_path / "onnx", kernel=kernel)
    assert "quantization_config" not in open_onnx(out).config
    require_equal(onnx_logits(out, tokens(), PREFILL), theirs(folder))


def test_rows_padded_on_the_right_are_those_alone(model: Made, tmp_path: Path) -> None:
    for case in ("glm4_moe", "gpt_oss_clamped"):
        out, rows = to_onnx(model(case), tmp_path / case), tokens(21)
        first, then = padded_run(out, [rows[0, :20], rows[1, :11]], [int(rows[0, 20]), int(rows[1, 11])])
        wanted = every_family.logits(every_family.load(model(case)), rows)
        for number, length in enumerate((20, 11)):
            require_equal(first[number], wanted[number, :length])
            require_equal(then[number], wanted[number, length])


def test_the_attributes_of_the_experts_are_the_models(model: Made, tmp_path: Path) -> None:
    wanted = {"glm4_moe": (1.0, 0.0, None), "gpt_oss": (1.702, 1.0, 7.0), "gpt_oss_clamped": (1.0, 1.0, 0.5)}
    for case, (alpha, beta, limit) in wanted.items():
        out = to_onnx(model(case), tmp_path / case)
        found = [onnx_runs.attributes_of(node) for node in graph_of(out).graph.node if node.op_type == "MoE"]
        assert len(found) == len(open_checkpoint(model(case)).outline.moe_layers)
        for facts in found:
            assert (facts["activation_beta"], facts.get("swiglu_limit")) == (beta, limit)
            assert facts["activation_alpha"] == pytest.approx(alpha)


def test_a_window_and_sinks_are_those_of_the_layer(model: Made, tmp_path: Path) -> None:
    out = to_onnx(model("gpt_oss"), tmp_path / "onnx")
    nodes = [node for node in graph_of(out).graph.node if node.op_type == "GroupQueryAttention"]
    assert [onnx_runs.attributes_of(node)["local_window_size"] for node in nodes] == [8, -1, 8, -1]
    assert [node.input[11] for node in nodes] == [f"model.layers.{n}.self_attn.sinks" for n in range(4)]
