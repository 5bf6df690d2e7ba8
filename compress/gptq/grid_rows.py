"""A mix of GGUF's types as a plan has it: the type of every kind of matrix, by layers."""

from collections.abc import Sequence
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from moepress.compress.gptq.kinds import Kind

Layer = Annotated[int, Field(ge=0, lt=1 << 31, strict=True)]


class GridRow(BaseModel):
    """The type of one kind in some layers.

    Attributes:
        kind: `experts` are the routed experts' gate and up, `down` their down.
        layers: the first and the last; None for what lies in no layer.
        type: of GGUF, such as Q4_K.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Kind
    layers: tuple[Layer, Layer] | None = None
    type: str


def mix_text(rows: Sequence[GridRow]) -> str:
    """A mix in short: the types in it, those of the experts first."""
    routed = [row.type for row in rows if row.kind in (Kind.EXPERTS, Kind.DOWN)]
    experts = list(dict.fromkeys(routed))
    others = [name for name in dict.fromkeys(row.type for row in rows) if name not in experts]
    return f"experts in {', '.join(experts)}" + (f", the rest also in {', '.join(others)}" if others else "")
