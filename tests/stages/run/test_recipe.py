"""`run`: the stages in order in one folder, with everything that can be refused refused before any work."""

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from stage_runs import add_tokenizer, command

from moepress.calibration.profile import load_profile
from moepress.compress.pruning.plan import load_plan
from moepress.converters.onnx.folder import open_onnx
from moepress.converters.safetensors.artifact import open_artifact
from moepress.errors import InvalidInputError, MoepressError, UsageError
from moepress.runs.files import sha256_of
from moepress.runs.journal import open_run
from moepress.runs.output import partial_folder
from moepress.stages import validate
from moepress.stages.run import run
from moepress.stages.run.recipe import check_recipe, make_recipe
from moepress.stages.run.recipe_file import load_recipe
from moepress.stages.run.run import run_recipe
from moepress.validation.quality.routing import Kept, kept_in
from moepress.validation.report.schema import Report
from moepress.validation.rules.check import planned_notes
from moepress.validation.speed.timing import Bench

SMALL: dict[str, Any] = {
    "model": "demo",
    "tokens": 2048,
    "window": 64,
    "keep": 0.75,
    "group_size": 64,
    "max_windows": 2,
    "throughput": False,
    "to": ["gptq"],
    "max_memory": 1 << 30,
}


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of the results, without the reports and journals, which hold times."""
    names = [p for part in ("model", "exports", "profile") for p in (folder / part).rglob("*") if p.is_file()]
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in [*names, folder / "plan.json"]}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has ended; not to be changed."""
    out = tmp_path_factory.mktemp("run") / "out"
    run_recipe(make_recipe(SMALL), out)
    return out


def test_a_run_leaves_everything_it_promises(finished: Path) -> None:
    names = {p.name for p in finished.iterdir()}
    reports = {"report.html", "report.md", "report.json", "junit.xml", "provenance.json"}
    assert names == {"model", "exports", "profile", "plan.json", "recipe.yaml", "journal.jsonl"} | reports
    assert (finished / "exports" / "gptq" / "quantize_config.json").is_file()
    report = Report.model_validate_json((finished / "report.json").read_text())
    assert [s.label for s in report.subjects] == ["original", "pruned", "pruned + 4 bit"]
    assert report.subjects[2].stored_bytes < report.subjects[1].stored_bytes < report.subjects[0].stored_bytes
    assert report.pruning is not None
    assert (report.pruning.kept, report.pruning.total) == (12, 16)
    routing = report.quality.routing
    assert [(row.subject, row.layer) for row in routing] == [
        (label, layer) for label in ("pruned", "pruned + 4 bit") for layer in (1, 2, 3, 4, None)
    ]
    assert all(0 < row.changed.value < 1 for row in routing if row.layer != 1)
    plan = load_plan(finished / "plan.json")
    for folder in (finished / "model", finished / "exports" / "gptq"):
        assert kept_in(folder) == Kept(experts=plan.keep, total=16)


def test_the_recipe_left_behind_is_complete_and_gives_the_same_bytes(finished: Path, tmp_path: Path) -> None:
    written = load_recipe(finished / "recipe.yaml")
    assert written["criterion"] == "reap"
    assert (written["device"], written["dtype"]) == ("auto", "auto")  # as it was asked
    run_recipe(make_recipe(written), tmp_path / "again")
    assert contents(tmp_path / "again") == contents(finished)
    first, again = (json.loads((out / "provenance.json").read_text()) for out in (finished, tmp_path / "again"))
    assert first | {"created": again["created"]} == again


def test_what_was_made_has_its_provenance_and_a_card_in_every_folder(finished: Path) -> None:
    found = json.loads((finished / "provenance.json").read_text())
    (model,) = found["inputs"]
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {row["path"] for row in model["files"]}
    made = {row["path"]: row for row in found["outputs"]}
    assert {"plan.json", "recipe.yaml", "model/README.md", "exports/gptq/config.json"} <= made.keys()
    assert not {"report.json", "journal.jsonl", "provenance.json"} & made.keys()
    for path, row in made.items():
        assert (row["bytes"], row["sha256"]) == ((finished / path).stat().st_size, sha256_of(finished / path))
    machine = ("device", "dtype", "max_memory")  # as it was asked for in the recipe, what it became in provenance.json
    asked, became = load_recipe(finished / "recipe.yaml"), found["recipe"]
    assert {k: v for k, v in became.items() if k not in machine} == {k: v for k, v in asked.items() if k not in machine}
    assert (became["device"], became["dtype"]) == ("cpu", "float32")
    report = Report.model_validate_json((finished / "report.json").read_text())
    assert report.calibration is not None
    assert found["calibration"]["digest"] == report.calibration.digest
    for folder, line in (("model", "- compressed-tensors"), ("exports/gptq", "- gptq")):
        assert line in (finished / folder / "README.md").read_text().splitlines()


def test_a_gpu_of_one_s_own_is_a_target_and_in_the_report(tmp_path: Path) -> None:
    file = tmp_path / "own.toml"
    file.write_text(
        '[[target]]\nid = "mine"\nname = "Mine"\nkind = "gaming"\nmemory_gib = 0.006\n'
        "bandwidth_gb_per_second = 10\nfp16_tflops = 1\n"
    )
    small = {k: v for k, v in SMALL.items() if k not in ("keep", "group_size", "to")}
    run = make_recipe(small | {"target": "mine", "targets_file": str(file), "context": 64})
    report = run_recipe(run, tmp_path / "out")
    assert report.targets is not None
    (row,) = (r for r in report.targets.rows if r.target == "mine" and r.subject == report.subjects[-1].label)
    assert (row.verdict, report.targets.context) == ("fits", 64)
    plan = load_plan(tmp_path / "out" / "plan.json")
    assert plan.budget is not None
    assert plan.budget.target == "mine"
    code, _, errors = command("plan", tmp_path / "out" / "profile", "--keep", "0.5", "--targets-file", file)
    assert code == 2
    assert "give --target too" in errors


def test_a_resume_may_change_what_touches_the_report_alone(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run_recipe(make_recipe(SMALL | {"to": [], "max_windows": 1}), out)
    before = (out / "model" / "config.json").stat().st_mtime_ns
    report = run_recipe(make_recipe(SMALL | {"max_windows": 2}), out, resume=True)
    assert (out / "model" / "config.json").stat().st_mtime_ns == before
    assert (out / "exports" / "gptq").is_dir()
    assert report.quality.windows == 8
    assert contents(out) == contents(finished)


def test_text_that_changed_under_its_name_is_noticed_by_the_resume_of_a_finished_run(tmp_path: Path) -> None:
    learnt, read = tmp_path / "learnt.txt", tmp_path / "read.txt"
    learnt.write_text("The quick brown fox jumps over the lazy dog. " * 100)
    read.write_text("A journey of a thousand miles begins with one step. " * 100)
    small = SMALL | {"to": [], "max_windows": 1, "calibration": [str(learnt)], "data": [str(read)]}
    first = run_recipe(make_recipe(small), tmp_path / "out")
    read.write_text("Still waters run deep, and a rolling stone gathers no moss. " * 100)
    second = run_recipe(make_recipe(small), tmp_path / "out", resume=True)
    assert first.quality.digest != second.quality.digest
    learnt.write_text("All that glitters is not gold. " * 100)
    with pytest.raises(UsageError, match="the calibration text is another one"):
        run_recipe(make_recipe(small), tmp_path / "out", resume=True)


def test_a_resume_with_another_setting_is_refused_by_its_name(finished: Path) -> None:
    with pytest.raises(UsageError, match=r"--keep was 0\.75, now 0\.5"):
        run_recipe(make_recipe(SMALL | {"keep": 0.5}), finished, resume=True)
    assert (finished / "model").is_dir()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"keep": 0.3}, "Cannot keep 5 of 16 experts"),
        ({"data": ["/nonexistent.txt"]}, "/nonexistent.txt"),
        ({"calibration": ["/nonexistent.txt"]}, "/nonexistent.txt"),
        ({"domain_weight": {"pythn": 3.0}}, "no domain 'pythn'"),
        ({"group_size": 96}, "--group-size 96 does not divide the 128"),
        ({"include": ["lm_head"]}, "exclude each other"),
        ({"bits": 5}, "--bits 5 is not supported"),
        ({"context": 64}, "--context, --mixed-bits and --runtime go with --budget or --target"),
        ({"budget": 1 << 20}, "The smallest possible result, 12 experts at 2 bits, takes 2"),
        ({"budget": 1 << 30, "target": "rtx-3090"}, "Give either --budget"),
        ({"target": "rtx-1"}, "--target rtx-1 is not in the table"),
        ({"budget": 1 << 30, "mixed_bits": True}, "--mixed-bits and --to gptq exclude each other"),
        ({"budget": 1 << 30, "mixed_bits": True, "bits": 4}, "leave out --bits"),
        ({"to": ["onnx"], "bits": 3}, "3-bit codes can not be exported to ONNX"),
        ({"to": ["onnx"], "group_size": 8}, "Groups of 8 columns can not be exported to ONNX"),
    ],
)
def test_what_is_wrong_is_found_before_any_work(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(MoepressError, match=message):
        run_recipe(make_recipe(SMALL | change), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: [", "not a readable YAML recipe"),
        ("- demo", "does not hold a YAML mapping"),
        ("model: demo\nkep: 0.5", r"kep: there is no such field \(did you mean keep\?\)"),
        ("model: demo\nmax_kl: -1", "max_kl"),
        ("model: demo\nbudget: 4MiX", "recipe's budget: '4MiX' is not a size; write for example 8GiB; mend it"),
        ("model: demo\nmax_memory: -8GiB", "max_memory: '-8GiB' is not a size"),
        ("model: demo\nbudget: 0", "budget: Input should be greater than or equal to 1"),
        ("model: demo\nbudget: [1]", "budget: Input should be a valid integer"),
        ("keep: 0.5", "model: Field required"),
    ],
)
def test_a_broken_recipe_is_refused_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    with pytest.raises(InvalidInputError, match=message) as caught:
        make_recipe(load_recipe(file))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "size"), [("4MiB", 4 << 20), ("500 kB", 500_000), ("4194304", 4 << 20), (4 << 20, 4 << 20), (None, None)]
)
def test_sizes_in_a_recipe_are_written_as_on_the_command_line(tmp_path: Path, text: Any, size: int | None) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump({"model": "demo", "budget": text, "max_memory": text}))
    made = make_recipe(load_recipe(file))
    assert (made.budget, made.max_memory) == (size, size)


def test_a_budget_decides_experts_and_bits_and_the_result_fits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, limit = tmp_path / "out", 7 << 19
    small = {k: v for k, v in SMALL.items() if k not in ("keep", "group_size", "to")}
    report = run_recipe(make_recipe(small | {"budget": "3.5MiB"}), out)
    plan = load_plan(out / "plan.json")
    noted = [line for line in capsys.readouterr().err.splitlines() if line.startswith("Note: codes have")]
    assert noted == [f"Note: {note}" for note in planned_notes(plan, load_profile(out / "profile").config)] != []
    assert plan.alternatives
    assert plan.quantization is not None
    assert open_artifact(out / "model").total_bytes == report.subjects[-1].stored_bytes <= limit
    assert open_artifact(out / "model").scheme == plan.quantization.scheme()
    assert report.subjects[-1].label.endswith(f"{plan.quantization.bits} bit")
    written = load_recipe(out / "recipe.yaml")
    assert (written["keep"], written["bits"], written["budget"]) == (None, None, limit)


def test_equal_weights_keep_the_default_criterion() -> None:
    def chosen(weights: dict[str, float]) -> str:
        return check_recipe(make_recipe(SMALL | {"domain_weight": weights}))[2].value

    assert chosen(dict.fromkeys(("german", "math", "python", "wiki"), 3.0)) == "reap"
    assert chosen({"python": 3.0}) == "easy-ep"


def test_three_quarters_stay_unless_told_otherwise() -> None:
    assert make_recipe({"model": "demo"}).keep == 0.75
    assert make_recipe({"model": "demo", "experts": 8}).keep is None


def test_a_finished_run_says_so_in_its_journal(finished: Path) -> None:
    rows = [json.loads(line) for line in (finished / "journal.jsonl").read_text().splitlines()]
    assert [row.get("piece") for row in rows[1:]] == ["profile", "plan", "model", "export-gptq", "report", None]
    assert rows[-1] == {"finished": True}
    assert yaml.safe_load((finished / "recipe.yaml").read_text())["model"] == "demo"


def test_a_refused_resume_of_a_stage_keeps_its_work(tmp_path: Path) -> None:
    out = tmp_path / "out"

    def interrupted() -> None:
        with open_run(out, {"seed": 0}) as run:
            run.write("a", "a.txt", lambda path: path.write_text("x") and None)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    with pytest.raises(UsageError, match="seed was 0, now 1"), open_run(out, {"seed": 1}, resume=True):
        pass
    assert (partial_folder(out) / "a.txt").read_text() == "x"


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Throughput on few tokens."""
    small = functools.partial(Bench, prompt=16, decode=4, repetitions=2)
    monkeypatch.setattr(validate, "Bench", small)


@pytest.mark.usefixtures("quick")
def test_a_run_to_onnx_reports_its_quality_and_the_speed_before_and_after(tmp_path: Path) -> None:
    out = tmp_path / "out"
    small = ["--tokens", "1024", "--window", "64", "--max-windows", "1", "--group-size", "64", "--max-memory", "1GiB"]
    code, printed, errors = command("run", "demo", "-o", out, *small, "--to", "onnx")
    assert code == 0, errors
    assert {p.name for p in (out / "exports").iterdir()} == {"onnx", "onnx-before"}
    report = Report.model_validate_json((out / "report.json").read_text())
    assert [s.label for s in report.subjects] == ["original", "pruned", "pruned + 4 bit", "4 bit, ONNX"]
    onnx, artifact = report.overall("4 bit, ONNX"), report.overall("pruned + 4 bit")
    assert onnx.perplexity.value == pytest.approx(artifact.perplexity.value, rel=1e-4)
    assert report.subjects[3].stored_bytes == open_onnx(out / "exports" / "onnx").total_bytes
    assert report.throughput is not None
    for runtime in ("ONNX Runtime", "onnxruntime-genai"):
        rows = [row for row in report.throughput.rows if row.runtime.startswith(runtime)]
        assert [row.subject for row in rows] == ["original, ONNX"] * 2 + ["4 bit, ONNX"] * 2
        assert [row.test for row in rows] == ["pp16", "tg4"] * 2
        assert [row.ratio is None for row in rows] == [True, True, False, False]
        assert all(row.provider == "CPU" and row.tokens_per_second for row in rows)
    assert "ONNX Runtime" in printed


@pytest.mark.usefixtures("quick")
def test_onnx_can_be_added_on_resume_and_its_report_is_not_made_twice(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    before = contents(out)
    alone = make_recipe(SMALL | {"to": ["gptq", "onnx"]})
    report = run_recipe(alone, out, resume=True)
    assert [s.label for s in report.subjects][3:] == ["4 bit, ONNX"]
    assert {p.name for p in (out / "exports").iterdir()} == {"gptq", "onnx"}  # nothing is timed
    cards = {name for name in before if name.endswith("README.md")}  # beside ONNX codes are multiplied out in fp32
    assert {name: contents(out)[name] for name in before.keys() - cards} == {
        name: data for name, data in before.items() if name not in cards
    }
    assert run_recipe(alone, out, resume=True).created == report.created
    with_speed = make_recipe(SMALL | {"to": ["gptq", "onnx"], "throughput": True})
    report = run_recipe(with_speed, out, resume=True)
    assert report.throughput is not None
    assert "original, ONNX" in {row.subject for row in report.throughput.rows}
    assert run_recipe(make_recipe(SMALL), out, resume=True).subjects[-1].label == "pruned + 4 bit"


@pytest.mark.usefixtures("quick")
def test_an_original_that_is_too_large_is_not_exported_and_the_report_says_so(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    monkeypatch.setattr(run, "_free_memory", lambda: 30 << 20)  # the demo has 18 MB
    report = run_recipe(make_recipe(SMALL | {"to": ["gptq", "onnx"], "throughput": True}), out, resume=True)
    assert not (out / "exports" / "onnx-before").exists()
    assert any(note.startswith("The original has no throughput in ONNX Runtime: in fp32") for note in report.notes)
    assert report.throughput is not None
    assert "4 bit, ONNX" in {row.subject for row in report.throughput.rows}


def test_what_onnx_can_not_hold_is_refused_with_the_right_exit_code(tmp_path: Path) -> None:
    arguments = ["run", "demo", "-o", tmp_path / "out", "--to"]
    for more, code, message in (
        (["gptq,onnx", "--bits", "3", "--group-size", "64"], 5, "3-bit codes can not be exported to ONNX"),
        (["awq"], 2, "--to awq is not there; run exports to gptq, onnx and gguf"),
    ):
        found, printed, errors = command(*arguments, *more)
        assert (found, printed) == (code, "")
        assert message in errors
    assert not (tmp_path / "out").exists()


def test_a_recipe_works_from_any_folder_and_holds_no_places(
    tiny_copy: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Paths in recipe.yaml are as they are from its own folder; a run by it from elsewhere has the same text."""
    model = tiny_copy("mixtral")
    add_tokenizer(model)
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "my.txt").write_text("The cat sat on the mat, and the dog said no. " * 200)
    monkeypatch.chdir(tmp_path / "texts")
    small = {"tokens": 256, "window": 32, "keep": 0.5, "group_size": 32, "max_windows": 1, "throughput": False}
    asked = {"model": f"../{model.name}", "calibration": ["my.txt"], "domain": ["mine=my.txt"], **small}
    run_recipe(make_recipe(asked), tmp_path / "out")
    text = (tmp_path / "out" / "recipe.yaml").read_text()
    assert str(tmp_path) not in text
    for name in ("report.json", "report.md", "report.html", "provenance.json"):
        assert str(tmp_path) not in (tmp_path / "out" / name).read_text(), name
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    written = load_recipe(Path("../out/recipe.yaml"))
    assert written["calibration"] == ["../out/../texts/my.txt"]
    assert written["domain"] == ["mine=../out/../texts/my.txt"]
    run_recipe(make_recipe(written), Path("again"))
    whole, again = contents(tmp_path / "out"), contents(tmp_path / "elsewhere" / "again")
    assert {n: d for n, d in whole.items() if n.startswith("model/")} == {
        n: d for n, d in again.items() if n.startswith("model/")
    }


def test_the_command_line_says_what_is_quantized_besides_the_experts(tmp_path: Path) -> None:
    """`run --dry-run --json` has the recipe in full."""

    def settled_parts(*words: str) -> tuple[list[str], dict[str, int], int]:
        code, shown, said = command(
            "run", "demo", "-o", tmp_path / "out", "--group-size", "64", "--dry-run", "--json", *words
        )
        assert code == 0, said
        found = json.loads(shown)
        assert (found["include"], found["part_bits"]) == (found["recipe"]["include"], found["recipe"]["part_bits"])
        return found["include"], found["part_bits"], found["sizes"]["after_bytes"]

    every, eight = ["attention", "dense", "shared"], {"attention": 8, "dense": 8, "shared": 8}
    auto, none, four = settled_parts(), settled_parts("--include", "none"), settled_parts("--bits", "4,attention=4")
    assert auto[:2] == (every, eight)
    assert none[:2] == ([], {})
    assert four[:2] == (every, {"dense": 8, "shared": 8})
    assert settled_parts("--include", "shared")[:2] == (["shared"], {})
    assert settled_parts("--include", "shared", "--bits", "4,shared=8")[:2] == (["shared"], {"shared": 8})
    assert settled_parts("--bits", "8")[:2] == (every, {})
    assert four[2] < auto[2] < none[2]
    for words in (("--include", "none", "--bits", "4,attention=8"), ("--include", "none", "--include", "shared")):
        code, _, said = command("run", "demo", "-o", tmp_path / "out", "--dry-run", *words)
        assert (code, "--include none" in said, said.count("\n")) == (2, True, 1)
