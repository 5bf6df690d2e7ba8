"""A shared run without a model: its tasks write a few bytes that hang on their inputs, and fail as they are told."""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from moepress.runs.store.store import Store, open_store
from moepress.runs.work.desk import Desk
from moepress.runs.work.leases import Leases
from moepress.runs.work.shared import Shared, begin_shared, open_shared
from moepress.runs.work.tasks import Task
from moepress.runs.work.worker import Worker


def diamond(layers: int = 2, width: int = 3) -> list[Task]:
    """A beginning, so many that need it, one that needs those, and so on; the wide ones are kept."""
    tasks, before = [], ()
    for layer in range(layers):
        tasks.append(Task(id=f"begin-{layer}", kind="begin", at=(layer,), needs=before))
        wide = tuple(f"wide-{layer}-{part}" for part in range(width))
        tasks += [Task(id=name, kind="wide", at=(layer, 0), needs=(f"begin-{layer}",), keep=True) for name in wide]
        before = (f"end-{layer}",)
        tasks.append(Task(id=before[0], kind="end", at=(layer,), needs=(f"begin-{layer}", *wide)))
    return tasks


@dataclass
class Perform:
    """Writes a file that hangs on the task and on its inputs alone.

    Attributes:
        trouble: called before the file is written; may raise, or do what another worker does meanwhile.
        seen: tasks that were begun, and whether in little memory.
    """

    trouble: Callable[[Task, Desk], None] = lambda _task, _desk: None
    seen: list[tuple[str, bool]] = field(default_factory=list)

    def __call__(self, task: Task, desk: Desk, *, smaller: bool) -> None:
        self.seen.append((task.id, smaller))
        digest = hashlib.sha256(task.id.encode() + desk.given("text").read_bytes())
        for need in task.needs:
            digest.update(desk.input(need, "bytes").read_bytes())
        self.trouble(task, desk)
        desk.output("bytes").write_bytes(digest.digest() * 100)
        desk.note |= {"of": task.id}


def planned(url: str | Path, folder: Path, tasks: list[Task] | None = None) -> Store:
    """A run of these tasks in a store."""
    store, text = open_store(str(url)), folder / "text"
    text.write_bytes(b"text")
    assert begin_shared(store, {"what": "small"}, tasks or diamond(), {"text": text})
    return store


@contextmanager
def worker(
    store: Store,
    folder: Path,
    name: str = "one",
    perform: Perform | None = None,
    *,
    share: tuple[int, int] = (0, 1),
    term_seconds: float = 60.0,
) -> Iterator[Worker]:
    """A worker of the run in a store, with eyes of its own."""
    shared = open_shared(store)
    with Leases(store, name, term_seconds) as leases:
        desk = Desk(shared, folder / name, 1 << 20)
        yield Worker(shared=shared, leases=leases, desk=desk, perform=perform or Perform(), share=share)


def work(one: Worker, tasks: int | None = None) -> None:
    """All tasks that there are, or so many."""
    one.work(lambda *_: None, lambda: tasks is not None and len(one.did) >= tasks)


def kept(store: Store) -> dict[str, bytes]:
    """What the tasks made whose files stay, by their ids."""
    shared = open_shared(store)
    found = {}
    for task in shared.tasks:
        done = shared.done(task.id)
        assert done is not None, task.id
        if task.keep:
            found[task.id] = store.get(done.files["bytes"].object) or b""
    return found


def outputs(store: Store) -> set[str]:
    """Tasks of which files are in the store."""
    return {name.split("/")[1] for name in store.names("out")}


def reopened(store: Store) -> Shared:
    """The run as somebody else sees it."""
    return open_shared(open_store(store.url))
