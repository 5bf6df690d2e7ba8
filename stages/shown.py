"""What a report shows of models and machine beside what is measured: facts, text that they write, what `check` says."""

import dataclasses
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from moepress import __version__
from moepress.calibration.corpus import EvaluationCorpus
from moepress.converters.gguf.file import GgufModel
from moepress.converters.gguf.runtime import llama_version
from moepress.converters.mlx.folder import MlxFolder
from moepress.converters.onnx.folder import OnnxFolder
from moepress.converters.onnx.runtime import installed_version, require_onnxruntime
from moepress.errors import MoepressError
from moepress.hub.snapshot import origin_of
from moepress.runs.text import one_line
from moepress.validation.quality.measure import Elsewhere, Subject
from moepress.validation.quality.reference_file import SavedReference
from moepress.validation.quality.results import Samples
from moepress.validation.quality.samples import write_samples
from moepress.validation.report.schema import Environment, RuntimeCheck, SubjectInfo
from moepress.validation.rules.check import check_folder
from moepress.validation.rules.outcomes import outcomes
from moepress.validation.speed.throughput import device_name


def samples_section(
    subjects: Sequence[Subject],
    corpus: EvaluationCorpus,
    tokenizer: Any,
    *,
    device: torch.device,
    dtype: torch.dtype,
    onnx_device: str,
) -> tuple[Samples | None, tuple[str, ...]]:
    """What the first model and the one that the user takes home write; or None, and a note that says why not."""
    if isinstance(subjects[0].source, SavedReference):
        return None, ("There is no sample text: the first model is known by its predictions alone.",)
    others = [s for s in subjects[1:] if not isinstance(s.source, Elsewhere)] or list(subjects[1:])
    shown = [subjects[0], *others[-1:]]
    try:
        return write_samples(shown, corpus, tokenizer, device=device, dtype=dtype, onnx_device=onnx_device), ()
    except (MoepressError, torch.OutOfMemoryError) as error:
        return None, (f"There is no sample text: {one_line(error)}.",)


def checks_section(folders: Sequence[tuple[str, Path]]) -> tuple[tuple[RuntimeCheck, ...], tuple[str, ...]]:
    """What `check` says of folders by their label, for the runtimes that each layout is made for; and notes."""
    rows: list[RuntimeCheck] = []
    notes = []
    for label, folder in folders:
        try:
            found = outcomes(check_folder(folder))
        except MoepressError as error:
            notes.append(f"{label} was not held against the rules of the runtimes: {one_line(error)}.")
        else:
            rows += [RuntimeCheck(subject=label, **dataclasses.asdict(row)) for row in found]
    return tuple(rows), tuple(notes)


def subject_info(subject: Subject) -> SubjectInfo:
    """What the report says of a model beside its measurements."""
    source = subject.source
    return SubjectInfo(
        label=subject.label,
        folder=_name_of(subject),
        stored_bytes=subject.stored_bytes,
        parameters=subject.parameters,
        experts_per_layer=_experts_of(subject),
        bits=8 * subject.stored_bytes / subject.parameters if subject.parameters else None,
        onnx=isinstance(source, OnnxFolder),
        gguf=isinstance(source, GgufModel),
        parts=dict(subject.parts),
    )


def _name_of(subject: Subject) -> str | None:
    if isinstance(subject.source, SavedReference):
        return subject.source.about.model
    return str(origin_of(subject.folder) or subject.folder.name) if subject.folder else None


def _experts_of(subject: Subject) -> int | tuple[int, int] | None:
    source = subject.source
    if isinstance(source, SavedReference):
        return source.about.experts_per_layer
    if isinstance(source, OnnxFolder):
        return _onnx_experts(source)
    return source.experts if isinstance(source, GgufModel | MlxFolder) else source.outline.shape.experts


def _onnx_experts(folder: OnnxFolder) -> int | tuple[int, int] | None:
    counts = folder.summary.get("experts")
    if not isinstance(counts, dict) or not counts:
        return None
    fewest, most = min(map(int, counts.values())), max(map(int, counts.values()))
    return fewest if fewest == most else (fewest, most)


def environment(device: torch.device, *, onnx: bool, llama: bool = False) -> Environment:
    """Versions and machine; ONNX Runtime's and llama.cpp's too, where they ran."""
    import transformers

    versions = {"moepress": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
    if onnx:
        versions["onnxruntime"] = require_onnxruntime().__version__
        genai = next(filter(None, map(installed_version, ("onnxruntime-genai", "onnxruntime-genai-cuda"))), None)
        versions |= {"onnxruntime-genai": genai} if genai else {}
    if llama:
        versions["llama.cpp"] = llama_version() or "?"
    return Environment(
        versions=versions | {"python": platform.python_version()},
        device=device_name(device),
        cpus=os.cpu_count(),
        platform=platform.platform(),
    )
