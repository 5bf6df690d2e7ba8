"""Repair after pruning: a layer's router is refitted, between its experts' outputs and the gains.

The outputs of each token's next candidates are known too, as many as it has experts. The rows are fitted on three of
four calibration windows (`refit`), and of the rounds that one is taken whose rows, rounded as they are stored, have the
lowest error on the fourth; where none lowers it the router stays. Then all tokens are routed anew, and an expert that a
token takes from outside of its candidates is read once more.

Shapes: T tokens, K experts a token, J slots of a token, E kept experts, D hidden size.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from moepress.compress.pruning.refit import Known, candidates, moved, refit, split, total_error
from moepress.compress.pruning.repair_streams import Routing, Walk, chunks, distance, outputs_of, wanted_loads
from moepress.compress.pruning.repaired import RouterRefit, router_rows, rows_digest
from moepress.errors import UnsupportedError
from moepress.models.families.router import Router, router_of
from moepress.models.families.routing import route
from moepress.models.forward.streamed import tokens_of
from moepress.models.forward.walk import read_ahead
from moepress.runs.phases import phase

LEAST = 1e-4
"""The least by which an error, as a share, must be lower for other rows to be taken."""
PATIENCE = 4
"""Rounds without a lower error on the tokens held out, after which no further one is tried."""
_TRIED, _TOLERANCE = 4096, 0.03


def with_next(walk: Walk, layer: int, routing: Routing) -> Routing:
    """The routing with slots for the K experts that follow in each token's rank."""
    model, logits = walk.pruned.model, walk.pruned.logits
    assert logits is not None
    router, top_k, experts = _router(walk), model.shape.top_k, model.shape.experts
    found = candidates(router, logits, _bias(walk, layer, routing), 2 * top_k)[:, top_k:]
    known = (found[:, :, None] == routing.slots[:, None, :]).any(dim=2)
    further = torch.full((len(found), top_k), experts)
    further[:, : found.shape[1]] = found.masked_fill(known, experts)
    nothing = torch.zeros(len(found), top_k)
    return replace(
        routing,
        slots=torch.cat((routing.slots, further), dim=1),
        weights=torch.cat((routing.weights, nothing), dim=1),
        other=None if routing.other is None else torch.cat((routing.other, nothing), dim=1),
    )


def refit_router(walk: Walk, layer: int, routing: Routing) -> tuple[Routing, RouterRefit, Tensor | None]:
    """Refit a layer's router; `routing` is one of `with_next` whose outputs are in the table.

    Returns:
        The routing that is taken, with all outputs that it needs in the table; what came of the refit; the rows [E, D]
        in the dtype in which they are stored, None where they stay.

    Raises:
        UnsupportedError: the router's logits are not its rows times what the experts get.
    """
    stream, bias = walk.pruned, _bias(walk, layer, routing)
    stored = router_rows(stream.model.source, layer)
    with phase("repair"):
        known, squared = _known(walk, routing, stored)
        learned, held = split(*stream.hidden.shape[:2])
        square = sum(float(squared[rows].sum()) for rows in held)
        rows, errors, count = _best(_router(walk), known, learned, held, bias, stored, LEAST * square)
    refitted = RouterRefit(
        error_before=_share(errors[0] + square, square),
        error_after=_share(errors[count] + square, square),
        tokens=sum(part.stop - part.start for part in held),
        rounds=count,
        change=0.0 if rows is None else float((rows.float() - stored.float()).norm() / stored.float().norm()),
        sha256=None if rows is None else rows_digest(rows),
    )
    if rows is None:
        return routing, refitted, None
    logits, change = torch.empty_like(known.logits), (rows.float() - stored.float()).to(known.device)
    for part in (*learned, *held):
        logits[part] = moved(known.rows(part), change).cpu()
    return _routed_anew(walk, layer, routing, logits, bias), refitted, rows


def _best(
    router: Router,
    known: Known,
    learned: Sequence[slice],
    held: Sequence[slice],
    bias_E: Tensor | None,
    stored_ED: Tensor,
    least: float,
) -> tuple[Tensor | None, list[float], int]:
    """The rows with the lowest error on the tokens held out, None for those that are there; all errors; rounds.

    `least` is how much lower an error must be.
    """
    before = stored_ED.to(known.device, torch.float32)
    bias_E = None if bias_E is None else bias_E.to(known.device)
    errors, best, count = [total_error(router, known, held, bias_E, torch.zeros_like(before))], None, 0
    for number, added in enumerate(refit(router, known, learned, bias_E), start=1):
        rows = (before + added).to(stored_ED.dtype)
        errors.append(total_error(router, known, held, bias_E, rows.float() - before))
        if errors[-1] < min(errors[: count + 1]) - least * (count == 0):
            best, count = rows, number
        elif number - count >= PATIENCE:
            break
    return None if best is None else best.cpu(), errors, count


def _known(walk: Walk, routing: Routing, stored_ED: Tensor) -> tuple[Known, Tensor]:
    """What the refit works on, and the tokens' |y|^2, fp64 [T]."""
    stream = walk.pruned
    assert stream.logits is not None
    assert walk.gram is not None
    assert walk.moment is not None
    some = slice(0, min(_TRIED, stream.tokens))
    rest = stream.logits[some] - stream.inputs[some].float() @ stored_ED.float().T
    if float((rest - rest.mean(dim=0)).abs().max()) > _TOLERANCE * float(stream.logits[some].abs().max()):
        raise UnsupportedError(
            f"--repair router: the router of {stream.model.family.name} models is more than one weight on what its "
            "experts get; use --repair gain, or none."
        )
    squared = torch.zeros(stream.tokens, dtype=torch.float64)
    for rows, _, outputs in chunks(walk, routing):
        target = walk.target(rows)
        walk.gram[rows] = torch.bmm(outputs, outputs.mT)
        walk.moment[rows] = torch.bmm(outputs, target[:, :, None]).squeeze(2)
        squared[rows] = target.double().square().sum(dim=1)
    known = Known(
        inputs=stream.inputs,
        logits=stream.logits,
        slots=routing.slots,
        gram=walk.gram,
        moment=walk.moment,
        device=stream.model.solver_device,
    )
    return known, squared


def _routed_anew(walk: Walk, layer: int, routing: Routing, logits_TE: Tensor, bias_E: Tensor | None) -> Routing:
    """The routing under other logits: outputs that are not known yet take slots that neither routing needs."""
    experts = walk.pruned.model.shape.experts
    chosen, weights = route(_router(walk), logits_TE, bias_E)
    there = routing.slots[:, :, None] == chosen[:, None, :]
    missing = ~there.any(dim=1)  # [T, K]
    taken = (routing.weights > 0) | there.any(dim=2)
    free = taken.int().argsort(dim=1, stable=True)[:, : chosen.shape[1]]  # slots that nobody needs come first
    place = free.gather(1, (missing.cumsum(dim=1) - 1).clamp_min(0))
    tokens, columns = torch.nonzero(missing, as_tuple=True)
    fresh = torch.full_like(routing.slots, experts)
    fresh[tokens, place[tokens, columns]] = chosen[tokens, columns]
    slots = torch.where(fresh < experts, fresh, routing.slots)
    _add_outputs(walk, layer, fresh)
    same = slots[:, :, None] == chosen[:, None, :]
    after = routing.load_after
    if routing.bias is not None:
        wanted = wanted_loads(walk.original.chosen, walk.keep[layer], walk.original.model.shape.experts)
        after = distance(chosen, wanted)
    return replace(routing, slots=slots, other=(same * weights[:, None, :]).sum(dim=2), load_after=after)


def _add_outputs(walk: Walk, layer: int, slots_TJ: Tensor) -> None:
    """Put the outputs of these experts into the table; E where there is none to be put."""
    places = tokens_of(slots_TJ, walk.pruned.model.shape.experts + 1)
    number = {old: new for new, old in enumerate(walk.keep[layer])}
    wanted = [old for old, new in number.items() if len(places[new][0])]
    for old, matrices in read_ahead(walk.original.model, layer, wanted):
        for tokens, slots, output in outputs_of(walk.pruned, matrices, layer, places[number[old]]):
            walk.table.put(tokens * walk.slots + slots, output)


def _router(walk: Walk) -> Router:
    model = walk.pruned.model
    return router_of(model.family, model.source.config, model.shape)


def _bias(walk: Walk, layer: int, routing: Routing) -> Tensor | None:
    return walk.pruned.model.router_bias(layer) if routing.bias is None else routing.bias


def _share(value: float, of: float) -> float:
    return max(value, 0.0) / of if of else 0.0
