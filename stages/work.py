"""work: do tasks of a shared run, and fetch its result once all are done."""

import os
import platform
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from moepress import __version__
from moepress.calibration.corpus import Corpus
from moepress.compress.gptq.finish import finish
from moepress.compress.gptq.perform import Performer, extent_of
from moepress.compress.gptq.pieces import piece_file
from moepress.compress.gptq.tasks import task_of
from moepress.compress.pruning.plan import Plan
from moepress.errors import InvalidInputError, MoepressError, UsageError
from moepress.models.forward.walk import Limits, default_memory
from moepress.models.storage.inside import watched
from moepress.models.storage.mtp import Mtp
from moepress.models.storage.safetensors_file import read_header
from moepress.models.storage.tensors import read_tensor
from moepress.runs.files import create, make_folders, new_id
from moepress.runs.journal import Run, open_run
from moepress.runs.output import check_output
from moepress.runs.progress import track
from moepress.runs.store.store import open_store
from moepress.runs.work.desk import Desk
from moepress.runs.work.leases import TERM_SECONDS, Leases
from moepress.runs.work.shared import Shared, open_shared
from moepress.runs.work.worker import Worker
from moepress.stages.places import Machine, Output, model_folder
from moepress.stages.plan_work import REQUEST, TOKENS, frame_for
from moepress.stages.quantize import Prepared, prepare

CACHE_BYTES = 16 << 30


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
        parent: a process with whose end this worker ends after its task; None for none.
    """

    share: tuple[int, int] = (0, 1)
    name: str | None = None
    scratch: Path | None = None
    cache_bytes: int = CACHE_BYTES
    term_seconds: float = TERM_SECONDS
    model: str | None = None
    threads: int | None = None
    parent: int | None = None


def work_stage(url: str, machine: Machine, place: Place, output: Output | None = None) -> dict[str, Any]:
    """Do tasks until all are done, by whomever; then fetch the result, where an output is given.

    Returns:
        `did`: how many tasks this worker did; and with an output what `quantize` returns.

    Raises:
        UsageError: there is no run in the store, or it is of another version, or the output is taken.
        FailedError: a task cannot be done.
    """
    if place.threads:
        torch.set_num_threads(place.threads)
    shared = open_shared(open_store(url))
    if output is not None:
        check_output(output.folder, [], resume=output.resume, force=output.force)
    prepared = reopened(shared.work, machine, place.model)
    name = place.name or f"{platform.node()[:40] or 'worker'}-{os.getpid()}-{new_id()[:6]}"
    with _folder(shared, place, name) as folder:
        desk = Desk(shared, folder, place.cache_bytes)
        performer = performer_of(shared, prepared, machine, desk)
        try:
            with Leases(shared.store, name, place.term_seconds) as leases, _tracked(shared) as advance:
                worker = Worker(shared=shared, leases=leases, desk=desk, perform=performer, share=place.share)
                worker.work(advance, lambda: place.parent is not None and os.getppid() != place.parent)
        finally:
            performer.forget()
    result: dict[str, Any] = {"did": len(worker.did), "tasks": len(shared.tasks), "fetched_bytes": desk.fetched_bytes}
    return result if output is None else result | fetch_result(shared, prepared, output)


@contextmanager
def _tracked(shared: Shared) -> Iterator[Any]:
    with track("work", len(shared.tasks), unit="tasks", about=f"{shared.work['summary']['model_name']}") as advance:
        yield advance


def reopened(work: Mapping[str, Any], machine: Machine, model: str | None = None) -> Prepared:
    """The model of a shared run, as it was when the work was planned.

    Raises:
        UsageError: other versions, or another device.
        InvalidInputError: another model is there now.
    """
    for package, version in (("moepress", __version__), ("torch", torch.__version__)):
        if work[package] != version:
            raise UsageError(
                f"The shared run was planned with {package} {work[package]} and this is {version}, which may give "
                "other bytes; install that version here, or plan the work anew."
            )
    plan = None if work["plan"] is None else Plan.model_validate(work["plan"])
    request = REQUEST.validate_python(work["request"])
    name = model or work["model"]
    device = work["device"] if machine.device == "auto" else machine.device
    machine = replace(machine, dtype=work["dtype"], device=device)
    prepared = prepare(model_folder(name), plan, request, machine, mtp=Mtp(work["mtp"]))
    if prepared.model.device.type != work["device"]:
        raise UsageError(
            f"The shared run was planned for {work['device']} and this worker has {prepared.model.device.type}, which "
            "gives other bytes; plan with the --device that all workers have."
        )
    _require_model(prepared, work, name)
    return prepared


def _require_model(prepared: Prepared, work: Mapping[str, Any], name: str) -> None:
    from moepress.calibration.profile import fingerprint

    if fingerprint(prepared.checkpoint) != work["digest"]:
        raise InvalidInputError(f"{name} is not the model that the work was planned for; give its place with --model.")


def performer_of(shared: Shared, prepared: Prepared, machine: Machine, desk: Desk) -> Performer:
    """What does a worker's tasks: its model, and the run's text."""
    work = shared.work
    stored = read_header(desk.given(TOKENS))
    windows = read_tensor(stored["windows"])
    corpus = Corpus(
        windows=windows,
        domain_index=read_tensor(stored["domain_index"]),
        domains=tuple(work["domains"]),
        digest=work["corpus"],
        embedded=False,
        bos_policy="",
        documents=(),
        tokens_per_domain=(),
        notes=(),
    )
    limits = Limits(
        memory_bytes=machine.memory_bytes or default_memory(),
        batch_windows=work["batch_windows"],
        shard_windows=work["shard_windows"],
    )
    frame = frame_for(prepared)
    return Performer(frame=frame, corpus=corpus, limits=limits, extent=extent_of(frame, len(windows), limits))


@contextmanager
def _folder(shared: Shared, place: Place, name: str) -> Iterator[Path]:
    """A folder of this worker alone: in the store's own file system where it has one, so that files are only moved."""
    parent = place.scratch
    if parent is None and (local := shared.store.local("work.json")) is not None:
        parent = local.parent / "scratch"
    if parent is not None:
        make_folders(parent)
    folder = Path(tempfile.mkdtemp(prefix=f"moepress-{name}-", dir=parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def fetch_result(shared: Shared, prepared: Prepared, output: Output) -> dict[str, Any]:
    """The finished run's folder, from the pieces in the store; it can be resumed.

    Raises:
        MoepressError: a task is not done yet.
    """
    work = shared.work
    settings = {"command": "work", "store": shared.store.url, "work": work["digest"], "request": work["request"]}
    inputs = watched(prepared.folder)
    with open_run(output.folder, settings, resume=output.resume, force=output.force, inputs=inputs) as run:
        return {"bytes_before": work["bytes_before"], **gather(shared, prepared, run), **_stated(work)}


def _stated(work: Mapping[str, Any]) -> dict[str, Any]:
    return {**{key: value for key, value in work["summary"].items() if key != "plan"}, "scheme": work["scheme"]}


def gather(shared: Shared, prepared: Prepared, run: Run) -> dict[str, Any]:
    """Put the pieces into a run, in their order, and finish it."""
    frame = frame_for(prepared)
    with track("gather", len(frame.piece_names), unit="pieces") as advance:
        for piece, name in frame.piece_names.items():
            if run.done(piece) is None:
                _take(shared, run, piece, name)
            advance(1)
    count = len(frame.piece_names)
    made = finish(run, frame, prepared.folder, shared.work["summary"], prepared.notes)
    return {"finished": True, "pieces_done": count, "pieces": count, **made}


def _take(shared: Shared, run: Run, piece: str, name: str) -> None:
    done = shared.done(task_of(piece))
    if done is None:
        raise MoepressError(f"The task {task_of(piece)} is not done yet; start workers, and fetch the result then.")
    made = done.files[piece_file(piece)]

    def write(path: Path) -> Mapping[str, Any]:
        if not _linked(shared.store.local(made.object), path):
            shared.store.fetch(made.object, path)
        return done.note

    found = run.write(piece, name, write)
    if (found.bytes, found.sha256) != (made.bytes, made.sha256):
        run.drop(piece)
        raise InvalidInputError(f"{made.object} in {shared.store.url} is not what was stored there; delete its marker.")


def _linked(place: Path | None, path: Path) -> bool:
    """Give a file that lies on the same file system a second name, instead of a file that was just made."""
    if place is None:
        return False
    path.unlink()
    try:
        os.link(place, path)
    except OSError:
        os.close(create(path))
        return False
    return True
