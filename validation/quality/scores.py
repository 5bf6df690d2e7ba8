"""From logits to scores of every token, and from these to the rows of the result."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from moepress.calibration.corpus import EvaluationCorpus
from moepress.runs.progress import track
from moepress.validation.quality.divergence import Compared, common_top5, paired, same_top1, token_kl
from moepress.validation.quality.perplexity import (
    bits_per_byte,
    equal_weights,
    exponential,
    one_domain,
    pooled_weights,
    stratified_mean,
    token_nll,
    window_means,
)
from moepress.validation.quality.results import ALL_WINDOWS, DOMAIN_MEAN, QualityRow, Scope

LOGITS_BYTES = 256 << 20  # all [R, V] arrays of a chunk together
_TOP = 5
_ARRAYS = 8  # fp32 [R, V] arrays alive at once: four of logits, two of log-probabilities, two inside the KL


Reader = Callable[[int], Tensor]
"""Gives the logits [R, V] of the next R positions, counted through all windows without their last tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkScores:
    """What some positions are scored by, against a reference, on the CPU.

    Attributes:
        before: fp32 [R], NLL of the reference, nats.
        kl, reverse: fp32 [R], KL(reference || subject) and KL(subject || reference), nats.
        same: bool [R], same most likely token.
        common: uint8 [R], of `common_top5`.
        top: how many tokens `common` is out of.
    """

    before: Tensor
    kl: Tensor
    reverse: Tensor
    same: Tensor
    common: Tensor
    top: int


Comparer = Callable[[Tensor, Tensor], ChunkScores]
"""Compares the log-probabilities [R, V] of the next R positions, whose next tokens are the other [R], with its own."""


class Reference(Protocol):
    """What a model is compared with: one that gives its logits, or what was kept of one."""

    def comparer(self) -> Comparer:
        """Begins at the first position, each time it is called."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pass:
    """A model that is ready to give its logits.

    Attributes:
        reader: begins at the first position, each time it is called.
        runtime: what computes them, in words.
    """

    reader: Callable[[], Reader]
    runtime: str

    def comparer(self) -> Comparer:
        """See `Reference`."""
        read = self.reader()

        def compare(log_probabilities: Tensor, wanted: Tensor) -> ChunkScores:
            before = torch.log_softmax(read(len(wanted)), dim=-1).to(log_probabilities.device)
            return ChunkScores(
                before=token_nll(before, wanted).cpu(),
                kl=token_kl(before, log_probabilities).cpu(),
                reverse=token_kl(log_probabilities, before).cpu(),
                same=same_top1(before, log_probabilities).cpu(),
                common=common_top5(before, log_probabilities).cpu(),
                top=min(_TOP, before.shape[1]),
            )

        return compare


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenScores:
    """What is kept of each predicted token.

    Attributes:
        nll: fp32 [N, T - 1], nats.
        against: the reference and it; None for the reference.
    """

    nll: Tensor
    against: Compared | None


def score_tokens(
    subject: Pass,
    reference: Reference | None,
    windows_NT: Tensor,
    *,
    logits_bytes: int = LOGITS_BYTES,
    title: str = "scores",
    seen: Callable[[Tensor, Tensor], None] | None = None,
) -> TokenScores:
    """Read the logits of a few positions at a time and keep a few numbers for each.

    Args:
        subject: the model.
        reference: the model to compare with, or None.
        windows_NT: int64 [N, T], the tokens; position t predicts token t + 1.
        logits_bytes: bound for all arrays with the vocabulary's length.
        title: of the progress bar.
        seen: is shown the log-probabilities [R, V] of the subject, and the tokens [R] that follow.
    """
    windows, length = windows_NT.shape
    shape, total = (windows, length - 1), windows * (length - 1)
    nll, before_nll, kl, reverse = (torch.empty(total) for _ in range(4))
    same, common, top = torch.empty(total, dtype=torch.bool), torch.empty(total, dtype=torch.uint8), _TOP
    targets, start = windows_NT[:, 1:].reshape(-1), 0
    read, compare = subject.reader(), reference.comparer() if reference is not None else None
    step = 1  # the first row tells the size of the vocabulary
    with track(title, total, unit="tokens") as advance:
        while start < total:
            count = min(step, total - start)
            chunk = slice(start, start + count)
            log_probabilities = torch.log_softmax(read(count), dim=-1)
            wanted = targets[chunk].to(log_probabilities.device)
            nll[chunk] = token_nll(log_probabilities, wanted).cpu()
            if seen is not None:
                seen(log_probabilities, wanted)
            if compare is not None:
                found = compare(log_probabilities, wanted)
                before_nll[chunk], kl[chunk], reverse[chunk] = found.before, found.kl, found.reverse
                same[chunk], common[chunk], top = found.same, found.common, found.top
            start += count
            advance(count)
            step = max(1, logits_bytes // (4 * _ARRAYS * log_probabilities.shape[1]))
    if reference is None:
        return TokenScores(nll=nll.view(shape), against=None)
    against = Compared(
        before=before_nll.view(shape),
        after=nll.view(shape),
        kl=kl.view(shape),
        reverse=reverse.view(shape),
        same=same.view(shape),
        common=common.view(shape),
        top=top,
    )
    return TokenScores(nll=nll.view(shape), against=against)


def quality_rows(label: str, corpus: EvaluationCorpus, scores: TokenScores) -> list[QualityRow]:
    """One row for each domain, one for all windows, one for the mean over domains where there are several.

    Args:
        label: of the subject.
        corpus: the windows that the scores belong to.
        scores: the subject's.
    """
    names, count = corpus.domains, len(corpus.domains)
    cuts: list[tuple[str, Scope, list[float]]] = [(n, "domain", one_domain(d, count)) for d, n in enumerate(names)]
    cuts.append((ALL_WINDOWS, "all", pooled_weights(corpus.domain_index, count)))
    if count > 1:
        cuts.append((DOMAIN_MEAN, "domain-mean", equal_weights(count)))
    return [_row(label, corpus, scores, *cut) for cut in cuts]


def _row(
    label: str,
    corpus: EvaluationCorpus,
    scores: TokenScores,
    domain: str,
    scope: Scope,
    weights: list[float],
) -> QualityRow:
    index, means = corpus.domain_index, window_means(scores.nll)
    against = None if scores.against is None else paired(scores.against, index, weights)
    nll, per_window = stratified_mean(means, index, weights), scores.nll.shape[1]
    windows = sum(int((index == d).sum()) for d, weight in enumerate(weights) if weight)
    byte_weights = None if scope == "all" else weights
    return QualityRow(
        subject=label,
        domain=domain,
        scope=scope,
        windows=windows,
        tokens=windows * per_window,
        nll=nll,
        perplexity=exponential(nll),
        bits_per_byte=bits_per_byte(means, per_window, corpus.window_bytes, index, byte_weights),
        paired=against,
    )
