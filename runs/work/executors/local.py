"""Workers as processes on this machine, started anew where they die."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from moepress.errors import MoepressError
from moepress.runs.files import make_folders
from moepress.runs.progress import note, track
from moepress.runs.work.shared import Shared

_POLL_SECONDS, _GRACE_SECONDS, _ASKED = 0.2, 12.0, 3
_DEATHS = 4  # of a worker, one after the other, with no task done between by anybody
_LAST_BYTES = 4096
_ENDED_BY_SIGNALS = {128 + signal.SIGINT, 128 + signal.SIGKILL, 128 + signal.SIGTERM}


@dataclass(slots=True, kw_only=True)
class _Process:
    """A worker's process, its log, and how often it died since the last task was done."""

    command: Sequence[str]
    log: Path
    running: subprocess.Popen[bytes] | None = None
    deaths: int = 0
    ended: bool = False


@dataclass(slots=True, kw_only=True)
class LocalWorkers:
    """So many processes that run a worker each.

    Attributes:
        shared: the run.
        commands: one per worker.
        logs: folder for what they say.
        environment: what theirs has besides this process's.
    """

    shared: Shared
    commands: Sequence[Sequence[str]]
    logs: Path
    environment: dict[str, str] = field(default_factory=dict)

    def work(self, told: Callable[[int], None] = lambda _done: None) -> None:
        """Until all tasks are done.

        Args:
            told: called with the number of tasks that are done, whenever it grew.

        Raises:
            MoepressError: a worker ended with an error, or dies again and again.
        """
        make_folders(self.logs)
        processes = [
            _Process(command=command, log=self.logs / f"worker-{number}.log")
            for number, command in enumerate(self.commands)
        ]
        try:
            with track("work", len(self.shared.tasks), unit="tasks", about=f"{len(processes)} workers") as advance:
                done = 0
                # Until all is done, and not until all have ended: one that hangs is not waited for.
                while (now := self.shared.count_done()) < len(self.shared.tasks):
                    if now > done:
                        advance(now - done)
                        told(now)
                        done = now
                        for process in processes:
                            process.deaths = 0
                    for process in processes:
                        self._look_after(process)
                    time.sleep(_POLL_SECONDS)
                advance(now - done)
                told(now)
        finally:
            _stop(processes)

    def _look_after(self, process: _Process) -> None:
        if process.ended:
            return
        if process.running is None:
            with process.log.open("wb") as log:
                process.running = subprocess.Popen(
                    process.command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env=os.environ | self.environment,
                    start_new_session=True,  # Ctrl-C comes to this process, which ends its workers: once, in order
                )
            return
        code = process.running.poll()
        if code is None:
            return
        process.running = None
        if code == 0:
            process.ended = True
        elif code > 0 and code not in _ENDED_BY_SIGNALS:
            raise MoepressError(f"A worker ended with code {code}: {_last_line(process.log)}")
        else:
            process.deaths += 1
            if process.deaths >= _DEATHS:
                raise MoepressError(
                    f"A worker was killed {process.deaths} times before any task was done (out of memory?); give "
                    "fewer --workers or a smaller --max-memory, and --resume."
                )
            note(f"A worker was killed (signal {-code if code < 0 else code - 128}) and is started again.")


def worker_commands(store: str, count: int, options: Sequence[str]) -> list[list[str]]:
    """`moepress work` for each of so many workers of this process; they end when it is gone."""
    base = [sys.executable, "-m", "moepress", "work", "--store", store, "--quiet", "--parent", str(os.getpid())]
    return [[*base, "--shard", f"{number}/{count}", *options] for number in range(count)]


def _last_line(log: Path) -> str:
    with log.open("rb") as stream:
        stream.seek(max(0, log.stat().st_size - _LAST_BYTES))
        lines = stream.read().decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else f"it said nothing; see {log}"


def _stop(processes: Sequence[_Process]) -> None:
    """End those that still run: as Ctrl-C does, then without asking.

    It is asked more than once: what a signal raises while Python frees an object (`__del__`) is lost.
    """
    running = [process.running for process in processes if process.running is not None]
    for _ in range(_ASKED):
        for each in running:
            with suppress(ProcessLookupError):
                each.terminate()
        until = time.monotonic() + _GRACE_SECONDS / _ASKED
        for each in running:
            with suppress(subprocess.TimeoutExpired):
                each.wait(max(0.05, until - time.monotonic()))
        running = [each for each in running if each.poll() is None]
        if not running:
            return
    for each in running:
        each.kill()
        each.wait()
