"""Scores and answers of our own against transformers' logits and `generate`, and across runtimes."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from moepress.converters.gguf.export import GgufRequest
from moepress.converters.onnx.folder import OnnxFolder
from moepress.converters.safetensors.artifact import open_artifact
from moepress.errors import UsageError
from moepress.models.forward.dense import load_dense
from moepress.models.storage.checkpoint import Checkpoint
from moepress.stages.export import gguf_stage
from moepress.stages.groundwork import load_tokenizer
from moepress.stages.places import Output, model_folder
from moepress.stages.subjects import elsewhere_subject, subject_of
from moepress.validation.quality.measure import Subject
from moepress.validation.rules.gguf_files import runnable_gguf
from moepress.validation.tasks.runner import Input
from moepress.validation.tasks.runners import open_runner
from moepress.validation.tasks.text_model import TextModel, Writing

CPU = torch.device("cpu")
DEMO = model_folder("demo")
PAIRS = [
    ("Question: What is 7 plus 5?\nAnswer: 7 + 5", " = 12"),
    ("Question: What is 7 plus 5?\nAnswer: 7 + 5", " = 13 apples"),
    ("Der Fährmann sagte: ", "Ich kann dir nichts hinterlassen"),
    ("", "def read_file(path):"),
    ("def read_file(path):\n    with open(path) as", " file:"),
    ("The volcano", " is an opening in the crust of a planet through which molten rock escapes " * 6),
]


def text_model(subject: Subject, longest: int = 512) -> TextModel:
    runner = open_runner(subject, device=CPU, dtype=torch.float32)
    return TextModel(subject.label, runner, load_tokenizer(DEMO), longest=longest, stop=frozenset({1}))


@pytest.fixture(scope="module")
def theirs(demo: Checkpoint) -> Any:
    """transformers' own model."""
    return load_dense(demo, device=CPU, dtype=torch.float32)


def by_hand(theirs: Any, tokens: list[int], new: int) -> tuple[float, bool]:
    with torch.inference_mode():
        logs = theirs(torch.tensor([tokens])).logits[0].double().log_softmax(-1)
    rows = range(len(tokens) - new - 1, len(tokens) - 1)
    likely = [float(logs[row, tokens[row + 1]]) for row in rows]
    return sum(likely), all(int(logs[row].argmax()) == tokens[row + 1] for row in rows)


def test_loglikelihoods_are_those_of_transformers_logits(demo_text: TextModel, theirs: Any) -> None:
    tokenizer, found = load_tokenizer(DEMO), demo_text.loglikelihoods(PAIRS)
    for (context, continuation), (value, greedy) in zip(PAIRS, found, strict=True):
        tokens = tokenizer(context + continuation)["input_ids"]  # the first one is of the text's beginning
        new = len(tokens) - len(tokenizer(context.rstrip())["input_ids"])
        expected, likeliest = by_hand(theirs, tokens, new)
        assert value == pytest.approx(expected, abs=2e-4 * new)
        assert greedy is likeliest


def test_a_continuation_that_the_model_writes_itself_is_the_likeliest(demo_text: TextModel) -> None:
    context = "Question: What is 7 plus 5?\nAnswer:"
    (written,) = demo_text.write([(context, Writing(room=6))])
    (_, greedy), (_, other) = demo_text.loglikelihoods([(context, written), (context, " zebra")])
    assert greedy
    assert not other


def test_a_long_context_loses_its_beginning(demo: Checkpoint, theirs: Any) -> None:
    short, tokenizer = text_model(subject_of("demo", demo), longest=16), load_tokenizer(DEMO)
    context, continuation = "one two three four five six seven eight nine ten " * 4 + "and", " eleven"
    tokens = tokenizer(context + continuation)["input_ids"][-16:]
    new = len(tokenizer(context + continuation)["input_ids"]) - len(tokenizer(context)["input_ids"])
    (value, _), *_ = short.loglikelihoods([(context, continuation)])
    assert value == pytest.approx(by_hand(theirs, tokens, new)[0], abs=1e-3)
    with pytest.raises(UsageError, match="A task's choice has"):
        short.loglikelihoods([("a", " word" * 40)])
    with pytest.raises(UsageError, match="up to 16 tokens"):
        short.write([("a", Writing(room=16))])


def test_whole_texts_count_each_token_once(demo: Checkpoint, demo_text: TextModel, theirs: Any) -> None:
    text, tokenizer = "The volcano is an opening in the crust of a planet.", load_tokenizer(DEMO)
    tokens = tokenizer(text)["input_ids"]
    assert tokens[0] == tokenizer.bos_token_id
    assert demo_text.rolling([text])[0] == pytest.approx(by_hand(theirs, tokens, len(tokens) - 1)[0], abs=1e-3)
    windows = text_model(subject_of("demo", demo), longest=5).rolling([text])[0]
    parts = [tokens[place : place + 5] for place in range(0, len(tokens) - 1, 4)]
    assert windows == pytest.approx(sum(by_hand(theirs, part, len(part) - 1)[0] for part in parts), abs=1e-3)


def test_answers_are_those_of_generate_one_by_one_and_end_before_a_stop(demo_text: TextModel, theirs: Any) -> None:
    tokenizer = load_tokenizer(DEMO)
    contexts = ["Question: What is 7 plus 5?\nAnswer:", "def read(path):\n", "Der alte Mann", "The " * 30]
    found = demo_text.write([(context, Writing(room=12)) for context in contexts])
    for context, text in zip(contexts, found, strict=True):
        ids = torch.tensor([tokenizer(context)["input_ids"]])
        made = theirs.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=1, pad_token_id=1)
        assert text == tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)
    stop = found[0][4:6]
    assert demo_text.write([(contexts[0], Writing(room=12, until=(stop,)))]) == [found[0].split(stop)[0]]


def test_inputs_that_share_all_but_their_last_token_go_through_once(demo: Checkpoint) -> None:
    counted = text_model(subject_of("demo", demo))
    runner, seen = counted._runner, list[Input]()
    plain = runner.logits

    def counting(inputs: Any) -> Any:
        seen.extend(inputs)
        return plain(inputs)

    runner.logits = counting  # type: ignore[method-assign]
    counted.loglikelihoods([("Which letter? Answer:", f" {letter}") for letter in "ABCD"])
    assert len(seen) == 1


def test_safetensors_onnx_and_gguf_agree(artifact: Path, onnx: OnnxFolder, tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    exact = dataclasses.replace(open_artifact(artifact), exact=True)
    expected = text_model(dataclasses.replace(subject_of("4 bit", exact), source=exact))
    values, answers = expected.loglikelihoods(PAIRS), expected.write([(PAIRS[0][0], Writing(room=8))])
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(DEMO / name, artifact / name)
    gguf_stage(str(artifact), Output(folder=tmp_path / "gguf"), GgufRequest(name="x", exact=True))
    (file,) = (tmp_path / "gguf").glob("*.gguf")
    for subject in (elsewhere_subject("onnx", onnx), elsewhere_subject("gguf", runnable_gguf(file))):
        other = text_model(subject)
        for (one, _), (two, _), (_, continuation) in zip(values, other.loglikelihoods(PAIRS), PAIRS, strict=True):
            assert two == pytest.approx(one, abs=0.02 * max(1, len(continuation.split())))
        assert other.write([(PAIRS[0][0], Writing(room=8))]) == answers
        other._runner.close()
