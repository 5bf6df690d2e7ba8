"""Repair after pruning: the two streams that walk side by side, and what is known of a layer's tokens.

Shapes: T tokens, K experts a token, J slots of a token (`slots_of`), E kept experts, D hidden size.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moepress.compress.pruning.repair import Repair, loads
from moepress.models.forward.costs import expert_flops
from moepress.models.forward.scratch import Rows
from moepress.models.forward.streamed import apply_expert
from moepress.models.forward.walk import Stream
from moepress.models.storage.experts import Expert
from moepress.runs.phases import phase

ROWS_AT_ONCE = 2048
CHUNK_BYTES = 16 << 20


def slots_of(parts: frozenset[Repair], top_k: int) -> int:
    """J: how many experts of a token have their outputs kept.

    Those that the pruned router chooses; with a bias those that it chooses then; with a router as many again, the next
    in rank.
    """
    return top_k * (1 + (Repair.BIAS in parts) + (Repair.ROUTER in parts))


@dataclass(frozen=True, slots=True, kw_only=True)
class Walk:
    """Both streams, and the buffers of a layer.

    Attributes:
        original: the model that was pruned.
        pruned: the same seen through the keep list.
        keep: layer -> experts kept, ascending, by their old numbers.
        parts: what is repaired.
        routed: the original's routed output, fp32 [T, D].
        table: the kept experts' outputs, T * J rows.
        gram: their inner products, fp32 [T, J, J], where routers are refitted.
        moment: those with the target, fp32 [T, J], likewise.
        lacking: what the pruned routed output lacks, fp32 [T, D], where down projections are refitted.
    """

    original: Stream
    pruned: Stream
    keep: Mapping[int, Sequence[int]]
    parts: frozenset[Repair]
    routed: Tensor
    table: Rows
    gram: Tensor | None = None
    moment: Tensor | None = None
    lacking: Tensor | None = None

    @property
    def slots(self) -> int:
        """J."""
        return self.table.count // self.original.tokens

    def target(self, rows: slice) -> Tensor:
        """What some tokens lack, before the routed experts, for the original's layer output: fp32 [T, D]."""
        return self.original.flat()[rows].float() + self.routed[rows] - self.pruned.flat()[rows].float()


@dataclass(frozen=True, slots=True, kw_only=True)
class Routing:
    """Which kept experts' outputs are known of every token, and how a routing weighs them.

    Attributes:
        slots: expert numbers, int64 [T, J]; E where a slot is empty.
        weights: of the pruned router as it is, fp32 [T, J], 0 in slots that it does not choose.
        other: of the router with another bias or other rows, likewise; None where both stay.
        bias: that other bias.
        load_before, load_after: distance of the loads from those wanted.
    """

    slots: Tensor
    weights: Tensor
    other: Tensor | None = None
    bias: Tensor | None = None
    load_before: float | None = None
    load_after: float | None = None


def outputs_of(
    stream: Stream, matrices: Expert, layer: int, places: tuple[Tensor, Tensor]
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """An expert's outputs for a stream's tokens, a part at a time: tokens, slots, outputs on the CPU."""
    gating = stream.model.gating(layer)
    for tokens, slots in zip(*(part.split(ROWS_AT_ONCE) for part in places), strict=True):
        if not len(tokens):
            continue
        with phase("forward", flops=expert_flops(matrices, len(tokens))):
            output = apply_expert(matrices, stream.inputs[tokens].to(stream.model.device), gating).to("cpu")
        stream.touch(len(tokens))
        yield tokens, slots, output


def chunks(walk: Walk, routing: Routing) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """All tokens in chunks: rows, slots int64 [T, J] and outputs fp32 [T, J, D], with zeros in empty slots."""
    width, slots = walk.table.width, walk.slots
    size, experts = max(1, CHUNK_BYTES // (4 * width * slots)), walk.pruned.model.shape.experts
    for start in range(0, walk.pruned.tokens, size):
        rows = slice(start, min(start + size, walk.pruned.tokens))
        chosen = routing.slots[rows]
        empty = chosen == experts
        outputs = walk.table.get(rows.start * slots, rows.stop * slots).float().view(-1, slots, width)
        yield rows, chosen.masked_fill(empty, 0), outputs.masked_fill(empty[:, :, None], 0.0)


def wanted_loads(chosen_TK: Tensor, kept: Sequence[int], experts: int) -> Tensor:
    """The kept experts' loads in the original, as shares of their sum, fp64 [E]; each gets one choice more."""
    counts = torch.bincount(chosen_TK.reshape(-1), minlength=experts)[torch.tensor(list(kept))].double() + 1
    return counts / counts.sum()


def distance(chosen_TK: Tensor, wanted_E: Tensor) -> float:
    """Half the sum of |load - load wanted|: the share of all choices that would have to move."""
    return 0.5 * float((loads(chosen_TK, len(wanted_E)) - wanted_E).abs().sum())
