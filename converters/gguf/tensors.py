"""The tensors of a GGUF file: which matrices they are made of, their types, and their bytes when their turn comes.

Codes are copied: int4 codes (and 3 and 2 bits, in a container of 4) become Q4_0 or with zero points Q4_1, int8 codes
Q8_0, and what lies in GGUF's own blocks stays as it is. What is not quantized keeps its dtype; norms, routers, biases
and one-dimensional tensors become F32, as llama.cpp wants them.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moepress.converters.gguf.architectures import Architecture
from moepress.converters.gguf.placed import Folder, Matrices, exactly, placed_tensors, run_of
from moepress.converters.safetensors.artifact import Artifact, refuse_floats
from moepress.converters.safetensors.floats import power_bytes
from moepress.converters.safetensors.packing import to_unsigned
from moepress.converters.safetensors.scheme import Scheme
from moepress.errors import UnsupportedError
from moepress.models.families.family import Part
from moepress.models.storage.block_types import PLAIN, TYPES, BlockType
from moepress.models.storage.blocks import Blocks, pack
from moepress.models.storage.checkpoint import Checkpoint
from moepress.models.storage.tensors import read_rows, read_tensor, require_finite, tensor_bytes
from moepress.models.storage.writer import Chunk

_CHUNK_BYTES = 32 << 20
_OF_DTYPE = {"F32": "F32", "F16": "F16", "BF16": "BF16"}
_TORCH = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_KEPT_SMALL = 4
"""Matrices with fewer rows, such as a shared expert's gate, are written as F32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufTensor:
    """One tensor of the file to be.

    Attributes:
        name: as llama.cpp calls it.
        shape: outermost axis first, as in torch; the file has them the other way round.
        type: a block type's name, F32, F16 or BF16.
        bytes: in all.
        layer: whose it is, or None.
        part: of the model.
        data: its bytes in order, read when they are asked for.
        source: on disk, what it is made of, or the first of its experts; empty where it is a part of another tensor.
        run: columns that stay together where their order changes; 0 where it does not.
        scale_error: of codes that were copied, the largest relative change of a scale in fp16, once written.
    """

    name: str
    shape: tuple[int, ...]
    type: str
    bytes: int
    layer: int | None
    part: Part
    data: Callable[[], Iterator[Chunk]]
    source: str = ""
    run: int = 0
    scale_error: list[float] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class Writer:
    """Turns a folder's weights into a file's tensors.

    Attributes:
        source: a folder: plain, pruned or quantized.
        row: of its family.
        exact: everything as F32, for comparisons: codes times scales in fp32.
    """

    source: Folder
    row: Architecture
    exact: bool = False

    def tensors(self) -> list[GgufTensor]:
        """All tensors, in the order of the file.

        Raises:
            UnsupportedError: llama.cpp has no place for one, or a width or group that no type takes.
        """
        return [self._tensor(*placed) for placed in placed_tensors(self.source, self.row)]

    def _tensor(self, name: str, of: Matrices, layer: int | None, part: Part) -> GgufTensor:
        source = self.source
        shape = of.shape or source.shapes[of.names[0]]
        kind = self._type(of, shape, part)
        full = (of.count, *shape) if of.stacked else shape
        errors: list[float] = []
        if kind in PLAIN:
            size = math.prod(full) * _TORCH[kind].itemsize
            rows = self._dense(of, kind)
        else:
            size = of.count * shape[0] * TYPES[kind].row_bytes(shape[1])
            rows = self._coded(of, kind, errors)
        return GgufTensor(
            name=name,
            shape=full,
            type=kind,
            bytes=size,
            layer=layer,
            part=part,
            data=rows,
            source=of.names[0] if of.names else "",
            run=0 if of.columns is None else run_of(of.columns),
            scale_error=errors,
        )

    def _type(self, of: Matrices, shape: tuple[int, ...], part: Part) -> str:
        if len(shape) < 2 or shape[0] < _KEPT_SMALL or part in (Part.ROUTER, Part.NORMS) or self.exact:
            return "F32"  # an exact file has no codes: `_dense` multiplies them out
        if of.blocks is not None:
            return "MXFP4"
        if of.made is not None:
            return _float_type(self.source.config)
        found = {self._stored_type(name) for name in of.names}
        if len(found) > 1:
            raise UnsupportedError(
                f"{of.names[0]} and its neighbours have codes of different kinds ({', '.join(sorted(found))}), and "
                "llama.cpp keeps the experts of a layer in one tensor of one type."
            )
        return found.pop()

    def _stored_type(self, name: str) -> str:
        source = self.source
        if (blocks := _blocks_of(source, name)) is not None:
            return blocks.name
        if not (isinstance(source, Artifact) and source.is_quantized(name)):
            stored = source.stored.get(name)
            return _OF_DTYPE.get(stored.dtype, "BF16") if stored is not None else "BF16"
        scheme, columns = source.scheme_of(name), source.shapes[name][1]
        refuse_floats(scheme.codes, "gguf", source.folder)
        group = scheme.columns_per_group(columns)
        if group % 32:
            raise UnsupportedError(
                f"{name} has groups of {group} columns, and GGUF's Q4_0 and Q8_0 have 32; quantize with "
                "--group-size 32, 64 or 128."
            )
        return type_of(scheme)

    def _dense(self, of: Matrices, kind: str) -> Callable[[], Iterator[Chunk]]:
        def data() -> Iterator[Chunk]:
            for rows in self._dense_rows(of):
                yield tensor_bytes(rows.to(_TORCH[kind]))

        return data

    def _dense_rows(self, of: Matrices) -> Iterator[Tensor]:
        """The weights, some rows at a time where nothing is reordered."""
        source = self.source
        if of.made is not None:
            yield from map(of.made, range(of.count))
            return
        for name in of.names:
            stored = source.stored.get(name)
            if (
                of.rows is not None
                or of.columns is not None
                or stored is None
                or stored.dtype not in _OF_DTYPE
                or len(stored.shape) < 2
            ):
                whole = exactly(source, name) if of.columns is None else exactly(source, name)[:, of.columns]
                yield whole if of.rows is None else of.rows(whole)
                continue
            step = max(1, _CHUNK_BYTES // max(1, stored.bytes // stored.shape[0]))
            for begin in range(0, stored.shape[0], step):
                rows = read_rows(stored, begin, min(begin + step, stored.shape[0]))
                require_finite(stored, rows)
                yield rows

    def _coded(self, of: Matrices, kind: str, errors: list[float]) -> Callable[[], Iterator[Chunk]]:
        source = self.source

        def data() -> Iterator[Chunk]:
            if of.blocks is not None:
                yield from (tensor_bytes(of.blocks(number)) for number in range(of.count))
            for name in of.names if of.blocks is None else ():
                if isinstance(source, Checkpoint):
                    rows = read_tensor(source.packed[name].parts["codes"])
                else:
                    codes, scales = source.codes(name)
                    if kind == "MXFP4":
                        rows, error = same_floats(kind, codes, scales)
                    else:
                        rows, error = copied(kind, codes, scales, source.zeros(name))
                    errors.append(error)
                if of.columns is not None:
                    rows = _runs_turned(TYPES[kind], rows, of.columns)
                yield tensor_bytes(rows if of.rows is None else of.rows(rows))

        return data


def _runs_turned(kind: BlockType, rows: Tensor, columns: Tensor) -> Tensor:
    """The bytes of rows with their columns in another order, which keeps runs of a block's columns.

    Raises:
        UnsupportedError: it does not.
    """
    runs = columns.unflatten(0, (-1, kind.columns))
    first = runs[:, 0]
    if bool((runs - first[:, None] != torch.arange(kind.columns)).any()) or bool((first % kind.columns).any()):
        raise UnsupportedError(
            f"out_proj of linear attention lies in {kind.name}, whose blocks of {kind.columns} columns the order that "
            "llama.cpp wants would cut; quantize without --include attention."
        )
    turned: Tensor = rows.unflatten(1, (-1, kind.size))[:, first // kind.columns].flatten(1)
    return turned


def _blocks_of(source: Folder, name: str) -> BlockType | None:
    """GGUF's type that a matrix lies in already, or None."""
    packed = source.packed.get(name) if isinstance(source, Checkpoint) else None
    return None if packed is None else packed.kind


def type_of(scheme: Scheme) -> str:
    """GGUF's type that holds codes of a scheme.

    Raises:
        UnsupportedError: there is none.
    """
    refuse_floats(scheme.codes, "gguf")
    if scheme.floats:
        return "MXFP4"
    if scheme.symmetric:
        return "Q8_0" if scheme.bits == 8 else "Q4_0"
    if scheme.bits == 8:
        raise UnsupportedError(
            "Codes of 8 bits with zero points can not be exported to GGUF, whose Q8_0 has none; quantize without "
            "--asymmetric, or with --bits 4."
        )
    return "Q4_1"


def copied(kind: str, codes_OI: Tensor, scales_OG: Tensor, zeros_OG: Tensor | None = None) -> tuple[Tensor, float]:
    """Codes in blocks of Q4_0 or Q8_0, with zero points of Q4_1, and the largest relative change of a scale or minimum.

    Args:
        kind: Q4_0, Q4_1 or Q8_0.
        codes_OI: int8, of 2 to 4 bits or of 8.
        scales_OG: each stands for a multiple of 32 columns.
        zeros_OG: int16, of Q4_1: its minimum is -zero * scale, with codes from 0 on.

    Raises:
        UnsupportedError: a scale is too large for fp16, or becomes zero in it.
    """
    of_group = codes_OI.shape[1] // scales_OG.shape[1]
    half, error = _halved(scales_OG)
    bits, minima = TYPES[kind].bits, None
    if zeros_OG is not None:  # codes of fewer bits are moved to begin where those of 4 do, and zero points with them
        minima, other = _halved((zeros_OG.float() + (1 << (bits - 1))) * -scales_OG.float())
        minima, error = minima.repeat_interleave(of_group // 32, dim=1), max(error, other)
    d = half.repeat_interleave(of_group // 32, dim=1)
    blocks = Blocks(codes=to_unsigned(codes_OI, bits).to(torch.uint8), d=d, dmin=minima)
    return pack(TYPES[kind], blocks), error


def _halved(numbers: Tensor) -> tuple[Tensor, float]:
    """Numbers in fp16, and the largest relative change.

    Raises:
        UnsupportedError: one is too large, or becomes zero.
    """
    half = numbers.to(torch.float16)
    lost = ~torch.isfinite(half) | ((half == 0) & (numbers != 0))
    if bool(lost.any()):
        raise UnsupportedError("A scale of the codes lies outside of what fp16 holds, which GGUF stores it in.")
    wide = numbers.float()
    return half, float(((half.float() - wide).abs() / wide.abs().clamp_min(torch.finfo(torch.float32).tiny)).max())


def same_floats(kind: str, codes_OI: Tensor, scales_OG: Tensor) -> tuple[Tensor, float]:
    """4-bit floats with powers of two in blocks of MXFP4: the same codes and exponents, so that no scale changes.

    Args:
        kind: MXFP4.
        codes_OI: int8, 0 to 15.
        scales_OG: fp32, powers of two.
    """
    return pack(TYPES[kind], Blocks(codes=codes_OI.view(torch.uint8), d=power_bytes(scales_OG))), 0.0


def _float_type(config: object) -> str:
    stated = config.get("dtype") or config.get("torch_dtype") if isinstance(config, dict) else None
    return {"float32": "F32", "float16": "F16"}.get(str(stated), "BF16")


def types_of(tensors: Iterable[GgufTensor]) -> dict[str, int]:
    """Bytes by type, most first."""
    found: dict[str, int] = {}
    for tensor in tensors:
        found[tensor.type] = found.get(tensor.type, 0) + tensor.bytes
    return dict(sorted(found.items(), key=lambda item: -item[1]))
