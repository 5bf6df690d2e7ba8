"""What every stage begins with: a model's tokenizer, text as token windows, its forward pass, a plan held against it,
room on the disk, and a run that can be gone on with.
"""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from moepress import __version__
from moepress.calibration.corpus import Corpus, build_corpus
from moepress.calibration.profile import fingerprint
from moepress.calibration.sources import embedded_sources, parse_sources
from moepress.compress.budget.gguf_sizes import FileWeights, file_weights
from moepress.compress.estimates.estimate import Estimate
from moepress.compress.estimates.footprint import Workload
from moepress.compress.pruning.plan import Plan, check_plan
from moepress.converters.gguf.export import GgufRequest, plan_gguf
from moepress.converters.safetensors.artifact import Artifact, open_artifact, open_source
from moepress.errors import MoepressError, UsageError
from moepress.models.forward.proof import proven_family
from moepress.models.forward.streamed import StreamedModel
from moepress.models.forward.walk import Limits, choose_device, choose_dtype, choose_limits
from moepress.models.storage.checkpoint import Checkpoint, Source, open_checkpoint
from moepress.runs.byte_sizes import mib_text
from moepress.runs.files import mount_of
from moepress.runs.inputs import Stamps
from moepress.runs.journal import Run, open_run
from moepress.runs.output import partial_folder
from moepress.runs.phases import phase
from moepress.runs.progress import note, waiting
from moepress.runs.rows import first_settings
from moepress.stages.places import DEFAULT_TOKENS, DEFAULT_WINDOW, EMBEDDED_TOKENS, Calibration, Machine, Output
from moepress.stages.tokenizer import read_tokenizer

MOST_TOKENS = 1 << 30


def load_tokenizer(folder: Path) -> Any:
    """The model's tokenizer (`stages.tokenizer`); what is to be said of it is said on stderr.

    Raises:
        InvalidInputError: there is none, or a file of it is broken.
        UnsupportedError: it needs code of the folder, or a package that is not installed.
    """
    found = read_tokenizer(folder)
    _say(folder, found.notes)
    return found.tokenizer


def announce(source: Checkpoint | Artifact) -> None:
    """Say on stderr what was noted when a folder was opened; once, however many stages open it."""
    _say(source.folder, source.notes)


def opened(folder: Path, *, allow_nonfinite: bool = False) -> Checkpoint:
    """`open_checkpoint`, for work: a family that nobody wrote down proves itself first, once (`forward.proof`).

    Raises:
        UnsupportedError: what would be computed is not what transformers computes.
    """
    return _proven(open_checkpoint(folder, allow_nonfinite=allow_nonfinite))


def opened_artifact(folder: Path) -> Artifact:
    """`open_artifact`, likewise."""
    return _proven(open_artifact(folder))


def opened_source(folder: Path) -> Checkpoint | Artifact:
    """`open_source`, likewise."""
    return _proven(open_source(folder))


Opened = TypeVar("Opened", bound=Checkpoint | Artifact)


def _proven(source: Opened) -> Opened:
    if not source.family.derived:
        return source
    with waiting("holding the model's family against transformers"):
        return replace(source, family=proven_family(source.family, source.config))


def tell_of_residual(source: Checkpoint) -> None:
    """Say where the residual stream before the experts is not known, for one criterion is formed of it."""
    if source.family.derived and not source.family.residual:
        text = (
            f"{source.family.name} models have no norm right before their experts whose input would be the residual "
            "stream: easy-ep takes the experts' inputs in its place. Other criteria do not use it."
        )
        _say(source.folder, [text])


def can_leave_out(source: Checkpoint) -> bool:
    """Whether leave-one-out losses can be formed, which need the router's rule; says so where they can not."""
    if source.family.rule is not None:
        return True
    text = (
        f"How the router of {source.family.name} models makes its weights was not found out: leave-one-out losses "
        "(criterion loo, and budgets that weigh by them) are left out; the other criteria are complete."
    )
    _say(source.folder, [text])
    return False


def _say(folder: Path, notes: Sequence[str]) -> None:
    new = [text for text in notes if (folder, text) not in _ANNOUNCED]
    _ANNOUNCED.update((folder, text) for text in new)
    note(*new)


_ANNOUNCED: set[tuple[Path, str]] = set()


def require_context(option: str, tokens: int | None, context: int) -> None:
    """Refuse sequences that are longer than those a model was made for.

    Raises:
        UsageError: with the model's context.
    """
    if tokens is not None and tokens > context:
        raise UsageError(
            f"{option} {tokens} exceeds the model's context of {context} tokens (max_position_embeddings in "
            "config.json); give no more than that."
        )


@phase("start")
def load_corpus(folder: Path, calibration: Calibration, *, context: int, vocabulary: int) -> Corpus:
    """Tokenized calibration windows.

    Raises:
        UsageError: the model has no context for such a window, or there are more tokens than any text has.
        InvalidInputError: the text can not be read.
    """
    require_context("--window", calibration.window, context)
    if calibration.tokens is not None and calibration.tokens > MOST_TOKENS:
        raise UsageError(
            f"--tokens {calibration.tokens} are more than {MOST_TOKENS:,}; some hundred thousand are usual, the "
            f"default is {DEFAULT_TOKENS:,}."
        )
    sources = parse_sources(calibration.sources, calibration.domains)
    tokens = calibration.tokens or (DEFAULT_TOKENS if sources else EMBEDDED_TOKENS)
    found = read_tokenizer(folder)
    _say(folder, found.notes)
    with waiting("reading the text"):
        corpus = build_corpus(
            sources or embedded_sources("calibration"),
            found.tokenizer,
            tokens=tokens,
            window=calibration.window or min(context, DEFAULT_WINDOW),
            seed=calibration.seed,
            vocab_size=vocabulary,
        )
    return replace(corpus, notes=(*corpus.notes, *(text.rstrip(".") for text in found.notes)))


@contextmanager
def model_run(
    output: Output,
    model: StreamedModel,
    corpus: Corpus,
    machine: Machine,
    settings: Mapping[str, Any],
    inputs: Stamps | None = None,
) -> Iterator[tuple[Run, Limits]]:
    """Open a run that depends on a forward pass: batch sizes are part of the settings, and a resume keeps them."""
    before = first_settings(partial_folder(output.folder)) if output.resume else {}
    memory = machine.memory_bytes or before.get("memory_bytes")
    window = int(corpus.windows.shape[1])
    limits = choose_limits(model.shape, window, memory, before.get("batch_windows"), model.device)
    every = {
        "moepress": __version__,
        "torch": torch.__version__,
        "corpus": corpus.digest,
        "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "memory_bytes": limits.memory_bytes,
        "batch_windows": limits.batch_windows,
        "shard_windows": limits.shard_windows,
        **settings,
    }
    with open_run(output.folder, every, resume=output.resume, force=output.force, inputs=inputs) as run:
        yield run, limits


def gguf_weights(checkpoint: Checkpoint) -> FileWeights:
    """What a GGUF file of a model is made of.

    Raises:
        UnsupportedError: llama.cpp does not compute such a model, or the package `gguf` is not installed.
        InvalidInputError: the tokenizer is broken.
    """
    return file_weights(checkpoint, plan_gguf(checkpoint, GgufRequest()))


def checked_plan(checkpoint: Checkpoint, plan: Plan) -> Plan:
    """The plan, held against the model.

    Raises:
        UsageError: it is for another model or not legal.
    """
    check_plan(plan, checkpoint.shape, checkpoint.outline.moe_layers, None)  # first what needs no weight to be read
    check_plan(plan, checkpoint.shape, checkpoint.outline.moe_layers, fingerprint(checkpoint))
    return plan


@phase("start")
def streamed(source: Source, machine: Machine) -> StreamedModel:
    """A source's forward pass on that machine."""
    device = choose_device(machine.device)
    with waiting("building the model"):
        return StreamedModel(source, device=device, dtype=choose_dtype(machine.dtype, device))


def free_disk(output: Output) -> tuple[Path, int]:
    """The nearest folder that is there, and bytes free on its disk."""
    parent = next(p for p in (output.folder, *output.folder.resolve().parents) if p.exists())
    return parent, shutil.disk_usage(parent).free


def require_room(output: Output, disk_bytes: int) -> None:
    """Refuse to start what the disk can not hold.

    Raises:
        MoepressError: with what is free and what is needed.
    """
    parent, free = free_disk(output)
    if free < disk_bytes and not output.resume:
        raise MoepressError(
            f"The disk at {mount_of(parent)} has {mib_text(free)} free and the output {output.folder} needs about "
            f"{mib_text(disk_bytes)}; make room or write to another disk."
        )


def warn_of_memory(estimate: Estimate) -> None:
    """Say beforehand when the memory is too little, whatever the stage does to keep within it."""
    note(*estimate.shortages)


def workload(machine: Machine, *, tokens: int, window: int, domains: int = 1) -> Workload:
    """That much text on that machine."""
    device = choose_device(machine.device)
    dtype = choose_dtype(machine.dtype, device)
    return Workload(
        tokens=tokens, window=window, domains=domains, device=device, dtype=dtype, memory_bytes=machine.memory_bytes
    )
