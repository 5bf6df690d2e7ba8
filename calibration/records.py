"""What one record of a data set says: its text, or a conversation that a chat template writes.

    fields                                            read as                                  convention
    text                                              that text                                datasets, TRL
    messages | conversations | conversation           a conversation; from/value too           OpenAI, TRL; ShareGPT
    prompt + completion                               both texts, or both lists of messages    TRL
    instruction (+ input) + output                    a conversation of two turns              Alpaca, as LLaMA-Factory
    prompt | question | input + response | answer     a conversation of two turns              LLaMA-Factory
    content                                           that text                                code data sets

The first that is there and not null counts: rows of a union of data sets have null in the others' fields. Lists and
tools may be JSON in a string, as Arrow has no type for what differs from row to row. `system` and `tools` go with any
conversation. What a turn's content has in parts is joined by line breaks, as vLLM and llama.cpp join it.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moepress.errors import InvalidInputError

TURN_FIELDS = ("messages", "conversations", "conversation")
QUESTION_FIELDS = ("prompt", "question", "query", "input")
ANSWER_FIELDS = ("output", "response", "completion", "answer", "chosen")
RECORD_FIELDS = (
    *("text", *TURN_FIELDS, *QUESTION_FIELDS, *ANSWER_FIELDS, "instruction", "context", "content"),
    *("system", "history", "tools", "functions"),
)
NEEDS = (
    "needs text, messages (or conversations), prompt and completion (or response), instruction and output, or content"
)

_SHAREGPT_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "bot", "model", "assistant", "function_call"), "assistant"),
    **dict.fromkeys(("observation", "tool", "function_response"), "tool"),
}
_ALPACA = (
    "Below is an instruction that describes a task{paired}. Write a response that appropriately completes the "
    "request.\n\n### Instruction:\n{instruction}\n\n{given}### Response:\n{output}"
)
_TEXT_PARTS = ("text", "input_text", "output_text")


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """What a chat template is given.

    Attributes:
        messages: each with a role and what else it has; contents are texts, arguments of tool calls as they came.
        tools: JSON schemas of functions, in OpenAI's form; None for none.
        plain: the same as text, for a model without a chat template; None where there is no convention for that.
    """

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    plain: str | None = None


def content_of(record: object, where: str) -> str | Conversation:
    """The text or the conversation of one JSON object, row of Parquet or line of CSV.

    Args:
        record: as parsed.
        where: file and record, for messages.

    Raises:
        InvalidInputError: it is of no known form, or a message of it is not.
    """
    if not isinstance(record, Mapping):
        raise InvalidInputError(f"{where}: not a JSON object, which {NEEDS}.")
    text = record.get("text")
    if text is not None and not isinstance(text, str):
        raise InvalidInputError(f"{where}: its text is {_kind(text)}, no string.")
    if text:
        return text
    found = _conversation(record, where) or _two_parts(record, where)
    if found is not None:
        return found
    for plain in (text, record.get("content")):
        if isinstance(plain, str):
            return plain
    there = listed([str(key) for key, value in record.items() if value is not None])
    raise InvalidInputError(f"{where}: {NEEDS}; it has {there or 'nothing but nulls'}.")


def question_of(record: object, where: str) -> str | Conversation:
    """What is asked in one record: a conversation up to the first answer, or text to go on from; no answer is needed.

    Args:
        record: as for `content_of`.
        where: file and record, for messages.

    Raises:
        InvalidInputError: as `content_of`, or nothing is asked before the first answer.
    """
    asked = None
    if isinstance(record, Mapping) and not record.get("text"):
        bare = {key: value for key, value in record.items() if key not in ANSWER_FIELDS}
        asked = next((bare[name] for name in QUESTION_FIELDS if bare.get(name) is not None), None)
        if asked is not None or bare.get("instruction") is not None:
            record = {**bare, "chosen": []} if isinstance(asked, list) else {**bare, "response": ""}
    found = content_of(record, where)
    if isinstance(found, str):
        return found
    roles = [message["role"] for message in found.messages]
    messages = found.messages[: roles.index("assistant") if "assistant" in roles else len(roles)]
    if not messages:
        raise InvalidInputError(f"{where}: it begins with an answer, so nothing is asked; leave it out.")
    plain = found.plain if isinstance(record, Mapping) and record.get("instruction") is not None else None
    said = str(messages[-1].get("content") or "")
    return Conversation(messages=messages, tools=found.tools, plain=said if plain is None else plain)


def listed(names: Sequence[str]) -> str:
    """Some names of a file, cut and without what a terminal would obey."""
    shown = ["".join(c if c.isprintable() else "?" for c in name[:40]) for name in names[:8]]
    return ", ".join([*shown, "..."] if len(names) > 8 else shown)


def _conversation(record: Mapping[str, Any], where: str) -> Conversation | None:
    """Of a list of messages under one of its names."""
    for name in TURN_FIELDS:
        turns = record.get(name)
        if isinstance(turns, str) and turns.lstrip().startswith("["):
            turns = _parsed(turns, f"{where}: its {name}")
        if turns is None or turns == "":
            continue
        if not isinstance(turns, list) or not turns:
            raise InvalidInputError(f"{where}: its {name} are {_kind(turns)}, no list of messages.")
        return _chat(record, turns, where)
    return None


def _two_parts(record: Mapping[str, Any], where: str) -> str | Conversation | None:
    """Of a question, under one of its names, and its answer."""
    if record.get("instruction") is not None:
        return _alpaca(record, where)
    question = next((record[name] for name in QUESTION_FIELDS if record.get(name) is not None), None)
    name = next((name for name in ANSWER_FIELDS if record.get(name) is not None), None)
    if name is None:
        return None
    answer = record[name]
    if isinstance(answer, list) and isinstance(question, list | None):  # `chosen` of TRL may hold the whole
        return _chat(record, [*(question or []), *answer], where) if answer or question else None
    if not (isinstance(question, str) and isinstance(answer, str)):
        return None
    if name == "completion":
        return question + answer  # TRL joins the two as they are
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return _chat(record, turns, where, plain=f"{question}\n{answer}")


def _alpaca(record: Mapping[str, Any], where: str) -> Conversation:
    instruction, output = (
        record["instruction"],
        next((record[a] for a in ANSWER_FIELDS if record.get(a) is not None), None),
    )
    given = record.get("input") or record.get("context") or ""
    for name, value in (("instruction", instruction), ("input", given), ("output", output)):
        if not isinstance(value, str):
            raise InvalidInputError(f"{where}: an instruction whose {name} is {_kind(value)}, no string.")
    asked = f"{instruction}\n{given}" if given else instruction
    before = record.get("history") or []
    if not isinstance(before, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in before):
        raise InvalidInputError(f"{where}: its history is no list of pairs of a question and an answer.")
    history = [
        {"role": role, "content": said}
        for pair in before
        for role, said in zip(("user", "assistant"), pair, strict=True)
    ]
    turns = [*history, {"role": "user", "content": asked}, {"role": "assistant", "content": output}]
    plain = _ALPACA.format(
        paired=", paired with an input that provides further context" if given else "",
        instruction=instruction,
        given=f"### Input:\n{given}\n\n" if given else "",
        output=output,
    )
    return _chat(record, turns, where, plain=plain)


def _chat(record: Mapping[str, Any], turns: list[Any], where: str, plain: str | None = None) -> Conversation:
    messages = [_message(turn, f"{where}: message {n}") for n, turn in enumerate(turns)]
    system = record.get("system")
    if isinstance(system, str) and system and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    stated = record.get("tools") or record.get("functions")
    return Conversation(messages=messages, tools=_tools(stated, where) if stated else None, plain=plain)


def _message(turn: object, where: str) -> dict[str, Any]:
    """A message in OpenAI's form; keys that are null are left out, as transformers does."""
    if not isinstance(turn, Mapping):
        raise InvalidInputError(f"{where}: {_kind(turn)}, no message with a role and a content.")
    message = {str(key): value for key, value in turn.items() if value is not None}
    speaker = message.pop("from", None)
    if "role" not in message and isinstance(speaker, str):
        message["role"] = _SHAREGPT_ROLES.get(speaker, speaker)
        message["content"] = message.pop("value", message.get("content"))
        call = _sharegpt_call(message["content"]) if speaker == "function_call" else None
        if call is not None:
            message |= {"tool_calls": [call]}
            del message["content"]
    if not isinstance(message.get("role"), str):
        raise InvalidInputError(f"{where}: each message needs a role and a content.")
    if "function_call" in message and "tool_calls" not in message:
        message["tool_calls"] = [message.pop("function_call")]
    if "tool_calls" in message:
        message["tool_calls"] = _tool_calls(message["tool_calls"], where)
    if message.get("content") is not None:
        message["content"] = _content(message["content"], message["role"], where)
    elif not (message.get("tool_calls") or message.get("reasoning_content")):
        raise InvalidInputError(f"{where}: each message needs a role and a content; this one has no content.")
    return message


def _content(content: object, role: str, where: str) -> str:
    """The text of a content: a string, parts, or (of a tool) any JSON."""
    if isinstance(content, str):
        return content
    if isinstance(content, list) and not (role == "tool" and not all(map(_is_part, content))):
        return "\n".join(_part(part, f"{where}: part {n}") for n, part in enumerate(content))
    if role == "tool":
        return json.dumps(content, ensure_ascii=False)
    raise InvalidInputError(f"{where}: its content is {_kind(content)}; it must be a text or a list of parts.")


def _is_part(part: object) -> bool:
    return isinstance(part, str) or (isinstance(part, Mapping) and "type" in part)


def _part(part: object, where: str) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type", "text") if isinstance(part, Mapping) else _kind(part)
    if isinstance(part, Mapping) and kind in _TEXT_PARTS and isinstance(part.get("text"), str):
        return str(part["text"])
    raise InvalidInputError(
        f"{where}: a part of type {str(kind)[:40]}; only text is read, leave out conversations with images."
    )


def _tool_calls(calls: object, where: str) -> list[dict[str, Any]]:
    """Calls in OpenAI's form: a name and arguments under `function`."""
    if isinstance(calls, str):
        calls = _parsed(calls, f"{where}: its tool_calls")
    calls = [calls] if isinstance(calls, Mapping) else calls
    if not isinstance(calls, list):
        raise InvalidInputError(f"{where}: its tool_calls are {_kind(calls)}, no list of calls.")
    found = []
    for call in calls:
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not (isinstance(function, Mapping) and isinstance(function.get("name"), str)):
            raise InvalidInputError(f"{where}: a tool call needs a function with a name.")
        beside = {key: value for key, value in call.items() if key != "function" and value is not None}
        found.append(({} if function is call else beside) | {"type": "function", "function": dict(function)})
    return found


def _sharegpt_call(value: object) -> dict[str, Any] | None:
    """The call that a ShareGPT turn of `function_call` has as JSON; None where it is no such JSON."""
    try:
        call = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        return None
    return dict(call) if isinstance(call, Mapping) and isinstance(call.get("name"), str) else None


def _tools(stated: object, where: str) -> list[dict[str, Any]]:
    """Schemas of tools in OpenAI's form, from a list, one alone, or JSON of either."""
    tools = _parsed(stated, f"{where}: its tools") if isinstance(stated, str) else stated
    found = []
    for tool in [tools] if isinstance(tools, Mapping) else tools if isinstance(tools, list) else [tools]:
        schema = _parsed(tool, f"{where}: a tool") if isinstance(tool, str) else tool
        if not isinstance(schema, Mapping):
            raise InvalidInputError(f"{where}: its tools are to be JSON schemas of functions; one is {_kind(schema)}.")
        found.append(dict(schema) if "function" in schema else {"type": "function", "function": dict(schema)})
    return found


def _parsed(text: str, what: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidInputError(f"{what}: not valid JSON in a string ({error}).") from error


def _kind(value: object) -> str:
    names = {str: "a string", bytes: "bytes", bool: "true or false", int: "a number", float: "a number", list: "a list"}
    if value is None:
        return "null"
    if isinstance(value, list) and not value:
        return "an empty list"
    return next((name for kind, name in names.items() if type(value) is kind), "an object")
