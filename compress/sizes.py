"""Bytes of a pressed model, part by part, from the inventory of the original alone: never fewer than are written."""

from collections.abc import Mapping
from typing import Any

from moepress.converters.scheme import SUPPORTED_BITS, Scheme
from moepress.models.family import Part, Shape

_SHAPE_BYTES = 16  # `weight_shape`, two int64 beside every quantized matrix
USUAL_GROUPS = (128, 64, 32)


def group_size_for(shape: Shape) -> int | None:
    """The largest usual group size that divides both widths of an expert, None where none does."""
    return next((n for n in USUAL_GROUPS if shape.hidden % n == 0 and shape.expert_width % n == 0), None)


def matrix_bytes(rows: int, columns: int, scheme: Scheme, scale_bytes: int = 2) -> int:
    """Of one quantized matrix [rows, columns]: codes in whole words of 32 bits, scales, its shape."""
    words = -(-columns * scheme.bits // 32)
    return rows * (4 * words + scale_bytes * scheme.groups(columns)) + _SHAPE_BYTES


def expert_bytes(shape: Shape, scheme: Scheme, scale_bytes: int = 2) -> int:
    """Of one quantized expert: gate and up [F, D], down [D, F]."""
    inner = 2 * matrix_bytes(shape.expert_width, shape.hidden, scheme, scale_bytes)
    return inner + matrix_bytes(shape.hidden, shape.expert_width, scheme, scale_bytes)


def part_sizes(
    inventory: Mapping[str, Any],
    shape: Shape,
    count: int,
    scheme: Scheme | None,
    layer_bits: Mapping[int, int] | None = None,
) -> dict[Part, float]:
    """Bytes of every part of the result; the routed experts alone are quantized, the MTP layer is dropped.

    Pruning copies bytes. Quantizing an fp8 model stores the rest as bf16; scales have the model's dtype.

    Args:
        inventory: part -> bytes and parameters of the original.
        shape: the original's.
        count: experts that stay in every layer.
        scheme: bits and group size; None for pruning alone.
        layer_bits: layer -> bits where they differ by layer.
    """
    parts = {Part(name): (int(row["bytes"]), int(row["parameters"])) for name, row in inventory.items()}
    routed_bytes, routed_parameters = parts.get(Part.ROUTED, (0, 0))
    rest = {part: float(size) for part, (size, _) in parts.items() if part not in {Part.ROUTED, Part.MTP}}
    layers = routed_parameters / (3 * shape.hidden * shape.expert_width * shape.experts)
    rest[Part.ROUTER] = _router_bytes(*parts.get(Part.ROUTER, (0, 0)), shape, layers, count)
    if scheme is None:
        return rest | {Part.ROUTED: routed_bytes * count / shape.experts}
    rest |= {p: 2.0 * parts[p][1] for p in rest if p in parts and p is not Part.ROUTER and _is_fp8(*parts[p])}
    scale_bytes = 4 if routed_bytes >= 4 * routed_parameters else 2
    # What quantizing one expert takes at each width; a layer without a width of its own has the scheme's.
    sizes = {
        bits: expert_bytes(shape, Scheme(bits=bits, group_size=scheme.group_size), scale_bytes)
        for bits in SUPPORTED_BITS
    }
    own = layer_bits or {}
    routed = sum(sizes[bits] for bits in own.values()) + (layers - len(own)) * sizes[scheme.bits]
    return rest | {Part.ROUTED: count * routed}


def _router_bytes(size: int, parameters: int, shape: Shape, layers: float, count: int) -> float:
    """Rows go with their experts; the gate of a shared expert, one row more in every layer, stays."""
    if not size:
        return 0.0
    gates = layers * shape.hidden
    fixed = gates if parameters - gates * shape.experts == gates else 0.0
    return size * (fixed + (parameters - fixed) * count / shape.experts) / parameters


def _is_fp8(size_bytes: int, parameters: int) -> bool:
    return size_bytes < 2 * parameters
