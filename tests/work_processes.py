"""Workers of a shared run as processes of their own, to be killed, stopped and interrupted."""

import os
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import fork_server
import psutil
from fork_client import Child

from moepress.runs.store.store import Store, open_store
from moepress.runs.work.shared import open_shared

SMALL = """
import sys
from moepress.models.forward import walk
from moepress.compress.gptq import pieces
walk._SHARD_TOKENS, pieces.PIECE_BYTES = 512, 100_000
sys.argv[:1] = ["moepress"]
from moepress.cli import main
main()
"""
"""`moepress` with shards and pieces so small that a tiny model has many tasks."""


def start(*arguments: object, log: Path, env: Mapping[str, str] | None = None, small: bool = True) -> Child:
    """`moepress ...` with small shards and pieces, or the usual ones; what it says goes to the end of a file."""
    words = [*(("-c", SMALL) if small else ("-m", "moepress")), *map(str, arguments)]
    given = None if env is None else {**os.environ, **env}
    with log.open("ab") as stream:
        return fork_server.start(words, stdout=stream.fileno(), stderr=stream.fileno(), niceness=10, env=given)


def finish(*arguments: object, log: Path, env: Mapping[str, str] | None = None, small: bool = True) -> None:
    """A command that must succeed."""
    assert start(*arguments, log=log, env=env, small=small).wait(timeout=300) == 0, log.read_text()


def wait_until(condition: Callable[[], bool], seconds: float = 120.0) -> None:
    """Look again and again until something holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.01)


@dataclass(slots=True, kw_only=True)
class Crew:
    """Workers of one store who are started again where they are ended.

    Attributes:
        url: of the store.
        log: what all of them say.
        options: of each.
        env: of each, besides this process's.
    """

    url: str
    log: Path
    options: Sequence[object] = ("--threads", "1")
    env: Mapping[str, str] | None = None

    def one(self, *more: object) -> Child:
        """Start one."""
        return start("work", "--store", self.url, *self.options, *more, log=self.log, env=self.env)

    def kill_at_random(self, store: Store, draw: random.Random, times: int, most: int = 2) -> int:
        """Kill one of so many again and again, a moment after some task was begun, until all is done or so many times.

        Returns:
            How many were killed.
        """
        running, killed = [self.one() for _ in range(most)], 0
        try:
            while killed < times and not all_done(store):
                begun = len(store.names("leases"))
                until = time.monotonic() + 20
                while len(store.names("leases")) == begun and not all_done(store) and time.monotonic() < until:
                    time.sleep(0.001)
                time.sleep(draw.uniform(0, 0.1))
                number = draw.randrange(most)
                running[number].send_signal(9)
                killed += running[number].wait(60) == -9
                running[number] = self.one()
            for each in running:
                assert each.wait(300) == 0, self.log.read_text()
        finally:
            for each in running:
                each.send_signal(9)
        return killed


def all_done(store: Store) -> bool:
    """Whether a run's tasks are all done."""
    shared = open_shared(store)
    return shared.count_done() == len(shared.tasks)


def lost_attempts(store: Store) -> int:
    """Attempts that nobody gave back: those in the hands of somebody who died."""
    names = store.names("leases")
    released = [name for name in names if name.endswith(".released.json")]
    return len(names) - 2 * len(released)


def left_over(store: Store) -> list[str]:
    """Files of attempts that do not count, or that nobody needs."""
    shared = open_shared(open_store(store.url))
    kept = set()
    for task in shared.tasks:
        done = shared.done(task.id)
        assert done is not None
        kept |= {made.object for made in done.files.values()}
    return [name for name in store.names("out") if name not in kept]


def processes_of(place: Path) -> list[psutil.Process]:
    """Those that have a path in their command line."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if any(str(place) in word for word in words) and process.pid != os.getpid():
            found.append(process)
    return found
