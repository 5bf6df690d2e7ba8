"""Tensors' names on the hub and in transformers, where a family has two: whose experts a runtime looks for under which.

vLLM, SGLang and mlx-lm look for the names of the hub's folders (Mixtral: `block_sparse_moe.experts.0.w1`), GPTQModel
for those of transformers' modules with the experts one by one (`mlp.experts.0.gate_proj`). Codes are the same.
"""

from collections.abc import Iterable
from enum import StrEnum

from moepress.errors import UnsupportedError
from moepress.models.families.family import Family, numbered

_MATRICES = ("gate_proj", "up_proj", "down_proj")


class Names(StrEnum):
    """Whose names the tensors of an export have."""

    HUB = "hub"
    TRANSFORMERS = "transformers"


def in_transformers(family: Family, name: str) -> str:
    """A tensor's name as GPTQModel looks for it: that of transformers' module, of experts one by one.

    Args:
        family: how tensors are called.
        name: of a tensor on disk; of a quantized matrix that of its weight.
    """
    place = family.expert_of(name)
    if place is None:
        return family.module_name(name)
    layer, expert, _ = place
    own = family.expert_names(layer, expert)
    if name not in own:
        raise UnsupportedError(f"{name} has no name in transformers, whose experts have matrices alone.")
    leaf = _MATRICES[-len(own) :][own.index(name)]
    return f"{family.module_layers_at}{layer}.{family.experts_module}.{expert}.{leaf}.weight"


def renamed(family: Family, weights: Iterable[str]) -> dict[str, str]:
    """Names on disk and in transformers of those tensors whose names differ; empty where none does.

    Raises:
        UnsupportedError: transformers makes its tensors of these by more than another name.
    """
    found = {}
    for name in weights:
        if numbered(name)[0] in family.converted:
            raise UnsupportedError(
                f"{name} is no tensor of transformers' {family.name}, which makes its own of several; leave "
                "out --names."
            )
        other = in_transformers(family, name)
        if other != name:
            found[name] = other
    return found
