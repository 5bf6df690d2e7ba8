"""What config.json and the names of its tensors say of a model: read once, when a folder is opened."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moepress.models.families.family import Family, Shape, experts_key, shape_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Outline:
    """The lie of the land of one model.

    Attributes:
        shape: the numbers in its config.
        experts_key: the config key that states how many routed experts there are.
        moe_layers: decoder layers that have a router, ascending; multi-token-prediction layers are not among them.
        names_by_layer: names on disk by decoder layer (None: outside of them), in the source's order.
    """

    shape: Shape
    experts_key: str
    moe_layers: tuple[int, ...]
    names_by_layer: Mapping[int | None, Sequence[str]]


def outline_of(family: Family, config: Mapping[str, Any], names: Iterable[str]) -> Outline:
    """Read a model's outline, in one scan of its names.

    Args:
        family: the row of the family table.
        config: config.json.
        names: of the dense tensors, as they are on disk.

    Raises:
        InvalidInputError: a number in the config is missing, or no sensible positive integer.
    """
    shape, by_layer, there = shape_of(family, config), dict[int | None, list[str]](), set[str]()
    for name in names:
        by_layer.setdefault(family.layer_of(name), []).append(name)
        there.add(name if family.derived else family.module_name(name))
    router = family.router[0] if family.derived else family.module_name(family.router[0])
    layers = range(min(shape.layers, len(there)))  # a config may state any number
    return Outline(
        shape=shape,
        experts_key=experts_key(family, config),
        moe_layers=tuple(layer for layer in layers if router.format(layer=layer) in there),
        names_by_layer=by_layer,
    )
