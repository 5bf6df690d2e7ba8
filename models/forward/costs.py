"""What work costs, counted from shapes: FLOP of experts and layers, bytes as they lie on the disk. For `phases`."""

from typing import Any

from torch import nn

from moepress.models.forward.inventory import attention_of
from moepress.models.storage.checkpoint import Source
from moepress.models.storage.experts import Expert, PrunedSource, is_fused

_SCALE_SUFFIX = "_scale_inv"


def expert_flops(expert: Expert, tokens: int) -> float:
    """Of an expert applied to so many tokens: two per weight and token."""
    return 2.0 * tokens * sum(matrix.numel() for matrix in expert.matrices)


def layer_flops(module: nn.Module, config: Any, tokens: int, window: int) -> float:
    """Of a loaded layer without its routed experts: its matrices, and all scores of attention, masked ones too.

    Args:
        module: transformers' decoder layer, without its experts.
        config: of the model, as transformers parsed it.
        tokens: of all windows.
        window: tokens of one.
    """
    matrices = sum(weight.numel() for weight in module.parameters() if weight.ndim == 2)
    attention = attention_of(config)
    scores = window * attention.heads * (attention.key_width + attention.value_width)
    return 2.0 * tokens * (matrices + scores)


def stored_bytes(source: Source, name: str) -> int:
    """What is read from the disk for `source.read(name)`: block scales, or packed codes and scales, included.

    0 of a source that is in no file.
    """
    if isinstance(source, PrunedSource):  # a router is read whole, and then rows are taken
        return stored_bytes(source.base, source.renamed.get(name, name))
    stored = getattr(source, "stored", {})
    module = name.removesuffix(".weight")
    parts = [name, f"{name}{_SCALE_SUFFIX}", *(f"{module}.{suffix}" for suffix in getattr(source, "suffixes", ()))]
    return sum(stored[part].bytes for part in parts if part in stored)


def stored_expert_bytes(source: Source, layer: int, expert: int) -> int:
    """What is read from the disk for one routed expert."""
    family = source.family
    if not is_fused(source, layer):
        return sum(stored_bytes(source, name) for name in family.expert_names(layer, expert))
    base = source.base if isinstance(source, PrunedSource) else source
    return sum(stored_bytes(base, name) // base.shapes[name][0] for name in family.fused_names(layer))
