"""Kinds of matrices: what a mix of GGUF's types tells apart, besides layers."""

from enum import StrEnum

from moepress.models.families.family import Family, Part, part_of

_EVERY_LAYER = 1 << 31  # so that a multi-token-prediction layer's matrices are what they are in other layers


class Kind(StrEnum):
    """What may have a type of its own: in a range of layers, the last two in the whole model."""

    ATTENTION = "attention"
    SHARED = "shared"
    DENSE = "dense"
    EXPERTS = "experts"
    DOWN = "down"
    EMBEDDINGS = "embeddings"
    HEAD = "head"


KINDS = {
    Part.ATTENTION: Kind.ATTENTION,
    Part.SHARED: Kind.SHARED,
    Part.DENSE: Kind.DENSE,
    Part.ROUTED: Kind.EXPERTS,
    Part.EMBEDDINGS: Kind.EMBEDDINGS,
    Part.LM_HEAD: Kind.HEAD,
}
"""Of the matrices of a part; of routed experts all but their down."""
OUTSIDE = frozenset({Kind.EMBEDDINGS, Kind.HEAD})
"""Kinds that lie in no layer."""


def kind_of(family: Family, name: str) -> Kind | None:
    """The kind of a matrix by its name on disk; None for what no mix gives a type to."""
    kind = KINDS.get(part_of(family, name, _EVERY_LAYER))
    return Kind.DOWN if kind is Kind.EXPERTS and _leaf(name) == _leaf(family.down) else kind


def _leaf(name: str) -> str:
    return name.removesuffix(".weight").rpartition(".")[2]


def kind_text(kind: Kind) -> str:
    """For people."""
    return {Kind.EXPERTS: "experts, gate and up", Kind.DOWN: "experts, down"}.get(kind, kind.value)


def range_text(layers: tuple[int, int]) -> str:
    """For people: `3`, or `3 to 5`."""
    first, last = layers
    return f"{first}" if first == last else f"{first} to {last}"
