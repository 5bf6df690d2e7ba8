"""Answers of real models: one that can not end loops, and is caught; a sound one is not; every runtime answers."""

import dataclasses
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest
import torch
from safetensors.torch import load_file, save_file
from stage_runs import command
from transformers import AutoTokenizer

from moepress.calibration.questions import Prompts, file_prompts
from moepress.converters.onnx.folder import OnnxFolder
from moepress.models.storage.checkpoint import Checkpoint
from moepress.validation.quality import samples
from moepress.validation.quality.answers import Wanted, compare_answers
from moepress.validation.quality.decoding import Sampling
from moepress.validation.quality.looping import Outcome
from moepress.validation.quality.measure import Subject

HERE = {"device": torch.device("cpu"), "dtype": torch.float32}
QUESTIONS = [f"What is {one} minus {other}?" for one, other in ((7, 5), (12, 9), (18, 8), (99, 1), (50, 20), (64, 32))]
QUESTIONS += ["Question: What is 12 plus 9?", "Question: What is 17 plus 4?"]
ASK = ("--max-new-tokens", "128", "--max-windows", "1", "--no-throughput")


@pytest.fixture(scope="module")
def tokenizer(demo_folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(demo_folder)


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("questions") / "questions.txt"
    file.write_text("\n".join([*QUESTIONS, "", QUESTIONS[0]]) + "\n", encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def prompts(questions: Path, tokenizer: Any) -> Prompts:
    return file_prompts([questions], tokenizer, None)


@pytest.fixture(scope="module")
def endless(demo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model, whose end token is never the likeliest: its row of the head is zero."""
    folder = tmp_path_factory.mktemp("endless") / "endless"
    shutil.copytree(demo_folder, folder, ignore=shutil.ignore_patterns("__*", "text", "*ing.json", "metrics.json"))
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"][1] = 0
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_model_that_can_not_end_is_caught(questions: Path, endless: Path, tmp_path: Path) -> None:
    out = tmp_path / "report"
    asked = ("--prompts", str(questions), "--max-loop-increase", "2%", *ASK)
    code, printed, errors = command("validate", "demo", str(endless), *asked, "-o", str(out))
    assert code == 3, errors
    assert "Generation: 8 prompts" in printed
    assert "after: loop increase is " in errors
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    before, after = report["generation"]["rows"]
    assert before["loops"]["count"] <= 1
    assert after["loops"]["count"] >= 4
    assert after["more_loops"]["only_after"] == after["loops"]["count"] - before["loops"]["count"]
    assert after["loops"]["count"] + after["unended"]["count"] == 8, "no answer ends"
    example = report["generation"]["examples"][0]
    assert [answer["outcome"] for answer in example["answers"]] == ["ended", "loops"]
    assert example["prompt"] in QUESTIONS
    (outcome,) = report["thresholds"]
    assert (outcome["measure"], outcome["state"], outcome["limit"]) == ("loop increase", "missed", 0.02)
    assert any("stand there twice" in note for note in report["notes"])
    (suite,) = ET.parse(out / "junit.xml").getroot()
    (case,) = suite
    assert case.get("name") == "loop increase at most 0.02"
    assert case.find("failure") is not None
    markdown = (out / "report.md").read_text(encoding="utf-8")
    assert "## Generation" in markdown
    assert "## Answers side by side" in markdown
    assert "Of 8 answers" in markdown


def test_a_sound_model_is_not(questions: Path, tmp_path: Path) -> None:
    out = tmp_path / "report"
    asked = ("--prompts", str(questions), "--generations", "3", "--max-loop-increase", "2%", *ASK)
    code, _, errors = command("validate", "demo", "demo", *asked, "-o", str(out))
    assert code == 0, errors
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    before, after = report["generation"]["rows"]
    assert (before["answers"], before["loops"], before["mean_tokens"]) == (3, after["loops"], after["mean_tokens"])
    assert report["thresholds"][0]["state"] == "kept"
    assert report["generation"]["examples"] == []


def test_every_runtime_answers_with_the_same_draws(
    onnx: OnnxFolder, demo: Checkpoint, subjects: Sequence[Subject], prompts: Prompts, tokenizer: Any
) -> None:
    """ONNX Runtime has the demo in 4 bits; what it draws differs, and itself draws the same again."""
    after = Subject(label="onnx", source=onnx, folder=onnx.folder, stored_bytes=onnx.total_bytes, parameters=0)
    again = dataclasses.replace(after, label="again")
    few = dataclasses.replace(prompts, ids=prompts.ids[:3], texts=prompts.texts[:3])
    wanted = Wanted(max_new_tokens=64, stop=frozenset({1}), sampling=Sampling(temperature=1.0, seed=4))
    found = compare_answers([subjects[0], after, again], few, wanted, tokenizer, onnx_device="cpu", **HERE)
    first, second, third = found.rows
    assert [row.answers for row in found.rows] == [3, 3, 3]
    assert second.mean_tokens == third.mean_tokens
    assert second.loops == third.loops
    assert (found.temperature, found.seed, found.max_new_tokens) == (1.0, 4, 64)
    assert found.digest == few.digest
    assert first.more_loops is None
    assert all(answer.outcome in set(Outcome) for example in found.examples for answer in example.answers)


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (("--prompts", "nowhere.txt"), 4, "--prompts nowhere.txt: No such file"),
        (("--generations", "0"), 2, "--generations"),
        (("--generations", "4", "--max-new-tokens", "63"), 2, "--max-new-tokens"),
        (("--generations", "4", "--max-new-tokens", "510"), 2, "leaves no room for a prompt in the context of 512"),
        (("--generations", "4", "--max-loop-increase", "3"), 2, "write 3%"),
        (("--generations", "4", "--temperature", "-1"), 2, "--temperature"),
    ],
)
def test_what_can_not_be_asked_is_refused_in_a_sentence(options: tuple[str, ...], code: int, said: str) -> None:
    found, printed, errors = command("validate", "demo", "demo", "--max-windows", "1", "--no-throughput", *options)
    assert (found, printed) == (code, "")
    assert said in errors


def test_a_model_that_does_not_fit_is_refused_before_anything_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples, "free_memory_bytes", lambda device: 1 << 20)
    monkeypatch.setattr("moepress.stages.validate.measure", lambda *a, **k: pytest.fail("nothing is measured"))
    code, _, errors = command("validate", "demo", "demo", "--generations", "4", "--max-windows", "1", "--no-throughput")
    assert code == 1
    assert "before needs 0.0 GiB of memory to answer prompts (--generations), and 0.0 GiB are free." in errors
