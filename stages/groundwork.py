"""What every stage begins with: the machine, the text and the output as data; a model's folder, its tokenizer, text as
token windows, its forward pass, room on the disk, and a run that can be gone on with.
"""

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moepress import __version__
from moepress.calibration.corpus import Corpus, build_corpus
from moepress.calibration.sources import embedded_sources, parse_sources
from moepress.compress.estimates.footprint import Workload
from moepress.errors import InvalidInputError, MoepressError
from moepress.hub.snapshot import HubModel, hub_model, origin_of, snapshot
from moepress.models.forward.streamed import StreamedModel
from moepress.models.forward.walk import Limits, choose_device, choose_dtype, choose_limits
from moepress.models.storage.checkpoint import Source
from moepress.models.storage.inside import check_files
from moepress.runs.byte_sizes import mib_text
from moepress.runs.files import mount_of
from moepress.runs.inputs import Stamps
from moepress.runs.journal import Run, open_run, partial_folder, previous_settings
from moepress.runs.phases import phase

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
    model = hub_model(name)
    if model is None or folder.exists():
        raise InvalidInputError(
            f"{name} is not a folder; give the folder of a Hugging Face model, its id on the hub (owner/name), or "
            "`demo`."
        )
    return model


def load_tokenizer(folder: Path) -> Any:
    """The model's tokenizer; code from the folder is never run.

    Raises:
        InvalidInputError: there is none, or transformers cannot read it.
    """
    from transformers import AutoTokenizer

    check_files(folder)
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # transformers raises many types here
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__).strip().rstrip(".:")
        raise InvalidInputError(
            f"{folder} has no tokenizer that transformers can read ({reason}); put the tokenizer files of the original "
            "model into it."
        ) from error


@phase("start")
def load_corpus(folder: Path, calibration: Calibration, *, context: int, vocabulary: int) -> Corpus:
    """Tokenized calibration windows."""
    sources = parse_sources(calibration.sources, calibration.domains)
    tokens = calibration.tokens or (DEFAULT_TOKENS if sources else EMBEDDED_TOKENS)
    return build_corpus(
        sources or embedded_sources("calibration"),
        load_tokenizer(folder),
        tokens=tokens,
        window=calibration.window or min(context, DEFAULT_WINDOW),
        seed=calibration.seed,
        vocab_size=vocabulary,
    )


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
    with open_run(output.folder, every, resume=output.resume, force=output.force, inputs=inputs) as run:
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
            f"The disk at {mount_of(parent)} has {mib_text(free)} free and the output {output.folder} needs about "
            f"{mib_text(disk_bytes)}; make room or write to another disk."
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
