"""Tasks as part of a comparison: what is asked for, and every model asked, one after the other."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moepress.converters.gguf.file import GgufModel
from moepress.errors import MoepressError
from moepress.models.forward.dense import free_memory_bytes
from moepress.models.forward.walk import choose_dtype
from moepress.models.storage.checkpoint import Source
from moepress.runs.progress import note, waiting
from moepress.stages.groundwork import load_tokenizer
from moepress.validation.quality.decoding import stop_tokens
from moepress.validation.quality.measure import Elsewhere, Subject
from moepress.validation.tasks.endpoint import endpoint_model, served_model
from moepress.validation.tasks.harness import SEEDS, Catalogue, ask, load_tasks, open_catalogue
from moepress.validation.tasks.language_model import language_model
from moepress.validation.tasks.limits import unjudged
from moepress.validation.tasks.names import OWN, check_endpoint, check_names, harness_version, is_place
from moepress.validation.tasks.own import own_scores
from moepress.validation.tasks.paired import compare
from moepress.validation.tasks.results import Asked, TaskResults, TaskRow, TaskScores
from moepress.validation.tasks.runners import open_runner
from moepress.validation.tasks.text_model import TextModel

LONGEST = 8192
"""Tokens of a prompt and its answer at most: llama.cpp makes room for all of them, and tasks rarely have more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskRequest:
    """What models are asked.

    Attributes:
        names: of tasks and groups of lm-eval, of task files and folders, and of moepress's own tasks.
        limit: the first items of each task alone; None: all.
        chat: write prompts with the chat template.
        endpoint: address of a server that runs the last model; None: it is loaded.
        endpoint_before: the same of the first model.
        min_recovery: share of the first model's score that has to be left; None: no limit.
    """

    names: tuple[str, ...]
    limit: int | None = None
    chat: bool = False
    endpoint: str | None = None
    endpoint_before: str | None = None
    min_recovery: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where models run.

    Attributes:
        device: of those that transformers runs.
        dtype: of their weights in memory.
        onnx_device: `cpu`, `cuda` or `auto`, for ONNX folders.
    """

    device: torch.device
    dtype: torch.dtype
    onnx_device: str = "auto"


@dataclass(frozen=True, slots=True, kw_only=True)
class Exam:
    """All that every model is asked in the same way.

    Attributes:
        request: what is asked.
        candidates: the models, the reference first, each with the address of the server that runs it, if any.
        tokenizer: of transformers.
        stop: end-of-text tokens.
        longest: tokens of a prompt and its answer.
        catalogue: lm-eval's tasks; None where ours alone are asked, without it.
        place: where models run.
    """

    request: TaskRequest
    candidates: tuple[tuple[Subject, str | None], ...]
    tokenizer: Any
    stop: frozenset[int]
    longest: int
    catalogue: Catalogue | None
    place: Place


def prepare_exam(
    subjects: Sequence[Subject], folder: Path, request: TaskRequest, place: Place, *, context: int
) -> Exam:
    """Look up the tasks, and refuse before any work what can not be asked.

    Args:
        subjects: the reference first; it and the one that the user takes home are asked.
        folder: of the tokenizer.
        request: what is asked.
        place: where models run.
        context: tokens that all of them take.

    Raises:
        UsageError: there is no such task, or an address is none.
        UnsupportedError: lm-eval is needed and not installed.
        MoepressError: a model does not fit into memory, or a server does not answer.
    """
    others = [s for s in subjects[1:] if not isinstance(s.source, Elsewhere)] or list(subjects[1:])
    check_names(request.names, [_lies(subject) for subject in subjects if subject.folder is not None])
    urls = (
        None if request.endpoint_before is None else check_endpoint(request.endpoint_before, "--endpoint-before"),
        None if request.endpoint is None else check_endpoint(request.endpoint),
    )
    candidates = tuple(zip((subjects[0], *others[-1:]), urls, strict=False))
    for subject, url in candidates:
        if url is None:
            _require_room(subject, place)
        else:
            served_model(url)
    alone = all(name in OWN for name in request.names) and not any(urls) and not request.chat
    with waiting("looking up the tasks"):
        catalogue = None if alone else open_catalogue(request.names)
        if catalogue is not None:
            load_tasks(catalogue)  # data that are not to be had are missed now, and not hours later
    tokenizer = load_tokenizer(folder)
    return Exam(
        request=request,
        candidates=candidates,
        tokenizer=tokenizer,
        stop=stop_tokens(folder, tokenizer),
        longest=min(context, LONGEST) - (1 if any(urls) else 0),  # a server writes a token where it only scores
        catalogue=catalogue,
        place=place,
    )


def files_digest(names: Sequence[str]) -> str:
    """SHA-256 over the task files among names, so that a changed one is seen; of folders over all their YAML files."""
    digest = hashlib.sha256()
    for place in (Path(name).expanduser() for name in names if is_place(name)):
        for file in sorted(place.rglob("*.yaml")) if place.is_dir() else [place]:
            digest.update(file.read_bytes())
    return digest.hexdigest()


def check_request(request: TaskRequest, source: Source, device: torch.device, dtype: str) -> None:
    """Refuse what could not be asked of a model and what is made of it, before it is made.

    Args:
        request: what is asked.
        source: the original, which is loaded as a whole.
        device: where it runs.
        dtype: as --dtype has it.

    Raises:
        UsageError, UnsupportedError, MoepressError: as `prepare_exam`.
    """
    folder = getattr(source, "folder", None)
    check_names(request.names, [folder] if isinstance(folder, Path) else [])
    parameters = sum(math.prod(shape) for shape in source.shapes.values())
    _require_memory("the original", parameters * choose_dtype(dtype, device).itemsize, device)
    if not all(name in OWN for name in request.names):
        with waiting("looking up the tasks"):
            load_tasks(open_catalogue(request.names))


def _lies(subject: Subject) -> Path:
    """A model's folder, or the file that it is."""
    assert subject.folder is not None
    return subject.source.file if isinstance(subject.source, GgufModel) else subject.folder


def _require_room(subject: Subject, place: Place) -> None:
    """Refuse a model that can not be loaded as a whole."""
    if isinstance(subject.source, Elsewhere):
        _require_memory(subject.label, subject.stored_bytes, torch.device("cpu"))
    else:
        _require_memory(subject.label, subject.parameters * place.dtype.itemsize, place.device)


def _require_memory(what: str, needed: int, device: torch.device) -> None:
    free = free_memory_bytes(device)
    if needed > free:
        raise MoepressError(
            f"--tasks loads whole models, and {what} needs {needed / 2**30:.1f} GiB of memory where "
            f"{free / 2**30:.1f} GiB are free; `validate` can ask a server that runs it, with --endpoint."
        )


def hold_exam(exam: Exam) -> TaskResults:
    """Ask every model the same items, one after the other, and compare each with the first.

    Raises:
        MoepressError: a server does not answer, or lm-eval can not ask.
        UsageError: a task is not one that can be compared.
    """
    request = exam.request
    rows, runtimes = list[TaskRow](), dict[str, str]()
    first: _Answers | None = None
    for subject, url in exam.candidates:
        answers = _served(exam, url) if url is not None else _loaded(exam, subject)
        runtimes[subject.label] = answers.runtime
        if first is None:
            first = answers
        else:
            rows += compare(subject.label, first.scores, answers.scores, first.asked)
    notes = unjudged(request.min_recovery, rows)
    note(*notes)
    return TaskResults(
        harness="moepress" if exam.catalogue is None else f"lm-eval {harness_version()}",
        asked=tuple(name if name in OWN else Path(name).name for name in request.names),
        limit=request.limit,
        chat=request.chat,
        longest=exam.longest,
        seeds={} if exam.catalogue is None else dict(SEEDS),
        runtimes=runtimes,
        rows=tuple(rows),
        notes=notes,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Answers:
    scores: dict[str, TaskScores]
    asked: tuple[Asked, ...]
    runtime: str


def _served(exam: Exam, url: str) -> _Answers:
    """What a model behind a server answers."""
    assert exam.catalogue is not None
    model = endpoint_model(url, exam.tokenizer, longest=exam.longest)
    scores, asked = ask(exam.catalogue, model, limit=exam.request.limit, chat=exam.request.chat)
    return _Answers(scores=scores, asked=asked, runtime=f"a server of OpenAI's API, model {model.model}")


def _loaded(exam: Exam, subject: Subject) -> _Answers:
    """What a model answers that is loaded for it, and released again."""
    request, place = exam.request, exam.place
    runner = open_runner(subject, device=place.device, dtype=place.dtype, onnx_device=place.onnx_device)
    model = TextModel(subject.label, runner, exam.tokenizer, longest=exam.longest, stop=exam.stop)
    try:
        if exam.catalogue is None:
            scores = {name: own_scores(name, model, request.limit) for name in request.names}
            asked = tuple(Asked(name=name, tasks=(name,)) for name in request.names)
        else:
            scores, asked = ask(exam.catalogue, language_model(model), limit=request.limit, chat=request.chat)
    finally:
        model.close()
        runner.close()
    return _Answers(scores=scores, asked=asked, runtime=runner.runtime)
