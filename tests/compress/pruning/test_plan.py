"""Plans: pure, readable, checked when they come back from an editor, and right about sizes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from stage_runs import G32, add_tokenizer, corpus_of, plan_of, profile_of, pruned_folder, quantized_folder

from moepress.calibration.profile import Profile
from moepress.compress.pruning.plan import (
    Plan,
    check_plan,
    count_from_keep,
    estimate_sizes,
    load_plan,
    make_plan,
    plan_text,
)
from moepress.compress.pruning.scoring import Criterion, Groups
from moepress.converters.safetensors.scheme import Codes, Scheme
from moepress.errors import InvalidInputError, UsageError
from moepress.models.families.family import Shape
from moepress.models.forward.inventory import inventory
from moepress.models.storage.checkpoint import open_checkpoint
from moepress.models.storage.mtp import Mtp
from moepress.stages.places import Calibration, Machine, Output
from moepress.stages.prune import prune_stage
from moepress.stages.quantize import QuantizeRequest, quantize_stage

GROUPED = Shape(
    layers=3,
    hidden=64,
    experts=16,
    top_k=4,
    expert_width=64,
    groups=4,
    top_groups=2,
    vocabulary=256,
    context=256,
)


@pytest.fixture(scope="module")
def made(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Profile:
    windows = tiny_models.windows(256, count=12, length=16)
    corpus = corpus_of(windows, torch.arange(12) % 2, ("german", "python"))
    return profile_of(tiny_model("deepseek_v3"), corpus, tmp_path_factory.mktemp("work") / "profile")


def test_the_same_profile_and_options_give_the_same_plan(made: Profile) -> None:
    options: dict[str, Any] = {"count": 8, "criterion": Criterion.REAP, "weights": {"german": 2.0}, "scheme": G32}
    statistics = {n: {k: v.copy() for k, v in row.items()} for n, row in made.statistics.items()}
    first, second = make_plan(made, **options), make_plan(made, **options)
    assert plan_text(first) == plan_text(second)
    for layer, row in statistics.items():  # and nothing was changed on the way
        assert all(np.array_equal(row[name], made.statistics[layer][name]) for name in row)


def test_a_plan_survives_its_text(made: Profile, tmp_path: Path) -> None:
    plan = make_plan(made, count=8, weights={"python": 3.0}, scheme=G32)
    file = tmp_path / "plan.json"
    file.write_text(plan_text(plan))
    assert load_plan(file) == plan
    assert plan_text(load_plan(file)) == file.read_text()


@pytest.mark.parametrize("codes", [Codes.NVFP4, Codes.MXFP4])
def test_a_plan_of_floats_survives_its_text_and_others_do_not_mention_them(
    made: Profile, tmp_path: Path, codes: Codes
) -> None:
    plan, file = make_plan(made, count=8, scheme=Scheme.of_floats(codes)), tmp_path / "plan.json"
    file.write_text(plan_text(plan))
    assert load_plan(file) == plan
    assert plan_text(load_plan(file)) == file.read_text()
    assert plan.quantization is not None
    assert plan.quantization.scheme() == Scheme.of_floats(codes)
    integers = make_plan(made, count=8, scheme=G32)
    assert json.loads(plan_text(integers))["quantization"] == {"bits": 4, "group_size": 32}
    assert load_plan(edited(integers, tmp_path, quantization={"bits": 4, "group_size": 32, "codes": "int"})) == integers


def test_the_text_has_one_line_for_each_layer(made: Profile) -> None:
    plan = make_plan(made, count=8)
    lines = plan_text(plan).splitlines()
    assert f'    "1": {json.dumps(plan.keep[1])},' in lines
    assert f'    "2": {json.dumps(plan.keep[2])}' in lines
    assert json.loads(plan_text(plan))["keep"] == {str(n): kept for n, kept in plan.keep.items()}


def test_what_a_plan_says_about_losses_is_between_nothing_and_all(made: Profile) -> None:
    half, whole = make_plan(made, count=8), make_plan(made, count=16)
    for loss in half.loss.values():
        assert 0 < loss.gate_mass < 1
        assert 0 < loss.reap_sum_mass < 1
    by_gate = make_plan(made, count=8, criterion=Criterion.GATE).loss.values()
    by_reap_sum = make_plan(made, count=8, criterion=Criterion.REAP_SUM).loss.values()
    assert sum(loss.gate_mass for loss in by_gate) <= sum(loss.gate_mass for loss in by_reap_sum)
    assert sum(loss.gate_mass for loss in by_gate) < 2 * 0.5  # the better half stays
    assert sum(loss.reap_sum_mass for loss in by_reap_sum) < 2 * 0.5
    assert set(half.loss) == {"german", "python"}
    assert all(loss.gate_mass == loss.reap_sum_mass == 0 for loss in whole.loss.values())
    assert whole.stability == 1.0
    assert not whole.prunes
    assert half.prunes


def edited(plan: Plan, folder: Path, **changes: Any) -> Path:
    file = folder / "plan.json"
    file.write_text(json.dumps(json.loads(plan_text(plan)) | changes))
    return file


EIGHT = [0, 1, 4, 5, 8, 9, 12, 13]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keep": {"1": EIGHT, "2": EIGHT[:-1]}}, "layer 2 keeps 7 experts and the plan says 8"),
        ({"keep": {"1": [1, 0, *EIGHT[2:]], "2": EIGHT}}, "keep list of layer 1 must hold expert numbers, ascending"),
        ({"keep": {"1": [0, 0, *EIGHT[2:]], "2": EIGHT}}, "layer 1 .* once each"),
        ({"keep": {"1": EIGHT, "2": [*EIGHT[:-1], 16]}}, "keep list of layer 2"),
        ({"keep": {"1": EIGHT, "2": [-1, *EIGHT[1:]]}}, "keep list of layer 2"),
        ({"keep": {"1": EIGHT, "2": []}}, "keep list of layer 2"),
        ({"keep": {"1": EIGHT, "two": EIGHT}}, "keep.two"),
        ({"keep": {"1": EIGHT, "2": [0.5, *EIGHT[1:]]}}, "keep.2.0"),
        ({"keep": None}, "keep: "),
        ({"experts": 0}, "experts: "),
        ({"schema_version": "2.0"}, "schema_version: "),
        ({"criterion": "magic"}, "criterion: "),
        ({"kep": {}}, "kep: "),
        ({"quantization": {"bits": 4, "groupsize": 32}}, "quantization.groupsize"),
        ({"quantization": {"codes": "fp6"}}, "quantization.codes"),
        ({"quantization": {"codes": "nvfp4"}}, "nvfp4 has 4 bits and groups of 16 columns, and quantization"),
        ({"quantization": {"bits": 8, "group_size": 32, "codes": "mxfp4"}}, "mxfp4 has 4 bits and groups of 32"),
        (
            {
                "quantization": {"group_size": 32, "codes": "mxfp4"},
                "include": ["shared"],
                "part_bits": {"shared": 8},
            },
            "mxfp4 has 4 bits and groups of 32 columns, and .* part_bits say otherwise",
        ),
    ],
)
def test_an_edited_plan_that_contradicts_itself_is_refused(
    made: Profile, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidInputError, match=message) as caught:
        load_plan(edited(make_plan(made, count=8), tmp_path, **changes))
    assert "plan.json" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_no_plan_is_refused(tmp_path: Path) -> None:
    for text in ("", "[]", "{", '{"model": 1}', "\x00"):
        (tmp_path / "plan.json").write_text(text)
        with pytest.raises(InvalidInputError, match=r"plan\.json"):
            load_plan(tmp_path / "plan.json")
    with pytest.raises(InvalidInputError, match=r"Cannot read .*none\.json"):
        load_plan(tmp_path / "none.json")


def test_unbalanced_groups_are_refused_unless_the_groups_go(made: Profile) -> None:
    plan = make_plan(made, count=8)
    uneven = plan.model_copy(update={"keep": {1: EIGHT, 2: [0, 1, 2, 5, 8, 9, 12, 13]}})
    with pytest.raises(UsageError, match=r"keeps \[3, 1, 2, 2\] experts in the groups of layer 2"):
        check_plan(uneven, made.shape, made.layers, made.model)
    check_plan(uneven.model_copy(update={"groups": Groups.DEGROUP}), made.shape, made.layers, made.model)


def test_a_plan_for_another_model_is_refused(made: Profile, tiny_model: Callable[..., Path]) -> None:
    plan = make_plan(made, count=8)
    check_plan(plan, made.shape, made.layers, made.model)
    other = open_checkpoint(tiny_model("qwen3_moe"))
    with pytest.raises(UsageError, match="another model"):
        check_plan(plan, other.shape, other.outline.moe_layers, "another")
    with pytest.raises(UsageError, match="layers or experts are not those"):
        check_plan(plan, made.shape, (1,), None)
    mixtral = open_checkpoint(tiny_model("mixtral"))
    with pytest.raises(UsageError, match="layers or experts are not those"):
        check_plan(plan, mixtral.shape, made.layers, None)


@pytest.mark.parametrize(
    ("keep", "experts", "degroup", "message"),
    [
        (None, None, False, "neither --keep nor --experts"),
        (0.5, 8, False, "both --keep and --experts"),
        (0.0, None, False, "--keep 0.0 is not a share"),
        (1.5, None, False, "--keep 1.5 is not a share"),
        (-0.5, None, False, "not a share"),
        (float("nan"), None, False, "not a share"),
        (None, 0, False, "not a count"),
        (None, 17, False, "the model has only 16"),
        (None, 3, False, "chooses 4 experts for every token"),
        (None, 3, True, "chooses 4 experts for every token"),
        (None, 10, False, "multiple of 4; the nearest legal counts are 8, 12, 16; --groups degroup"),
        (None, 4, False, "each of the router's 4 groups needs 2"),
        (0.01, None, False, "Cannot keep 1 of 16"),
    ],
)
def test_illegal_counts_are_refused(keep: float | None, experts: int | None, degroup: bool, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        count_from_keep(GROUPED, keep, experts, degroup=degroup)


def test_shares_become_counts() -> None:
    assert [count_from_keep(GROUPED, share, None, degroup=False) for share in (0.5, 0.75, 1.0)] == [8, 12, 16]
    assert count_from_keep(GROUPED, 0.6, None, degroup=True) == 10
    assert count_from_keep(GROUPED, None, 5, degroup=True) == 5


def test_a_group_size_that_does_not_fit_is_refused_when_planning(made: Profile) -> None:
    with pytest.raises(UsageError, match="--group-size 128 does not divide the 64"):
        make_plan(made, count=8, scheme=Scheme(bits=4, group_size=128))


def bytes_read() -> int:
    """Bytes that this process has read from files so far."""
    rows = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(rows["rchar"])


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="only Linux counts the bytes that a process reads")
@pytest.mark.parametrize("stage", ["prune", "quantize"])
def test_an_illegal_count_is_refused_before_any_weight_is_read(
    tiny_model: Callable[..., Path], tmp_path: Path, stage: str
) -> None:
    folder = tiny_model("deepseek_v3")
    source = open_checkpoint(folder)
    plan = plan_of(source, {1: [0, 1, 2, 3, 4], 2: [0, 1, 2, 3, 4]})
    out, request = Output(folder=tmp_path / "out"), QuantizeRequest(scheme=G32)

    def run() -> object:
        if stage == "prune":
            return prune_stage(str(folder), out, plan)
        return quantize_stage(str(folder), out, plan, request, Calibration(), Machine())

    def refused() -> int:
        before = bytes_read()
        with pytest.raises(UsageError, match="Cannot keep 5 of 16 experts"):
            run()
        return bytes_read() - before

    refused()  # what is imported on the way is read once
    assert refused() < source.total_bytes // 10
    assert list(tmp_path.iterdir()) == []


def written_bytes(folder: Path) -> int:
    return sum(t.numel() * t.element_size() for t in tiny_models.load_tensors(folder).values())


@pytest.mark.parametrize("key", ["deepseek_v3", "mixtral"])
@pytest.mark.parametrize(
    ("dtype", "scheme"),
    [
        (torch.bfloat16, None),
        (torch.bfloat16, G32),
        (torch.bfloat16, Scheme(bits=8, group_size=64)),
        (torch.bfloat16, Scheme(bits=3, group_size=64)),
        (torch.bfloat16, Scheme(bits=4, group_size=-1)),
        (torch.bfloat16, Scheme.of_floats(Codes.NVFP4)),
        (torch.bfloat16, Scheme.of_floats(Codes.MXFP4)),
        (torch.float32, None),
        (torch.float32, G32),
    ],
    ids=str,
)
def test_the_size_in_a_plan_is_the_size_on_disk(
    tiny_model: Callable[..., Path], tmp_path: Path, key: str, dtype: torch.dtype, scheme: Scheme | None
) -> None:
    folder = tiny_model(key, dtype=dtype)
    source = open_checkpoint(folder)
    count = source.shape.experts // 2
    keep = {layer: [n * 2 for n in range(count)] for layer in source.outline.moe_layers}
    sizes = estimate_sizes(inventory(source), source.shape, count, scheme)
    assert sizes.before_bytes == source.total_bytes == written_bytes(folder)
    if scheme is None:
        pruned_folder(folder, keep, tmp_path / "out")
    else:
        quantized_folder(folder, tiny_models.windows(256, count=2), tmp_path / "out", keep=keep, scheme=scheme)
    assert sizes.after_bytes == pytest.approx(written_bytes(tmp_path / "out"), rel=0.02)


@pytest.mark.parametrize("scheme", [None, G32], ids=["pruned", "w4g32"])
def test_the_size_is_right_for_fp8_and_for_a_dropped_prediction_layer(
    tiny_copy: Callable[..., Path], tmp_path: Path, scheme: Scheme | None
) -> None:
    folder = tiny_copy("deepseek_v3", dtype=torch.bfloat16)
    tiny_models.add_mtp(folder)
    tiny_models.to_fp8(folder, block=(32, 32))
    add_tokenizer(folder)
    source = open_checkpoint(folder)
    keep = dict.fromkeys(source.outline.moe_layers, EIGHT)
    sizes = estimate_sizes(inventory(source), source.shape, 8, scheme)
    if scheme is None:
        result = pruned_folder(folder, keep, tmp_path / "out", mtp=Mtp.DROP)
    else:
        result = quantized_folder(folder, tiny_models.windows(256, count=2), tmp_path / "out", keep=keep, scheme=scheme)
    assert result["bytes_after"] == written_bytes(tmp_path / "out")
    assert sizes.after_bytes == pytest.approx(written_bytes(tmp_path / "out"), rel=0.02)
