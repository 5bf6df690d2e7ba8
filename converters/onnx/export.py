"""export --to onnx: a folder's codes and weights as an ONNX decoder, file by file, so that a killed export goes on."""

import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from moepress import __version__
from moepress.converters.onnx.attention import context_of
from moepress.converters.onnx.decoder import Decoder, build_decoder
from moepress.converters.onnx.folder import (
    GENAI_CONFIG,
    MODEL,
    SUMMARY,
    count_parameters,
    genai_config,
    generation_config,
)
from moepress.converters.onnx.graph import file_bytes, write_weights
from moepress.converters.onnx.parts import Kernel, is_faster_plain
from moepress.converters.onnx.weights import Weights
from moepress.converters.safetensors.artifact import Artifact, refuse_floats
from moepress.errors import UnsupportedError
from moepress.models.families.family import Family
from moepress.models.storage.checkpoint import Checkpoint
from moepress.models.storage.writer import copy_companions, write_json
from moepress.runs.files import rewrite
from moepress.runs.journal import Run
from moepress.runs.progress import track

Preset = Literal["cpu", "cuda"]
_EXPERT = re.compile(r"/model/layers\.(\d+)/mlp/(?:QMoE$|experts\.)")
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
    """Build the graph and genai_config.json, and refuse what can not be exported, before any weight is read.

    Raises:
        UnsupportedError: a width, group size or model part without a kernel.
        InvalidInputError: the folder is not whole, or config.json or generation_config.json holds what can not be.
    """
    if isinstance(source, Artifact):
        refuse_floats(source.floats, "onnx", source.folder)
    decoder = build_decoder(source, dtype=request.dtype, kernel=request.kernel, accuracy_level=request.accuracy_level)
    if decoder.model.ByteSize() > PROTO_BYTES:
        raise UnsupportedError(
            f"The graph itself has {decoder.model.ByteSize() / 2**30:.1f} GiB, and ONNX files end at 2 GiB; use "
            "--experts qmoe, which is one node per layer."
        )
    genai = genai_config(
        _stated(source),
        generation_config(source.folder),
        [(cache.heads, cache.size) for cache in decoder.caches],
        context=context_of(decoder.config),
        heads=int(decoder.config.num_attention_heads),
        cuda=request.preset == "cuda",
        folder=source.folder,
    )
    return dataclasses.replace(decoder, genai=genai)


def _stated(source: Checkpoint | Artifact) -> dict[str, Any]:
    """config.json with the sizes that its readers want, where transformers has them as defaults."""
    shape = source.outline.shape
    return {"hidden_size": shape.hidden, "vocab_size": shape.vocabulary, **source.config}


def onnx_bytes(decoder: Decoder) -> int:
    """Exact size of what will be written, without tokenizer and JSON."""
    return int(decoder.model.ByteSize()) + sum(file_bytes(entries) for entries in decoder.files.values())


def write_onnx(source: Checkpoint | Artifact, decoder: Decoder, request: OnnxRequest, run: Run) -> OnnxExported:
    """Write everything into the run's folder; the run is left open, to be checked before the result appears.

    Raises:
        InvalidInputError: a tensor is damaged.
        UnsupportedError: a value does not fit the graph's dtype.
    """
    with track("export to onnx", len(decoder.files), unit="files") as advance:
        for name, entries in decoder.files.items():
            if run.done(name) is None:
                run.write(name, name, functools.partial(_write, entries))
            advance(1)
    if run.done(MODEL) is None:
        data = decoder.model.SerializeToString(deterministic=True)
        run.write(MODEL, MODEL, lambda path: _bytes(path, data))
    notes = _notes(source, decoder, request)
    _write_beside(source, decoder, request, run.folder, notes)
    return OnnxExported(bytes_after=onnx_bytes(decoder), nodes=len(decoder.model.graph.node), notes=notes)


def _write(entries: Any, path: Path) -> None:
    write_weights(path, entries)


def _bytes(path: Path, data: bytes) -> None:
    with rewrite(path) as stream:
        stream.write(data)


def _write_beside(
    source: Checkpoint | Artifact, decoder: Decoder, request: OnnxRequest, folder: Path, notes: list[str]
) -> None:
    copy_companions(source.folder, folder)
    (folder / "quantize_config.json").unlink(missing_ok=True)  # of the GPTQ folder that this one was made of
    config = {k: v for k, v in _stated(source).items() if k != "quantization_config"}
    config["max_position_embeddings"] = context_of(decoder.config)  # what the graph has, where it was not stated
    if config.get("num_nextn_predict_layers"):
        config["num_nextn_predict_layers"] = 0
    write_json(folder / "config.json", config)
    write_json(folder / GENAI_CONFIG, decoder.genai)
    write_json(folder / SUMMARY, _summary(source, decoder, request, notes))


def _summary(
    source: Checkpoint | Artifact, decoder: Decoder, request: OnnxRequest, notes: list[str]
) -> Mapping[str, Any]:
    codes = _codes(decoder)
    widths = {node.bits for node in codes}
    sizes = {scheme.group_size for _targets, scheme in source.schemes} if isinstance(source, Artifact) else set()
    return {
        "moepress": __version__,
        "stage": "export",
        "target": "onnx",
        "for": request.preset,
        "dtype": str(request.dtype).removeprefix("torch."),
        "kernel": request.kernel,
        "accuracy_level": max((node.accuracy_level for node in codes), default=0),
        "context": context_of(decoder.config),
        "bits": widths.pop() if len(widths) == 1 else None,
        "group_size": sizes.pop() if codes and len(sizes) == 1 else None,
        "experts": {str(layer): count for layer, count in decoder.experts.items()},
        "experts_bits": _experts_bits(codes),
        "parameters": count_parameters(
            {n: s for n, s in source.shapes.items() if not _is_behind(source.family, n, decoder)}
        ),
        "notes": notes,
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class _Codes:
    """A node that runs on codes; `layer` where it is one of routed experts, `fused` where it is QMoE."""

    layer: int | None
    fused: bool
    bits: int
    block_size: int
    accuracy_level: int


def _codes(decoder: Decoder) -> list[_Codes]:
    """What the graph's nodes say of themselves: config.json may have schemes that nothing uses."""
    found = []
    for node in decoder.model.graph.node:
        if node.op_type not in ("QMoE", "MatMulNBits"):
            continue
        facts = {attribute.name: attribute.i for attribute in node.attribute}
        expert = _EXPERT.match(node.name)
        found.append(
            _Codes(
                layer=int(expert[1]) if expert else None,
                fused=node.op_type == "QMoE",
                bits=facts["expert_weight_bits" if node.op_type == "QMoE" else "bits"],
                block_size=facts["block_size"],
                accuracy_level=facts["accuracy_level"],
            )
        )
    return found


def _experts_bits(codes: Sequence[_Codes]) -> dict[str, int | list[int]]:
    """Layer -> width of its routed experts' codes, a list where there are several; layers without codes are not in."""
    widths: dict[int, set[int]] = {}
    for node in codes:
        if node.layer is not None:
            widths.setdefault(node.layer, set()).add(node.bits)
    return {str(layer): sorted(bits) if len(bits) > 1 else min(bits) for layer, bits in widths.items()}


def _is_behind(family: Family, name: str, decoder: Decoder) -> bool:
    """Whether a tensor belongs to a layer behind the last one, which is for multi-token prediction and not exported."""
    layer = family.layer_of(name)
    return layer is not None and layer >= len(decoder.caches)


def _notes(source: Checkpoint | Artifact, decoder: Decoder, request: OnnxRequest) -> list[str]:
    notes, codes = [], _codes(decoder)
    # 8 bits always, 2 bits from blocks of 32 on.
    rounded = {
        node.bits for node in codes if node.fused and (node.bits == 8 or (node.bits == 2 and node.block_size >= 32))
    }
    if rounded:
        notes.append(
            f"ONNX Runtime's CPU kernel for {' and '.join(map(str, sorted(rounded)))}-bit experts rounds activations "
            "to int8, whatever the accuracy level; --experts loop is exact."
        )
    weights = Weights(source=source, dtype=request.dtype)
    plain = sum(is_faster_plain(weights, name, request.accuracy_level) for name in source.shapes)
    if plain:
        notes.append(
            f"{plain} matrices of 8 bits beside the experts lie in fp32, with the same numbers: ONNX Runtime is twice "
            "as fast with them so. --accuracy-level 4 keeps their codes."
        )
    if request.accuracy_level and not codes:
        notes.append(f"--accuracy-level {request.accuracy_level} had no effect: the graph has no codes.")
    dropped = sum(_is_behind(source.family, name, decoder) for name in source.shapes)
    if dropped:
        notes.append(f"The multi-token-prediction layer was dropped ({dropped} tensors).")
    if request.preset == "cuda":
        notes.append("The CUDA provider was not measured yet; the self-check ran the same graph on the CPU.")
    return notes
