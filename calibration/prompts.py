"""Prompts that a model is to answer: what a file of them holds, as conversations that end with the user's turn."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moepress.calibration.records import QUESTION_FIELDS, TURN_FIELDS, content_of
from moepress.errors import InvalidInputError, UsageError
from moepress.runs.files import read_text

RECORDS = (".jsonl", ".ndjson")
_ALONE = ("instruction", *QUESTION_FIELDS, "text", "content")


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One prompt.

    Attributes:
        key: digest of its messages, and how often the file had them before: the same in any order of the file.
        messages: what the model is given, each with role and content; the last one is the user's.
    """

    key: str
    messages: list[dict[str, Any]]

    def seed(self, seed: int) -> int:
        """A seed of its own, 0 to 2^63 - 1, so that an answer does not depend on those before it."""
        return int.from_bytes(hashlib.sha256(f"{seed}:{self.key}".encode()).digest()[:8], "little") >> 1


def read_prompts(file: Path) -> list[Prompt]:
    """All prompts of a file: of .jsonl a record on each line, of anything else a line of text each.

    A record has `prompt` (a text or messages) or another name of a question, `messages` or another name of a
    conversation, or `text`. What an assistant says at the end of a conversation is left out: it is to be made anew.

    Raises:
        InvalidInputError: the file can not be read, or a record has no prompt.
        UsageError: there are none.
    """
    try:
        lines = read_text(file).removeprefix("\ufeff").split("\n")
    except UnicodeDecodeError as error:
        raise InvalidInputError(f"{file}: not UTF-8 text at byte offset {error.start}; convert the file.") from error
    except OSError as error:
        raise InvalidInputError(f"Cannot read {file}: {error.strerror or error}.") from error
    as_records = file.name.lower().endswith(RECORDS)
    seen, found = Counter[str](), []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{file}, line {number}"
        messages = _messages(line, where) if as_records else [{"role": "user", "content": line.strip()}]
        digest = hashlib.sha256(json.dumps(messages, sort_keys=True).encode()).hexdigest()[:16]
        found.append(Prompt(key=f"{digest}-{seen[digest]}", messages=messages))
        seen[digest] += 1
    if not found:
        raise UsageError(f"{file} has no prompts; give a line for each, or records in a .jsonl file.")
    return found


def _messages(line: str, where: str) -> list[dict[str, Any]]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InvalidInputError(f"{where}: not a JSON object: {error}.") from error
    if not isinstance(record, Mapping):
        raise InvalidInputError(f"{where}: not a JSON object; a record has a prompt, or messages.")
    turns = next((record[name] for name in (*TURN_FIELDS, "prompt") if isinstance(record.get(name), list)), None)
    if turns is None:
        return [*_system(record), {"role": "user", "content": _text(record, where)}]
    found = content_of({"messages": turns, "system": record.get("system")}, where)
    assert not isinstance(found, str), "messages are a conversation"
    messages = list(_until_user(found.messages))
    if not messages:
        raise InvalidInputError(f"{where}: nobody asks anything in its messages; one must be the user's.")
    return messages


def _system(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    said = record.get("system")
    return [{"role": "system", "content": said}] if isinstance(said, str) and said else []


def _text(record: Mapping[str, Any], where: str) -> str:
    text = next((record[name] for name in _ALONE if isinstance(record.get(name), str) and record[name].strip()), None)
    if text is None:
        raise InvalidInputError(f"{where}: has no prompt; give prompt, messages, instruction, question or text.")
    given = record.get("input") if isinstance(record.get("instruction"), str) else None
    return f"{text}\n{given}" if isinstance(given, str) and given and given != text else str(text)


def _until_user(messages: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The messages up to the user's last one, or what a tool answered after it."""
    last = max((n for n, message in enumerate(messages) if message["role"] in ("user", "tool")), default=-1)
    yield from messages[: last + 1]
