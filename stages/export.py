"""export as functions: what was quantized or pruned, in the form that another runtime reads."""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moepress import __version__
from moepress.calibration.profile import fingerprint
from moepress.compress.budget.sizes import included_linears
from moepress.compress.estimates.export import layout_bytes
from moepress.compress.gptq.include import Include
from moepress.converters.gguf.export import GgufPlan, GgufRequest, plan_gguf, write_gguf
from moepress.converters.gguf.file import PART, open_gguf
from moepress.converters.gguf.tensors import type_of, types_of
from moepress.converters.mlx.export import MlxExported, check_mlx, export_mlx, mlx_bytes
from moepress.converters.onnx.runtime import require_onnx, require_onnxruntime
from moepress.converters.safetensors.artifact import Artifact
from moepress.converters.safetensors.export import Exported, Target, check_target, export
from moepress.converters.safetensors.names import Names, renamed
from moepress.converters.safetensors.scheme import PER_CHANNEL, Scheme
from moepress.errors import InvalidInputError, MoepressError, UnsupportedError, UsageError
from moepress.models.forward.tensor_check import check_tensors
from moepress.models.storage.checkpoint import Checkpoint
from moepress.models.storage.folder import read_json
from moepress.models.storage.inside import watched
from moepress.runs.journal import open_run
from moepress.runs.output import check_output, is_ours
from moepress.runs.rows import holds_journal
from moepress.runs.single import check_single, making, put_single
from moepress.stages.groundwork import announce, opened_artifact, opened_source, require_room
from moepress.stages.places import GGUF, Output, model_folder, names_gguf


def check_onnx(checkpoint: Checkpoint, scheme: Scheme, include: Iterable[Include]) -> None:
    """Refuse what could not be exported to ONNX after it was quantized, as far as the original and the scheme tell.

    Raises:
        UnsupportedError: a package is missing, or a part of the model or the scheme has no kernel.
    """
    require_onnx()  # before the modules below, which import it
    require_onnxruntime()
    import torch

    from moepress.converters.onnx.export import OnnxRequest, plan_onnx
    from moepress.converters.onnx.weights import Weights, block_size

    plan_onnx(checkpoint, OnnxRequest())  # first: what follows asks for experts as the graph has them
    weights = Weights(source=checkpoint, dtype=torch.float32)
    for layer in checkpoint.outline.moe_layers:
        block_size(scheme, *weights.expert_shape(layer))
    for linear in included_linears(checkpoint, include):
        block_size(linear.scheme(scheme, {}), linear.columns)


def check_gguf(checkpoint: Checkpoint, scheme: Scheme) -> None:
    """Refuse what could not be exported to GGUF after it was quantized, as far as the original and the scheme tell.

    Raises:
        UnsupportedError: the package is missing, or llama.cpp does not compute such a model or such groups.
        InvalidInputError: the tokenizer is broken.
    """
    plan_gguf(checkpoint, GgufRequest())
    if scheme.group_size != PER_CHANNEL and scheme.group_size % 32:
        raise UnsupportedError(
            f"Groups of {scheme.group_size} columns can not be exported to GGUF, whose Q4_0 and Q8_0 have 32; use "
            "--group-size 32, 64 or 128."
        )
    type_of(scheme)


def onnx_bits() -> tuple[int, ...]:
    """Widths of codes that ONNX has kernels for.

    Raises:
        UnsupportedError: a package is missing.
    """
    require_onnx()
    from moepress.converters.onnx.weights import ONNX_BITS

    return ONNX_BITS


def export_stage(artifact_name: str, output: Output, target: Target, names: Names = Names.HUB) -> Exported:
    """Lay a quantized folder out in another format.

    Args:
        artifact_name: the folder.
        output: where to.
        target: the layout.
        names: whose names the tensors get.
    """
    folder = model_folder(artifact_name)
    check_output(output.folder, [folder], resume=output.resume, force=output.force)
    inputs = watched(folder)
    artifact = opened_artifact(folder)
    announce(artifact)
    if artifact.layout == target:
        raise UsageError(f"{artifact_name} is in the {target} layout already; copy the folder.")
    check_target(artifact, target)
    settings = {"command": "export", "moepress": __version__, "target": target, "artifact": fingerprint(artifact)}
    if names is not Names.HUB:
        renamed(artifact.family, artifact.shapes)  # refuses what has no such names
        settings["names"] = names.value
    require_room(output, layout_bytes(artifact, target))
    with open_run(output.folder, settings, resume=output.resume, force=output.force, inputs=inputs) as run:
        return export(artifact, target, run, names)


def mlx_stage(artifact_name: str, output: Output) -> MlxExported:
    """Lay a quantized folder out for mlx-lm.

    Raises:
        UnsupportedError: mlx-lm would not load it.
        InvalidInputError: the folder is not sound.
    """
    folder = model_folder(artifact_name)
    check_output(output.folder, [folder], resume=output.resume, force=output.force)
    inputs = watched(folder)
    artifact = opened_artifact(folder)
    announce(artifact)
    check_mlx(artifact)
    require_room(output, mlx_bytes(artifact))
    settings = {"command": "export", "moepress": __version__, "target": "mlx", "artifact": fingerprint(artifact)}
    with open_run(output.folder, settings, resume=output.resume, force=output.force, inputs=inputs) as run:
        return export_mlx(artifact, run)


@dataclass(frozen=True, slots=True, kw_only=True)
class OnnxResult:
    """What an export to ONNX gave.

    Attributes:
        bytes_after: size of the graph and its weights.
        nodes: number of the graph's nodes.
        checked: findings of the self-check; None when there was none.
        notes: what a user should know.
    """

    bytes_after: int
    nodes: int
    checked: Any
    notes: tuple[str, ...]


def onnx_stage(model_name: str, output: Output, request: Any, *, check: bool = True) -> OnnxResult:
    """Export any folder that moepress reads to ONNX, and hold the result against it before it appears.

    Args:
        model_name: an artifact in either layout, a pruned or plain folder, or `demo`.
        output: where to.
        request: a `converters.onnx.export.OnnxRequest`.
        check: run the self-check.

    Raises:
        UnsupportedError: a part of the model has no kernel, or onnx is not installed.
        InvalidInputError: the folder is not sound.
        MoepressError: the disk is too small, or the check failed.
    """
    from moepress.converters.onnx.runtime import require_onnx, require_onnxruntime

    require_onnx()  # before the modules below, which import it
    if check:
        require_onnxruntime()
    from moepress.converters.onnx.export import onnx_bytes, plan_onnx, write_onnx

    folder = model_folder(model_name)
    check_output(output.folder, [folder], resume=output.resume, force=output.force)
    inputs = watched(folder)
    source = opened_source(folder)
    announce(source)
    _refuse_blocks(source)
    decoder = plan_onnx(source, request)
    require_room(output, onnx_bytes(decoder))
    settings = {
        "command": "export",
        "moepress": __version__,
        "target": "onnx",
        "artifact": fingerprint(source),
        "for": request.preset,
        "kernel": request.kernel,
        "accuracy_level": request.accuracy_level,
    }
    with open_run(output.folder, settings, resume=output.resume, force=output.force, inputs=inputs) as run:
        made = write_onnx(source, decoder, request, run)
        found: Any = None
        if check:
            from moepress.validation.quality.onnx_check import check_export

            try:
                found = check_export(source, run.folder)
            except MoepressError:
                run.throw_away()
                raise
        run.finish()
    notes = [*made.notes, *([f"Not checked in full: {found}."] if isinstance(found, str) else [])]
    checked = None if isinstance(found, str) else found
    return OnnxResult(bytes_after=made.bytes_after, nodes=made.nodes, checked=checked, notes=tuple(notes))


def _refuse_blocks(source: Checkpoint | Artifact) -> None:
    """Refuse a whole model in GGUF's blocks: of experts alone in blocks the graph takes what they stand for."""
    if isinstance(source, Checkpoint) and source.family.embeddings in source.packed:
        raise UnsupportedError(
            "The folder's embeddings lie in blocks of GGUF, which no graph of ONNX holds; export it with --to gguf, or "
            "quantize the original with --bits for ONNX."
        )


def onnx_estimate(model_name: str, output: Output, request: Any) -> dict[str, Any]:
    """What an export would write, exactly, from the headers alone."""
    check_output(output.folder, [model_folder(model_name)], resume=output.resume, force=output.force)
    from moepress.converters.onnx.runtime import require_onnx

    require_onnx()
    from moepress.converters.onnx.export import onnx_bytes, plan_onnx
    from moepress.converters.onnx.graph import file_bytes

    source = opened_source(model_folder(model_name))
    _refuse_blocks(source)
    decoder = plan_onnx(source, request)
    return {
        "disk_bytes": onnx_bytes(decoder),
        "nodes": len(decoder.model.graph.node),
        "experts": decoder.experts,
        "files": {name: file_bytes(entries) for name, entries in decoder.files.items()},
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufResult:
    """What an export to GGUF gave.

    Attributes:
        bytes_after: size of its files.
        files: their names and sizes.
        types: bytes by type of tensor.
        notes: what a user should know.
    """

    bytes_after: int
    files: dict[str, int]
    types: dict[str, int]
    notes: tuple[str, ...]


def gguf_stage(model_name: str, output: Output, request: GgufRequest) -> GgufResult:
    """Write any folder that moepress reads as GGUF: to a folder, or where the output is named so to one .gguf file.

    Raises:
        UnsupportedError: llama.cpp does not compute such a model, or `gguf` is not installed.
        InvalidInputError: the folder is not sound.
        UsageError: there is something in the way.
        MoepressError: the disk is too small.
    """
    if names_gguf(output.folder):
        return _gguf_file(model_name, output, request)
    folder = model_folder(model_name)
    check_output(output.folder, [folder], resume=output.resume, force=output.force)
    inputs = watched(folder)
    source, plan, settings = _gguf_plan(folder, request)
    require_room(output, plan.bytes)
    with open_run(output.folder, settings, resume=output.resume, force=output.force, inputs=inputs) as run:
        summary = write_gguf(source, plan, run)
        run.finish()
    return _gguf_result(summary)


def _gguf_plan(folder: Path, request: GgufRequest) -> tuple[Checkpoint | Artifact, GgufPlan, dict[str, Any]]:
    source = opened_source(folder)
    announce(source)
    check_tensors(source.family, source.config, source.outline.shape, source.shapes, folder=folder)
    plan = plan_gguf(source, request)
    settings = {
        "command": "export",
        "moepress": __version__,
        "target": "gguf",
        "artifact": fingerprint(source),
        "exact": request.exact,
        "split_bytes": request.split_bytes,
        "files": [file.name for file in plan.files],
    }
    return source, plan, settings


def _gguf_result(summary: Mapping[str, Any]) -> GgufResult:
    files = summary["files"]
    return GgufResult(
        bytes_after=sum(files.values()), files=files, types=summary["types"], notes=tuple(summary["notes"])
    )


def _gguf_file(model_name: str, output: Output, request: GgufRequest) -> GgufResult:
    file, request = output.folder, replace(request, name=_stem(output.folder))
    check_single(file, written_by_us, force=output.force)
    if request.split_bytes is not None:
        raise UsageError(f"--split-max-size makes several files; give -o a folder, such as {file.with_suffix('')}.")
    if PART.search(file.name):
        raise UsageError(f"{file.name} is the name of one part of several; choose another name.")
    made, inner = making(file), f"{request.name}{GGUF}"
    if output.resume and (made / inner).is_file() and is_ours(made) and not holds_journal(made):
        summary = read_json(made / "moepress.json")  # killed right before the last step
        if summary.get("settings") == _gguf_plan(model_folder(model_name), request)[2]:
            put_single(inner, file, written_by_us, force=output.force)
            return _gguf_result(summary)
    place = Output(folder=made, resume=output.resume, force=output.force)
    result = gguf_stage(model_name, place, request)
    put_single(inner, file, written_by_us, force=output.force)
    return result


def _stem(file: Path) -> str:
    """A file's name without its ending, as text: names may be any bytes."""
    return os.fsencode(file.stem).decode("utf-8", "replace")


def written_by_us(file: Path) -> bool:
    """Whether a file is GGUF that moepress has written, as its metadata says."""
    try:
        return str(open_gguf(file).keys.get("general.quantized_by", "")).startswith("moepress ")
    except (InvalidInputError, OSError):
        return False


def gguf_estimate(model_name: str, output: Output, request: GgufRequest) -> dict[str, Any]:
    """What an export would write, exactly, from the headers alone."""
    place = making(output.folder) if names_gguf(output.folder) else output.folder
    check_output(place, [model_folder(model_name)], resume=output.resume, force=output.force)
    if names_gguf(output.folder):
        request = replace(request, name=_stem(output.folder))
    plan = plan_gguf(opened_source(model_folder(model_name)), request)
    return {
        "disk_bytes": plan.bytes,
        "architecture": plan.architecture,
        "files": {file.name: file.bytes for file in plan.files},
        "types": types_of(plan.tensors),
        "notes": list(plan.notes),
    }
