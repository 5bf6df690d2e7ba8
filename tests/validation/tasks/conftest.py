"""A model to ask; tasks of these tests lie in files."""

from pathlib import Path

import pytest
from tasks_asked import ask_text_model, cache_in

from moepress.models.storage.checkpoint import Checkpoint
from moepress.validation.tasks.text_model import TextModel


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cache_in(tmp_path / "cache", monkeypatch)


@pytest.fixture(scope="session")
def demo_text(demo: Checkpoint) -> TextModel:
    return ask_text_model(demo)
