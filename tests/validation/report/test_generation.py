"""What the report says of answers: tables, sentences, and that files without them are read."""

import json

import pytest

from moepress.validation.quality.generation import Example, Generation, answer_of, answer_rows
from moepress.validation.quality.results import Quality
from moepress.validation.quality.thresholds import Thresholds, judge_answers
from moepress.validation.report.contents import contents
from moepress.validation.report.generation import (
    GENERATION,
    generation_in_short,
    generation_sentence,
    generation_tables,
    visible_text,
)
from moepress.validation.report.html import html
from moepress.validation.report.places import without_places
from moepress.validation.report.schema import Report, SubjectInfo
from moepress.validation.report.wording import plain_words

ENDED, LOOPED, CUT, STOP = [5, 6, 1], [7, 8] * 30, list(range(100, 160)), frozenset({1})


def generation(total: int, before: int, after: int) -> Generation:
    """So many prompts, of which so many loop before and, other ones, after; the last one is cut off by both."""
    first = [LOOPED] * before + [ENDED] * (total - before - 1) + [CUT]
    second = [ENDED] * (total - after - 1) + [LOOPED] * after + [CUT]
    place = total - 2
    return Generation(
        prompts=total,
        source="the prompts of a.txt",
        digest="ab",
        chat=True,
        max_new_tokens=60,
        temperature=0.0,
        seed=0,
        rows=answer_rows(["demo", "pruned"], [first, second], STOP),
        examples=(
            Example(
                prompt="Why?\n\n| <b>",
                answers=(
                    answer_of("demo", first[place], "because of /tmp/some/place", STOP),
                    answer_of("pruned", second[place], "ha " * 400, STOP),
                ),
            ),
        ),
    )


def report_of(quality: Quality, found: Generation | None) -> Report:
    labels = ("demo", "copy", "pruned")
    return Report(
        subjects=tuple(SubjectInfo(label=label, stored_bytes=2, parameters=1) for label in labels),
        quality=quality,
        generation=found,
    )


def test_the_table_has_counts_intervals_and_pairs() -> None:
    counts, examples = generation_tables(generation(500, 18, 36))
    assert counts.title == GENERATION
    before, after = counts.rows
    assert before == ("demo", "3.6 % (2.3 % to 5.6 %)", "–", "–", "0.2 % (0.035 % to 1.1 %)", "–", "5.2 ± 0.5")
    assert after[:4] == ("pruned", "7.2 % (5.2 % to 9.8 %)", "+3.6 ± 1.5", "18 : 36 (p = 0.020)")
    assert after[5] == "0 ± 0.2"
    assert "up to 60 tokens" in counts.note
    assert "3 times or more, over 32 tokens or more" in counts.note
    assert "less than 2.9 percentage points are not told from chance." in counts.note
    ((number, prompt, fine, looping),) = examples.rows
    assert number == "1"
    assert prompt == "Why?\n\n| <b>"
    assert fine == "[ended, 3 tokens]\nbecause of /tmp/some/place"
    assert looping.startswith("[loops: a phrase of 2 tokens 30 times]\nha ha")
    assert " […] " in looping
    assert len(looping) < 600


def test_few_prompts_are_told_to_be_few() -> None:
    assert "; 500 or more show smaller ones." in visible_text(generation(50, 2, 4))
    assert "500 or more" not in visible_text(generation(500, 2, 4))


def test_a_terminal_gets_a_short_table() -> None:
    (table,) = generation_in_short(generation(500, 18, 36))
    assert table.rows[1] == ("pruned", "7.2 %", "+3.6 ± 1.5", "0.2 %", "7")
    assert generation_in_short(None) == generation_tables(None) == ()


@pytest.mark.parametrize(("after", "chance"), [(60, False), (19, True)])
def test_a_sentence_says_what_changed_and_whether_that_is_chance(quality: Quality, after: int, chance: bool) -> None:
    (said,) = generation_sentence(generation(500, 18, after), "pruned")
    assert said.startswith(f"Of 500 answers 18 (3.6 %) looped before and {after} (")
    assert ("from chance" in said) is chance
    assert generation_sentence(generation(500, 18, after), "copy") == ()
    assert said in plain_words(report_of(quality, generation(500, 18, after)))


def test_it_stands_behind_the_divergences_in_every_form(quality: Quality) -> None:
    report = report_of(quality, generation(500, 18, 36))
    titles = [table.title for table in contents(report)]
    place = titles.index(GENERATION)
    assert titles[place - 1] == "Agreement with the first model"
    assert titles[place + 1] == "Answers side by side"
    page = html(report)
    assert "Why?" in page
    assert "<b>" not in page.split("Why?")[1][:40]


def test_what_models_wrote_keeps_its_paths_and_old_files_are_read(quality: Quality) -> None:
    report = without_places(report_of(quality, generation(9, 1, 1)))
    assert report.generation is not None
    assert report.generation.examples[0].answers[0].text.endswith("/tmp/some/place")
    assert Report.model_validate_json(report.model_dump_json()) == report
    old = json.loads(report.model_dump_json())
    del old["generation"]
    assert Report.model_validate(old).generation is None


@pytest.mark.parametrize(("after", "state"), [(18, "kept"), (31, "exceeded within the error"), (60, "missed")])
def test_the_limit_has_two_sigma(after: int, state: str) -> None:
    (outcome,) = judge_answers(Thresholds(max_loop_increase=0.02), generation(500, 18, after).rows)
    assert (outcome.subject, outcome.measure, outcome.state) == ("pruned", "loop increase", state)
    assert judge_answers(Thresholds(), generation(500, 18, after).rows) == ()
