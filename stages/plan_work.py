"""plan-work: put a stage into a store as tasks, for any number of workers."""

from typing import Any

from moepress.compress.pruning.plan import Plan
from moepress.models.storage.mtp import Mtp
from moepress.runs.store.store import open_store
from moepress.stages.groundwork import load_corpus
from moepress.stages.places import Calibration, Machine, model_folder
from moepress.stages.quantize import QuantizeRequest, corpus_for, prepare
from moepress.stages.sharing import profile, quantize
from moepress.stages.sharing.opened import limits_before


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
    """Put a run of `quantize` into the store, or find the same one there.

    Returns:
        `store`, `new`, `tasks`, and `kinds`, how many tasks of each.

    Raises:
        UsageError: another run is there, or what is asked for does not fit the model.
        StoreError: the store cannot be used.
    """
    store, folder = open_store(url), model_folder(model_name)
    prepared = prepare(folder, plan, request, machine, mtp=mtp)
    corpus = corpus_for(prepared, calibration)
    limits = limits_before(store, prepared.model, int(corpus.windows.shape[1]), machine)
    return quantize.share(store, prepared, corpus, limits, model_name, calibration.seed)


def plan_profile_stage(
    model_name: str, url: str, asked: profile.Asked, calibration: Calibration, machine: Machine
) -> dict[str, Any]:
    """Put a run of `profile` into the store, or find the same one there; returns and raises as `plan_work_stage`."""
    store, folder = open_store(url), model_folder(model_name)
    stage = profile.open_profiling(folder, machine, asked)
    shape = stage.checkpoint.shape
    corpus = load_corpus(folder, calibration, context=shape.context, vocabulary=shape.vocabulary)
    limits = limits_before(store, stage.model, int(corpus.windows.shape[1]), machine)
    return profile.share(store, stage, corpus, limits, model_name, calibration.seed)
