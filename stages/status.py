"""status: how a shared run stands."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from moepress.runs.store.store import open_store
from moepress.runs.work.leases import TERM_SECONDS
from moepress.runs.work.processes import is_gone
from moepress.runs.work.shared import Shared, open_shared
from moepress.runs.work.tasks import Done, Task, small_object

_WATCHED_SECONDS = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """How a kind of task stands: how many there are, are done and are being done, what one takes in the mean."""

    kind: str
    tasks: int
    done: int
    running: int
    seconds: float | None
    peak_bytes: int | None


def status_stage(url: str, *, watch_seconds: float = _WATCHED_SECONDS) -> dict[str, Any]:
    """What is done, what is being done and by whom, what failed, and how long the rest may take.

    Args:
        url: of the store.
        watch_seconds: how long it is watched whether workers give a sign of life, where their clocks do not tell.
    """
    shared = open_shared(open_store(url))
    before = _beats(shared)
    by_id = {task: found for task in sorted(shared.look()) if (found := shared.done(task)) is not None}
    time.sleep(watch_seconds if any(not beat.get("ended") for beat in before.values()) else 0.0)
    workers = _workers(before, _beats(shared), by_id)
    doing = {row["doing"] for row in workers if row["state"] == "working"}
    kinds = [_standing(kind, shared.tasks, by_id, doing) for kind in dict.fromkeys(task.kind for task in shared.tasks)]
    return {
        "store": shared.store.url,
        "model": shared.work["summary"]["model_name"],
        "tasks": len(shared.tasks),
        "done": len(by_id),
        "running": len(doing),
        "kinds": [asdict(kind) for kind in kinds],
        "workers": workers,
        "failures": [_failure(row) for row in shared.failures().values() if row.get("task") not in by_id],
        "seconds_left": _left(shared.tasks, by_id, sum(row["state"] in ("working", "waiting") for row in workers)),
    }


def _failure(row: Mapping[str, Any]) -> dict[str, Any]:
    lines = str(row.get("error", "")).strip().splitlines()
    return {"task": row.get("task"), "error": lines[0] if lines else "", "final": bool(row.get("final"))}


def _standing(kind: str, tasks: Sequence[Task], done: Mapping[str, Done], doing: set[str]) -> Standing:
    own = [task for task in tasks if task.kind == kind]
    rows = [done[task.id] for task in own if task.id in done]
    return Standing(
        kind=kind,
        tasks=len(own),
        done=len(rows),
        running=sum(task.id in doing for task in own),
        seconds=sum(row.seconds for row in rows) / len(rows) if rows else None,
        peak_bytes=max((row.peak_bytes for row in rows), default=None),
    )


def _beats(shared: Shared) -> dict[str, dict[str, Any]]:
    return {name: small_object(shared.store.get(name)) for name in shared.store.names("beats")}


def _workers(
    before: Mapping[str, Mapping[str, Any]], now: Mapping[str, Mapping[str, Any]], done: Mapping[str, Done]
) -> list[dict[str, Any]]:
    """Each worker that has not ended, with what it does; of those that have, how much they did.

    `working` and `waiting` give signs of life, `silent` has given none for the term of its leases, by its own clock
    and ours, and `gone` is known to be dead.
    """
    rows = []
    for name, beat in sorted(now.items()):
        progress = beat.get("progress")
        progress = progress if isinstance(progress, dict) else {}
        doing = progress.get("doing")
        doing = doing if isinstance(doing, str) and doing not in done else None
        state = _state(beat, moved=before.get(name, {}).get("count") != beat.get("count"), busy=doing is not None)
        rows.append(
            {
                "worker": str(beat.get("worker")),
                "host": beat.get("host"),
                "state": state,
                "doing": doing if state != "ended" else None,
                "did": sum(row.worker == beat.get("worker") for row in done.values()),
            }
        )
    return rows


def _state(beat: Mapping[str, Any], *, moved: bool, busy: bool) -> str:
    if beat.get("ended"):
        return "ended"
    if is_gone(beat):
        return "gone"
    term, at = beat.get("term seconds"), beat.get("time")
    term = term if isinstance(term, int | float) else TERM_SECONDS
    if not moved and (not isinstance(at, int | float) or abs(time.time() - at) > term):
        return "silent"
    return "working" if busy else "waiting"


def _left(tasks: Sequence[Task], done: Mapping[str, Done], workers: int) -> float | None:
    """Seconds, by what tasks of the same kind took, or by costs: all that is left divided by the workers, and no less
    than the longest chain of tasks that wait for one another. None where nobody works, or nothing is known.
    """
    if not done or not workers:
        return None
    costs = {task.id: task.cost for task in tasks}
    rate = sum(row.seconds for row in done.values()) / sum(costs.get(name, 1.0) for name in done)
    rates: dict[str, float] = {}
    for kind in {task.kind for task in tasks}:
        known = [done[task.id].seconds / task.cost for task in tasks if task.kind == kind and task.id in done]
        rates[kind] = sum(known) / len(known) if known else rate
    total, until = 0.0, dict[str, float]()
    for task in tasks:
        takes = 0.0 if task.id in done else task.cost * rates[task.kind]
        total += takes
        until[task.id] = takes + max((until[need] for need in task.needs), default=0.0)
    return max(total / workers, *until.values())
