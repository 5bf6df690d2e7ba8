"""What rounding one kind of matrix costs, held against a model that is changed on disk's level and run on its own."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from stage_runs import CPU, LIMITS
from torch import Tensor

from moepress.compress.budget import kind_losses as module
from moepress.compress.budget.kind_losses import kind_losses
from moepress.compress.budget.rounding import rounded
from moepress.compress.budget.sensitivities import KindLoss, ranges_of, streams_at, together
from moepress.compress.gptq.include import Include, quantized_linears
from moepress.compress.gptq.kinds import Kind, kind_of
from moepress.models.forward.streamed import StreamedModel
from moepress.models.forward.walk import Scratch, forward
from moepress.models.storage.checkpoint import Source, SourceView, open_checkpoint
from moepress.models.storage.experts import is_fused
from moepress.runs.journal import open_run

WINDOWS = tiny_models.windows(256, count=6, length=16)


@dataclass(frozen=True, slots=True, kw_only=True)
class Changed(SourceView):
    """A model with some tensors rounded as they are read."""

    names: frozenset[str]

    def read(self, name: str) -> Tensor:
        found = self.base.read(name)
        if name not in self.names:
            return found
        return torch.stack([rounded(one) for one in found]) if found.ndim == 3 else rounded(found)

    def read_row(self, name: str, row: int) -> Tensor:
        return self.read(name)[row]


def log_probabilities(source: Source, work: Path) -> Tensor:
    model = StreamedModel(source, device=CPU, dtype=torch.float32)
    work.mkdir()
    with torch.inference_mode():
        hidden = forward(model, WINDOWS, Scratch(work, 1 << 30), LIMITS)
        return torch.log_softmax(model.head()(hidden).double(), dim=-1)


def names_of(source: Source, row: KindLoss) -> frozenset[str]:
    """The tensors that a row is about, found anew: by parts of names."""
    layers = source.outline.shape.layers
    linears = quantized_linears(source, layers, frozenset(Include))
    found = set()
    for name in source.shapes:
        layer = source.family.layer_of(name)
        inside = row.layers is None or (layer is not None and row.layers[0] <= layer <= row.layers[1])
        routed = source.family.expert_of(name) is not None
        outside = name in (source.family.embeddings, source.family.head)
        if (
            inside
            and (name in linears or routed or outside)
            and kind_of(source.family, name) == (row.kind or kind_of(source.family, name))
        ):
            found.add(name)
        if layer is not None and layer in source.outline.moe_layers and is_fused(source, layer) and inside:
            first, down = source.family.fused_names(layer)[:2]
            found |= {first} if row.kind in (Kind.EXPERTS, None) else set()
            found |= {down} if row.kind in (Kind.DOWN, None) else set()
    return frozenset(found)


def measured(folder: Path, work: Path, **more: Any) -> list[KindLoss]:
    model = StreamedModel(open_checkpoint(folder), device=CPU, dtype=torch.float32)
    with open_run(work, {}, **more) as run:
        return kind_losses(model, WINDOWS, run, LIMITS)


@pytest.mark.parametrize("key", ["qwen3_moe", "deepseek_v3", "mixtral", "qwen2_moe", "olmoe"])
def test_each_kind_is_rounded_alone_and_all_of_it(key: str, tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    folder = tiny_model(key)
    source = open_checkpoint(folder)
    plain = log_probabilities(source, tmp_path / "plain")
    rows = measured(folder, tmp_path / "run")
    for number, row in enumerate(rows):
        names = names_of(source, row)
        assert names, row
        other = log_probabilities(Changed(base=source, names=names), tmp_path / f"{number}")
        windows = (plain.exp() * (plain - other)).sum(-1).mean(-1)
        assert row.kl == pytest.approx(float(windows.mean()), rel=1e-3), row
        assert row.error == pytest.approx(float(windows.std() / math.sqrt(len(windows))), rel=1e-3)
    kinds = {row.kind for row in rows}
    assert {None, Kind.ATTENTION, Kind.EXPERTS, Kind.DOWN, Kind.EMBEDDINGS} <= kinds
    assert (Kind.HEAD in kinds) == (source.family.head in source.shapes)
    assert (Kind.DENSE in kinds) == (key in ("deepseek_v3", "qwen2_moe"))
    assert (Kind.SHARED in kinds) == (key in ("deepseek_v3", "qwen2_moe"))
    layers = {row.layers for row in rows if row.kind is Kind.EXPERTS}
    assert layers == {(n, n) for n in source.outline.moe_layers}
    assert 0.3 < together(rows) < 3


def test_a_killed_walk_goes_on_with_the_same_figures(
    tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_model("deepseek_v3")
    wanted = measured(folder, tmp_path / "whole")
    step = module._Walk.step

    def killed(walk: Any, layer: int) -> None:
        if layer == 2:
            raise KeyboardInterrupt
        step(walk, layer)

    monkeypatch.setattr(module._Walk, "step", killed)
    with pytest.raises(KeyboardInterrupt):
        measured(folder, tmp_path / "run")
    walked = []
    monkeypatch.setattr(module._Walk, "step", lambda walk, layer: (walked.append(layer), step(walk, layer))[0])
    assert measured(folder, tmp_path / "run", resume=True) == wanted
    assert walked == [2]


def test_ranges_cover_all_layers_once_with_the_edges_alone() -> None:
    for layers in (1, 2, 8, 9, 27, 61, 94):
        ranges = ranges_of(layers)
        assert [n for first, last in ranges for n in range(first, last + 1)] == list(range(layers))
        assert len(ranges) == min(layers, 8)
        assert ranges[0] == (0, 0)
        assert ranges[-1] == (layers - 1, layers - 1)
    mean, most = streams_at(61)
    assert 3 < mean < most == 27
