"""Bytes of a GGUF file for any types, by what an export of the original would write; a profile holds it for plans.

All but the types is known to the byte before anything is pressed: which tensors there are, head, tokenizer, gaps.
"""

import math
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, Field

from moepress.compress.gptq.block_choice import fitting
from moepress.compress.gptq.grid_rows import Layer
from moepress.compress.gptq.include import IN_LAYERS, quantized_linears
from moepress.compress.gptq.kinds import Kind, kind_of
from moepress.models.families.family import Part
from moepress.models.storage.experts import router_disk_names

if TYPE_CHECKING:
    from moepress.converters.gguf.export import GgufPlan
    from moepress.converters.gguf.tensors import GgufTensor
    from moepress.models.storage.checkpoint import Checkpoint

_SLACK_BYTES = 4096
"""Of the head, for names and numbers that are not those of the original; and for each tensor the gap behind it."""
_GAP_BYTES = 32


class Matrix(BaseModel):
    """A tensor of the file that takes a type.

    Attributes:
        kind: whose type it takes.
        layer: None outside of the layers.
        rows, columns: [O, I]; of stacked experts those of one.
        each: there is one for every routed expert.
        run: columns that llama.cpp's order leaves together, which no block may exceed; `columns` where it turns none.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Kind
    layer: Layer | None
    rows: int = Field(gt=0, lt=1 << 40)
    columns: int = Field(gt=0, lt=1 << 40)
    each: bool = False
    run: int = Field(gt=0, lt=1 << 40)

    def type(self, name: str) -> str:
        """What it lies in where its kind has that type.

        Raises:
            UsageError: no type takes it.
        """
        return fitting(name, math.gcd(self.columns, self.run)).name

    def bytes(self, name: str) -> int:
        """In a type, or the one that it falls back to."""
        return self.rows * fitting(name, math.gcd(self.columns, self.run)).row_bytes(self.columns)


class FileWeights(BaseModel):
    """What a file is made of.

    Attributes:
        matrices: those that take a type.
        rest_bytes, rest_parameters: of all else, in its own dtype, and of the head.
        each_bytes, each_parameters: of that, what goes with every expert: rows of routers, biases.
        experts: of a layer.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    matrices: tuple[Matrix, ...]
    rest_bytes: int = Field(ge=0, lt=1 << 62)
    rest_parameters: int = Field(ge=0, lt=1 << 62)
    each_bytes: int = Field(ge=0, lt=1 << 40)
    each_parameters: int = Field(ge=0, lt=1 << 40)
    experts: int = Field(gt=0, lt=1 << 31)

    def rest(self, count: int) -> int:
        """Bytes of all that takes no type, with so many experts left."""
        return self.rest_bytes + self.each_bytes * count

    def bytes(self, count: int, name: str) -> int:
        """Of the file, with so many experts left and every matrix in one type."""
        return self.rest(count) + sum(m.bytes(name) * (count if m.each else 1) for m in self.matrices)

    def parameters(self, count: int) -> int:
        """Weights in all, with so many experts left."""
        every = sum(m.rows * m.columns * (count if m.each else 1) for m in self.matrices)
        return every + self.rest_parameters + self.each_parameters * count


def file_weights(source: "Checkpoint", plan: "GgufPlan") -> FileWeights:
    """Of a model, by the plan of its export as it is."""
    layers, experts = source.outline.shape.layers, source.shape.experts
    linears = quantized_linears(source, layers, IN_LAYERS) | {source.family.embeddings, source.family.head}
    routers = {name for layer in source.outline.moe_layers for name in router_disk_names(source, layer)}
    matrices: list[Matrix] = []
    rest: list[GgufTensor] = []
    each: list[GgufTensor] = []
    for tensor in plan.tensors:
        if tensor.part is Part.ROUTED and len(tensor.shape) == 3:
            kind: Kind | None = Kind.DOWN if "ffn_down" in tensor.name else Kind.EXPERTS
        else:
            kind = kind_of(source.family, tensor.source) if tensor.source in linears else None
        if kind is not None and len(tensor.shape) >= 2:
            rows, columns = tensor.shape[-2:]
            stacked = len(tensor.shape) == 3
            run = tensor.run or columns
            matrices.append(Matrix(kind=kind, layer=tensor.layer, rows=rows, columns=columns, each=stacked, run=run))
        elif tensor.source in routers or tensor.part is Part.ROUTED:
            each.append(tensor)
        else:
            rest.append(tensor)
    outside = plan.bytes - sum(tensor.bytes for tensor in plan.tensors)
    return FileWeights(
        matrices=tuple(matrices),
        rest_bytes=sum(t.bytes for t in rest) + outside + _SLACK_BYTES + _GAP_BYTES * len(plan.tensors),
        rest_parameters=sum(math.prod(t.shape) for t in rest),
        each_bytes=-(-sum(t.bytes for t in each) // experts),
        each_parameters=sum(math.prod(t.shape) for t in each) // experts,
        experts=experts,
    )
