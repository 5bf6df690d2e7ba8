"""Down projections that were refitted, in whole models: the folder is the model that was walked."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import every_family
import pytest
import tiny_models
import torch
from stage_runs import (
    CPU,
    LIMITS,
    assert_near,
    corpus_of,
    demo_windows,
    expert_outputs,
    keep_of,
    logits_of,
    opened,
    plan_of,
    stored,
    streamed_logits,
    watched,
)
from torch import Tensor

from moepress.compress.pruning import repair_walk
from moepress.compress.pruning.repair import Repair
from moepress.compress.pruning.repair_walk import collect_repairs, collected_downs, collected_rows
from moepress.compress.pruning.repaired import Repairs, repaired_source
from moepress.compress.pruning.repaired_down import DownFiles, down_places
from moepress.compress.pruning.rewrite import prune
from moepress.errors import InvalidInputError
from moepress.models.forward.streamed import StreamedModel
from moepress.models.forward.walk import Limits
from moepress.models.storage.checkpoint import Checkpoint, open_checkpoint
from moepress.models.storage.experts import prune_source
from moepress.runs.journal import open_run
from moepress.stages.places import model_folder

DOWN, ROUTER_TOO, ALL = (
    frozenset({Repair.DOWN}),
    frozenset({Repair.DOWN, Repair.ROUTER}),
    frozenset({Repair.DOWN, Repair.ROUTER, Repair.BIAS}),
)

Keep = Mapping[int, Sequence[int]]


class StoppedError(Exception):
    """Stands for a kill."""


def repaired(
    source: Checkpoint,
    keep: Keep,
    parts: frozenset[Repair],
    windows: Tensor,
    out: Path,
    *,
    limits: Limits = LIMITS,
    resume: bool = False,
) -> Repairs:
    """The repairs, left in `out` as a run that goes on; and the pruned folder beside it."""
    plan = plan_of(source, keep)
    models = [StreamedModel(s, device=CPU, dtype=torch.float32) for s in (source, prune_source(source, keep))]
    made: list[Repairs] = []
    for name in ("walked", "written"):  # the first keeps its down projections, to be looked at
        with open_run(out / name, {}, resume=resume) as run:
            layers = collect_repairs(models[0], models[1], keep, parts, corpus_of(windows), run, limits)
            made.append(
                Repairs(
                    model=plan.model,
                    experts=plan.experts,
                    parts=sorted(parts),
                    layers=layers,
                    calibration={},
                    rows=collected_rows(run, layers),
                    downs=collected_downs(run, layers),
                )
            )
            if name == "written":
                prune(source, plan, run, repairs=made[1])
    assert made[0] == made[1]
    return made[0]


def names_of(source: Any, keep: Keep) -> set[str]:
    return {place.name for layer in keep for place in down_places(source, layer, len(keep[layer]))}


@pytest.mark.parametrize(
    ("key", "options", "parts"),
    [
        ("deepseek_v3", {"dtype": torch.bfloat16}, DOWN),
        ("deepseek_v3", {}, ALL),
        ("qwen3_moe", {"dtype": torch.bfloat16, "fused": True}, ROUTER_TOO),
        ("mixtral", {"dtype": torch.float16}, DOWN),
    ],
    ids=["deepseek_v3", "deepseek_v3-all", "qwen3_moe-fused", "mixtral"],
)
def test_only_down_projections_change_and_the_folder_is_the_model_that_was_walked(
    tiny_model: Callable[..., Path], tmp_path: Path, key: str, options: dict[str, Any], parts: frozenset[Repair]
) -> None:
    source = open_checkpoint(tiny_model(key, **options))
    keep, windows = keep_of(source, source.shape.experts // 2), tiny_models.windows(source.shape.vocabulary, count=48)
    repairs = repaired(source, keep, parts, windows, tmp_path)
    written, pruned = open_checkpoint(tmp_path / "written"), prune_source(source, keep)
    assert {n: tuple(s) for n, s in pruned.shapes.items()} == {n: tuple(s) for n, s in written.shapes.items()}
    changed = {n for n in written.shapes if not torch.equal(written.read(n), pruned.read(n))}
    downs = names_of(pruned, keep)
    assert changed & downs
    if parts == DOWN:
        assert changed <= downs
    for layer in repairs.layers.values():
        assert layer.down is not None
        assert layer.down.error_after <= layer.down.error_before
        assert (layer.down.error_after < layer.down.error_before) == (layer.down.taken > 0)
    seen = repaired_source(pruned, repairs)
    for name in written.shapes:
        assert seen.read(name).dtype == written.read(name).dtype == pruned.read(name).dtype
        assert torch.equal(seen.read(name), written.read(name)), name
        assert torch.equal(seen.read_row(name, 0), written.read(name)[0]), name
    theirs = logits_of(tiny_models.reference(tmp_path / "written"), windows)
    assert_near(streamed_logits(seen, windows, tmp_path / "a"), theirs, 1e-4)
    told = json.loads((tmp_path / "written" / "moepress.json").read_text())["repair"]
    assert Repairs.model_validate(told).layers == repairs.layers
    assert not {"rows", "downs"} & told.keys()
    left = [*(tmp_path / "written").iterdir()]
    assert not [p for p in left if p.name.startswith(("hidden-", "repair-", "down-"))]


def test_the_error_told_is_that_of_transformers_layers(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    """The error of each layer, from what passes the original and the mended folder."""
    folder = tiny_model("deepseek_v3")
    source = open_checkpoint(folder)
    keep, windows = keep_of(source, 8), tiny_models.windows(256, count=24)
    found = repaired(source, keep, DOWN, windows, tmp_path)
    models = [tiny_models.reference(f) for f in (folder, tmp_path / "written")]
    outputs = [layer_outputs(model, windows) for model in models]
    with watched(models[1]) as after:
        logits_of(models[1], windows)
    for layer, row in after.items():
        dense = torch.zeros(len(row["inputs"]), len(keep[layer]), dtype=torch.float64)
        dense.scatter_(1, row["chosen"], row["weights"].double())
        routed = torch.einsum("te,ted->td", dense, expert_outputs(models[1], layer, row["inputs"]).double())
        wanted, got = (every[layer] for every in outputs)
        share = (wanted - got).square().sum() / (wanted - got + routed).square().sum()
        assert found.layers[layer].error_after == pytest.approx(float(share), rel=1e-3)


def layer_outputs(model: Any, windows: Tensor) -> list[Tensor]:
    """What a transformers model's decoder layers give, fp64 [T, D]."""
    seen: list[Tensor] = []

    def hook(_module: Any, _arguments: Any, output: Any) -> None:
        seen.append((output[0] if isinstance(output, tuple) else output).flatten(0, 1).double())

    handles = [layer.register_forward_hook(hook) for layer in model.model.layers]
    logits_of(model, windows)
    for handle in handles:
        handle.remove()
    return seen


def test_the_error_falls_in_every_layer_of_a_trained_model(tmp_path: Path) -> None:
    source = open_checkpoint(model_folder("demo"))
    keep, windows = keep_of(source, 8), demo_windows()
    found = repaired(source, keep, DOWN, windows, tmp_path)
    for layer in found.layers.values():
        assert layer.error_after < layer.error_before
        assert layer.down is not None
        assert layer.down.error_after < layer.down.error_before
        assert layer.down.taken > 0


def test_memory_does_not_change_the_values(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    source = open_checkpoint(tiny_model("deepseek_v3"))
    keep, windows = keep_of(source, 8), tiny_models.windows(256, count=8)
    tight = Limits(memory_bytes=1 << 12, batch_windows=4)
    found = [repaired(source, keep, ALL, windows, tmp_path / str(n), limits=m) for n, m in enumerate((LIMITS, tight))]
    assert found[0] == found[1]


def test_a_refit_that_was_stopped_goes_on_to_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_checkpoint(model_folder("demo"))
    keep, windows = keep_of(source, 8), demo_windows()[:16]
    whole = repaired(source, keep, ROUTER_TOO, windows, tmp_path / "whole")
    last, write = max(keep), repair_walk._write

    def stop(path: Path, repair: Any) -> None:
        if path.name.lstrip(".").startswith(f"repair-{last:05d}"):
            raise StoppedError
        write(path, repair)

    monkeypatch.setattr(repair_walk, "_write", stop)
    with pytest.raises(StoppedError):
        repaired(source, keep, ROUTER_TOO, windows, tmp_path / "out")
    monkeypatch.undo()
    assert repaired(source, keep, ROUTER_TOO, windows, tmp_path / "out", resume=True) == whole
    parts = [stored(open_checkpoint(tmp_path / name / "written")) for name in ("out", "whole")]
    assert parts[0] == parts[1]


def test_fused_experts_that_lie_the_other_way_round_and_have_biases(tmp_path: Path) -> None:
    """gpt-oss: down projections [E, F, D], with biases, which stay."""
    source = opened(every_family.save(every_family.build("gpt_oss"), tmp_path / "model"))
    keep = keep_of(source, source.shape.experts // 2)
    windows = tiny_models.windows(source.shape.vocabulary, count=48)
    repairs = repaired(source, keep, DOWN, windows, tmp_path)
    written, pruned = opened(tmp_path / "written"), prune_source(source, keep)
    changed = {n for n in written.shapes if not torch.equal(written.read(n), pruned.read(n))}
    assert changed
    assert changed <= names_of(pruned, keep)
    seen = repaired_source(pruned, repairs)
    assert_near(streamed_logits(seen, windows, tmp_path / "a"), streamed_logits(written, windows, tmp_path / "b"), 1e-6)


def test_down_projections_of_another_repair_are_refused(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    source = open_checkpoint(tiny_model("mixtral"))
    keep = keep_of(source, 4)
    repairs = repaired(source, keep, DOWN, tiny_models.windows(256, count=12), tmp_path)
    layer = min(keep)
    less = {**repairs.downs.by_layer, layer: repairs.downs.by_layer[layer][:-1]}
    for downs in ({}, less):
        spoiled = repairs.model_copy(update={"downs": DownFiles(by_layer=downs)})
        with pytest.raises(InvalidInputError, match="is not for 4 experts; repair again"):
            repaired_source(prune_source(source, keep), spoiled)
