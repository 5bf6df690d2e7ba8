"""`run` lets every model of its report answer: options, recipe, resume, model card."""

import json
from pathlib import Path

import pytest
import yaml
from stage_runs import command

from moepress.errors import InvalidInputError
from moepress.stages.run.recipe import evaluation_of, make_recipe

SHORT = ("--tokens", "512", "--window", "32", "--max-windows", "1", "--no-throughput", "--group-size", "32")
ASK = ("--max-new-tokens", "64", "--effort", "fast", "--include", "none")


def test_a_recipe_asks_for_answers() -> None:
    nothing = evaluation_of(make_recipe({"model": "demo"}))
    assert nothing.answering is None
    fields = {"prompts": ["a.txt"], "temperature": 0.5, "generation_seed": 3, "max_loop_increase": 0.02}
    asked = evaluation_of(make_recipe({"model": "demo", **fields}))
    assert asked.answering is not None
    assert (asked.answering.count, asked.answering.files) == (None, ("a.txt",))
    assert (asked.answering.sampling.temperature, asked.answering.sampling.seed) == (0.5, 3)
    assert asked.thresholds.max_loop_increase == 0.02
    limit = evaluation_of(make_recipe({"model": "demo", "max_loop_increase": 0.02})).answering
    assert limit is not None
    assert (limit.count, limit.max_new_tokens) == (500, 256)


@pytest.mark.parametrize(
    "field", [{"generations": 0}, {"max_new_tokens": 63}, {"temperature": -1}, {"max_loop_increase": 2}]
)
def test_what_is_no_request_is_refused(field: dict[str, float]) -> None:
    with pytest.raises(InvalidInputError, match=f"The recipe's {next(iter(field))}"):
        make_recipe({"model": "demo", **field})


def test_wrong_prompts_are_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n")
    out = tmp_path / "out"
    code, _, errors = command("run", "demo", "-o", str(out), "--prompts", str(tmp_path / "empty.txt"), *SHORT)
    assert code == 4
    assert "there is no prompt in there" in errors
    assert not out.exists()


def test_every_model_answers_and_other_prompts_make_the_report_again(tmp_path: Path) -> None:
    out, prompts = tmp_path / "out", tmp_path / "prompts.txt"
    prompts.write_text("What is 7 minus 5?\nWhat is 12 minus 9?\nWhat is 18 minus 8?\n")
    line = ("run", "demo", "-o", str(out), "--prompts", str(prompts), *SHORT, *ASK)
    code, _, errors = command(*line, "--generations", "2", "--max-loop-increase", "90%")
    assert code == 0, errors
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    rows = report["generation"]["rows"]
    assert [row["subject"] for row in rows] == [subject["label"] for subject in report["subjects"]]
    assert len(rows) == 3
    assert [row["answers"] for row in rows] == [2, 2, 2]
    assert [outcome["measure"] for outcome in report["thresholds"]] == ["loop increase"] * 2
    assert "Of 2 answers" in (out / "model" / "README.md").read_text(encoding="utf-8")
    recipe = yaml.safe_load((out / "recipe.yaml").read_text(encoding="utf-8"))
    assert (recipe["generations"], recipe["max_new_tokens"], recipe["max_loop_increase"]) == (2, 64, 0.9)
    assert (out / recipe["prompts"][0]).resolve() == prompts.resolve()
    first = report["generation"]["digest"]
    prompts.write_text("What is 8 minus 5?\nWhat is 12 minus 9?\n")
    code, _, errors = command(*line, "--generations", "2", "--resume")
    assert code == 0, errors
    again = json.loads((out / "report.json").read_text(encoding="utf-8"))
    assert again["generation"]["digest"] != first
