"""Inputs are files: a pipe would be read once and be empty the second time, a device never ends."""

import stat
from pathlib import Path

from moepress.errors import InvalidInputError

_KINDS = (
    (stat.S_ISFIFO, "a pipe (FIFO)"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISDIR, "a folder"),
)


def require_regular(path: Path) -> None:
    """Refuse what is there and is no regular file, before it is opened (opening a pipe waits for its other end).

    Raises:
        InvalidInputError: with what it is and what to do.
    """
    try:
        mode = path.stat().st_mode
    except OSError:
        return  # that it is missing is said by whoever opens it
    kind = next((name for test, name in _KINDS if test(mode)), None)
    if kind is not None:
        raise InvalidInputError(f"{path} is {kind}, not a regular file; write what it gives to a file and name that.")
