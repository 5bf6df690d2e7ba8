"""The rows of a journal, one JSON object a line; a torn last line stands for nothing."""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from moepress.errors import InvalidInputError
from moepress.runs.files import JOURNAL, open_plain

_FIRST_BYTES = 64 << 20


def read_rows(journal: Path, *, mend: bool = False) -> Iterator[dict[str, Any]]:
    """A journal's rows without a torn last line; `mend` cuts that off, so that appending stays sound.

    Raises:
        InvalidInputError: it is damaged elsewhere.
    """
    if journal.is_symlink():
        raise InvalidInputError(f"{journal} is a link, which no journal is; move it away.")
    try:
        with open_plain(journal) as stream:
            raw = stream.read()
    except FileNotFoundError:
        return
    whole = raw[: raw.rfind(b"\n") + 1]
    if mend and len(whole) != len(raw):
        with journal.open("r+b") as writable:
            writable.truncate(len(whole))
    for line in whole.splitlines():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise damaged(journal) from error
        if not isinstance(row, dict):
            raise damaged(journal)
        yield row


def damaged(journal: Path) -> InvalidInputError:
    """The refusal of a journal that is not sound."""
    return InvalidInputError(f"{journal} is damaged; pass --force to start anew.")


def append(journal: Path, row: Mapping[str, Any]) -> None:
    """Add a row to a journal and flush it."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
    with os.fdopen(os.open(journal, flags, 0o666), "ab") as stream:
        stream.write(json.dumps(row, sort_keys=True).encode() + b"\n")
        stream.flush()
        os.fsync(stream.fileno())


def first_settings(folder: Path) -> dict[str, Any]:
    """The settings in a folder's journal, empty where it has none of ours."""
    try:
        found = next(read_rows(folder / JOURNAL), {}).get("settings")
    except (InvalidInputError, OSError):
        return {}
    return found if isinstance(found, dict) else {}


def holds_journal(folder: Path) -> bool:
    """Whether a folder has a journal of ours, not only a file of that name."""
    try:
        return isinstance(next(read_rows(folder / JOURNAL), {}).get("settings"), dict)
    except (InvalidInputError, OSError):
        return False


def is_torn(journal: Path) -> bool:
    """Whether its process was killed before the first line was whole."""
    try:
        with open_plain(journal) as stream:
            return not journal.is_symlink() and b"\n" not in stream.read(_FIRST_BYTES)
    except (OSError, InvalidInputError):
        return False
