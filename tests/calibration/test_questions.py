"""Prompts out of files and evaluation text."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

import moepress.models.demo
from moepress.calibration.corpus import EvaluationCorpus, evaluation_windows
from moepress.calibration.questions import file_prompts, text_prompts
from moepress.calibration.records import Conversation, question_of
from moepress.calibration.sources import embedded_sources, parse_sources
from moepress.errors import InvalidInputError

ASKED = [{"role": "user", "content": "hi"}]
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)


@pytest.fixture
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(Path(str(moepress.models.demo.__file__)).parent)


@pytest.fixture
def chatting(tokenizer: Any) -> Any:
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def lines(file: Path, *records: object) -> Path:
    file.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return file


@pytest.mark.parametrize(
    "record",
    [
        {"messages": ASKED},
        {"messages": [*ASKED, {"role": "assistant", "content": "ho"}, {"role": "user", "content": "and?"}]},
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]},
        {"prompt": "hi"},
        {"prompt": "hi", "completion": "ho"},
        {"prompt": ASKED},
        {"prompt": ASKED, "chosen": [{"role": "assistant", "content": "ho"}]},
        {"prompt": None, "chosen": [*ASKED, {"role": "assistant", "content": "ho"}]},
        {"question": "hi", "answer": "ho"},
        {"instruction": "hi"},
        {"instruction": "hi", "output": "ho"},
    ],
)
def test_what_is_asked_stands_before_the_first_answer(record: dict[str, Any]) -> None:
    found = question_of(record, "here")
    assert isinstance(found, Conversation)
    assert found.messages == ASKED
    assert found.plain is not None
    assert "ho" not in found.plain
    assert found.plain == "hi" or "instruction" in record


def test_a_system_prompt_and_tools_stay() -> None:
    tool = {"type": "function", "function": {"name": "add"}}
    found = question_of({"prompt": "hi", "response": "ho", "system": "be short", "tools": [tool]}, "here")
    assert isinstance(found, Conversation)
    assert [message["role"] for message in found.messages] == ["system", "user"]
    assert found.tools == [tool]


def test_text_is_gone_on_from() -> None:
    assert question_of({"text": "Once upon", "prompt": "x"}, "here") == "Once upon"
    assert question_of({"content": "def f():"}, "here") == "def f():"


@pytest.mark.parametrize(
    "record", [{}, {"id": 3}, [1], {"messages": [{"role": "assistant", "content": "ho"}]}, {"messages": 3}]
)
def test_where_nothing_is_asked_the_place_is_named(record: object) -> None:
    with pytest.raises(InvalidInputError, match=r"^here: "):
        question_of(record, "here")


def test_lines_are_prompts(tmp_path: Path, tokenizer: Any) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("one\n\n  \ntwo\none\nthree\n", encoding="utf-8")
    found = file_prompts([file], tokenizer, None)
    assert found.texts == ("one", "two", "three")
    assert found.ids == tuple(tuple(tokenizer(text)["input_ids"]) for text in found.texts)
    assert not found.chat
    assert found.source == "the prompts of prompts.txt"
    assert found.notes == ("1 prompts are empty or stand there twice, and were left out.",)
    assert file_prompts([file], tokenizer, 2).texts == ("one", "two")
    assert found.digest != file_prompts([file], tokenizer, 2).digest


def test_a_chat_template_writes_what_is_asked(tmp_path: Path, chatting: Any) -> None:
    plain = tmp_path / "a.txt"
    plain.write_text("hi\n", encoding="utf-8")
    records = lines(tmp_path / "b.jsonl", {"prompt": "hey", "answer": "ho"}, {"text": "Once"})
    found = file_prompts([plain, records], chatting, None)
    assert found.chat
    assert [chatting.decode(ids) for ids in found.ids] == ["<user>hi<a>", "<user>hey<a>", "<|bos|>Once"]
    assert found.texts == ("hi", "hey", "Once")


def test_files_without_prompts_and_broken_ones_are_refused(tmp_path: Path, tokenizer: Any) -> None:
    empty = tmp_path / "empty.txt"
    empty.write_text("\n \n", encoding="utf-8")
    with pytest.raises(InvalidInputError, match=r"empty\.txt: there is no prompt in there"):
        file_prompts([empty], tokenizer, None)
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"prompt": "hi"}\n{"prompt"\n', encoding="utf-8")
    with pytest.raises(InvalidInputError, match=r"broken\.jsonl, line 2: not a JSON object"):
        file_prompts([broken], tokenizer, None)
    assert file_prompts([broken], tokenizer, 1).texts == ("hi",), "no more is read than is wanted"


def test_a_template_that_refuses_is_named_with_the_line(tmp_path: Path, tokenizer: Any) -> None:
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    file = lines(tmp_path / "a.jsonl", {"prompt": "hi"})
    with pytest.raises(InvalidInputError, match=r"a\.jsonl, line 1: the tokenizer's chat template refuses this prompt"):
        file_prompts([file], tokenizer, None)


@pytest.fixture
def corpus(tokenizer: Any) -> EvaluationCorpus:
    return evaluation_windows(embedded_sources("evaluation"), tokenizer, window=128, max_windows=3)


def test_evaluation_text_gives_pieces_of_every_domain(corpus: EvaluationCorpus, tokenizer: Any) -> None:
    found = text_prompts(embedded_sources("evaluation"), corpus, tokenizer, 10)
    assert len(found.ids) == 10
    assert found.notes == ()
    assert found.source == "beginnings out of the evaluation text"
    whole = [str(tokenizer.decode(corpus.windows[corpus.domain_index == d].flatten())) for d in range(4)]
    places = [next(d for d, text in enumerate(whole) if piece in text) for piece in found.texts]
    assert [places.count(d) for d in range(4)] == [3, 3, 2, 2]
    assert all(20 < len(ids) < 50 for ids in found.ids)


def test_less_text_gives_fewer_prompts_and_says_so(corpus: EvaluationCorpus, tokenizer: Any) -> None:
    found = text_prompts(embedded_sources("evaluation"), corpus, tokenizer, 500)
    assert len(found.ids) == len(set(found.ids)) == 4 * 3 * 4
    assert found.notes == ("The evaluation text gives 48 of 500 prompts; --data and --prompts take more text.",)


def test_conversations_of_an_evaluation_text_are_asked_in_turns(tmp_path: Path, chatting: Any) -> None:
    for name in ("a", "b"):
        lines(tmp_path / f"{name}.jsonl", *({"question": f"{name}{n}", "answer": "x " * 40} for n in range(3)))
    sources = parse_sources([str(tmp_path)], [])
    corpus = evaluation_windows(sources, chatting, window=16)
    found = text_prompts(sources, corpus, chatting, 5)
    assert found.texts == ("a0", "b0", "a1", "b1", "a2")
    assert found.chat
    assert found.source == "what is asked in the evaluation text"
    chatting.chat_template = None
    assert text_prompts(sources, corpus, chatting, 5).source == "beginnings out of the evaluation text"


def test_an_end_token_behind_a_prompt_is_dropped(tmp_path: Path, tokenizer: Any) -> None:
    class Ending:
        """A tokenizer that ends every text, as some do."""

        chat_template, eos_token_id = None, 1

        def __call__(self, text: str, **_options: Any) -> dict[str, list[int]]:
            return {"input_ids": [*tokenizer(text)["input_ids"], 1]}

    file = tmp_path / "a.txt"
    file.write_text("hi\n", encoding="utf-8")
    assert file_prompts([file], Ending(), None).ids == (tuple(tokenizer("hi")["input_ids"]),)
