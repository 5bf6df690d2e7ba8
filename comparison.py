"""validate as a function: several models, one text, one report."""

import math
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from moepress import __version__
from moepress.calibration.corpus import EvaluationCorpus, evaluation_windows
from moepress.calibration.sources import embedded_sources, parse_sources
from moepress.compress.plan import Plan, estimate_sizes
from moepress.converters.artifact import Artifact
from moepress.errors import UsageError
from moepress.models.checkpoint import Checkpoint
from moepress.models.experts import prune_source
from moepress.models.family import Shape, shape_of
from moepress.models.inventory import inventory
from moepress.models.walk import choose_device, choose_dtype, choose_limits
from moepress.stages import DEFAULT_WINDOW, Machine, load_tokenizer
from moepress.validation.measure import Subject, measure
from moepress.validation.schema import Environment, Report, SubjectInfo
from moepress.validation.thresholds import Thresholds, judge
from moepress.validation.throughput import Bench, device_name, measure_throughput

EMBEDDED_TOKENS = 8192  # per domain; the embedded Python is longer than the prose


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """What models are compared on.

    Attributes:
        data: files, folders or data sets; none at all means the embedded evaluation text.
        domains: NAME=PATH.
        window: tokens per window; None for the model's context, at most 2048.
        max_windows: windows per domain; None for all (of the embedded text, for 8192 tokens).
        throughput: also time prefill and decode.
        thresholds: limits that are judged.
    """

    data: tuple[str, ...] = ()
    domains: tuple[str, ...] = ()
    window: int | None = None
    max_windows: int | None = None
    throughput: bool = True
    thresholds: Thresholds = field(default_factory=Thresholds)


def load_evaluation(
    folder: Path, data: Sequence[str], domains: Sequence[str], *, window: int, max_windows: int | None, vocabulary: int
) -> EvaluationCorpus:
    """Tokenized evaluation windows; without data the embedded evaluation text, as much of every domain."""
    sources = parse_sources(data, domains)
    if not sources:
        sources, max_windows = embedded_sources("evaluation"), max_windows or max(1, EMBEDDED_TOKENS // window)
    return evaluation_windows(
        sources, load_tokenizer(folder), window=window, max_windows=max_windows, vocab_size=vocabulary
    )


def evaluation_corpus(folder: Path, evaluation: Evaluation, shape: Shape) -> EvaluationCorpus:
    """The windows that an evaluation describes, for a model of that shape with its tokenizer in `folder`."""
    return load_evaluation(
        folder,
        evaluation.data,
        evaluation.domains,
        window=evaluation.window or min(shape.context, DEFAULT_WINDOW),
        max_windows=evaluation.max_windows,
        vocabulary=shape.vocabulary,
    )


def subject_of(label: str, source: Checkpoint | Artifact) -> Subject:
    """A model folder as one side of a comparison."""
    parameters = sum(math.prod(shape) for shape in source.shapes.values())
    return Subject(
        label=label,
        source=source,
        folder=source.folder,
        stored_bytes=source.total_bytes,
        parameters=parameters,
    )


def pruned_subject(label: str, checkpoint: Checkpoint, plan: Plan) -> Subject:
    """The model pruned by a plan and not quantized, without writing it: the original seen through the keep list."""
    source = prune_source(checkpoint, plan.keep, degroup=plan.degroup)
    return Subject(
        label=label,
        source=source,
        folder=None,
        stored_bytes=estimate_sizes(inventory(checkpoint), checkpoint.shape, plan.experts, None).after_bytes,
        parameters=sum(math.prod(shape) for shape in source.shapes.values()),
    )


def check_report_folder(folder: Path, models: Sequence[Path]) -> None:
    """Refuse a place for a report that is a file, a model, or a folder with other things in it.

    Raises:
        UsageError: with what to do instead.
    """
    target = folder.resolve()
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"The output {folder} is a file; give the name of a folder for the report.")
    if any(target == m.resolve() or m.resolve() in target.parents for m in models):
        raise UsageError(f"The output {folder} lies inside a model's folder; choose another one.")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "report.json").exists():
        raise UsageError(f"The output {folder} holds other files; choose another folder for the report.")


def validate_stage(
    subjects: Sequence[Subject], tokenizer: Path, evaluation: Evaluation, machine: Machine, work: Path, **sections: Any
) -> Report:
    """Measure all subjects on the same text and make a report; the first one is the reference.

    Args:
        subjects: models to compare.
        tokenizer: folder of the tokenizer, that of the reference.
        evaluation: text, windows, thresholds.
        machine: device, dtype, memory.
        work: folder for scratch files.
        sections: further fields of the report (title, pruning, quantization, calibration, notes, commands, recipe).

    Raises:
        InvalidInputError: the subjects have different vocabularies, or the text is too short.
    """
    shape = shape_of(subjects[0].source.family, subjects[0].source.config)
    corpus = evaluation_corpus(tokenizer, evaluation, shape)
    device = choose_device(machine.device)
    limits = choose_limits(shape, int(corpus.windows.shape[1]), machine.memory_bytes, device=device)
    quality = measure(
        subjects,
        corpus,
        device=device,
        dtype=choose_dtype(machine.dtype, device),
        limits=limits,
        scratch_folder=work,
    )
    timed = None
    if evaluation.throughput:
        with_folder = [s for s in subjects if s.folder is not None]
        timed = measure_throughput(with_folder, Bench(device=device, dtype=choose_dtype("auto", device)))
    return Report(
        tool_version=__version__,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        subjects=tuple(_subject_info(s) for s in subjects),
        quality=quality,
        throughput=timed,
        thresholds=judge(evaluation.thresholds, quality.rows),
        environment=_environment(device),
        **sections,
    )


def _subject_info(subject: Subject) -> SubjectInfo:
    shape = shape_of(subject.source.family, subject.source.config)
    return SubjectInfo(
        label=subject.label,
        folder=subject.folder.name if subject.folder else None,
        stored_bytes=subject.stored_bytes,
        parameters=subject.parameters,
        experts_per_layer=shape.experts,
        bits=8 * subject.stored_bytes / max(subject.parameters, 1),
    )


def _environment(device: torch.device) -> Environment:
    import transformers

    versions = {"moepress": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
    return Environment(
        versions=versions | {"python": platform.python_version()},
        device=device_name(device),
        cpus=os.cpu_count(),
        platform=platform.platform(),
    )
