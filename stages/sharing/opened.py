"""What the stages of shared runs have in common: how a run is stated in a store, and held against this machine."""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch

from moepress import __version__
from moepress.calibration.corpus import Corpus
from moepress.calibration.profile import fingerprint
from moepress.errors import InvalidInputError, UsageError
from moepress.models.forward.streamed import StreamedModel
from moepress.models.forward.walk import Limits, choose_limits, default_memory
from moepress.models.storage.checkpoint import Checkpoint
from moepress.models.storage.safetensors_file import read_header
from moepress.models.storage.tensors import read_tensor, tensor_entry
from moepress.models.storage.writer import write_shard
from moepress.runs.journal import Run
from moepress.runs.parsing import parse_json
from moepress.runs.progress import note
from moepress.runs.store.store import Store
from moepress.runs.work.desk import Desk
from moepress.runs.work.shared import WORK, Shared, begin_shared
from moepress.runs.work.tasks import Task
from moepress.runs.work.worker import Perform
from moepress.stages.places import Machine

TOKENS = "tokens.safetensors"


class Performs(Perform, Protocol):
    """Does tasks within some memory, and holds some of a layer from one to the next."""

    limits: Limits

    def forget(self) -> None:
        """Give back what it holds."""


class Opened(Protocol):
    """A stage of a shared run on this machine, its model open."""

    @property
    def folder(self) -> Path:
        """Of the model."""

    def performer(self, shared: Shared, machine: Machine, desk: Desk) -> Performs:
        """What does a worker's tasks."""

    def gather(self, shared: Shared, run: Run) -> dict[str, Any]:
        """Make the stage's output of what all tasks left, and finish the run."""


def limits_before(store: Store, model: StreamedModel, window: int, machine: Machine) -> Limits:
    """The limits to plan with: windows go at once as in the run that is in the store already, for their number may hang
    on memory that was free then."""
    raw = store.get(WORK)
    try:
        found: Mapping[str, Any] = {} if raw is None else parse_json(raw.decode())["work"]
        before = int(found["batch_windows"]) if found else None
    except (ValueError, TypeError, KeyError):
        before = None
    return choose_limits(model.shape, window, machine.memory_bytes, before, model.device)


def begin(
    store: Store, work: Mapping[str, Any], tasks: Sequence[Task], corpus: Corpus, model: StreamedModel, limits: Limits
) -> dict[str, Any]:
    """Put a run into a store, or find it there.

    Args:
        store: where.
        work: what the stage says of it.
        tasks: the graph.
        corpus: its text, which goes along as tokens.
        model: it runs on.
        limits: batch and shard are part of the run.

    Returns:
        What `plan-work` says: `store`, `new`, `tasks`, and `kinds`, how many tasks of each.

    Raises:
        UsageError: another run is there.
    """
    stated = {
        **work,
        "moepress": __version__,
        "torch": torch.__version__,
        "device": model.device.type,
        "dtype": str(model.dtype).removeprefix("torch."),
        "batch_windows": limits.batch_windows,
        "shard_windows": limits.shard_windows,
        "domains": list(corpus.domains),
        "corpus": corpus.digest,
    }
    with tempfile.TemporaryDirectory(prefix="moepress-") as name:
        tokens = Path(name) / TOKENS
        entries = {"windows": corpus.windows, "domain_index": corpus.domain_index}
        write_shard(tokens, [tensor_entry(*pair) for pair in entries.items()])
        new = begin_shared(store, stated, tasks, {TOKENS: tokens})
    if not new:
        note(f"{store.url} holds this very run already; workers go on with it.")
    kinds = {kind: sum(task.kind == kind for task in tasks) for kind in dict.fromkeys(task.kind for task in tasks)}
    return {"store": store.url, "new": new, "tasks": len(tasks), "kinds": kinds}


_STATED = (
    *("stage", "moepress", "torch", "model", "digest", "device", "dtype", "batch_windows", "shard_windows"),
    *("domains", "corpus", "summary"),
)
"""What a run says of itself, whatever its stage."""


def machine_for(work: Mapping[str, Any], machine: Machine, names: Sequence[str]) -> Machine:
    """This machine, computing as it was planned.

    Args:
        work: of the run.
        machine: of this worker.
        names: what the stage has to find in the work, besides what all do.

    Raises:
        UsageError: other versions are installed here, which may give other bytes, or another dtype is asked for.
        InvalidInputError: the run does not say all of it.
    """
    for package, version in (("moepress", __version__), ("torch", torch.__version__)):
        if work.get(package) != version:
            raise UsageError(
                f"The shared run was planned with {package} {work.get(package)} and this is {version}, which may give "
                "other bytes; install that version here, or plan the work anew."
            )
    missing = [name for name in (*_STATED, *names) if name not in work]
    if missing:
        raise InvalidInputError(f"{WORK} of the shared run is broken ({missing[0]}); plan the work anew elsewhere.")
    if machine.dtype not in ("auto", work["dtype"]):
        raise UsageError(f"The shared run computes in {work['dtype']}, whoever works on it; leave out --dtype.")
    device = work["device"] if machine.device == "auto" else machine.device
    return replace(machine, dtype=work["dtype"], device=device)


def require_model(work: Mapping[str, Any], model: StreamedModel, checkpoint: Checkpoint, name: str) -> None:
    """Refuse another model than the one that the work was planned for, or a device of another kind.

    Raises:
        UsageError: naming both devices.
        InvalidInputError: naming the model.
    """
    if model.device.type != work["device"]:
        raise UsageError(
            f"The shared run was planned for {work['device']} and this worker has {model.device.type}, which gives "
            "other bytes; plan with the --device that all workers have."
        )
    if fingerprint(checkpoint) != work["digest"]:
        raise InvalidInputError(f"{name} is not the model that the work was planned for; give its place with --model.")


def require_tasks(shared: Shared, tasks: Sequence[Task]) -> None:
    """Refuse a graph that is not that of the model and the text that are here.

    Raises:
        InvalidInputError: saying so.
    """
    if list(tasks) != list(shared.tasks):
        raise InvalidInputError(f"The tasks in {shared.store.url} are not those of this model; plan the work anew.")


def limits_of(work: Mapping[str, Any], machine: Machine) -> Limits:
    """This worker's memory, and the run's batches and shards."""
    return Limits(
        memory_bytes=machine.memory_bytes or default_memory(),
        batch_windows=work["batch_windows"],
        shard_windows=work["shard_windows"],
    )


def corpus_of(shared: Shared, desk: Desk) -> Corpus:
    """The run's text: what tasks need of it."""
    stored = read_header(desk.given(TOKENS))
    return Corpus(
        windows=read_tensor(stored["windows"]),
        domain_index=read_tensor(stored["domain_index"]),
        domains=tuple(shared.work["domains"]),
        digest=shared.work["corpus"],
        embedded=False,
        bos_policy="",
        documents=(),
        tokens_per_domain=(),
        notes=(),
    )
