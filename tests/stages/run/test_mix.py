"""`run --budget --to gguf`: a mix of GGUF's types from profile to report, and when a budget means something else."""

import json
from pathlib import Path
from typing import Any

import pytest

from moepress.compress.pruning.plan import load_plan
from moepress.converters.gguf.file import gguf_file, open_gguf
from moepress.errors import UsageError
from moepress.stages.run import run as module
from moepress.stages.run.dry_run import estimate_recipe
from moepress.stages.run.recipe import check_recipe, make_recipe, mixes
from moepress.stages.run.run import run_recipe

SMALL: dict[str, Any] = {
    "model": "demo",
    "tokens": 2048,
    "window": 64,
    "budget": "2.4MiB",
    "max_windows": 2,
    "throughput": False,
    "to": ["gguf"],
    "max_memory": 1 << 30,
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was interrupted before it quantized and has then ended; not to be changed."""
    out = tmp_path_factory.mktemp("run") / "out"
    quantize = module.quantize_stage
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "quantize_stage", _interrupted)
        with pytest.raises(KeyboardInterrupt):
            run_recipe(make_recipe(SMALL), out)
    assert module.quantize_stage is quantize
    run_recipe(make_recipe(SMALL), out, resume=True)
    return out


def _interrupted(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


def test_the_file_fits_and_the_report_shows_the_curve(finished: Path) -> None:
    file = gguf_file(finished / "exports" / "gguf")
    plan = load_plan(finished / "plan.json")
    assert file is not None
    assert file.stat().st_size <= 2.4 * 2**20
    assert plan.prunes
    assert len({t.type for t in open_gguf(file).tensors.values()}) > 2
    report = json.loads((finished / "report.json").read_text())
    point = next(point for point in plan.curve if point.chosen)
    label = f"mix of {point.bits:.2f} bits"
    assert [subject["label"] for subject in report["subjects"]][-2:] == [f"pruned + {label}", f"{label}, GGUF"]
    assert report["choice"]["grids"] == [row.model_dump(mode="json") for row in plan.grids]
    assert sum(point["chosen"] for point in report["choice"]["curve"]) == 1
    assert "types mixed by measured damage" in report["quantization"]["scheme"]
    page = (finished / "report.html").read_text()
    assert "estimated KL divergence of" in page
    assert "Type of GGUF" in page
    assert "Estimated KL" in (finished / "report.md").read_text()
    assert "moepress export" in (finished / "model" / "README.md").read_text()
    run_recipe(make_recipe(SMALL), finished, resume=True)
    assert json.loads((finished / "report.json").read_text()) == report


def test_its_own_recipe_gives_the_same_plan(finished: Path, tmp_path: Path) -> None:
    from moepress.stages.run.recipe_file import load_recipe

    recipe = make_recipe(load_recipe(finished / "recipe.yaml") | {"max_memory": 1 << 30})
    assert mixes(recipe)
    run_recipe(recipe, tmp_path / "again")
    assert (tmp_path / "again" / "plan.json").read_bytes() == (finished / "plan.json").read_bytes()


def test_the_report_has_a_row_for_the_machine_that_was_aimed_at(tmp_path: Path) -> None:
    table = tmp_path / "mine.toml"
    table.write_text(
        '[[target]]\nid = "tiny"\nname = "Tiny"\nkind = "gaming"\nmemory_gib = 0.0042\nbandwidth_gb_per_second = 100\n'
        'fp16_tflops = 10\n[[ram]]\nid = "small"\nname = "little memory"\nmemory_gib = 0.004\n'
        "bandwidth_gb_per_second = 50\n"
    )
    values = {key: value for key, value in SMALL.items() if key != "budget"}
    aimed = {"target": "tiny+small", "targets_file": str(table), "context": 64}
    run_recipe(make_recipe(values | aimed), tmp_path / "out")
    found = json.loads((tmp_path / "out" / "report.json").read_text())["targets"]
    assert found["chosen"] == "tiny+small"
    row = next(row for row in found["rows"] if row["target"] == "tiny+small" and row["subject"].startswith("mix"))
    page = (tmp_path / "out" / "report.md").read_text()
    assert "Tiny with little memory (your target)" in page
    card = (tmp_path / "out" / "exports" / "gguf" / "README.md").read_text()
    assert row["cpu_moe"] > 0
    assert f"-ngl 999 --n-cpu-moe {row['cpu_moe']}" in card


def test_bits_and_other_exports_mean_codes_of_integers() -> None:
    for change in ({"bits": 4}, {"to": ["gguf", "gptq"]}, {"include": ["attention"]}, {"mixed_bits": True}, {"to": []}):
        assert not mixes(make_recipe(SMALL | change)), change
    assert not mixes(make_recipe({key: value for key, value in SMALL.items() if key != "budget"}))
    assert mixes(make_recipe(SMALL | {"keep": 0.75}))
    for change in ({"budget": None}, {"include": ["attention"]}, {"bits": 4}):
        with pytest.raises(UsageError):
            check_recipe(make_recipe(SMALL | {"grid": "mix"} | change))


def test_exports_that_come_later_do_not_change_what_was_decided(finished: Path, tmp_path: Path) -> None:
    bare = make_recipe({key: value for key, value in SMALL.items() if key != "to"})
    card = (finished / "model" / "README.md").read_text()
    run_recipe(bare, finished, resume=True)
    assert (finished / "model" / "README.md").read_text() == card
    with pytest.raises(UsageError, match="Blocks of GGUF go into no other format"):
        run_recipe(make_recipe(SMALL | {"to": ["gguf", "gptq"]}), finished, resume=True)
    run_recipe(make_recipe(SMALL), finished, resume=True)
    integers = tmp_path / "integers"
    run_recipe(make_recipe(SMALL | {"to": [], "budget": "3.4MiB"}), integers)
    run_recipe(make_recipe(SMALL | {"budget": "3.4MiB"}), integers, resume=True)
    assert "gguf-blocks" not in (integers / "model" / "README.md").read_text()
    file = gguf_file(integers / "exports" / "gguf")
    assert file is not None
    types = {t.type for name, t in open_gguf(file).tensors.items() if "_exps" in name}
    assert len(types) == 1
    assert types <= {"Q4_0", "Q8_0"}


def test_a_budget_that_is_too_small_is_refused_before_any_work() -> None:
    with pytest.raises(UsageError, match="8 experts in types of GGUF"):
        check_recipe(make_recipe(SMALL | {"budget": "1MiB"}))


def test_a_dry_run_tells_of_the_second_walk(finished: Path, tmp_path: Path) -> None:
    found = estimate_recipe(make_recipe(SMALL), tmp_path / "out")
    assert found.stages["profile"]["time"]["losses by kind"] > 0
    assert found.settled.scheme is not None
    assert found.sizes["after_bytes"] == int(2.4 * 2**20)
    large = estimate_recipe(make_recipe(SMALL | {"budget": "1GiB"}), tmp_path / "out")
    assert 4 << 20 < large.sizes["after_bytes"] < 8 << 20
    again = estimate_recipe(make_recipe(SMALL), finished, resume=True)
    assert again.settled.count == load_plan(finished / "plan.json").experts
