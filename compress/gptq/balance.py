"""Experts' token balance: an expert that too few tokens chose is shown those that its router ranks next for it.

They go into its Hessians alone. What flows through the layer stays as the router sends it.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from moepress.models.forward.walk import Stream
from moepress.runs.phases import phase

_ROWS_AT_ONCE = 8192


def topped_up(
    stream: Stream, positions: Sequence[tuple[Tensor, Tensor]], experts: Iterable[int], least: int
) -> dict[int, tuple[Tensor, Tensor]]:
    """Which tokens the Hessians of these experts are of: their own first, then others up to `least`.

    Args:
        stream: after the layer's first step, opened with `logits=True` unless `least` is 0.
        positions: `tokens_of` the layer.
        experts: of the layer.
        least: tokens that each of them is to have, where the layer has so many; 0 for their own alone.

    Returns:
        Per expert as in `positions`; no token twice. Others follow by falling score, the earlier first of equal ones,
        each with the slot of the least of its weights: an upper bound of what this expert would have got.
    """
    found = {expert: positions[expert] for expert in experts}
    missing = {expert: min(least, stream.tokens) - len(own[0]) for expert, own in found.items()}
    short = [expert for expert, count in missing.items() if count > 0]
    if not short:
        return found
    assert stream.logits is not None
    rule = stream.model.family.rule
    sigmoid = rule is not None and rule.scoring != "softmax"  # each score hangs on its own logit alone
    with phase("Hessian"):
        own = [found[expert][0] for expert in short]
        ranked = next_ranked(stream.logits, short, own, max(missing[expert] for expert in short), sigmoid=sigmoid)
        stream.touch(stream.tokens)
        for expert, others in zip(short, ranked.T, strict=True):
            tokens = others[: missing[expert]]
            slots = stream.weights[tokens].argmin(dim=1)
            found[expert] = torch.cat((found[expert][0], tokens)), torch.cat((found[expert][1], slots))
    return found


def next_ranked(
    logits_TE: Tensor, experts: Sequence[int], own: Sequence[Tensor], count: int, *, sigmoid: bool
) -> Tensor:
    """The tokens with the highest score for each expert, without those that chose it: int64 [count, X].

    Between tokens the logit alone ranks sigmoid scores, but not softmax ones: those are compared by their logarithm. A
    bias or groups of experts play no part. Goes over the tokens in parts and keeps `count` of each.

    Args:
        logits_TE: of the router, fp32; -inf for experts that the layer does not have.
        experts: X of them.
        own: the tokens that chose each.
        count: up to T. Of an expert that fewer tokens did not choose, the rest of its column are its own.
        sigmoid: how the router's scores are made.
    """
    columns, tokens = torch.tensor(experts), logits_TE.shape[0]
    chose_TX = torch.zeros(tokens, len(experts), dtype=torch.bool)
    for column, theirs in enumerate(own):
        chose_TX[theirs, column] = True
    best_CX, ranked_CX = torch.empty(0, len(experts)), torch.empty(0, len(experts), dtype=torch.int64)
    for start in range(0, tokens, _ROWS_AT_ONCE):
        part_PE = logits_TE[start : start + _ROWS_AT_ONCE]
        scores_PX = part_PE[:, columns] if sigmoid else part_PE.log_softmax(dim=1)[:, columns]
        # Not even a score that is -inf comes after the tokens that are there already.
        scores_PX = scores_PX.nan_to_num(neginf=torch.finfo(scores_PX.dtype).min)
        scores_PX = scores_PX.masked_fill(chose_TX[start : start + len(part_PE)], float("-inf"))
        numbers_PX = torch.arange(start, start + len(part_PE))[:, None].expand(-1, len(experts))
        both, named = torch.cat((best_CX, scores_PX)), torch.cat((ranked_CX, numbers_PX))
        sorted_CX, order = both.sort(dim=0, descending=True, stable=True)
        best_CX, ranked_CX = sorted_CX[:count], named.gather(0, order[:count])
    return ranked_CX
