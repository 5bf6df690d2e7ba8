"""`--tasks` on the command line: what is refused, in one sentence and with which code, and a whole report."""

import importlib.util
import json
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
import torch
from completions_server import Completions, serving
from huggingface_hub import ModelCard
from jsonschema import Draft202012Validator
from stage_runs import command
from tasks_asked import cache_in, write_choices, write_sums

import moepress.stages.tasks  # noqa: F401 - takes `harness_version` over by name, so not while a test has replaced it
from moepress.models.forward.dense import load_dense
from moepress.models.storage.checkpoint import open_checkpoint
from moepress.stages.groundwork import load_tokenizer
from moepress.stages.places import model_folder
from moepress.validation.tasks import names

QUICK = ("--no-throughput", "--max-windows", "1")
HARNESS = importlib.util.find_spec("lm_eval") is not None
SCHEMA = Path(__file__).resolve().parents[2] / "docs" / "report.schema.json"


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cache_in(tmp_path / "cache", monkeypatch)


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("pruned")
    short = ("--tokens", "512", "--window", "64")
    assert command("profile", "demo", "-o", place / "profile", *short)[0] == 0
    assert command("plan", place / "profile", "--keep", "0.5", "-o", place / "plan.json")[0] == 0
    assert command("prune", "demo", "--plan", place / "plan.json", "-o", place / "pruned")[0] == 0
    return place / "pruned"


REFUSED = [
    (["--tasks", "moepress_nothing"], 2, "moepress's own are moepress_continuation and moepress_sums"),
    (["--tasks", "nowhere.yaml"], 2, "There is no task file nowhere.yaml"),
    (["--tasks", " , "], 2, "--tasks names no task"),
    (["--limit", "5"], 2, "--limit goes with --tasks"),
    (["--chat"], 2, "--chat goes with --tasks"),
    (["--endpoint", "http://localhost:1/v1"], 2, "--endpoint goes with --tasks"),
    (["--min-recovery", "95", "--tasks", "moepress_sums"], 2, "write for example 95% or 0.95"),
    (["--endpoint", "localhost", "--tasks", "moepress_sums"], 2, "is no address"),
]


@pytest.mark.parametrize(("options", "code", "said"), REFUSED, ids=[" ".join(row[0]) for row in REFUSED])
def test_what_is_wrong_is_refused_in_a_sentence(options: list[str], code: int, said: str) -> None:
    found, _, errors = command("validate", "demo", "demo", *options)
    assert found == code
    assert errors.startswith("Error: ")
    assert said in errors


def test_no_items_at_all_are_refused() -> None:
    code, _, errors = command("validate", "demo", "demo", "--tasks", "moepress_sums", "--limit", "0")
    assert code == 2
    assert "--limit" in errors


def test_a_task_file_in_a_model_s_folder_is_refused(pruned: Path, tmp_path: Path) -> None:
    inside = write_choices(pruned / "tasks")
    (tmp_path / "link.yaml").symlink_to(inside)
    beside = write_choices(tmp_path / "other")
    (beside.parent / "config.json").write_text("{}")
    for file in (inside, inside.parent, tmp_path / "link.yaml", beside):
        code, _, errors = command("validate", "demo", pruned, "--tasks", file)
        assert code == 2
        assert "lies in a model's folder" in errors


def test_without_the_extra_a_sentence_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(names, "harness_version", lambda: None)
    code, _, errors = command("validate", "demo", "demo", "--tasks", "gsm8k")
    assert code == 5
    assert errors == (
        "Error: --tasks gsm8k needs lm-evaluation-harness (lm-eval); install it with: pip install 'moepress[eval]'\n"
    )
    monkeypatch.setattr(names, "harness_version", lambda: "0.3.0")
    if HARNESS:
        code, _, errors = command("validate", "demo", "demo", "--tasks", "gsm8k")
        assert code == 5
        assert "0.3.0 is installed" in errors


def test_own_tasks_need_nothing_and_a_missed_recovery_ends_with_3(
    pruned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(names, "harness_version", lambda: None)
    tasks = ("--tasks", "moepress_sums,moepress_continuation", "--limit", "24", "--min-recovery", "100%")
    code, printed, errors = command("validate", "demo", pruned, *QUICK, *tasks, "-o", tmp_path / "report")
    assert code == 3, errors
    assert "after: recovery of moepress_sums exact_match (number) is 0" in errors
    assert "or lower the limit" in errors
    assert "moepress_continuation acc" in printed
    raw = json.loads((tmp_path / "report" / "report.json").read_text())
    Draft202012Validator(json.loads(SCHEMA.read_text())).validate(raw)
    found = raw["tasks"]
    assert (found["harness"], found["limit"], found["asked"]) == (
        "moepress",
        24,
        ["moepress_sums", "moepress_continuation"],
    )
    judged = [row for row in found["rows"] if row["judged"]]
    assert [(row["task"], row["items"]) for row in judged] == [("moepress_sums", 24), ("moepress_continuation", 24)]
    outcomes = [outcome for outcome in raw["thresholds"] if outcome["measure"] == "recovery"]
    assert [outcome["of"] for outcome in outcomes] == [
        "moepress_sums exact_match (number)",
        "moepress_continuation acc",
    ]
    (suite,) = ET.fromstring((tmp_path / "report" / "junit.xml").read_text())
    cases = [case.get("name") for case in suite]
    assert cases == [f"recovery of {outcome['of']} at least 1" for outcome in outcomes]
    assert suite.get("failures") == str(sum(outcome["state"] == "missed" for outcome in outcomes))
    page = (tmp_path / "report" / "report.html").read_text()
    assert "24 items show a difference of" in page
    assert "## Tasks" in (tmp_path / "report" / "report.md").read_text()


@pytest.mark.skipif(not HARNESS, reason="lm-eval is not installed")
def test_tasks_of_a_file_through_the_harness(tmp_path: Path) -> None:
    tasks = f"{write_choices(tmp_path / 'own')},{write_sums(tmp_path / 'own')}"
    code, printed, errors = command(
        "validate", "demo", "demo", *QUICK, "--tasks", tasks, "--min-recovery", "95%", "--json"
    )
    assert code == 0, errors
    assert "%|" not in errors  # no bars of lm-eval
    found = json.loads(printed)["tasks"]
    assert found["harness"].startswith("lm-eval 0.4.")
    assert found["seeds"] == {"random": 0, "numpy": 1234, "torch": 1234, "fewshot": 1234}
    assert found["asked"] == ["choice.yaml", "sums.yaml"]
    for row in found["rows"]:
        assert row["before"] == row["after"]
        assert (row["flips"]["lost"], row["flips"]["won"], row["flips"]["p"]) == (0, 0, 1.0)


@pytest.mark.skipif(not HARNESS, reason="lm-eval is not installed")
def test_a_model_behind_a_server_is_asked_in_the_place_of_its_folder(tmp_path: Path) -> None:
    demo = model_folder("demo")
    dense = load_dense(open_checkpoint(demo), device=torch.device("cpu"), dtype=torch.float32)
    answering = Completions(dense, load_tokenizer(demo), names=("served",))
    tasks = ("--tasks", str(write_choices(tmp_path / "own")), "--limit", "3")
    with serving(answering) as url:
        code, printed, errors = command("validate", "demo", "demo", *QUICK, *tasks, "--endpoint", url, "--json")
    assert code == 0, errors
    found = json.loads(printed)["tasks"]
    assert found["runtimes"]["before"].startswith("transformers ")
    assert found["runtimes"]["after"] == "a server of OpenAI's API, model served"
    assert found["rows"][0]["flips"] == {"lost": 0, "won": 0, "p": 1.0}
    assert len(answering.asked) >= 12
    code, _, errors = command("validate", "demo", "demo", *QUICK, *tasks, "--endpoint", url)
    assert code == 1
    assert "does not answer as one of OpenAI's API" in errors


@pytest.mark.skipif(not HARNESS, reason="lm-eval is not installed")
def test_a_name_that_lm_eval_does_not_have_is_told_before_any_work() -> None:
    code, _, errors = command("validate", "demo", "demo", "--tasks", "gsm8kk")
    assert code == 2
    assert "has no task gsm8kk (did you mean gsm8k?)" in errors


def test_a_run_asks_too_and_its_card_has_the_results(tmp_path: Path) -> None:
    short = ("--tokens", "512", "--window", "64", "--group-size", "64", *QUICK)
    tasks = ("--tasks", "moepress_sums", "--limit", "8", "--min-recovery", "5%")
    code, _, errors = command("run", "demo", "-o", tmp_path / "out", *short, *tasks)
    assert code in (0, 3), errors
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    (row,) = report["tasks"]["rows"]
    assert row["subject"] == report["subjects"][-1]["label"]
    card = ModelCard((tmp_path / "out" / "model" / "README.md").read_text())
    (result,) = card.data.eval_results or []
    assert (result.dataset_name, result.metric_type) == ("moepress_sums", "exact_match")
    assert result.metric_value == pytest.approx(row["after"], abs=1e-6)
    assert "| moepress\\_sums exact\\_match (number) |" in card.text
    recipe = (tmp_path / "out" / "recipe.yaml").read_text()
    assert "tasks:\n- moepress_sums\nlimit: 8\nchat: false\nmin_recovery: 0.05\n" in recipe


def test_recipes_name_tasks_and_refuse_limits_without_them(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    for text, said in (
        ("model: demo\nlimit: 5", "--limit goes with --tasks"),
        ("model: demo\ntasks: [moepress_sums]\nlimit: 0", "limit"),
        ("model: demo\ntasks: [moepress_sums]\nmin_recovery: 0", "min_recovery"),
        ("model: demo\ntasks: [moepress_x]", "There is no task moepress_x"),
        ("model: demo\ntasks: [./x.yaml]", "There is no task file"),
    ):
        file.write_text(text)
        code, _, errors = command("run", "--recipe", file, "-o", tmp_path / "out")
        assert code in (2, 4)
        assert said in errors
    assert not (tmp_path / "out").exists()
