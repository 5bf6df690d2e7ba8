"""Fixtures for text: a tokenizer, with and without a chat template, and files."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from texts import CHAT_TEMPLATE, DEMO
from transformers import AutoTokenizer


@pytest.fixture
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(DEMO)


@pytest.fixture
def chat_tokenizer(tokenizer: Any) -> Any:
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, str | bytes], str]:
    def write_file(name: str, content: str | bytes) -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return str(path)

    return write_file
