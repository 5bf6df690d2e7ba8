"""work: do tasks of a shared run, and fetch its result once all are done."""

import json
import os
import platform
import shutil
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moepress.errors import InvalidInputError
from moepress.models.storage.inside import watched
from moepress.runs.files import make_folders, new_id
from moepress.runs.journal import open_run
from moepress.runs.memory import settle
from moepress.runs.output import check_output
from moepress.runs.progress import track
from moepress.runs.store.store import open_store
from moepress.runs.work.desk import Desk
from moepress.runs.work.leases import TERM_SECONDS, Leases
from moepress.runs.work.processes import is_gone, this_process
from moepress.runs.work.shared import WORK, Shared, open_shared
from moepress.runs.work.tasks import small_object
from moepress.runs.work.worker import Worker
from moepress.stages.places import Machine, Output
from moepress.stages.sharing import profile, quantize
from moepress.stages.sharing.opened import Opened

CACHE_BYTES = 16 << 30
_PARENT_SECONDS, _AGAIN_SECONDS = 1.0, 4.0
_OWNER = "owner.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where and how a worker works.

    Attributes:
        share: I of N, see `runs.work.worker.Worker`.
        name: of the worker; None for one of its own.
        scratch: folder for its files; None for one beside the store's objects, or of the system.
        cache_bytes: what it keeps of files from afar.
        term_seconds: how long its leases last without a sign of life.
        model: where the model is on this machine; None for where it was when the work was planned.
        threads: of this worker; None for as many as there are cores.
        parent: a process with whose end this worker is interrupted; None for none.
    """

    share: tuple[int, int] = (0, 1)
    name: str | None = None
    scratch: Path | None = None
    cache_bytes: int = CACHE_BYTES
    term_seconds: float = TERM_SECONDS
    model: str | None = None
    threads: int | None = None
    parent: int | None = None


STAGES: Mapping[str, Callable[[Mapping[str, Any], Machine, str | None], Opened]] = {
    "quantize": quantize.reopened,
    "profile": profile.reopened,
}
"""What can be shared, and how it is opened again: of the run's work, this machine, and where the model is here."""


def work_stage(url: str, machine: Machine, place: Place, output: Output | None = None) -> dict[str, Any]:
    """Do tasks until all are done, by whomever; then fetch the result, where an output is given.

    Returns:
        `did`: how many tasks this worker did; and with an output what the stage's `gather` returns.

    Raises:
        UsageError: there is no run in the store, or it is of another version, or the output is taken.
        FailedError: a task cannot be done.
    """
    if place.threads:
        torch.set_num_threads(place.threads)
    shared = open_shared(open_store(url))
    if output is not None:
        check_output(output.folder, [], resume=output.resume, force=output.force)
    stage = reopened(shared, machine, place.model)
    name = place.name or f"{platform.node()[:40] or 'worker'}-{os.getpid()}-{new_id()[:6]}"
    with _folder(shared, place, name) as folder:
        desk = Desk(shared, folder, place.cache_bytes)
        performer = stage.performer(shared, machine, desk)
        settle(performer.limits.memory_bytes)  # once: it looks through all that lives, longer than a small task takes
        try:
            with _with_parent(place.parent), Leases(shared.store, name, place.term_seconds) as leases:
                worker = Worker(shared=shared, leases=leases, desk=desk, perform=performer, share=place.share)
                with _tracked(shared) as advance:
                    worker.work(advance)
        finally:
            performer.forget()
    result: dict[str, Any] = {"did": len(worker.did), "tasks": len(shared.tasks), "fetched_bytes": desk.fetched_bytes}
    return result if output is None else result | fetch_result(shared, stage, output)


@contextmanager
def _with_parent(parent: int | None) -> Iterator[None]:
    """Interrupt this process as SIGTERM does once its parent, which was killed, cannot do it.

    More than once, for what a signal raises while Python frees an object is lost.
    """
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(_PARENT_SECONDS):
            if os.getppid() != parent:
                os.kill(os.getpid(), signal.SIGTERM)
                ended.wait(_AGAIN_SECONDS)

    if parent is not None:
        threading.Thread(target=watch, name="moepress parent", daemon=True).start()
    try:
        yield
    finally:
        ended.set()


@contextmanager
def _tracked(shared: Shared) -> Iterator[Any]:
    with track("work", len(shared.tasks), unit="tasks", about=model_of(shared)) as advance:
        yield advance


def model_of(shared: Shared) -> str:
    """The name of the model that a shared run is about."""
    return str(shared.work["summary"]["model_name"])


def reopened(shared: Shared, machine: Machine, model: str | None = None) -> Opened:
    """The stage of a shared run, as it was planned.

    Raises:
        UsageError: other versions, or another device.
        InvalidInputError: another model is there now, or the run is of a stage that is not known.
    """
    stage = STAGES.get(str(shared.work.get("stage")))
    if stage is None:
        raise InvalidInputError(f"The shared run in {shared.store.url} is of no known stage; plan the work anew.")
    return stage(shared.work, machine, model)


@contextmanager
def _folder(shared: Shared, place: Place, name: str) -> Iterator[Path]:
    """A folder of this worker alone: in the store's own file system where it has one, so that files are only moved."""
    parent = place.scratch
    if parent is None and (local := shared.store.local(WORK)) is not None:
        parent = local.parent / "scratch"
    if parent is None:
        parent = Path(tempfile.gettempdir())
    make_folders(parent)
    _sweep(parent)
    folder = Path(tempfile.mkdtemp(prefix=f"moepress-{name}-", dir=parent))
    (folder / _OWNER).write_text(json.dumps(this_process()), encoding="utf-8")
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _sweep(parent: Path) -> None:
    """Delete the folders of workers that were killed on this machine: each may hold a layer's hidden states."""
    for owner in parent.glob(f"moepress-*/{_OWNER}"):
        with suppress(OSError):
            mine = not hasattr(os, "getuid") or owner.parent.lstat().st_uid == os.getuid()
            if mine and not owner.parent.is_symlink() and is_gone(small_object(owner.read_bytes())):
                shutil.rmtree(owner.parent, ignore_errors=True)


def fetch_result(shared: Shared, stage: Opened, output: Output) -> dict[str, Any]:
    """The finished run's folder, of what its tasks left in the store; it can be resumed.

    Raises:
        MoepressError: a task is not done yet.
    """
    work = {key: value for key, value in shared.work.items() if key != "summary"}
    settings = {"command": "work", "store": shared.store.url, **work}
    inputs = watched(stage.folder)
    with open_run(output.folder, settings, resume=output.resume, force=output.force, inputs=inputs) as run:
        return stage.gather(shared, run)
