"""Our own tasks: the same items every time, and a demo model between chance and all right, measured."""

import math

from moepress.validation.tasks.names import CONTINUATION, SUMS
from moepress.validation.tasks.own import own_items, own_scores
from moepress.validation.tasks.text_model import TextModel


def test_items_are_always_the_same_and_their_answers_even() -> None:
    items = own_items(CONTINUATION)
    assert items == own_items(CONTINUATION)
    assert len(items) == 120
    assert [sum(item["answer"] == place for item in items) for place in range(4)] == [32, 32, 28, 28]
    assert all(len(set(item["choices"])) == 4 for item in items)
    sums = own_items(SUMS)
    assert len(sums) == 61
    assert all(item["context"].endswith("\n####") and int(item["answer"]) == float(item["answer"]) for item in sums)


def test_the_demo_is_above_chance_and_not_perfect(demo_text: TextModel) -> None:
    found = own_scores(CONTINUATION, demo_text, None)
    share = found.totals["acc", "none"]
    chance, error = 0.25, math.sqrt(0.25 * 0.75 / len(found.items))
    assert chance + 3 * error < share < 0.9
    right = own_scores(SUMS, demo_text, None).totals["exact_match", "number"]
    assert 0.15 < right < 0.9  # a number of its own choice would be right once in a hundred


def test_a_limit_takes_the_first_items(demo_text: TextModel) -> None:
    few = own_scores(SUMS, demo_text, 5)
    assert len(few.items) == 5
    assert few.max_gen_toks == 8
