"""A limit on the recovery: which rows it is held against, and when it is missed."""

import pytest

from moepress.errors import UsageError
from moepress.validation.quality.results import Estimate
from moepress.validation.quality.thresholds import parse_least
from moepress.validation.tasks.limits import judge_tasks, unjudged
from moepress.validation.tasks.results import TaskRow


def row(value: float | None, error: float | None = 0.01, *, judged: bool = True) -> TaskRow:
    return TaskRow(
        subject="after",
        task="t",
        metric="acc",
        items=10,
        before=0.0 if value is None else 0.5,
        after=0.5,
        higher_is_better=True,
        difference=Estimate(value=0.0),
        recovery=None if value is None else Estimate(value=value, error=error),
        judged=judged,
    )


@pytest.mark.parametrize(
    ("value", "error", "state"),
    [
        (0.96, 0.01, "kept"),
        (0.95, None, "kept"),
        (0.935, 0.01, "exceeded within the error"),
        (0.929, 0.01, "missed"),
        (0.949, None, "missed"),
        (0.5, float("nan"), "missed"),
    ],
)
def test_a_recovery_is_missed_beyond_two_errors(value: float, error: float | None, state: str) -> None:
    (outcome,) = judge_tasks(0.95, [row(value, error), row(0.1, judged=False)])
    assert (outcome.state, outcome.limited, outcome.bound) == (state, "recovery of t acc", "at least")


def test_what_has_no_recovery_is_said_not_judged() -> None:
    assert judge_tasks(0.95, [row(None)]) == ()
    assert judge_tasks(None, [row(0.1)]) == ()
    (said,) = unjudged(0.95, [row(None)])
    assert "was not held against t acc: the first model scores 0" in said


@pytest.mark.parametrize(("text", "value"), [("95%", 0.95), ("0.95", 0.95), ("100%", 1.0), ("1", 1.0)])
def test_shares_that_are_left(text: str, value: float) -> None:
    assert parse_least(text, "--min-recovery") == value


@pytest.mark.parametrize("text", ["95", "0", "-5%", "x", "9%5", "nan", ""])
def test_what_is_no_share(text: str) -> None:
    with pytest.raises(UsageError, match="95%"):
        parse_least(text, "--min-recovery")
