"""--repair in `prune` and `run`: what is refused, what is left behind, and that quantizing sees the same model."""

import dataclasses
import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_models
import torch
from stage_runs import add_tokenizer, command, content, keep_of, plan_of

from moepress.compress.pruning.plan import plan_text
from moepress.compress.pruning.repair import Repair
from moepress.compress.pruning.repaired import Repairs
from moepress.compress.pruning.repaired_down import down_places
from moepress.converters.safetensors.scheme import Scheme
from moepress.errors import InvalidInputError, UnsupportedError
from moepress.models.storage.checkpoint import open_checkpoint
from moepress.models.storage.experts import prune_source, router_disk_names
from moepress.stages.places import Calibration, Machine, Output, model_folder
from moepress.stages.quantize import QuantizeRequest, quantize_stage
from moepress.stages.repair import check_repair, load_repairs, prune_repaired_stage, repair_stage
from moepress.stages.run.recipe import make_recipe
from moepress.stages.run.run import run_recipe
from moepress.validation.report.schema import Report

GAINS = frozenset({Repair.GAIN, Repair.BIAS, Repair.ROUTER})
ALL = frozenset({Repair.DOWN, Repair.BIAS, Repair.ROUTER})
KEEP = {1: [0, 1, 4, 6, 8, 9, 12, 15], 2: [2, 3, 5, 6, 9, 11, 12, 13]}


@pytest.fixture
def model(tiny_copy: Callable[..., Path]) -> Path:
    folder = tiny_copy("deepseek_v3")
    add_tokenizer(folder)
    return folder


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text("".join(random.Random(0).choices("abcdefgh ABCDEFGH.,;", k=4000)))
    return file


def test_the_command_leaves_a_folder_that_says_what_was_mended(model: Path, text: Path, tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    plan.write_text(plan_text(plan_of(open_checkpoint(model), KEEP)))
    given = ["prune", model, "--plan", plan, "--repair", "down,bias,router", "--domain", f"one={text}"]
    given += ["--tokens", "512", "--window", "16"]
    code, printed, errors = command(*given, "-o", tmp_path / "out")
    assert code == 0, errors
    assert "8 of 16 experts stay" in printed
    assert "unrepaired" in printed
    assert "of 2 layers" in printed
    report = json.loads((tmp_path / "out" / "moepress.json").read_text())
    repairs = Repairs.model_validate(report["repair"])
    assert sorted(repairs.layers) == [1, 2]
    assert set(repairs.parts) == ALL
    assert "Down projections: " in printed
    assert repairs.calibration["tokens"] == 512
    tiny_models.reference(tmp_path / "out")
    code, printed, errors = command(*given, "-o", tmp_path / "dry", "--dry-run", "--json")
    assert code == 0, errors
    projected = json.loads(printed)
    assert projected["prune"]["output_bytes"] == report["bytes_after"]
    assert projected["repair"]["seconds"] > 0
    assert not (tmp_path / "dry").exists()


@pytest.mark.parametrize(
    ("key", "keep", "more", "message"),
    [
        ("mixtral", [0, 1, 2, 5], ["--repair", "bias"], "no correction bias; use --repair gain"),
        ("mixtral", list(range(8)), ["--repair", "gain"], "here every expert stays"),
        (
            "mixtral",
            [0, 1, 2, 5],
            ["--repair", "gain,shine"],
            "--repair shine is not there; give gain, bias, router, down",
        ),
        ("mixtral", list(range(8)), ["--repair", "down"], "here every expert stays"),
        ("mixtral", [0, 1, 2, 5], ["--repair", "down,gain"], "--repair down refits what gain scales; leave gain out"),
        ("mixtral", [0, 1, 2, 5], ["--repair", ","], "--repair names no part"),
        ("mixtral", [0, 1, 2, 5], ["--tokens", "64"], "go with --repair only"),
    ],
    ids=lambda value: "".join(value) if isinstance(value, list) and isinstance(value[0], str) else "",
)
def test_a_repair_of_nothing_is_refused(
    tiny_model: Callable[..., Path], tmp_path: Path, key: str, keep: list[int], more: list[str], message: str
) -> None:
    folder, plan = tiny_model(key), tmp_path / "plan.json"
    plan.write_text(plan_text(plan_of(open_checkpoint(folder), dict.fromkeys(range(3), keep))))
    code, _, errors = command("prune", folder, "--plan", plan, *more, "-o", tmp_path / "out")
    assert code == 2
    assert message in errors
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]


@pytest.mark.parametrize("parts", [GAINS, ALL], ids=["gain", "down"])
def test_quantizing_with_a_repair_is_quantizing_the_repaired_folder(
    model: Path, text: Path, tmp_path: Path, parts: frozenset[Repair]
) -> None:
    plan = plan_of(open_checkpoint(model), KEEP)
    calibration = Calibration(domains=(f"one={text}",), tokens=512, window=16)
    machine = Machine(memory_bytes=1 << 30)
    repairs = repair_stage(str(model), Output(folder=tmp_path / "repair"), plan, parts, calibration, machine)
    assert load_repairs(tmp_path / "repair") == repairs
    downs = {"down-00001.safetensors", "down-00002.safetensors"} if Repair.DOWN in parts else set()
    left = {p.name for p in (tmp_path / "repair").iterdir()} - {"router.safetensors"}
    assert left == {"repair.json"} | downs
    made = prune_repaired_stage(str(model), Output(folder=tmp_path / "pruned"), plan, parts, calibration, machine)
    assert Repairs.model_validate(made["repair"]).layers == repairs.layers
    request = QuantizeRequest(scheme=Scheme(bits=4, group_size=32))
    for name, folder, chosen, mended in (("a", model, plan, repairs), ("b", tmp_path / "pruned", None, None)):
        quantize_stage(
            str(folder), Output(folder=tmp_path / name), chosen, request, calibration, machine, repairs=mended
        )
    ours, theirs = content(tmp_path / "a"), content(tmp_path / "b")
    assert {n: d for n, d in ours.items() if n != "moepress.json"} == {
        n: d for n, d in theirs.items() if n != "moepress.json"
    }
    told = json.loads(ours["moepress.json"])["repair"]
    assert told["layers"]["1"]["gains"] == repairs.layers[1].gains
    assert json.loads(theirs["moepress.json"])["repair"] is None


def test_refitted_routers_come_to_what_is_quantized(tmp_path: Path) -> None:
    demo = open_checkpoint(model_folder("demo"))
    plan, machine = plan_of(demo, keep_of(demo, 8)), Machine(memory_bytes=1 << 30)
    calibration, parts = Calibration(tokens=2048, window=128), frozenset({Repair.ROUTER})
    repairs = repair_stage("demo", Output(folder=tmp_path / "repair"), plan, parts, calibration, machine)
    assert {p.name for p in (tmp_path / "repair").iterdir()} == {"repair.json", "router.safetensors"}
    assert load_repairs(tmp_path / "repair") == repairs
    prune_repaired_stage("demo", Output(folder=tmp_path / "pruned"), plan, parts, calibration, machine)
    request = QuantizeRequest(scheme=Scheme(bits=8, group_size=64))
    quantize_stage("demo", Output(folder=tmp_path / "a"), plan, request, calibration, machine, repairs=repairs)
    mended, pressed = open_checkpoint(tmp_path / "pruned"), open_checkpoint(tmp_path / "a")
    pruned = prune_source(demo, plan.keep)
    assert repairs.rows.by_layer
    for layer in repairs.rows.by_layer:
        name = router_disk_names(mended, layer)[0]
        assert torch.equal(pressed.read(name), mended.read(name))
        assert not torch.equal(pressed.read(name), pruned.read(name))
    (tmp_path / "repair" / "router.safetensors").unlink()
    with pytest.raises(InvalidInputError, match=r"router.safetensors"):
        load_repairs(tmp_path / "repair")


def test_a_run_mends_before_it_quantizes(tmp_path: Path) -> None:
    small = {
        "model": "demo",
        "tokens": 1024,
        "window": 64,
        "keep": 0.5,
        "group_size": 64,
        "max_windows": 1,
        "throughput": False,
        "max_memory": 1 << 30,
        "repair": ["gain"],
    }
    run_recipe(make_recipe(small), tmp_path / "out")
    repairs = load_repairs(tmp_path / "out" / "repair")
    told = json.loads((tmp_path / "out" / "model" / "moepress.json").read_text())["repair"]
    assert told["parts"] == ["gain"]
    assert {int(layer): row["gains"] for layer, row in told["layers"].items()} == {
        layer: row.gains for layer, row in repairs.layers.items()
    }
    report = Report.model_validate_json((tmp_path / "out" / "report.json").read_text())
    assert [s.label for s in report.subjects] == ["original", "pruned", "pruned + 4 bit"]
    before = content(tmp_path / "out" / "model")
    run_recipe(make_recipe(small), tmp_path / "out", resume=True)
    assert content(tmp_path / "out" / "model") == before


def test_a_damaged_repair_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match=r"Cannot read .*repair.json"):
        load_repairs(tmp_path)
    (tmp_path / "repair.json").write_text('{"schema_version": "1.0"}')
    with pytest.raises(InvalidInputError, match="holds no valid repair: model"):
        load_repairs(tmp_path)


def test_changed_down_projections_are_refused(model: Path, text: Path, tmp_path: Path) -> None:
    plan, parts = plan_of(open_checkpoint(model), KEEP), frozenset({Repair.DOWN})
    calibration = Calibration(domains=(f"one={text}",), tokens=512, window=16)
    repair_stage(str(model), Output(folder=tmp_path / "repair"), plan, parts, calibration, Machine())
    file = tmp_path / "repair" / "down-00001.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    with pytest.raises(InvalidInputError, match=r"down-00001.safetensors is not that of its repair; repair again"):
        load_repairs(tmp_path / "repair")
    file.unlink()
    with pytest.raises(InvalidInputError, match=r"down-00001.safetensors"):
        load_repairs(tmp_path / "repair")


def test_down_projections_that_are_codes_are_refused() -> None:
    demo = open_checkpoint(model_folder("demo"))
    check_repair(demo, 8, frozenset({Repair.DOWN}))
    place = down_places(demo, min(demo.outline.moe_layers), 1)[0]
    coded = {**demo.stored, place.name: dataclasses.replace(demo.stored[place.name], dtype="F8_E4M3")}
    with pytest.raises(UnsupportedError, match="is not stored as a plain weight"):
        check_repair(dataclasses.replace(demo, stored=coded), 8, frozenset({Repair.DOWN}))
