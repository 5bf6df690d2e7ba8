"""Numbers and sentences of the report: nothing is rounded to all or to none, and no two sentences contradict."""

import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moepress.validation.quality.results import Estimate, Quality
from moepress.validation.report.cells import figures, number_text, percent_text, share_estimate_text, share_text
from moepress.validation.report.headline import headlines
from moepress.validation.report.markdown import markdown
from moepress.validation.report.schema import Pruning, Report, SubjectInfo
from moepress.validation.report.wording import plain_words

NOTHING = {"0", "0.0", "0.00", "0.0000"}


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [
        (99.97, 1, "99.97"),
        (99.99, 0, "99.99"),
        (99.99999999, 1, "99.9999"),
        (100.0, 1, "100.0"),
        (99.4, 0, "99"),
        (0.04, 1, "0.040"),
        (0.3, 1, "0.3"),
        (0.4, 0, "0.40"),
        (0.0535, 4, "0.0535"),
        (0.00023, 4, "0.00023"),
        (2.3e-5, 4, "2.3e-5"),
        (-2.3e-5, 4, "−2.3e-5"),
        (0.0, 4, "0"),
        (float("-inf"), 2, "−inf"),
        (float("nan"), 2, "nan"),
    ],
)
def test_small_numbers_keep_their_figures_and_nearly_all_is_not_all(value: float, digits: int, text: str) -> None:
    assert figures(value, digits, whole=100) == text


@given(st.floats(min_value=0, max_value=1), st.integers(0, 2))
def test_only_all_of_it_is_100_percent_and_only_none_is_0(share: float, digits: int) -> None:
    text = share_text(share, digits=digits).removesuffix(" %")
    assert (float(text) >= 100) == (share * 100 >= 100)
    assert (text in NOTHING) == (share == 0)


@given(st.floats(min_value=-1, max_value=10, allow_nan=False))
def test_a_change_that_is_there_is_shown_with_its_sign(change: float) -> None:
    text = percent_text(change)
    assert (text == "±0 %") == (abs(change) < 1e-12)
    assert text[0] == ("±" if abs(change) < 1e-12 else "+" if change > 0 else "−")
    assert (text == "−100.0 %") == (change * 100 <= -100)


def test_errors_have_the_decimals_of_their_number_and_are_never_written_as_none() -> None:
    assert number_text(Estimate(value=1.01, error=0.012), 2) == "1.01 ± 0.01"
    assert number_text(Estimate(value=1.01, error=0.0004), 2) == "1.01 ± 0.00040"
    assert number_text(Estimate(value=2.3e-5, error=4.1e-6), 4) == "2.3e-5 ± 4.1e-6"
    assert share_estimate_text(Estimate(value=0.9997, error=0.0001)) == "99.97 ± 0.010 %"
    assert percent_text(0.0438, error=0.003) == "+4.4 ± 0.3 %"


def report_of(quality: Quality, overall: Estimate, by_domain: dict[str, Estimate]) -> Report:
    """A report of two models whose perplexities stand in these ratios."""
    rows = []
    for row in quality.rows:
        ratio = by_domain.get(row.domain, overall)
        if row.subject == "demo":
            rows.append(row)
        elif row.subject == "pruned":
            assert row.paired is not None
            reference = quality.row("demo", row.domain).perplexity.value
            rows.append(
                dataclasses.replace(
                    row,
                    perplexity=Estimate(value=reference * ratio.value),
                    paired=dataclasses.replace(row.paired, perplexity_ratio=ratio),
                )
            )
    subjects = (
        SubjectInfo(label="demo", stored_bytes=9000, parameters=1),
        SubjectInfo(label="pruned", stored_bytes=8999, parameters=1),
    )
    return Report(subjects=subjects, quality=dataclasses.replace(quality, rows=tuple(rows)))


def ratios(quality: Quality, *changes: float, error: float | None) -> dict[str, Estimate]:
    every = (changes * len(quality.domains))[: len(quality.domains)]
    pairs = zip(quality.domains, every, strict=True)
    return {domain: Estimate(value=1 + change, error=error) for domain, change in pairs}


@pytest.mark.parametrize("error", [None, 0.0, 0.01])
def test_of_the_same_model_it_is_said_that_nothing_was_lost(quality: Quality, error: float | None) -> None:
    same = Estimate(value=1.0, error=error)
    words = plain_words(report_of(quality, same, ratios(quality, 0.0, error=error)))
    assert "how sure it is of the text as a whole has not changed." in words[1]
    assert words[2] == "Nothing measurable was lost in any of the texts."


def test_a_loss_within_the_error_is_called_none(quality: Quality) -> None:
    report = report_of(quality, Estimate(value=1.0002, error=0.0004), ratios(quality, 0.0004, -0.0003, error=0.001))
    words = " ".join(plain_words(report))
    assert "not changed by more than the error of the measurement" in words
    assert "Nothing measurable was lost" in words
    assert "ost was lost" not in words
    assert "perplexity +0.020 %, within the error (" in headlines(report)[0]


def test_a_loss_that_no_single_text_shows_does_not_contradict_the_whole(quality: Quality) -> None:
    report = report_of(quality, Estimate(value=1.01, error=0.001), ratios(quality, 0.01, error=0.02))
    words = " ".join(plain_words(report))
    assert "less sure of the text (perplexity +1.0 %)" in words
    assert "Nothing measurable" not in words
    assert "In no single text is the loss larger than its error." in words


def test_texts_that_lost_nothing_measurable_are_named_as_such(quality: Quality) -> None:
    found = ratios(quality, 0.0003, error=0.01) | {quality.domains[0]: Estimate(value=1.05, error=0.01)}
    words = plain_words(report_of(quality, Estimate(value=1.001, error=0.01), found))[2]
    first, *others = quality.domains
    assert words.startswith(f"Something was lost in {first} (perplexity +5.0 %), nothing measurable in {others[0]}")
    assert "+0.0" not in words


@pytest.mark.parametrize("change", [0.0, 2e-4, -2e-4, 0.05, -0.05])
@pytest.mark.parametrize("error", [None, 1e-5, 0.01])
def test_no_sentence_says_that_a_loss_is_nothing(quality: Quality, change: float, error: float | None) -> None:
    one = Estimate(value=1 + change, error=error)
    report = report_of(quality, one, ratios(quality, change, error=error))
    words = " ".join((*plain_words(report), *headlines(report)))
    assert "+0.0 %" not in words
    assert "100 % of it" not in words
    assert "99.99 % of it" in words
    assert ("less sure" in words) <= (change > 0)
    assert ("was lost in " in words) == (change > 0 and (error is None or change > 2 * error)) or "Nothing" in words


def test_experts_that_were_rounded_are_told_in_one_way_only(quality: Quality) -> None:
    from moepress.validation.report.schema import ExpertName, Quantization

    report = report_of(quality, Estimate(value=1.0), {}).model_copy(
        update={"quantization": Quantization(scheme="4 bit", fallback_experts=(ExpertName(layer=2, expert=7),))}
    )
    text = markdown(report)
    assert "no tokens came there, or the solver failed" in text
    assert "Rounded to nearest, for want of tokens or because the solver failed: 1 expert" in text


def pruning(**more: Any) -> Pruning:
    return Pruning(criterion="reap", kept=8, total=16, **more)


def test_a_domain_that_is_lost_beside_the_others_is_named_in_the_headline(quality: Quality) -> None:
    first, second, *_ = quality.domains
    found = ratios(quality, 0.02, error=0.001) | {first: Estimate(value=1.3, error=0.01)}
    report = report_of(quality, Estimate(value=1.1, error=0.01), found)
    assert headlines(report)[0].endswith(f"; worst hit: {first} (+30.0 %)")
    for section, said in (
        (pruning(given_up=(first,)), ""),
        (pruning(limit="20x", protected=(second,)), ""),
        (pruning(limit="2x", protected=(first,)), f"; worst hit: {first} (+30.0 %)"),
        (
            pruning(lost=(second, "czech")),
            f"; worst hit: {first} (+30.0 %), {second} (+2.0 %, by the profile), czech (by the profile)",
        ),
    ):
        line = headlines(report.model_copy(update={"pruning": section}))[0]
        assert ("; worst hit: " in line) == bool(said)
        assert line.endswith(said)


@pytest.mark.parametrize(
    ("worst", "error"),
    [(1.019, 0.001), (1.3, 0.2), (1.04, 0.001)],
    ids=["small", "within the error", "like the others"],
)
def test_no_domain_is_called_lost_for_little(quality: Quality, worst: float, error: float) -> None:
    others = 0.03 if worst == 1.04 else 0.001
    found = ratios(quality, others, error=0.0001) | {quality.domains[0]: Estimate(value=worst, error=error)}
    assert "worst hit" not in headlines(report_of(quality, Estimate(value=1.01, error=0.001), found))[0]
