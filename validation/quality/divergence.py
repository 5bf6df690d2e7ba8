"""How far a model has moved from the one it was made of, token by token on the same text.

Shapes: R rows (positions) in a chunk, V vocabulary, N windows, T tokens in a window. Everything here is pure.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from moepress.validation.quality.perplexity import exponential, stratified_mean
from moepress.validation.quality.results import Estimate, Paired


def token_kl(reference_RV: Tensor, subject_RV: Tensor) -> Tensor:
    """KL(reference || subject) of each position, nats; fp32 rounding makes it uncertain by about 1e-6.

    Args:
        reference_RV: log-probabilities, fp32 [R, V]; -inf is a probability of zero.
        subject_RV: log-probabilities, fp32 [R, V].

    Returns:
        fp32 [R]; exactly zero for equal arguments.
    """
    gap = (reference_RV - subject_RV).masked_fill_(reference_RV == -torch.inf, 0.0)
    return gap.mul_(reference_RV.exp()).sum(dim=1)


def same_top1(reference_RV: Tensor, subject_RV: Tensor) -> Tensor:
    """Whether both hold the same token for the most likely one (the first of equals), bool [R]."""
    return reference_RV.argmax(dim=1) == subject_RV.argmax(dim=1)


def stratified_share(hits_NT: Tensor, domain_index_N: Tensor, weights: Sequence[float]) -> Estimate:
    """Weighted mean of the domains' shares, with the binomial sigma sqrt(p (1 - p) / n) of each.

    Args:
        hits_NT: bool [N, T - 1].
        domain_index_N: int64 [N].
        weights: of the domains, summing to 1.
    """
    share, variance = 0.0, 0.0
    for domain, weight in enumerate(weights):
        if weight == 0:
            continue
        hits = hits_NT[domain_index_N == domain]
        inside = float(hits.double().mean())
        share += weight * inside
        variance += weight**2 * inside * (1 - inside) / hits.numel()
    return Estimate(value=share, error=math.sqrt(variance))


def paired(
    delta_nll_N: Tensor, kl_N: Tensor, same_NT: Tensor, domain_index_N: Tensor, weights: Sequence[float]
) -> Paired:
    """All paired measures of one row of the report.

    Args:
        delta_nll_N: fp64 [N], window means of the subject minus those of the reference, nats per token.
        kl_N: fp64 [N], window means, nats per token.
        same_NT: bool [N, T - 1].
        domain_index_N: int64 [N].
        weights: of the domains, summing to 1.
    """
    delta = stratified_mean(delta_nll_N, domain_index_N, weights)
    return Paired(
        delta_nll=delta,
        perplexity_ratio=exponential(delta),
        kl=stratified_mean(kl_N, domain_index_N, weights),
        same_top1=stratified_share(same_NT, domain_index_N, weights),
    )
