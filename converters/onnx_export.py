"""export --to onnx: a folder's codes and weights as an ONNX decoder, file by file, so that a killed export goes on."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from moepress import __version__
from moepress.converters.artifact import Artifact
from moepress.converters.onnx_decoder import Decoder, build_decoder
from moepress.converters.onnx_folder import GENAI_CONFIG, MODEL, SUMMARY, count_parameters, genai_config
from moepress.converters.onnx_graph import file_bytes, write_weights
from moepress.converters.onnx_parts import Kernel
from moepress.errors import UnsupportedError
from moepress.journal import Run
from moepress.models.checkpoint import Checkpoint, read_json
from moepress.models.writer import copy_companions, write_json
from moepress.progress import track

Preset = Literal["cpu", "cuda"]
PROTO_BYTES = 2_000_000_000  # what protobuf can hold; the graph itself has no weights in it


@dataclass(frozen=True, slots=True, kw_only=True)
class OnnxRequest:
    """What kind of ONNX model is wanted.

    Attributes:
        preset: `cpu` is an fp32 graph, `cuda` an fp16 one; the codes are the same.
        kernel: `qmoe` runs a layer's experts as one node, `loop` as matrices of their own.
        accuracy_level: 0 keeps activations in fp32 on the CPU, 4 rounds them to int8, which is faster and less exact.
    """

    preset: Preset = "cpu"
    kernel: Kernel = "qmoe"
    accuracy_level: int = 0

    @property
    def dtype(self) -> torch.dtype:
        """Of activations, caches, scales and unquantized weights."""
        return torch.float32 if self.preset == "cpu" else torch.float16


@dataclass(frozen=True, slots=True, kw_only=True)
class OnnxExported:
    """What an export wrote.

    Attributes:
        bytes_after: size of the graph and its weights.
        nodes: number of the graph's nodes.
        notes: what a user should know.
    """

    bytes_after: int
    nodes: int
    notes: list[str] = field(default_factory=list)


def plan_onnx(source: Checkpoint | Artifact, request: OnnxRequest) -> Decoder:
    """Build the graph and refuse what can not be exported, before any weight is read.

    Raises:
        UnsupportedError: a width, group size or model part without a kernel.
        InvalidInputError: the folder is not whole.
    """
    decoder = build_decoder(source, dtype=request.dtype, kernel=request.kernel, accuracy_level=request.accuracy_level)
    if decoder.model.ByteSize() > PROTO_BYTES:
        raise UnsupportedError(
            f"The graph itself has {decoder.model.ByteSize() / 2**30:.1f} GiB, and ONNX files end at 2 GiB; use "
            "--experts qmoe, which is one node per layer."
        )
    return decoder


def onnx_bytes(decoder: Decoder) -> int:
    """Exact size of what will be written, without tokenizer and JSON."""
    return int(decoder.model.ByteSize()) + sum(file_bytes(entries) for entries in decoder.files.values())


def write_onnx(source: Checkpoint | Artifact, decoder: Decoder, request: OnnxRequest, run: Run) -> OnnxExported:
    """Write everything into the run's folder; the run is left open, to be checked before the result appears.

    Raises:
        InvalidInputError: a tensor is damaged.
        UnsupportedError: a value does not fit the graph's dtype.
    """
    with track("export to onnx", len(decoder.files)) as advance:
        for name, entries in decoder.files.items():
            if run.done(name) is None:
                run.write(name, name, functools.partial(_write, entries))
            advance(1)
    if run.done(MODEL) is None:
        data = decoder.model.SerializeToString(deterministic=True)
        run.write(MODEL, MODEL, lambda path: _bytes(path, data))
    notes = _notes(source, request)
    _write_beside(source, decoder, request, run.folder, notes)
    return OnnxExported(bytes_after=onnx_bytes(decoder), nodes=len(decoder.model.graph.node), notes=notes)


def _write(entries: Any, path: Path) -> None:
    write_weights(path, entries)


def _bytes(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def _write_beside(
    source: Checkpoint | Artifact, decoder: Decoder, request: OnnxRequest, folder: Path, notes: list[str]
) -> None:
    copy_companions(source.folder, folder)
    (folder / "quantize_config.json").unlink(missing_ok=True)  # of the GPTQ folder that this one was made of
    config = {k: v for k, v in source.config.items() if k != "quantization_config"}
    write_json(folder / "config.json", config)
    generation = folder / "generation_config.json"
    caches = [(cache.heads, cache.size) for cache in decoder.caches]
    write_json(
        folder / GENAI_CONFIG,
        genai_config(
            config,
            read_json(generation) if generation.is_file() else {},
            caches,
            layers=len(caches),
            cuda=request.preset == "cuda",
        ),
    )
    write_json(folder / SUMMARY, _summary(source, decoder, request, notes))


def _summary(
    source: Checkpoint | Artifact, decoder: Decoder, request: OnnxRequest, notes: list[str]
) -> Mapping[str, Any]:
    scheme = source.scheme if isinstance(source, Artifact) else None
    return {
        "moepress": __version__,
        "stage": "export",
        "target": "onnx",
        "for": request.preset,
        "dtype": str(request.dtype).removeprefix("torch."),
        "kernel": request.kernel,
        "accuracy_level": request.accuracy_level,
        "bits": scheme.bits if scheme else None,
        "group_size": scheme.group_size if scheme else None,
        "experts": {str(layer): count for layer, count in decoder.experts.items()},
        "parameters": count_parameters(source.shapes),
        "notes": notes,
    }


def _notes(source: Checkpoint | Artifact, request: OnnxRequest) -> list[str]:
    notes = []
    schemes = source.schemes if isinstance(source, Artifact) else ()
    rounded = sorted({scheme.bits for _targets, scheme in schemes} & {2, 8})
    if request.kernel == "qmoe" and rounded:
        notes.append(
            f"ONNX Runtime's CPU kernel for {' and '.join(map(str, rounded))}-bit experts rounds activations to int8, "
            "whatever the accuracy level; --experts loop is exact."
        )
    if request.preset == "cuda":
        notes.append("The CUDA provider was not measured yet; the self-check ran the same graph on the CPU.")
    return notes
