"""Models as sides of a comparison: opened whatever they are, or seen through a plan; and where a report may go."""

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from moepress.compress.budget.sizes import part_sizes
from moepress.compress.pruning.plan import Plan, estimate_sizes
from moepress.compress.pruning.repaired import Repairs, repaired_source
from moepress.converters.gguf.file import gguf_file
from moepress.converters.mlx.folder import is_mlx, open_mlx, require_mlx
from moepress.converters.onnx.folder import is_onnx, open_onnx
from moepress.converters.onnx.runtime import require_onnxruntime
from moepress.converters.safetensors.artifact import Artifact
from moepress.errors import InvalidInputError, MoepressError, UnsupportedError, UsageError
from moepress.models.families.family import Part, part_of
from moepress.models.forward.inventory import inventory
from moepress.models.storage.checkpoint import Checkpoint, Source
from moepress.models.storage.experts import prune_source
from moepress.runs.output import check_writable, resolve_output
from moepress.runs.rows import holds_journal
from moepress.stages.groundwork import announce, opened_source
from moepress.stages.tokenizer import read_tokenizer
from moepress.validation.quality.measure import Elsewhere, Subject
from moepress.validation.quality.routing import Kept, kept_in
from moepress.validation.report.files import JSON_NAME, foreign_files
from moepress.validation.rules.gguf_files import runnable_gguf


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
