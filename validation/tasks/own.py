"""Two small tasks over the embedded evaluation text, for which nothing is downloaded and nothing need be installed.

`moepress_continuation`: which of four continuations follows this text; the others follow other places of the domain.
`moepress_sums`: the number that a solved exercise comes to, written after all its steps.

They are tasks of lm-evaluation-harness too (`write_task`), which asks the same and counts the same.
"""

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from moepress.calibration.sources import embedded_sources, source_files
from moepress.validation.tasks.names import CONTINUATION, SUMS
from moepress.validation.tasks.results import TaskScores
from moepress.validation.tasks.text_model import TextModel, Writing

VERSION = "1.0"

_PER_DOMAIN = 30
_CHOICES = 4
_BEFORE, _AFTER = 160, 40  # characters of a context and of a continuation, about
_WRITING = Writing(until=("\n",), room=8)
_NUMBER = r"(-?[0-9]+)"
_NO_NUMBER = "[invalid]"  # what lm-eval's filter gives where its pattern finds nothing

Doc = Mapping[str, Any]


def own_items(name: str) -> list[dict[str, Any]]:
    """The items of one of our tasks, always the same for the same text."""
    return _continuations() if name == CONTINUATION else _sums()


def own_scores(name: str, model: TextModel, limit: int | None) -> TaskScores:
    """What a model scores at one of our tasks.

    Args:
        name: of `OWN`.
        model: loaded.
        limit: the first items alone; None: all.
    """
    docs = own_items(name)[:limit]
    values = _asked_to_choose(docs, model) if name == CONTINUATION else _asked_to_write(docs, model)
    return TaskScores(
        task=name,
        items=tuple(f"{number} {_hash(_text(doc))} {_hash(str(doc['answer']))}" for number, doc in enumerate(docs)),
        values={(metric, how): found for (metric, how), found in values.items()},
        totals={key: sum(found) / len(found) for key, found in values.items()},
        higher={metric: True for metric, _ in values},
        max_gen_toks=None if name == CONTINUATION else _WRITING.room,
        version=VERSION,
    )


def _text(doc: Doc) -> str:
    return json.dumps(doc, indent=2, ensure_ascii=False)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _asked_to_choose(docs: Sequence[Doc], model: TextModel) -> dict[tuple[str, str], tuple[float, ...]]:
    found = model.loglikelihoods([(doc["context"], f" {choice}") for doc in docs for choice in doc["choices"]])
    plain, by_length = [], []
    for number, doc in enumerate(docs):
        likely = [value for value, _ in found[number * _CHOICES : (number + 1) * _CHOICES]]
        lengths = [len(choice) for choice in doc["choices"]]
        plain.append(float(_largest(likely) == doc["answer"]))
        by_length.append(
            float(_largest([v / n for v, n in zip(likely, lengths, strict=True)]) == doc["answer"]),
        )
    return {("acc", "none"): tuple(plain), ("acc_norm", "none"): tuple(by_length)}


def _largest(values: Sequence[float]) -> int:
    return max(range(len(values)), key=values.__getitem__)


def _asked_to_write(docs: Sequence[Doc], model: TextModel) -> dict[tuple[str, str], tuple[float, ...]]:
    written = model.write([(doc["context"], _WRITING) for doc in docs])
    numbers = [found[0] if (found := re.findall(_NUMBER, text)) else _NO_NUMBER for text in written]
    right = tuple(float(number == doc["answer"]) for number, doc in zip(numbers, docs, strict=True))
    return {("exact_match", "number"): right}


def write_task(name: str, folder: Path) -> Path:
    """One of our tasks as lm-evaluation-harness takes them: its YAML, whose data lie beside it.

    Returns:
        The YAML's path.
    """
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(doc, ensure_ascii=False) + "\n" for doc in own_items(name)), encoding="utf-8")
    settings: dict[str, Any] = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {"test": str(data.resolve())},
            "cache_dir": str((folder / "cache").resolve()),  # and not among what the user has downloaded
            "keep_in_memory": True,
        },
        "test_split": "test",
        "doc_to_text": "{{context}}",
        "doc_to_target": "{{answer}}",
        "metadata": {"version": VERSION},
    }
    settings |= _FORMS[name]()
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
    return file


def _choice_form() -> dict[str, Any]:
    metrics = [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")]
    return {"output_type": "multiple_choice", "doc_to_choice": "{{choices}}", "metric_list": metrics}


def _writing_form() -> dict[str, Any]:
    steps = [{"function": "regex", "regex_pattern": _NUMBER}, {"function": "take_first"}]
    return {
        "output_type": "generate_until",
        "generation_kwargs": {"until": list(_WRITING.until), "max_gen_toks": _WRITING.room, "do_sample": False},
        "filter_list": [{"name": "number", "filter": steps}],
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }


_FORMS: dict[str, Callable[[], dict[str, Any]]] = {CONTINUATION: _choice_form, SUMS: _writing_form}


def _domains() -> dict[str, str]:
    return {
        source.domain: "\n\n".join(path.read_text(encoding="utf-8") for path in source_files(source))
        for source in embedded_sources("evaluation")
    }


def _continuations() -> list[dict[str, Any]]:
    """Of each domain places at even distances; the wrong choices are what follows a quarter of the text further on."""
    docs = []
    for text in _domains().values():
        places = _places(text)
        after = [_after(text, place) for place in places]
        for number, place in enumerate(places):
            wrong = [after[(number + shift * len(places) // _CHOICES) % len(places)] for shift in range(1, _CHOICES)]
            answer = number % _CHOICES
            context = text[max(0, place - _BEFORE) : place]
            choices = [*wrong[:answer], after[number], *wrong[answer:]]
            docs.append({"context": context, "choices": choices, "answer": answer})
    return docs


def _places(text: str) -> list[int]:
    """Single spaces between words, behind which a continuation begins."""
    spaces = [found.start() for found in re.finditer(r"(?<=\w) (?=\w)", text[: -2 * _AFTER]) if found.start() > _BEFORE]
    step = max(1, len(spaces) // _PER_DOMAIN)
    return spaces[::step][:_PER_DOMAIN]


def _after(text: str, place: int) -> str:
    """What follows, to the end of a word."""
    end = re.search(r"\s", text[place + 1 + _AFTER :])
    return text[place + 1 : place + 1 + _AFTER + (end.start() if end else 0)]


def _sums() -> list[dict[str, Any]]:
    docs = []
    for exercise in re.split(r"\n\n(?=Question:)", _domains()["math"]):
        found = re.search(r"\n#### (-?[0-9]+)\s*$", exercise)
        if found:
            docs.append({"context": f"{exercise[: found.start()]}\n####", "answer": found[1]})
    return docs
