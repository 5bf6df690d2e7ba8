"""What a run is made of, as it was at the start: an input that changes meanwhile would give half of two models."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from moepress.errors import InvalidInputError

Stamps = Mapping[Path, tuple[int, int]]
"""File -> its size and mtime in ns, links followed."""


def stamps(files: Iterable[Path]) -> dict[Path, tuple[int, int]]:
    """Size and mtime of files that are there."""
    found = {}
    for file in files:
        facts = file.resolve().stat()
        found[file.absolute()] = (facts.st_size, facts.st_mtime_ns)
    return found


def require_unchanged(before: Stamps) -> None:
    """Refuse a result whose inputs are no more what they were.

    Raises:
        InvalidInputError: naming the first that changed.
    """
    for file, (size, mtime_ns) in before.items():
        try:
            facts = file.stat()
        except OSError as error:
            raise InvalidInputError(_said(file, "is gone")) from error
        if (facts.st_size, facts.st_mtime_ns) != (size, mtime_ns):
            what = f"had {size} bytes and has {facts.st_size}" if facts.st_size != size else "was written to"
            raise InvalidInputError(_said(file, what))


def _said(file: Path, what: str) -> str:
    return (
        f"{file} {what} while the output was made, which may hold some of both; restore it and repeat with --resume, "
        "which compares the whole model, or with --force to start anew."
    )
