"""Which Linears of a layer are quantized besides the routed experts, and in which order."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from moepress.models.families.family import Part, part_of

if TYPE_CHECKING:
    from moepress.models.storage.checkpoint import Source


class Include(StrEnum):
    """Parts that `--include` adds to the routed experts."""

    ATTENTION = "attention"
    SHARED = "shared"
    DENSE = "dense"
    LM_HEAD = "lm_head"


_PARTS = {Part.ATTENTION: Include.ATTENTION, Part.SHARED: Include.SHARED, Part.DENSE: Include.DENSE}
IN_LAYERS = frozenset(_PARTS.values())
"""What `--include` may add of the layers."""


def included_as(part: Part) -> Include | None:
    """What `--include` calls a part; None for those that it does not add."""
    return Include.LM_HEAD if part is Part.LM_HEAD else _PARTS.get(part)


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearGroup:
    """Linears of one layer that see the same input, by their names on disk, `.weight` included."""

    part: Part
    names: tuple[str, ...]


def linear_groups(
    source: "Source", layer: int, layers: int, include: Iterable[Include], names: Iterable[str] | None = None
) -> list[LinearGroup]:
    """The groups of a layer to be quantized, in the order in which the data meets them.

    Args:
        source: the model.
        layer: the layer's number.
        layers: how many there are.
        include: the parts wanted.
        names: the layer's tensors (`names_by_layer`) where many layers are asked for; otherwise all names are searched.
    """
    wanted, groups = set(include), list[LinearGroup]()
    by_part: dict[Part, list[str]] = {}
    for name in source.outline.names_by_layer.get(layer, []) if names is None else names:
        shape = source.shapes[name]
        if len(shape) != 2 or 0 in shape or not name.endswith(".weight"):  # a shared expert may have no width at all
            continue
        by_part.setdefault(part_of(source.family, name, layers), []).append(name)
    for part, kind in _PARTS.items():
        if kind not in wanted:
            continue
        orders = source.family.attention_groups if part is Part.ATTENTION else source.family.mlp_groups
        for order in orders:
            leaves = [leaf for leaf in order if leaf not in source.family.never_quantize]
            found = tuple(n for leaf in leaves for n in by_part.get(part, []) if n.split(".")[-2] == leaf)
            if found:
                groups.append(LinearGroup(part=part, names=found))
    return groups


def quantized_linears(source: "Source", layers: int, include: Iterable[Include]) -> set[str]:
    """Names of all Linears of decoder layers that are quantized besides the routed experts."""
    wanted, by_layer = set(include), source.outline.names_by_layer
    groups = [
        g for layer in range(layers) for g in linear_groups(source, layer, layers, wanted, by_layer.get(layer, []))
    ]
    return {name for group in groups for name in group.names}


def unquantized_modules(
    source: "Source", layers: int, include: Iterable[Include], predicting: Collection[int] = ()
) -> list[str]:
    """Names of Linears and routers that keep their weights, for the `ignore` list of quantization configs.

    Args:
        source: the model.
        layers: how many decoder layers there are.
        include: parts that are quantized besides the routed experts.
        predicting: multi-token-prediction layers whose routed experts are quantized; others are no part of the result.
    """
    wanted, family = set(include), source.family
    fused = {name for layer in predicting for name in family.fused_names(layer)}
    quantized = quantized_linears(source, layers, wanted)
    kept = []
    for name, shape in source.shapes.items():
        part = part_of(source.family, name, layers)
        plain = len(shape) == 2 and part not in {Part.EMBEDDINGS, Part.MTP, Part.ROUTED}
        if part is Part.MTP and len(shape) == 2 and family.layer_of(name) in predicting:
            plain = name not in fused and family.expert_of(name) is None and "embed_tokens" not in name
        head = part is Part.LM_HEAD and Include.LM_HEAD in wanted
        if plain and name.endswith(".weight") and name not in quantized and not head:
            kept.append(name)
    if source.family.head not in source.shapes:
        kept.append(source.family.head)
    ignored = source.family.excluded(kept)
    return sorted(ignored, key=source.family.by_layer)
