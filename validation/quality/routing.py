"""How often routers choose other experts than the first model's do on the same tokens, layer by layer.

The first model's choices are kept while its layers run; those of another one are held against them while its own do.
Letters: L layers with experts, N windows, T tokens in a window, B tokens, K experts that a token chooses, E experts.

A token counts as changed where the other model does not choose every expert that the first one chose and that the other
one still has. With all experts there, and as many chosen, that is another set. Where experts were removed, it leaves
out what their removal alone makes of a choice, which is no error of the router: of the first model's choice only the
experts that stayed are asked for.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from moepress.calibration.corpus import EvaluationCorpus
from moepress.errors import InvalidInputError
from moepress.models.forward.scratch import Scratch
from moepress.models.storage.checkpoint import Source
from moepress.models.storage.experts import experts_by_layer
from moepress.models.storage.folder import read_json
from moepress.validation.quality.perplexity import pooled_weights, stratified_mean
from moepress.validation.quality.results import RoutingRow

_TOKENS_AT_ONCE = 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """Which experts of another model a pruned one has.

    Attributes:
        experts: per MoE layer, by their numbers in that model, in the pruned one's order.
        total: how many each layer had.
    """

    experts: Mapping[int, Sequence[int]]
    total: int


def kept_in(folder: Path) -> Kept | None:
    """What a folder's `moepress.json` says of the experts that it kept; None where nothing sound is said."""
    try:
        note = read_json(folder / "moepress.json")
        total, keep = note["experts_before"], note["plan"]["keep"]
        experts = {int(layer): [int(expert) for expert in kept] for layer, kept in keep.items()}
        sound = all(0 <= expert < total for kept in experts.values() for expert in kept)
    except (InvalidInputError, KeyError, TypeError, ValueError, AttributeError):
        return None
    return Kept(experts=experts, total=total) if sound else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Routers:
    """Whose routers are asked.

    Attributes:
        source: the model.
        kept: which experts of its original it has; None: all, or nobody knows.
    """

    source: Source
    kept: Kept | None = None

    def numberings(self) -> list[Kept]:
        """Its experts by their numbers in its original, where these are known, and by their own."""
        counts = experts_by_layer(self.source)
        own = Kept(experts={n: range(count) for n, count in counts.items()}, total=max(counts.values(), default=0))
        if self.kept is None or {n: len(kept) for n, kept in self.kept.experts.items()} != counts:
            return [own]
        return [self.kept, own]


def same_experts(first: Routers, other: Routers) -> dict[int, Tensor] | None:
    """Per MoE layer the number that each expert of the other model has in the first one, int64 [E]; -1: none.

    Experts are the same that have the same number in models of as many experts: in the originals of both, where these
    are known, else in the original of one and in the other, else in both.

    Returns:
        None where no two of these have as many, so that nothing tells which experts are the same.
    """
    for before, after in itertools.product(first.numberings(), other.numberings()):
        if before.total == after.total and before.experts.keys() == after.experts.keys():
            return {layer: _places(before.experts[layer], found) for layer, found in after.experts.items()}
    return None


def _places(before: Sequence[int], after: Sequence[int]) -> Tensor:
    place = {number: at for at, number in enumerate(before)}
    return torch.tensor([place.get(number, -1) for number in after], dtype=torch.int64)


class Choices:
    """What the first model's routers choose, kept in a buffer of its walk: two bytes for each choice.

    Args:
        layers: MoE layers, ascending.
    """

    def __init__(self, layers: Sequence[int]) -> None:
        self._places = {layer: place for place, layer in enumerate(layers)}
        self._buffer: tuple[Tensor, Scratch] | None = None

    def see(self, layer: int, chosen_BK: Tensor, scratch: Scratch) -> None:
        """Keep what all tokens choose in a layer; the buffer is made at the first one, behind those of the walk."""
        if self._buffer is None:
            shape = (len(self._places), *chosen_BK.shape)
            self._buffer = scratch.tensor("choices", shape, torch.int16), scratch
        self.of(layer).copy_(chosen_BK)

    def of(self, layer: int) -> Tensor:
        """The choices of a layer, int16 [B, K]; they live as long as the walk's buffers."""
        assert self._buffer is not None, "the first model was walked before"
        table, scratch = self._buffer
        scratch.touch(table[0].nbytes)
        return table[self._places[layer]]


@dataclass(slots=True, kw_only=True)
class Changes:
    """Another model's choices against the first one's.

    Attributes:
        choices: of the first model.
        numbers: see `same_experts`.
        windows: N.
        changed: per layer the share of changed tokens of each window, fp64 [N].
        common: per layer how many of the first model's choices could be made again, and how many were.
    """

    choices: Choices
    numbers: Mapping[int, Tensor]
    windows: int
    changed: dict[int, Tensor] = field(default_factory=dict)
    common: dict[int, tuple[int, int]] = field(default_factory=dict)

    def see(self, layer: int, chosen_BK: Tensor, _scratch: Scratch) -> None:
        """Compare what all tokens choose in a layer."""
        before, after, numbers = self.choices.of(layer), chosen_BK, self.numbers[layer]
        changed, possible, common = torch.empty(len(before), dtype=torch.bool), 0, 0
        for start in range(0, len(before), _TOKENS_AT_ONCE):
            rows = slice(start, start + _TOKENS_AT_ONCE)
            there, again = chosen_again(before[rows].long(), after[rows], numbers)
            changed[rows] = (there & ~again).any(dim=1)
            possible, common = possible + int(there.sum()), common + int(again.sum())
        self.changed[layer] = changed.view(self.windows, -1).double().mean(dim=1)
        self.common[layer] = (possible, common)

    def rows(self, subject: str, corpus: EvaluationCorpus) -> list[RoutingRow]:
        """A row for each layer and one for their mean; nothing where no layer has experts."""
        if not self.changed:
            return []
        layers = sorted(self.changed)
        totals = (sum(self.common[layer][0] for layer in layers), sum(self.common[layer][1] for layer in layers))
        every = torch.stack([self.changed[layer] for layer in layers]).mean(dim=0)
        found = [(layer, self.changed[layer], self.common[layer]) for layer in layers]
        return [_row(subject, corpus, *cut) for cut in [*found, (None, every, totals)]]


def chosen_again(before_BK: Tensor, after_BK: Tensor, numbers_E: Tensor) -> tuple[Tensor, Tensor]:
    """Which of the first model's choices the other model could make, and which it does make, in any order.

    Args:
        before_BK: the first model's, int64.
        after_BK: the other's, int64, by its own numbers; it may choose another number of experts.
        numbers_E: the number in the first model of each expert of the other, -1 for none, int64.

    Returns:
        Both bool [B, K]; none is in the second that is not in the first.
    """
    there = torch.isin(before_BK, numbers_E)
    return there, (before_BK[:, :, None] == numbers_E[after_BK][:, None, :]).any(dim=2)


def _row(
    subject: str, corpus: EvaluationCorpus, layer: int | None, changed_N: Tensor, counts: tuple[int, int]
) -> RoutingRow:
    index, (possible, common) = corpus.domain_index, counts
    return RoutingRow(
        subject=subject,
        layer=layer,
        tokens=corpus.windows.numel(),
        changed=stratified_mean(changed_N, index, pooled_weights(index, len(corpus.domains))),
        common=common / possible if possible else None,
    )
