"""profile as a shared run: see `calibration.tasks`."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moepress.calibration.collect import cells_of
from moepress.calibration.corpus import Corpus
from moepress.calibration.profile import describe_corpus, fingerprint, save_profile
from moepress.calibration.tasks import STATISTICS, Observer, profile_graph, statistics_task
from moepress.compress.budget.bit_losses import bit_loss_probe
from moepress.errors import MoepressError
from moepress.models.forward.predicting import add_predicting
from moepress.models.forward.streamed import StreamedModel
from moepress.models.forward.walk import Limits, shards_of
from moepress.models.storage.checkpoint import Checkpoint
from moepress.models.storage.safetensors_file import read_array, read_header
from moepress.runs.journal import Run
from moepress.runs.progress import note, track
from moepress.runs.store.store import Store
from moepress.runs.work.desk import Desk
from moepress.runs.work.shared import Shared
from moepress.runs.work.tasks import Task
from moepress.stages.groundwork import announce, can_leave_out, opened, streamed, tell_of_residual
from moepress.stages.places import Machine, anywhere, display_name, model_folder
from moepress.stages.profile import not_whole, profile_of
from moepress.stages.sharing.opened import (
    begin,
    corpus_of,
    limits_of,
    machine_for,
    require_model,
    require_tasks,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What is observed.

    Attributes:
        leave_one_out: losses with re-routing, at the cost of one more expert per token.
        bit_losses: what bits cost.
        allow_nonfinite: weights may hold NaN or infinity.
    """

    leave_one_out: bool = True
    bit_losses: bool = True
    allow_nonfinite: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Profiling:
    """`opened.Opened` of profile."""

    checkpoint: Checkpoint
    model: StreamedModel
    predicting: tuple[int, ...]
    asked: Asked

    @property
    def folder(self) -> Path:
        """Of the model."""
        return self.checkpoint.folder

    @property
    def observed(self) -> tuple[int, ...]:
        """Layers with experts, MTP layers behind them."""
        return (*sorted(self.model.moe_layers), *self.predicting)

    def tasks(self, windows: int, limits: Limits) -> list[Task]:
        """The graph for so many windows."""
        shards = len(shards_of(windows, limits.shard_windows))
        return profile_graph(self.model.shape.layers + len(self.predicting), self.observed, shards)

    def performer(self, shared: Shared, machine: Machine, desk: Desk) -> Observer:
        """What does a worker's tasks."""
        corpus, limits = corpus_of(shared, desk), limits_of(shared.work, machine)
        require_tasks(shared, self.tasks(len(corpus.windows), limits))
        return Observer(
            model=self.model,
            windows=corpus.windows,
            cells=cells_of(corpus),
            limits=limits,
            leave_one_out=self.asked.leave_one_out,
            predicting=self.predicting,
            probe=bit_loss_probe(self.checkpoint.config) if self.asked.bit_losses else None,
        )

    def gather(self, shared: Shared, run: Run) -> dict[str, Any]:
        """Write the profile; returns `layers` and `tokens`.

        Raises:
            MoepressError: a task is not done yet.
        """
        found = {}
        with track("gather", len(self.observed), unit="layers") as advance:
            for layer in self.observed:
                done = shared.done(statistics_task(layer))
                if done is None:
                    task = statistics_task(layer)
                    raise MoepressError(f"The task {task} is not done yet; start workers, and fetch the result then.")
                made, place = done.files[STATISTICS], run.folder / f"fetched-{layer}.tmp"
                shared.store.fetch(made.object, place)
                found[layer] = {name: read_array(entry) for name, entry in read_header(place).items()}
                place.unlink()
                advance(1)
        work = shared.work
        calibration = work["summary"]["calibration"]
        name = work["summary"]["model_name"]
        save_profile(profile_of(self.checkpoint, name, work["domains"], calibration, found), run.folder)
        run.finish()
        return {"layers": len(found), "tokens": calibration["tokens"]}


def open_profiling(folder: Path, machine: Machine, asked: Asked) -> Profiling:
    """Open a model to be profiled; notes go to stderr."""
    checkpoint = opened(folder, allow_nonfinite=asked.allow_nonfinite)
    announce(checkpoint)
    leave_one_out = asked.leave_one_out and can_leave_out(checkpoint)
    tell_of_residual(checkpoint)
    note(*not_whole(checkpoint))
    model = streamed(checkpoint, machine)
    settled = Asked(leave_one_out=leave_one_out, bit_losses=asked.bit_losses, allow_nonfinite=asked.allow_nonfinite)
    return Profiling(checkpoint=checkpoint, model=model, predicting=add_predicting(model), asked=settled)


def share(store: Store, stage: Profiling, corpus: Corpus, limits: Limits, model_name: str, seed: int) -> dict[str, Any]:
    """Put a run of `profile` into a store, or find it there; returns and raises as `opened.begin`."""
    summary = {
        "model_name": display_name(stage.folder, model_name),
        "calibration": describe_corpus(corpus, seed),
    }
    work = {
        "stage": "profile",
        "model": anywhere(model_name),
        "digest": fingerprint(stage.checkpoint),
        "leave_one_out": stage.asked.leave_one_out,
        "bit_losses": stage.asked.bit_losses,
        "allow_nonfinite": stage.asked.allow_nonfinite,
        "summary": summary,
    }
    return begin(store, work, stage.tasks(len(corpus.windows), limits), corpus, stage.model, limits)


def reopened(work: Mapping[str, Any], machine: Machine, model: str | None = None) -> Profiling:
    """The stage as it was planned; arguments and errors as of `sharing.quantize.reopened`."""
    machine = machine_for(work, machine, ("leave_one_out", "bit_losses", "allow_nonfinite"))
    asked = Asked(**{name: work[name] for name in ("leave_one_out", "bit_losses", "allow_nonfinite")})
    name = model or work["model"]
    stage = open_profiling(model_folder(name), machine, asked)
    require_model(work, stage.model, stage.checkpoint, name)
    return stage
