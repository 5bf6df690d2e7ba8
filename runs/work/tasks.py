"""Tasks of a shared run: what needs what, and what a finished one left. Knows nothing of models.

A task may be begun by any worker, and by two at once: what each of them makes lies under a name of its own, and the one
whose marker is created first has done it. Nothing that a task makes may depend on who does it, or when.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from moepress.errors import InvalidInputError
from moepress.runs.parsing import parse_json
from moepress.runs.store.store import check_name


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One of them.

    Attributes:
        id: its name, which names its marker and its outputs too.
        kind: what is to be done.
        at: of which layer, which part: numbers that the kind knows.
        needs: ids of the tasks whose outputs it takes.
        cost: how long it takes, in any unit that all tasks of the run share.
        keep: its outputs belong to the result; others are deleted once nobody needs them.
    """

    id: str
    kind: str
    at: tuple[int, ...] = ()
    needs: tuple[str, ...] = ()
    cost: float = 1.0
    keep: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """A file that a task made: its name in the store, its size, its SHA-256 in hex."""

    object: str
    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """The marker of a finished task.

    Attributes:
        task: its id.
        attempt: which try did it, counted from 0.
        worker: who.
        seconds: how long it took.
        peak_bytes: the most memory that the worker had taken until then.
        files: by the names that the task gave them.
        note: for those who need it, JSON-able.
        phases: what the time went to (`runs.phases`): phase -> seconds, FLOP, bytes.
    """

    task: str
    attempt: int
    worker: str
    seconds: float
    peak_bytes: int
    files: Mapping[str, Made]
    note: Mapping[str, Any] = field(default_factory=dict)
    phases: Mapping[str, Sequence[float]] = field(default_factory=dict)


def tasks_text(tasks: Sequence[Task]) -> bytes:
    """The graph as it lies in the store: JSON, a line per task."""
    rows = ",\n".join(json.dumps(asdict(task)) for task in tasks)
    return f"[\n{rows}\n]\n".encode()


def parse_tasks(raw: bytes) -> list[Task]:
    """The inverse of `tasks_text`.

    Raises:
        InvalidInputError: it is none, or a task needs one that does not come before it.
    """
    try:
        rows = parse_json(raw.decode())
        tasks = [Task(**{**row, "at": tuple(row["at"]), "needs": tuple(row["needs"])}) for row in rows]
    except (ValueError, TypeError, KeyError) as error:
        raise InvalidInputError(f"The shared run's tasks are broken ({error}); plan the work anew.") from error
    require_order(tasks)
    return tasks


def require_order(tasks: Iterable[Task]) -> None:
    """Refuse a graph with a circle, a name twice, or a need that is no task.

    Raises:
        InvalidInputError: naming the task.
    """
    seen: set[str] = set()
    for task in tasks:
        missing = next((need for need in task.needs if need not in seen), None)
        if missing is not None or task.id in seen:
            why = "comes twice" if missing is None else f"needs {missing}, which does not come before it"
            raise InvalidInputError(f"The shared run's tasks are broken ({task.id} {why}); plan the work anew.")
        seen.add(task.id)


def done_text(done: Done) -> bytes:
    """A marker as it lies in the store."""
    return json.dumps(asdict(done)).encode()


def parse_done(raw: bytes, task: str) -> Done:
    """The inverse of `done_text`.

    Args:
        raw: what lies there.
        task: whose marker it is.

    Raises:
        InvalidInputError: it is none.
    """
    try:
        row = parse_json(raw.decode())
        done = Done(**{**row, "files": {name: Made(**made) for name, made in row["files"].items()}})
        _require_types(done, task)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InvalidInputError(
            f"The marker done/{task}.json of the shared run is broken ({error}); delete it, and work on."
        ) from error
    return done


def _require_types(done: Done, task: str) -> None:
    numbers = (done.attempt, done.seconds, done.peak_bytes, *(made.bytes for made in done.files.values()))
    texts = (done.worker, *(made.sha256 for made in done.files.values()))
    if done.task != task:
        raise ValueError(f"it is that of {str(done.task)[:100]}")
    if not all(isinstance(found, int | float) for found in numbers) or not isinstance(done.note, dict):
        raise ValueError("a number or the note is none")
    if not all(isinstance(found, str) for found in texts):
        raise ValueError("a name or a digest is none")
    for made in done.files.values():
        if not made.object.startswith(f"out/{task}/"):
            raise ValueError("a file lies elsewhere")
        check_name(made.object)


def small_object(raw: bytes | None) -> dict[str, Any]:
    """A JSON object that only tells how things stand; {} of what is none."""
    try:
        found = parse_json((raw or b"{}").decode())
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def consumers(tasks: Sequence[Task]) -> dict[str, list[str]]:
    """Task -> those that need it."""
    found: dict[str, list[str]] = {task.id: [] for task in tasks}
    for task in tasks:
        for need in task.needs:
            found[need].append(task.id)
    return found
