"""How well a model predicts text: NLL, perplexity, bits per byte, with their standard errors.

Shapes: N windows, T tokens in a window, V vocabulary, R rows (positions) in a chunk, D domains. All functions are pure.
A mean over windows is stratified by domain: the domains are given, the windows are samples of them. So the variance of
sum_d w_d * mean_d is sum_d w_d^2 * var_d / n_d, and differences between domains are not taken for noise.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from moepress.validation.quality.results import Estimate


def token_nll(log_probabilities_RV: Tensor, targets_R: Tensor) -> Tensor:
    """Negative log-likelihood of each target, nats.

    Args:
        log_probabilities_RV: fp32 [R, V].
        targets_R: int64 [R].

    Returns:
        fp32 [R].
    """
    return -log_probabilities_RV.gather(1, targets_R[:, None]).squeeze(1)


def window_means(values_NT: Tensor) -> Tensor:
    """Mean of each window in fp64, [N, T - 1] to [N]."""
    return values_NT.double().mean(dim=1)


def pooled_weights(domain_index_N: Tensor, domains: int) -> list[float]:
    """Weights under which the stratified mean is the plain mean over all windows."""
    counts = torch.bincount(domain_index_N, minlength=domains)
    return [count / len(domain_index_N) for count in counts.tolist()]


def equal_weights(domains: int) -> list[float]:
    """Weights under which every domain counts the same."""
    return [1 / domains] * domains


def one_domain(domain: int, domains: int) -> list[float]:
    """Weights that leave one domain only."""
    return [float(d == domain) for d in range(domains)]


def stratified_mean(values_N: Tensor, domain_index_N: Tensor, weights: Sequence[float]) -> Estimate:
    """Weighted mean of the domains' means over windows.

    Args:
        values_N: fp64 [N], one value for each window.
        domain_index_N: int64 [N], the window's domain.
        weights: D numbers that sum to 1; domains of weight 0 need no windows.

    Returns:
        The mean; its standard error is None if a domain of weight has a single window.
    """
    mean, variance = 0.0, 0.0
    for domain, weight in enumerate(weights):
        if weight == 0:
            continue
        values = values_N[domain_index_N == domain]
        mean += weight * float(values.mean())
        variance += weight**2 * float(values.var()) / len(values) if len(values) > 1 else math.nan
    return Estimate(value=mean, error=None if math.isnan(variance) else math.sqrt(variance))


def exponential(estimate: Estimate) -> Estimate:
    """exp of an estimate, the error by the delta method: d exp(x) = exp(x) dx. Past fp64's range it is infinite."""
    value = math.exp(estimate.value) if estimate.value < 700 else math.inf
    return Estimate(value=value, error=None if estimate.error is None else value * estimate.error)


def bits_per_byte(
    nll_N: Tensor, tokens_per_window: int, bytes_N: Tensor, domain_index_N: Tensor, weights: Sequence[float] | None
) -> float | None:
    """Bits of information per byte of text.

    Args:
        nll_N: fp64 [N], nats per token.
        tokens_per_window: predicted tokens in each window.
        bytes_N: int64 [N], UTF-8 bytes that those tokens cover.
        domain_index_N: int64 [N].
        weights: of the domains' ratios; None: all bits over all bytes.

    Returns:
        None where the text of a domain (or all of it) has no bytes.
    """
    bits_N = nll_N * tokens_per_window / math.log(2)
    if weights is None:
        return _ratio(bits_N, bytes_N)
    total = 0.0
    for domain, weight in enumerate(weights):
        if weight:
            inside = domain_index_N == domain
            ratio = _ratio(bits_N[inside], bytes_N[inside])
            if ratio is None:
                return None
            total += weight * ratio
    return total


def _ratio(bits: Tensor, text_bytes: Tensor) -> float | None:
    covered = int(text_bytes.sum())
    return float(bits.sum()) / covered if covered > 0 else None
