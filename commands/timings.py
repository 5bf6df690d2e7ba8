"""`--timings FILE`: where the time of a run went, and its peaks of memory, as JSON beside the output."""

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moepress import __version__
from moepress.errors import UsageError
from moepress.runs.files import check_file, write_atomically
from moepress.runs.output import partial_folder
from moepress.runs.phases import Clock, phase, recording


def check_timings(
    file: Path | None, output: Path, inputs: Sequence[Path] = (), *, dry_run: bool = False, force: bool = False
) -> None:
    """Refuse a place for the timings that could not be written, or that would change an output; before any work.

    Args:
        file: what --timings says, None without it.
        output: the folder of -o.
        inputs: model folders; what lies in them goes along into outputs.
        dry_run: nothing is to be written.
        force: a file that is there may be replaced.

    Raises:
        UsageError: with what to do instead.
    """
    if file is None:
        return
    if dry_run:
        raise UsageError("--dry-run does nothing that could be timed; leave out --timings.")
    target = file.parent.resolve() / file.name  # a link at its name is replaced, not followed
    for folder in (output, partial_folder(output), *inputs):
        if folder.resolve() in (target, *target.parents):
            raise UsageError(f"--timings {file} lies inside {folder}; choose a file outside of it.")
    check_file(file, "--timings", force=force)


@contextmanager
def timed(command: str, file: Path | None, *, device: str = "cpu") -> Iterator[None]:
    """Record the work of the block and write its timings; nothing is recorded without a file.

    An error or Ctrl-C in the block leaves no file.

    Args:
        command: its name, for the file.
        file: `check_timings` has allowed it.
        device: what --device says, or where the work is always done.
    """
    if file is None:
        yield
        return
    start = time.perf_counter()
    with recording() as clock, phase("other"):
        yield
    seconds = time.perf_counter() - start
    write_atomically(file, json.dumps(_document(command, device, seconds, clock), indent=1) + "\n")


def _document(command: str, device: str, seconds: float, clock: Clock) -> dict[str, Any]:
    import torch

    from moepress.models.forward.walk import choose_device

    chosen = choose_device(device)
    document: dict[str, Any] = {
        "moepress": __version__,
        "command": command,
        "device": str(chosen),
        "threads": torch.get_num_threads(),
        "wall_seconds": seconds,
        "peak_rss_bytes": _peak_rss_bytes(),
    }
    if chosen.type == "cuda":
        document["peak_device_bytes"] = torch.cuda.max_memory_allocated(chosen)
    return document | {"rows": clock.rows()}


def _peak_rss_bytes() -> int:
    """The most memory that this process ever held, mapped files included."""
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak  # kilobytes, but bytes on macOS
