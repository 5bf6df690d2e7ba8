"""A table as data, and how numbers are written in its cells."""

import re
from dataclasses import dataclass

from moepress.validation.quality.results import Estimate
from moepress.validation.report.schema import SubjectInfo

MINUS, NONE = "−", "–"


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """A table of text. The first column names the rows; `numeric` columns are set to the right.

    Attributes:
        title: heading.
        header: one text for each column.
        rows: each as long as the header.
        note: a paragraph that says how to read it.
        numeric: number of columns at the right end that hold numbers.
    """

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""
    numeric: int = 0

    def is_numeric(self, column: int) -> bool:
        """Whether a column is set to the right."""
        return column >= len(self.header) - self.numeric


def size_text(size_bytes: int) -> str:
    """Bytes in decimal units, as download pages give them: 9.3 MB."""
    if size_bytes < 1000:
        return f"{size_bytes} B"
    value, unit = size_bytes / 1000, "kB"
    for larger in ("MB", "GB", "TB"):
        if value < 999.5:
            break
        value, unit = value / 1000, larger
    return f"{value:.{0 if value >= 99.95 else 1}f} {unit}"


def percent_text(share: float, *, digits: int = 1) -> str:
    """A change as `+2.1 %`, with a true minus sign."""
    text = f"{abs(share) * 100:.{digits}f}"
    sign = "±" if float(text) == 0 else "+" if share > 0 else MINUS
    return f"{sign}{text} %"


def number_text(estimate: Estimate, digits: int) -> str:
    """`25.10 ± 0.31`."""
    error = "" if estimate.error is None else f" ± {estimate.error:.{digits}f}"
    value = round(estimate.value, digits) + 0.0  # no minus zero
    return f"{value:.{digits}f}{error}".replace("-", MINUS)


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


def text_kind(embedded: bool) -> str:
    """Whose text it is."""
    return "the small default text that comes with moepress" if embedded else "given by the user"


def size_change(first: SubjectInfo, subject: SubjectInfo) -> str:
    """Against the reference; a dash for itself."""
    return percent_text(subject.stored_bytes / first.stored_bytes - 1, digits=0) if first.stored_bytes else NONE
