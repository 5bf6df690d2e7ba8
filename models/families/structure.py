"""Where the decoder layers and the routed experts of a transformers model are, found by what the modules hold."""

import re
from dataclasses import dataclass
from typing import Any

from torch import nn

from moepress.models.families.family import Part

_MLP = re.compile(r"mlp|feedforward|feed_forward", re.IGNORECASE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Structure:
    """The skeleton of a mixture-of-experts model.

    Attributes:
        layers_at: the prefix of a decoder layer's module names, without its number, such as `model.layers.`.
        layers: how many decoder layers there are.
        moe_layers: those with routed experts, ascending.
        experts: path of the experts module inside of such a layer; `block`: of the module around it, empty where that
            is the layer itself.
        count: routed experts of a layer.
        gated: experts have a gate.
        transposed: transformers keeps the experts' matrices as [in, out].
    """

    layers_at: str
    layers: int
    moe_layers: tuple[int, ...]
    experts: str
    block: str
    count: int
    gated: bool
    transposed: bool

    def experts_of(self, model: Any, layer: int | None = None) -> nn.Module:
        """The experts module of a layer; of the first that has one."""
        number = self.moe_layers[0] if layer is None else layer
        return model.get_submodule(f"{self.layers_at}{number}.{self.experts}")  # type: ignore[no-any-return]

    def inner_name(self, module_name: str) -> str | None:
        """A name inside of its decoder layer, or None."""
        number, _, inner = module_name.removeprefix(self.layers_at).partition(".")
        return inner if module_name.startswith(self.layers_at) and number.isdigit() else None

    def part_of(self, model: Any, module_name: str, inner: str) -> Part:
        """Which part of a layer a matrix belongs to that is neither an expert's nor the router's."""
        layer = int(module_name.removeprefix(self.layers_at).partition(".")[0])
        if self.block and layer in self.moe_layers and inner.startswith(f"{self.block}."):
            return Part.SHARED
        child = inner.partition(".")[0]
        module = model.get_submodule(f"{self.layers_at}{layer}.{child}")
        dense = _MLP.search(child) or _MLP.search(type(module).__name__)
        return Part.DENSE if dense else Part.ATTENTION


def structure_of(model: Any) -> Structure | None:
    """Find the experts of a model; None for a dense one, or where layers differ in where they keep them."""
    found = [(name, module) for name, module in model.named_modules() if is_experts(module)]
    if not found:
        return None
    places = [re.fullmatch(r"(.*?\blayers\.)(\d+)\.(.+)", name) for name, _ in found]
    largest = max(int(module.down_proj.shape[0]) for _, module in found)
    kept = [
        (place[1], int(place[2]), place[3], module)
        for place, (_, module) in zip(places, found, strict=True)
        if place is not None and int(module.down_proj.shape[0]) == largest
    ]
    if len({(prefix, inner) for prefix, _, inner, _ in kept}) != 1:
        return None
    prefix, _, inner, module = kept[0]
    hidden = int(model.config.get_text_config().hidden_size)
    first = module.gate_up_proj if hasattr(module, "gate_up_proj") else module.up_proj
    transposed = int(first.shape[1]) == hidden and int(module.down_proj.shape[2]) == hidden
    return Structure(
        layers_at=prefix,
        layers=len(model.get_submodule(prefix.removesuffix("."))),
        moe_layers=tuple(sorted(layer for _, layer, _, _ in kept)),
        experts=inner,
        block=inner.rpartition(".")[0],
        count=largest,
        gated=hasattr(module, "gate_up_proj"),
        transposed=transposed,
    )


def is_experts(module: nn.Module) -> bool:
    """Whether a module keeps the matrices of many experts in tensors of three dimensions."""
    held = module._parameters
    down, first = held.get("down_proj"), held.get("gate_up_proj", held.get("up_proj"))
    if down is None or first is None or down.ndim != 3:
        return False
    return int(down.shape[0]) == int(first.shape[0])  # more of the first are experts that compute nothing
