"""Paired figures against counts by hand, the definition of McNemar's test, and resampling."""

import math
import random

import pytest

from moepress.errors import MoepressError
from moepress.validation.tasks.paired import compare, mcnemar
from moepress.validation.tasks.results import Asked, TaskRow, TaskScores


def scores(task: str, *values: float, metric: str = "acc", better: bool = True) -> TaskScores:
    key = (metric, "none")
    return TaskScores(
        task=task,
        items=tuple(f"{n} a b" for n in range(len(values))),
        values={key: values},
        totals={key: sum(values) / len(values)},
        higher={metric: better},
    )


def row_of(before: TaskScores, after: TaskScores) -> TaskRow:
    (row,) = compare("after", {before.task: before}, {before.task: after}, [Asked(name="t", tasks=(before.task,))])
    return row


def test_ten_items_counted_by_hand() -> None:
    before = scores("t", 1, 1, 1, 1, 1, 1, 0, 0, 0, 0)
    after = scores("t", 1, 1, 1, 0, 0, 0, 1, 0, 0, 0)
    row = row_of(before, after)
    assert (row.items, row.before, row.after) == (10, 0.6, 0.4)
    assert row.flips is not None
    assert (row.flips.lost, row.flips.won) == (3, 1)
    assert row.flips.p == 2 * (1 + 4) / 16
    assert row.difference is not None
    assert row.difference.value == pytest.approx(-0.2)
    assert row.difference.error == pytest.approx(math.sqrt((4 - 10 * 0.04) / 9) / math.sqrt(10))
    assert row.recovery is not None
    ratio = 0.4 / 0.6
    residuals = [1 - ratio] * 3 + [-ratio] * 3 + [1.0] + [0.0] * 3
    spread = math.sqrt(sum(r * r for r in residuals) / 9)
    assert row.recovery.value == pytest.approx(ratio)
    assert row.recovery.error == pytest.approx(spread / math.sqrt(10) / 0.6)
    assert row.shows == pytest.approx(2 * (row.difference.error or 0))


@pytest.mark.parametrize(("lost", "won"), [(0, 0), (5, 0), (0, 5), (9, 3), (40, 61), (700, 650)])
def test_mcnemar_is_the_two_sided_binomial_test(lost: int, won: int) -> None:
    flips = lost + won
    tail = sum(math.comb(flips, k) for k in range(min(lost, won) + 1))
    assert mcnemar(lost, won) == pytest.approx(min(1.0, 2 * tail / 2**flips) if flips else 1.0)


def test_the_error_of_the_recovery_is_that_of_resampled_items() -> None:
    chance = random.Random(3)
    before = [float(chance.random() < 0.7) for _ in range(400)]
    after = [x if chance.random() < 0.85 else 1 - x for x in before]
    row = row_of(scores("t", *before), scores("t", *after))
    ratios = []
    for _ in range(2000):
        drawn = chance.choices(range(400), k=400)
        ratios.append(sum(after[n] for n in drawn) / sum(before[n] for n in drawn))
    mean = sum(ratios) / len(ratios)
    spread = math.sqrt(sum((r - mean) ** 2 for r in ratios) / (len(ratios) - 1))
    assert row.recovery is not None
    assert row.recovery.error == pytest.approx(spread, rel=0.1)


def test_where_nothing_flipped_so_many_items_still_show_no_less_than_four_flips() -> None:
    row = row_of(scores("t", *[1, 0] * 50), scores("t", *[1, 0] * 50))
    assert row.difference is not None
    assert row.difference.error == 0
    assert row.shows is not None
    for flips in (4, 5):  # all in one direction: the difference against two of its errors
        share = flips / 100
        error = math.sqrt(share * (1 - share) / 99)
        assert (share > 2 * error) is (share > row.shows)


def test_a_group_counts_items_or_tasks_alike() -> None:
    before = {"a": scores("a", 1, 1, 1, 1, 1, 0), "b": scores("b", 1, 0)}
    after = {"a": scores("a", 1, 1, 1, 0, 0, 0), "b": scores("b", 1, 0)}
    by_size = list(compare("x", before, after, [Asked(name="g", tasks=("a", "b"))]))
    alike = list(compare("x", before, after, [Asked(name="g", tasks=("a", "b"), by_size=False)]))
    assert [(row.task, row.group, row.judged) for row in by_size] == [
        ("g", None, True),
        ("a", "g", False),
        ("b", "g", False),
    ]
    assert (by_size[0].before, by_size[0].after) == (6 / 8, 4 / 8)
    assert (alike[0].before, alike[0].after) == pytest.approx(((5 / 6 + 1 / 2) / 2, 1 / 2))
    assert alike[0].difference is not None
    assert alike[1].difference is not None
    assert alike[0].difference.value == pytest.approx(-1 / 6)
    assert alike[0].difference.error == pytest.approx((alike[1].difference.error or 0) / 2)


def test_of_less_is_better_and_of_nothing_there_is_no_recovery() -> None:
    assert row_of(scores("t", 2.0, 3.0, better=False), scores("t", 2.5, 3.5, better=False)).recovery is None
    assert row_of(scores("t", 0, 0), scores("t", 0, 1)).recovery is None
    graded = row_of(scores("t", 0.25, 0.5, 0.75), scores("t", 0.25, 0.5, 0.5))
    assert graded.flips is None
    assert graded.recovery is not None


def test_a_metric_without_values_for_items_is_only_shown() -> None:
    one = TaskScores(task="t", items=("0 a b",), values={}, totals={("f1", "none"): 0.5}, higher={"f1": True})
    row = row_of(one, one)
    assert (row.before, row.after, row.difference, row.recovery, row.flips) == (0.5, 0.5, None, None, None)


def test_other_items_are_refused() -> None:
    one, other = scores("t", 1, 0), scores("t", 1, 0, 1)
    with pytest.raises(MoepressError, match="other items"):
        row_of(one, other)
