"""Which config group is for which modules: patterns for experts, for layers, for lists of matrices.

Readers look for a module's own name and for `re:` patterns first, and take the group of `Linear` for what is left
(compressed-tensors 0.20, vLLM 0.33). transformers 5.23 takes for all routed experts the first group with a `re:` target
that speaks of experts, and for the other Linears, where it dequantizes while it loads, the first group without one.
"""

import re
from collections.abc import Iterable, Mapping, Sequence

from moepress.converters.safetensors.compressed_tensors_config import Groups
from moepress.converters.safetensors.patterns import PREFIX
from moepress.converters.safetensors.scheme import Scheme
from moepress.models.families.family import Family

EXPERTS = rf"{PREFIX}.*\.experts\.\d+\."
"""Every routed expert's matrices, as they are written, and no others."""


def groups_by_part(
    family: Family, experts: Mapping[Scheme, Sequence[int]], others: Mapping[Scheme, Sequence[str]]
) -> Groups:
    """Groups of a model whose experts have other bits than some of its other Linears.

    Args:
        family: how modules are called.
        experts: scheme -> the layers whose routed experts have it; one for all may name none.
        others: scheme -> the other quantized matrices, by their names on disk.

    Returns:
        The experts' groups, patterns that exclude each other, then `Linear` for the scheme of most matrices.
    """
    groups = []
    for scheme, layers in experts.items():
        starts = [f"{start}.*" for start in _starts(family, layers)] if len(experts) > 1 else [f"{PREFIX}.*"]
        groups.append((tuple(start + EXPERTS.removeprefix(f"{PREFIX}.*") for start in starts), scheme))
    usual = max(others, key=lambda scheme: (len(others[scheme]), scheme.bits), default=None)
    for scheme, names in others.items():
        if scheme != usual:
            groups.append((tuple(targets_of(family, names)), scheme))
    return (*groups, *(((("Linear",), usual),) if usual is not None else ()))


JOINED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "fused_qkv_a_proj": ("q_a_proj", "kv_a_proj_with_mqa"),
}
"""Matrices that vLLM and SGLang join to one, which is called so there: they are quantized alike or not at all."""


def targets_of(family: Family, names: Iterable[str], *, joined: bool = False) -> list[str]:
    """Patterns that mean these matrices alone; the names of those outside of layers.

    Args:
        family: how modules are called.
        names: of the matrices, on disk.
        joined: also as they are called once they are joined, by which vLLM looks into a GPTQ config.
    """
    layers_of, found = dict[str, list[int]](), list[str]()
    for name in names:
        layer = family.layer_of(name)
        if layer is None:
            found.append(name.removesuffix(".weight"))
            continue
        layers_of.setdefault(family.inner_name(name, layer).removesuffix(".weight"), []).append(layer)
    together: dict[tuple[int, ...], list[str]] = {}
    for inner, layers in layers_of.items():
        together.setdefault(tuple(sorted(layers)), []).append(re.escape(inner))
    for own, inners in together.items():
        inners += _joined(inners) if joined else []
        found += [f"{start}({'|'.join(inners)})$" for start in _starts(family, own)]
    return found


def _joined(inners: Iterable[str]) -> list[str]:
    """What joined matrices among these, escaped names inside of a layer, are called."""
    stems: dict[str, set[str]] = {}
    for inner in inners:
        stem, dot, leaf = inner.rpartition("\\.")
        stems.setdefault(stem + dot, set()).add(leaf)
    return [stem + name for stem, leaves in stems.items() for name, parts in JOINED.items() if leaves >= set(parts)]


def layers_pattern(family: Family, layers: Sequence[int]) -> list[str]:
    """Patterns of all that is in these layers."""
    return [f"{start}.*" for start in _starts(family, layers)]


def _starts(family: Family, layers: Iterable[int]) -> list[str]:
    """How the names in these layers begin; multi-token-prediction layers may have a prefix of their own."""
    every = list(layers)
    apart = [layer for layer in every if family.mtp_at and layer >= family.layers]
    found = []
    for part in ([layer for layer in every if layer not in apart], apart):
        prefixes = [family.at(f"{family.layers_at}{{layer}}", layer).rpartition(".") for layer in part]
        numbers = "|".join(number for _, _, number in prefixes)
        found += [f"{PREFIX}{re.escape(prefixes[0][0])}\\.({numbers})\\."] if prefixes else []
    return found
