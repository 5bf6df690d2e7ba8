"""quantize as a shared run: see `compress.gptq.tasks`."""

import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from moepress.calibration.corpus import Corpus
from moepress.calibration.profile import describe_corpus
from moepress.compress.gptq.finish import SHARED, finish
from moepress.compress.gptq.job import Frame, frame_of
from moepress.compress.gptq.perform import Performer, extent_of, in_tasks
from moepress.compress.gptq.tasks import graph
from moepress.compress.pruning.plan import Plan
from moepress.compress.pruning.rewrite import plan_summary
from moepress.errors import InvalidInputError, MoepressError
from moepress.models.forward.walk import Limits
from moepress.models.storage.mtp import Mtp
from moepress.models.storage.safetensors_file import Stored, read_header
from moepress.models.storage.writer import copied_entry, write_shard
from moepress.runs.files import create, make_folders, sha256_of
from moepress.runs.journal import Run
from moepress.runs.progress import track
from moepress.runs.store.store import Store
from moepress.runs.work.desk import Desk
from moepress.runs.work.shared import WORK, Shared
from moepress.runs.work.tasks import Done, Made
from moepress.stages.places import Machine, anywhere, model_folder
from moepress.stages.quantize import Prepared, QuantizeRequest, prepare, settings_of, summary_of
from moepress.stages.sharing.opened import (
    begin,
    corpus_of,
    limits_of,
    machine_for,
    require_model,
    require_tasks,
)

REQUEST = TypeAdapter(QuantizeRequest)


def share(
    store: Store, prepared: Prepared, corpus: Corpus, limits: Limits, model_name: str, seed: int
) -> dict[str, Any]:
    """Put a run of `quantize` into a store, or find it there; returns and raises as `opened.begin`."""
    frame, plan = frame_for(prepared), prepared.plan
    settings = settings_of(prepared, seed)
    summary = summary_of(prepared, model_name, describe_corpus(corpus, seed), settings)
    work = {
        "stage": "quantize",
        "model": anywhere(model_name),
        "digest": settings["model"],
        "request": REQUEST.dump_python(prepared.request, mode="json"),
        "plan": None if plan is None else plan.model_dump(mode="json"),
        "mtp": (Mtp.KEEP if prepared.predicting else Mtp.DROP).value,
        "summary": summary | {"plan": None if plan is None else plan_summary(plan)},
        "bytes_before": prepared.checkpoint.total_bytes,
        "scheme": settings["scheme"],
    }
    tasks = graph(extent_of(in_tasks(frame)[0], len(corpus.windows), limits))
    return begin(store, work, tasks, corpus, prepared.model, limits)


def frame_for(prepared: Prepared) -> Frame:
    """The frame of a run (`compress.gptq.job`)."""
    return frame_of(prepared.model, prepared.options, prepared.request.include, mtp=bool(prepared.notes))


def reopened(work: Mapping[str, Any], machine: Machine, model: str | None = None) -> "Quantizing":
    """The stage as it was planned.

    Args:
        work: of the run.
        machine: of this worker.
        model: where the model is here; None for where it was.

    Raises:
        UsageError: other versions, or another device.
        InvalidInputError: another model is there now.
    """
    machine = machine_for(work, machine, ("request", "plan", "mtp", "bytes_before", "scheme"))
    try:
        plan = None if work["plan"] is None else Plan.model_validate(work["plan"])
        request = REQUEST.validate_python(work["request"])
    except ValueError as error:
        why = str(error).splitlines()[0]
        raise InvalidInputError(f"{WORK} of the shared run is broken ({why}); plan the work anew elsewhere.") from error
    name = model or work["model"]
    prepared = prepare(model_folder(name), plan, request, machine, mtp=Mtp(work["mtp"]))
    require_model(work, prepared.model, prepared.checkpoint, name)
    return Quantizing(prepared=prepared)


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantizing:
    """`opened.Opened` of quantize."""

    prepared: Prepared

    @property
    def folder(self) -> Path:
        """Of the model."""
        return self.prepared.folder

    def performer(self, shared: Shared, machine: Machine, desk: Desk) -> Performer:
        """What does a worker's tasks."""
        corpus, limits = corpus_of(shared, desk), limits_of(shared.work, machine)
        frame, _ = in_tasks(frame_for(self.prepared))
        extent = extent_of(frame, len(corpus.windows), limits)
        require_tasks(shared, graph(extent))
        return Performer(frame=frame, corpus=corpus, limits=limits, extent=extent)

    def gather(self, shared: Shared, run: Run, *, give: bool = False) -> dict[str, Any]:
        """Put the pieces into a run, in their order, and finish it; returns as `pipeline.quantize`, and the summary.

        With `give` the store is deleted after that, so that its files need not be copied.

        Raises:
            MoepressError: a task is not done yet.
        """
        frame, work = frame_for(self.prepared), shared.work
        _, tasks = in_tasks(frame)
        with track("gather", len(frame.piece_names), unit="pieces") as advance:
            for piece, name in frame.piece_names.items():
                if run.done(piece) is None:
                    _take(shared, run, piece, name, tasks[piece], give=give)
                advance(1)
        count = len(frame.piece_names)
        made = finish(run, frame, self.folder, work["summary"], self.prepared.notes)
        stated = {key: value for key, value in work["summary"].items() if key != "plan"}
        return {
            "finished": True,
            "pieces_done": count,
            "pieces": count,
            **made,
            **stated,
            "bytes_before": work["bytes_before"],
            "scheme": work["scheme"],
        }


def _take(shared: Shared, run: Run, piece: str, name: str, tasks: Sequence[str], *, give: bool) -> None:
    """Make a piece of what its tasks left: their tensors one behind the other."""
    parts = [_part(shared, task) for task in tasks]

    def write(path: Path) -> Mapping[str, Any]:
        if len(parts) == 1:
            done, made = parts[0]
            if not (give and _linked(shared.store.local(made.object), path)):
                shared.store.fetch(made.object, path)
            _require(shared, made, path)
            return done.note
        make_folders(run.folder / SHARED)  # it goes when the run is finished, whoever was killed
        with tempfile.TemporaryDirectory(dir=run.folder / SHARED) as folder:
            places = [_fetched(shared, made, Path(folder) / str(n)) for n, (_, made) in enumerate(parts)]
            entries = [copied_entry(entry) for place in places for entry in _ordered(read_header(place))]
            write_shard(path, entries)
        experts = {key: row for done, _ in parts for key, row in done.note["experts"].items()}
        return {**parts[0][0].note, "experts": experts}

    run.write(piece, name, write)


def _ordered(stored: Mapping[str, Stored]) -> list[Stored]:
    """As they lie in the file."""
    return sorted(stored.values(), key=lambda entry: (entry.begin, entry.end))


def _part(shared: Shared, task: str) -> tuple[Done, Made]:
    done = shared.done(task)
    if done is None:
        raise MoepressError(f"The task {task} is not done yet; start workers, and fetch the result then.")
    (made,) = done.files.values()
    return done, made


def _fetched(shared: Shared, made: Made, path: Path) -> Path:
    """A task's file on this machine."""
    place = shared.store.local(made.object)
    if place is None:
        shared.store.fetch(made.object, path)
    _require(shared, made, place or path)
    return place or path


def _require(shared: Shared, made: Made, path: Path) -> None:
    if path.stat().st_size != made.bytes or sha256_of(path) != made.sha256:
        raise InvalidInputError(
            f"{made.object} in {shared.store.url} is not what was stored there; plan the work anew elsewhere."
        )


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
