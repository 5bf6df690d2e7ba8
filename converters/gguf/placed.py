"""Where the tensors of a GGUF file come from: names, orders of rows and columns, experts side by side.

llama.cpp's names are those of the `gguf` package's tables; what it lays out otherwise than transformers (rotated
halves, latent keys and values, heads of linear attention, experts stacked) is a reordering of rows or runs of columns.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moepress.converters.gguf.architectures import Architecture, head_size
from moepress.converters.safetensors.artifact import Artifact
from moepress.errors import UnsupportedError
from moepress.models.families.family import Part, part_of
from moepress.models.families.hf_config import hf_config
from moepress.models.storage.block_types import TYPES
from moepress.models.storage.blocks import Blocks, pack
from moepress.models.storage.checkpoint import Checkpoint, Source
from moepress.models.storage.experts import bias_names, is_fused, read_expert, router_disk_names
from moepress.models.storage.packed import Packing
from moepress.models.storage.tensors import read_row

Folder = Checkpoint | Artifact
Reorder = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Matrices:
    """Where the weights of a tensor come from: one matrix, or one of every expert.

    Attributes:
        names: on disk, where each is a tensor of its own; one of them tells type and shape of all.
        made: gives number i as a dense matrix, where they lie together in another tensor; None otherwise.
        blocks: gives number i as bytes of MXFP4, where they lie so in another tensor; None otherwise.
        count: how many there are.
        stacked: the tensor has an axis for them.
        rows: another order of the rows.
        columns: another order of the columns, in runs of 32.
    """

    names: Sequence[str] = ()
    made: Callable[[int], Tensor] | None = None
    blocks: Callable[[int], Tensor] | None = None
    shape: tuple[int, ...] = ()
    count: int = 1
    stacked: bool = False
    rows: Reorder | None = None
    columns: Tensor | None = None


def exactly(source: Folder, name: str) -> Tensor:
    """A dense tensor; of codes their exact products."""
    if isinstance(source, Artifact) and source.is_quantized(name):
        return replace(source, exact=True).read(name)
    return source.read(name)


Placed = tuple[str, Matrices, int | None, Part]


def placed_tensors(source: Folder, row: Architecture) -> Iterator[Placed]:
    """Every tensor of the file with where it comes from, layer by layer; multi-token prediction is left out.

    Raises:
        UnsupportedError: llama.cpp's architecture has no place for one.
    """
    outline, layers = source.outline, source.outline.shape.layers
    lookup = _lookup(row, layers)
    tied = bool(hf_config(source.config).get_text_config().tie_word_embeddings)
    for name in outline.names_by_layer.get(None, ()):
        if name == source.family.head and tied:
            continue
        if name == source.family.embeddings and tied and row.own_head:
            yield "output.weight", Matrices(names=(name,)), None, Part.LM_HEAD
        if part_of(source.family, name, layers) is Part.TOWERS:
            continue
        yield _one(source, row, lookup, name, None)
    for layer in range(layers):
        yield from _layer(source, row, lookup, layer)


def _layer(source: Folder, row: Architecture, lookup: Callable[[str], str | None], layer: int) -> Iterator[Placed]:
    ours = _expert_tensors(source, layer) if layer in source.outline.moe_layers else set()
    for name in source.outline.names_by_layer.get(layer, ()):
        if name in ours:
            continue
        if row.latent and name.endswith("kv_b_proj.weight"):
            yield from _split_latent(source, name, layer)
        elif row.delta and name.endswith("in_proj_qkvz.weight"):
            yield from _split_delta(source, name, layer)
        else:
            yield _one(source, row, lookup, name, layer)
    if layer in source.outline.moe_layers:
        yield from _stacks(source, layer)


def _expert_tensors(source: Folder, layer: int) -> set[str]:
    """Names on disk of all that belongs to single experts."""
    family = source.family
    if is_fused(source, layer):
        return set(family.fused_names(layer))
    return {name for name in source.outline.names_by_layer.get(layer, ()) if family.expert_of(name) is not None}


def _one(
    source: Folder, row: Architecture, lookup: Callable[[str], str | None], name: str, layer: int | None
) -> Placed:
    part = part_of(source.family, name, source.outline.shape.layers)
    routers = router_disk_names(source, layer) if layer in source.outline.moe_layers and layer is not None else ()
    found = lookup(source.family.module_name(name))
    if found is None:
        raise UnsupportedError(
            f"{name} can not be exported to GGUF: llama.cpp's {row.name} has no place for such a tensor."
        )
    reorder = _turned(source, name) if row.interleaved else None
    shape = source.shapes[name]
    if len(shape) == 2 and 1 in shape and part is Part.ROUTER and name not in routers:  # a shared expert's gate
        return found, Matrices(names=(name,), shape=(math.prod(shape),), rows=torch.flatten), layer, part
    if name in routers and len(shape) == 2 and 1 in shape:  # a correction [1, E]
        return found, Matrices(names=(name,), shape=(math.prod(shape),), rows=torch.flatten), layer, Part.ROUTER
    if row.tiled and ".linear_attn." in name and (turned := _tiled(source, name)) is not None:
        return found, turned, layer, Part.ATTENTION if len(shape) == 2 else Part.NORMS
    if (other := _computed(row, name, shape)) is not None:
        new_shape, reorder = other
        return found, Matrices(names=(name,), shape=new_shape, rows=reorder), layer, Part.NORMS
    kind = Part.ROUTER if name in routers else part
    return found, Matrices(names=(name,), rows=reorder), layer, kind


def _computed(row: Architecture, name: str, shape: tuple[int, ...]) -> tuple[tuple[int, ...], Reorder] | None:
    """Small tensors that llama.cpp wants computed beforehand: shape, and the function."""
    if row.one_more and name.endswith("norm.weight") and not name.endswith("linear_attn.norm.weight"):
        return shape, lambda tensor: tensor.float() + 1
    if row.delta and name.endswith("A_log"):
        return shape, lambda tensor: -tensor.float().exp()
    if row.delta and name.endswith("conv1d.weight"):
        return (shape[0], shape[2]), lambda tensor: tensor.squeeze(1)
    return None


def column_runs(source: Source, row: Architecture) -> dict[str, int]:
    """Matrices whose columns llama.cpp wants in another order -> how many of them stay together."""
    if not row.tiled:
        return {}
    turned = {name: _tiled(source, name) for name in source.shapes if name.endswith("linear_attn.out_proj.weight")}
    return {name: run_of(of.columns) for name, of in turned.items() if of is not None and of.columns is not None}


def run_of(columns: Tensor) -> int:
    """The longest runs of neighbours that an order of columns keeps, all of one length, each at a multiple of it."""
    breaks = torch.nonzero(columns[1:] != columns[:-1] + 1).flatten() + 1
    return math.gcd(len(columns), *breaks.tolist(), *columns[breaks].tolist())


def _tiled(source: Source, name: str) -> Matrices | None:
    """A tensor of linear attention with the heads of its values tiled over those of keys; None where it has none."""
    config = hf_config(source.config).get_text_config()
    keys, heads = int(config.linear_num_key_heads), int(config.linear_num_value_heads)
    size, wide = int(config.linear_key_head_dim), int(config.linear_value_head_dim)

    def order(width: int) -> Tensor:
        by_key: Tensor = torch.arange(heads * width).view(keys, heads // keys, width)
        return by_key.transpose(0, 1).flatten()

    before = 2 * keys * size
    behind = torch.cat((torch.arange(before), before + order(wide)))  # queries and keys stay
    leaf, shape = name.rpartition("linear_attn.")[2], source.shapes[name]
    if leaf == "A_log":
        return Matrices(names=(name,), shape=shape, rows=lambda tensor: -tensor.float().exp()[order(1)])
    if leaf == "conv1d.weight":
        return Matrices(names=(name,), shape=(shape[0], shape[2]), rows=lambda tensor: tensor.squeeze(1)[behind])
    if leaf == "out_proj.weight":
        return Matrices(names=(name,), columns=order(wide))
    index = {"in_proj_qkv.weight": behind, "in_proj_z.weight": order(wide)}
    index |= dict.fromkeys(("in_proj_a.weight", "in_proj_b.weight", "dt_bias"), order(1))
    return Matrices(names=(name,), shape=shape, rows=_picking(index[leaf])) if leaf in index else None


def _split_delta(source: Folder, name: str, layer: int) -> Iterator[Placed]:
    """in_proj_qkvz as llama.cpp has it: its rows lie head by head, and are wanted q, k, v of all heads, and z apart."""
    config = hf_config(source.config).get_text_config()
    heads, size = int(config.linear_num_key_heads), int(config.linear_key_head_dim)
    wide = int(config.linear_value_head_dim) * int(config.linear_num_value_heads) // heads
    rows = torch.arange(source.shapes[name][0]).unflatten(0, (heads, 2 * size + 2 * wide))
    q, k, v, z = (part.flatten() for part in rows.split((size, size, wide, wide), dim=1))
    columns = source.shapes[name][1]
    for leaf, index in (("attn_qkv", torch.cat((q, k, v))), ("attn_gate", z)):
        picked = Matrices(names=(name,), shape=(len(index), columns), rows=_picking(index))
        yield f"blk.{layer}.{leaf}.weight", picked, layer, Part.ATTENTION


def _picking(index: Tensor) -> Reorder:
    def reorder(rows: Tensor) -> Tensor:
        return rows[index]

    return reorder


def _lookup(row: Architecture, layers: int) -> Callable[[str], str | None]:
    """llama.cpp's name of one of transformers', or None."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    arch = next(key for key, name in MODEL_ARCH_NAMES.items() if name == row.name)
    table = get_tensor_name_map(arch, layers)

    def found(name: str) -> str | None:
        for old, new in row.renames:
            name = name.replace(old, new)
        place: str | None = table.get_name(name, try_suffixes=(".weight", ".bias"))
        return place

    return found


def _turned(source: Folder, name: str) -> Reorder | None:
    """The order of q's and k's rows in which neighbours turn together, from that in which halves do."""
    config = hf_config(source.config).get_text_config()
    leaf = name.rsplit(".", 2)[-2]
    if leaf not in ("q_proj", "k_proj"):
        return None
    size = head_size(config)

    def reorder(rows: Tensor) -> Tensor:
        turned: Tensor = rows.unflatten(0, (-1, 2, size // 2)).transpose(1, 2).flatten(0, 2).contiguous()
        return turned

    return reorder


def _split_latent(source: Folder, name: str, layer: int) -> Iterator[Placed]:
    """kv_b_proj as llama.cpp has it: keys' half [H, lora, nope] transposed, values' half [H, v, lora]."""
    config = hf_config(source.config).get_text_config()
    heads, nope = int(config.num_attention_heads), int(config.qk_nope_head_dim)
    latent, width = int(config.kv_lora_rank), int(config.v_head_dim)

    def half(first: bool) -> Callable[[int], Tensor]:
        def made(_number: int) -> Tensor:
            whole = exactly(source, name).unflatten(0, (heads, nope + width))
            part: Tensor = (whole[:, :nope].mT if first else whole[:, nope:]).contiguous()
            return part

        return made

    shapes = ((heads, latent, nope), (heads, width, latent))
    for leaf, first, shape in (("attn_k_b", True, shapes[0]), ("attn_v_b", False, shapes[1])):
        yield f"blk.{layer}.{leaf}.weight", Matrices(made=half(first), shape=shape), layer, Part.ATTENTION


def _stacks(source: Folder, layer: int) -> Iterator[Placed]:
    """The experts of a layer, one tensor a projection."""
    family, experts = source.family, _experts(source, layer)
    fused = is_fused(source, layer)
    for place, leaf in enumerate(("gate", "up", "down")):
        name = f"blk.{layer}.ffn_{leaf}_exps"
        if fused:
            shape, made = _of_fused(source, layer, leaf)
            found = Matrices(made=made, blocks=_of_mxfp4(source, layer, leaf), shape=shape, count=experts, stacked=True)
            yield f"{name}.weight", found, layer, Part.ROUTED
        else:
            names = [family.expert_names(layer, expert)[place] for expert in range(experts)]
            yield f"{name}.weight", Matrices(names=names, count=experts, stacked=True), layer, Part.ROUTED
        if fused and family.fused_biases:
            yield f"{name}.bias", _fused_biases(source, layer, leaf, experts), layer, Part.ROUTED
        elif not fused and bias_names(family, layer, 0)[f"{leaf}_bias"] in source.shapes:
            biases = [bias_names(family, layer, expert)[f"{leaf}_bias"] for expert in range(experts)]
            yield f"{name}.bias", Matrices(names=biases, count=experts, stacked=True), layer, Part.ROUTED


def _experts(source: Folder, layer: int) -> int:
    """Experts of a layer, as many as everywhere: the file states one number."""
    from moepress.models.storage.experts import experts_by_layer

    counts = experts_by_layer(source)
    if len(set(counts.values())) > 1:
        raise UnsupportedError(
            "Layers with different numbers of experts can not be exported to GGUF, which states one number for all; "
            "plan with the same number in every layer."
        )
    return counts[layer]


def _of_fused(source: Folder, layer: int, leaf: str) -> tuple[tuple[int, ...], Callable[[int], Tensor]]:
    family = source.family
    _experts_axis, first, second = source.shapes[family.at(family.fused_down, layer)]
    hidden, width = (second, first) if family.fused_transposed else (first, second)

    def made(expert: int) -> Tensor:
        found = getattr(read_expert(source, layer, expert), leaf)
        assert isinstance(found, Tensor)
        return found.contiguous()

    return ((hidden, width) if leaf == "down" else (width, hidden)), made


def _of_mxfp4(source: Folder, layer: int, leaf: str) -> Callable[[int], Tensor] | None:
    """The bytes of a layer's experts where they are MXFP4 as gpt-oss has it: the same codes and exponents, re-laid."""
    family = source.family
    name = family.at(family.fused_down if leaf == "down" else family.fused_gate_up, layer)
    packed = source.packed.get(name) if isinstance(source, Checkpoint) else None
    if packed is None or packed.packing is not Packing.MXFP4 or len(packed.parts["codes"].shape) != 4:
        return None
    rows = slice(None)
    if leaf != "down":
        width = packed.shape[1] // 2
        of_gate = leaf == "gate"
        rows = (
            slice(0 if of_gate else 1, None, 2)
            if family.fused_interleaved
            else slice(0 if of_gate else width, width if of_gate else None)
        )

    def blocks(expert: int) -> Tensor:
        codes, scales = (read_row(packed.parts[part], expert) for part in ("codes", "scales"))
        pairs = codes[rows]  # [O, G, 16] bytes: the even column low, the odd one high
        return pack(
            TYPES["MXFP4"],
            Blocks(codes=torch.stack((pairs & 15, pairs >> 4), dim=-1).flatten(1), d=scales[rows].view(torch.uint8)),
        )

    return blocks


def _fused_biases(source: Folder, layer: int, leaf: str, experts: int) -> Matrices:
    family = source.family
    first, down = (family.at(name, layer) for name in family.fused_biases)
    size = source.shapes[down if leaf == "down" else first][1] // (1 if leaf == "down" else 2)

    def made(expert: int) -> Tensor:
        row = source.read_row(down if leaf == "down" else first, expert)
        if leaf == "down":
            return row
        halves = (row[0::2], row[1::2]) if family.fused_interleaved else row.chunk(2)
        return halves[0 if leaf == "gate" else 1].contiguous()

    return Matrices(made=made, shape=(size,), count=experts, stacked=True)
