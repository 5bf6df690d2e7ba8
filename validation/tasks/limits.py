"""A limit on what is left of tasks' scores, held against each task that was asked for."""

from collections.abc import Iterable

from moepress.validation.quality.thresholds import Outcome, state_of
from moepress.validation.tasks.results import TaskRow


def judge_tasks(min_recovery: float | None, rows: Iterable[TaskRow]) -> tuple[Outcome, ...]:
    """An outcome for each name that was asked for: of its first metric, where a recovery is defined."""
    if min_recovery is None:
        return ()
    return tuple(
        Outcome(
            subject=row.subject,
            measure="recovery",
            of=row.of,
            limit=min_recovery,
            found=row.recovery,
            state=state_of("recovery", row.recovery, min_recovery),
        )
        for row in rows
        if row.judged and row.recovery is not None
    )


def unjudged(min_recovery: float | None, rows: Iterable[TaskRow]) -> tuple[str, ...]:
    """What is to be said of names that a limit could not be held against."""
    return tuple(
        f"The limit on the recovery was not held against {row.of}: " + _why(row)
        for row in rows
        if min_recovery is not None and row.judged and row.recovery is None
    )


def _why(row: TaskRow) -> str:
    if row.difference is None:
        return "the metric has no value for each item."
    if not row.higher_is_better:
        return "of this metric more is not better."
    return f"the first model scores {row.before:g}."
