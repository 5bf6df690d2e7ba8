"""Down projections that were refitted: where they lie, a file for each layer, and which tensor each of them becomes.

A layer's file holds those of all its experts, `0` to `E - 1` by their new numbers, each in the shape and dtype in which
the model stores it. They are as large as a third of the experts, so each is read when it is asked for.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from moepress.errors import InvalidInputError
from moepress.models.storage.checkpoint import Source
from moepress.models.storage.experts import is_fused
from moepress.models.storage.safetensors_file import Stored, read_bytes, read_header
from moepress.models.storage.tensors import DTYPES


@dataclass(frozen=True, slots=True, kw_only=True)
class DownFiles:
    """Refitted down projections, by layer: those of experts in order, which are read when they are needed."""

    by_layer: Mapping[int, Sequence[Stored]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class DownPlace:
    """Where the down projection of an expert belongs.

    Attributes:
        name: of the tensor; fused experts share one.
        shape: of the expert's part of it.
        dtype: of its values.
        transposed: it is stored [F, D], not [D, F].
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    transposed: bool


def down_places(source: Source, layer: int, experts: int) -> list[DownPlace]:
    """Where the down projections of a layer's experts belong in a source, in order; a row of each tensor is read."""
    family = source.family
    if is_fused(source, layer):
        name = family.fused_names(layer)[1]
        shape, dtype = tuple(source.shapes[name])[1:], source.read_row(name, 0).dtype
        return [DownPlace(name=name, shape=shape, dtype=dtype, transposed=family.fused_transposed)] * experts
    names = [family.expert_names(layer, expert)[-1] for expert in range(experts)]
    rows = [(name, tuple(source.shapes[name]), source.read_row(name, 0).dtype) for name in names]
    return [DownPlace(name=name, shape=shape, dtype=dtype, transposed=False) for name, shape, dtype in rows]


def down_piece(layer: int) -> str:
    """The id of the run's piece that holds a layer's down projections."""
    return f"down-{layer}"


def down_file(layer: int) -> str:
    """The name of a layer's file."""
    return f"down-{layer:05d}.safetensors"


def open_downs(file: Path) -> list[Stored]:
    """What a layer's file holds, in order of the experts.

    Raises:
        InvalidInputError: it is not there, or not whole, or holds something else.
    """
    stored = read_header(file)
    if sorted(stored) != sorted(map(str, range(len(stored)))):
        raise InvalidInputError(f"{file} does not hold the down projections of a layer; repair again.")
    return [stored[str(expert)] for expert in range(len(stored))]


def downs_digest(stored: Sequence[Stored]) -> str:
    """SHA-256 of a layer's down projections as they are stored, one after the other, in hex."""
    digest = hashlib.sha256()
    for entry in stored:
        digest.update(read_bytes(entry))
    return digest.hexdigest()


def downs_by_name(pruned: Source, layer: int, stored: Sequence[Stored], experts: int) -> dict[str, tuple[Stored, ...]]:
    """A layer's down projections by the names that they have in the pruned folder; of a fused tensor all of them.

    Raises:
        InvalidInputError: they are of another model.
    """
    if len(stored) != experts:
        raise InvalidInputError(f"The repair of layer {layer} is not for {experts} experts; repair again.")
    found: dict[str, tuple[Stored, ...]] = {}
    for place, entry in zip(down_places(pruned, layer, experts), stored, strict=True):
        if entry.shape != place.shape or DTYPES[entry.dtype] != place.dtype:
            raise InvalidInputError(f"{entry.file} is not of this model's layer {layer}; repair again.")
        found[place.name] = (*found.get(place.name, ()), entry)
    return found
