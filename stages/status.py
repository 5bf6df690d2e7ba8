"""status: how a shared run stands."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moepress.runs.parsing import parse_json
from moepress.runs.store.store import open_store
from moepress.runs.work.shared import Shared, open_shared
from moepress.runs.work.tasks import Done, Task

_WATCHED_SECONDS = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """How a kind of task stands: how many there are, how many are done, and what one takes in the mean."""

    kind: str
    tasks: int
    done: int
    seconds: float | None
    peak_bytes: int | None


def status_stage(url: str, *, watch_seconds: float = _WATCHED_SECONDS) -> dict[str, Any]:
    """What is done, what is being done and by whom, what failed, and how long the rest may take.

    Args:
        url: of the store.
        watch_seconds: how long it is watched whether workers give a sign of life; their clocks are not trusted.
    """
    shared = open_shared(open_store(url))
    before = _beats(shared)
    done = [found for task in shared.look() if (found := shared.done(task)) is not None]
    time.sleep(watch_seconds if before else 0.0)
    workers = _workers(before, _beats(shared))
    by_id = {row.task: row for row in done}
    kinds = [_standing(kind, shared.tasks, by_id) for kind in dict.fromkeys(task.kind for task in shared.tasks)]
    return {
        "store": shared.store.url,
        "model": shared.work["summary"]["model_name"],
        "tasks": len(shared.tasks),
        "done": len(by_id),
        "kinds": [{**_row(kind)} for kind in kinds],
        "workers": workers,
        "failures": [_failure(row) for row in shared.failures().values() if row.get("task") not in by_id],
        "seconds_left": _left(shared.tasks, by_id, sum(worker["state"] == "working" for worker in workers)),
    }


def _failure(row: Mapping[str, Any]) -> dict[str, Any]:
    lines = str(row.get("error", "")).strip().splitlines()
    return {"task": row.get("task"), "error": lines[-1] if lines else "", "final": bool(row.get("final"))}


def _row(kind: Standing) -> dict[str, Any]:
    return {
        "kind": kind.kind,
        "tasks": kind.tasks,
        "done": kind.done,
        "seconds": kind.seconds,
        "peak_bytes": kind.peak_bytes,
    }


def _standing(kind: str, tasks: Sequence[Task], done: Mapping[str, Done]) -> Standing:
    own = [task for task in tasks if task.kind == kind]
    rows = [done[task.id] for task in own if task.id in done]
    return Standing(
        kind=kind,
        tasks=len(own),
        done=len(rows),
        seconds=sum(row.seconds for row in rows) / len(rows) if rows else None,
        peak_bytes=max((row.peak_bytes for row in rows), default=None),
    )


def _beats(shared: Shared) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for name in shared.store.names("beats"):
        raw = shared.store.get(name)
        if raw is not None:
            found[name] = dict(parse_json(raw.decode()))
    return found


def _workers(before: Mapping[str, Mapping[str, Any]], now: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Each worker, with what it does; `silent` where it gave no sign of life while it was watched."""
    rows = []
    for name, beat in sorted(now.items()):
        progress = beat.get("progress") or {}
        alive = before.get(name, {}).get("count") != beat.get("count")
        state = "ended" if beat.get("ended") else "silent" if not alive and not progress.get("doing") else "working"
        rows.append(
            {
                "worker": beat.get("worker"),
                "host": beat.get("host"),
                "state": state,
                "doing": progress.get("doing"),
                "did": progress.get("did", 0),
            }
        )
    return rows


def _left(tasks: Sequence[Task], done: Mapping[str, Done], workers: int) -> float | None:
    """Seconds, by what tasks of the same kind took, or cost, divided by the workers; no less than one layer's chain."""
    if not done or not workers:
        return None
    costs = {task.id: task.cost for task in tasks}
    rate = sum(row.seconds for row in done.values()) / sum(costs[name] for name in done)
    by_kind: dict[str, list[float]] = {}
    for task in tasks:
        if task.id in done:
            by_kind.setdefault(task.kind, []).append(done[task.id].seconds / task.cost)
    left = 0.0
    for task in tasks:
        if task.id not in done:
            known = by_kind.get(task.kind)
            left += task.cost * (sum(known) / len(known) if known else rate)
    return left / workers
