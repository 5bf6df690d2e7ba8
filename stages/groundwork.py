"""What every stage begins with: the machine, the text and the output as data; a model's folder, its tokenizer, text as
token windows, its forward pass, room on the disk, and a run that can be gone on with.
"""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from moepress import __version__
from moepress.calibration.corpus import Corpus, build_corpus
from moepress.calibration.sources import embedded_sources, parse_sources
from moepress.compress.estimates.footprint import Workload
from moepress.converters.safetensors.artifact import Artifact
from moepress.errors import InvalidInputError, MoepressError, UnsupportedError
from moepress.hub.snapshot import HubModel, hub_model, origin_of, snapshot
from moepress.models.forward.streamed import StreamedModel
from moepress.models.forward.walk import Limits, choose_device, choose_dtype, choose_limits
from moepress.models.storage.checkpoint import Checkpoint, Source
from moepress.models.storage.misnamed import misnamed
from moepress.runs.journal import Run, open_run, partial_folder, previous_settings
from moepress.runs.phases import phase
from moepress.runs.progress import note
from moepress.stages.tokenizer import read_tokenizer

DEMO = "demo"
DEFAULT_TOKENS, EMBEDDED_TOKENS, DEFAULT_WINDOW = 131_072, 32_768, 2048


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Where and within what a stage runs.

    Attributes:
        device: auto, cpu, cuda or mps.
        dtype: auto, float32, bfloat16 or float16; what the forward pass computes in.
        memory_bytes: what may be used; None for half of what is free.
    """

    device: str = "auto"
    dtype: str = "auto"
    memory_bytes: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """What the model is fed.

    Attributes:
        sources: files, folders or data sets; none at all means the embedded text.
        domains: NAME=PATH.
        tokens: how many in all; None for the default.
        window: tokens per sequence; None for the model's context, at most 2048.
        seed: chooses the windows.
    """

    sources: tuple[str, ...] = ()
    domains: tuple[str, ...] = ()
    tokens: int | None = None
    window: int | None = None
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """Where a stage writes, and what it may do to what is there."""

    folder: Path
    resume: bool = False
    force: bool = False


def model_folder(name: str) -> Path:
    """The folder of a model: a path, `demo` for the embedded one, or an id on the hub, downloaded where it has to be.

    Raises:
        InvalidInputError: there is no such model.
        MoepressError: it is on the hub and cannot be downloaded.
    """
    found = _place(name)
    return found if isinstance(found, Path) else snapshot(found)


def local_folders(*names: str) -> list[Path]:
    """The folders of those models that are no ids on the hub, for checks before anything is downloaded.

    Raises:
        InvalidInputError: there is no such model.
    """
    return [found for found in map(_place, names) if isinstance(found, Path)]


def _place(name: str) -> Path | HubModel:
    folder = Path(name)
    if name == DEMO and not folder.exists():
        import moepress.models.demo as demo

        return Path(demo.__file__).parent
    if folder.is_dir():
        return folder
    if folder.is_file():
        raise _refused_file(folder)
    model = hub_model(name)
    if model is None or folder.exists():
        raise InvalidInputError(
            f"{name} is not a folder; give the folder of a Hugging Face model, its id on the hub (owner/name), or "
            "`demo`."
        )
    return model


def _refused_file(file: Path) -> MoepressError:
    try:
        other = misnamed(file)
    except OSError as error:
        return InvalidInputError(f"Cannot read {file}: {error.strerror or error}.")
    if other is not None:
        return UnsupportedError(other)
    return InvalidInputError(f"{file} is a file, not a folder; give the folder that it lies in.")


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


def _say(folder: Path, notes: Sequence[str]) -> None:
    new = [text for text in notes if (folder, text) not in _ANNOUNCED]
    _ANNOUNCED.update((folder, text) for text in new)
    note(*new)


_ANNOUNCED: set[tuple[Path, str]] = set()


@phase("start")
def load_corpus(folder: Path, calibration: Calibration, *, context: int, vocabulary: int) -> Corpus:
    """Tokenized calibration windows."""
    sources = parse_sources(calibration.sources, calibration.domains)
    tokens = calibration.tokens or (DEFAULT_TOKENS if sources else EMBEDDED_TOKENS)
    found = read_tokenizer(folder)
    _say(folder, found.notes)
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
    output: Output, model: StreamedModel, corpus: Corpus, machine: Machine, settings: Mapping[str, Any]
) -> Iterator[tuple[Run, Limits]]:
    """Open a run that depends on a forward pass: batch sizes are part of the settings, and a resume keeps them."""
    before = previous_settings(partial_folder(output.folder)) if output.resume else {}
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
        **settings,
    }
    with open_run(output.folder, every, resume=output.resume, force=output.force) as run:
        yield run, limits


@phase("start")
def streamed(source: Source, machine: Machine) -> StreamedModel:
    """A source's forward pass on that machine."""
    device = choose_device(machine.device)
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
            f"{parent} has {free / 2**30:.1f} GiB free and the output needs about "
            f"{disk_bytes / 2**30:.1f} GiB; make room or write to another disk."
        )


def workload(machine: Machine, *, tokens: int, window: int, domains: int = 1) -> Workload:
    """That much text on that machine."""
    device = choose_device(machine.device)
    dtype = choose_dtype(machine.dtype, device)
    return Workload(
        tokens=tokens, window=window, domains=domains, device=device, dtype=dtype, memory_bytes=machine.memory_bytes
    )


def display_name(folder: Path, given: str) -> str:
    """A model's name for people: `demo`, its id on the hub, or its folder's name."""
    origin = origin_of(folder)
    if origin is not None:
        return origin.repo
    return DEMO if given == DEMO else folder.resolve().name
