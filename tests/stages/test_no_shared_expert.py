"""A shared expert of width 0 is none: every command works, whether its empty tensors are stored or left out."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from onnx_runs import PREFILL, onnx_logits, own_logits, relative_error, to_onnx, tokens_of
from stage_runs import CPU, G32, logits_of, quantized_folder, streamed_logits
from torch import Tensor

from moepress.compress.gptq.include import Include
from moepress.models.families.skeleton import build_skeleton
from moepress.models.forward.dense import load_dense
from moepress.models.storage.checkpoint import open_checkpoint
from moepress.stages.inspect import inspect_model

WIDTH_0: dict[str, dict[str, Any]] = {
    "qwen2_moe": {"shared_expert_intermediate_size": 0},
    "deepseek_v3": {"n_shared_experts": 0},
}
WORDS = tiny_models.windows(256, count=2, length=16)


@pytest.fixture(params=["stored", "left out"])
def stored(request: pytest.FixtureRequest) -> bool:
    return bool(request.param == "stored")


@pytest.fixture(params=WIDTH_0)
def folder(request: pytest.FixtureRequest, tiny_copy: Callable[..., Path], stored: bool) -> Path:
    folder = tiny_copy(request.param, **WIDTH_0[request.param])

    def leave_out(tensors: dict[str, Tensor]) -> None:
        for name in [name for name, tensor in tensors.items() if not tensor.numel()]:
            del tensors[name]

    if not stored:
        tiny_models.rewrite(folder, leave_out)
    return folder


def test_logits_are_those_of_transformers(folder: Path, tmp_path: Path) -> None:
    wanted = logits_of(tiny_models.reference(folder), WORDS)
    source = open_checkpoint(folder)
    assert relative_error(streamed_logits(source, WORDS, tmp_path), wanted) < 1e-5
    assert relative_error(logits_of(load_dense(source, device=CPU, dtype=torch.float32), WORDS), wanted) < 1e-5


def test_inspect_counts_no_shared_experts(folder: Path) -> None:
    assert "shared experts" not in inspect_model(str(folder))["parts"]


def test_no_warning_of_torch_is_shown_to_who_can_do_nothing_about_it(folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build_skeleton(open_checkpoint(folder).config)


def test_quantize_with_include_shared_and_export_to_onnx(folder: Path, tmp_path: Path) -> None:
    made = tmp_path / "made"
    quantized_folder(folder, WORDS, made, scheme=G32, include=[Include.SHARED])
    out = to_onnx(made, tmp_path / "onnx")
    tokens = tokens_of(out, PREFILL + 4)
    assert relative_error(onnx_logits(out, tokens, PREFILL), own_logits(made, tokens)) < 1e-4
