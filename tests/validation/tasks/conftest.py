"""A model to ask, and no network: tasks of these tests lie in files."""

import os

import pytest
from tasks_asked import ask_text_model

from moepress.models.storage.checkpoint import Checkpoint
from moepress.validation.tasks.text_model import TextModel


@pytest.fixture(autouse=True, scope="session")
def _no_network(tmp_path_factory: pytest.TempPathFactory) -> None:
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path_factory.mktemp("datasets"))}


@pytest.fixture(scope="session")
def demo_text(demo: Checkpoint) -> TextModel:
    return ask_text_model(demo)
