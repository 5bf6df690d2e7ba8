"""Who this process is, so that another one can tell whether it is gone."""

import os
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moepress.runs.lock import alive

_BOOT = Path("/proc/sys/kernel/random/boot_id")


def this_process() -> dict[str, Any]:
    """Host, boot and pid namespace, pid, and when the process began.

    `place` is None where the system does not tell one boot, or one container, from another: names of hosts alone are
    not unique.
    """
    pid = os.getpid()
    return {"host": socket.gethostname(), "place": _place(), "pid": pid, "process start": _start(pid)}


def is_gone(process: Mapping[str, Any]) -> bool:
    """Whether a process that `this_process` described lived here and does not any more; False where nobody knows."""
    here = _place()
    if here is None or process.get("place") != here or process.get("host") != socket.gethostname():
        return False
    pid = process.get("pid")
    if not alive(pid):
        return True
    start = _start(pid)  # of another process by now, where the number was given again
    return start == "ended" or (start is not None and start != process.get("process start"))


def _place() -> str | None:
    try:
        return f"{_BOOT.read_text().strip()} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return None


def _start(pid: Any) -> str | None:
    """Ticks of the kernel's clock since it started, which nobody can set; "ended" of a process that waits to be
    collected by its parent; None where the system does not say.
    """
    if sys.platform != "linux":
        return None
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "ended" if fields[0] in "ZX" else fields[19]
    except (OSError, IndexError):
        return None
