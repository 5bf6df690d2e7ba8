"""Bytes of a GGUF file from a model's config alone, for any types: never fewer than are written, nearly as many."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moepress.compress.budget.sizes import names_of_config
from moepress.compress.gptq.block_choice import fitting
from moepress.compress.gptq.include import Include, quantized_linears
from moepress.compress.gptq.kinds import Kind, kind_of
from moepress.models.families.family import Part, Shape, part_of

_TOKEN_BYTES = 48
"""Of the file's head for each token: its text, score and type, and a merge."""
_TENSOR_BYTES = 128
"""Of the head for each tensor, and of the gap behind it."""
_LINEARS = frozenset({Include.ATTENTION, Include.SHARED, Include.DENSE})


@dataclass(frozen=True, slots=True, kw_only=True)
class Matrix:
    """A matrix that takes a type.

    Attributes:
        layer: whose; None outside of the layers.
        rows, columns: [O, I].
        each: there is one for every routed expert.
    """

    layer: int | None
    rows: int
    columns: int
    each: bool = False

    def bytes(self, name: str) -> int:
        """In a type, or the one that it falls back to."""
        return self.rows * fitting(name, self.columns).row_bytes(self.columns)


@dataclass(frozen=True, slots=True, kw_only=True)
class FileWeights:
    """What a file is made of.

    Attributes:
        matrices: those that take a type, by kind.
        rest_bytes, rest_parameters: of all else but routers, in its own dtype, and of the head.
        router_parameters: of all experts; they are F32 and go with their experts.
        experts: of a layer.
    """

    matrices: Mapping[Kind, tuple[Matrix, ...]]
    rest_bytes: int
    rest_parameters: int
    router_parameters: int
    experts: int

    def rest(self, count: int) -> int:
        """Bytes of all that takes no type, with so many experts left."""
        return self.rest_bytes + math.ceil(4 * self.router_parameters * count / self.experts)

    def bytes(self, count: int, name: str) -> int:
        """Of the file, with so many experts left and every matrix in one type."""
        every = (m.bytes(name) * (count if m.each else 1) for own in self.matrices.values() for m in own)
        return self.rest(count) + sum(every)

    def parameters(self, count: int) -> int:
        """Weights in all, with so many experts left."""
        every = sum(m.rows * m.columns * (count if m.each else 1) for own in self.matrices.values() for m in own)
        return every + self.rest_parameters + self.router_parameters * count // self.experts


def file_weights(config: Mapping[str, Any], shape: Shape) -> FileWeights:
    """Of a model of which only config.json is there, as in a profile; multi-token prediction is no part of a file."""
    source = names_of_config(config)
    linears, layers = quantized_linears(source, shape.layers, _LINEARS), source.outline.shape.layers
    width = 4 if config.get("dtype", config.get("torch_dtype")) == "float32" else 2
    matrices: dict[Kind, list[Matrix]] = {}
    tensors, rest_bytes, rest, routers = 0, 0, 0, 0
    for name, size in source.shapes.items():
        part = part_of(source.family, name, layers)
        if part in (Part.ROUTED, Part.TOWERS, Part.MTP):
            continue
        tensors += 1
        kind = kind_of(source.family, name)
        if name in linears or name in (source.family.embeddings, source.family.head):
            assert kind is not None
            matrix = Matrix(layer=source.family.layer_of(name), rows=size[0], columns=size[1])
            matrices.setdefault(kind, []).append(matrix)
        elif part is Part.ROUTER:
            routers += math.prod(size)
        else:
            rest += math.prod(size)
            rest_bytes += math.prod(size) * (4 if len(size) < 2 or part is Part.NORMS else width)
    for layer in source.outline.moe_layers:
        first = Matrix(layer=layer, rows=2 * shape.expert_width, columns=shape.hidden, each=True)
        down = Matrix(layer=layer, rows=shape.hidden, columns=shape.expert_width, each=True)
        matrices.setdefault(Kind.EXPERTS, []).append(first)
        matrices.setdefault(Kind.DOWN, []).append(down)
        tensors += 3
    return FileWeights(
        matrices={kind: tuple(own) for kind, own in matrices.items()},
        rest_bytes=rest_bytes + tensors * _TENSOR_BYTES + shape.vocabulary * _TOKEN_BYTES,
        rest_parameters=rest,
        router_parameters=routers,
        experts=shape.experts,
    )
