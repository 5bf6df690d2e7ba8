"""The weights of an ONNX graph, as entries that read a folder when they are written.

Codes pass unchanged: they are repacked, never recomputed. Layouts, with O out, I in, G blocks, b bits, F expert width,
D hidden size, E experts; every row is one little-endian bit stream, stored value q + 2**(b-1):

| operator | weights | scales |
|---|---|---|
| MatMulNBits | uint8 [O, I / block, block * b / 8] | [O, I / block] |
| QMoE fc1, rows gate 0, up 0, gate 1, up 1, ... | uint8 [E, 2F, D * b / 8] | [E, 2F, D / block] |
| QMoE fc2 | uint8 [E, D, F * b / 8] | [E, D, F / block] |
| MoE fc1, fc2 | [E, 2F, D], [E, D, F] | |

Zero points, where codes have some, are unsigned like codes and packed as a row of them: the shape of scales, with
ceil(blocks * b / 8) bytes in the place of the blocks.

Source: ONNX Runtime's operator schemas (docs/ContribOperators.md), checked against its CPU provider in the tests.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from moepress.converters.safetensors.artifact import Artifact
from moepress.converters.safetensors.compressed_tensors import unsigned_zeros
from moepress.converters.safetensors.packing import pack_bits, to_unsigned
from moepress.converters.safetensors.scheme import Scheme
from moepress.errors import InvalidInputError, UnsupportedError
from moepress.models.storage.checkpoint import Checkpoint
from moepress.models.storage.experts import bias_names, is_fused, read_expert
from moepress.models.storage.tensors import DTYPE_NAMES, read_rows, require_finite, tensor_bytes
from moepress.models.storage.writer import Entry

ONNX_BITS = (2, 4, 8)
BLOCKS = (128, 64, 32, 16)
_CHUNK_BYTES = 32 << 20

Projection = Literal["gate_up", "down"]
Matrix = Literal["gate", "up", "down"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """A folder's tensors, ready to be written in the dtype of a graph.

    Attributes:
        source: plain, fp8, pruned or quantized.
        dtype: float32 or float16.
    """

    source: Checkpoint | Artifact
    dtype: torch.dtype

    def is_quantized(self, name: str) -> bool:
        """Whether a weight is stored as codes."""
        return isinstance(self.source, Artifact) and self.source.is_quantized(name)

    def scheme_of(self, name: str) -> Scheme:
        """Bits and group size of a quantized weight."""
        assert isinstance(self.source, Artifact)
        return self.source.scheme_of(name)

    def plain(self, name: str, new_name: str, *, keep_dtype: bool = False, dtype: torch.dtype | None = None) -> Entry:
        """A tensor as it is, cast to the graph's dtype (or another, or none at all), read in rows."""
        shape = self.source.shapes[name]
        if self.is_quantized(name):  # a router, say, that another tool quantized
            return self.made(new_name, shape, lambda: self.source.read(name), dtype)
        stored = self.source.stored[name]
        wanted = dtype or self.dtype
        if keep_dtype and stored.dtype in ("F32", "F16", "BF16"):
            wanted = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[stored.dtype]
        return self._entry(new_name, wanted, shape, lambda: self._rows(name, wanted))

    def _rows(self, name: str, dtype: torch.dtype) -> Iterator[Any]:
        stored = self.source.stored[name]
        if stored.dtype not in ("F64", "F32", "F16", "BF16"):  # fp8 needs its scales, so the whole matrix
            yield tensor_bytes(cast(self.source.read(name), dtype, name))
            return
        step = max(1, _CHUNK_BYTES // max(1, stored.bytes // stored.shape[0]))
        for begin in range(0, stored.shape[0], step):
            rows = read_rows(stored, begin, min(begin + step, stored.shape[0]))
            require_finite(stored, rows)
            yield tensor_bytes(cast(rows, dtype, name))

    def made(
        self, new_name: str, shape: tuple[int, ...], make: Callable[[], Tensor], dtype: torch.dtype | None = None
    ) -> Entry:
        """A tensor that is computed when it is written, in the graph's dtype or another one."""
        return self.streamed(new_name, shape, lambda: iter((make(),)), dtype)

    def streamed(
        self,
        new_name: str,
        shape: tuple[int, ...],
        rows: Callable[[], Iterator[Tensor]],
        dtype: torch.dtype | None = None,
    ) -> Entry:
        """The same for a tensor too large to be made at once: some of its rows at a time."""
        wanted = dtype or self.dtype

        def data() -> Iterator[Any]:
            for part in rows():
                yield tensor_bytes(cast(part, wanted, new_name))

        return self._entry(new_name, wanted, shape, data)

    def matrix(self, name: str, new_name: str) -> tuple[Entry, ...]:
        """Codes, scales and perhaps zero points of one quantized matrix for MatMulNBits."""
        rows, columns = self.source.shapes[name]
        scheme, groups = self.scheme_of(name), ((name,),)
        block = block_size(scheme, columns)
        shape = rows, columns // block
        return (
            self._codes(f"{new_name}_codes", shape, block, scheme, groups),
            self._scales(f"{new_name}_scales", shape, block, groups),
            *self._zeros(f"{new_name}_zeros", shape, block, scheme, groups),
        )

    def expert_matrices(self, names: list[tuple[str, ...]], new_name: str, block: int) -> tuple[Entry, ...]:
        """Codes, scales and perhaps zero points of one projection of all experts for QMoE.

        Args:
            names: per expert (gate, up), whose rows are interleaved, or (down,).
            new_name: of the weights, with `_codes`, `_scales` and `_zeros` behind.
            block: from `block_size`.
        """
        rows, columns = self.source.shapes[names[0][0]]
        shape = (len(names), len(names[0]) * rows)
        scheme, blocks = self.scheme_of(names[0][0]), (*shape, columns // block)
        return (
            self._codes(f"{new_name}_codes", shape, columns, scheme, tuple(names)),
            self._scales(f"{new_name}_scales", blocks, block, tuple(names)),
            *self._zeros(f"{new_name}_zeros", blocks, block, scheme, tuple(names)),
        )

    def dense_experts(self, layer: int, experts: int, part: Projection, new_name: str) -> Entry:
        """One projection of all experts for MoE: `gate_up` with interleaved rows, or `down`."""

        def matrices(expert: int) -> Iterator[Any]:
            yield tensor_bytes(cast(self._dense_expert(layer, expert, part), self.dtype, new_name))

        shape = self.expert_shape(layer)
        rows, columns = (2 * shape[0], shape[1]) if part == "gate_up" else (shape[1], shape[0])
        return self._entry(new_name, self.dtype, (experts, rows, columns), lambda: _each(matrices, experts))

    def expert_shape(self, layer: int) -> tuple[int, int]:
        """Width F of a layer's experts and hidden size D."""
        family, shapes = self.source.family, self.source.shapes
        if is_fused(self.source, layer):
            _experts, hidden, width = shapes[family.at(family.fused_down, layer)]
            return (hidden, width) if family.fused_transposed else (width, hidden)
        width, hidden = shapes[family.expert_names(layer, 0)[0]]
        return width, hidden

    def _dense_expert(self, layer: int, expert: int, part: Projection) -> Tensor:
        source, family = self.source, self.source.family
        if is_fused(source, layer):
            whole = read_expert(source, layer, expert)
            return whole.down if part == "down" else interleaved((*whole.matrices[:2],))
        gate_name, up_name, down_name = family.expert_names(layer, expert)
        if part == "down":
            return source.read(down_name)
        return interleaved((source.read(gate_name), source.read(up_name)))

    def expert_biases(self, layer: int) -> bool:
        """Whether the experts of a layer have biases."""
        source = self.source
        if is_fused(source, layer):
            return bool(source.family.fused_biases)
        return any(name in source.shapes for name in bias_names(source.family, layer, 0).values())

    def biases_of_experts(self, layer: int, experts: int, part: Projection, new_name: str) -> Entry:
        """The biases of one projection of all experts: [E, 2F] as its rows lie, or [E, D]."""
        width, hidden = self.expert_shape(layer)

        def rows(expert: int) -> Iterator[Any]:
            found = self._biases(layer, expert)
            row = found["down"] if part == "down" else torch.stack((found["gate"], found["up"]), dim=1).flatten()
            yield tensor_bytes(cast(row, self.dtype, new_name))

        shape = (experts, hidden if part == "down" else 2 * width)
        return self._entry(new_name, self.dtype, shape, lambda: _each(rows, experts))

    def _biases(self, layer: int, expert: int) -> dict[str, Tensor]:
        """An expert's biases, without its matrices; zeros where it has none of one."""
        source, family = self.source, self.source.family
        if is_fused(source, layer):
            first, down = (source.read_row(family.at(name, layer), expert) for name in family.fused_biases)
            gate, up = (first[0::2], first[1::2]) if family.fused_interleaved else first.chunk(2)
            return {"gate": gate, "up": up, "down": down}
        width, hidden = self.expert_shape(layer)
        names = bias_names(family, layer, expert)
        sizes = {"gate": width, "up": width, "down": hidden}
        return {
            part: source.read(name) if (name := names[f"{part}_bias"]) in source.shapes else torch.zeros(size)
            for part, size in sizes.items()
        }

    def fused_matrix(self, layer: int, expert: int, part: Matrix, new_name: str) -> tuple[Entry, ...]:
        """One matrix of one expert of a layer that has them in one tensor, and its bias where there is one."""
        width, hidden = self.expert_shape(layer)
        source = self.source
        shape = (hidden, width) if part == "down" else (width, hidden)

        def matrix() -> Tensor:
            found = getattr(read_expert(source, layer, expert), part)
            assert isinstance(found, Tensor)
            return found.contiguous()

        made = self.made(new_name, shape, matrix)
        if not self.expert_biases(layer):
            return (made,)
        bias_name = f"{new_name.removesuffix('weight')}bias"
        return made, self.made(bias_name, shape[:1], lambda: self._biases(layer, expert)[part].contiguous())

    def _codes(
        self, name: str, shape: tuple[int, ...], columns: int, scheme: Scheme, groups: tuple[tuple[str, ...], ...]
    ) -> Entry:
        source = self.source
        assert isinstance(source, Artifact)

        def matrices(number: int) -> Iterator[Any]:
            parts = [source.codes(part)[0] for part in groups[number]]
            yield tensor_bytes(packed_rows(interleaved(parts), scheme.bits))

        full = (*shape, columns * scheme.bits // 8)
        return self._entry(name, torch.uint8, full, lambda: _each(matrices, len(groups)))

    def _scales(self, name: str, shape: tuple[int, ...], block: int, groups: tuple[tuple[str, ...], ...]) -> Entry:
        source = self.source
        assert isinstance(source, Artifact)

        def matrices(number: int) -> Iterator[Any]:
            parts = [_by_block(source, part, source.scales(part), block) for part in groups[number]]
            yield tensor_bytes(cast(interleaved(parts), self.dtype, groups[number][0], scales=True))

        return self._entry(name, self.dtype, shape, lambda: _each(matrices, len(groups)))

    def _zeros(
        self, name: str, shape: tuple[int, ...], block: int, scheme: Scheme, groups: tuple[tuple[str, ...], ...]
    ) -> tuple[Entry, ...]:
        """Zero points of matrices whose scales have that shape; nothing of a symmetric scheme."""
        source = self.source
        assert isinstance(source, Artifact)
        if scheme.symmetric:
            return ()

        def matrices(number: int) -> Iterator[Any]:
            parts = []
            for part in groups[number]:
                zeros = source.zeros(part)
                assert zeros is not None, "all matrices of a node have one scheme"
                parts.append(_by_block(source, part, unsigned_zeros(zeros, scheme), block))
            yield tensor_bytes(packed_bytes(interleaved(parts), scheme.bits))

        full = (*shape[:-1], math.ceil(shape[-1] * scheme.bits / 8))
        return (self._entry(name, torch.uint8, full, lambda: _each(matrices, len(groups))),)

    @staticmethod
    def _entry(name: str, dtype: torch.dtype, shape: tuple[int, ...], data: Callable[[], Iterator[Any]]) -> Entry:
        size = math.prod(shape) * dtype.itemsize
        return Entry(name=name, dtype=DTYPE_NAMES[dtype], shape=shape, bytes=size, data=data)


def _each(matrices: Callable[[int], Iterator[Any]], count: int) -> Iterator[Any]:
    for number in range(count):
        yield from matrices(number)


def interleaved(parts: list[Tensor] | tuple[Tensor, ...]) -> Tensor:
    """Rows of several matrices in turn: a0, b0, a1, b1, ..."""
    return parts[0] if len(parts) == 1 else torch.stack(list(parts), dim=1).flatten(0, 1)


def _by_block(source: Artifact, name: str, numbers_OG: Tensor, block: int) -> Tensor:
    """Numbers of a matrix's groups, for each of its blocks."""
    return numbers_OG.repeat_interleave(source.shapes[name][1] // numbers_OG.shape[1] // block, dim=1)


def packed_rows(codes_OI: Tensor, bits: int) -> Tensor:
    """Signed codes to bytes [O, I * bits / 8], least significant bits first, zero at 2**(bits-1)."""
    return packed_bytes(to_unsigned(codes_OI, bits), bits)


def packed_bytes(codes_OI: Tensor, bits: int) -> Tensor:
    """Unsigned codes to bytes [O, ceil(I * bits / 8)], least significant bits first, zero bits behind the last."""
    columns = codes_OI.shape[1]
    return pack_bits(codes_OI, bits).view(torch.uint8)[:, : math.ceil(columns * bits / 8)].contiguous()


def cast(tensor: Tensor, dtype: torch.dtype, name: str, *, scales: bool = False) -> Tensor:
    """Cast for the graph, refusing what fp16 can not hold.

    Raises:
        UnsupportedError: a value becomes infinite, or a scale becomes zero.
    """
    out = tensor.to(dtype)
    if dtype == torch.float16 and tensor.dtype != torch.float16:
        lost = not bool(torch.isfinite(out).all()) or (scales and bool(((out == 0) & (tensor != 0)).any()))
        if lost:
            raise UnsupportedError(f"{name} holds values that fp16 can not; export with --for cpu, which is fp32.")
    return out


def block_size(scheme: Scheme, *in_features: int) -> int:
    """The block that an operator is told: the largest of 128, 64, 32, 16 that lies whole in every group.

    A larger or per-channel group becomes several blocks with the same scale, which is the same matrix.

    Args:
        scheme: of the codes.
        in_features: columns of the matrices that share the operator.

    Raises:
        UnsupportedError: the width or the group size has no kernel.
    """
    if scheme.bits not in ONNX_BITS:
        raise UnsupportedError(
            f"{scheme.bits}-bit codes can not be exported to ONNX: MatMulNBits has kernels for 2, 4 and 8 bits only; "
            "quantize with --bits 4."
        )
    for block in BLOCKS:
        if all(scheme.columns_per_group(columns) % block == 0 for columns in in_features):
            return block
    raise UnsupportedError(
        f"Groups of {scheme.columns_per_group(in_features[0])} columns can not be exported to ONNX, whose blocks are "
        "16, 32, 64 or 128 columns; quantize with --group-size 32 or 64."
    )


def require_whole(source: Checkpoint | Artifact, names: list[str]) -> None:
    """Refuse a folder that lacks one of these tensors.

    Raises:
        InvalidInputError: naming the first ones.
    """
    missing = [name for name in names if name not in source.shapes]
    if missing:
        raise InvalidInputError(f"{source.folder} lacks {', '.join(missing[:10])}; download or make the folder again.")
