"""Who works on what: leases with a time limit, in a store that several machines share.

    leases/<task>/<n>.json            attempt n at a task: who began it; created once, by one worker alone
    leases/<task>/<n>.released.json   that worker gave it back
    beats/<worker>.json               written again and again by a worker that lives: a count, and its progress

No clock of another machine is trusted. An observer takes a lease for dead when its holder's beat has stayed the same
for the lease's term by the observer's own clock, or at once where the holder ran on the same machine and its process
is gone. Then it tries to create attempt n + 1, which one of any number of observers does.

Nothing may be correct only because of a lease: a stopped process does not know that time passes. A worker writes its
outputs under names of its attempt, and a task is done by who creates `done/<task>.json`.
"""

import json
import math
import re
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from moepress.errors import MoepressError
from moepress.runs.files import new_id
from moepress.runs.parsing import parse_json
from moepress.runs.store.store import Store
from moepress.runs.work.processes import is_gone, this_process

TERM_SECONDS = 60.0
_LAST_BEAT_SECONDS = 2.0  # what the end waits for a beat that is on its way
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,120}")


@dataclass(frozen=True, slots=True)
class _Seen:
    """What an observer knows of a holder: its last count, and when that was first seen."""

    count: Any
    since_seconds: float


class Leases:
    """The leases of one worker, which beats as long as this context lasts.

    Methods may be called from any thread. They raise StoreError as the store does; the beating thread does not, it goes
    on trying.
    """

    def __init__(
        self, store: Store, worker: str, term_seconds: float = TERM_SECONDS, hang_seconds: float | None = None
    ):
        """Args:
        store: that the workers share.
        worker: this worker's name, which no other worker has at the same time.
        term_seconds: how long others wait for a sign of life; four beats are in it.
        hang_seconds: a worker that has neither claimed nor told anything for so long hangs, and beats no more until
            it does; None where work may be silent for any time.
        """
        self.store = store
        self.worker = _checked(worker)
        self.term_seconds = term_seconds
        self.hang_seconds = hang_seconds
        self.id = new_id()
        self._process = this_process()
        self._lock, self._claiming = threading.Lock(), threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat_on, name="moepress beats", daemon=True)
        self._count = 0
        self._beaten_seconds = -float("inf")
        self._told_seconds = _now()
        self._progress: dict[str, Any] = {}
        self._held: dict[str, int] = {}
        self._doubted: set[str] = set()
        self._begun: dict[str, int] = {}
        self._seen: dict[tuple[str, int], _Seen] = {}

    def __enter__(self) -> Self:
        """Beat once, so that the store is known to answer, and go on beating."""
        self._beat()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop beating, give back what is held, and say so; a store that does not answer is let alone."""
        self._stop.set()
        self._thread.join(timeout=_LAST_BEAT_SECONDS)
        with suppress(MoepressError):
            for task, attempt in list(self._held.items()):
                if _parsed(self.store.get(_lease(task, attempt))).get("id") == self.id:
                    self.release(task, attempt)
            self._beat(ended=True)

    def claim(self, task: str) -> int | None:
        """Try to become the one who works on a task.

        Returns:
            The number of the attempt, which is ours now; None where a live worker (this one, too) has the last one.
        """
        with self._claiming:
            begun = self.attempts(task)
            if begun and not self._is_free(task, begun - 1):
                return None
            lease = {"worker": self.worker, **self._process, "term seconds": self.term_seconds, "id": self.id}
            with self._lock:  # before it is: who is interrupted in here gives it back, if it became ours
                self._held[task] = begun
                self._told_seconds = _now()
            try:
                # `try` tells two claims of this worker apart, should the answer to one get lost.
                won = self.store.create(_lease(task, begun), _json({**lease, "try": new_id()}))
            except Exception:
                self._drop(task)
                raise
            if not won:
                self._drop(task)
            return begun if won else None

    def attempts(self, task: str) -> int:
        """How many attempts at a task were begun."""
        count = self._begun.get(_checked(task), 0)
        while self.store.get(_lease(task, count)) is not None:
            count += 1
        self._begun[task] = max(count, self._begun.get(task, 0))
        return self._begun[task]

    def lost(self, task: str, attempt: int) -> int:
        """How many attempts before this one were not given back: their workers died, or were taken for dead."""
        return sum(self.store.get(_lease(task, each, ".released")) is None for each in range(attempt))

    def holds(self, task: str, attempt: int) -> bool:
        """Whether this worker may still believe that an attempt is its own: it has beaten within the term, and nobody
        has begun another one.

        Asks the store only after a pause that was too long (no network, a suspended machine).
        """
        with self._lock:
            if self._held.get(task) != attempt:
                return False
            if _now() - self._beaten_seconds > self.term_seconds:
                self._doubted.add(task)
                return False
            if task not in self._doubted:
                return True
        if self.store.get(_lease(task, attempt + 1)) is not None:
            self._drop(task)
            return False
        with self._lock:
            self._doubted.discard(task)
        return True

    def tell(self, progress: Mapping[str, Any]) -> None:
        """Have something go with the next beats, for whoever asks how it stands. JSON, small."""
        json.dumps(progress)
        with self._lock:
            self._progress = dict(progress)
            self._told_seconds = _now()

    def release(self, task: str, attempt: int) -> None:
        """Give an attempt back: others may claim the task at once."""
        try:
            self.store.put(_lease(task, attempt, ".released"), _json({"worker": self.worker, "id": self.id}))
        except Exception:
            self._drop(task)
            raise
        self._drop(task)  # behind: who is interrupted in here does it once more as it ends

    def _drop(self, task: str) -> None:
        with self._lock:
            self._held.pop(task, None)
            self._doubted.discard(task)

    def _is_free(self, task: str, attempt: int) -> bool:
        """Whether an attempt's holder has given it back, or is taken for dead."""
        if self._held.get(task) == attempt:
            return False
        lease = _parsed(self.store.get(_lease(task, attempt)))
        if (
            lease.get("id") == self.id
        ):  # created by a claim of ours that ended with an error, so that nobody works on it
            return True
        if is_gone(lease) or self.store.get(_lease(task, attempt, ".released")) is not None:
            return True
        asked = _now()  # before: the answer may be late, and then it is old
        beat = self._beat_of(lease.get("worker"))
        ours = beat if beat.get("id") == lease.get("id") else {}  # a worker of that name may have begun anew
        if ours.get("ended"):
            return True
        key, count = (task, attempt), ours.get("count")
        seen = self._seen.get(key)
        if seen is None or seen.count != count:
            self._seen[key] = _Seen(count, _now())
            return False
        term = lease.get("term seconds")
        if not isinstance(term, int | float) or not math.isfinite(term):
            term = self.term_seconds
        return asked - seen.since_seconds > term

    def _beat_of(self, worker: Any) -> dict[str, Any]:
        """A worker's last sign of life; {} where there is none."""
        if not isinstance(worker, str) or not _NAME.fullmatch(worker):
            return {}
        return _parsed(self.store.get(f"beats/{worker}.json"))

    def _beat_on(self) -> None:
        while not self._stop.wait(self.term_seconds / 4):
            if self.hang_seconds is not None and _now() - self._told_seconds > self.hang_seconds:
                continue
            try:
                self._beat()
                for task, attempt in list(self._held.items()):
                    if self.store.get(_lease(task, attempt + 1)) is not None:  # others took us for dead
                        self._drop(task)
            except MoepressError:
                continue  # `holds` knows how long there was none

    def _beat(self, *, ended: bool = False) -> None:
        with self._lock:
            now = _now()
            if now - self._beaten_seconds > self.term_seconds:
                self._doubted.update(self._held)
            self._count += 1
            beat = {
                "worker": self.worker,
                **self._process,
                "id": self.id,
                "count": self._count,
                "term seconds": self.term_seconds,
                "ended": ended,
                "time": time.time(),  # for people who ask how it stands: nothing is decided by it
                "progress": self._progress,
            }
        self.store.put(f"beats/{self.worker}.json", _json(beat))
        with self._lock:
            self._beaten_seconds = now  # when it began: a beat that took long is old


def _now() -> float:
    """Seconds of a clock that nobody sets and that goes on while the machine is suspended, where there is one."""
    clock = getattr(time, "CLOCK_BOOTTIME", None)
    return time.monotonic() if clock is None else time.clock_gettime(clock)


def _lease(task: str, attempt: int, kind: str = "") -> str:
    return f"leases/{task}/{attempt}{kind}.json"


def _checked(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise ValueError(f"{name!r} is no name of a task or a worker")
    return name


def _json(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value).encode()


def _parsed(data: bytes | None) -> dict[str, Any]:
    """A small object of ours; {} of what is none."""
    try:
        found = parse_json((data or b"{}").decode())
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
