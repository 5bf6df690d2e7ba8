"""export to GGUF: one file, or several of a size, written tensor by tensor into its place, layer by layer journalled.

The head (metadata and the list of tensors) is written by the `gguf` package; the data by us, expert by expert, since
the package wants whole tensors and a layer's experts are one. A file is laid out at its full size first, so that a disk
that is too small says so at the start; every layer's bytes are synced before the journal tells of them, and read
again when a run is resumed.
"""

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moepress import __version__
from moepress.converters.gguf.architectures import Architecture, architecture_of, described, metadata
from moepress.converters.gguf.placed import Folder
from moepress.converters.gguf.runtime import require_gguf
from moepress.converters.gguf.tensors import GgufTensor, Writer, types_of
from moepress.converters.gguf.tokenizer import Vocabulary, read_vocabulary
from moepress.errors import InvalidInputError, UsageError
from moepress.models.families.family import Part
from moepress.models.families.hf_config import hf_config
from moepress.models.storage.block_types import PLAIN, TYPES
from moepress.models.storage.writer import copy_companions, write_json
from moepress.runs.files import create
from moepress.runs.journal import Run
from moepress.runs.progress import track

_ALIGNMENT = 32
_LATENT_EPS = 1e-6
"""Of the norms of latent queries and keys in transformers (deepseek_v2, deepseek_v3, glm4_moe_lite), whatever a config
says."""
_BLOCK = 8 << 20
_FILE_TYPES = {
    "F32": 0,
    "F16": 1,
    "BF16": 32,
    "Q4_0": 2,
    "Q4_1": 3,
    "Q8_0": 7,
    "Q5_0": 8,
    "Q5_1": 9,
    "Q2_K": 10,
    "Q3_K": 12,
    "Q4_K": 15,
    "Q5_K": 17,
    "Q6_K": 18,
    "IQ4_NL": 25,
    "IQ4_XS": 30,
    "MXFP4": 38,
}
"""general.file_type, which is for people: llama.cpp reads each tensor's own type."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufRequest:
    """What is asked for.

    Attributes:
        exact: everything as F32.
        split_bytes: most that a file holds; None: one file.
        name: how the files' names begin; empty: the folder's name.
    """

    exact: bool = False
    split_bytes: int | None = None
    name: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufFile:
    """One file to be written: its head, and its tensors with where each begins."""

    name: str
    head: bytes
    tensors: tuple[GgufTensor, ...]
    offsets: tuple[int, ...]
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufPlan:
    """What an export will write, byte for byte known.

    Attributes:
        architecture: llama.cpp's name.
        files: in order.
        type: what most bytes of the experts are in.
        notes: what a user should know.
    """

    architecture: str
    files: tuple[GgufFile, ...]
    type: str
    notes: tuple[str, ...]

    @property
    def bytes(self) -> int:
        """Of all files."""
        return sum(file.bytes for file in self.files)

    @property
    def tensors(self) -> tuple[GgufTensor, ...]:
        """Of all files."""
        return tuple(tensor for file in self.files for tensor in file.tensors)


def plan_gguf(source: Folder, request: GgufRequest) -> GgufPlan:
    """All of a file but its data.

    Raises:
        UnsupportedError: llama.cpp does not compute such a model, or `gguf` is not installed.
        InvalidInputError: the tokenizer is broken.
    """
    require_gguf()
    model = described(source)
    row = architecture_of(model)
    keys = metadata(model, row)
    tensors = Writer(source=source, row=row, exact=request.exact).tensors()
    vocabulary = read_vocabulary(source.folder, source.shapes[source.family.embeddings][0])
    kind = _main_type(tensors)
    name = request.name or f"{source.folder.resolve().name}-{kind}"
    groups = _split(tensors, request.split_bytes)
    general = _general(source, name, kind)
    files, count = [], len(groups)
    for number, group in enumerate(groups):
        file = f"{name}.gguf" if count == 1 else f"{name}-{number + 1:05d}-of-{count:05d}.gguf"
        of_split: dict[str, Any] = (
            {"split.no": number, "split.count": count, "split.tensors.count": len(tensors)} if count > 1 else {}
        )
        every = {**general, **keys, **_of_vocabulary(vocabulary)} if number == 0 else {}
        files.append(_laid_out(file, row, {**every, **of_split}, group))
    notes = [*vocabulary.notes, *_notes(source, tensors)]
    eps = hf_config(source.config).get_text_config().rms_norm_eps if row.latent else _LATENT_EPS
    if eps != _LATENT_EPS:
        notes.append(
            f"The norms inside of its attention add {_LATENT_EPS:g} in transformers, and in llama.cpp {eps:g} like all "
            "others: a difference in the last digits, in any GGUF of this model."
        )
    if (source.config.get("rope_parameters") or source.config.get("rope_scaling") or {}).get("truncate") is False:
        notes.append(
            "Its yarn embedding has truncate=false, and llama.cpp rounds the bounds all the same: angles differ a "
            "little, in any GGUF of this model."
        )
    return GgufPlan(architecture=row.name, files=tuple(files), type=kind, notes=tuple(notes))


def _main_type(tensors: Sequence[GgufTensor]) -> str:
    routed = [tensor for tensor in tensors if tensor.part is Part.ROUTED and tensor.type not in ("F32",)]
    return next(iter(types_of(routed or tensors)))


def _split(tensors: Sequence[GgufTensor], most: int | None) -> list[list[GgufTensor]]:
    """Tensors by file, in order."""
    if most is None:
        return [list(tensors)]
    largest = max(tensors, key=lambda tensor: tensor.bytes)
    if largest.bytes > most:
        raise UsageError(
            f"--split-max-size {most} is less than the tensor {largest.name} has ({largest.bytes} bytes), and "
            "llama.cpp keeps the experts of a layer in one; give a larger size."
        )
    files: list[list[GgufTensor]] = [[]]
    size = 0
    for tensor in tensors:
        if files[-1] and size + tensor.bytes > most:
            files.append([])
            size = 0
        files[-1].append(tensor)
        size += tensor.bytes
    return files


def _general(source: Folder, name: str, kind: str) -> dict[str, Any]:
    return {
        "general.type": "model",
        "general.name": os.fsencode(name).decode("utf-8", "replace"),
        "general.file_type": _FILE_TYPES.get(kind, 0),
        "general.quantization_version": 2,
        "general.quantized_by": f"moepress {__version__}",
    }


def _of_vocabulary(vocabulary: Vocabulary) -> dict[str, Any]:
    keys: dict[str, Any] = {
        "tokenizer.ggml.model": vocabulary.model,
        "tokenizer.ggml.pre": vocabulary.pre,
        "tokenizer.ggml.tokens": list(vocabulary.tokens),
        "tokenizer.ggml.token_type": list(vocabulary.types),
    }
    if vocabulary.merges:
        keys["tokenizer.ggml.merges"] = list(vocabulary.merges)
    if vocabulary.scores:
        keys["tokenizer.ggml.scores"] = list(vocabulary.scores)
    return keys | {f"tokenizer.{key}": value for key, value in vocabulary.keys.items()}


def _laid_out(name: str, row: Architecture, keys: Mapping[str, Any], tensors: Sequence[GgufTensor]) -> GgufFile:
    head = head_bytes(row.name, keys, tensors)
    offsets, at = [], len(head)
    for tensor in tensors:
        offsets.append(at)
        at += -(-tensor.bytes // _ALIGNMENT) * _ALIGNMENT
    return GgufFile(name=name, head=head, tensors=tuple(tensors), offsets=tuple(offsets), bytes=at)


def head_bytes(architecture: str, keys: Mapping[str, Any], tensors: Sequence[GgufTensor]) -> bytes:
    """Metadata and list of tensors, padded to where data begin; as the `gguf` package writes them."""
    import tempfile

    import numpy as np
    from gguf import GGMLQuantizationType, GGUFValueType, GGUFWriter

    split_types = {
        "split.no": GGUFValueType.UINT16,
        "split.count": GGUFValueType.UINT16,
        "split.tensors.count": GGUFValueType.INT32,
    }
    with tempfile.TemporaryDirectory(prefix="moepress-gguf-") as folder:
        path = Path(folder) / "head"
        writer = GGUFWriter(path, architecture)
        for key, value in keys.items():
            if isinstance(value, list):
                kind = GGUFValueType.ARRAY
            elif isinstance(value, bool):
                kind = GGUFValueType.BOOL
            elif isinstance(value, int):
                kind = split_types.get(key, GGUFValueType.UINT32)
            else:
                kind = GGUFValueType.FLOAT32 if isinstance(value, float) else GGUFValueType.STRING
            writer.add_key_value(key, value, kind, _sub_type(value))
        for tensor in tensors:
            width = {"F32": 4, "F16": 2, "BF16": 2}
            row_bytes = (
                tensor.shape[-1] * width[tensor.type]
                if tensor.type in PLAIN
                else TYPES[tensor.type].row_bytes(tensor.shape[-1])
            )
            shape = (*tensor.shape[:-1], row_bytes)
            number = PLAIN[tensor.type] if tensor.type in PLAIN else TYPES[tensor.type].number
            kind_of = GGMLQuantizationType(number)
            writer.add_tensor_info(tensor.name, shape, np.dtype(np.uint8), tensor.bytes, raw_dtype=kind_of)
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        head = path.read_bytes()
    return head + bytes(-len(head) % _ALIGNMENT)


def _sub_type(value: Any) -> Any:
    from gguf import GGUFValueType

    if not isinstance(value, list) or not value:
        return None
    return {str: GGUFValueType.STRING, float: GGUFValueType.FLOAT32}.get(type(value[0]), GGUFValueType.INT32)


def _notes(source: Folder, tensors: Sequence[GgufTensor]) -> Iterator[str]:
    layers = source.outline.shape.layers
    dropped = sum((source.family.layer_of(name) or 0) >= layers for name in source.shapes)
    if dropped:
        yield f"The multi-token-prediction layer was left out ({dropped} tensors)."
    wide = next((tensor.type for tensor in tensors if tensor.type in ("Q4_0", "Q4_1")), None)
    schemes = getattr(source, "schemes", ())
    narrow = sorted({scheme.bits for _targets, scheme in schemes if scheme is not None and scheme.bits < 4})
    if wide and narrow:
        size = TYPES[wide].bits_per_weight
        yield (
            f"Codes of {' and '.join(map(str, narrow))} bits lie in {wide} of {size} bits, which is exact and saves "
            "nothing; `moepress quantize --grid q3_k` (or q2_k) solves on GGUF's own grids of those sizes."
        )
    coarse = {
        scheme.group_size for _targets, scheme in schemes if scheme is not None and scheme.group_size not in (32, None)
    }
    if wide and coarse:
        yield f"Scales are repeated for every 32 columns, as {wide} and Q8_0 have them; --group-size 32 uses that room."


def write_gguf(source: Folder, plan: GgufPlan, run: Run) -> dict[str, Any]:
    """Write the files into the run's folder, layer by layer; the run is left open.

    Returns:
        What `moepress.json` says.

    Raises:
        InvalidInputError: a tensor is damaged, or what was written before is no longer what it was.
        UnsupportedError: a scale does not fit.
    """
    pieces = [(file, numbers) for file in plan.files for numbers in _by_layer(file)]
    worst = 0.0
    with track("export to gguf", len(pieces), unit="layers") as advance:
        for file in plan.files:
            _begin(file, run)
            with (run.folder / file.name).open("r+b") as stream:
                for numbers in _by_layer(file):
                    worst = max(worst, _piece(file, numbers, stream, run))
                    advance(1)
    copy_companions(source.folder, run.folder)
    notes = list(plan.notes)
    if worst:
        what = "scales or minima" if any(tensor.type == "Q4_1" for tensor in plan.tensors) else "scales"
        notes.append(f"Some {what} are not exact in fp16; the largest changes by {worst:.2g} of its value.")
    summary = {
        "moepress": __version__,
        "stage": "export",
        "target": "gguf",
        "architecture": plan.architecture,
        "type": plan.type,
        "files": {file.name: file.bytes for file in plan.files},
        "types": types_of(plan.tensors),
        "notes": notes,
        "settings": dict(run.settings),
    }
    write_json(run.folder / "moepress.json", summary)
    return summary


def _by_layer(file: GgufFile) -> list[tuple[int, ...]]:
    """Numbers of a file's tensors, those of a layer together."""
    groups: dict[int | None, list[int]] = {}
    for number, tensor in enumerate(file.tensors):
        groups.setdefault(tensor.layer, []).append(number)
    return [tuple(numbers) for numbers in groups.values()]


def _begin(file: GgufFile, run: Run) -> None:
    """A file of its full size with its head, unless it is there already."""
    path, id_ = run.folder / file.name, f"{file.name}: head"
    digest = hashlib.sha256(file.head).hexdigest()
    done = run.done(id_)
    if done is not None:
        with path.open("rb") as stream:
            if hashlib.sha256(stream.read(len(file.head))).hexdigest() != done.note["sha256"]:
                raise _changed(path)
        return
    path.unlink(missing_ok=True)
    descriptor = create(path)
    try:
        os.write(descriptor, file.head)
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(descriptor, 0, file.bytes)
        else:
            os.ftruncate(descriptor, file.bytes)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    run.mark(id_, {"sha256": digest})


def _piece(file: GgufFile, numbers: tuple[int, ...], stream: Any, run: Run) -> float:
    """Write a layer's tensors, or hold them against what the journal says; returns the largest change of a scale."""
    id_ = f"{file.name}: {file.tensors[numbers[0]].name}"
    done = run.done(id_)
    if done is not None:
        if _digest(stream, file, numbers) != done.note["sha256"]:
            raise _changed(run.folder / file.name)
        return float(done.note["scale_error"])
    digest, worst = hashlib.sha256(), 0.0
    for number in numbers:
        tensor = file.tensors[number]
        stream.seek(file.offsets[number])
        for chunk in tensor.data():
            stream.write(chunk)
            digest.update(chunk)
        written = stream.tell() - file.offsets[number]
        assert written == tensor.bytes, f"{tensor.name}: {written} bytes where {tensor.bytes} were counted"
        worst = max(worst, *tensor.scale_error, 0.0)
    stream.flush()
    os.fsync(stream.fileno())
    run.mark(id_, {"sha256": digest.hexdigest(), "scale_error": worst})
    return worst


def _digest(stream: Any, file: GgufFile, numbers: tuple[int, ...]) -> str:
    digest = hashlib.sha256()
    for number in numbers:
        stream.seek(file.offsets[number])
        left = file.tensors[number].bytes
        while left:
            chunk = stream.read(min(left, _BLOCK))
            if not chunk:
                break
            digest.update(chunk)
            left -= len(chunk)
    return digest.hexdigest()


def _changed(path: Path) -> InvalidInputError:
    return InvalidInputError(f"{path} was changed since it was written; pass --force to start anew.")
