"""What an estimate needs to know of a model: counted once, from names and shapes alone."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from moepress.compress.budget.sizes import expert_bytes, part_sizes, scale_bytes_of
from moepress.compress.gptq.include import Include, linear_groups, part_bits
from moepress.converters.safetensors.scheme import Scheme
from moepress.models.families.family import Part, Shape, part_of
from moepress.models.forward.costs import stored_bytes
from moepress.models.forward.inventory import AttentionShape, Weight, attention_shape, weigh
from moepress.models.storage.checkpoint import Checkpoint


@dataclass(frozen=True, slots=True, kw_only=True)
class Matrices:
    """Linears that are solved as one, because they have the same input, or many such of the same shape.

    Attributes:
        rows, columns: of the stacked matrix [O, I].
        count: how many of that shape.
        part: the part of the model that they belong to.
    """

    rows: int
    columns: int
    count: int
    part: Part

    @property
    def weights(self) -> int:
        """Weights of all of them."""
        return self.rows * self.columns * self.count


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """The numbers of one model.

    Attributes:
        shape: its config's.
        attention: widths of its attention.
        parts: parameters and bytes.
        moe_layers: layers with routed experts.
        layer_parameters: of the largest layer, without its routed experts.
        largest_matrix: parameters of the largest tensor of a layer, routed experts left out.
        mlp_width: of the widest MLP that every token passes.
    """

    shape: Shape
    attention: AttentionShape
    parts: Mapping[Part, Weight]
    moe_layers: int
    layer_parameters: int
    largest_matrix: int
    mlp_width: int

    @property
    def inventory(self) -> dict[str, Any]:
        """The parts, as plain JSON."""
        return {part.value: asdict(weight) for part, weight in self.parts.items()}

    def parameters(self, *parts: Part) -> int:
        """Parameters of these parts together."""
        return sum(self.parts[part].parameters for part in parts if part in self.parts)

    def stored(self, *without: Part) -> int:
        """Bytes on disk of everything but these parts and the MTP layer."""
        return sum(weight.bytes for part, weight in self.parts.items() if part not in {Part.MTP, *without})


def figures_of(checkpoint: Checkpoint) -> Figures:
    """Count once; a model may have a hundred thousand tensors."""
    layers, by_layer, widths, largest = checkpoint.shape.layers, dict[int, int](), [0], 0
    for name, shape in checkpoint.shapes.items():
        layer, part = checkpoint.family.layer_of(name), part_of(checkpoint.family, name, layers)
        if layer is None or layer >= layers or part is Part.ROUTED:
            continue
        size = math.prod(shape)
        by_layer[layer] = by_layer.get(layer, 0) + size
        largest = max(largest, size)
        if part in {Part.DENSE, Part.SHARED} and len(shape) == 2:
            widths.append(shape[0] if name.endswith(("gate_proj.weight", "up_proj.weight")) else 0)
    return Figures(
        shape=checkpoint.shape,
        attention=attention_shape(checkpoint.config),
        parts=weigh(checkpoint),
        moe_layers=len(checkpoint.outline.moe_layers),
        layer_parameters=max(by_layer.values()),
        largest_matrix=largest,
        mlp_width=max(widths),
    )


def pressed_sizes(
    checkpoint: Checkpoint,
    figures: Figures,
    count: int,
    scheme: Scheme | None,
    include: Iterable[Include] = (),
    layer_bits: Mapping[int, int] | None = None,
) -> dict[Part, int]:
    """Bytes of every part after pruning to `count` experts and quantizing the experts and what `include` adds, with its
    own bits where it names some.

    `layer_bits` are those of layers that do not have the scheme's.
    """
    routed, own = checkpoint.outline.moe_layers, layer_bits or {}
    sizes = part_sizes(figures.inventory, figures.shape, count, scheme, {n: b for n, b in own.items() if n in routed})
    if scheme is not None:
        layers = {
            Part.SHARED: routed,
            Part.DENSE: [n for n in range(figures.shape.layers) if n not in routed],
            Part.ATTENTION: range(figures.shape.layers),
        }
        by_part = part_bits(include)
        for matrices in included_matrices(checkpoint, include):
            stored = figures.parts[matrices.part]
            each = max(2.0, stored.bytes / max(stored.parameters, 1))  # of fp8 the rest becomes bf16
            bits = scheme.bits_per_weight(matrices.columns, 32 if each >= 4 else 16)
            found = [own.get(layer, scheme.bits) for layer in layers.get(matrices.part, ())]
            if matrices.part in by_part:
                bits += by_part[matrices.part] - scheme.bits
            elif found:
                bits += sum(found) / len(found) - scheme.bits
            sizes[matrices.part] += matrices.weights * (bits / 8 - each)
    return {part: round(size) for part, size in sizes.items()}


def mtp_bytes(checkpoint: Checkpoint, figures: Figures, layers: Iterable[int], count: int, scheme: Scheme) -> int:
    """Bytes of multi-token-prediction layers with so many quantized experts; of fp8 tensors the rest becomes bf16."""
    family, shape, total = checkpoint.family, checkpoint.shape, 0
    experts = count * expert_bytes(shape, scheme, scale_bytes_of(figures.inventory))
    for layer in layers:
        fused, routers = set(family.fused_names(layer)), set(family.router_names(layer))
        total += experts
        for name in checkpoint.outline.names_by_layer.get(layer, ()):
            if name in fused or family.expert_of(name) is not None:
                continue
            size = max(stored_bytes(checkpoint, name), 2 * math.prod(checkpoint.shapes[name]))
            total += size * count // shape.experts if name in routers else size
    return total


def included_matrices(checkpoint: Checkpoint, include: Iterable[Include]) -> list[Matrices]:
    """What `--include` adds to the routed experts, those of one shape together."""
    wanted, layers, found = set(include), checkpoint.shape.layers, dict[tuple[int, int, Part], int]()
    if not wanted:
        return []
    by_layer = checkpoint.outline.names_by_layer
    for layer in range(layers):
        for group in linear_groups(checkpoint, layer, layers, wanted, by_layer.get(layer, [])):
            rows = sum(checkpoint.shapes[name][0] for name in group.names)
            key = (rows, checkpoint.shapes[group.names[0]][1], group.part)
            found[key] = found.get(key, 0) + 1
    if Include.LM_HEAD in wanted and checkpoint.family.head in checkpoint.shapes:
        found[(*checkpoint.shapes[checkpoint.family.head], Part.LM_HEAD)] = 1  # type: ignore[index]
    return [Matrices(rows=o, columns=i, count=n, part=part) for (o, i, part), n in found.items()]


def expert_matrices(figures: Figures, count: int) -> tuple[Matrices, Matrices]:
    """Gate and up, which share their input, and down, of `count` experts in every MoE layer."""
    hidden, width, number = figures.shape.hidden, figures.shape.expert_width, count * figures.moe_layers
    return (
        Matrices(rows=2 * width, columns=hidden, count=number, part=Part.ROUTED),
        Matrices(rows=hidden, columns=width, count=number, part=Part.ROUTED),
    )
