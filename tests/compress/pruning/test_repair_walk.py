"""The repair of whole models: against brute force on what passes transformers' own layers, and as a folder on disk."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from r1_models import small_r1
from stage_runs import (
    CPU,
    LIMITS,
    assert_near,
    corpus_of,
    expert_outputs,
    keep_of,
    logits_of,
    plan_of,
    pruned_folder,
    stored,
    streamed_logits,
    watched,
)
from torch import Tensor

from moepress.compress.pruning.repair import RIDGE, Repair
from moepress.compress.pruning.repair_walk import collect_repairs
from moepress.compress.pruning.repaired import Repairs, repaired_source
from moepress.compress.pruning.rewrite import prune
from moepress.errors import InvalidInputError
from moepress.models.forward.streamed import StreamedModel
from moepress.models.forward.walk import Limits
from moepress.models.storage.checkpoint import open_checkpoint
from moepress.models.storage.experts import prune_source
from moepress.models.storage.tensors import read_tensor
from moepress.runs.journal import open_run

GAIN, BOTH = frozenset({Repair.GAIN}), frozenset({Repair.GAIN, Repair.BIAS})
Keep = Mapping[int, Sequence[int]]


def repaired_folder(
    folder: Path, keep: Keep, parts: frozenset[Repair], windows: Tensor, out: Path, limits: Limits = LIMITS
) -> Repairs:
    """`moepress prune --repair` on these windows."""
    source = open_checkpoint(folder)
    plan = plan_of(source, keep)
    models = [StreamedModel(s, device=CPU, dtype=torch.float32) for s in (source, prune_source(source, keep))]
    with open_run(out, {}) as run:
        layers = collect_repairs(models[0], models[1], keep, parts, corpus_of(windows), run, limits)
        repairs = Repairs(model=plan.model, experts=plan.experts, parts=sorted(parts), layers=layers, calibration={})
        prune(source, plan, run, repairs=repairs)
    return repairs


@contextmanager
def layer_outputs(model: Any) -> Iterator[dict[int, Tensor]]:
    """The outputs of a transformers model's decoder layers, fp64 [T, D]."""
    seen: dict[int, Tensor] = {}

    def keep(layer: int) -> Callable[..., None]:
        def hook(_module: Any, _arguments: Any, output: Any) -> None:
            seen[layer] = (output[0] if isinstance(output, tuple) else output).flatten(0, 1).double()

        return hook

    handles = [module.register_forward_hook(keep(n)) for n, module in enumerate(model.model.layers)]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def brute_force(original: Any, pruned: Any, mended: Any, windows: Tensor) -> dict[int, dict[str, Any]]:
    """By layer: gains by dense least squares, and errors, from what passes three transformers models.

    `pruned` has the experts as they were, `mended` those of the result, whose stream the layers are mended for.
    """
    with watched(mended) as after, layer_outputs(original) as wanted, layer_outputs(mended) as got:
        logits_of(original, windows), logits_of(mended, windows)
    found = {}
    for layer, row in after.items():
        own, experts = (expert_outputs(model, layer, row["inputs"]) for model in (mended, pruned))
        dense = torch.zeros(experts.shape[:2], dtype=torch.float64)
        dense.scatter_(1, row["chosen"], row["weights"].double())
        target = wanted[layer] - (got[layer] - torch.einsum("te,ted->td", dense, own))
        columns = (dense[:, :, None] * experts).permute(0, 2, 1).flatten(0, 1)
        flat, count = target.flatten(), experts.shape[1]
        pull = torch.diag((RIDGE * columns.square().sum(dim=0)).sqrt())
        right = torch.cat((flat, pull @ torch.ones(count, dtype=torch.float64)))
        gains = torch.linalg.lstsq(torch.cat((columns, pull)), right[:, None]).solution.flatten()
        errors = [(flat - columns @ g).square().sum() / flat.square().sum() for g in (torch.ones_like(gains), gains)]
        found[layer] = {"gains": gains, "before": float(errors[0]), "after": float(errors[1])}
    return found


@pytest.mark.parametrize("fused", [False, True], ids=["per-expert", "fused"])
@pytest.mark.parametrize("key", ["deepseek_v3", "deepseek_v2", "qwen3_moe", "qwen2_moe", "mixtral"])
def test_gains_are_those_of_brute_force_on_transformers_layers(
    tiny_model: Callable[..., Path], tmp_path: Path, key: str, fused: bool
) -> None:
    folder = tiny_model(key, fused=fused)
    source = open_checkpoint(folder)
    keep, windows = keep_of(source, source.shape.experts // 2), tiny_models.windows(source.shape.vocabulary, count=12)
    repairs = repaired_folder(folder, keep, GAIN, windows, tmp_path / "mended")
    pruned_folder(folder, keep, tmp_path / "pruned")
    original, pruned, mended = (tiny_models.reference(f) for f in (folder, tmp_path / "pruned", tmp_path / "mended"))
    expected = brute_force(original, pruned, mended, windows)
    assert repairs.layers.keys() == expected.keys() == keep.keys()
    for layer, repair in repairs.layers.items():
        assert repair.gains is not None
        gains = torch.tensor(repair.gains, dtype=torch.float64)
        torch.testing.assert_close(gains, expected[layer]["gains"], rtol=1e-3, atol=1e-4)
        assert repair.error_before == pytest.approx(expected[layer]["before"], rel=1e-3)
        assert repair.error_after == pytest.approx(expected[layer]["after"], rel=1e-3)
        assert repair.error_after < repair.error_before
        assert (gains - 1).abs().max() > 0.01


@pytest.mark.parametrize(
    ("key", "options", "parts"),
    [
        ("deepseek_v3", {"dtype": torch.bfloat16}, BOTH),
        ("deepseek_v3", {"dtype": torch.bfloat16, "fused": True}, GAIN),
        ("mixtral", {"dtype": torch.float16}, GAIN),
        ("moonlight", {}, BOTH),
    ],
    ids=["deepseek_v3", "deepseek_v3-fused", "mixtral", "moonlight"],
)
def test_only_down_projections_and_biases_change_and_the_folder_is_the_model_that_was_walked(
    tiny_model: Callable[..., Path], tmp_path: Path, key: str, options: dict[str, Any], parts: frozenset[Repair]
) -> None:
    folder = tiny_model(key, **options)
    source = open_checkpoint(folder)
    keep, windows = keep_of(source, source.shape.experts // 2), tiny_models.windows(source.shape.vocabulary, count=8)
    repairs = repaired_folder(folder, keep, parts, windows, tmp_path / "mended")
    pruned_folder(folder, keep, tmp_path / "pruned")
    mended, pruned = open_checkpoint(tmp_path / "mended"), open_checkpoint(tmp_path / "pruned")
    before, after = stored(pruned), stored(mended)
    assert before.keys() == after.keys()
    changed = {name for name in before if before[name] != after[name]}
    down = (".down_proj.weight", ".w2.weight", ".experts.down_proj")
    assert all(n.endswith("e_score_correction_bias") or (".experts." in n and n.endswith(down)) for n in changed)
    for name in changed:
        assert before[name][:2] == after[name][:2]  # dtype and shape
    assert any(n.endswith("e_score_correction_bias") for n in changed) == (Repair.BIAS in parts)
    seen = repaired_source(prune_source(source, keep), repairs)
    for name in mended.shapes:
        assert torch.equal(seen.read(name), mended.read(name)), name
        assert torch.equal(seen.read_row(name, 1), mended.read(name)[1]), name
    theirs = logits_of(tiny_models.reference(tmp_path / "mended"), windows)
    assert_near(streamed_logits(mended, windows, tmp_path / "a"), theirs, 1e-4)
    report = json.loads((tmp_path / "mended" / "moepress.json").read_text())
    assert Repairs.model_validate(report["repair"]) == repairs
    assert {f.suffix for f in (tmp_path / "mended").iterdir()} <= {".json", ".safetensors"}
    assert not list((tmp_path / "mended").glob("hidden-*")) + list((tmp_path / "mended").glob("repair-*"))


def test_an_fp8_model_takes_the_gains_in_its_block_scales(tmp_path: Path) -> None:
    folder = small_r1(tmp_path / "r1", experts=32)
    source = open_checkpoint(folder)
    keep, windows = keep_of(source, 16), tiny_models.windows(256, count=8)
    repairs = repaired_folder(folder, keep, GAIN, windows, tmp_path / "mended")
    pruned_folder(folder, keep, tmp_path / "pruned")
    mended, pruned = open_checkpoint(tmp_path / "mended"), open_checkpoint(tmp_path / "pruned")
    before, after = stored(pruned), stored(mended)
    changed = {name for name in before if before[name] != after[name]}
    assert changed
    assert all(".mlp.experts." in n and n.endswith("down_proj.weight_scale_inv") for n in changed)
    for layer, repair in repairs.layers.items():
        assert repair.gains is not None
        assert repair.error_after < repair.error_before
        for expert, gain in enumerate(repair.gains):
            name = f"model.layers.{layer}.mlp.experts.{expert}.down_proj.weight_scale_inv"
            scales = [read_tensor(c.stored[name]) for c in (pruned, mended)]
            assert torch.equal(scales[1], scales[0] * gain)
    ours = streamed_logits(mended, windows, tmp_path / "a")
    seen = streamed_logits(repaired_source(prune_source(source, keep), repairs), windows, tmp_path / "b")
    assert_near(ours, seen, 1e-5)
    assert (ours - streamed_logits(pruned, windows, tmp_path / "c")).abs().max() > 1e-3 * ours.abs().max()


def test_a_bias_is_balanced_and_its_errors_are_those_of_transformers(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tiny_model("deepseek_v3")
    source = open_checkpoint(folder)
    keep, windows = keep_of(source, 8), tiny_models.windows(256, count=12)
    repairs = repaired_folder(folder, keep, BOTH, windows, tmp_path / "mended")
    only = repaired_folder(folder, keep, frozenset({Repair.BIAS}), windows, tmp_path / "bias")
    pruned_folder(folder, keep, tmp_path / "pruned")
    original, pruned, mended, biased = (
        tiny_models.reference(f) for f in (folder, *(tmp_path / n for n in ("pruned", "mended", "bias")))
    )
    for found, model in ((repairs, mended), (only, biased)):
        expected = brute_force(original, pruned, model, windows)
        for layer, repair in found.layers.items():
            assert repair.load_after is not None
            assert repair.load_before is not None
            assert repair.load_after < repair.load_before
            error = expected[layer]["after" if repair.gains else "before"]
            assert repair.error_after == pytest.approx(error, rel=1e-3)
    first = min(keep)
    assert only.layers[first].bias == repairs.layers[first].bias  # nothing before it differs
    assert only.layers[first].gains is None
    unmended = brute_force(original, pruned, pruned, windows)
    assert repairs.layers[first].error_before == pytest.approx(unmended[first]["before"], rel=1e-3)


def test_memory_does_not_change_the_repair(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    folder = tiny_model("deepseek_v3")
    keep, windows = keep_of(open_checkpoint(folder), 8), tiny_models.windows(256, count=8)
    roomy = repaired_folder(folder, keep, BOTH, windows, tmp_path / "roomy")
    tight = repaired_folder(
        folder, keep, BOTH, windows, tmp_path / "tight", Limits(memory_bytes=1 << 12, batch_windows=4)
    )
    assert tight == roomy
    assert [p.name for p in (tmp_path / "tight").iterdir() if p.name.endswith(".tmp")] == []


def test_repairs_for_another_number_of_experts_are_refused(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    folder = tiny_model("mixtral")
    source = open_checkpoint(folder)
    repairs = repaired_folder(folder, keep_of(source, 4), GAIN, tiny_models.windows(256), tmp_path / "mended")
    with pytest.raises(InvalidInputError, match="is not for 6 experts"):
        repaired_source(prune_source(source, keep_of(source, 6)), repairs)
