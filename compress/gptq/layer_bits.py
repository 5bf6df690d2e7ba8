"""How the matrices of one model are quantized: dtype of the scales, bits by layer, and what is refused beforehand."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from moepress.compress.gptq.block_choice import BlockChoice, fitting
from moepress.compress.gptq.include import Include, quantized_linears
from moepress.converters.safetensors.artifact import Source
from moepress.converters.safetensors.compressed_tensors_config import Groups
from moepress.converters.safetensors.patterns import PREFIX
from moepress.converters.safetensors.scheme import Scheme, proposed_group
from moepress.errors import UsageError
from moepress.models.families.family import Family, Part, part_of
from moepress.models.storage.experts import is_fused


def model_dtype(config: Mapping[str, Any]) -> torch.dtype:
    """The dtype that a config states, bf16 where it states none."""
    name = config.get("dtype") or config.get("torch_dtype") or "bfloat16"
    kinds = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    return kinds.get(str(name), torch.bfloat16)


def scale_value_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype whose values scales take: the model's; fp16 for fp32 models, so that the GPTQ layout is exact."""
    return torch.float16 if dtype == torch.float32 else dtype


def check_scheme(source: Source, scheme: Scheme, include: Iterable[Include], blocks: BlockChoice | None = None) -> None:
    """Refuse a group size that does not divide a matrix, or a width that GGUF's blocks do not, before any work.

    Raises:
        UsageError: naming the first such matrix.
    """
    if Include.LM_HEAD in include and source.family.head not in source.shapes:
        raise UsageError("--include lm_head: this model ties lm_head to its embeddings, which are never quantized.")
    columns = _columns(source, include)
    for name, count in columns.items():
        try:
            if blocks is not None:
                blocks.of(name, source.family.layer_of(name), count)
                continue
            scheme.groups(count)
        except UsageError as error:
            proposal = proposed_group(scheme.group_size, columns.values())
            raise UsageError(f"{name}: {error} {proposal if blocks is None else ''}".strip()) from error


def fallback_text(source: Source, include: Iterable[Include], blocks: BlockChoice) -> str:
    """Which rows take another type than the grid's, such as `Q5_0 where rows have 128`; empty where none does."""
    found = {count: fitting(blocks.main, count).name for count in _columns(source, include).values()}
    return ", ".join(f"{name} where rows have {count}" for count, name in sorted(found.items()) if name != blocks.main)


def _columns(source: Source, include: Iterable[Include]) -> dict[str, int]:
    """Columns of every matrix that is quantized, by a name that stands for it."""
    layers = source.outline.shape.layers
    wanted = quantized_linears(source, layers, include)
    if Include.LM_HEAD in set(include):
        wanted.add(source.family.head)
    columns = {
        name: source.shapes[name][-1]
        for name, shape in source.shapes.items()
        if name in wanted
        or (len(shape) == 2 and name.endswith(".weight") and part_of(source.family, name, layers) is Part.ROUTED)
    }
    for layer in source.outline.moe_layers:  # fused ones may lie either way round
        if is_fused(source, layer):
            first, down = source.family.fused_names(layer)[:2]
            columns |= {first: source.outline.shape.hidden, down: source.outline.shape.expert_width}
    return columns


def settle_bits(
    source: Source, scheme: Scheme, layer_bits: Mapping[int, int], include: Iterable[Include]
) -> tuple[Scheme, dict[int, int]]:
    """Bits by layer, checked and brought to one form: where all layers agree, a scheme and no more.

    Args:
        source: the model.
        scheme: of layers that `layer_bits` does not name, and of lm_head.
        layer_bits: layer -> bits of its routed experts, and of its other quantized Linears.
        include: parts besides the routed experts.

    Returns:
        The scheme, and the bits of every layer with quantized matrices where they differ, else nothing.

    Raises:
        UsageError: a layer is not there, or so many bits are not supported.
    """
    layers = source.outline.shape.layers
    strange = sorted(layer for layer in layer_bits if not 0 <= layer < layers)
    if strange:
        raise UsageError(f"Bits are given for layer {strange[0]}, and the model has layers 0 to {layers - 1}.")
    included = {source.family.layer_of(name) for name in quantized_linears(source, layers, include)}
    quantized = sorted({*source.outline.moe_layers, *(layer for layer in included if layer is not None)})
    bits = {layer: layer_bits.get(layer, scheme.bits) for layer in quantized}
    for each in bits.values():
        Scheme(bits=each, group_size=scheme.group_size)
    found = set(bits.values()) | ({scheme.bits} if Include.LM_HEAD in set(include) else set())
    if len(found) > 1:
        return scheme, bits
    return Scheme(bits=min(found, default=scheme.bits), group_size=scheme.group_size), {}


def config_groups(source: Source, scheme: Scheme, layer_bits: Mapping[int, int], include: Iterable[Include]) -> Groups:
    """Targets and scheme of every width, for config.json; nothing where all layers have the scheme's.

    Targets are patterns of layers that exclude each other, and `lm_head` by name, so that it does not matter in which
    order a reader tries them.
    """
    if not layer_bits:
        return ()
    layers_of: dict[int, list[int]] = {}
    for layer, bits in sorted(layer_bits.items()):
        layers_of.setdefault(bits, []).append(layer)
    if Include.LM_HEAD in set(include):
        layers_of.setdefault(scheme.bits, [])
    groups = []
    for bits, layers in sorted(layers_of.items()):
        targets = [_pattern(source.family, part) for part in _by_prefix(source.family, layers)]
        if Include.LM_HEAD in set(include) and bits == scheme.bits:
            targets.append("lm_head")
        groups.append((tuple(targets), Scheme(bits=bits, group_size=scheme.group_size)))
    return tuple(groups)


def _by_prefix(family: Family, layers: Iterable[int]) -> list[list[int]]:
    """Layers that have one prefix; multi-token-prediction layers may have one of their own."""
    apart = [layer for layer in layers if family.mtp_at and layer >= family.layers]
    return [part for part in ([layer for layer in layers if layer not in apart], apart) if part]


def _pattern(family: Family, layers: Sequence[int]) -> str:
    """All that is in these layers, which have one prefix."""
    prefixes = [family.at(f"{family.layers_at}{{layer}}", layer).rpartition(".") for layer in layers]
    numbers = "|".join(number for _, _, number in prefixes)
    return f"{PREFIX}{re.escape(prefixes[0][0])}\\.({numbers})\\..*"


def bits_text(widths: Iterable[int]) -> str:
    """For people: `4 bit`, or `2, 4 and 8 bit by layer`."""
    found = [str(bits) for bits in sorted(set(widths))]
    return f"{found[0]} bit" if len(found) == 1 else f"{', '.join(found[:-1])} and {found[-1]} bit by layer"


def mixed_note(groups: Groups) -> list[str]:
    """Who reads mixed bits, for the report; nothing where there is one width."""
    if len(groups) < 2:
        return []
    widths = ", ".join(str(scheme.bits) for _targets, scheme in groups)
    note = (
        f"Bits differ by layer ({widths}): moepress and its ONNX export read such a folder, vLLM does for widths that "
        "it has kernels for; transformers loads it silently wrong, and there is no GPTQ layout of it."
    )
    return [note]
