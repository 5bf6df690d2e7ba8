"""A router that was refitted, in whole models: the folder is the model that was walked, and only routers differ."""

import dataclasses
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
    keep_of,
    logits_of,
    opened,
    plan_of,
    pruned_folder,
    stored,
    streamed_logits,
)
from torch import Tensor

from moepress.compress.pruning import repair_router, repair_walk
from moepress.compress.pruning.repair import Repair
from moepress.compress.pruning.repair_walk import collect_repairs, collected_rows
from moepress.compress.pruning.repaired import Repairs, RouterRows, repaired_source
from moepress.compress.pruning.rewrite import prune
from moepress.errors import InvalidInputError, UnsupportedError
from moepress.models.forward.streamed import StreamedModel
from moepress.models.forward.walk import Limits
from moepress.models.storage.checkpoint import Checkpoint, open_checkpoint
from moepress.models.storage.experts import experts_by_layer, prune_source, router_disk_names
from moepress.runs.journal import open_run
from moepress.stages.places import model_folder
from moepress.stages.repair import check_repair

ROUTER, GAINS_TOO, ALL = (
    frozenset({Repair.ROUTER}),
    frozenset({Repair.ROUTER, Repair.GAIN}),
    frozenset({Repair.GAIN, Repair.BIAS, Repair.ROUTER}),
)
Keep = Mapping[int, Sequence[int]]


def repaired(
    source: Checkpoint,
    keep: Keep,
    parts: frozenset[Repair],
    windows: Tensor,
    out: Path,
    *,
    limits: Limits = LIMITS,
    write: bool = True,
    resume: bool = False,
) -> Repairs:
    plan = plan_of(source, keep)
    models = [StreamedModel(s, device=CPU, dtype=torch.float32) for s in (source, prune_source(source, keep))]
    with open_run(out, {}, resume=resume) as run:
        layers = collect_repairs(models[0], models[1], keep, parts, corpus_of(windows), run, limits)
        repairs = Repairs(
            model=plan.model,
            experts=plan.experts,
            parts=sorted(parts),
            layers=layers,
            calibration={},
            rows=collected_rows(run, layers),
        )
        if write:
            prune(source, plan, run, repairs=repairs)
    return repairs


@pytest.mark.parametrize(
    ("key", "options", "parts"),
    [
        ("deepseek_v3", {"dtype": torch.bfloat16}, ROUTER),
        ("deepseek_v3", {}, ALL),
        ("deepseek_v2", {}, GAINS_TOO),
        ("qwen3_moe", {"dtype": torch.bfloat16, "fused": True}, ROUTER),
        ("qwen2_moe", {}, ROUTER),
        ("mixtral", {"dtype": torch.float16}, GAINS_TOO),
    ],
    ids=["deepseek_v3", "deepseek_v3-all", "deepseek_v2", "qwen3_moe-fused", "qwen2_moe", "mixtral"],
)
def test_only_routers_change_and_the_folder_is_the_model_that_was_walked(
    tiny_model: Callable[..., Path], tmp_path: Path, key: str, options: dict[str, Any], parts: frozenset[Repair]
) -> None:
    folder = tiny_model(key, **options)
    source = open_checkpoint(folder)
    keep, windows = keep_of(source, source.shape.experts // 2), tiny_models.windows(source.shape.vocabulary, count=48)
    repairs = repaired(source, keep, parts, windows, tmp_path / "mended")
    pruned_folder(folder, keep, tmp_path / "pruned")
    mended, pruned = open_checkpoint(tmp_path / "mended"), open_checkpoint(tmp_path / "pruned")
    before, after = stored(pruned), stored(mended)
    assert {n: row[:2] for n, row in before.items()} == {n: row[:2] for n, row in after.items()}  # dtypes, shapes
    routers = {router_disk_names(mended, n)[0] for n, r in repairs.layers.items() if r.router and r.router.taken}
    assert routers
    changed = {name for name in before if before[name] != after[name]}
    assert routers <= changed
    if parts == ROUTER:
        assert changed == routers
    for layer, repair in repairs.layers.items():
        assert repair.router is not None
        assert repair.router.taken == (repair.router.error_after < repair.router.error_before)
        assert repair.router.taken == (repair.router.change > 0) == (layer in repairs.rows.by_layer)
    seen = repaired_source(prune_source(source, keep), repairs)
    for name in mended.shapes:
        assert torch.equal(seen.read(name), mended.read(name)), name
        assert torch.equal(seen.read_row(name, 0), mended.read(name)[0]), name
    theirs = logits_of(tiny_models.reference(tmp_path / "mended"), windows)
    assert_near(streamed_logits(mended, windows, tmp_path / "a"), theirs, 1e-4)
    told = json.loads((tmp_path / "mended" / "moepress.json").read_text())["repair"]
    assert Repairs.model_validate(told).layers == repairs.layers
    assert "rows" not in told
    assert not list((tmp_path / "mended").glob("hidden-*")) + list((tmp_path / "mended").glob("repair-*"))


def test_the_walk_goes_on_with_what_the_mended_folder_gives(tmp_path: Path) -> None:
    """Walked once more: the mended model's own error is the one that the repair told."""
    source = open_checkpoint(model_folder("demo"))
    keep, windows = keep_of(source, 8), demo_windows()
    found = repaired(source, keep, ROUTER, windows, tmp_path / "mended")
    mended = repaired_source(prune_source(source, keep), found)
    models = [StreamedModel(s, device=CPU, dtype=torch.float32) for s in (source, mended)]
    with open_run(tmp_path / "again", {}) as run:
        layers = collect_repairs(*models, keep, frozenset({Repair.GAIN}), corpus_of(windows), run, LIMITS)
    first = min(keep)  # behind it the second walk has gains, too
    assert layers[first].error_before == pytest.approx(found.layers[first].error_after, rel=1e-4)
    for layer in found.layers.values():
        assert layer.error_after < layer.error_before
        assert layer.router is not None
        assert layer.router.taken
    whole = streamed_logits(mended, windows, tmp_path / "a")
    assert_near(whole, streamed_logits(open_checkpoint(tmp_path / "mended"), windows, tmp_path / "b"), 1e-6)


def test_memory_does_not_change_the_rows(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    source = open_checkpoint(tiny_model("deepseek_v3"))
    keep, windows = keep_of(source, 8), tiny_models.windows(256, count=8)
    tight = Limits(memory_bytes=1 << 12, batch_windows=4)
    found = [
        repaired(source, keep, ALL, windows, tmp_path / str(n), limits=limits)
        for n, limits in enumerate((LIMITS, tight))
    ]
    assert found[0] == found[1]
    assert found[0].rows.by_layer
    assert found[0].digest == found[1].digest


class StoppedError(Exception):
    """Stands for a kill."""


@pytest.mark.parametrize("layer", [1, 3])
def test_a_repair_that_was_stopped_goes_on_to_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layer: int
) -> None:
    source = open_checkpoint(model_folder("demo"))
    keep, windows = keep_of(source, 8), demo_windows()[:16]
    whole = repaired(source, keep, GAINS_TOO, windows, tmp_path / "whole")
    assert whole.rows.by_layer
    refit = repair_walk.refit_router

    def stop(walk: Any, at: int, routing: Any) -> Any:
        if at == layer:
            raise StoppedError
        return refit(walk, at, routing)

    monkeypatch.setattr(repair_walk, "refit_router", stop)
    with pytest.raises(StoppedError):
        repaired(source, keep, GAINS_TOO, windows, tmp_path / "out")
    monkeypatch.undo()
    resumed = repaired(source, keep, GAINS_TOO, windows, tmp_path / "out", resume=True)
    assert resumed == whole
    assert stored(open_checkpoint(tmp_path / "out")) == stored(open_checkpoint(tmp_path / "whole"))


@pytest.mark.parametrize("name", ["gpt_oss", "glm4_moe"])
def test_a_derived_family_is_refitted_too(tmp_path: Path, name: str) -> None:
    """gpt-oss: its router has a bias, which stays. GLM 4: a correction bias."""
    source = opened(every_family.save(every_family.build(name), tmp_path / name))
    keep = keep_of(source, source.shape.experts // 2)
    windows = tiny_models.windows(source.shape.vocabulary, count=12)
    repairs = repaired(source, keep, ROUTER, windows, tmp_path / "out")
    written, pruned = open_checkpoint(tmp_path / "out"), prune_source(source, keep)
    changed = {n for n in written.shapes if not torch.equal(written.read(n), pruned.read(n))}
    assert changed == {router_disk_names(written, layer)[0] for layer in repairs.rows.by_layer}
    assert changed


def test_a_model_that_keeps_all_experts_keeps_its_rows(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    source = open_checkpoint(tiny_model("deepseek_v3"))
    keep = {layer: list(range(count)) for layer, count in experts_by_layer(source).items()}
    found = repaired(source, keep, ROUTER, tiny_models.windows(256, count=8), tmp_path / "out")
    assert found.rows.by_layer == {}
    assert all(r.router is not None and not r.router.taken and r.router.change == 0 for r in found.layers.values())
    assert stored(open_checkpoint(tmp_path / "out")) == stored(source)


def test_rows_of_another_repair_are_refused(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    source = open_checkpoint(tiny_model("mixtral"))
    keep = keep_of(source, 4)
    repairs = repaired(source, keep, ROUTER, tiny_models.windows(256, count=12), tmp_path / "out")
    other = {layer: rows + 1 for layer, rows in repairs.rows.by_layer.items()}
    for rows in ({}, other):
        spoiled = repairs.model_copy(update={"rows": RouterRows(by_layer=rows)})
        with pytest.raises(InvalidInputError, match="are not those of its repair; repair again"):
            repaired_source(prune_source(source, keep), spoiled)


def test_a_router_that_is_more_than_one_weight_is_refused(
    tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_checkpoint(tiny_model("mixtral"))
    rows = repair_router.router_rows
    monkeypatch.setattr(repair_router, "router_rows", lambda source, layer: rows(source, layer).flip(0))
    with pytest.raises(UnsupportedError, match="more than one weight on what its experts get"):
        repaired(source, keep_of(source, 4), ROUTER, tiny_models.windows(256), tmp_path / "out", write=False)


def test_routers_that_can_not_be_refitted_are_refused_before_any_work() -> None:
    demo = open_checkpoint(model_folder("demo"))
    check_repair(demo, 8, ROUTER)
    unknown = dataclasses.replace(demo, family=dataclasses.replace(demo.family, rule=None))
    with pytest.raises(UnsupportedError, match=r"--repair router: how the router of .* was not found out"):
        check_repair(unknown, 8, ROUTER)
    name = router_disk_names(demo, min(demo.outline.moe_layers))[0]
    coded = {**demo.stored, name: dataclasses.replace(demo.stored[name], dtype="F8_E4M3")}
    with pytest.raises(UnsupportedError, match="is not stored as a plain weight"):
        check_repair(dataclasses.replace(demo, stored=coded), 8, ROUTER)
