"""Made-up text for tests, and short ways to read it back."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import moepress.models.demo
from moepress.calibration.documents import Document, read_documents
from moepress.calibration.templates import ChatTemplate

DEMO = Path(str(moepress.models.demo.__file__)).parent
CHAT_TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
WORDS = ["the river", "runs", "from 1847", "to the sea,", "und größer", "als", "∑ x = y", "why?\n", "naïve 😀"]

Write = Callable[[str, str | bytes], str]


def prose(seed: int, words: int = 1500) -> str:
    generator = torch.Generator().manual_seed(seed)
    return " ".join(WORDS[i] for i in torch.randint(len(WORDS), (words,), generator=generator).tolist())


def documents(path: str, tokenizer: Any, **options: Any) -> list[Document]:
    with ChatTemplate(tokenizer) as chat:
        return list(read_documents(Path(path), chat, **options))


def texts(path: str, tokenizer: Any, **options: Any) -> list[str]:
    return [document.text for document in documents(path, tokenizer, **options)]
