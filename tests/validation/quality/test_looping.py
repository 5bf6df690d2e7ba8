"""Loops by hand, and the statistics of pairs against other ways of computing them."""

import math
import random
from collections.abc import Sequence

import pytest

from moepress.validation.quality.generation import RECOMMENDED, answer_of, answer_rows, telling
from moepress.validation.quality.looping import (
    Cycle,
    Outcome,
    cycle_at_end,
    mean_length,
    outcome_of,
    share_of,
    shift_of,
)

STOP = frozenset({1})
SPEECH = list(range(100, 160))  # no token twice


@pytest.mark.parametrize(
    ("tokens", "found"),
    [
        ([7] * 40, Cycle(period=1, tokens=40)),
        ([*SPEECH, *[7] * 32], Cycle(period=1, tokens=32)),
        ([*SPEECH, *[7, 8] * 16], Cycle(period=2, tokens=32)),
        ([*SPEECH, *[7, 8, 9] * 11], Cycle(period=3, tokens=33)),
        ([*SPEECH, 8, 9, *[7, 8, 9] * 11], Cycle(period=3, tokens=35)),  # the first turn is a part of one
        ([*SPEECH, *[7, 8, 9] * 11, 7], Cycle(period=3, tokens=34)),  # the last one is
        (SPEECH * 3, Cycle(period=60, tokens=180)),
        ([7, 7, 8] * 20, Cycle(period=3, tokens=60)),  # not the period 1 of its pairs
    ],
)
def test_a_phrase_over_and_over_at_the_end_is_a_loop(tokens: Sequence[int], found: Cycle) -> None:
    assert cycle_at_end(tokens) == found
    assert outcome_of(tokens, STOP) is Outcome.LOOPS
    assert outcome_of([*tokens, 1], STOP) is Outcome.ENDED, "it came to an end by itself"


@pytest.mark.parametrize(
    "tokens",
    [
        [],
        [7],
        SPEECH,
        [*SPEECH, *[7] * 31],  # shorter than 32 tokens
        SPEECH * 2,  # twice
        [*SPEECH * 2, *SPEECH[:59]],  # not quite three times
        [*[7] * 200, *SPEECH[:1]],  # it went on
        [n for step in range(40) for n in (7, 8, 200 + step)],  # it counts on
    ],
)
def test_what_goes_on_or_is_short_is_none(tokens: Sequence[int]) -> None:
    assert cycle_at_end(tokens) is None
    assert outcome_of(tokens, STOP) is Outcome.UNENDED


def test_the_period_is_that_of_brute_force() -> None:
    chance = random.Random(0)
    for _ in range(400):
        phrase = [chance.randrange(3) for _ in range(chance.randint(1, 14))]
        tokens = [chance.randrange(3) for _ in range(chance.randint(0, 9))] + phrase * chance.randint(1, 9)

        def covered(period: int, tokens: list[int] = tokens) -> int:
            fits = [n for n in range(period, len(tokens) + 1) if all(a == b for a, b in _apart(tokens[-n:], period))]
            return max(fits, default=0)

        every = {p: covered(p) for p in range(1, len(tokens) + 1)}
        right = [p for p, n in every.items() if n >= 3 * p and n >= 12]
        found = cycle_at_end(tokens, least_tokens=12)
        assert (found and (found.period, found.tokens)) == ((right and (right[0], every[right[0]])) or None)


def _apart(tokens: Sequence[int], period: int) -> list[tuple[int, int]]:
    return list(zip(tokens[period:], tokens[: len(tokens) - period], strict=True))


@pytest.mark.parametrize(("count", "total"), [(0, 50), (1, 50), (25, 50), (50, 50), (18, 500), (36, 500)])
def test_wilsons_interval_is_where_the_score_test_says_no(count: int, total: int) -> None:
    found = share_of(count, total)
    assert found.value == count / total
    for end in (found.low, found.high):
        if 0 < end < 1:
            score = (found.value - end) / math.sqrt(end * (1 - end) / total)
            assert abs(score) == pytest.approx(1.959963984540054)
    assert found.low <= found.value <= found.high
    assert (found.low == 0) == (count == 0)
    assert (found.high == 1) == (count == total)


def test_fifty_prompts_do_not_show_what_five_hundred_do() -> None:
    """3.6 % before and 7.2 % after: of 50 prompts two and four."""
    few = shift_of(*_loops(50, 2, 4))
    many = shift_of(*_loops(500, 18, 36))
    assert (few.only_before, few.only_after, few.increase.value) == (1, 3, pytest.approx(0.04))
    assert few.increase.value < 2 * (few.increase.error or 0)
    assert many.increase.value == pytest.approx(0.036)
    assert many.increase.value > 2 * (many.increase.error or 9)
    assert RECOMMENDED == 500


def _loops(total: int, before: int, after: int) -> tuple[list[bool], list[bool]]:
    """Half of those that loop before loop after, too."""
    both = before // 2
    first = [True] * before + [False] * (total - before)
    second = [True] * both + [False] * (before - both) + [True] * (after - both)
    return first, second + [False] * (total - len(second))


def test_a_difference_of_pairs_is_that_of_its_table() -> None:
    before, after = [True, True, False, False, False] * 20, [True, False, True, True, False] * 20
    found = shift_of(before, after)
    assert (found.only_before, found.only_after, found.increase.value) == (20, 40, pytest.approx(0.2))
    drawn = random.Random(1)
    means = []
    for _ in range(4000):
        picked = [drawn.randrange(100) for _ in range(100)]
        means.append(sum(after[n] - before[n] for n in picked) / 100)
    spread = math.sqrt(sum((m - 0.2) ** 2 for m in means) / len(means))
    assert found.increase.error == pytest.approx(spread, rel=0.05), "the bootstrap's error"


def test_where_nothing_differs_there_is_an_error_all_the_same() -> None:
    found = shift_of([False] * 98, [False] * 98)
    assert (found.increase.value, found.p_value) == (0, 1)
    assert found.increase.error == pytest.approx(0.01)


@pytest.mark.parametrize(("one", "other", "p"), [(0, 1, 1.0), (0, 5, 2 / 32), (1, 5, 14 / 64), (3, 3, 1.0)])
def test_the_sign_test_is_that_of_coins(one: int, other: int, p: float) -> None:
    rest = [False] * 9
    found = shift_of([True] * one + [False] * other + rest, [False] * one + [True] * other + rest)
    assert found.p_value == pytest.approx(p)


def test_lengths_have_a_mean_and_an_error() -> None:
    found = mean_length([10, 20, 30])
    assert (found.value, found.error) == (20, pytest.approx(10 / math.sqrt(3)))
    assert mean_length([5]).error is None


def test_rows_count_ends_and_pairs() -> None:
    ended, looped, cut = [5, 6, 1], [7] * 40, SPEECH
    first, second = answer_rows(
        ["before", "after"], [[ended, ended, looped, cut], [ended, looped, looped, ended]], STOP
    )
    assert (first.loops.count, first.unended.count, first.more_loops, first.more_unended) == (1, 1, None, None)
    assert (second.loops.count, second.unended.count) == (2, 0)
    assert second.more_loops is not None
    assert second.more_unended is not None
    assert (second.more_loops.only_before, second.more_loops.only_after) == (0, 1)
    assert second.more_unended.increase.value == -0.25
    assert (first.mean_tokens.value, second.mean_tokens.value) == ((3 + 3 + 40 + 60) / 4, (3 + 40 + 40 + 3) / 4)


def test_new_loops_are_shown_first_and_the_same_answers_never() -> None:
    ended, looped, cut = [5, 6, 1], [7] * 40, SPEECH
    before = [ended, cut, looped, cut, ended, ended]
    after = [ended, ended, looped, looped, [5, 5, 1], looped]
    assert telling(before, after, STOP) == [5, 3, 1, 4]
    assert telling(before, before, STOP) == []


def test_a_loop_is_shown_with_its_phrase() -> None:
    found = answer_of("after", [*SPEECH, *[7, 8] * 20], "…", STOP)
    assert (found.outcome, found.period, found.repeated, found.tokens) == (Outcome.LOOPS, 2, 20, 100)
    assert answer_of("after", [5, 1], "…", STOP).period is None
