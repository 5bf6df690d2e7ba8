"""Limits that a user sets on the loss of quality, and whether they were kept.

A limit is missed only when it is exceeded by more than two standard errors, so that noise alone does not fail a build.
Limits are held against the row of all windows. What follows from a miss is the command line's affair.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from moepress.errors import UsageError
from moepress.validation.quality.generation import AnswerRow
from moepress.validation.quality.results import Estimate, QualityRow

SIGMAS = 2.0

Measure = Literal["perplexity increase", "KL divergence", "recovery", "loop increase"]
AT_LEAST: frozenset[Measure] = frozenset({"recovery"})
"""What is to be no less than the limit; of all else it is the most that is allowed."""
State = Literal["kept", "exceeded within the error", "missed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Thresholds:
    """What the user allows; None: no limit.

    Attributes:
        max_ppl_increase: relative, 0.03 is 3 % more perplexity than the reference has.
        max_kl: mean KL(reference || subject), nats per token.
        max_loop_increase: of the share of answers that loop, 0.02 is two more of a hundred.
    """

    max_ppl_increase: float | None = None
    max_kl: float | None = None
    max_loop_increase: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """One limit held against one subject.

    Attributes:
        subject: its label.
        measure: what was limited.
        limit: the limit.
        found: measured, with its standard error; without an error (a single window) the limit is taken as exact.
        state: only `missed` is a failure.
        of: the task and metric that a recovery is of; empty else.
    """

    subject: str
    measure: Measure
    limit: float
    found: Estimate
    state: State
    of: str = ""

    @property
    def limited(self) -> str:
        """What was limited, in words."""
        return f"{self.measure} of {self.of}" if self.of else self.measure

    @property
    def bound(self) -> str:
        """Which way: `at most` or `at least`."""
        return "at least" if self.measure in AT_LEAST else "at most"


def parse_threshold(text: str, option: str) -> float:
    """Read a share, `3%` or `0.03`, as 0.03.

    Args:
        text: what the user gave.
        option: the option's name, for the message.

    Raises:
        UsageError: not such a number, below 0, or 1 and more without a percent sign (`3` may mean 3 % or 300 %).
    """
    number, percent, rest = text.strip().partition("%")
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if rest or not (math.isfinite(value) and value >= 0):
        raise UsageError(f"{option} {text!r} is not a share; write for example 3% or 0.03.")
    if not percent and value >= 1:
        raise UsageError(f"{option} {text!r} is unclear; write {number.strip()}%, or a number below 1.")
    return value / 100 if percent else value


def parse_least(text: str, option: str) -> float:
    """Read a share that has to be left, `95%` or `0.95`, as 0.95.

    Raises:
        UsageError: not such a number.
    """
    number, percent, rest = text.strip().partition("%")
    try:
        value = float(number) / (100 if percent else 1)
    except ValueError:
        value = math.nan
    if rest or not 0 < value <= (10 if percent else 1):
        raise UsageError(f"{option} {text!r} is not a share; write for example 95% or 0.95.")
    return value


def judge(thresholds: Thresholds, rows: Iterable[QualityRow]) -> tuple[Outcome, ...]:
    """Hold every limit against every subject that is compared with the reference."""
    outcomes = []
    for row in rows:
        if row.scope != "all" or row.paired is None:
            continue
        ratio = row.paired.perplexity_ratio
        increase = Estimate(value=ratio.value - 1, error=ratio.error)
        limits: tuple[tuple[Measure, float | None, Estimate], ...] = (
            ("perplexity increase", thresholds.max_ppl_increase, increase),
            ("KL divergence", thresholds.max_kl, row.paired.kl),
        )
        for measure, limit, found in limits:
            if limit is not None:
                outcomes.append(held(row.subject, measure, limit, found))
    return tuple(outcomes)


def judge_answers(thresholds: Thresholds, rows: Iterable[AnswerRow]) -> tuple[Outcome, ...]:
    """Hold the limit on loops against every subject that answered after the reference."""
    limit = thresholds.max_loop_increase
    if limit is None:
        return ()
    return tuple(
        held(row.subject, "loop increase", limit, row.more_loops.increase) for row in rows if row.more_loops is not None
    )


def held(subject: str, measure: Measure, limit: float, found: Estimate) -> Outcome:
    """One limit held against what was measured of one subject."""
    return Outcome(subject=subject, measure=measure, limit=limit, found=found, state=state_of(measure, found, limit))


def state_of(measure: Measure, found: Estimate, limit: float) -> State:
    """Hold what was measured against a limit: `missed` where it is beyond it by more than two standard errors."""
    sign = -1 if measure in AT_LEAST else 1
    if sign * found.value <= sign * limit:
        return "kept"
    surely = not sign * found.value - SIGMAS * (found.error or 0.0) <= sign * limit  # a NaN error is a miss
    return "missed" if surely else "exceeded within the error"
