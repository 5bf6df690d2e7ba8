import pytest

from moepress.validation.quality.results import Estimate
from moepress.validation.report.cells import number_text, percent_text, size_text


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (9_268_136, "9.3 MB"),
        (99_940_000, "99.9 MB"),
        (99_960_000, "100 MB"),
        (999_600_000, "1.0 GB"),
        (688_000_000_000, "688 GB"),
        (1_200_000_000_000, "1.2 TB"),
        (5_000_000_000_000_000, "5000 TB"),
    ],
)
def test_sizes_are_short_and_decimal(size_bytes: int, text: str) -> None:
    assert size_text(size_bytes) == text


@pytest.mark.parametrize(
    ("share", "text"), [(0.021, "+2.1 %"), (-0.67, "−67.0 %"), (0.0, "±0.0 %"), (-0.0001, "±0.0 %"), (1.5, "+150.0 %")]
)
def test_changes_have_a_sign(share: float, text: str) -> None:
    assert percent_text(share) == text


def test_numbers_have_their_error_if_it_is_known() -> None:
    assert number_text(Estimate(value=25.1, error=0.314), 2) == "25.10 ± 0.31"
    assert number_text(Estimate(value=-0.5), 1) == "−0.5"
    assert number_text(Estimate(value=-1e-9), 4) == "0.0000"
