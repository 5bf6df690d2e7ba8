"""quantize as a shared run: see `compress.gptq.tasks`."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from moepress.calibration.corpus import Corpus
from moepress.calibration.profile import describe_corpus, fingerprint
from moepress.compress.gptq.finish import finish
from moepress.compress.gptq.job import Frame, frame_of
from moepress.compress.gptq.perform import Performer, extent_of
from moepress.compress.gptq.pieces import piece_file
from moepress.compress.gptq.tasks import graph, task_of
from moepress.compress.pruning.plan import Plan
from moepress.compress.pruning.rewrite import plan_summary
from moepress.errors import InvalidInputError, MoepressError
from moepress.models.forward.walk import Limits
from moepress.models.storage.mtp import Mtp
from moepress.runs.files import create
from moepress.runs.journal import Run
from moepress.runs.progress import track
from moepress.runs.store.store import Store
from moepress.runs.work.desk import Desk
from moepress.runs.work.shared import WORK, Shared
from moepress.stages.places import Machine, anywhere, model_folder
from moepress.stages.quantize import Prepared, QuantizeRequest, prepare, settings_of, summary_of
from moepress.stages.sharing.opened import (
    begin,
    corpus_of,
    limits_of,
    machine_for,
    require_device,
    require_stated,
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
    return begin(store, work, graph(extent_of(frame, len(corpus.windows), limits)), corpus, prepared.model, limits)


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
    machine = machine_for(work, machine)
    require_stated(work, ("request", "plan", "mtp", "bytes_before", "scheme"))
    try:
        plan = None if work["plan"] is None else Plan.model_validate(work["plan"])
        request = REQUEST.validate_python(work["request"])
    except ValueError as error:
        why = str(error).splitlines()[0]
        raise InvalidInputError(f"{WORK} of the shared run is broken ({why}); plan the work anew elsewhere.") from error
    name = model or work["model"]
    prepared = prepare(model_folder(name), plan, request, machine, mtp=Mtp(work["mtp"]))
    require_device(work, prepared.model)
    if fingerprint(prepared.checkpoint) != work["digest"]:
        raise InvalidInputError(f"{name} is not the model that the work was planned for; give its place with --model.")
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
        corpus, frame, limits = corpus_of(shared, desk), frame_for(self.prepared), limits_of(shared.work, machine)
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
        with track("gather", len(frame.piece_names), unit="pieces") as advance:
            for piece, name in frame.piece_names.items():
                if run.done(piece) is None:
                    _take(shared, run, piece, name, give=give)
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


def _take(shared: Shared, run: Run, piece: str, name: str, *, give: bool) -> None:
    done = shared.done(task_of(piece))
    if done is None:
        raise MoepressError(f"The task {task_of(piece)} is not done yet; start workers, and fetch the result then.")
    made = done.files[piece_file(piece)]

    def write(path: Path) -> Mapping[str, Any]:
        if not (give and _linked(shared.store.local(made.object), path)):
            shared.store.fetch(made.object, path)
        return done.note

    found = run.write(piece, name, write)
    if (found.bytes, found.sha256) != (made.bytes, made.sha256):
        run.drop(piece)
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
