"""The lock of a folder that is written to: pid and host of the process, in a file of it."""

import json
import os
import socket
import time
from pathlib import Path
from typing import Any

from moepress.errors import InvalidInputError, OutputLockedError
from moepress.runs.files import LOCK, read_text


def take_lock(folder: Path) -> None:
    """Lock a folder for this process; a lock whose process is gone is taken over.

    Raises:
        OutputLockedError: another live process, or any process on another host, holds it.
    """
    lock, mine = folder / LOCK, _mine()
    while True:
        try:
            with lock.open("x") as stream:  # fails when another process was faster
                stream.write(json.dumps(mine))
            return
        except FileExistsError:
            held = _holder(lock)
        if held == mine:
            return
        _require_dead(folder, held)
        lock.unlink(missing_ok=True)  # stale


def require_unlocked(folder: Path) -> None:
    """Refuse a folder that another live process has locked, without locking it.

    Raises:
        OutputLockedError: as `take_lock`.
    """
    if (folder / LOCK).is_file():
        held = _holder(folder / LOCK)
        if held != _mine():
            _require_dead(folder, held)


def release_lock(folder: Path) -> None:
    """Remove this process's lock."""
    (folder / LOCK).unlink(missing_ok=True)


def _mine() -> dict[str, Any]:
    return {"pid": os.getpid(), "host": socket.gethostname()}


def _require_dead(folder: Path, held: dict[str, Any] | None) -> None:
    if held is not None and (held.get("host") != _mine()["host"] or alive(held.get("pid"))):
        raise OutputLockedError(
            f"{folder} is being written by process {held.get('pid')} on {held.get('host')}; wait for it, or delete "
            f"{folder / LOCK} if that process is gone."
        )


def _holder(lock: Path) -> dict[str, Any] | None:
    """Who holds a lock; None when its writer died before it could say so."""
    for pause_seconds in (0.1, 0.4, 0.0):
        try:
            held = json.loads(read_text(lock))
            return held if isinstance(held, dict) else None
        except (FileNotFoundError, InvalidInputError):
            return None
        except (ValueError, RecursionError):  # just being written
            time.sleep(pause_seconds)
    return None


def alive(pid: Any) -> bool:
    """Whether a process of this host is there."""
    if not isinstance(pid, int) or pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True
