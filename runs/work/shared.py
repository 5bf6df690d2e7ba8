"""A run that several workers share: its tasks, their markers and their files in a store.

    work.json            what is to be made, for those who do it
    tasks/<digest>.json  the graph
    given/<digest>/      what tasks start from, such as the calibration tokens
    out/<task>/<id>/     files of one attempt at a task, whose name nobody else has
    done/<task>.json     the marker: which attempt's files count
    failed/<task>/<id>.json   an attempt that ended with an error
    leases/ beats/       see `runs.work.leases`

A marker is created once and never changed. So a worker that was taken for dead and comes back late writes files that
nobody reads, and finds the task done.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from moepress.errors import InvalidInputError, StoreError, UsageError
from moepress.runs.files import new_id, sha256_of
from moepress.runs.parsing import parse_json
from moepress.runs.store.store import Store
from moepress.runs.work.tasks import (
    Done,
    Made,
    Task,
    consumers,
    done_text,
    parse_done,
    parse_tasks,
    small_object,
    tasks_text,
)

WORK = "work.json"
_DIGEST = re.compile("[0-9a-f]{64}")


def begin_shared(store: Store, work: Mapping[str, Any], tasks: Sequence[Task], given: Mapping[str, Path]) -> bool:
    """Put a run into a store, or find the same one there.

    Args:
        store: empty, or with a run of the very same work.
        work: what is to be made: JSON-able, and all that the result depends on but what is `given`.
        tasks: in an order in which each comes after those that it needs.
        given: files that tasks start from, by name.

    Returns:
        Whether it is new.

    Raises:
        UsageError: another run is there.
    """
    rows = {name: (path.stat().st_size, sha256_of(path)) for name, path in given.items()}
    graph = tasks_text(tasks)
    digest = hashlib.sha256(graph).hexdigest()
    whole = {"work": {**work, "given": rows}, "tasks": digest}
    stated = json.dumps(whole, indent=1, sort_keys=True)
    before = store.get(WORK)
    if before is None:
        for name, path in given.items():
            store.send(path, given_name(name, rows[name][1]))
        store.put(_tasks_name(digest), graph)
        # Last, so that what is named in it is there. Who comes second finds the same, or is refused; and has replaced
        # nothing of the first, since names hold what they name.
        if store.create(WORK, stated.encode()):
            return True
        before = store.get(WORK)
    if before != stated.encode():
        raise UsageError(
            f"{store.url} holds another shared run; give a place of its own to this one, or the same model, text and "
            "options to go on with that."
        )
    return False


def open_shared(store: Store) -> "Shared":
    """The run in a store.

    Raises:
        UsageError: there is none.
        InvalidInputError: what is there is broken.
    """
    raw = store.get(WORK)
    if raw is None:
        raise UsageError(f"{store.url} holds no shared run; begin one with `moepress plan-work MODEL --store URL`.")
    try:
        stated = parse_json(raw.decode())
        work, digest = dict(stated["work"]), str(stated["tasks"])
    except (ValueError, TypeError, KeyError) as error:
        raise InvalidInputError(f"{WORK} in {store.url} is broken ({error}); plan the work anew.") from error
    graph = store.get(_tasks_name(digest)) if _DIGEST.fullmatch(digest) else None
    if hashlib.sha256(graph or b"").hexdigest() != digest:
        raise InvalidInputError(f"The tasks in {store.url} are not those of its {WORK}; plan the work anew elsewhere.")
    return Shared(store=store, work=work, tasks=parse_tasks(graph or b""))


def given_name(name: str, digest: str) -> str:
    """The object of a file that a run was begun with."""
    return f"given/{digest[:16]}/{name}"


def _tasks_name(digest: str) -> str:
    return f"tasks/{digest[:16]}.json"


@dataclass(slots=True, kw_only=True)
class Shared:
    """The run as one worker sees it.

    Attributes:
        store: where it is.
        work: what is to be made.
        tasks: all of them, in order.
    """

    store: Store
    work: Mapping[str, Any]
    tasks: Sequence[Task]
    _done: dict[str, Done] = field(default_factory=dict)
    _listed: set[str] = field(default_factory=set)
    _consumers: dict[str, list[str]] = field(default_factory=dict)

    def done(self, task: str) -> Done | None:
        """The marker of a task, once there is one."""
        if task not in self._done:
            raw = self.store.get(f"done/{task}.json")
            if raw is None:
                return None
            self._done[task] = parse_done(raw, task)
        return self._done[task]

    def look(self) -> set[str]:
        """Tasks that are done, as far as the store's list tells: it may lag, so that some are missing."""
        names = (name.removeprefix("done/").removesuffix(".json") for name in self.store.names("done"))
        self._listed.update(names)
        return self._listed | self._done.keys()

    def count_done(self) -> int:
        """How many tasks are done, as `look` sees it."""
        found = self.look()
        return sum(task.id in found for task in self.tasks)

    def finish(self, marker: Done, files: Mapping[str, Path], *, give: bool) -> tuple[Done, bool]:
        """Store a task's files, then its marker.

        Args:
            marker: but for its files.
            files: by the names that the task gave them.
            give: they may be moved away.

        Returns:
            The marker that counts, and whether it is this one.
        """
        place = f"out/{marker.task}/{marker.attempt}-{new_id()}"
        made: dict[str, Made] = {}
        for name, path in files.items():
            size, digest = path.stat().st_size, sha256_of(path)
            self.store.send(path, f"{place}/{name}", give=give)
            made[name] = Made(object=f"{place}/{name}", bytes=size, sha256=digest)
        marker = replace(marker, files=made)
        won = self.store.create(f"done/{marker.task}.json", done_text(marker))
        if not won:
            self.delete(made.values())
            found = self.done(marker.task)
            if found is None:
                raise StoreError(f"The marker of {marker.task} in {self.store.url} was there and is gone.")
            return found, False
        self._done[marker.task] = marker
        return marker, True

    def delete(self, files: Iterable[Made]) -> None:
        """Delete files of attempts."""
        for file in files:
            self.store.delete(file.object)

    def clear(self, task: Task) -> None:
        """Delete what a task needed and nobody needs any more, once it is done."""
        if not self._consumers:
            self._consumers = consumers(self.tasks)
        by_id = {each.id: each for each in self.tasks}
        for need in task.needs:
            if by_id[need].keep or not all(self.done(other) for other in self._consumers[need]):
                continue
            found = self.done(need)
            if found is not None:
                self.delete(found.files.values())

    def sweep(self, task: str) -> None:
        """Delete what other attempts at a finished task have left: their workers were killed, or will be too late."""
        found = self.done(task)
        kept = set() if found is None else {made.object for made in found.files.values()}
        for name in self.store.names(f"out/{task}") if found is not None else ():
            if name not in kept:
                self.store.delete(name)

    def fail(self, task: str, attempt: int, error: str, trace: str = "", *, final: bool) -> None:
        """Note that an attempt ended with an error."""
        row = {"task": task, "attempt": attempt, "error": error, "trace": trace, "final": final}
        self.store.put(f"failed/{task}/{attempt}-{new_id()}.json", json.dumps(row).encode())

    def failures(self) -> dict[str, dict[str, Any]]:
        """Errors of attempts, by their names in the store; what is none is left out."""
        rows = {name: small_object(self.store.get(name)) for name in self.store.names("failed")}
        return {name: row for name, row in rows.items() if row}
