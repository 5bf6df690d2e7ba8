"""Two models on the same items: differences and their errors, flips both ways, what so many items can show.

With x_i the first model's value for item i, y_i the other's, n items:

    difference   d = mean(y - x), its error sd(y - x) / sqrt(n)
    recovery     r = mean(y) / mean(x), its error by the delta method: sd(y - r x) / (sqrt(n) mean(x))
    McNemar      of `lost + won` flips, two-sided exact binomial test with one half
    shows        twice the error of the difference; of right-or-wrong items not less than 4 / (n + 3), which is where
                 flips in one direction alone exceed two standard errors

A group whose tasks count alike, whatever their sizes, has the mean of the tasks' values and, as errors are independent,
the root of the sum of their squares, over the number of tasks. McNemar: Psychometrika 12 (1947), 153.
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from moepress.errors import MoepressError
from moepress.validation.quality.results import Estimate
from moepress.validation.quality.thresholds import SIGMAS
from moepress.validation.tasks.results import Asked, Flips, MetricKey, TaskRow, TaskScores

_Values = tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Stratum:
    """Items that count alike."""

    before: _Values
    after: _Values


def compare(
    subject: str, before: Mapping[str, TaskScores], after: Mapping[str, TaskScores], asked: Sequence[Asked]
) -> Iterator[TaskRow]:
    """Rows of one model against the first, for all that was asked for; of groups their tasks' rows behind.

    Raises:
        MoepressError: the models were not given the same items.
    """
    for name, scores in before.items():
        if scores.items != after[name].items:
            raise MoepressError(
                f"The task {name} gave the second model other items than the first, so there is nothing to compare; "
                "a task must not draw its items at random."
            )
    for one in asked:
        keys = [key for key in before[one.tasks[0]].totals if all(key in before[task].totals for task in one.tasks)]
        for place, key in enumerate(keys):
            yield _row(subject, one, key, before, after, judged=place == 0)
        if len(one.tasks) > 1:
            for task in one.tasks:
                alone = Asked(name=task, tasks=(task,))
                for key in before[task].totals:
                    yield _row(subject, alone, key, before, after, group=one.name)


def _row(
    subject: str,
    asked: Asked,
    key: MetricKey,
    before: Mapping[str, TaskScores],
    after: Mapping[str, TaskScores],
    *,
    judged: bool = False,
    group: str | None = None,
) -> TaskRow:
    pairs = [(before[task], after[task]) for task in asked.tasks]
    first, (metric, filter_name) = pairs[0][0], key
    writes = [one.max_gen_toks for one, _ in pairs if one.max_gen_toks is not None]
    row = TaskRow(
        subject=subject,
        task=asked.name,
        metric=metric,
        filter=filter_name,
        group=group,
        items=sum(len(one.items) for one, _ in pairs),
        before=_total([one for one, _ in pairs], key, by_size=asked.by_size),
        after=_total([other for _, other in pairs], key, by_size=asked.by_size),
        higher_is_better=first.higher.get(metric),
        judged=judged,
        num_fewshot=first.num_fewshot,
        max_gen_toks=max(writes, default=None),
        version=first.version if len(pairs) == 1 else None,
        digest=hashlib.sha256("\n".join(item for one, _ in pairs for item in one.items).encode()).hexdigest(),
    )
    if not all(key in one.values and key in other.values for one, other in pairs):
        return row
    strata = [_Stratum(before=one.values[key], after=other.values[key]) for one, other in pairs]
    return _with_errors(row, _pooled(strata) if asked.by_size else strata)


def _total(scores: Sequence[TaskScores], key: MetricKey, *, by_size: bool) -> float:
    weights = [len(one.items) if by_size else 1 for one in scores]
    return math.fsum(w * one.totals[key] for w, one in zip(weights, scores, strict=True)) / sum(weights)


def _pooled(strata: Sequence[_Stratum]) -> list[_Stratum]:
    return [
        _Stratum(
            before=tuple(x for one in strata for x in one.before), after=tuple(y for one in strata for y in one.after)
        )
    ]


def _with_errors(row: TaskRow, strata: Sequence[_Stratum]) -> TaskRow:
    before, after = (_mean_of(strata, side) for side in (lambda x, _: x, lambda _, y: y))
    difference = Estimate(value=after - before, error=_error(strata, lambda x, y: y - x))
    recovery = None
    if row.higher_is_better and before > 0:
        ratio = after / before
        error = _error(strata, lambda x, y: y - ratio * x)
        recovery = Estimate(value=ratio, error=None if error is None else error / before)
    values = {value for one in strata for value in (*one.before, *one.after)}
    flips = _flips(strata) if values <= {0.0, 1.0} else None
    return replace(
        row, difference=difference, recovery=recovery, flips=flips, shows=_shows(difference, row.items, flips)
    )


def _mean_of(strata: Sequence[_Stratum], of: Callable[[float, float], float]) -> float:
    return math.fsum(_mean(_made(one, of)) for one in strata) / len(strata)


def _made(stratum: _Stratum, of: Callable[[float, float], float]) -> list[float]:
    return [of(x, y) for x, y in zip(stratum.before, stratum.after, strict=True)]


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _error(strata: Sequence[_Stratum], of: Callable[[float, float], float]) -> float | None:
    """Standard error of the mean over strata of each stratum's mean; None where one has a single item."""
    if any(len(one.before) < 2 for one in strata):
        return None
    squares = []
    for one in strata:
        values = _made(one, of)
        middle = _mean(values)
        variance = math.fsum((value - middle) ** 2 for value in values) / (len(values) - 1)
        squares.append(variance / len(values))
    return math.sqrt(math.fsum(squares)) / len(strata)


def _flips(strata: Sequence[_Stratum]) -> Flips:
    pairs = [(x, y) for one in strata for x, y in zip(one.before, one.after, strict=True)]
    lost, won = sum(x > y for x, y in pairs), sum(y > x for x, y in pairs)
    return Flips(lost=lost, won=won, p=mcnemar(lost, won))


def mcnemar(lost: int, won: int) -> float:
    """Two-sided p of McNemar's exact test: the binomial distribution of `lost + won` flips with one half."""
    flips, fewer = lost + won, min(lost, won)
    if not flips:
        return 1.0
    ways, term = 1, 1
    for k in range(1, fewer + 1):
        term = term * (flips - k + 1) // k
        ways += term
    return min(1.0, 2 * ways / (1 << flips))


def _shows(difference: Estimate, items: int, flips: Flips | None) -> float | None:
    if difference.error is None:
        return None
    least = 4 / (items + 3) if flips is not None else 0.0
    return max(SIGMAS * difference.error, least) or None
