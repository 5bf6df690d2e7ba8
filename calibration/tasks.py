"""A run of `profile` as tasks of a shared run (`runs.work`), and how they are done.

    observe-L-S      shard S of the windows goes through layer L, whose experts are observed on it
    statistics-L     the sums of all shards, in their order, and what bits cost, where that is asked for

Shards do not wait for one another, so that each goes through the model by itself. A probe wants what all tokens bring
to a layer's experts; those files go once it has looked. The bytes are those of `calibration.collect`, which adds up the
same shards.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moepress.calibration.collect import Probe
from moepress.calibration.observe import Cells, added, observe_layer
from moepress.models.forward.predicting import enter
from moepress.models.forward.shards import fill_hidden, fill_routed, hidden_entries, routed_entries, shard_file
from moepress.models.forward.streamed import StreamedModel, require_finite_hidden
from moepress.models.forward.walk import Limits, Scratch, Stream, first_step, last_step, open_stream, shards_of
from moepress.models.storage.safetensors_file import read_header
from moepress.models.storage.tensors import read_tensor, tensor_entry
from moepress.models.storage.writer import write_shard
from moepress.runs.memory import release_memory
from moepress.runs.phases import in_layer, phase
from moepress.runs.work.desk import Desk
from moepress.runs.work.tasks import Task

STATISTICS, HIDDEN, ROUTED = "statistics.safetensors", shard_file(0), "routed.safetensors"


def profile_graph(layers: int, moe_layers: Sequence[int], shards: int) -> list[Task]:
    """The tasks, each behind those that it needs.

    Args:
        layers: that are walked, MTP layers among them.
        moe_layers: those with experts.
        shards: how many.
    """
    tasks: list[Task] = []
    for layer in range(layers):
        for shard in range(shards):
            needs: tuple[str, ...] = (f"observe-{layer - 1}-{shard}",) if layer else ()
            tasks.append(Task(id=f"observe-{layer}-{shard}", kind="observe", at=(layer, shard), needs=needs, cost=4.0))
        if layer in moe_layers:
            needs = tuple(f"observe-{layer}-{shard}" for shard in range(shards))
            tasks.append(Task(id=statistics_task(layer), kind="statistics", at=(layer,), needs=needs, keep=True))
    return tasks


def statistics_task(layer: int) -> str:
    """The task whose file `STATISTICS` has a layer's accumulators."""
    return f"statistics-{layer}"


@dataclass(slots=True, kw_only=True)
class Observer:
    """Does these tasks.

    Attributes:
        model: with its MTP layers behind its last.
        windows: int64 [N, T].
        cells: of every token.
        limits: of this worker; batch and shard are those of the run.
        leave_one_out: see `observe_layer`.
        predicting: its MTP layers.
        probe: looks at decoder layers; None for none.
    """

    model: StreamedModel
    windows: Tensor
    cells: Cells
    limits: Limits
    leave_one_out: bool
    predicting: Sequence[int] = ()
    probe: Probe | None = None

    def __call__(self, task: Task, desk: Desk, *, smaller: bool) -> None:
        """See `runs.work.worker.Perform`; it holds no more than a shard or a layer at any time."""
        act = self._observe if task.kind == "observe" else self._statistics
        with in_layer(task.at[0]), phase("other"), torch.inference_mode():
            act(task, desk)
        release_memory()

    def forget(self) -> None:
        """Nothing is held from one task to the next."""

    def _observe(self, task: Task, desk: Desk) -> None:
        layer, shard = task.at
        rows = shards_of(len(self.windows), self.limits.shard_windows)[shard]
        own = range(len(rows))
        with self._stream(desk, self.windows[rows.start : rows.stop], embed=layer == 0) as stream:
            if layer:
                fill_hidden(stream, own, read_header(desk.input(f"observe-{layer - 1}-{shard}", HIDDEN)), "hidden")
            if layer in self.predicting:
                enter(stream, layer)
            stream.model.load_layer(layer)
            if first_step(stream, layer):
                if self.probe is not None and layer not in self.predicting:
                    with phase("hidden states"):
                        write_shard(desk.output(ROUTED), routed_entries(stream, own, "routed"))
                with phase("observe"):
                    length = self.windows.shape[1]
                    cells = replace(self.cells, index=self.cells.index[rows.start * length : rows.stop * length])
                    found = observe_layer(stream, layer, cells, leave_one_out=self.leave_one_out)
                _write(desk, found)
                last_step(stream, layer)
            stream.model.unload_layer(layer)
            with phase("check"):
                require_finite_hidden(stream.hidden, layer)
            with phase("hidden states"):
                write_shard(desk.output(HIDDEN), hidden_entries(stream, own, "hidden"))

    def _statistics(self, task: Task, desk: Desk) -> None:
        (layer,) = task.at
        parts = []
        for need in task.needs:
            stored = read_header(desk.input(need, STATISTICS))
            parts.append({name: read_tensor(entry) for name, entry in stored.items()})
        found = added(parts)
        if self.probe is not None and layer not in self.predicting:
            with self._stream(desk, self.windows, embed=False) as stream:
                shards = shards_of(len(self.windows), self.limits.shard_windows)
                for need, rows in zip(task.needs, shards, strict=True):
                    fill_routed(stream, rows, read_header(desk.input(need, ROUTED)), "routed")
                found |= self.probe(stream, layer, found)
        _write(desk, found)

    @contextmanager
    def _stream(self, desk: Desk, windows_NT: Tensor, *, embed: bool) -> Iterator[Stream]:
        scratch = Scratch(desk.scratch(), self.limits.memory_bytes)
        try:
            yield open_stream(self.model, windows_NT, scratch, self.limits, observe=True, embed=embed)
        finally:
            scratch.close()


def _write(desk: Desk, found: dict[str, Tensor]) -> None:
    entries = [tensor_entry(name, value) for name, value in sorted(found.items())]
    with phase("write", size=sum(entry.bytes for entry in entries)):
        write_shard(desk.output(STATISTICS), entries)
