"""A quantizing run in the making, and its matrices as pieces hold them: packed, plain, and read back."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moepress.compress.gptq.block_solver import BlockCoded
from moepress.compress.gptq.experts import Coded, CodedExpert, FloatCoded, Matrix, QuantizeOptions
from moepress.compress.gptq.include import Included, LinearGroup
from moepress.compress.gptq.pieces import Allowance
from moepress.compress.gptq.reference import (
    Reference,
)
from moepress.converters.safetensors import compressed_tensors, compressed_tensors_config, floats
from moepress.converters.safetensors.scheme import Scheme
from moepress.models.families.family import Part, part_of
from moepress.models.forward.costs import stored_bytes
from moepress.models.forward.walk import (
    Stream,
)
from moepress.models.storage.block_types import BLOCK_SUFFIXES
from moepress.models.storage.blocks import pack, unpack
from moepress.models.storage.experts import bias_names
from moepress.models.storage.mtp import prefix_of, twin_of
from moepress.models.storage.safetensors_file import Stored, read_header
from moepress.models.storage.tensors import DTYPE_NAMES, read_tensor, tensor_bytes, tensor_entry
from moepress.models.storage.writer import Entry
from moepress.runs.journal import Run
from moepress.runs.phases import phase
from moepress.runs.pieces import Piece

_FP8_PARTS = {Part.ATTENTION, Part.SHARED, Part.DENSE, Part.MTP}  # besides the experts; an fp32 router stays fp32


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """All that stays the same during one run of `quantize`; `predicting` are MTP layers that are walked too."""

    stream: Stream
    reference: Reference | None
    run: Run
    options: QuantizeOptions
    include: Included
    chunks: Mapping[int, Sequence[Sequence[int]]]
    piece_names: Mapping[str, str]
    names: Mapping[int | None, Sequence[str]]
    at_once: int
    allowance: Allowance
    predicting: tuple[int, ...] = ()

    @property
    def originals(self) -> Stream | None:
        """The original model's stream, if it is walked."""
        return None if self.reference is None else self.reference.stream


def expert_tensors(job: Job, layer: int, expert: int, coded: CodedExpert) -> dict[str, Tensor]:
    """A solved expert as the tensors that are written, by their names on disk."""
    names = job.stream.model.family.expert_names(layer, expert)
    tensors: dict[str, Tensor] = {}
    for name, matrix in zip(names, coded.matrices, strict=True):
        tensors |= packed(job, name, matrix)
    biases = bias_names(job.stream.model.family, layer, expert)
    tensors |= {biases[role]: bias for role, bias in coded.biases.items()}
    return tensors


def packed(job: Job, name: str, matrix: Matrix) -> dict[str, Tensor]:
    """A solved matrix as the tensors that are written."""
    module, scheme = name.removesuffix(".weight"), scheme_of(job, name)
    with phase("pack"):
        if isinstance(matrix, BlockCoded):
            return {f"{name}_{matrix.kind.name.lower()}": pack(matrix.kind, matrix.blocks)}
        if isinstance(matrix, FloatCoded):
            return floats.layer_tensors(module, matrix.codes, matrix.scales, matrix.divisor, scheme)
        stored = job.options.stored_dtype
        return compressed_tensors.layer_tensors(module, matrix.codes, matrix.scales, scheme, stored, matrix.zeros)


def scheme_of(job: Job, name: str) -> Scheme:
    """The scheme of a quantized matrix, by its name on disk."""
    model = job.stream.model
    part = part_of(model.family, name, model.shape.layers)  # experts of MTP layers are no part of `--include`
    return job.options.scheme_of(model.family.layer_of(name), part)


def plain(job: Job, name: str) -> Tensor:
    """A tensor that keeps its weights; what was fp8 becomes the dtype that the model is stored in."""
    source, tensor = job.stream.model.source, _read(job, name)
    may_be_fp8 = _part(job, name) in _FP8_PARTS and tensor.ndim == 2
    dequantized = may_be_fp8 and tensor.dtype == torch.float32 and "quantization_config" in source.config
    return tensor.to(job.options.stored_dtype) if dequantized else tensor


def _part(job: Job, name: str) -> Part:
    """The part of a tensor; of an MTP layer's that of the same in the decoder layers, where those have it."""
    source, layers = job.stream.model.source, job.stream.model.shape.layers
    layer = source.family.layer_of(name)
    if layer is not None and layer >= layers:
        own, usual = prefix_of(source.family, layer), prefix_of(source.family, twin_of(source, layer))
        like = usual + name.removeprefix(own)
        name = like if like in source.shapes else name
    return part_of(source.family, name, layers)


def outer_entry(job: Job, name: str) -> Entry:
    """A tensor that is read when it is written: R1's embeddings and lm_head are 1.85 GB each."""
    source = job.stream.model.source
    shape = source.shapes[name]
    first = source.read_row(name, 0) if len(shape) == 2 else None
    if first is None or first.dtype == torch.float8_e4m3fn:
        return tensor_entry(name, plain(job, name))
    size = math.prod(shape) * first.dtype.itemsize
    return Entry(
        name=name,
        dtype=DTYPE_NAMES[first.dtype],
        shape=shape,
        bytes=size,
        data=lambda: iter((tensor_bytes(_read(job, name)),)),
    )


def _read(job: Job, name: str) -> Tensor:
    source = job.stream.model.source
    with phase("read", size=stored_bytes(source, name)):
        return source.read(name)


def read_coded(job: Job, stored: Mapping[str, Stored], name: str) -> Matrix:
    """A matrix of a finished piece, whose header is `stored`."""
    if job.options.blocks is not None:
        suffix, kind = next((end, kind) for end, kind in BLOCK_SUFFIXES.items() if name + end in stored)
        with phase("read", size=stored[name + suffix].bytes):
            return BlockCoded(kind=kind, blocks=unpack(kind, read_tensor(stored[name + suffix])))
    module, scheme = name.removesuffix(".weight"), scheme_of(job, name)
    names = [module + suffix for suffix in compressed_tensors_config.suffixes_of(scheme)]
    with phase("read", size=sum(stored[n].bytes for n in names if n in stored)):
        tensors = {n: read_tensor(stored[n]) for n in names if n in stored}
    if scheme.floats:
        codes, scales = floats.read_layer(module, tensors, scheme)
        return FloatCoded(codes=codes, scales=scales)
    codes, scales = compressed_tensors.read_layer(module, tensors, scheme)
    zeros = compressed_tensors.read_zeros(module, tensors, scheme, len(codes))
    return Coded(codes=codes, scales=scales, zeros=zeros)


def read_linears(job: Job, piece: Piece, groups: Sequence[LinearGroup]) -> dict[str, Matrix]:
    """The Linears of a finished piece, for a resume."""
    stored = read_header(job.run.path(piece))
    return {name: read_coded(job, stored, name) for group in groups for name in group.names}


def read_expert(job: Job, stored: Mapping[str, Stored], layer: int, expert: int) -> CodedExpert:
    """An expert of a finished piece, for a resume."""
    family = job.stream.model.family
    *gate, up, down = (read_coded(job, stored, n) for n in family.expert_names(layer, expert))
    biases = {role: read_tensor(stored[n]) for role, n in bias_names(family, layer, expert).items() if n in stored}
    return CodedExpert(
        gate=gate[0] if gate else None,
        up=up,
        down=down,
        tokens=0,
        error=(0.0, 0.0),
        rounded=False,
        biases=biases,
    )
