"""A run of `quantize` as tasks of a shared run (`runs.work`).

Layers one after the other, each on what the quantized ones before it give, in S shards of windows:

    ends                   what errors cost at the end of the network, where that is asked for
    begin-L                Linears of layer L are solved; its first step; what all of its experts share
    experts-L-P            some experts are solved: a piece of the result, or a part of one
    leave-L-S              shard S goes through the quantized experts: its hidden states before layer L + 1

Independent layers, each on what the original model gives:

    forward-L-S            shard S goes through the original layer L
    begin-L, experts-L-P   as above; no layer waits for the experts of another

and `outer`, what lies outside of the layers. In the first order experts and shards of one layer are done at once, in
the second all layers.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from moepress.runs.work.tasks import Task

TASK_EXPERTS = 12
"""That one task solves at most."""
_BEGIN_COST, _LEAVE_COST, _FORWARD_COST, _OUTER_COST = 6.0, 1.0, 1.0, 2.0
"""In experts of the usual width; measured times take their place as soon as there are any."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Extent:
    """What a graph is made of.

    Attributes:
        parts: for each layer that is walked, how many experts each of its tasks has; a layer without has one of 0.
        shards: how many.
        independent: layers do not wait for one another.
        ends: gradients are gathered first.
        head: lm_head is quantized, which needs the hidden states behind layer `layers - 1`.
        layers: of the model, without MTP layers.
    """

    parts: Sequence[Sequence[int]]
    shards: int
    independent: bool
    ends: bool
    head: bool
    layers: int


def graph(extent: Extent) -> list[Task]:
    """The tasks, each behind those that it needs."""
    tasks: list[Task] = []
    first: tuple[str, ...] = ()
    if extent.ends:
        tasks.append(Task(id="ends", kind="ends", cost=_OUTER_COST * len(extent.parts)))
        first = ("ends",)
    for layer in range(len(extent.parts)):
        own = _independent(extent, layer, first) if extent.independent else _sequential(extent, layer, first)
        tasks += own
        if layer == extent.layers - 1:
            needs = behind(extent, layer) if extent.head else ()
            tasks.append(Task(id="outer", kind="outer", needs=needs, cost=_OUTER_COST, keep=True))
    return tasks


def behind(extent: Extent, layer: int) -> tuple[str, ...]:
    """The tasks that give the hidden states behind a layer, one for each shard; of layer -1 none."""
    if layer < 0:
        return ()
    kind = "forward" if extent.independent else "leave"
    return tuple(f"{kind}-{layer}-{shard}" for shard in range(extent.shards))


def _sequential(extent: Extent, layer: int, first: tuple[str, ...]) -> Iterator[Task]:
    begin = f"begin-{layer}"
    yield Task(id=begin, kind="begin", at=(layer,), needs=(*first, *behind(extent, layer - 1)), cost=_BEGIN_COST)
    yield from _experts(extent, layer, first)
    needs = (begin, *_pieces(extent, layer))
    for shard in range(extent.shards):
        yield Task(id=f"leave-{layer}-{shard}", kind="leave", at=(layer, shard), needs=needs, cost=_LEAVE_COST)


def _independent(extent: Extent, layer: int, first: tuple[str, ...]) -> Iterator[Task]:
    before = behind(extent, layer - 1)
    for shard in range(extent.shards):
        needs = before[shard : shard + 1]
        yield Task(id=f"forward-{layer}-{shard}", kind="forward", at=(layer, shard), needs=needs, cost=_FORWARD_COST)
    yield Task(id=f"begin-{layer}", kind="begin", at=(layer,), needs=(*first, *before), cost=_BEGIN_COST)
    yield from _experts(extent, layer, first)


def _experts(extent: Extent, layer: int, first: tuple[str, ...]) -> Iterator[Task]:
    needs = (*first, f"begin-{layer}")
    for part, (task, experts) in enumerate(zip(_pieces(extent, layer), extent.parts[layer], strict=True)):
        yield Task(id=task, kind="experts", at=(layer, part), needs=needs, cost=float(max(experts, 1)), keep=True)


def _pieces(extent: Extent, layer: int) -> tuple[str, ...]:
    return tuple(f"experts-{layer}-{part}" for part in range(len(extent.parts[layer])))


def piece_of(task: Task) -> str:
    """The piece, or part of one, that a task makes."""
    return "outer" if task.kind == "outer" else f"layer-{task.at[0]}-{task.at[1]}"


def task_of(piece: str) -> str:
    """The task that makes it."""
    return piece if piece == "outer" else piece.replace("layer-", "experts-", 1)
