"""A table as data, and how numbers are written in its cells."""

import math
import re
from dataclasses import dataclass

from moepress.validation.quality.results import Estimate
from moepress.validation.report.schema import SubjectInfo

MINUS, NONE = "−", "–"
_SMALLEST_POWER = -4  # of ten, that is written out; below it numbers look like 2.3e−5
_MOST_DIGITS = 4  # more than were asked for
ROUNDING = 1e-12
"""Changes below it are rounding of fp64 means, and nothing at all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """A table of text. The first column names the rows; `numeric` columns are set to the right.

    Attributes:
        title: heading.
        header: one text for each column.
        rows: each as long as the header.
        note: a paragraph that says how to read it.
        numeric: number of columns at the right end that hold numbers.
        marks: for each row the letters of its remarks; empty where no row has any.
        remarks: every letter with its text, which stands under the table.
        marked: rows that are to stand out.
        prose: the cells hold text of models, line breaks among it.
    """

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""
    numeric: int = 0
    marks: tuple[str, ...] = ()
    remarks: tuple[tuple[str, str], ...] = ()
    marked: frozenset[int] = frozenset()
    prose: bool = False

    def is_numeric(self, column: int) -> bool:
        """Whether a column is set to the right."""
        return column >= len(self.header) - self.numeric


def figures(value: float, digits: int, *, whole: float | None = None) -> str:
    """A number with that many decimals, and more where these would not tell what it is.

    Small numbers keep two significant figures (0.00023, 2.3e-5), and what is short of `whole` is never rounded up to it
    (99.97 of 100). Only nothing is written as 0. All measured numbers of the report are written here.
    """
    if not math.isfinite(value):
        return f"{value}".replace("-", MINUS)
    size, text = abs(value), f"{abs(value):.{digits}f}"
    if size == 0:
        return "0"
    if size < 10.0 ** -max(digits - 1, min(digits, 1)):
        text = _two_figures(size, digits)
    if whole is not None and size < whole <= float(text):
        text = _short_of(size, digits, whole)
    return f"{MINUS}{text}" if value < 0 else text


def _two_figures(size: float, digits: int) -> str:
    mantissa, _, exponent = f"{size:.1e}".partition("e")
    power = int(exponent)
    return f"{size:.{max(digits, 1 - power)}f}" if power >= _SMALLEST_POWER else f"{mantissa}e{power}"


def _short_of(size: float, digits: int, whole: float) -> str:
    """With as many decimals as tell it from the whole; cut, not rounded, where none of a few do."""
    for more in range(digits + 1, digits + _MOST_DIGITS):
        if float(text := f"{size:.{more}f}") < whole:
            return text
    return f"{whole - 10.0**-more:.{more}f}"


def size_text(size_bytes: int) -> str:
    """Bytes in decimal units, as download pages give them: 9.3 MB."""
    if size_bytes < 1000:
        return f"{size_bytes} B"
    value, unit = size_bytes / 1000, "kB"
    for larger in ("MB", "GB", "TB"):
        if value < 999.5:
            break
        value, unit = value / 1000, larger
    return f"{figures(value, 0 if value >= 99.95 else 1)} {unit}"


def share_text(share: float, *, digits: int = 1) -> str:
    """A share of 0 to 1 as `82.0 %`; 100 only for all of it and 0 only for none."""
    return f"{figures(share * 100, digits, whole=100)} %"


def percent_text(share: float, *, digits: int = 1, error: float | None = None) -> str:
    """A change as `+2.1 %` or `+2.1 ± 0.3 %`, with a true minus sign."""
    percent = 0.0 if abs(share) < ROUNDING else share * 100
    sign = "±" if percent == 0 else "+" if percent > 0 else MINUS
    beside = "" if error is None else f" ± {_error(error * 100, digits)}"
    if percent == 0:
        return f"{sign}0 %" if not error else f"0{beside} %"
    return f"{sign}{figures(abs(percent), digits, whole=100)}{beside} %"


def number_text(estimate: Estimate, digits: int, *, whole: float | None = None) -> str:
    """`25.10 ± 0.31`."""
    error = "" if estimate.error is None else f" ± {_error(estimate.error, digits)}"
    return f"{figures(estimate.value, digits, whole=whole)}{error}"


def _error(error: float, digits: int) -> str:
    """As many decimals as its number has; more only where nothing would be left of it."""
    text = f"{error:.{digits}f}"
    return text if not math.isfinite(error) or float(text) else figures(error, digits)


def share_estimate_text(estimate: Estimate, digits: int = 1) -> str:
    """A share of 0 to 1 with its error: `82.0 ± 0.2 %`."""
    error = None if estimate.error is None else estimate.error * 100
    return f"{number_text(Estimate(value=estimate.value * 100, error=error), digits, whole=100)} %"


def three_figures(value: float) -> str:
    """Three significant figures, the last one too where it is 0: 32.0; whole numbers from a hundred on."""
    if not math.isfinite(value) or value >= 99.95:
        return f"{value:,.0f}"
    return f"{value:#.3g}"


def without_version(runtime: str) -> str:
    """A runtime's name alone."""
    return re.sub(r" [\d.]+\S*$", "", runtime)


def parameters_text(count: int) -> str:
    """A number of parameters in three figures; a dash where it is not known."""
    if not count:
        return NONE
    return f"{count / 1e9:.3g} B" if count >= 1e9 else f"{count / 1e6:.3g} M"


def experts_text(count: int | tuple[int, int] | None) -> str:
    """Experts of a layer; from fewest to most where layers differ."""
    if isinstance(count, tuple):
        return f"{count[0]} to {count[1]}"
    return NONE if count is None else str(count)


def prose_text(text: str) -> str:
    """Text of a model for a cell; of many line breaks in a row their number."""
    return re.sub(r"\n{3,}", lambda found: f"\n[{len(found[0])} line breaks]\n", text)


def text_kind(embedded: bool) -> str:
    """Whose text it is."""
    return "the small default text that comes with moepress" if embedded else "given by the user"


def size_change(first: SubjectInfo, subject: SubjectInfo) -> str:
    """Against the reference; a dash for itself."""
    return percent_text(subject.stored_bytes / first.stored_bytes - 1, digits=0) if first.stored_bytes else NONE
