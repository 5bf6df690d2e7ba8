"""How the matrices of one model are quantized: dtype of the scales, bits by layer, and what is refused beforehand."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch

from moepress.compress.gptq.block_choice import BlockChoice, fitting
from moepress.compress.gptq.include import Include, Included, included, included_as, quantized_linears
from moepress.converters.safetensors.artifact import Source
from moepress.converters.safetensors.compressed_tensors_config import Groups
from moepress.converters.safetensors.scheme import Scheme
from moepress.converters.safetensors.targets import groups_by_part, layers_pattern
from moepress.errors import UsageError
from moepress.models.families.family import Part, part_of
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
            proposal = scheme.proposed(columns.values())
            raise UsageError(f"{name}: {error} {proposal if blocks is None else ''}".strip()) from error


def fallback_text(source: Source, include: Iterable[Include], blocks: BlockChoice) -> str:
    """Which rows take another type than the grid's, such as `Q5_0 where rows have 128`; empty where none does."""
    like_experts = [part for part, bits in included(include).items() if bits is None]
    found = {count: fitting(blocks.main, count).name for count in _columns(source, like_experts).values()}
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
) -> tuple[Scheme, dict[int, int], Included]:
    """Bits by layer and part, checked and brought to one form: where all agree, a scheme and no more.

    Args:
        source: the model.
        scheme: of layers that `layer_bits` does not name, and of lm_head.
        layer_bits: layer -> bits of its routed experts, and of its other quantized Linears.
        include: parts besides the routed experts; bits of their own win over those of their layers.

    Returns:
        The scheme; the bits of every layer with quantized matrices where they differ, else nothing; the parts, with
        bits where those are not the scheme's.

    Raises:
        UsageError: a layer is not there, or so many bits are not supported.
    """
    layers, wanted = source.outline.shape.layers, included(include)
    strange = sorted(layer for layer in layer_bits if not 0 <= layer < layers)
    if strange:
        raise UsageError(f"Bits are given for layer {strange[0]}, and the model has layers 0 to {layers - 1}.")
    like_layer = [part for part, bits in wanted.items() if bits is None]
    others = {source.family.layer_of(name) for name in quantized_linears(source, layers, like_layer)}
    quantized = sorted({*source.outline.moe_layers, *(layer for layer in others if layer is not None)})
    bits = {layer: layer_bits.get(layer, scheme.bits) for layer in quantized}
    for each in (*bits.values(), *(own for own in wanted.values() if own is not None)):
        scheme.of_bits(each)
    found = set(bits.values()) | ({scheme.bits} if Include.LM_HEAD in like_layer else set())
    if len(found) > 1:
        return scheme, bits, wanted
    scheme = scheme.of_bits(min(found, default=scheme.bits))
    return scheme, {}, {part: None if own == scheme.bits else own for part, own in wanted.items()}


def config_groups(source: Source, scheme: Scheme, layer_bits: Mapping[int, int], include: Iterable[Include]) -> Groups:
    """Targets and scheme of every width, for config.json; nothing where all matrices have the scheme's.

    Patterns exclude each other, so that it does not matter in which order a reader tries them; where parts have bits of
    their own see `targets.groups_by_part`.
    """
    wanted = included(include)
    if not any(wanted.values()):
        return _layer_groups(source, scheme, layer_bits, wanted)
    family, layers = source.family, source.outline.shape.layers
    experts: dict[Scheme, list[int]] = {} if layer_bits else {scheme: []}
    for layer, bits in layer_bits.items():
        if layer in source.outline.moe_layers or layer >= layers:
            experts.setdefault(scheme.of_bits(bits), []).append(layer)
    others: dict[Scheme, list[str]] = {}
    for name in sorted(quantized_linears(source, layers, wanted)):
        kind = included_as(part_of(family, name, layers))
        assert kind is not None, name
        bits = wanted[kind] or layer_bits.get(family.layer_of(name) or 0, scheme.bits)
        others.setdefault(scheme.of_bits(bits), []).append(name)
    if Include.LM_HEAD in wanted:
        head = scheme.of_bits(wanted[Include.LM_HEAD] or scheme.bits)
        others.setdefault(head, []).append(family.head)
    return groups_by_part(family, _ascending(experts), _ascending(others))


Value = TypeVar("Value")


def _ascending(found: Mapping[Scheme, Value]) -> dict[Scheme, Value]:
    return dict(sorted(found.items(), key=lambda pair: pair[0].bits))


def _layer_groups(
    source: Source, scheme: Scheme, layer_bits: Mapping[int, int], include: Mapping[Include, int | None]
) -> Groups:
    """Groups where bits go by layer alone: patterns of layers, and `lm_head` by name."""
    if not layer_bits:
        return ()
    layers_of: dict[int, list[int]] = {}
    for layer, bits in sorted(layer_bits.items()):
        layers_of.setdefault(bits, []).append(layer)
    if Include.LM_HEAD in include:
        layers_of.setdefault(scheme.bits, [])
    groups = []
    for bits, layers in sorted(layers_of.items()):
        targets = layers_pattern(source.family, layers)
        if Include.LM_HEAD in include and bits == scheme.bits:
            targets.append("lm_head")
        groups.append((tuple(targets), scheme.of_bits(bits)))
    return tuple(groups)


def bits_text(widths: Iterable[int], parts: Iterable[Include] = ()) -> str:
    """For people: `4 bit`, or `2, 4 and 8 bit by layer`; and of parts with others `attention and shared 8 bit`."""
    found = [str(bits) for bits in sorted(set(widths))]
    text = f"{found[0]} bit" if len(found) == 1 else f"{listed(found)} bit by layer"
    return ", ".join(filter(None, [text, parts_text(parts)]))


def parts_text(parts: Iterable[Include]) -> str:
    """The parts that have bits of their own, such as `shared 4 bit, attention and dense 8 bit`."""
    found: dict[int, list[str]] = {}
    for part, bits in included(parts).items():
        if bits is not None:
            found.setdefault(bits, []).append(str(part))
    return ", ".join(f"{listed(names)} {bits} bit" for bits, names in sorted(found.items()))


def listed(names: Sequence[str]) -> str:
    """`a, b and c`."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def zeros_note(scheme: Scheme, blocks: BlockChoice | None) -> list[str]:
    """Who reads zero points, for the report; nothing where there are none."""
    if scheme.symmetric or blocks is not None:
        return []
    note = (
        "Codes have zero points: transformers does not load such experts, vLLM and SGLang do at 4 bits; exports hold "
        "them (GPTQ for GPTQModel, ONNX, MLX, and GGUF as Q4_1)."
    )
    return [note]


def mixed_note(layer_bits: Mapping[int, int], include: Iterable[Include]) -> list[str]:
    """Who reads mixed bits, for the report; nothing where all experts have one width and all other Linears have one."""
    widths = sorted(set(layer_bits.values()))
    if len(widths) > 1:
        note = (
            f"Bits differ by layer ({', '.join(map(str, widths))}): moepress and its ONNX export read such a folder, "
            "vLLM does for widths that it has kernels for; transformers loads it silently wrong, and there is no GPTQ "
            "layout of it."
        )
        return [note]
    if len(set(included(include).values())) > 1:
        note = (
            "Linears besides the experts have several widths: transformers reads them with its defaults, and wrong "
            "with `dequantize=True`, which takes one width for all of them."
        )
        return [note]
    return []
