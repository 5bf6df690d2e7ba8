"""Prompts as they are read, reasoning told apart from answers, and the file of answers, which only grows."""

import json
from pathlib import Path
from typing import Any

import pytest

from moepress.calibration.endpoint import Answer, Endpoint
from moepress.calibration.prompts import Prompt, read_prompts
from moepress.calibration.reasoning import split_reasoning
from moepress.calibration.records import Conversation, content_of
from moepress.calibration.traces import open_traces
from moepress.errors import InvalidInputError, OutputLockedError, UsageError

SETTINGS = {"model": "demo", "seed": 0}


def asked(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


def written(folder: Path, name: str, text: str) -> Path:
    file = folder / name
    file.write_text(text, encoding="utf-8")
    return file


def test_text_has_a_prompt_a_line(tmp_path: Path) -> None:
    found = read_prompts(written(tmp_path, "p.txt", "\ufeffone\n\n two \n"))
    assert [prompt.messages for prompt in found] == [asked("one"), asked("two")]


@pytest.mark.parametrize(
    ("record", "messages"),
    [
        ({"prompt": "a"}, asked("a")),
        ({"question": "a", "answer": "b"}, asked("a")),
        ({"instruction": "a", "input": "b", "output": "c"}, asked("a\nb")),
        ({"text": "a"}, asked("a")),
        ({"prompt": asked("a")}, asked("a")),
        ({"system": "s", "prompt": "a"}, [{"role": "system", "content": "s"}, *asked("a")]),
        ({"messages": [*asked("a"), {"role": "assistant", "content": "b"}]}, asked("a")),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}, asked("a")),
    ],
)
def test_records_are_those_that_calibration_reads_without_the_last_answer(
    tmp_path: Path, record: dict[str, Any], messages: list[dict[str, Any]]
) -> None:
    (found,) = read_prompts(written(tmp_path, "p.jsonl", json.dumps(record) + "\n"))
    assert found.messages == messages


@pytest.mark.parametrize(
    ("text", "error", "said"),
    [
        ("{}\n", InvalidInputError, "line 1: has no prompt"),
        ("[1]\n", InvalidInputError, "line 1: not a JSON object"),
        ('{"prompt": "a"}\nnope\n', InvalidInputError, "line 2: not a JSON object"),
        ('{"messages": [{"role": "assistant", "content": "b"}]}\n', InvalidInputError, "nobody asks anything"),
        ("\n", UsageError, "has no prompts"),
    ],
)
def test_what_is_no_prompt_is_told_by_its_line(tmp_path: Path, text: str, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        read_prompts(written(tmp_path, "p.jsonl", text))


def test_a_prompt_has_the_same_key_and_seed_wherever_it_stands(tmp_path: Path) -> None:
    one, two = (read_prompts(written(tmp_path, f"{n}.txt", text)) for n, text in enumerate(("a\nb\na\n", "b\na\n")))
    assert one[0].key == two[1].key
    assert len({prompt.key for prompt in one}) == 3
    assert one[0].seed(7) == two[1].seed(7) != one[0].seed(8)
    assert 0 <= one[2].seed(7) < 1 << 63


@pytest.mark.parametrize(
    ("text", "prompt", "reasoning", "answer"),
    [
        ("<think>\nso\n</think>\n\nfour<|end|>", "", "so", "four"),
        ("so\n</think>\nfour", "2 plus 2<think>\n", "so", "four"),
        ("so</think>four", "", "so", "four"),
        ("<think>so", "", "so", ""),
        ("[THINK]so[/THINK]four", "", "so", "four"),
        (
            "<|channel|>analysis<|message|>so<|end|><|start|>assistant<|channel|>final<|message|>four",
            "<|start|>assistant",
            "so",
            "four",
        ),
        ("four<|end|>", "", None, "four"),
    ],
)
def test_reasoning_is_told_apart_by_its_marks(text: str, prompt: str, reasoning: str | None, answer: str) -> None:
    assert split_reasoning(text, prompt, ["<|end|>"]) == (reasoning, answer)


def said(content: str, reasoning: str | None = None) -> Answer:
    return Answer(content=content, reasoning=reasoning, stopped="end", tokens=3, text=f"seen: {content}")


def test_a_line_is_a_conversation_with_its_reasoning_that_calibration_reads(tmp_path: Path) -> None:
    file, prompt = tmp_path / "t.jsonl", Prompt(key="k", messages=asked("2 plus 2"))
    with open_traces(file, SETTINGS) as traces:
        traces.add(prompt, said("four", "so"))
        traces.add(prompt, said("vier"), as_text=True)
    first, second = (json.loads(line) for line in file.read_text().splitlines())
    found = content_of(first, "line 1")
    assert isinstance(found, Conversation)
    assert found.messages == [*asked("2 plus 2"), {"role": "assistant", "reasoning_content": "so", "content": "four"}]
    assert first["made"] == {**SETTINGS, "prompt": "k", "tokens": 3, "stopped": "end"}
    assert content_of(second, "line 2") == "seen: vier"


def test_a_torn_line_is_cut_off_and_whole_ones_stay(tmp_path: Path) -> None:
    file = tmp_path / "t.jsonl"
    for torn in (b'{"messages": [{"role": "us', b'{"text": "\xc3'):
        with open_traces(file, SETTINGS) as traces:
            traces.add(Prompt(key=f"k{len(torn)}", messages=asked("a")), said("b"))
        whole = file.read_bytes()
        file.write_bytes(whole + torn)
        with open_traces(file, SETTINGS) as traces:
            assert f"k{len(torn)}" in traces.done
        assert file.read_bytes() == whole


def test_a_first_line_that_was_torn_is_nothing_yet(tmp_path: Path) -> None:
    file = tmp_path / "t.jsonl"
    file.write_bytes(b'{"messages": [{"ro')
    with open_traces(file, SETTINGS) as traces:
        assert traces.done == set()
    assert file.read_bytes() == b""


@pytest.mark.parametrize(
    "content", [b"my notes", b"my notes\n", b'{"messages": [{"role": "user", "content": "a"}]}\n', b"\xff\xfe\n"]
)
def test_another_file_is_left_alone(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "t.jsonl"
    file.write_bytes(content)
    with pytest.raises(UsageError, match="was not made by"), open_traces(file, SETTINGS):
        pass
    assert file.read_bytes() == content


def test_other_settings_are_named_and_nothing_is_written(tmp_path: Path) -> None:
    file = tmp_path / "t.jsonl"
    with open_traces(file, SETTINGS) as traces:
        traces.add(Prompt(key="k", messages=asked("a")), said("b"))
    before = file.read_bytes()
    with (
        pytest.raises(UsageError, match="made with seed 0, and now it is 1"),
        open_traces(file, SETTINGS | {"seed": 1}),
    ):
        pass
    assert file.read_bytes() == before


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").symlink_to(tmp_path / "other.jsonl")
    with pytest.raises(UsageError, match="is a link"), open_traces(tmp_path / "t.jsonl", SETTINGS):
        pass
    assert not (tmp_path / "other.jsonl").exists()


def test_two_runs_do_not_write_to_one_file(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    file = tmp_path / "t.jsonl"
    with open_traces(file, SETTINGS), pytest.raises(OutputLockedError), open_traces(file, SETTINGS):
        pass


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://a/v1", "file:///etc/passwd", ""])
def test_an_endpoint_is_an_address_of_the_web(url: str) -> None:
    with pytest.raises(UsageError, match="is no address"):
        Endpoint(url=url)
