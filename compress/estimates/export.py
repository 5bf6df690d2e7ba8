"""What an export takes, before there is anything to export: the sizes that its layout adds to or takes from the codes.

GPTQ copies what is not quantized, and has zeros, float16 scales and the group of every column beside the codes. ONNX
for the CPU has codes, float32 scales and all else in float32; what that is for a model is known from the graph of the
original, of which only experts, router rows and the included Linears change.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

from moepress.compress.budget.sizes import Linear, matrix_bytes, scale_bytes_of
from moepress.compress.estimates.estimate import PROJECTED, Estimate
from moepress.compress.estimates.figures import Figures
from moepress.compress.estimates.footprint import libraries_bytes
from moepress.compress.estimates.rates import Rates
from moepress.compress.gptq.pieces import PIECE_BYTES
from moepress.converters.gguf.tensors import type_of
from moepress.converters.onnx.weights import block_size
from moepress.converters.safetensors.artifact import Artifact
from moepress.converters.safetensors.scheme import Scheme
from moepress.models.families.family import Part
from moepress.models.storage.block_types import TYPES

_FLOAT = 4
_Many = tuple[int, int, Scheme, int]  # rows, columns, scheme and number of quantized matrices
_HEAPS = 2  # ONNX Runtime holds a rearranged copy of the weights (docs/benchmarks.md, "memory of the export")


@dataclass(frozen=True, slots=True, kw_only=True)
class Pressed:
    """The folder that will be exported.

    Attributes:
        size: its bytes.
        count: experts in every layer.
        scheme: of the codes.
        layer_bits: layer with experts -> bits where they differ by layer.
        linears: quantized besides the experts.
    """

    size: int
    count: int
    scheme: Scheme
    layer_bits: Mapping[int, int]
    linears: Sequence[Linear]


def gptq_bytes(figures: Figures, pressed: Pressed) -> int:
    """Bytes of all tensors in the GPTQ layout."""
    scale = scale_bytes_of(figures.inventory)
    return pressed.size + sum(
        number * (_gptq_matrix(rows, columns, scheme) - matrix_bytes(rows, columns, scheme, scale))
        for rows, columns, scheme, number in _matrices(figures, pressed)
    )


def layout_bytes(artifact: Artifact, target: str) -> int:
    """Bytes of all tensors of a quantized folder in another layout: of GPTQ exactly, else a little more."""
    total = 0
    for name, shape in artifact.shapes.items():
        if not artifact.is_quantized(name):
            total += artifact.stored[name].bytes
        elif target == "gptq":
            total += _gptq_matrix(shape[0], shape[1], artifact.scheme_of(name))
        else:
            total += matrix_bytes(shape[0], shape[1], artifact.scheme_of(name), 2)
    return total


def onnx_bytes_after(original_bytes: int, figures: Figures, pressed: Pressed, *, bias: bool) -> int:
    """Bytes of graph and weights for the CPU; pages between weights, and what differs between the graphs, left out.

    Args:
        original_bytes: of the original in ONNX.
        figures: the original's.
        pressed: what is exported.
        bias: routers have a correction bias.
    """
    shape = figures.shape
    routers = (shape.experts - pressed.count) * (shape.hidden + bias) * figures.moe_layers
    linears = sum(linear.rows * linear.columns for linear in pressed.linears)
    dense = _FLOAT * (figures.parameters(Part.ROUTED) + routers + linears)
    size = original_bytes - dense
    for rows, columns, scheme, number in _experts(figures, pressed):
        size += number * _onnx_matrix(rows, columns, scheme, block_size(scheme, shape.hidden, shape.expert_width))
    for linear in pressed.linears:
        rows, columns, scheme = linear.rows, linear.columns, linear.scheme(pressed.scheme, pressed.layer_bits)
        if scheme.bits == 8 and linear.part is not Part.LM_HEAD:  # written plain: `converters.onnx.parts`
            size += _FLOAT * rows * columns
        else:
            size += _onnx_matrix(rows, columns, scheme, block_size(scheme, columns))
    return size


def estimate_gptq(figures: Figures, pressed: Pressed, rates: Rates | None = None) -> Estimate:
    """A shard is unpacked, packed otherwise and written, one after the other."""
    size = gptq_bytes(figures, pressed)
    table = max(w.bytes for p, w in figures.parts.items() if p in {Part.EMBEDDINGS, Part.LM_HEAD})
    shard = 2 * min(size, PIECE_BYTES + 2 * figures.layer_parameters) + 2 * table
    memory = {"libraries": libraries_bytes(), "shard": shard, "matrix": _matrix_memory(figures)}
    packed = sum(rows * columns * number for rows, columns, _, number in _matrices(figures, pressed))
    return _estimate(size, _seconds(pressed.size, size, packed, rates), memory)


def estimate_gguf(figures: Figures, pressed: Pressed, rates: Rates | None = None) -> Estimate:
    """Written as a stream: codes of 8 bits as Q8_0, other integers as Q4_0 or with zero points Q4_1, a scale for every
    32 columns, and MXFP4 as it is."""
    scale = scale_bytes_of(figures.inventory)
    size = pressed.size
    for rows, columns, scheme, number in _matrices(figures, pressed):
        kind = TYPES[type_of(scheme)]
        size += number * (rows * kind.row_bytes(columns) - matrix_bytes(rows, columns, scheme, scale))
    memory = {"libraries": libraries_bytes(), "matrix": _matrix_memory(figures)}
    packed = sum(rows * columns * number for rows, columns, _, number in _matrices(figures, pressed))
    return _estimate(size, _seconds(pressed.size, size, packed, rates), memory)


def estimate_onnx(figures: Figures, read_bytes: int, size: int, count: int, rates: Rates | None = None) -> Estimate:
    """Written as a stream; the self-check then runs it in a session, and what was exported beside it.

    Args:
        figures: the original's.
        read_bytes: of what is exported.
        size: of graph and weights.
        count: experts in every layer.
        rates: of this machine; None for no time.
    """
    memory = {
        "libraries": libraries_bytes(),
        "matrix": _matrix_memory(figures),
        "session": _HEAPS * size,
        "layer": _FLOAT * (2 * figures.layer_parameters + figures.largest_matrix),
    }
    weights = sum(w.parameters for part, w in figures.parts.items() if part is not Part.MTP)
    weights -= figures.parameters(Part.ROUTED) * (figures.shape.experts - count) // figures.shape.experts
    time = _seconds(read_bytes, size, weights, rates)
    if rates is not None:
        time["check"] = (read_bytes + size) / rates.read_bytes_per_second + 2 * weights * rates.load_seconds
    return _estimate(size, time, memory)


def _seconds(read_bytes: int, size: int, weights: int, rates: Rates | None) -> dict[str, float]:
    if rates is None:
        return {}
    each = rates.read_bytes_per_second
    return {"read": read_bytes / each, "pack": 2 * weights * rates.load_seconds, "write": size / each}


def _estimate(size: int, time: dict[str, float], memory: dict[str, int]) -> Estimate:
    return Estimate(
        disk_bytes=size,
        output_bytes=size,
        peak_memory_bytes=sum(memory.values()),
        seconds=sum(time.values()) if time else None,
        tokens_per_expert=None,
        time=time,
        memory=memory,
        disk={"output": size},
        notes=(PROJECTED,),
    )


def _matrices(figures: Figures, pressed: Pressed) -> Iterator[_Many]:
    """Every quantized matrix."""
    return chain(_experts(figures, pressed), _included(pressed))


def _experts(figures: Figures, pressed: Pressed) -> Iterator[_Many]:
    hidden, width = figures.shape.hidden, figures.shape.expert_width
    for bits, layers in _widths(figures, pressed).items():
        scheme = pressed.scheme.of_bits(bits)
        yield width, hidden, scheme, 2 * layers * pressed.count
        yield hidden, width, scheme, layers * pressed.count


def _included(pressed: Pressed) -> Iterator[_Many]:
    for linear in pressed.linears:
        yield linear.rows, linear.columns, linear.scheme(pressed.scheme, pressed.layer_bits), 1


def _widths(figures: Figures, pressed: Pressed) -> dict[int, int]:
    """Bits -> number of layers with experts that have them."""
    found = {pressed.scheme.bits: figures.moe_layers - len(pressed.layer_bits)}
    for bits in pressed.layer_bits.values():
        found[bits] = found.get(bits, 0) + 1
    return found


def _gptq_matrix(rows: int, columns: int, scheme: Scheme) -> int:
    groups = scheme.groups(columns)
    return rows * columns * scheme.bits // 8 + groups * rows * scheme.bits // 8 + 2 * groups * rows + 4 * columns


def _onnx_matrix(rows: int, columns: int, scheme: Scheme, block: int) -> int:
    blocks = columns // block
    zeros = 0 if scheme.symmetric else -(-blocks * scheme.bits // 8)
    return rows * (columns * scheme.bits // 8 + _FLOAT * blocks + zeros)


def _matrix_memory(figures: Figures) -> int:
    """A matrix as codes, unpacked to words, packed and its bytes."""
    largest = max(figures.largest_matrix, 2 * figures.shape.hidden * figures.shape.expert_width)
    return 16 * largest
