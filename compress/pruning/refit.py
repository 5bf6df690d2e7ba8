"""Refit of a router after pruning, the arithmetic: rows under which the experts that stay give the layer's output.

Pure functions on tensors. T tokens, E experts that were kept, J candidates of a token (those whose outputs are known),
K experts that a token gets, D hidden size.

With f_te the output of expert e for a token, y_t what the routed experts would have to give it (see `repair`), and
w_t(W) the weights that the router with rows W [E, D] gives, the error of a token is a quadratic form

    | y_t - sum_e w_te f_te |^2  =  |y_t|^2 - 2 w_t . b_t + w_t A_t w_t,      A_t = f_t f_t^T,  b_t = f_t y_t

so that only inner products of the candidates' outputs are kept. Its gradient in a token's logits is known in closed
form. An expert that was not chosen counts there by how near it is to being chosen (a sigmoid in place of the step, in
the gradient alone), so that rows learn of experts that would do better. A round is one ridge fit: the rows whose logits
are nearest to what the tokens ask for,

    min_S  sum_t | S x_t + dL_t/dz_t |^2 + ridge * (sum_t |x_t|^2 / D) * |S|^2

and how long the step is to be is searched on the error itself.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moepress.models.families.router import Router
from moepress.models.families.routing import choice_scores, scores

RIDGE = 1.0
"""Pull of a step towards none, in units of the inputs' mean square."""
ROUNDS = 12
SHARES = (1.0, 0.5, 0.25, 0.125)
"""Steps that a round tries, as shares of the longest so far."""
LONGEST, SHORTEST = 0.25, 0.002
"""A step's length: root mean square of what it adds to the logits."""
PART_TOKENS = 8192
SOFTNESS = 0.2
"""Width of the sigmoid that stands for the step of being chosen, in units of the least chosen score's mean."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """What is known of some tokens.

    Attributes:
        inputs: of the router, [T, D].
        logits: of the router as it is, fp32 [T, E].
        slots: candidates, int64 [T, J]; E where a slot is empty.
        gram: inner products of the candidates' outputs, fp32 [T, J, J]; 0 in empty slots.
        moment: those with what the token ought to get, fp32 [T, J].
        device: where it is computed; all of the above may lie elsewhere.
    """

    inputs: Tensor
    logits: Tensor
    slots: Tensor
    gram: Tensor
    moment: Tensor
    device: torch.device = field(default=torch.device("cpu"))

    def rows(self, rows: slice) -> "Known":
        """Some of the tokens, on the device."""
        return Known(
            inputs=self.inputs[rows].to(self.device),
            logits=self.logits[rows].to(self.device),
            slots=self.slots[rows].to(self.device),
            gram=self.gram[rows].to(self.device),
            moment=self.moment[rows].to(self.device),
            device=self.device,
        )


def candidates(router: Router, logits_TE: Tensor, bias_E: Tensor | None, count: int) -> Tensor:
    """The experts that a router ranks first, int64 [T, count], best first; E where groups leave no more."""
    choice = choice_scores(router, scores(router, logits_TE), bias_E)
    best = choice.topk(min(count, choice.shape[1]), dim=-1)
    return best.indices.masked_fill(~torch.isfinite(best.values), choice.shape[1])


def error(known: Known, weights_TJ: Tensor) -> Tensor:
    """sum_t of the error without |y_t|^2, fp64."""
    along = (weights_TJ * known.moment).sum(dtype=torch.float64)
    product = torch.bmm(weights_TJ[:, None], known.gram).squeeze(1)
    return (product * weights_TJ).sum(dtype=torch.float64) - 2 * along


def weights_of(router: Router, known: Known, logits_TE: Tensor, bias_E: Tensor | None) -> Tensor:
    """The weights of the candidates under other logits, fp32 [T, J]; 0 for those not chosen."""
    return _chosen(router, known, scores(router, logits_TE), bias_E)[0]


def _chosen(
    router: Router, known: Known, scores_TE: Tensor, bias_E: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Weights, scores, choice scores, who is chosen [T, J]; the score that parts those chosen from the rest [T, 1]."""
    experts = scores_TE.shape[1]
    empty = known.slots == experts
    place = known.slots.masked_fill(empty, 0)
    scored = scores_TE.gather(1, place).masked_fill(empty, 0.0)
    choice = choice_scores(router, scores_TE, bias_E).gather(1, place).masked_fill(empty, float("-inf"))
    best = choice.topk(min(router.top_k + 1, choice.shape[1]), dim=-1)
    chosen = torch.zeros_like(scored).scatter_(1, best.indices[:, : router.top_k], 1.0).masked_fill_(empty, 0.0)
    last, following = best.values[:, router.top_k - 1], best.values[:, -1]
    edge = torch.where(torch.isfinite(following), 0.5 * (last + following), last)
    weights = scored * chosen
    if router.renormalise:
        weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
    return weights * router.scale, scored, choice, chosen, edge[:, None]


def softness(router: Router, known: Known, parts: Sequence[slice], bias_E: Tensor | None) -> float:
    """The width of the sigmoid for a layer: SOFTNESS times the mean of the least chosen score."""
    least, tokens = 0.0, 0
    for part in map(known.rows, parts):
        _, scored, _, chosen, _ = _chosen(router, part, scores(router, part.logits), bias_E)
        least += float(scored.masked_fill(chosen == 0, float("inf")).amin(dim=-1).sum())
        tokens += len(scored)
    return SOFTNESS * least / tokens


def gradient(router: Router, known: Known, logits_TE: Tensor, bias_E: Tensor | None, width: float) -> Tensor:
    """The gradient of the tokens' errors in their logits, fp32 [T, E]; see the head of this file.

    Args:
        router: the routing rule.
        known: of the tokens.
        logits_TE: where the gradient is taken.
        bias_E: the correction bias, or None.
        width: of the sigmoid, in units of the scores; 0: those chosen alone.
    """
    scores_TE = scores(router, logits_TE)
    weights, scored, choice, chosen, edge = _chosen(router, known, scores_TE, bias_E)
    by_weight = 2 * (torch.bmm(weights[:, None], known.gram).squeeze(1) - known.moment)
    if router.renormalise:
        mean = (by_weight * weights).sum(dim=-1, keepdim=True) / router.scale
        by_weight = (by_weight - mean) / ((scored * chosen).sum(dim=-1, keepdim=True) + 1e-20)
    by_weight = by_weight * router.scale  # by s_j m_j, m_j whether it is chosen
    by_score = by_weight * chosen
    if width:
        near = torch.sigmoid((choice - edge) / width)
        by_score = by_score + by_weight * scored * near * (1 - near) / width
    empty = known.slots == scores_TE.shape[1]
    by_score = by_score.masked_fill(empty | ~torch.isfinite(choice), 0.0)
    spread = torch.zeros_like(scores_TE).scatter_add_(1, known.slots.masked_fill(empty, 0), by_score)
    return _through_scores(router, scores_TE, logits_TE, spread)


def _through_scores(router: Router, scores_TE: Tensor, logits_TE: Tensor, by_score_TE: Tensor) -> Tensor:
    """From a gradient in scores to that in logits."""
    if router.scoring == "sigmoid":
        return by_score_TE * scores_TE * (1 - scores_TE)
    if router.scoring == "sqrtsoftplus":
        return by_score_TE * logits_TE.float().sigmoid() / (2 * scores_TE).clamp_min(1e-20)
    return scores_TE * (by_score_TE - (by_score_TE * scores_TE).sum(dim=-1, keepdim=True))


def moved(known: Known, added_ED: Tensor) -> Tensor:
    """The logits of rows to which something was added, fp32 [T, E]."""
    return known.logits + known.inputs.float() @ added_ED.T


def total_error(router: Router, known: Known, parts: Sequence[slice], bias_E: Tensor | None, added_ED: Tensor) -> float:
    """The error of some parts of the tokens, without sum |y_t|^2, when something is added to the router's rows."""
    every = (known.rows(rows) for rows in parts)
    return sum(float(error(part, weights_of(router, part, moved(part, added_ED), bias_E))) for part in every)


def refit(
    router: Router,
    known: Known,
    parts: Sequence[slice],
    bias_E: Tensor | None,
    *,
    rounds: int = ROUNDS,
    ridge: float = RIDGE,
) -> Iterator[Tensor]:
    """What is added to a router's rows, fp32 [E, D], round by round; each has a lower error than the one before.

    Args:
        router: the routing rule of the pruned model.
        known: of all tokens.
        parts: the tokens to learn from, so many at a time as are computed with at once.
        bias_E: the router's correction bias, which stays, or None.
        rounds: ridge fits at most.
        ridge: pull of every step towards none.
    """
    experts, width = known.logits.shape[1], known.inputs.shape[1]
    tokens = sum(rows.stop - rows.start for rows in parts)
    added, longest = torch.zeros(experts, width, device=known.device), LONGEST
    factor, around = _factor(known, parts, ridge), softness(router, known, parts, bias_E)
    now = total_error(router, known, parts, bias_E, added)
    for _ in range(rounds):
        toward = torch.zeros(width, experts, dtype=torch.float64, device=known.device)
        for part in map(known.rows, parts):
            slope = gradient(router, part, moved(part, added), bias_E, around)
            toward -= part.inputs.double().T @ slope.double()
        step = torch.cholesky_solve(toward, factor).T.float()
        square = sum(float((part.inputs.float() @ step.T).double().square().sum()) for part in map(known.rows, parts))
        if not square:
            return
        step *= math.sqrt(tokens * experts / square)
        found = [0.0] * len(SHARES)
        for part in map(known.rows, parts):
            logits, further = moved(part, added), part.inputs.float() @ step.T
            for place, share in enumerate(SHARES):
                weights = weights_of(router, part, logits + share * longest * further, bias_E)
                found[place] += float(error(part, weights))
        best = min(range(len(SHARES)), key=found.__getitem__)
        if found[best] >= now:
            longest *= SHARES[-1]
            if longest < SHORTEST:
                return
            continue
        added, now = added + SHARES[best] * longest * step, found[best]
        longest = min(LONGEST, 2 * SHARES[best] * longest)
        yield added


def split(windows: int, length: int) -> tuple[list[slice], list[slice]]:
    """Tokens to learn from and tokens that are held out, both in parts: one window in four, drawn by chance.

    Of a single window it is the last quarter.
    """
    if windows == 1:
        edge = max(1, length * 3 // 4)
        return [slice(0, edge)], [slice(edge, length)]
    order = torch.randperm(windows, generator=torch.Generator().manual_seed(0)).tolist()
    held = set(order[: max(1, windows // 4)])
    found: tuple[list[slice], list[slice]] = ([], [])
    for window in range(windows):
        side, start = found[window in held], window * length
        if side and side[-1].stop == start and start + length - side[-1].start <= PART_TOKENS:
            side[-1] = slice(side[-1].start, start + length)
        else:
            side.append(slice(start, start + length))
    return found


def _factor(known: Known, parts: Sequence[slice], ridge: float) -> Tensor:
    """The Cholesky factor of sum_t x x^T + ridge, fp64 [D, D]."""
    width = known.inputs.shape[1]
    gram = torch.zeros(width, width, dtype=torch.float64, device=known.device)
    for rows in parts:
        inputs = known.inputs[rows].to(known.device).double()
        gram += inputs.T @ inputs
    gram.diagonal().add_(ridge * float(gram.diagonal().mean()) + 1e-30)
    factor: Tensor = torch.linalg.cholesky(gram)
    return factor
