"""Text that the models write for the report."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from moepress.calibration.corpus import EvaluationCorpus
from moepress.converters.onnx.folder import OnnxFolder
from moepress.errors import MoepressError
from moepress.stages.shown import samples_section
from moepress.validation.quality import samples
from moepress.validation.quality.measure import Subject
from moepress.validation.quality.results import Samples
from moepress.validation.quality.samples import NEW_TOKENS, PROMPTS, write_samples

HERE = {"device": torch.device("cpu"), "dtype": torch.float32}


@pytest.fixture(scope="module")
def tokenizer(demo_folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(demo_folder)


@pytest.fixture(scope="module")
def written(subjects: Sequence[Subject], corpus: EvaluationCorpus, tokenizer: Any) -> Samples:
    return write_samples(subjects, corpus, tokenizer, **HERE)


def test_there_is_one_beginning_of_each_of_the_first_domains(written: Samples, corpus: EvaluationCorpus) -> None:
    assert [row.domain for row in written.rows] == list(corpus.domains[:PROMPTS])
    assert written.prompt_tokens == 16, "half of a window of 32 tokens"
    assert all(len(row.continuations) == 3 for row in written.rows)
    assert all(1 <= one.tokens <= NEW_TOKENS for row in written.rows for one in row.continuations)


def test_the_text_is_what_transformers_writes(written: Samples, corpus: EvaluationCorpus, tokenizer: Any) -> None:
    folder = tokenizer.name_or_path
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    prompt = corpus.windows[:1, : written.prompt_tokens]
    made = model.generate(prompt, max_new_tokens=NEW_TOKENS, do_sample=False, attention_mask=torch.ones_like(prompt))
    whole = tokenizer.decode(made[0], skip_special_tokens=True)
    row = written.rows[0]
    assert row.prompt + row.continuations[0].text == whole


def test_the_same_model_writes_the_same_and_another_one_is_told_from_it(written: Samples) -> None:
    for row in written.rows:
        first, copy, _ = row.continuations
        assert (copy.text, copy.same_tokens) == (first.text, first.tokens)
    assert any(row.continuations[2].same_tokens < row.continuations[0].tokens for row in written.rows)


def test_an_onnx_folder_writes_too(
    onnx: OnnxFolder, subjects: Sequence[Subject], corpus: EvaluationCorpus, tokenizer: Any
) -> None:
    after = Subject(label="onnx", source=onnx, folder=onnx.folder, stored_bytes=onnx.total_bytes, parameters=0)
    made = write_samples([subjects[0], after], corpus, tokenizer, onnx_device="cpu", **HERE)
    assert all(row.continuations[1].text for row in made.rows)


def test_models_that_do_not_fit_into_memory_write_nothing_and_a_note_says_so(
    subjects: Sequence[Subject], corpus: EvaluationCorpus, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(samples, "free_memory_bytes", lambda device: 1 << 20)
    monkeypatch.setattr(samples, "load_dense", lambda *a, **k: pytest.fail("nothing is loaded"))
    with pytest.raises(MoepressError, match="demo needs"):
        write_samples(subjects, corpus, tokenizer, **HERE)
    found, notes = samples_section(subjects, corpus, tokenizer, onnx_device="cpu", **HERE)
    assert found is None
    assert notes == ("There is no sample text: demo needs 0.0 GiB of memory to write text, and 0.0 GiB are free.",)


def test_the_first_model_and_the_result_are_shown_in_a_few_seconds(
    subjects: Sequence[Subject], corpus: EvaluationCorpus, tokenizer: Any
) -> None:
    started = time.process_time()
    found, notes = samples_section(subjects, corpus, tokenizer, onnx_device="cpu", **HERE)
    assert time.process_time() - started < 10
    assert found is not None
    assert notes == ()
    assert [one.subject for one in found.rows[0].continuations] == ["demo", "pruned"]
