"""Buffers, devices and batch sizes of a walk through the layers."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import tiny_models
import torch
from stage_runs import keep_of
from torch import nn

from moepress.errors import InvalidInputError, UsageError
from moepress.models.forward import streamed
from moepress.models.forward.gating import gating_of
from moepress.models.forward.streamed import StreamedModel, apply_expert, require_finite_hidden, tokens_of
from moepress.models.forward.walk import (
    Limits,
    Scratch,
    choose_device,
    choose_dtype,
    choose_limits,
    forward,
    read_ahead,
)
from moepress.models.storage.checkpoint import open_checkpoint
from moepress.models.storage.experts import Expert, prune_source

CPU = torch.device("cpu")


def test_every_chosen_expert_gets_its_tokens_and_slots_in_order() -> None:
    chosen = torch.tensor([[3, 0], [0, 1], [1, 3], [3, 1]])
    positions = [(tokens.tolist(), slots.tolist()) for tokens, slots in tokens_of(chosen, 5)]
    assert positions == [([0, 1], [1, 0]), ([1, 2, 3], [1, 0, 1]), ([], []), ([0, 2, 3], [0, 1, 0]), ([], [])]


def test_an_expert_is_a_gated_mlp() -> None:
    torch.manual_seed(0)
    expert = Expert(gate=torch.randn(6, 4), up=torch.randn(6, 4), down=torch.randn(4, 6))
    inputs, experts = torch.randn(3, 4), nn.Module()
    experts.gate_up_proj = nn.Parameter(torch.empty(2, 12, 4))
    expected = (torch.relu(inputs @ expert.gate.T) * (inputs @ expert.up.T)) @ expert.down.T
    torch.testing.assert_close(apply_expert(expert, inputs, gating_of(experts, torch.relu)), expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_activations_that_are_not_finite_stop_the_walk(value: float) -> None:
    hidden = torch.ones(2, 3)
    require_finite_hidden(hidden, 4)
    hidden[1, 1] = value
    with pytest.raises(InvalidInputError, match="Layer 4"):
        require_finite_hidden(hidden, 4)


def test_a_device_that_is_not_there_is_refused() -> None:
    assert choose_device("cpu") == CPU
    assert choose_device("auto").type in {"cpu", "cuda", "mps"}
    with pytest.raises(UsageError, match=r"--device warp is not available on this machine; available: .*cpu"):
        choose_device("warp")


def test_the_dtype_follows_the_device() -> None:
    assert choose_dtype("auto", CPU) is torch.float32
    assert choose_dtype("auto", torch.device("cuda")) is torch.bfloat16
    assert choose_dtype("float16", CPU) is torch.float16


def test_limits_follow_the_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shape = open_checkpoint(tiny_models.make("olmoe", tmp_path / "model")).shape
    assert choose_limits(shape, 2048, 1 << 40).batch_windows == 2
    assert choose_limits(shape, 128, 1 << 40).batch_windows == 16
    assert choose_limits(shape, 2048, 1 << 40, device=torch.device("mps")).batch_windows == 16
    assert choose_limits(shape, 2048, 1).batch_windows == 1
    assert choose_limits(shape, 2048, 1, 5) == Limits(memory_bytes=1, batch_windows=5, shard_windows=8)
    assert [choose_limits(shape, window, 1).shard_windows for window in (1, 1000, 16384, 20000)] == [16384, 16, 1, 1]
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    assert choose_limits(shape, 2048, None) == Limits(memory_bytes=500, batch_windows=1, shard_windows=8)


def test_experts_are_read_ahead_in_order(tiny_model: Callable[..., Path]) -> None:
    model = StreamedModel(open_checkpoint(tiny_model("mixtral")), device=CPU, dtype=torch.float32)
    found = list(read_ahead(model, 1, [2, 0, 3]))
    assert [expert for expert, _ in found] == [2, 0, 3]
    for expert, matrices in found:
        assert torch.equal(matrices.down, model.read_expert(1, expert).down)
    assert list(read_ahead(model, 1, [])) == []


def test_the_size_of_a_batch_changes_only_the_last_bits(tmp_path: Path) -> None:
    source = open_checkpoint(tiny_models.make("deepseek_v3", tmp_path / "model"))
    tokens = tiny_models.windows(source.shape.vocabulary, count=7)
    results = []
    for batch in (1, 3, 7, 16):
        limits = Limits(memory_bytes=1 << 30, batch_windows=batch)
        model = StreamedModel(source, device=CPU, dtype=torch.float32)
        results.append(forward(model, tokens, Scratch(tmp_path, 1 << 30), limits))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pruned", [False, True])
def test_rows_of_a_large_embedding_table_are_those_of_the_whole_one(
    tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, pruned: bool
) -> None:
    checkpoint = open_checkpoint(tiny_model("qwen3_moe", dtype=torch.bfloat16))
    source = prune_source(checkpoint, keep_of(checkpoint, 8)) if pruned else checkpoint
    model = StreamedModel(source, device=CPU, dtype=torch.float32)
    tokens = torch.tensor([[5, 5, 299, 0], [7, 299, 1, 5]])
    whole = model.embed(tokens)
    monkeypatch.setattr(streamed, "_TABLE_BYTES", 0)
    assert torch.equal(model.embed(tokens), whole)
    assert not torch.equal(whole[0, 0], whole[0, 2])
