"""What rounding one kind of matrix in a range of layers does to the model's answers, measured end to end.

A few windows flow through the model once for every kind and range of layers, side by side so that each layer is read
once, each time with that kind alone rounded to nearest, and the KL divergence to the model's own answers is taken at
the end. Divergence grows with the square of a small error and errors of different matrices are independent, so their
divergences add up, nearly: what all of them together give is measured too, and `together` says how nearly.

The rounding is coarse on purpose and cheap (`rounded`): a type's own loss follows from it by the ratio of the errors
that both give the experts' outputs (`bit_losses`).
"""

import itertools
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moepress.calibration.corpus import Corpus, sampled
from moepress.compress.budget.rounding import rounded, rounded_expert
from moepress.compress.budget.sensitivities import TOKENS, KindLoss, ranges_of
from moepress.compress.gptq.include import IN_LAYERS, linear_groups
from moepress.compress.gptq.kinds import OUTSIDE, Kind, kind_of
from moepress.models.forward.streamed import StreamedModel, require_finite_hidden, tokens_of
from moepress.models.forward.walk import (
    Limits,
    Scratch,
    Stream,
    add_output,
    first_step,
    last_step,
    open_stream,
    read_ahead,
)
from moepress.models.storage.checkpoint import SourceView
from moepress.models.storage.experts import Expert
from moepress.models.storage.safetensors_file import read_header
from moepress.models.storage.writer import write_json, write_shard
from moepress.runs.journal import Run
from moepress.runs.memory import release_memory
from moepress.runs.phases import in_layer, phase
from moepress.runs.progress import track

_ROWS = 128  # of logits at a time
_PIECE, _RESULT = "kind-hidden-", "kind-losses"


@dataclass(frozen=True, slots=True)
class _Variant:
    """One way through the model: these kinds are rounded from one layer to another."""

    kinds: frozenset[Kind]
    first: int
    last: int

    def rounds(self, layer: int) -> frozenset[Kind]:
        return self.kinds if self.first <= layer <= self.last else frozenset()

    @property
    def name(self) -> str:
        return f"{'+'.join(sorted(self.kinds)) or 'plain'} {self.first}-{self.last}"


_PLAIN = _Variant(frozenset(), 0, -1)


@dataclass(frozen=True, slots=True, kw_only=True)
class _RoundedOutside(SourceView):
    """A model with its embeddings and its head rounded, and nothing else."""

    def read(self, name: str) -> Tensor:
        tensor = self.base.read(name)
        return rounded(tensor) if name in (self.family.embeddings, self.family.head) else tensor

    def read_row(self, name: str, row: int) -> Tensor:
        tensor = self.base.read_row(name, row)
        return rounded(tensor[None])[0] if name in (self.family.embeddings, self.family.head) else tensor


def sample(corpus: Corpus) -> Tensor:
    """Windows [N, T] of all domains, `TOKENS` in all or a little more."""
    return sampled(corpus, TOKENS, least=2)


def kind_losses(model: StreamedModel, windows_NT: Tensor, run: Run, limits: Limits) -> list[KindLoss]:
    """Measure all kinds in all ranges of layers; what was done is found again when the run is resumed.

    Args:
        model: the original; computed in fp32 whatever its dtype, for differences are small.
        windows_NT: int64, see `sample`.
        run: hidden states before every range are pieces of it, the result is the last one.
        limits: memory and batch size.
    """
    done = run.done(_RESULT)
    if done is not None:
        return [KindLoss.model_validate(row) for row in done.note["rows"]]
    model = StreamedModel(model.source, device=model.device, dtype=torch.float32)
    walk = _Walk(model, windows_NT, run.folder, limits)
    layers = model.shape.layers
    try:
        with torch.inference_mode(), track("losses by kind", layers, unit="layers") as advance:
            first = _resume(run, walk)
            advance(first)
            for layer in range(first, layers):
                with in_layer(layer), phase("other"):
                    if layer in walk.starts:
                        _keep(run, walk, layer)
                        walk.start(layer)
                    walk.step(layer)
                advance(1)
            rows = walk.divergences()
    finally:
        walk.close()
    plain = [row.model_dump(mode="json") for row in rows]

    def write(path: Path) -> Mapping[str, Any]:
        write_json(path, {"rows": plain})
        return {"rows": plain}

    run.write(_RESULT, f"{_RESULT}.json", write)
    _forget(run)
    return rows


def drop_kind_losses(run: Run) -> None:
    """Remove what only a resume needed."""
    if run.done(_RESULT) is not None:
        run.drop(_RESULT)


def _keep(run: Run, walk: "_Walk", layer: int) -> None:
    """Hidden states of all streams before a range of layers, so that a resume repeats no more than one."""
    if layer == 0 or run.done(f"{_PIECE}{layer}"):
        return
    entries = [entry for variant, stream in walk.streams.items() for entry in stream.kept(variant.name)]
    run.write(f"{_PIECE}{layer}", f"{_PIECE}{layer:05d}.safetensors", lambda path: write_shard(path, entries))
    for before in walk.starts:
        if before < layer:
            run.drop(f"{_PIECE}{before}")


def _resume(run: Run, walk: "_Walk") -> int:
    """The layer to go on with, everything before it restored."""
    for layer in reversed(walk.starts):
        piece = run.done(f"{_PIECE}{layer}")
        if piece is None:
            continue
        for start in walk.starts:
            if start < layer:
                walk.start(start)
        stored = read_header(run.path(piece))
        for variant, stream in walk.streams.items():
            stream.restore(stored, variant.name)
        return layer
    return 0


def _forget(run: Run) -> None:
    for piece in sorted(piece for piece in run.pieces if piece.startswith(_PIECE)):
        run.drop(piece)


class _Walk:
    """All variants on their way through one model."""

    def __init__(self, model: StreamedModel, windows_NT: Tensor, folder: Path, limits: Limits) -> None:
        self.model, self.windows, self.folder, self.limits = model, windows_NT, folder, limits
        self.outside = StreamedModel(_RoundedOutside(base=model.source), device=model.device, dtype=model.dtype)
        self.tied = model.family.head not in model.source.shapes
        self.groups = {layer: self._linears(layer) for layer in range(model.shape.layers)}
        self.ranges = ranges_of(model.shape.layers)
        self.starts = [first for first, _ in self.ranges]
        self.streams: dict[_Variant, Stream] = {}
        self.scratches: list[Scratch] = []
        self.most = 3 + sum(len(self._kinds(layers)) for layers in self.ranges)

    def close(self) -> None:
        """Remove the buffers' files."""
        for scratch in self.scratches:
            scratch.close()

    def _scratch(self) -> Scratch:
        """For the buffers of one stream."""
        name, share = f"kinds-{len(self.scratches)}", self.limits.memory_bytes // self.most
        self.scratches.append(Scratch(self.folder, share, name))
        return self.scratches[-1]

    def _linears(self, layer: int) -> dict[Kind, list[str]]:
        source, found = self.model.source, dict[Kind, list[str]]()
        for group in linear_groups(source, layer, self.model.shape.layers, IN_LAYERS):
            kind = kind_of(source.family, group.names[0])
            if kind is not None:
                found.setdefault(kind, []).extend(group.names)
        return found

    def _kinds(self, layers: tuple[int, int]) -> list[Kind]:
        there = {kind for layer in range(layers[0], layers[1] + 1) for kind in self.groups[layer]}
        if any(layer in self.model.moe_layers for layer in range(layers[0], layers[1] + 1)):
            there |= {Kind.EXPERTS, Kind.DOWN}
        return sorted(there)

    @property
    def _every(self) -> _Variant:
        return _Variant(frozenset(Kind), 0, self.model.shape.layers - 1)

    @property
    def _embedded(self) -> _Variant:
        return _Variant(frozenset({Kind.EMBEDDINGS}), 0, -1)

    def start(self, layer: int) -> None:
        """Open the streams of the range that begins with a layer; before the first one those of the whole model."""
        if layer == 0 and not self.streams:
            self.streams[_PLAIN] = self._opened(self.model)
            for variant in (self._embedded, self._every):
                self.streams[variant] = self._opened(self.outside)
                self.streams[variant].model = self.model
        layers = next(found for found in self.ranges if found[0] == layer)
        for kind in self._kinds(layers):
            self.streams[_Variant(frozenset({kind}), *layers)] = self._branch()

    def _opened(self, model: StreamedModel) -> Stream:
        return open_stream(model, self.windows, self._scratch(), self.limits, observe=False)

    def _branch(self) -> Stream:
        """A stream of its own that goes on from where the plain one is."""
        plain, scratch = self.streams[_PLAIN], self._scratch()

        def copied(name: str, tensor: Tensor) -> Tensor:
            return scratch.tensor(name, tensor.shape, tensor.dtype).copy_(tensor)

        def room(name: str, tensor: Tensor) -> Tensor:
            return scratch.tensor(name, tensor.shape, tensor.dtype)

        return replace(
            plain,
            scratch=scratch,
            hidden=copied("hidden", plain.hidden),
            inputs=room("inputs", plain.inputs),
            chosen=room("chosen", plain.chosen),
            weights=room("weights", plain.weights),
            sums=None if plain.sums is None else room("sums", plain.sums),
            states={place: state.clone() for place, state in plain.states.items()},
        )

    def step(self, layer: int) -> None:
        """Move all streams through a layer, which is read once, but for its Linears."""
        together: dict[frozenset[Kind], list[Stream]] = {}
        for variant, stream in self.streams.items():
            together.setdefault(variant.rounds(layer).intersection(self.groups[layer]), []).append(stream)
        routed = False
        for kinds, streams in together.items():
            self._load(layer, kinds)
            for stream in streams:
                routed = first_step(stream, layer)
        if routed:
            self._experts(layer)
            for kinds, streams in together.items():
                if streams[0].sums is not None:
                    self._load(layer, kinds)
                for stream in streams:
                    last_step(stream, layer)
        self.model.unload_layer(layer)
        release_memory()
        for stream in self.streams.values():
            require_finite_hidden(stream.hidden, layer)
            stream.forget()

    def _load(self, layer: int, kinds: Iterable[Kind]) -> None:
        names = [name for kind in kinds for name in self.groups[layer].get(kind, ())]
        self.model.load_layer(layer, {name: rounded(self.model.source.read(name)) for name in names})

    def _experts(self, layer: int) -> None:
        """Every expert is read once, and rounded where a stream wants it."""
        streams = list(self.streams.items())
        places = [tokens_of(stream.chosen, self.model.shape.experts) for _, stream in streams]
        wanted = [e for e in range(self.model.shape.experts) if any(len(place[e][0]) for place in places)]
        with closing(read_ahead(self.model, layer, wanted)) as experts:
            for expert, weights in experts:
                versions: dict[frozenset[Kind], Expert] = {}
                for (variant, stream), place in zip(streams, places, strict=True):
                    kinds = variant.rounds(layer).intersection((Kind.EXPERTS, Kind.DOWN))
                    if kinds not in versions:
                        versions[kinds] = rounded_expert(weights, kinds)
                    add_output(stream, stream.flat(), versions[kinds], *place[expert], layer)

    def divergences(self) -> list[KindLoss]:
        """Of all streams at the end of the model, in order, those of the whole model last."""
        model, other = self.model.head(), self.outside.head()
        plain = self.streams[_PLAIN].hidden
        apart = {self._every, *([self._embedded] if self.tied else ())}  # those with a rounded head
        heads = [
            (variant, stream.hidden, other if variant in apart else model)
            for variant, stream in self.streams.items()
            if variant != _PLAIN
        ]
        head = _Variant(frozenset({Kind.HEAD}), 0, -1)
        heads += [] if self.tied else [(head, plain, other)]
        sums = {variant: torch.zeros(len(plain), dtype=torch.float64) for variant, _, _ in heads}
        length = plain.shape[1]
        with phase("forward"):
            for window, start in itertools.product(range(len(plain)), range(0, length, _ROWS)):
                rows = slice(start, start + _ROWS)
                wanted = _logs(model, plain[window, rows], self.model)
                for variant, hidden, through in heads:
                    found = _logs(through, hidden[window, rows], self.model)
                    sums[variant][window] += float((wanted.exp() * (wanted - found)).sum())
        rows_of = [_loss(variant, sums[variant] / length, self._every) for variant, _, _ in heads]
        return sorted(rows_of, key=lambda row: (row.kind is None, row.layers is None, row.layers or (0, 0)))


def _logs(head: Callable[[Tensor], Tensor], hidden_TD: Tensor, model: StreamedModel) -> Tensor:
    return torch.log_softmax(head(hidden_TD.to(model.device)).double(), dim=-1)


def _loss(variant: _Variant, kl_N: Tensor, every: _Variant) -> KindLoss:
    kind = None if variant == every else next(iter(variant.kinds))
    layers = None if kind is None or kind in OUTSIDE else (variant.first, variant.last)
    error = float(kl_N.std(correction=1)) / len(kl_N) ** 0.5 if len(kl_N) > 1 else 0.0
    return KindLoss(kind=kind, layers=layers, kl=max(0.0, float(kl_N.mean())), error=error)
