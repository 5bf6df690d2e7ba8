import dataclasses
import math

import pytest

from moepress.errors import UsageError
from moepress.validation.quality.results import Estimate, Paired, QualityRow
from moepress.validation.quality.thresholds import Thresholds, judge, parse_threshold


def row(increase: float, error: float | None, kl: float = 0.1, kl_error: float | None = 0.01) -> QualityRow:
    ratio = Estimate(value=1 + increase, error=error)
    return QualityRow(
        subject="pruned",
        domain="all windows",
        scope="all",
        windows=9,
        tokens=99,
        nll=Estimate(value=3.0, error=0.1),
        perplexity=Estimate(value=20.0, error=2.0),
        bits_per_byte=1.0,
        paired=Paired(
            delta_nll=Estimate(value=increase, error=error),
            perplexity_ratio=ratio,
            kl=Estimate(value=kl, error=kl_error),
            same_top1=Estimate(value=0.9, error=0.01),
        ),
    )


@pytest.mark.parametrize(("text", "value"), [("3%", 0.03), ("3 %", 0.03), ("0.03", 0.03), ("0", 0), ("150%", 1.5)])
def test_shares_are_read_with_and_without_a_percent_sign(text: str, value: float) -> None:
    assert parse_threshold(text, "--max-ppl-increase") == pytest.approx(value)


@pytest.mark.parametrize("text", ["", "%", "three", "-1%", "nan", "inf", "3%%", "3% x"])
def test_what_is_not_a_share_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="is not a share"):
        parse_threshold(text, "--max-ppl-increase")


def test_a_bare_three_could_mean_two_things_and_is_refused() -> None:
    with pytest.raises(UsageError, match="write 3%"):
        parse_threshold("3", "--max-ppl-increase")


@pytest.mark.parametrize(
    ("increase", "error", "state"),
    [
        (0.029, 0.1, "kept"),
        (-0.5, 0.0, "kept"),
        (0.049, 0.01, "exceeded within the error"),
        (0.051, 0.01, "missed"),
        (0.031, None, "missed"),
        (math.inf, math.nan, "missed"),
    ],
)
def test_a_limit_is_missed_only_beyond_two_sigma(increase: float, error: float | None, state: str) -> None:
    (outcome,) = judge(Thresholds(max_ppl_increase=0.03), [row(increase, error)])
    assert (outcome.state, outcome.measure, outcome.limit) == (state, "perplexity increase", 0.03)


@pytest.mark.parametrize(("kl", "state"), [(0.05, "kept"), (0.069, "exceeded within the error"), (0.071, "missed")])
def test_the_limit_on_kl_has_two_sigma_as_well(kl: float, state: str) -> None:
    (outcome,) = judge(Thresholds(max_kl=0.05), [row(0.0, 0.0, kl, 0.01)])
    assert (outcome.state, outcome.measure) == (state, "KL divergence")


def test_only_compared_subjects_and_only_all_windows_are_judged() -> None:
    found = row(0.5, 0.001)
    rows = [dataclasses.replace(found, scope="domain"), dataclasses.replace(found, paired=None), found]
    assert len(judge(Thresholds(max_ppl_increase=0.1, max_kl=0.1), rows)) == 2
    assert judge(Thresholds(), rows) == ()
