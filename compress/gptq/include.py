"""Which Linears of a layer are quantized besides the routed experts, and in which order."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from moepress.errors import UsageError
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


AUTO_BITS = 8
"""Of what `--include auto` adds: rounding to 8 bits costs next to nothing (docs/benchmarks.md), and halves it."""
PART_BITS = (AUTO_BITS, 4)
"""What a budget may give them instead, where their losses were measured: what every runtime takes."""
Included = Mapping[Include, int | None]
"""Parts that are quantized besides the routed experts, with their bits; None for those of the scheme (of the layer)."""


def included(parts: Iterable[Include]) -> dict[Include, int | None]:
    """Parts with their bits; a collection that names none has the scheme's."""
    return dict(sorted(parts.items())) if isinstance(parts, Mapping) else dict.fromkeys(sorted(parts))


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What is asked for besides the routed experts, before the model is known.

    Attributes:
        auto: attention, shared experts and dense MLPs at `AUTO_BITS`, where the model has them and the groups fit.
        parts: those that are named, with the bits that are named for them.
    """

    auto: bool = False
    parts: Included = field(default_factory=dict)


AUTO, NONE = "auto", "none"
"""What `--include` takes besides names of parts."""


def asked_for(names: Iterable[str], bits: Mapping[str, int] | Mapping[Include, int]) -> Asked:
    """What `--include` and the parts of `--bits` say.

    Raises:
        UsageError: they contradict each other.
    """
    wanted, own = set(names), {Include(part): width for part, width in bits.items()}
    if NONE in wanted and (len(wanted) > 1 or own):
        other = next(iter(sorted(wanted - {NONE})), f"--bits {next(iter(sorted(own)), '')}=")
        raise UsageError(f"--include none leaves everything but the routed experts as it is; {other} goes without it.")
    named = {Include(name): None for name in wanted - {AUTO, NONE}}
    return Asked(auto=AUTO in wanted, parts=included(named | own))


def included_of(made: Mapping[str, Any]) -> Included:
    """The parts of a result, as moepress.json has them."""
    bits = made.get("part_bits", {})
    return included({Include(part): bits.get(part) for part in made.get("include", ())})


def part_bits(parts: Iterable[Include]) -> dict[Part, int]:
    """Bits of the parts that have their own."""
    named = {kind: part for part, kind in _PARTS.items()} | {Include.LM_HEAD: Part.LM_HEAD}
    return {named[kind]: bits for kind, bits in included(parts).items() if bits is not None}


def parts_text(bits: Mapping[Include, int]) -> str:
    """Bits of parts, for people."""
    return ", ".join(f"{part.value} {width}" for part, width in sorted(bits.items()))


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
