"""Prompts that models are to answer: of the user's files, of conversations in an evaluation text, or pieces of it.

    a file of prompts                   a prompt on each line; of records (.jsonl, .json, .csv, .parquet) what is asked
    evaluation text of conversations    what is asked in each, where the tokenizer has a chat template
    other evaluation text               short pieces of its windows, to go on from

What is asked is written with the chat template, where the tokenizer has one.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from moepress.calibration.corpus import Corpus
from moepress.calibration.documents import has_records, read_lines, read_records
from moepress.calibration.records import Conversation, question_of
from moepress.calibration.sources import Source, source_files
from moepress.calibration.templates import ChatTemplate, Refused
from moepress.errors import InvalidInputError

PIECE_TOKENS = 32
_AT_ONCE = 64  # conversations that a template writes together


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompts:
    """Prompts as texts and tokens, no two the same.

    Attributes:
        texts: for people: what is asked, or to be gone on from.
        ids: tokens of each, with those that the tokenizer or the chat template puts around it.
        chat: whether a chat template wrote any of them.
        source: where they are from, in words.
        notes: what was left out.
    """

    texts: tuple[str, ...]
    ids: tuple[tuple[int, ...], ...]
    chat: bool
    source: str
    notes: tuple[str, ...] = ()

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of the tokens."""
        return hashlib.sha256(json.dumps(self.ids).encode()).hexdigest()


_Question = tuple[str, str | Conversation]
"""Where it stands, and what is asked."""


def file_prompts(files: Sequence[Path], tokenizer: Any, count: int | None) -> Prompts:
    """The first prompts of some files, one file after the other.

    Args:
        files: of lines or records.
        tokenizer: a transformers tokenizer.
        count: how many; None: all.

    Raises:
        InvalidInputError: a file can not be read or holds no prompt, or the chat template refuses one.
    """
    found = list(islice((question for file in files for question in _questions(file)), count))
    names = ", ".join(file.name for file in files)
    if not found:
        raise InvalidInputError(f"{names}: there is no prompt in there; give one on each line, or records.")
    return _encoded(found, tokenizer, f"the prompts of {names}")


def text_prompts(sources: Sequence[Source], corpus: Corpus, tokenizer: Any, count: int) -> Prompts:
    """What is asked in the conversations of an evaluation text, or pieces of its windows; as many of each domain.

    Args:
        sources: of the text.
        corpus: its windows.
        tokenizer: a transformers tokenizer.
        count: how many in all.

    Raises:
        InvalidInputError: a record is not sound, or the chat template refuses one.
    """
    asked = _asked(sources, count) if getattr(tokenizer, "chat_template", None) else []
    if asked:
        return _encoded(asked, tokenizer, "what is asked in the evaluation text")
    return _pieces(corpus, tokenizer, count)


def _questions(file: Path) -> Iterator[_Question]:
    if has_records(file):
        yield from read_records(file, question_of)
        return
    for where, line in read_lines(file):
        if line.strip():
            yield where, Conversation(messages=[{"role": "user", "content": line}], plain=line)


def _asked(sources: Sequence[Source], count: int) -> list[_Question]:
    """Questions of conversations, the domains taking turns."""
    chats = []
    for domain in dict.fromkeys(source.domain for source in sources):
        files = [file for source in sources if source.domain == domain for file in source_files(source)]
        every = (question for file in files if has_records(file) for question in _questions(file))
        chats.append(list(islice((q for q in every if isinstance(q[1], Conversation)), count)))
    longest = max(map(len, chats), default=0)
    return [one[number] for number in range(longest) for one in chats if number < len(one)][:count]


def _encoded(found: Sequence[_Question], tokenizer: Any, source: str) -> Prompts:
    """Questions as prompts, each once."""
    ids = dict[tuple[int, ...], str]()
    rendered = False
    with ChatTemplate(tokenizer) as chat:
        for start in range(0, len(found), _AT_ONCE):
            part = found[start : start + _AT_ONCE]
            for (_, content), text, by_template in zip(part, *_written(part, chat), strict=True):
                rendered |= by_template
                tokens = (
                    tokenizer(text, add_special_tokens=False)["input_ids"] if by_template else _plain(tokenizer, text)
                )
                ids.setdefault(tuple(tokens), content if isinstance(content, str) else _said(content))
    ids.pop((), None)
    twice = len(found) - len(ids)
    return Prompts(
        texts=tuple(ids.values()),
        ids=tuple(ids),
        chat=rendered,
        source=source,
        notes=(f"{twice} prompts are empty or stand there twice, and were left out.",) if twice else (),
    )


def _written(part: Sequence[_Question], chat: ChatTemplate) -> tuple[list[str], list[bool]]:
    """The texts of some questions, and whether the template wrote them."""
    conversations = [content for _, content in part if isinstance(content, Conversation)]
    by_template = iter(chat.render(conversations, add_generation_prompt=True) if chat.there and conversations else ())
    texts, rendered = [], []
    for where, content in part:
        text = content if isinstance(content, str) else next(by_template, content.plain or _said(content))
        if isinstance(text, Refused):
            raise InvalidInputError(f"{where}: the tokenizer's chat template refuses this prompt: {text.reason}.")
        texts.append(text)
        rendered.append(chat.there and isinstance(content, Conversation))
    return texts, rendered


def _plain(tokenizer: Any, text: str) -> list[int]:
    """A text's tokens with what the tokenizer puts before it, and not the end token that some put behind it."""
    tokens = list(tokenizer(text)["input_ids"])
    return tokens[:-1] if tokens and tokens[-1] == getattr(tokenizer, "eos_token_id", None) else tokens


def _said(asked: Conversation) -> str:
    """The last thing that is said before the answer."""
    return str(asked.messages[-1].get("content") or "")


def _pieces(corpus: Corpus, tokenizer: Any, count: int) -> Prompts:
    """Pieces of the windows, spread evenly over those of each domain; each as a text of its own, BOS and all."""
    window = corpus.windows.shape[1]
    length = min(PIECE_TOKENS, window)
    ids = dict[tuple[int, ...], str]()
    for domain in range(len(corpus.domains)):
        share = count // len(corpus.domains) + (domain < count % len(corpus.domains))
        own = corpus.windows[corpus.domain_index == domain][:, : window // length * length].reshape(-1, length)
        for number in range(min(share, len(own))):
            piece = own[number * len(own) // min(share, len(own))]
            text = str(tokenizer.decode(piece.tolist(), skip_special_tokens=True)).strip("\ufffd")
            ids.setdefault(tuple(_plain(tokenizer, text)), text)
    ids.pop((), None)
    notes = (f"The evaluation text gives {len(ids)} of {count} prompts; --data and --prompts take more text.",)
    return Prompts(
        texts=tuple(ids.values()),
        ids=tuple(ids),
        chat=False,
        source="beginnings out of the evaluation text",
        notes=notes if len(ids) < count else (),
    )
