"""Remarks of a table's rows: one letter for each different one, and its text once, under the table."""

from collections.abc import Iterable, Sequence
from string import ascii_lowercase

from moepress.validation.report.cells import Table


def lettered(rows: Iterable[Sequence[str]]) -> tuple[tuple[str, ...], tuple[tuple[str, str], ...]]:
    """Letters for remarks.

    Args:
        rows: for each row of a table its remarks, maybe none.

    Returns:
        For each row its letters with commas between them; every letter with its text, in order.
    """
    letters: dict[str, str] = {}
    marks = []
    for remarks in rows:
        for text in remarks:
            letters.setdefault(text, _letter(len(letters)))
        marks.append(", ".join(sorted({letters[text] for text in remarks}, key=lambda mark: (len(mark), mark))))
    return tuple(marks), tuple((letter, text) for text, letter in letters.items())


def _letter(number: int) -> str:
    """a to z, then aa, ab and so on."""
    before, last = divmod(number, len(ascii_lowercase))
    return (_letter(before - 1) if before else "") + ascii_lowercase[last]


def mark_of(table: Table, row: int) -> str:
    """The letters of a row's remarks; empty where it has none."""
    return table.marks[row] if table.marks else ""
