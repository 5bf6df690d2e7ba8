"""One worker of a shared run: it takes whatever task can be done and nobody does, until all are done.

There is no coordinator. Workers come and go; what one leaves is taken by another once its lease is over.
"""

import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

from moepress.errors import MoepressError, StoreError
from moepress.runs.memory import is_out_of_memory, peak_bytes
from moepress.runs.phases import recording
from moepress.runs.progress import Advance, note
from moepress.runs.work.desk import Desk
from moepress.runs.work.leases import Leases
from moepress.runs.work.shared import Shared
from moepress.runs.work.tasks import Done, Task

_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.05, 2.0
_MOST_LOST = 12
_MOST_ERRORS = 3


class Perform(Protocol):
    """Does a task: reads its inputs from the desk, and leaves outputs and note there."""

    def __call__(self, task: Task, desk: Desk, *, smaller: bool) -> None:
        """With `smaller` in as little memory as it can, because an attempt before this one failed or was lost."""


class FailedError(MoepressError):
    """A task cannot be done by anybody; what it says is the task's own error."""


@dataclass(slots=True, kw_only=True)
class Worker:
    """One of them.

    Attributes:
        shared: the run.
        leases: this worker's, within their context.
        desk: its files.
        perform: how a task is done.
        share: I of N: it begins with the tasks whose number is I modulo N, and goes on with those of others.
        did: ids of the tasks that it has done.
    """

    shared: Shared
    leases: Leases
    desk: Desk
    perform: Perform
    share: tuple[int, int] = (0, 1)
    did: list[str] = field(default_factory=list)
    _known_failures: frozenset[str] = frozenset()
    _later: dict[str, float] = field(default_factory=dict)
    _last: Task | None = None

    def work(self, advance: Advance, stop: Callable[[], bool] = lambda: False) -> None:
        """Until all is done.

        Args:
            advance: told of tasks that anybody has done.
            stop: asked between tasks; True ends the work before.

        Raises:
            FailedError: a task was given up, by this worker or another.
            MoepressError: what a task raises that would be raised anywhere.
        """
        self._known_failures = frozenset(self.shared.failures())
        told, pause = 0, _PAUSE_SECONDS
        while not stop():
            done = {task.id for task in self.shared.tasks} & self.shared.look()
            advance(len(done) - told, self._remark())
            told = len(done)
            if told == len(self.shared.tasks):
                return
            if any(self._try(task) for task in self._ready(done)):
                pause = _PAUSE_SECONDS
                continue
            self._heed_failures()
            self.leases.tell({"doing": None, "did": len(self.did)})
            time.sleep(pause)
            pause = min(pause * 1.5, _LONGEST_PAUSE_SECONDS)

    def _remark(self) -> str:
        return self._last.id if self._last is not None else ""

    def _ready(self, done: set[str]) -> Iterator[Task]:
        """Tasks that can be done now, in the order in which this worker would take them."""
        mine, of = self.share
        now = time.monotonic()
        ready = [
            (number, task)
            for number, task in enumerate(self.shared.tasks)
            if task.id not in done and done.issuperset(task.needs) and self._later.get(task.id, 0) <= now
        ]
        last = None if self._last is None else (self._last.kind, self._last.at[:1])
        # One like the last first, whose inputs are still here; of equal ones this worker's own share.
        ready.sort(key=lambda row: ((row[1].kind, row[1].at[:1]) != last, row[0] % of != mine, row[0]))
        return (task for _, task in ready)

    def _try(self, task: Task) -> bool:
        """Do a task unless somebody does, or has."""
        attempt = self.leases.claim(task.id)
        if attempt is None:
            self._later[task.id] = time.monotonic() + min(1.0, self.leases.term_seconds / 8)
            return False
        if self.shared.done(task.id) is not None:
            self.leases.release(task.id, attempt)
            return False
        self.leases.tell({"doing": task.id, "attempt": attempt, "did": len(self.did), "since": time.time()})
        self._last = task
        try:
            self._do(task, attempt, smaller=attempt > 0 and self._went_wrong(task, attempt))
        except Exception as error:
            if self.shared.done(task.id) is None:  # otherwise somebody was faster, and cleared away what it needs
                self._failed(task, attempt, error)
        finally:
            self.desk.end()
            with suppress(StoreError):  # others then wait for the lease's end, and know of the task whether it is done
                self.leases.release(task.id, attempt)
        return True

    def _went_wrong(self, task: Task, attempt: int) -> bool:
        """Whether an attempt before this one failed, or its worker did not come back; given back is neither.

        Raises:
            FailedError: too many did not come back.
        """
        lost = self.leases.lost(task.id, attempt)
        if lost >= _MOST_LOST:
            what = f"{lost} workers began it and none came back; to have it tried again, delete leases/{task.id}/"
            self._give_up(task, attempt, f"{what} in {self.shared.store.url}")
        return lost > 0 or any(row.get("task") == task.id for row in self.shared.failures().values())

    def _do(self, task: Task, attempt: int, *, smaller: bool) -> None:
        began = time.monotonic()
        self.desk.begin(task)
        with recording() as clock:
            self.perform(task, self.desk, smaller=smaller)
        marker = Done(
            task=task.id,
            attempt=attempt,
            worker=self.leases.worker,
            seconds=time.monotonic() - began,
            peak_bytes=peak_bytes(),
            files={},
            note=self.desk.note,
            phases={row["phase"]: (row["seconds"], row["flops"], row["bytes"]) for row in clock.rows()},
        )
        _, won = self.shared.finish(marker, self.desk.made, give=True)
        if won:
            self.did.append(task.id)
            if attempt:
                self.shared.sweep(task.id)
            self.shared.clear(task)

    def _failed(self, task: Task, attempt: int, error: Exception) -> None:
        """What an error means for the task.

        Raises:
            FailedError: nobody can do it.
            MoepressError, OSError: the error itself. Of this machine (its disk, its way to the store) it ends this
                worker alone; else others would have it too, and are told.
        """
        if isinstance(error, FailedError):
            raise error
        out_of_memory = is_out_of_memory(error)
        if type(error) in (MoepressError, StoreError) or (isinstance(error, OSError) and not out_of_memory):
            raise error
        trace = "".join(traceback.format_exception(error))
        if isinstance(error, MoepressError):
            self.shared.fail(task.id, attempt, str(error), trace, final=True)
            raise error
        # Memory that ran out, or a bug that hangs on chance: another attempt may not have it.
        what = f"{type(error).__name__}: {error}"
        errors = [row for row in self.shared.failures().items() if self._counts(*row, task)]
        if len(errors) + 1 >= (2 if out_of_memory else _MOST_ERRORS):
            self._give_up(task, attempt, what, trace)
        self.shared.fail(task.id, attempt, what, trace, final=False)
        note(f"{task.id} failed ({what}) and is tried again, in less memory.")

    def _counts(self, name: str, row: Mapping[str, Any], task: Task) -> bool:
        return name not in self._known_failures and row.get("task") == task.id

    def _give_up(self, task: Task, attempt: int, what: str, trace: str = "") -> None:
        self.shared.fail(task.id, attempt, what, trace, final=True)
        raise FailedError(_given_up(task.id, what))

    def _heed_failures(self) -> None:
        """End where another worker has found that a task cannot be done."""
        for name, row in self.shared.failures().items():
            task = str(row.get("task"))
            if name not in self._known_failures and row.get("final") and self.shared.done(task) is None:
                raise FailedError(_given_up(task, str(row.get("error"))))


def _given_up(task: str, what: str) -> str:
    """The sentence of a task that nobody can do."""
    what = (what.strip().splitlines() or ["no reason is known"])[0].removesuffix(".")
    return f"The task {task} was given up: {what}. Mend that, and start workers again: what is done stays."
