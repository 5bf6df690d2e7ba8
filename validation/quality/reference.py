"""What is kept of a model's predictions, so that others are compared with it where it is not: sparse, in safetensors.

Of each position the K likeliest tokens with their log-probabilities are kept, and the probability of all others as one
number. That is a coarser view of the same distribution: a KL divergence of it is never larger than that of the whole
(data-processing inequality; Cover and Thomas, Elements of Information Theory, 2.8), so what is found is a lower bound.
NLL, likeliest token and five likeliest tokens are kept as they are: what is made of these is exact.

Letters: P positions, counted through all windows without their last tokens; R of them in a chunk; K kept tokens of
each; V vocabulary. Everything here is pure.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from moepress.validation.quality.divergence import five_likeliest, in_five, likeliest, token_kl
from moepress.validation.quality.perplexity import token_nll
from moepress.validation.quality.scores import ChunkScores

TOP = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """What is kept, of all positions or some.

    Attributes:
        ids: int32 [P, K], the likeliest tokens.
        log_probabilities: fp32 [P, K], theirs, nats.
        rest: fp32 [P], the logarithm of all others' probability; -inf where there are none.
        nll: fp32 [P], of the token that follows in the text, nats.
        top1: int32 [P], the likeliest token, the first of equals.
        top5: int32 [P, 5], the five likeliest (of a smaller vocabulary all).
    """

    ids: Tensor
    log_probabilities: Tensor
    rest: Tensor
    nll: Tensor
    top1: Tensor
    top5: Tensor


def keep_top(log_probabilities_RV: Tensor, wanted_R: Tensor, top: int) -> Kept:
    """What is kept of a chunk.

    Args:
        log_probabilities_RV: fp32 [R, V].
        wanted_R: int64 [R], the tokens that follow.
        top: K; a vocabulary may be smaller.
    """
    found = log_probabilities_RV.topk(min(top, log_probabilities_RV.shape[1]), dim=1)
    return Kept(
        ids=found.indices.int().cpu(),
        log_probabilities=found.values.float().cpu(),
        rest=_rest(log_probabilities_RV, found.indices).float().cpu(),
        nll=token_nll(log_probabilities_RV, wanted_R).cpu(),
        top1=likeliest(log_probabilities_RV).int().cpu(),
        top5=five_likeliest(log_probabilities_RV).int().cpu(),
    )


def _rest(log_probabilities_RV: Tensor, ids_RK: Tensor) -> Tensor:
    """The logarithm of the probability of all other tokens, [R]."""
    return log_probabilities_RV.scatter(1, ids_RK, -torch.inf).logsumexp(dim=1)


def coarse_kl(kept: Kept, log_probabilities_RV: Tensor) -> tuple[Tensor, Tensor]:
    """KL(kept || subject) and KL(subject || kept) of each position, fp32 [R], nats, with all tokens that were not kept
    as one: lower bounds; exactly zero for the model that was kept.

    Args:
        kept: of the same positions.
        log_probabilities_RV: the subject's, fp32 [R, V].
    """
    ids_RK = kept.ids.to(log_probabilities_RV.device, torch.int64)
    before = torch.cat([kept.log_probabilities, kept.rest[:, None]], dim=1).to(log_probabilities_RV.device)
    own_RK, rest_R = log_probabilities_RV.gather(1, ids_RK), _rest(log_probabilities_RV, ids_RK)
    after = torch.cat([own_RK, rest_R[:, None]], dim=1)
    return token_kl(before, after), token_kl(after, before)


def compare_kept(kept: Kept, log_probabilities_RV: Tensor) -> ChunkScores:
    """All that a chunk is scored by, against what was kept of the same positions."""
    kl, reverse = coarse_kl(kept, log_probabilities_RV)
    return ChunkScores(
        before=kept.nll,
        kl=kl.cpu(),
        reverse=reverse.cpu(),
        same=kept.top1 == likeliest(log_probabilities_RV).cpu(),
        common=in_five(kept.top5.to(log_probabilities_RV.device), log_probabilities_RV).cpu(),
        top=kept.top5.shape[1],
    )
