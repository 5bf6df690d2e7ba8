"""Tasks in the report's tables, in JUnit's cases and in the model card's front matter."""

import dataclasses

import pytest
import yaml

from moepress.models.storage.checkpoint import Checkpoint
from moepress.validation.quality.results import Estimate, Quality
from moepress.validation.report.ci import junit_xml
from moepress.validation.report.contents import contents
from moepress.validation.report.model_card import model_card
from moepress.validation.report.schema import Report, SubjectInfo
from moepress.validation.report.tables import console_tables
from moepress.validation.tasks.limits import judge_tasks
from moepress.validation.tasks.results import Flips, TaskResults, TaskRow

ACC = TaskRow(
    subject="pruned",
    task="g|sm",
    metric="exact_match",
    filter="strict-match",
    items=200,
    before=0.62,
    after=0.55,
    higher_is_better=True,
    difference=Estimate(value=-0.07, error=0.02),
    recovery=Estimate(value=0.887, error=0.03),
    flips=Flips(lost=18, won=4, p=0.0043),
    shows=0.04,
    judged=True,
    num_fewshot=5,
    max_gen_toks=256,
)
F1 = TaskRow(subject="pruned", task="words", metric="f1", items=200, before=0.4, after=0.41, higher_is_better=True)


@pytest.fixture
def report(quality: Quality) -> Report:
    rows = (ACC, F1, dataclasses.replace(ACC, task="part", group="g|sm", judged=False))
    return Report(
        title="demo",
        subjects=(
            SubjectInfo(label="demo", folder="demo", stored_bytes=9_268_136, parameters=4_618_880),
            SubjectInfo(label="pruned", stored_bytes=3_100_000, parameters=3_045_760),
            SubjectInfo(label="copy", stored_bytes=1, parameters=1, onnx=True),
        ),
        quality=quality,
        thresholds=judge_tasks(0.95, rows),
        tasks=TaskResults(
            harness="lm-eval 0.4.13",
            asked=("g|sm", "words"),
            limit=200,
            longest=4096,
            seeds={"random": 0},
            runtimes={"demo": "x", "pruned": "x"},
            rows=rows,
        ),
    )


def test_what_was_asked_for_has_a_table_and_tasks_of_groups_another(report: Report) -> None:
    found = {table.title: table for table in contents(report)}
    assert found["Tasks"].rows == (
        (
            "g|sm exact_match (strict-match)",
            "pruned",
            "88.7 ± 3.0 %",
            "62.0 %",
            "55.0 %",
            "−7.0 ± 2.0 %",
            "18, 4",
            "0.0043",
            "200",
        ),
        ("words f1", "pruned", "–", "0.400", "0.410", "–", "–", "–", "200"),
    )
    assert [row[0] for row in found["Tasks of groups"].rows] == ["g|sm: part exact_match (strict-match)"]
    assert "Asked through lm-eval 0.4.13, the first 200 items of each: " in found["Tasks"].note
    assert "g|sm exact_match (strict-match): 200 items show a difference of 4.0 points and more." in found["Tasks"].note
    (short,) = (table for table in console_tables(report) if table.title == "Tasks")
    assert [row[0] for row in short.rows] == ["g|sm exact_match (strict-match)"]


def test_a_limit_on_what_is_left_reads_as_one(report: Report) -> None:
    (limits,) = (table for table in contents(report) if table.title == "Limits")
    said = ("pruned", "recovery of g|sm exact_match (strict-match)", "missed", "at least 95 %", "88.70 ± 3.00 %")
    assert limits.rows == (said,)
    assert 'name="recovery of g|sm exact_match (strict-match) at least 0.95"' in junit_xml(report)
    assert 'failures="1"' in junit_xml(report)


def test_the_card_has_the_results_of_the_folder_s_own_model(report: Report, demo: Checkpoint) -> None:
    text = model_card(report, demo, "compressed-tensors")
    (index,) = yaml.safe_load(text.split("---")[1])["model-index"]
    assert index["name"] == "demo-pressed"
    first, second = index["results"]
    assert first["dataset"] == {"type": "g|sm", "name": "g|sm"}
    assert first["metrics"] == [
        {"type": "exact_match", "value": 0.55, "name": "exact_match, strict-match, 5-shot, 200 items"}
    ]
    assert second["metrics"][0]["value"] == 0.41
    assert "| g\\|sm exact\\_match (strict-match) | 62.0 % | 55.0 % | 88.7 ± 3.0 % | 18, 4 | 200 |" in text
    assert "model-index" not in model_card(report, demo, "onnx")  # which was measured, and not asked
    assert "| g\\|sm" in model_card(report, demo, "onnx")


def test_reports_of_before_there_were_tasks_are_read(report: Report) -> None:
    raw = report.model_dump(mode="json")
    del raw["tasks"]
    for outcome in raw["thresholds"]:
        del outcome["of"]
    old = Report.model_validate(raw)
    assert old.tasks is None
    assert not [table for table in contents(old) if table.title.startswith("Tasks")]
