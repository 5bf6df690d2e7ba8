"""A model folder on disk: config, index, shards. Opened and checked as a whole, read tensor by tensor.

To open, check and plan one torch is not wanted: what needs it is imported where a tensor is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from moepress.errors import InvalidInputError, UnsupportedError
from moepress.models.families.family import Family, Part, Shape, illegal_count, part_of, shape_of, strange_prefix
from moepress.models.families.routing_keys import is_moe_layer, layer_keys
from moepress.models.families.table import family_of, is_row
from moepress.models.storage.finite import nonfinite
from moepress.models.storage.folder import load_config, open_shards, read_json, unread_weights
from moepress.models.storage.foreign import (
    FP8,
    ONE_SCALE,
    PLAIN_DTYPES,
    SCALE,
    SIDECARS,
    leftover_sidecars,
    refuse_foreign,
    stated_block,
    stated_method,
    stored_method,
)
from moepress.models.storage.outline import Outline, outline_of
from moepress.models.storage.packed import Packed, find_packed
from moepress.models.storage.safetensors_file import Stored
from moepress.models.storage.settled import settle

if TYPE_CHECKING:
    from torch import Tensor


class Source(Protocol):
    """Where weights come from: a folder, a folder seen through a keep list, or a quantized artifact."""

    @property
    def config(self) -> Mapping[str, Any]:
        """config.json."""

    @property
    def family(self) -> Family:
        """The row of the family table."""

    @property
    def outline(self) -> Outline:
        """Its numbers, MoE layers and names by layer, read once."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Names and shapes of the dense tensors that can be read."""

    def read(self, name: str) -> Tensor:
        """One tensor, dequantized where it is stored quantized."""

    def read_row(self, name: str, row: int) -> Tensor:
        """`read(name)[row]`, reading nothing else."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceView:
    """A source as another one shows it: a base for those that change some tensors and keep names and shapes.

    What overrides `read` overrides `read_row` too: neither calls the other.

    Attributes:
        base: the source that is looked at.
    """

    base: Source

    @property
    def config(self) -> Mapping[str, Any]:
        """The base's config."""
        return self.base.config

    @property
    def family(self) -> Family:
        """The row of the family table."""
        return self.base.family

    @property
    def outline(self) -> Outline:
        """The base's outline, for names and shapes stay."""
        return self.base.outline

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The base's tensors."""
        return self.base.shapes

    def read(self, name: str) -> Tensor:
        """One tensor, as the base has it."""
        return self.base.read(name)

    def read_row(self, name: str, row: int) -> Tensor:
        """`read(name)[row]`, reading nothing else."""
        return self.base.read_row(name, row)


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A folder of safetensors shards as published on the Hugging Face hub; also a `Source`.

    Attributes:
        folder: where it lies.
        config: config.json, parsed and settled (`storage.settled`).
        family: its row in the table.
        outline: what config and names say.
        stored: every tensor in every shard, by name, but those that are dropped.
        shards: shard file names in order of their names.
        shapes: the dense tensors that `read` gives (block scales of fp8 weights are not among them).
        block: rows and columns of an fp8 block, or None.
        packed: weights that are stored in other tensors than that, by their dense names.
        notes: what was settled or is left out, for people.
    """

    folder: Path
    config: dict[str, Any]
    family: Family
    outline: Outline
    stored: dict[str, Stored]
    shards: tuple[str, ...]
    shapes: dict[str, tuple[int, ...]]
    block: tuple[int, int] | None = None
    packed: Mapping[str, Packed] = field(default_factory=dict)
    allow_nonfinite: bool = field(default=False)
    notes: tuple[str, ...] = ()

    @property
    def shape(self) -> Shape:
        """The model's numbers."""
        return self.outline.shape

    @property
    def total_bytes(self) -> int:
        """Size of all tensors."""
        return sum(entry.bytes for entry in self.stored.values())

    @property
    def pressed_as(self) -> str | None:
        """How the routed experts are stored, where they have four bits or fewer already; None elsewhere."""
        for name, weight in self.packed.items():
            if weight.bits <= 4 and part_of(self.family, name, self.shape.layers) is Part.ROUTED:
                return weight.packing.value
        return None

    def read(self, name: str) -> Tensor:
        """One tensor; fp8 weights come as fp32, others in their stored dtype.

        Raises:
            InvalidInputError: the tensor holds NaN or Inf, or is not there.
        """
        from moepress.models.storage.fp8 import dequantize_blocks, is_finite
        from moepress.models.storage.placed import place
        from moepress.models.storage.tensors import read_tensor
        from moepress.models.storage.unpack import dequantize

        if name in self.packed:
            return dequantize(self.packed[name], allow_nonfinite=self.allow_nonfinite)
        tensor = read_tensor(self._entry(name))
        if self.stored[name].dtype == FP8 and self.block is not None:
            scales = read_tensor(self._entry(f"{name}_scale_inv"))
            if not self.allow_nonfinite and not is_finite(tensor, scales):
                raise nonfinite(self.stored[name])
            return dequantize_blocks(place(tensor), place(scales), self.block)
        return self._checked(name, tensor)

    def read_row(self, name: str, row: int) -> Tensor:
        """`read(name)[row]` as it is stored, reading nothing else: an expert of a fused tensor, a row of a matrix."""
        from moepress.models.storage.tensors import read_row
        from moepress.models.storage.unpack import dequantize

        packed = self.packed.get(name)
        if packed is not None and len(packed.shape) == 3:
            return dequantize(packed, row, allow_nonfinite=self.allow_nonfinite)
        if packed is not None:
            return dequantize(packed, allow_nonfinite=self.allow_nonfinite)[row]
        entry = self._entry(name)
        return self._checked(name, read_row(entry, row), row if len(entry.shape) == 3 else None)

    def stored_names(self, name: str) -> tuple[str, ...]:
        """The stored tensors that a dense one is made of."""
        if name in self.packed:
            return self.packed[name].part_names
        return tuple(part for part in (name, f"{name}{SCALE}") if part in self.stored)

    def packed_as(self, name: str) -> str | None:
        """How a weight is packed, None where it is stored as it is or in DeepSeek's fp8 blocks."""
        return self.packed[name].packing.value if name in self.packed else None

    def _entry(self, name: str) -> Stored:
        try:
            return self.stored[name]
        except KeyError:
            raise InvalidInputError(f"{self.folder} has no tensor {name}; download or copy the folder again.") from None

    def _checked(self, name: str, tensor: Tensor, expert: int | None = None) -> Tensor:
        from moepress.models.storage.placed import place
        from moepress.models.storage.tensors import require_finite

        if not self.allow_nonfinite:
            require_finite(self.stored[name], tensor, expert)
        return place(tensor)


def open_checkpoint(folder: Path, *, allow_nonfinite: bool = False) -> Checkpoint:
    """Open a plain (bf16, fp16, fp32) or fp8 block-scaled model folder; reads headers, no weights.

    Raises:
        InvalidInputError: something in the folder is missing, surplus, corrupt or leads out of it.
        UnsupportedError: the family or the way of quantization is not handled.
    """
    config = load_config(folder)
    if is_row(config) or not isinstance(config.get("model_type"), str):
        shape_of(family_of(config), config)  # refuses what no header need be read for
    every, shards = open_shards(folder)
    refuse_foreign(folder, config, every)
    packed = _packed(folder, config, every)
    family = family_of(config, _dense_shapes(every, packed))
    unread = unread_weights(folder, shards, every)
    settled = settle(family, config, every)
    stored, block = settled.stored, None if packed else fp8_block(settled.config)
    parts = {part for weight in packed.values() for part in weight.part_names}
    for name, entry in stored.items():
        if name in parts:
            continue
        if name.endswith(SCALE):
            _check_scale(entry, stored)
        elif not (family.derived and entry.dtype in _TABLE_DTYPES):
            _check_storage(entry, stored, block)
    shapes = _dense_shapes(stored, packed)
    outline = outline_of(family, settled.config, shapes)
    require_bounded(family, settled.config, outline.shape, shapes, folder)
    return Checkpoint(
        folder=folder,
        config=settled.config,
        family=family,
        outline=outline,
        stored=stored,
        shards=shards,
        shapes=shapes,
        block=block,
        packed=packed,
        allow_nonfinite=allow_nonfinite,
        notes=(*unread, *(() if packed else leftover_sidecars(folder)), *settled.notes),
    )


_TABLE_DTYPES = ("I64", "I32")


def _packed(folder: Path, config: Mapping[str, Any], stored: Mapping[str, Stored]) -> dict[str, Packed]:
    """Weights that lie in other tensors than one; none of a plain folder, or one in DeepSeek's fp8 blocks."""
    found = stored_method(stored)
    if found is None or (found[0] == ONE_SCALE and stated_block(config) is not None):
        return {}
    stated = config.get("quantization_config")
    if stated is not None and not (isinstance(stated, dict) and isinstance(stated.get("quant_method"), str)):
        raise InvalidInputError(
            f"{folder / 'config.json'}: quantization_config names no quant_method, and {found[1].name} is quantized; "
            "take config.json from the original folder."
        )
    sidecar = next((folder / name for name in SIDECARS if (folder / name).is_file()), None)
    told = config if stated_method(config) is not None or sidecar is None else read_json(sidecar)
    return find_packed(told, stored)


def _dense_shapes(stored: Mapping[str, Stored], packed: Mapping[str, Packed]) -> dict[str, tuple[int, ...]]:
    """The tensors that can be read, and their shapes."""
    parts = {part for weight in packed.values() for part in weight.part_names}
    plain = {n: e.shape for n, e in stored.items() if n not in parts and not n.endswith(SCALE)}
    return plain | {name: weight.shape for name, weight in packed.items()}


def _check_scale(scale: Stored, stored: Mapping[str, Stored]) -> None:
    weight = stored.get(scale.name.removesuffix(SCALE))
    if weight is None or weight.dtype != FP8:
        raise InvalidInputError(f"{scale.file}: {scale.name} belongs to no fp8 weight; restore the original folder.")


def _check_storage(entry: Stored, stored: Mapping[str, Stored], block: tuple[int, int] | None) -> None:
    """Refuse what is neither a plain floating-point tensor nor an fp8 matrix with its block scales."""
    if entry.dtype in PLAIN_DTYPES:
        return
    if entry.dtype != FP8:
        raise InvalidInputError(
            f"{entry.file}: {entry.name} has dtype {entry.dtype}, but weights are {', '.join(PLAIN_DTYPES)} or "
            "block-scaled F8_E4M3; restore the original folder."
        )
    scale = stored.get(f"{entry.name}_scale_inv")
    if block is None or scale is None:
        raise InvalidInputError(
            f"{entry.file}: {entry.name} is fp8 but its {entry.name}_scale_inv or the block size in config.json is "
            "missing; restore the original folder."
        )
    wanted = tuple(-(-n // b) for n, b in zip(entry.shape, block, strict=True)) if len(entry.shape) == 2 else None
    if scale.shape != wanted or scale.dtype not in PLAIN_DTYPES:
        raise InvalidInputError(
            f"{scale.file}: {scale.name} is {scale.dtype} {list(scale.shape)}, which does not fit {entry.name} "
            f"{list(entry.shape)} in blocks of {block[0]} x {block[1]}; restore the original folder."
        )


def require_bounded(
    family: Family, config: Mapping[str, Any], shape: Shape, shapes: Mapping[str, tuple[int, ...]], folder: Path
) -> None:
    """Hold the numbers of a config against the tensors that are there, before anything is built by those numbers.

    Raises:
        InvalidInputError: there are fewer layers than the config states, the routers have other sizes or lie in other
            layers, or all names have another prefix.
    """
    names = {name: name for name in shapes} if family.derived else {family.module_name(name): name for name in shapes}
    prefix = None if family.derived else strange_prefix(names)
    if prefix is not None:
        raise InvalidInputError(f"{folder}: {prefix}.")
    there = {family.layer_of(name) for name in names} - {None}
    if shape.layers > len(there):
        raise InvalidInputError(
            f"{folder}: config.json states {shape.layers} layers and the shards hold {len(there)}; restore the folder."
        )
    illegal = illegal_count(shape, shape.experts)
    if illegal is not None:
        raise InvalidInputError(f"{folder}: config.json states {shape.experts} experts, but {illegal}; restore it.")
    router, found, dense = family.router[0], False, list[int]()
    router = router if family.derived else family.module_name(router)
    for layer in range(shape.layers):
        name = names.get(router.format(layer=layer))
        if name is None:
            dense.append(layer)
            continue
        found = True
        wide = shapes[name][1:] if family.derived else (shape.hidden,)  # a router may have a width of its own
        if shapes[name] != (shape.experts + family.router_extra, *wide):
            raise InvalidInputError(
                f"{folder}: {name} has shape {list(shapes[name])}, but config.json states {shape.experts} experts and "
                f"hidden size {shape.hidden}; restore the folder."
            )
    if not found:
        raise InvalidInputError(f"{folder} has no router ({family.router[0]}); give a mixture-of-experts model.")
    without = set(dense)
    wrong = [layer for layer in range(shape.layers) if is_moe_layer(family, config, layer) == (layer in without)]
    if wrong:
        stated, held = ("dense", "a router") if wrong[0] not in dense else ("a layer of experts", "no router")
        raise InvalidInputError(
            f"{folder}: by config.json layer {wrong[0]} is {stated} ({layer_keys(family, config)}), and the shards "
            "hold "
            f"{held} for it; mend config.json, or download the shards again."
        )


def fp8_block(config: Mapping[str, Any]) -> tuple[int, int] | None:
    """The fp8 block size that a config states, or None for an unquantized model.

    Raises:
        UnsupportedError: another quantization method.
    """
    method, block = stated_method(config), stated_block(config)
    if method is None or block is not None:
        return block
    raise UnsupportedError(
        f"The model is already quantized ({method}); start from its original bf16, fp16, fp32 or fp8 block-scaled "
        "folder."
    )
