"""Repair after pruning: the down projections of a layer's experts are refitted, one after the other.

Each is a ridge fit (`refit_down`) to what the layer's output still lacks. A fit on three of four calibration windows is
tested first: where its values, rounded as they are stored, do not lower the error on the fourth, the expert stays. Else
the fit on all windows is taken. The next expert finds what is lacking behind it. One expert is in memory at a time, and
goes to the layer's file when it is done.

Shapes: T tokens, J slots of a token, E kept experts, F intermediate size, D hidden size.
"""

import hashlib
import math
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from moepress.compress.pruning.refit import split
from moepress.compress.pruning.refit_down import DownEquations, no_down_equations, solve_step
from moepress.compress.pruning.repair_streams import ROWS_AT_ONCE, Routing, Walk, chunks
from moepress.compress.pruning.repaired import DownRefit
from moepress.compress.pruning.repaired_down import DownPlace, down_file, down_piece, down_places
from moepress.models.forward.streamed import tokens_of
from moepress.models.forward.walk import read_ahead
from moepress.models.storage.experts import Expert
from moepress.models.storage.tensors import DTYPE_NAMES, tensor_bytes
from moepress.models.storage.writer import Chunk, Entry, write_shard
from moepress.runs.journal import Run
from moepress.runs.phases import phase

LEAST = 1e-4
"""The least by which the error on an expert's tokens that are held out must be lower, as a share of it."""


@dataclass(slots=True, kw_only=True)
class _Layer:
    """A layer whose down projections are refitted.

    Attributes:
        walk: both streams; its table gets the refitted experts' outputs.
        layer: its number.
        places: of the experts' down projections in the model.
        weights: of the routing that is taken, fp32 [T, J].
        lacking: what the routed output lacks, fp32 [T, D].
        held: whether a token is held out, bool [T].
        fell: by how much the tests so far lowered the error on tokens held out.
        taken: how many experts were refitted so far.
        digest: of their bytes.
    """

    walk: Walk
    layer: int
    places: Sequence[DownPlace]
    weights: Tensor
    lacking: Tensor
    held: Tensor
    fell: float = 0.0
    taken: int = 0
    digest: "hashlib._Hash" = field(default_factory=hashlib.sha256)


def refit_downs(walk: Walk, layer: int, routing: Routing, run: Run) -> DownRefit:
    """Refit a layer's down projections into a piece of the run; their outputs in the table become those they then give.

    The piece holds all E, by their new numbers, in the shape and dtype in which the model stores them.
    """
    assert walk.lacking is not None
    weights = routing.weights if routing.other is None else routing.other
    places = down_places(walk.pruned.model.source, layer, walk.pruned.model.shape.experts)
    held = torch.zeros(walk.pruned.tokens, dtype=torch.bool)
    for rows in split(*walk.pruned.hidden.shape[:2])[1]:
        held[rows] = True
    state = _Layer(walk=walk, layer=layer, places=places, weights=weights, lacking=walk.lacking, held=held)
    with phase("repair"):
        squared = _find_lacking(state, routing)
        before = _held_error(state)
        found = _refitted(state, tokens_of(routing.slots, walk.pruned.model.shape.experts + 1))
        entries = [_entry(state, expert, found) for expert in range(len(state.places))]
        run.write(down_piece(layer), down_file(layer), lambda path: write_shard(path, entries))
        found.close()
    return DownRefit(
        error_before=before / squared if squared else 0.0,
        error_after=max(before - state.fell, 0.0) / squared if squared else 0.0,
        tokens=int(held.sum()),
        taken=state.taken,
        sha256=state.digest.hexdigest(),
    )


def _entry(state: _Layer, expert: int, found: Iterator[Tensor]) -> Entry:
    """The next of those that are found; computed when it is written."""
    place = state.places[expert]

    def data() -> Iterator[Chunk]:
        raw = tensor_bytes(next(found))
        state.digest.update(raw)
        yield raw

    size = place.dtype.itemsize * math.prod(place.shape)
    return Entry(name=str(expert), dtype=DTYPE_NAMES[place.dtype], shape=place.shape, bytes=size, data=data)


def _refitted(state: _Layer, of_experts: Sequence[tuple[Tensor, Tensor]]) -> Generator[Tensor, None, None]:
    """The layer's down projections in order, as they are stored."""
    model = state.walk.pruned.model
    for expert, matrices in read_ahead(model, state.layer, list(range(model.shape.experts)), torch.float32):
        place = state.places[expert]
        tokens, slots = of_experts[expert]
        used = state.weights[tokens, slots] > 0
        down = _refit(state, matrices, tokens[used], slots[used], place.dtype).to(place.dtype)
        yield (down.mT if place.transposed else down).contiguous()


def _refit(state: _Layer, matrices: Expert, tokens_T: Tensor, slots_T: Tensor, dtype: torch.dtype) -> Tensor:
    """One expert's down projection [D, F], with values of the stored dtype, in fp32; what is lacking goes along."""
    held, before = state.held[tokens_T], matrices.down
    solver = state.walk.pruned.model.solver_device
    equations = no_down_equations(before.shape[1], before.shape[0], solver)
    for tokens, _, _, scaled in _intermediates(state, matrices, tokens_T[~held], slots_T[~held]):
        equations.add(scaled, state.lacking[tokens].to(scaled.device))
    step, fell, square = _rounded(equations, before, dtype) - before, 0.0, 0.0
    for tokens, _, _, scaled in _intermediates(state, matrices, tokens_T[held], slots_T[held]):
        lacking = state.lacking[tokens].to(scaled.device)
        had = _square(lacking)
        square, fell = square + had, fell + had - _square(lacking - scaled @ step.T)
        equations.add(scaled, lacking)
    rounded = _rounded(equations, before, dtype)
    if not (fell > LEAST * square and bool(torch.isfinite(rounded).all())):  # the stored dtype may have no room for it
        return before
    step, state.taken, state.fell = rounded - before, state.taken + 1, state.fell + fell
    gating, slots_of_token = state.walk.pruned.model.gating(state.layer), state.walk.slots
    refitted = replace(matrices, down=rounded)
    for tokens, slots, intermediate, scaled in _intermediates(state, matrices, tokens_T, slots_T):
        state.lacking[tokens] -= (scaled @ step.T).to("cpu")
        output = gating.output(refitted, intermediate).to("cpu", state.walk.table.dtype)
        state.walk.table.put(tokens * slots_of_token + slots, output)
        state.walk.pruned.touch(len(tokens))
    return rounded


def _rounded(equations: DownEquations, before_DF: Tensor, dtype: torch.dtype) -> Tensor:
    """The projection with its step, values of the stored dtype in fp32; what it was where no token says anything."""
    step = solve_step(equations)
    return before_DF if step is None else (before_DF + step.to(before_DF.device)).to(dtype).float()


def _intermediates(
    state: _Layer, matrices: Expert, tokens_T: Tensor, slots_T: Tensor
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """An expert's tokens a part at a time: tokens, slots, what reaches the down projection, and that as it is weighed.

    Computed anew each time, for all of them together may be larger than the rest.
    """
    stream = state.walk.pruned
    gating = stream.model.gating(state.layer)
    for tokens, slots in zip(tokens_T.split(ROWS_AT_ONCE), slots_T.split(ROWS_AT_ONCE), strict=True):
        if not len(tokens):
            continue
        intermediate = gating.intermediate(matrices, stream.inputs[tokens].to(stream.model.device, torch.float32))
        weights = state.weights[tokens, slots, None].to(intermediate.device)
        stream.touch(len(tokens))
        yield tokens, slots, intermediate, intermediate * weights


def _find_lacking(state: _Layer, routing: Routing) -> float:
    """Fill in what the routed output lacks; returns the squared norm of what it ought to be, of tokens held out."""
    squared = 0.0
    for rows, _, outputs in chunks(state.walk, routing):
        target = state.walk.target(rows)
        state.lacking[rows] = target - torch.bmm(state.weights[rows][:, None], outputs).squeeze(1)
        squared += _square(target[state.held[rows]])
    return squared


def _held_error(state: _Layer) -> float:
    parts = zip(state.lacking.split(ROWS_AT_ONCE), state.held.split(ROWS_AT_ONCE), strict=True)
    return sum(_square(lacking[held]) for lacking, held in parts)


def _square(values: Tensor) -> float:
    """The squared norm, summed in fp64."""
    return float(values.square().sum(dtype=torch.float64))
