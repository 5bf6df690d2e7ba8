"""validate as a function: several models, one text, one report."""

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import torch

from moepress import __version__
from moepress.calibration.corpus import EvaluationCorpus, evaluation_windows
from moepress.calibration.sources import Source as TextSource
from moepress.calibration.sources import embedded_sources, parse_sources
from moepress.compress.budget.sizes import part_sizes
from moepress.compress.pruning.plan import Plan, estimate_sizes
from moepress.compress.pruning.repaired import Repairs, repaired_source
from moepress.converters.gguf.file import GgufModel, gguf_file
from moepress.converters.mlx.folder import is_mlx, open_mlx, require_mlx
from moepress.converters.onnx.folder import OnnxFolder, is_onnx, open_onnx
from moepress.converters.onnx.runtime import require_onnxruntime, session_providers
from moepress.converters.safetensors.artifact import Artifact
from moepress.errors import InvalidInputError, MoepressError, UnsupportedError, UsageError
from moepress.models.families.family import Part, Shape, part_of
from moepress.models.forward.inventory import inventory
from moepress.models.forward.walk import Limits, choose_device, choose_dtype, choose_limits, default_memory
from moepress.models.storage.checkpoint import Checkpoint, Source
from moepress.models.storage.experts import prune_source
from moepress.runs.output import check_writable, resolve_output
from moepress.runs.rows import holds_journal
from moepress.stages.answers import Answering, Asked, answers_section, asked
from moepress.stages.groundwork import announce, load_tokenizer, opened_source, require_context
from moepress.stages.places import DEFAULT_WINDOW, Machine, context_notes
from moepress.stages.references import about_of, require_same
from moepress.stages.shown import checks_section, environment, samples_section, subject_info
from moepress.stages.tasks import Place, TaskRequest, hold_exam, prepare_exam
from moepress.stages.tokenizer import read_tokenizer
from moepress.validation.quality.measure import Elsewhere, Subject, measure, vocabulary_of
from moepress.validation.quality.reference_file import Keeper, SavedReference, write_reference
from moepress.validation.quality.results import Throughput
from moepress.validation.quality.routing import Kept, kept_in
from moepress.validation.quality.samples import require_room
from moepress.validation.quality.thresholds import Outcome, Thresholds, judge, judge_answers
from moepress.validation.report.files import JSON_NAME, foreign_files
from moepress.validation.report.places import without_places
from moepress.validation.report.schema import Report
from moepress.validation.rules.gguf_files import runnable_gguf
from moepress.validation.speed.fits import fits_section
from moepress.validation.speed.results import Targets
from moepress.validation.speed.target_here import target_here
from moepress.validation.speed.targets import Target, all_targets, target_of
from moepress.validation.speed.throughput import measure_throughput
from moepress.validation.speed.timing import Bench
from moepress.validation.tasks.limits import judge_tasks
from moepress.validation.tasks.results import TaskResults

EMBEDDED_TOKENS = 8192  # per domain; the embedded Python is longer than the prose


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """What models are compared on.

    Attributes:
        data: files, folders or data sets; none at all means the embedded evaluation text.
        domains: NAME=PATH.
        window: tokens per window; None for the reference's context, at most 2048.
        max_windows: windows per domain; None for all (of the embedded text, for 8192 tokens).
        throughput: also time prefill and decode, and let the models write sample text.
        context: tokens in the KV cache of the table of GPUs; None for 8192, or the context where it is shorter.
        targets_file: the user's own GPUs, beside those of the table.
        target: the GPU that the user aims at, as `target_of` takes it.
        thresholds: limits that are judged.
        tasks: what the models are asked besides, with a limit of its own; None: nothing.
        answering: what the models are to answer; None: nothing.
    """

    data: tuple[str, ...] = ()
    domains: tuple[str, ...] = ()
    window: int | None = None
    max_windows: int | None = None
    throughput: bool = True
    context: int | None = None
    targets_file: Path | None = None
    target: str | None = None
    thresholds: Thresholds = field(default_factory=Thresholds)
    tasks: TaskRequest | None = None
    answering: Answering | None = None


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


def evaluation_sources(evaluation: Evaluation) -> tuple[TextSource, ...]:
    """Where the text is from."""
    return parse_sources(evaluation.data, evaluation.domains) or embedded_sources("evaluation")


def evaluation_corpus(folder: Path, evaluation: Evaluation, *, context: int, vocabulary: int) -> EvaluationCorpus:
    """The windows that an evaluation describes, for a model of that context and vocabulary, tokenizer in `folder`."""
    require_context("--window", evaluation.window, context)
    return load_evaluation(
        folder,
        evaluation.data,
        evaluation.domains,
        window=evaluation.window or min(context, DEFAULT_WINDOW),
        max_windows=evaluation.max_windows,
        vocabulary=vocabulary,
    )


def check_evaluation(folder: Path, evaluation: Evaluation, *, context: int, vocabulary: int) -> tuple[str, str | None]:
    """Refuse text and prompts that can not be used, before any work.

    Returns:
        Digests of the windows and of the prompts, where there are some.
    """
    corpus = evaluation_corpus(folder, evaluation, context=context, vocabulary=vocabulary)
    if evaluation.answering is None:
        return corpus.digest, None
    found = asked(
        evaluation.answering,
        folder,
        load_tokenizer(folder),
        evaluation_sources(evaluation),
        corpus,
        context=context,
        vocabulary=vocabulary,
    )
    return corpus.digest, found.prompts.digest


def open_subject(label: str, folder: Path) -> Subject:
    """Any model as one side of a comparison: a folder, original, pruned, quantized in either layout, or ONNX; or GGUF.

    Raises:
        InvalidInputError: the folder or file is not sound, or llama.cpp would abort the process over it.
        UnsupportedError: it is an ONNX folder or GGUF, and what runs it is not installed.
    """
    file = gguf_file(folder)
    if file is not None:
        return elsewhere_subject(label, runnable_gguf(file))
    if is_mlx(folder):
        require_mlx()
        return elsewhere_subject(label, open_mlx(folder))
    if not is_onnx(folder):
        source = opened_source(folder)
        announce(source)
        return subject_of(label, source)
    require_onnxruntime()
    return elsewhere_subject(label, open_onnx(folder))


def elsewhere_subject(label: str, source: Elsewhere) -> Subject:
    """What a runtime of its own runs (ONNX, GGUF, MLX) as one side of a comparison."""
    return Subject(
        label=label,
        source=source,
        folder=source.folder,
        stored_bytes=source.total_bytes,
        parameters=source.parameters,
    )


def subject_of(label: str, source: Checkpoint | Artifact) -> Subject:
    """A folder of safetensors as one side of a comparison."""
    parameters = sum(math.prod(shape) for shape in source.shapes.values())
    return Subject(
        label=label,
        source=source,
        folder=source.folder,
        stored_bytes=source.total_bytes,
        parameters=parameters,
        parts=_stored_parts(source),
        kept=kept_in(source.folder),
    )


def tokenizer_folder(folders: Sequence[Path]) -> Path:
    """The first folder with a tokenizer that can be read.

    Raises:
        InvalidInputError: none has one; of the first folder.
    """
    first: MoepressError | None = None
    for folder in folders:
        try:
            read_tokenizer(folder)
        except (InvalidInputError, UnsupportedError) as error:
            first = first or error
        else:
            return folder
    assert first is not None, "there is a folder"
    raise first


def _stored_parts(source: Checkpoint | Artifact) -> dict[str, int]:
    layers, sizes = source.outline.shape.layers, Counter[Part]()
    for name, entry in source.stored.items():
        sizes[part_of(source.family, name, layers)] += entry.bytes
    return {part.value: sizes[part] for part in Part if sizes[part]}


def pruned_subject(label: str, checkpoint: Checkpoint, plan: Plan, repairs: Repairs | None = None) -> Subject:
    """The model pruned by a plan and not quantized, without writing it: the original seen through the keep list."""
    source: Source = prune_source(checkpoint, plan.keep, degroup=plan.degroup)
    source = source if repairs is None else repaired_source(source, repairs)
    parts = part_sizes(inventory(checkpoint), checkpoint.shape, plan.experts, None)
    return Subject(
        label=label,
        source=source,
        folder=None,
        stored_bytes=estimate_sizes(inventory(checkpoint), checkpoint.shape, plan.experts, None).after_bytes,
        parameters=sum(math.prod(shape) for shape in source.shapes.values()),
        parts={part.value: round(size) for part, size in parts.items() if size},
        kept=Kept(experts=plan.keep, total=plan.experts_before),
    )


def check_report_folder(folder: Path, models: Sequence[Path], *, force: bool = False) -> None:
    """Refuse a place for a report that is a file, a model, a run, or a folder with other things in it. A report that is
    there is written again.

    Args:
        folder: where the report is to be.
        models: what it is about.
        force: files that have the names of a report's may be replaced.

    Raises:
        UsageError: with what to do instead.
    """
    target = resolve_output(folder)
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"The output {folder} is a file; give the name of a folder for the report.")
    if any(target == m.resolve() or m.resolve() in target.parents for m in models):
        raise UsageError(f"The output {folder} lies inside a model's folder; choose another one.")
    check_writable(folder)
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if holds_journal(folder):
        raise UsageError(f"The output {folder} is a run's folder, with a report of its own; choose another folder.")
    foreign = foreign_files(folder)
    if foreign and not force:
        raise UsageError(f"{foreign[0]} is not of a report of moepress; choose another folder, or pass --force.")
    if not (force or (folder / JSON_NAME).exists()):
        raise UsageError(f"The output {folder} holds other files; choose another folder for the report.")


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
