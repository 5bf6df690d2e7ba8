"""What the tests of tasks ask, and a model to be asked."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from moepress.models.storage.checkpoint import Checkpoint
from moepress.stages.groundwork import load_tokenizer
from moepress.stages.places import model_folder
from moepress.stages.subjects import subject_of
from moepress.validation.quality.measure import Subject
from moepress.validation.tasks.runners import open_runner
from moepress.validation.tasks.text_model import TextModel

CHOICES = [
    ("Question: 2 + 3 =", ["5", "17", "a house", "90"], 0),
    ("The volcano is an opening in", ["of of of", "the crust of a planet", "### 4", "def"], 1),
    ("def read(self", ["Der Mann", "):", "volcano", "#### 7"], 1),
    ("Der alte Mann sagte", ["import os", "zu ihm", "class", "+ 4"], 1),
    ("Answer: 7 * 6 =", ["42", "volcano", "und", "self"], 0),
    ("On the Earth most volcanoes lie along", ["the margins", "def", "9 * 4", "der"], 0),
]
SUMS = [(f"Question: What is {n} + {n + 1}?\nAnswer: {n} + {n + 1} =", str(2 * n + 1)) for n in range(2, 10)]


def cache_in(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the library `datasets` keep what it reads in a folder of the test, and not at home."""
    if importlib.util.find_spec("datasets") is None:
        return
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)


def ask_text_model(demo: Checkpoint, source: Any = None, *, label: str = "demo", longest: int = 512) -> TextModel:
    """A model with the demo's tokenizer, loaded in torch."""
    subject = subject_of(label, demo)
    if source is not None:
        subject = Subject(label=label, source=source, folder=None, stored_bytes=1, parameters=1)
    runner = open_runner(subject, device=torch.device("cpu"), dtype=torch.float32)
    return TextModel(label, runner, load_tokenizer(model_folder("demo")), longest=longest, stop=frozenset({1}))


def write_choices(folder: Path, name: str = "choice") -> Path:
    """A multiple-choice task in a file, for commands."""
    folder.mkdir(exist_ok=True)
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps({"q": q, "choices": c, "a": a}) + "\n" for q, c, a in CHOICES))
    config = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{q}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{a}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(config))
    return file


def write_sums(folder: Path, name: str = "sums", **settings: Any) -> Path:
    """A task of answers that are written."""
    folder.mkdir(exist_ok=True)
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps({"q": q, "a": a}) + "\n" for q, a in SUMS))
    steps = [{"function": "regex", "regex_pattern": "([0-9]+)"}, {"function": "take_first"}]
    config = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": "generate_until",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 8, "do_sample": False},
        "filter_list": [{"name": "number", "filter": steps}],
        "doc_to_text": "{{q}}",
        "doc_to_target": "{{a}}",
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(config | settings))
    return file
