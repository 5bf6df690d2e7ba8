"""What one record says, in the forms that data sets have."""

import json
from typing import Any

import pytest

from moepress.calibration.records import Conversation, content_of
from moepress.errors import InvalidInputError

ASKED = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


def chat(record: dict[str, Any]) -> Conversation:
    found = content_of(record, "a.jsonl, line 1")
    assert isinstance(found, Conversation)
    return found


@pytest.mark.parametrize(
    "record",
    [
        {"text": "x"},
        {"text": "x", "messages": ASKED},
        {"text": None, "content": "x"},
        {"content": "x", "id": 3},
        {"text": None, "messages": None, "prompt": "", "completion": "x"},
        {"prompt": "x", "completion": ""},
    ],
)
def test_text_is_read_as_it_is(record: dict[str, Any]) -> None:
    assert content_of(record, "here") == "x"


@pytest.mark.parametrize(
    "record",
    [
        {"messages": ASKED},
        {"text": None, "messages": ASKED},
        {"text": "", "messages": ASKED},
        {"conversations": ASKED},
        {"conversation": json.dumps(ASKED)},
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]},
        {"messages": [{"from": "user", "value": "hi"}, {"from": "chatgpt", "value": "ho"}]},
        {"prompt": ASKED[:1], "completion": ASKED[1:]},
        {"prompt": ASKED[:1], "chosen": ASKED[1:], "rejected": [{"role": "assistant", "content": "no"}]},
        {"prompt": None, "chosen": ASKED},
        {"instruction": "hi", "input": "", "output": "ho"},
        {"instruction": "hi", "response": "ho"},
        {"prompt": "hi", "response": "ho"},
        {"question": "hi", "answer": "ho"},
        {"input": "hi", "output": "ho"},
        {"query": "hi", "response": "ho", "text": None},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}, ASKED[1] | {"content": ["ho"]}]},
    ],
)  # fmt: skip
def test_conversations_of_every_form_are_the_same_messages(record: dict[str, Any]) -> None:
    assert chat(record).messages == ASKED


def test_parts_of_a_content_are_joined_by_line_breaks_and_pictures_are_refused() -> None:
    parts: list[Any] = [{"type": "text", "text": "a"}, {"type": "input_text", "text": "b"}, "c"]
    assert chat({"messages": [{"role": "user", "content": parts}]}).messages[0]["content"] == "a\nb\nc"
    parts.append({"type": "image_url", "image_url": {"url": "x"}})
    with pytest.raises(InvalidInputError, match=r"line 1: message 0: part 3: a part of type image_url; only text"):
        chat({"messages": [{"role": "user", "content": parts}]})


def test_an_instruction_with_an_input_is_alpacas_where_there_is_no_template() -> None:
    found = chat({"instruction": "Add.", "input": "1 1", "output": "2", "system": "Be brief.", "history": [["a", "b"]]})
    assert [(m["role"], m["content"]) for m in found.messages] == [
        ("system", "Be brief."), ("user", "a"), ("assistant", "b"), ("user", "Add.\n1 1"), ("assistant", "2")
    ]  # fmt: skip
    assert found.plain is not None
    assert found.plain.endswith("### Instruction:\nAdd.\n\n### Input:\n1 1\n\n### Response:\n2")
    short = chat({"instruction": "Add.", "output": "2"}).plain
    assert short is not None
    assert short.startswith("Below is an instruction that describes a task. Write")
    assert "Input" not in short


def test_tool_calls_take_the_form_of_openai_whatever_their_own() -> None:
    flat, legacy = {"name": "add", "arguments": {"a": 1}}, {"role": "assistant", "function_call": CALL["function"]}
    for message in (
        {"role": "assistant", "tool_calls": [CALL]},
        {"role": "assistant", "content": None, "tool_calls": [flat]},
        {"role": "assistant", "tool_calls": json.dumps([CALL])},
        legacy,
        {"from": "function_call", "value": json.dumps(flat)},
    ):
        (found,) = chat({"messages": [message]}).messages
        assert found == {"role": "assistant", "tool_calls": [CALL]}
    (kept,) = chat({"messages": [{"role": "assistant", "tool_calls": [CALL | {"id": "c1"}]}]}).messages
    assert kept["tool_calls"][0]["id"] == "c1"
    as_text = {"name": "add", "arguments": '{"a": 1}'}
    (kept,) = chat({"messages": [{"role": "assistant", "tool_calls": [{"function": as_text}]}]}).messages
    assert kept["tool_calls"][0]["function"] == as_text


def test_answers_of_tools_may_be_any_json() -> None:
    for content, text in (({"sum": 2}, '{"sum": 2}'), ([1, 2], "[1, 2]"), ("2", "2"), (2, "2")):
        (found,) = chat({"messages": [{"role": "tool", "content": content}]}).messages
        assert found["content"] == text
    (found,) = chat({"conversations": [{"from": "observation", "value": "2"}]}).messages
    assert found == {"role": "tool", "content": "2"}


def test_tools_are_read_as_a_list_one_alone_or_json() -> None:
    for tools in (
        [TOOL],
        TOOL,
        json.dumps([TOOL]),
        [json.dumps(TOOL)],
        [TOOL["function"]],
        json.dumps([TOOL["function"]]),
    ):
        assert chat({"messages": ASKED, "tools": tools}).tools == [TOOL]
    for none in (None, [], ""):
        assert chat({"messages": ASKED, "tools": none}).tools is None
    with pytest.raises(InvalidInputError, match="its tools: not valid JSON"):
        chat({"messages": ASKED, "tools": "[{"})
    with pytest.raises(InvalidInputError, match="one is a number"):
        chat({"messages": ASKED, "tools": [3]})


def test_reasoning_goes_with_its_message() -> None:
    turn = {"role": "assistant", "reasoning_content": "so", "content": "ho", "name": None}
    assert chat({"messages": [turn]}).messages == [{"role": "assistant", "reasoning_content": "so", "content": "ho"}]


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ([1], "not a JSON object"),
        ({}, "nothing but nulls"),
        ({"text": None}, "nothing but nulls"),
        ({"id": 1, "label": "x"}, "it has id, label"),
        ({"\x1b[2J\n" + "x" * 99: 1}, r"it has \?\[2J\?x{35}\."),
        ({"text": 3}, "its text is a number"),
        ({"text": b"x"}, "its text is bytes"),
        ({"messages": []}, "messages are an empty list"),
        ({"messages": {"role": "user"}}, "messages are an object"),
        ({"messages": "[{"}, "its messages: not valid JSON"),
        ({"messages": ["x"]}, "message 0: a string"),
        ({"messages": [{"content": "x"}]}, "needs a role"),
        ({"messages": [{"role": "user"}]}, "has no content"),
        ({"messages": [{"role": "user", "content": {"a": 1}}]}, "content is an object"),
        ({"messages": [{"role": "user", "content": 7}]}, "content is a number"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"id": 1}]}]}, "a function with a name"),
        ({"messages": [{"role": "assistant", "tool_calls": 3}]}, "tool_calls are a number"),
        ({"instruction": "x"}, "whose output is null"),
        ({"instruction": ["x"], "output": "y"}, "whose instruction is a list"),
        ({"instruction": "x", "output": "y", "history": 3}, "history is no list of pairs"),
        ({"instruction": "x", "output": "y", "history": ["ab"]}, "history is no list of pairs"),
        ({"instruction": "x", "output": "y", "history": [["a"]]}, "history is no list of pairs"),
        ({"prompt": "x"}, "it has prompt"),
        ({"prompt": "x", "completion": []}, "needs text"),
    ],
)
def test_what_is_wrong_with_a_record_is_said(record: Any, words: str) -> None:
    with pytest.raises(InvalidInputError, match=rf"a\.jsonl, line 1: .*({words})"):
        content_of(record, "a.jsonl, line 1")
