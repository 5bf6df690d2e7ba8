"""Bytes of a pressed model, part by part, from the inventory of the original alone: never fewer than are written."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from moepress.compress.gptq.include import (
    AUTO_BITS,
    IN_LAYERS,
    Asked,
    Include,
    Included,
    included,
    included_as,
    part_bits,
    quantized_linears,
)
from moepress.converters.safetensors.scheme import PER_CHANNEL, SUPPORTED_BITS, Codes, Scheme
from moepress.errors import UsageError
from moepress.models.families.family import Family, Part, Shape, part_of
from moepress.models.families.table import family_of
from moepress.models.forward.expected import expected_of
from moepress.models.storage.outline import Outline, outline_of

if TYPE_CHECKING:
    from torch import Tensor

    from moepress.calibration.profile import Profile
    from moepress.models.storage.checkpoint import Source

_TIED = "--include lm_head: this model ties lm_head to its embeddings, which are never quantized."
_SHAPE_BYTES = 16  # `weight_shape`, two int64 beside every quantized matrix
USUAL_GROUPS = (128, 64, 32)
_ROWS = 32  # which the GPTQ layout packs together, and kernels take at once


@dataclass(frozen=True, slots=True, kw_only=True)
class Linear:
    """A matrix that `--include` adds to the routed experts.

    Attributes:
        part: of the model.
        layer: None outside of the decoder layers.
        routed: its layer has routed experts, whose bits it then shares; others have the scheme's.
        rows, columns: [O, I].
        bits: of its part, where that has its own.
    """

    part: Part
    layer: int | None
    routed: bool
    rows: int
    columns: int
    bits: int | None = None

    def scheme(self, scheme: Scheme, layer_bits: Mapping[int, int]) -> Scheme:
        """Its scheme in a model with that one, and with other bits in some layers."""
        like_layer = scheme.bits if self.layer is None else layer_bits.get(self.layer, scheme.bits)
        return scheme.of_bits(self.bits or like_layer)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Names:
    """A model's names and shapes by its config alone: a `Source` without weights."""

    config: Mapping[str, Any]
    family: Family
    outline: Outline
    shapes: Mapping[str, tuple[int, ...]]

    def read(self, name: str) -> "Tensor":
        raise NotImplementedError(name)

    def read_row(self, name: str, row: int) -> "Tensor":
        raise NotImplementedError(name)


def linear_rows(source: "Source") -> tuple[dict[str, Any], ...]:
    """All that `--include` could add, for a profile to keep: plans have no model to ask."""
    wanted = frozenset(Include) - (frozenset() if source.family.head in source.shapes else {Include.LM_HEAD})
    found = [asdict(linear) | {"part": linear.part.value} for linear in included_linears(source, wanted)]
    return tuple({key: value for key, value in row.items() if key != "bits"} for row in found)


def planned_linears(profile: "Profile", include: Iterable[Include]) -> tuple[Linear, ...]:
    """`included_linears` of the model that was profiled.

    Raises:
        UsageError: lm_head is asked for and tied to the embeddings.
    """
    wanted, own = included(include), part_bits(include)
    if not profile.linears:  # made before profiles kept them
        return linears_of_config(profile.config, wanted)
    every = [Linear(**{**row, "part": (part := Part(row["part"])), "bits": own.get(part)}) for row in profile.linears]
    if Include.LM_HEAD in wanted and not any(linear.part is Part.LM_HEAD for linear in every):
        raise UsageError(_TIED)
    return tuple(linear for linear in every if included_as(linear.part) in wanted)


def settled_parts(
    asked: Asked, linears: Iterable[Linear], group_size: int, *, floats: bool = False
) -> tuple[Included, list[str]]:
    """The parts that are quantized besides the routed experts, and what to say of those that stay as they are.

    Args:
        asked: see `Asked`.
        linears: of the model, all that `--include auto` could add.
        group_size: columns that share a scale.
        floats: codes are 4-bit floats, of which a folder has one format: no part has bits of its own.
    """
    if not asked.auto:
        return (dict.fromkeys(asked.parts) if floats else asked.parts), []
    odd = dict[Include, set[str]]()
    for linear in linears:
        if (kind := included_as(linear.part)) in IN_LAYERS:
            odd.setdefault(kind, set())
            if group_size > 0 and linear.columns % group_size:
                odd[kind].add(f"groups of {group_size} do not divide {linear.columns} columns")
            elif linear.rows % _ROWS:
                odd[kind].add(f"a matrix has {linear.rows} rows, and packed layouts want multiples of {_ROWS}")
    notes = [
        f"{kind.value.capitalize()} stays as it is: {min(found)}."
        for kind, found in sorted(odd.items())
        if found and kind not in asked.parts
    ]
    fitting = {kind: AUTO_BITS for kind, found in odd.items() if not found}
    found = included({**fitting, **{kind: bits or fitting.get(kind) for kind, bits in asked.parts.items()}})
    return (dict.fromkeys(found) if floats else found), notes


def linears_of_config(config: Mapping[str, Any], include: Iterable[Include]) -> tuple[Linear, ...]:
    """`included_linears` of a model of which only config.json is there, as in a profile.

    Raises:
        UsageError: lm_head is asked for and tied to the embeddings.
    """
    wanted = included(include)
    if not wanted:
        return ()
    shapes = dict(expected_of(config).shapes)
    if config.get("tie_word_embeddings"):
        shapes.pop("lm_head.weight", None)
    family = family_of(config)
    outline = outline_of(family, config, shapes)
    return included_linears(_Names(config=config, family=family, outline=outline, shapes=shapes), wanted)


def included_linears(source: "Source", include: Iterable[Include]) -> tuple[Linear, ...]:
    """What `--include` adds to the routed experts.

    Raises:
        UsageError: lm_head is asked for and tied to the embeddings.
    """
    wanted, own, layers = included(include), part_bits(include), source.outline.shape.layers
    names = sorted(quantized_linears(source, layers, wanted))
    if Include.LM_HEAD in wanted:
        if source.family.head not in source.shapes:
            raise UsageError(_TIED)
        names.append(source.family.head)
    routed = frozenset(source.outline.moe_layers)
    return tuple(
        Linear(
            part=(part := part_of(source.family, name, layers)),
            layer=source.family.layer_of(name),
            routed=source.family.layer_of(name) in routed,
            rows=source.shapes[name][0],
            columns=source.shapes[name][1],
            bits=own.get(part),
        )
        for name in names
    )


def scale_bytes_of(inventory: Mapping[str, Any]) -> int:
    """Bytes of a scale: 4 in fp32 models, else 2."""
    row = inventory.get(Part.ROUTED.value, {"bytes": 0, "parameters": 0})
    return 4 if int(row["bytes"]) >= 4 * int(row["parameters"]) else 2


def dense_bytes(inventory: Mapping[str, Any], linears: Iterable[Linear]) -> float:
    """What they take in a quantized folder without being quantized; fp8 becomes bf16."""
    rows = {part: inventory[part.value] for part in {linear.part for linear in linears}}
    each = {part: max(2.0, int(row["bytes"]) / int(row["parameters"])) for part, row in rows.items()}
    return sum(linear.rows * linear.columns * each[linear.part] for linear in linears)


def linears_bytes(
    inventory: Mapping[str, Any],
    linears: Iterable[Linear],
    scheme: Scheme,
    layer_bits: Mapping[int, int] | None = None,
) -> int:
    """What they take quantized, with the bits of their part or layer where it has its own."""
    own, scale, total = layer_bits or {}, scale_bytes_of(inventory), 0
    for linear in linears:
        total += matrix_bytes(linear.rows, linear.columns, linear.scheme(scheme, own), scale)
    return total


def group_size_within(shape: Shape, linears: Sequence[Linear]) -> int:
    """The largest usual group size that divides an expert's widths and the columns of these; -1 where none does."""
    widths = {shape.hidden, shape.expert_width, *(linear.columns for linear in linears)}
    return next((size for size in USUAL_GROUPS if all(width % size == 0 for width in widths)), PER_CHANNEL)


def group_size_for(shape: Shape) -> int | None:
    """The largest usual group size that divides both widths of an expert, None where none does."""
    return next((n for n in USUAL_GROUPS if shape.hidden % n == 0 and shape.expert_width % n == 0), None)


def probe_scheme(shape: Shape, bits: int) -> Scheme:
    """That many bits with the largest usual group size that divides both widths of an expert."""
    return Scheme(bits=bits, group_size=group_size_for(shape) or PER_CHANNEL)


def matrix_bytes(rows: int, columns: int, scheme: Scheme, scale_bytes: int = 2) -> int:
    """Of one quantized matrix [rows, columns]: codes in whole words of 32 bits, scales, zero points, its shape; or
    floats two a byte, scales of one byte, and of NVFP4 what divides them."""
    if scheme.floats:
        return rows * (columns // 2 + scheme.groups(columns)) + (4 if scheme.codes is Codes.NVFP4 else 0)
    words, groups = -(-columns * scheme.bits // 32), scheme.groups(columns)
    zeros = 0 if scheme.symmetric else 4 * -(-rows * scheme.bits // 32) * groups
    return rows * (4 * words + scale_bytes * groups) + zeros + _SHAPE_BYTES


def expert_bytes(shape: Shape, scheme: Scheme, scale_bytes: int = 2) -> int:
    """Of one quantized expert: gate and up [F, D], down [D, F]."""
    inner = 2 * matrix_bytes(shape.expert_width, shape.hidden, scheme, scale_bytes)
    return inner + matrix_bytes(shape.hidden, shape.expert_width, scheme, scale_bytes)


def predicting_bytes(inventory: Mapping[str, Any], shape: Shape, widths: Iterable[int | None]) -> int:
    """What multi-token-prediction layers take at most, whichever of the widths is chosen; None is no quantization.

    All their experts are counted, for those that go are not known yet.
    """
    row = inventory.get(Part.MTP.value)
    if row is None:
        return 0
    size, parameters = int(row["bytes"]), int(row["parameters"])
    each = 3 * shape.hidden * shape.expert_width * shape.experts
    layers, found, width = parameters // each, [0], scale_bytes_of(inventory)
    for bits in widths:
        if bits is None:
            found.append(size)
            continue
        scheme = Scheme(bits=bits, group_size=min(USUAL_GROUPS))
        experts = layers * shape.experts * expert_bytes(shape, scheme, width)
        found.append(experts + width * (parameters - layers * each))
    return max(found)


def part_sizes(
    inventory: Mapping[str, Any],
    shape: Shape,
    count: int,
    scheme: Scheme | None,
    layer_bits: Mapping[int, int] | None = None,
    linears: Sequence[Linear] = (),
) -> dict[Part, float]:
    """Bytes of every part of the result; the routed experts and `linears` are quantized, the MTP layer is dropped.

    Pruning copies bytes. Quantizing an fp8 model stores the rest as bf16; scales have the model's dtype.

    Args:
        inventory: part -> bytes and parameters of the original.
        shape: the original's.
        count: experts that stay in every layer.
        scheme: bits and group size; None for pruning alone.
        layer_bits: layer with experts -> bits where they differ by layer.
        linears: quantized besides the experts; without a scheme they stay.
    """
    parts = {Part(name): (int(row["bytes"]), int(row["parameters"])) for name, row in inventory.items()}
    routed_bytes, routed_parameters = parts.get(Part.ROUTED, (0, 0))
    rest: dict[Part, float] = {
        part: float(size) for part, (size, _) in parts.items() if part not in {Part.ROUTED, Part.MTP}
    }
    every = 3 * shape.hidden * shape.expert_width * shape.experts  # of a layer; biases of experts come on top
    layers, biases = divmod(routed_parameters, every)
    rest[Part.ROUTER] = _router_bytes(*parts.get(Part.ROUTER, (0, 0)), shape, layers, count)
    if scheme is None:
        return rest | {Part.ROUTED: routed_bytes * count / shape.experts}
    rest |= {p: 2.0 * parts[p][1] for p in rest if p in parts and p is not Part.ROUTER and _is_fp8(*parts[p])}
    scale_bytes = scale_bytes_of(inventory)
    # What quantizing one expert takes at each width; a layer without a width of its own has the scheme's.
    sizes = {bits: expert_bytes(shape, scheme.of_bits(bits), scale_bytes) for bits in SUPPORTED_BITS}
    own = layer_bits or {}
    routed = sum(sizes[bits] for bits in own.values()) + (layers - len(own)) * sizes[scheme.bits]
    for part in {linear.part for linear in linears}:
        mine = [linear for linear in linears if linear.part is part]
        rest[part] += linears_bytes(inventory, mine, scheme, layer_bits) - dense_bytes(inventory, mine)
    return rest | {Part.ROUTED: count * (routed + scale_bytes * biases / shape.experts)}


def _router_bytes(size: int, parameters: int, shape: Shape, layers: float, count: int) -> float:
    """Rows go with their experts; the gate of a shared expert, one row more in every layer, stays."""
    if not size:
        return 0.0
    gates = layers * shape.hidden
    fixed = gates if parameters - gates * shape.experts == gates else 0.0
    return size * (fixed + (parameters - fixed) * count / shape.experts) / parameters


def _is_fp8(size_bytes: int, parameters: int) -> bool:
    return size_bytes < 2 * parameters
