"""A quantizing run in the making, and its matrices as pieces hold them: packed, plain, and read back."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moepress.calibration.answer_ends import importance
from moepress.compress.gptq.block_solver import BlockCoded
from moepress.compress.gptq.coded import Coded, CodedExpert, FloatCoded, Matrix, QuantizeOptions
from moepress.compress.gptq.experts import experts_at_once
from moepress.compress.gptq.include import Include, Included, LinearGroup, included, part_bits
from moepress.compress.gptq.layer_bits import check_scheme
from moepress.compress.gptq.pieces import Allowance, piece_names, plan_chunks
from moepress.compress.gptq.reference import Reference, open_reference
from moepress.converters.safetensors import compressed_tensors, compressed_tensors_config, floats
from moepress.converters.safetensors.scheme import Scheme
from moepress.models.families.family import Part, part_of
from moepress.models.forward.costs import stored_bytes
from moepress.models.forward.predicting import add_predicting
from moepress.models.forward.streamed import StreamedModel
from moepress.models.forward.walk import Limits, Scratch, Stream, open_stream
from moepress.models.storage.block_types import BLOCK_SUFFIXES
from moepress.models.storage.blocks import pack, unpack
from moepress.models.storage.experts import bias_names
from moepress.models.storage.mtp import prefix_of, twin_of
from moepress.models.storage.safetensors_file import Stored, read_header
from moepress.models.storage.tensors import DTYPE_NAMES, read_tensor, tensor_bytes, tensor_entry
from moepress.models.storage.writer import Entry
from moepress.runs.phases import phase
from moepress.runs.pieces import Piece, Pieces

_FP8_PARTS = {Part.ATTENTION, Part.SHARED, Part.DENSE, Part.MTP}  # besides the experts; an fp32 router stays fp32


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """What of a run of `quantize` follows from the model and the options, whoever works on it and on which windows.

    Attributes:
        model: the streamed model that calibration flows through.
        options: scheme, Hessians, solver, with the bits of every layer and part.
        include: parts besides the routed experts, with their bits where they have their own.
        predicting: MTP layers that are walked too.
        chunks: layer -> which of its experts share a piece.
        piece_names: piece -> its file.
    """

    model: StreamedModel
    options: QuantizeOptions
    include: Included
    predicting: tuple[int, ...]
    chunks: Mapping[int, Sequence[Sequence[int]]]
    piece_names: Mapping[str, str]

    @property
    def layers(self) -> int:
        """How many are walked."""
        return self.model.shape.layers + len(self.predicting)

    @property
    def names(self) -> Mapping[int | None, Sequence[str]]:
        """Tensors on disk by layer."""
        return self.model.source.outline.names_by_layer

    @property
    def twice(self) -> bool:
        """The original's stream is walked beside."""
        return self.options.hessian.asymmetry > 0 and not self.options.hessian.independent


def frame_of(model: StreamedModel, options: QuantizeOptions, include: Iterable[Include], *, mtp: bool) -> Frame:
    """The frame of a run.

    Args:
        model: its MTP layers are put behind its last, where they are to stay.
        options: without what follows from `include`.
        include: parts besides the routed experts, with their bits where they have their own (`include.Included`).
        mtp: MTP layers stay.

    Raises:
        UsageError: a matrix does not fit the scheme.
    """
    include = included(include)
    options = replace(options, part_bits=part_bits(include))
    check_scheme(model.source, options.scheme, include, options.blocks)
    predicting = add_predicting(model) if mtp else ()
    if options.layer_bits:  # they have what most layers have
        options = replace(options, layer_bits={**options.layer_bits, **dict.fromkeys(predicting, options.scheme.bits)})
    counts = dict.fromkeys((*model.moe_layers, *predicting), model.shape.experts)
    chunks = plan_chunks(model.source, model.shape.layers + len(predicting), counts, options)
    return Frame(
        model=model,
        options=options,
        include=include,
        predicting=predicting,
        chunks=chunks,
        piece_names=piece_names(chunks),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """Somebody's part in a run of `quantize`.

    Attributes:
        frame: of the run.
        stream: of all windows, or a shard of them.
        reference: the original's, likewise.
        run: where pieces are.
        at_once: experts that are solved together.
        allowance: pieces that may yet be made.
        moves: experts' outputs are added to the streams; otherwise they are only solved.
    """

    frame: Frame
    stream: Stream
    reference: Reference | None
    run: Pieces
    at_once: int
    allowance: Allowance
    moves: bool = True

    @property
    def options(self) -> QuantizeOptions:
        """Of the frame."""
        return self.frame.options

    @property
    def names(self) -> Mapping[int | None, Sequence[str]]:
        """Tensors on disk by layer."""
        return self.frame.names

    @property
    def independent(self) -> bool:
        """What goes on to the next layer is what the original one gives."""
        return self.options.hessian.independent

    @property
    def originals(self) -> Stream | None:
        """The original model's stream, if it is walked."""
        return None if self.reference is None else self.reference.stream


def open_job(
    frame: Frame,
    windows_NT: Tensor,
    run: Pieces,
    scratch: Scratch,
    limits: Limits,
    *,
    max_pieces: int | None = None,
    embed: bool = True,
) -> Job:
    """A job on these windows, which are embedded unless their hidden states are to come from elsewhere.

    Args:
        frame: of the run.
        windows_NT: int64, all of the calibration text.
        run: where pieces are.
        scratch: for what memory does not hold.
        limits: memory and batch size.
        max_pieces: how many may be made; None for all.
    """
    with phase("embed"):
        ranks = frame.options.hessian.least_tokens > 0
        stream = open_stream(frame.model, windows_NT, scratch, limits, observe=False, logits=ranks, embed=embed)
        stream.importance = importance(windows_NT, frame.options.hessian)
        reference = open_reference(stream, frame.include, embed=embed) if frame.twice else None
    if reference is not None and frame.predicting:
        add_predicting(reference.stream.model)
    return Job(
        frame=frame,
        stream=stream,
        reference=reference,
        run=run,
        at_once=experts_at_once(frame.model, limits.memory_bytes),
        allowance=Allowance(left=max_pieces),
    )


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
        divisor = tensors.get(f"{module}.weight_global_scale")
        if divisor is None:
            return FloatCoded(codes=codes, scales=scales)
        exact = tensors[f"{module}.weight_scale"].float()  # as solved, for a shared run writes it once more
        return FloatCoded(codes=codes, scales=exact, divisor=divisor.float().reshape(()))
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
