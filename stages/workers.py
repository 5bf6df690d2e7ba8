"""Several workers from one command: quantizing by processes of this machine, and workers on a Ray cluster."""

import functools
import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from moepress.calibration.corpus import Corpus
from moepress.compress.gptq.finish import SHARED
from moepress.hub.stored import is_url
from moepress.models.forward.walk import Limits
from moepress.runs.journal import Run
from moepress.runs.progress import track
from moepress.runs.store.store import open_store
from moepress.runs.work.executors.local import LocalWorkers, worker_commands
from moepress.runs.work.executors.ray import work_on_ray
from moepress.runs.work.shared import open_shared
from moepress.stages.places import Machine
from moepress.stages.quantize import By, Prepared
from moepress.stages.sharing.quantize import Quantizing, frame_for, share
from moepress.stages.work import Place, model_of, work_stage


def by_workers(count: int, machine: Machine, model_name: str, seed: int) -> By:
    """Quantize by so many processes of this machine, for `quantize_stage`; the tasks lie in the run's work folder.

    Args:
        count: how many.
        machine: each gets its share of the memory.
        model_name, seed: as they were given to the stage.
    """

    def work(prepared: Prepared, corpus: Corpus, run: Run, limits: Limits) -> dict[str, Any]:
        store = open_store(str(run.folder / SHARED))
        share(store, prepared, corpus, limits, model_name, seed)
        shared = open_shared(store)
        if any(run.done(piece) is None for piece in frame_for(prepared).piece_names):
            threads = max(1, torch.get_num_threads() // count)
            memory = limits.memory_bytes // count
            options = ["--threads", str(threads), "--max-memory", str(memory), "--device", machine.device]
            if not is_url(model_name):  # of the hub it is here already
                options += ["--model", str(prepared.folder)]
            LocalWorkers(
                shared=shared,
                commands=worker_commands(store.url, count, options),
                logs=run.folder / SHARED / "logs",
                environment={"OMP_NUM_THREADS": str(threads)},
            ).work()
        return Quantizing(prepared=prepared).gather(shared, run, give=True)

    return work


def ray_stage(
    url: str, machine: Machine, place: Place, *, workers: int | None, address: str | None = None
) -> dict[str, Any]:
    """`work_stage` by workers on a Ray cluster, which all see the store and the model.

    Args:
        url: of the store.
        machine: of each worker; with a CUDA device each gets a GPU.
        place: of each; with `threads` each gets so many CPUs, else one.
        workers: how many; None for as many as the cluster has room for.
        address: of the cluster; None for the usual ways to find one.
    """
    shared = open_shared(open_store(url))
    before = shared.count_done()
    threads = place.threads or 1
    gpus = 1.0 if machine.device.startswith("cuda") else 0.0
    work: Callable[[int], Any] = functools.partial(_on_ray, url, machine, replace(place, threads=threads), workers or 1)
    with track("work", len(shared.tasks), unit="tasks", about=f"workers on Ray, {model_of(shared)}") as advance:
        told = 0

        def watch() -> bool:
            nonlocal told
            done = shared.count_done()
            advance(done - told)
            told = done
            return done == len(shared.tasks)

        count = work_on_ray(work, workers, watch, cpus=float(threads), gpus=gpus, address=address)
    return {"did": shared.count_done() - before, "tasks": len(shared.tasks), "workers": count}


def _on_ray(url: str, machine: Machine, place: Place, count: int, number: int) -> dict[str, Any]:
    os.environ.setdefault("OMP_NUM_THREADS", str(place.threads))
    return work_stage(url, machine, replace(place, share=(number % count, count)))
