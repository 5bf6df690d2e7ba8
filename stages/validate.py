"""validate as a function: several models, one text, one report."""

import dataclasses
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import torch

from moepress import __version__
from moepress.calibration.corpus import EvaluationCorpus
from moepress.converters.gguf.file import GgufModel
from moepress.converters.onnx.folder import OnnxFolder
from moepress.converters.onnx.runtime import session_providers
from moepress.converters.safetensors.artifact import Artifact
from moepress.errors import MoepressError, UsageError
from moepress.models.families.family import Shape
from moepress.models.forward.walk import Limits, choose_device, choose_dtype, choose_limits, default_memory
from moepress.models.storage.checkpoint import Source
from moepress.stages.answers import Asked, answers_section, asked
from moepress.stages.evaluation import Evaluation, evaluation_corpus, evaluation_sources
from moepress.stages.groundwork import load_tokenizer
from moepress.stages.places import Machine, context_notes
from moepress.stages.references import about_of, require_same
from moepress.stages.shown import checks_section, environment, samples_section, subject_info
from moepress.stages.tasks import Place, TaskRequest, hold_exam, prepare_exam
from moepress.validation.quality.measure import Elsewhere, Subject, measure, vocabulary_of
from moepress.validation.quality.reference_file import Keeper, SavedReference, write_reference
from moepress.validation.quality.results import Throughput
from moepress.validation.quality.samples import require_room
from moepress.validation.quality.thresholds import Outcome, judge, judge_answers
from moepress.validation.report.places import without_places
from moepress.validation.report.schema import Report
from moepress.validation.speed.fits import fits_section
from moepress.validation.speed.results import Targets
from moepress.validation.speed.target_here import target_here
from moepress.validation.speed.targets import Target, all_targets, target_of
from moepress.validation.speed.throughput import measure_throughput
from moepress.validation.speed.timing import Bench
from moepress.validation.tasks.limits import judge_tasks
from moepress.validation.tasks.results import TaskResults


def validate_stage(
    subjects: Sequence[Subject],
    tokenizer: Path,
    evaluation: Evaluation,
    machine: Machine,
    work: Path,
    *,
    onnx_device: str | None = None,
    also_timed: Sequence[Subject] = (),
    also_checked: Sequence[tuple[str, Path]] = (),
    keep: Path | None = None,
    **sections: Any,
) -> Report:
    """Measure all subjects on the same text and make a report; the first one is the reference.

    Args:
        subjects: models to compare.
        tokenizer: folder of the tokenizer, that of the reference.
        evaluation: text, windows, thresholds.
        machine: device, dtype, memory.
        work: folder for scratch files.
        onnx_device: `cpu`, `cuda` or `auto` for ONNX folders; None: as the machine says.
        also_timed: models that have rows of throughput and no others; they come after the reference.
        keep: a file for what is to be kept of the reference's predictions; replaced where it is there.
        also_checked: folders by a label that `check` is asked about, beside those of the subjects after the first.
        sections: further fields of the report (title, pruning, quantization, calibration, notes, commands, recipe).

    Raises:
        UsageError: CUDA is wanted for an ONNX folder and no session gets it, or the window exceeds a context.
        InvalidInputError: the subjects have different vocabularies, or the text is too short.
        MoepressError: an ONNX folder does not fit into memory.
    """
    provider, targets = onnx_device or machine.device, _targets(evaluation)
    streamed = [s.source for s in subjects if not isinstance(s.source, Elsewhere | SavedReference)]
    others = [s.source for s in subjects if isinstance(s.source, Elsewhere)]
    device = choose_device(machine.device if streamed else "cpu")
    dtype = choose_dtype(machine.dtype if streamed else "float32", device)
    folders = [s.source for s in subjects if isinstance(s.source, OnnxFolder)]
    if folders:
        _check_onnx(folders, provider)
    if others:
        subjects = [_exact(subject) for subject in subjects]
    _require_memory(*others)
    context = min([_context(subjects[0]), *(other.context for other in others)])
    corpus = evaluation_corpus(
        tokenizer,
        _as_saved(evaluation, subjects[0]),
        context=context,
        vocabulary=vocabulary_of(subjects[0].source),
    )
    require_same(subjects[0], corpus, tokenizer)
    exam = None
    if evaluation.tasks is not None:
        place = Place(device=device, dtype=dtype, onnx_device=provider)
        exam = prepare_exam(subjects, tokenizer, evaluation.tasks, place, context=context)
    to_answer = _asked(subjects, evaluation, tokenizer, corpus, device, dtype)
    window, keeper = int(corpus.windows.shape[1]), None if keep is None else Keeper()
    quality = measure(
        subjects,
        corpus,
        device=device,
        dtype=dtype,
        limits=_limits(streamed, window, machine, device),
        scratch_folder=work,
        onnx_device=provider,
        seen=keeper,
    )
    if keep is not None and keeper is not None:
        about = about_of(
            subjects[0],
            quality,
            tokenizer,
            max_windows=evaluation.max_windows,
            context=_context(subjects[0]),
            machine=environment(device, onnx=bool(folders)),
        )
        write_reference(keep, keeper.kept(), about)
    tasks = None if exam is None else hold_exam(exam)
    notes = (*sections.pop("notes", ()), *context_notes(evaluation.context, _context(subjects[0])))
    notes += tasks.notes if tasks is not None else ()
    timed, samples = None, None
    if evaluation.throughput:
        timed = _timed([subjects[0], *also_timed, *subjects[1:]], device, provider)
        samples, lack = samples_section(
            subjects, corpus, load_tokenizer(tokenizer), device=device, dtype=dtype, onnx_device=provider
        )
        notes += lack
    generation = None
    if to_answer is not None:
        notes += to_answer.notes
        generation = answers_section(
            subjects, to_answer, load_tokenizer(tokenizer), device=device, dtype=dtype, onnx_device=provider
        )
    made = [
        (s.label, s.source.file if isinstance(s.source, GgufModel) else s.folder)  # others may lie beside a file
        for s in subjects[1:]
        if s.folder is not None
    ]
    checks, unchecked = checks_section([*made, *also_checked])
    report = Report(
        tool_version=__version__,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        subjects=tuple(subject_info(s) for s in subjects),
        quality=quality,
        throughput=timed,
        thresholds=(
            *judge(evaluation.thresholds, quality.rows),
            *judge_answers(evaluation.thresholds, generation.rows if generation is not None else ()),
            *_judged_tasks(evaluation.tasks, tasks),
        ),
        tasks=tasks,
        targets=_gpus(subjects, targets, evaluation, device, timed),
        samples=samples,
        generation=generation,
        checks=checks,
        notes=(*notes, *unchecked),
        environment=environment(device, onnx=bool(folders), llama=any(isinstance(o, GgufModel) for o in others)),
        **sections,
    )
    return without_places(report)


def _judged_tasks(asked: TaskRequest | None, found: TaskResults | None) -> tuple[Outcome, ...]:
    return judge_tasks(asked.min_recovery, found.rows) if asked is not None and found is not None else ()


def _as_saved(evaluation: Evaluation, first: Subject) -> Evaluation:
    """The windows that a saved reference was made on, where the user does not ask for other ones."""
    if not isinstance(first.source, SavedReference):
        return evaluation
    about = first.source.about
    return dataclasses.replace(evaluation, window=about.window, max_windows=evaluation.max_windows or about.max_windows)


def _asked(
    subjects: Sequence[Subject],
    evaluation: Evaluation,
    tokenizer: Path,
    corpus: EvaluationCorpus,
    device: torch.device,
    dtype: torch.dtype,
) -> Asked | None:
    """What the models are to answer, found before they are measured; refused where one does not fit into memory."""
    if evaluation.answering is None:
        return None
    if isinstance(subjects[0].source, SavedReference):
        raise UsageError("A reference keeps no answers, so --generations needs BEFORE itself; leave one of them out.")
    for subject in subjects:
        require_room(subject, device, dtype, "to answer prompts (--generations)")
    return asked(
        evaluation.answering,
        tokenizer,
        load_tokenizer(tokenizer),
        evaluation_sources(evaluation),
        corpus,
        context=min(map(_context, subjects)),
        vocabulary=vocabulary_of(subjects[0].source),
    )


def _timed(subjects: Sequence[Subject], device: torch.device, provider: str) -> Throughput:
    """Tokens per second of those that lie on the disk."""
    bench = Bench(device=device, dtype=choose_dtype("auto", device), onnx_device=provider)
    return measure_throughput([s for s in subjects if s.folder is not None], bench)


def _gpus(
    subjects: Sequence[Subject],
    targets: Sequence[Target],
    evaluation: Evaluation,
    device: torch.device,
    timed: Throughput | None,
) -> Targets | None:
    """Which GPU holds them, the user's own marked."""
    return fits_section(
        [(s.label, s.source) for s in subjects if s.folder is not None and not isinstance(s.source, SavedReference)],
        targets,
        evaluation.context,
        here=_gpu_here(device, targets),
        throughput=timed,
        chosen=target_of(evaluation.target, evaluation.targets_file).id if evaluation.target else None,
    )


def _targets(evaluation: Evaluation) -> tuple[Target, ...]:
    """Those of the table, and the one that the user aims at, where it is made of several of them."""
    every = all_targets(evaluation.targets_file)
    if evaluation.target is None:
        return every
    chosen = target_of(evaluation.target, evaluation.targets_file)
    return every if chosen.id in {target.id for target in every} else (*every, chosen)


def _gpu_here(device: torch.device, targets: Sequence[Target]) -> Target | None:
    if device.type != "cuda":
        return None
    memory = int(torch.cuda.get_device_properties(device).total_memory)
    return target_here(str(torch.cuda.get_device_name(device)), memory, targets)


def _exact(subject: Subject) -> Subject:
    """The subject with codes multiplied out in fp32, as ONNX Runtime and llama.cpp do: like is compared with like."""
    if not isinstance(subject.source, Artifact):
        return subject
    return dataclasses.replace(subject, source=dataclasses.replace(subject.source, exact=True))


def _context(subject: Subject) -> int:
    source = subject.source
    if isinstance(source, SavedReference):
        return source.about.context
    return source.context if isinstance(source, Elsewhere) else _shape(source).context


def _limits(streamed: Sequence[Source], window: int, machine: Machine, device: torch.device) -> Limits:
    if not streamed:  # sessions do not ask for it
        return Limits(memory_bytes=machine.memory_bytes or default_memory(), batch_windows=1)
    return choose_limits(_shape(streamed[0]), window, machine.memory_bytes, device=device)


def _check_onnx(folders: Sequence[OnnxFolder], device: str) -> None:
    """Refuse what a session would refuse, before the other models are measured."""
    if device.startswith("cuda"):
        got = session_providers("CUDAExecutionProvider")
        if "CUDAExecutionProvider" not in got:
            raise UsageError(
                f"--device {device}: ONNX Runtime's session gets {', '.join(got)} instead of CUDA; `moepress doctor` "
                "says why."
            )


def _require_memory(*models: Elsewhere) -> None:
    """Refuse what a session would not find room for."""
    free = psutil.virtual_memory().available
    for folder in models:
        if folder.total_bytes > free:
            raise MoepressError(
                f"{folder.folder} has {folder.total_bytes / 2**30:.1f} GiB and {free / 2**30:.1f} GiB of memory are "
                "free; a session holds the whole model. Free some memory, or use a larger machine."
            )


def _shape(source: Source) -> Shape:
    return source.outline.shape
