"""Whether answers loop, and what that says of two models on the same prompts. Everything here is pure.

An answer `loops` where it reached the limit of its length without an end token and its last tokens are one phrase over
and over. One that reached the limit and repeats nothing `did not end`; all others `ended`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from statistics import fmean, stdev

from moepress.validation.quality.results import Estimate

LEAST_TURNS, LEAST_TOKENS = 3, 32
_NORMAL_95 = 1.959963984540054  # the 97.5 % point of the standard normal distribution


class Outcome(StrEnum):
    """How an answer came to its end."""

    ENDED = "ended"
    LOOPS = "loops"
    UNENDED = "did not end"


@dataclass(frozen=True, slots=True, kw_only=True)
class Cycle:
    """What the end of an answer repeats.

    Attributes:
        period: tokens of the phrase.
        tokens: at the end that are this phrase over and over; the first turn may be a part of it.
    """

    period: int
    tokens: int


def cycle_at_end(
    tokens: Sequence[int], *, least_turns: int = LEAST_TURNS, least_tokens: int = LEAST_TOKENS
) -> Cycle | None:
    """The shortest phrase that the last tokens repeat, or None.

    With a period p each of the last n tokens, but for the first p of them, equals the one p before it. It counts where
    n is at least `least_turns` times p and at least `least_tokens`: a list or a ruled line in a text is none, for the
    text goes on behind it, and neither is a short one at its end. A loop that counts on (`step 1, step 2`) is not
    seen: its tokens are not periodic.

    The idea, with other bounds, is that of Holtzman et al., The Curious Case of Neural Text Degeneration (2020), who
    count how often the last n tokens stand at the end (github.com/ari-holtzman/degen, metrics/repetition.py).

    Args:
        tokens: of the answer, without an end token.
        least_turns: how often the phrase has to be there.
        least_tokens: how long all of that has to be.
    """
    for period in range(1, len(tokens) // least_turns + 1):
        same = 0
        while same + period < len(tokens) and tokens[-1 - same] == tokens[-1 - same - period]:
            same += 1
        if same + period >= max(least_turns * period, least_tokens):
            return Cycle(period=period, tokens=same + period)
    return None


def outcome_of(tokens: Sequence[int], stop: frozenset[int]) -> Outcome:
    """How an answer came to its end.

    Args:
        tokens: with the end token, where there is one; otherwise it was cut off at the limit of its length.
        stop: end tokens.
    """
    if tokens and tokens[-1] in stop:
        return Outcome.ENDED
    return Outcome.UNENDED if cycle_at_end(tokens) is None else Outcome.LOOPS


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """How many of some answers.

    Attributes:
        count: how many.
        value: their share, 0 to 1.
        low, high: Wilson's interval, which holds the true share with a confidence of 95 %.
    """

    count: int
    value: float
    low: float
    high: float


def share_of(count: int, total: int) -> Share:
    """A share with its interval; both ends lie within 0 and 1, and the interval of none is not empty.

    Source: Wilson, Probable Inference, the Law of Succession, and Statistical Inference, JASA 22 (1927).
    """
    share, square = count / total, _NORMAL_95**2
    middle = (share + square / (2 * total)) / (1 + square / total)
    spread = math.sqrt(share * (1 - share) / total + square / (4 * total**2)) * _NORMAL_95 / (1 + square / total)
    low, high = max(0.0, middle - spread) if count else 0.0, min(1.0, middle + spread) if count < total else 1.0
    return Share(count=count, value=share, low=low, high=high)


@dataclass(frozen=True, slots=True, kw_only=True)
class Shift:
    """How often something happens to one model and not to the other, on the same prompts (McNemar's table).

    Attributes:
        only_before: prompts where it happens to the first model alone.
        only_after: to the other alone.
        increase: of the share, -1 to 1, with one standard error.
        p_value: how likely a split as uneven as that is where both models are equally prone to it (exact, two-sided).
    """

    only_before: int
    only_after: int
    increase: Estimate
    p_value: float


def shift_of(before: Sequence[bool], after: Sequence[bool]) -> Shift:
    """A paired difference of shares.

    The error is that of a difference of paired proportions with half an answer added to each kind, so that it is not
    0 where no prompt tells the models apart.

    Args:
        before: for each prompt whether it happens to the first model.
        after: to the other.

    Source: Agresti and Min, Simple improved confidence intervals for comparing matched proportions, Statistics in
        Medicine 24 (2005); McNemar, Psychometrika 12 (1947).
    """
    pairs = list(zip(before, after, strict=True))
    lost, won = sum(a and not b for b, a in pairs), sum(b and not a for b, a in pairs)
    total = len(pairs) + 2
    error = math.sqrt(lost + won + 1 - (lost - won) ** 2 / total) / total
    return Shift(
        only_before=won,
        only_after=lost,
        increase=Estimate(value=(lost - won) / len(pairs), error=error),
        p_value=_sign_test(lost, won),
    )


def _sign_test(one: int, other: int) -> float:
    """Two-sided, exact: of that many throws of a coin as uneven a split or a more uneven one."""
    throws = one + other
    tail = sum(math.comb(throws, k) for k in range(min(one, other) + 1))
    return min(1.0, float(2 * tail / 2**throws))


def mean_length(lengths: Sequence[int]) -> Estimate:
    """Mean number of tokens, with its standard error; None of a single answer."""
    error = stdev(lengths) / math.sqrt(len(lengths)) if len(lengths) > 1 else None
    return Estimate(value=fmean(lengths), error=error)
