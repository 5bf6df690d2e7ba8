"""plan-work: put a run of `quantize` into a store as tasks, for any number of workers."""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter

from moepress import __version__
from moepress.calibration.corpus import Corpus
from moepress.calibration.profile import describe_corpus
from moepress.compress.gptq.job import Frame, frame_of
from moepress.compress.gptq.perform import extent_of
from moepress.compress.gptq.tasks import graph
from moepress.compress.pruning.plan import Plan
from moepress.compress.pruning.rewrite import plan_summary
from moepress.models.forward.walk import Limits, choose_limits
from moepress.models.storage.mtp import Mtp
from moepress.models.storage.tensors import tensor_entry
from moepress.models.storage.writer import write_shard
from moepress.runs.parsing import parse_json
from moepress.runs.progress import note
from moepress.runs.store.store import Store, open_store
from moepress.runs.work.shared import WORK, begin_shared
from moepress.stages.places import Calibration, Machine, model_folder
from moepress.stages.quantize import Prepared, QuantizeRequest, corpus_for, prepare, settings_of, summary_of

TOKENS = "tokens.safetensors"
REQUEST = TypeAdapter(QuantizeRequest)


def plan_work_stage(
    model_name: str,
    url: str,
    plan: Plan | None,
    request: QuantizeRequest,
    calibration: Calibration,
    machine: Machine,
    *,
    mtp: Mtp = Mtp.KEEP,
) -> dict[str, Any]:
    """Put the run into the store, or find the same one there.

    Returns:
        `store`, `new`, `tasks`, `layers` and `kinds` (how many tasks of each).

    Raises:
        UsageError: another run is there, or what is asked for does not fit the model.
        StoreError: the store cannot be used.
    """
    store = open_store(url)
    folder = model_folder(model_name)
    prepared = prepare(folder, plan, request, machine, mtp=mtp)
    corpus = corpus_for(prepared, calibration)
    before = _windows_before(store)
    limits = choose_limits(
        prepared.model.shape, int(corpus.windows.shape[1]), machine.memory_bytes, before, prepared.model.device
    )
    return share(store, prepared, corpus, limits, model_name, calibration.seed)


def share(
    store: Store, prepared: Prepared, corpus: Corpus, limits: Limits, model_name: str, seed: int
) -> dict[str, Any]:
    """`plan_work_stage`, of a model that is open and a text that is read."""
    frame = frame_for(prepared)
    tasks = graph(extent_of(frame, len(corpus.windows), limits))
    with tempfile.TemporaryDirectory(prefix="moepress-") as name:
        tokens = Path(name) / TOKENS
        entries = {"windows": corpus.windows, "domain_index": corpus.domain_index}
        write_shard(tokens, [tensor_entry(*pair) for pair in entries.items()])
        work = _stated(prepared, corpus, limits, model_name, seed)
        new = begin_shared(store, work, tasks, {TOKENS: tokens})
    if not new:
        note(f"{store.url} holds this very run already; workers go on with it.")
    kinds = {kind: sum(task.kind == kind for task in tasks) for kind in dict.fromkeys(task.kind for task in tasks)}
    return {"store": store.url, "new": new, "tasks": len(tasks), "layers": frame.layers, "kinds": kinds}


def frame_for(prepared: Prepared) -> Frame:
    """The frame of a run (`compress.gptq.job`)."""
    return frame_of(prepared.model, prepared.options, prepared.request.include, mtp=bool(prepared.notes))


def _stated(prepared: Prepared, corpus: Corpus, limits: Limits, model_name: str, seed: int) -> dict[str, Any]:
    """What workers are told: the request, settled, and what else the bytes depend on."""
    plan, settings = prepared.plan, settings_of(prepared, seed)
    summary = summary_of(prepared, model_name, describe_corpus(corpus, seed), settings)
    return {
        "stage": "quantize",
        "moepress": __version__,
        "torch": torch.__version__,
        "model": str(prepared.folder.resolve()),
        "digest": settings["model"],
        "device": prepared.model.device.type,
        "dtype": str(prepared.model.dtype).removeprefix("torch."),
        "batch_windows": limits.batch_windows,
        "shard_windows": limits.shard_windows,
        "request": REQUEST.dump_python(prepared.request, mode="json"),
        "plan": None if plan is None else plan.model_dump(mode="json"),
        "mtp": (Mtp.KEEP if prepared.predicting else Mtp.DROP).value,
        "domains": list(corpus.domains),
        "corpus": corpus.digest,
        "summary": summary | {"plan": None if plan is None else plan_summary(plan)},
        "bytes_before": prepared.checkpoint.total_bytes,
        "scheme": settings["scheme"],
    }


def _windows_before(store: Store) -> int | None:
    """How many windows go at once in a run that is in the store already, which may hang on memory that was free."""
    raw = store.get(WORK)
    try:
        found: Mapping[str, Any] = {} if raw is None else parse_json(raw.decode())["work"]
        return int(found["batch_windows"]) if found else None
    except (ValueError, TypeError, KeyError):
        return None
