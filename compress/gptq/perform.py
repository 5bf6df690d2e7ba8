"""The tasks of `compress.gptq.tasks`, done with what `compress.gptq.layer` does in a run of one process.

Everything that a task takes from another is a file of tensors, exactly as that one had them, and what is multiplied
together does not depend on who does it (`walk.Limits.shard_windows`). So the bytes are those of the plain run.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moepress.calibration.corpus import Corpus
from moepress.calibration.ends import factor_pieces, gather_ends
from moepress.compress.gptq.coded import Matrix
from moepress.compress.gptq.ends import end_groups, metric_of
from moepress.compress.gptq.include import Include
from moepress.compress.gptq.job import Frame, Job, open_job, packed, read_coded
from moepress.compress.gptq.layer import (
    Pooled,
    begin,
    do_chunk,
    first_half,
    groups_of,
    last_half,
    pooled_of,
    write_outer,
)
from moepress.compress.gptq.moments import Originals
from moepress.compress.gptq.pieces import piece_file, piece_names
from moepress.compress.gptq.reference import load_original
from moepress.compress.gptq.tasks import TASK_EXPERTS, Extent, behind, piece_of, task_of
from moepress.models.forward.card import on_card
from moepress.models.forward.shards import fill_hidden, fill_routed, hidden_entries, routed_entries, shard_file
from moepress.models.forward.walk import Limits, Scratch, Stream, add_experts, first_step, shards_of
from moepress.models.storage.safetensors_file import Stored, read_header
from moepress.models.storage.tensors import read_tensor, tensor_entry
from moepress.models.storage.writer import Entry, write_shard
from moepress.runs.journal import open_run
from moepress.runs.memory import release_memory
from moepress.runs.phases import in_layer, phase
from moepress.runs.pieces import Piece
from moepress.runs.work.desk import Desk
from moepress.runs.work.tasks import Task

LINEARS, POOLED = "linears.safetensors", "pooled.safetensors"


def extent_of(frame: Frame, windows: int, limits: Limits) -> Extent:
    """The tasks' extent for so many windows."""
    return Extent(
        parts=[[len(experts) for experts in frame.chunks[layer]] for layer in range(frame.layers)],
        shards=len(shards_of(windows, limits.shard_windows)),
        independent=frame.options.hessian.independent,
        ends=frame.options.hessian.end_tokens > 0,
        head=Include.LM_HEAD in frame.include,
        layers=frame.model.shape.layers,
    )


def in_tasks(frame: Frame) -> tuple[Frame, dict[str, list[str]]]:
    """A frame whose pieces are as small as tasks are to be, and the tasks of each piece of the result, in its order.

    A piece of 256 MiB may be a whole layer of a smaller model, which several workers could not share.
    """
    chunks, tasks = dict[int, list[Sequence[int]]](), {"outer": ["outer"]}
    for layer, whole in frame.chunks.items():
        chunks[layer] = []
        for part, experts in enumerate(whole):
            count = max(1, -(-len(experts) // TASK_EXPERTS))
            cuts = [len(experts) * cut // count for cut in range(count + 1)]
            first = len(chunks[layer])
            chunks[layer] += [experts[a:b] for a, b in itertools.pairwise(cuts)]
            numbers = range(first, len(chunks[layer]))
            tasks[f"layer-{layer}-{part}"] = [task_of(f"layer-{layer}-{number}") for number in numbers]
    return replace(frame, chunks=chunks, piece_names=piece_names(chunks)), tasks


@dataclass(slots=True, kw_only=True)
class Performer:
    """A worker's model and text, and what it did last, which the next task may want again.

    Attributes:
        frame: of the run, in tasks.
        corpus: the calibration windows.
        limits: of this worker; batch and shard are those of the run.
        extent: of the graph.
    """

    frame: Frame
    corpus: Corpus
    limits: Limits
    extent: Extent
    _held: "_Held | None" = None

    def __call__(self, task: Task, desk: Desk, *, smaller: bool) -> None:
        """See `runs.work.worker.Perform`."""
        if task.kind != "experts":
            self.forget()
        act: Callable[[Task, Desk, bool], None] = getattr(self, f"_{task.kind}")
        try:
            with in_layer(task.at[0] if task.at else -1), phase("other"):
                if task.kind == "ends":
                    act(task, desk, smaller)
                else:
                    with torch.inference_mode():
                        act(task, desk, smaller)
        except BaseException:
            self.forget()  # it may be what memory ran out for
            raise
        release_memory()

    def forget(self) -> None:
        """Give back what is held of a layer."""
        if self._held is not None:
            self._held.scratch.close()
            self._held = None

    def _begin(self, task: Task, desk: Desk, smaller: bool) -> None:
        (layer,) = task.at
        with self._job(desk, self.corpus.windows, smaller, embed=layer == 0) as job:
            for shard, rows in enumerate(self._shards):
                self._enter(job, desk, layer, shard, rows)
            coded, errors, routed = first_half(job, layer)
            with phase("write"):
                tensors = {name: t for key, matrix in coded.items() for name, t in packed(job, key, matrix).items()}
                write_shard(desk.output(LINEARS), [tensor_entry(*pair) for pair in tensors.items()])
            if routed:
                with on_card(job.stream, job.originals):
                    _write_pooled(desk.output(POOLED), pooled_of(job, layer))
            for shard, rows in enumerate(self._shards):
                with phase("hidden states"):
                    write_shard(desk.output(shard_file(shard)), _entries(job, rows, routed=routed))
            job.stream.model.unload_layer(layer)
            if job.reference is not None:
                job.reference.stream.model.unload_layer(layer)
            desk.note |= {"errors": errors, "routed": routed}

    def _experts(self, task: Task, desk: Desk, smaller: bool) -> None:
        layer, part = task.at
        held = self._held_of(layer, desk)
        job = replace(held.job, run=_Pieces(desk), at_once=1 if smaller else held.job.at_once)
        linears, errors = dict[str, Matrix](), dict[str, float]()
        if part == 0:
            linears, errors = _linears(job, layer, desk), dict(desk.note_of(f"begin-{layer}")["errors"])
        with on_card(job.stream, job.originals):
            do_chunk(job, layer, part, held.pooled, linears, errors)

    def _leave(self, task: Task, desk: Desk, smaller: bool) -> None:
        layer, shard = task.at
        rows = self._shards[shard]
        with self._job(desk, self.corpus.windows[rows.start : rows.stop], smaller) as job:
            stored = read_header(desk.input(f"begin-{layer}", shard_file(shard)))
            routed = bool(desk.note_of(f"begin-{layer}")["routed"])
            _fill(job, range(len(rows)), stored, routed=routed)
            if job.stream.sums is not None:
                self._load(job, layer, desk)
            with on_card(job.stream, job.originals):
                for part in range(len(job.frame.chunks[layer])) if routed else ():
                    do_chunk(job, layer, part, None, {}, {})
            last_half(job, layer)
            _write_behind(desk, job)

    def _forward(self, task: Task, desk: Desk, smaller: bool) -> None:
        layer, shard = task.at
        rows = self._shards[shard]
        with self._job(desk, self.corpus.windows[rows.start : rows.stop], smaller, embed=layer == 0) as job:
            self._enter(job, desk, layer, shard, range(len(rows)))
            begin(job, layer)
            job.stream.model.load_layer(layer)
            if first_step(job.stream, layer):
                add_experts(job.stream, layer)
            last_half(job, layer)
            _write_behind(desk, job)

    def _outer(self, task: Task, desk: Desk, smaller: bool) -> None:
        windows = self.corpus.windows if self.extent.head else self.corpus.windows[:1]
        with self._job(desk, windows, smaller) as job:
            if self.extent.head:
                for shard, rows in enumerate(self._shards):
                    self._enter(job, desk, self.extent.layers, shard, rows)
            write_outer(job)

    def _ends(self, task: Task, desk: Desk, smaller: bool) -> None:
        frame, options = self.frame, self.frame.options
        groups = end_groups(frame.model.source, frame.model.shape.layers, options, frame.include)
        with open_run(desk.scratch() / "ends", {}) as run:
            gather_ends(frame.model, self.corpus, run, self.limits, options.hessian.end_tokens, groups)
            for piece in factor_pieces(run):
                run.path(piece).replace(desk.output(piece.name))
                desk.note[piece.id] = piece.name

    @property
    def _shards(self) -> Sequence[range]:
        return shards_of(len(self.corpus.windows), self.limits.shard_windows)

    def _enter(self, job: Job, desk: Desk, layer: int, shard: int, rows: range) -> None:
        """The hidden states of a shard before a layer, in these rows of the job's windows."""
        before = behind(self.extent, layer - 1)
        if before:
            stored = read_header(desk.input(before[shard], shard_file(0)))
            _fill(job, rows, stored, routed=False)

    def _load(self, job: Job, layer: int, desk: Desk) -> None:
        """A layer that is gone through once more, with what its experts gave."""
        dense = {name: matrix.dense() for name, matrix in _linears(job, layer, desk).items()}
        job.stream.model.load_layer(layer, dense)
        for stream in (job.stream, job.originals):
            if stream is not None and stream.sums is not None:
                stream.sums.zero_()
        if job.reference is not None:
            load_original(job.reference, layer)

    @contextmanager
    def _job(self, desk: Desk, windows_NT: Tensor, smaller: bool, *, embed: bool = False) -> Iterator[Job]:
        scratch = Scratch(desk.scratch(), self.limits.memory_bytes)
        try:
            job = open_job(self.frame, windows_NT, _Pieces(desk), scratch, self.limits, embed=embed)
            yield replace(job, at_once=1) if smaller else job
        finally:
            scratch.close()

    def _held_of(self, layer: int, desk: Desk) -> "_Held":
        """All windows before the experts of a layer, kept for its next piece."""
        if self._held is None or self._held.layer != layer:
            self.forget()
            scratch = Scratch(desk.folder, self.limits.memory_bytes, f"layer-{layer}")
            given = self.frame, self.corpus.windows, _Pieces(desk), scratch, self.limits
            job = replace(open_job(*given, embed=False), moves=False)
            routed = bool(desk.note_of(f"begin-{layer}")["routed"])
            for shard, rows in enumerate(self._shards if routed else ()):
                stored = read_header(desk.input(f"begin-{layer}", shard_file(shard)))
                for name, stream in _streams(job):
                    fill_routed(stream, rows, stored, name)
            pooled = _read_pooled(desk, job, layer) if routed else None
            self._held = _Held(layer=layer, job=job, pooled=pooled, scratch=scratch)
        return self._held


@dataclass(frozen=True, slots=True, kw_only=True)
class _Held:
    layer: int
    job: Job
    pooled: Pooled | None
    scratch: Scratch


@dataclass(frozen=True, slots=True)
class _Pieces:
    """The pieces of a run of one process, as a task sees them: see `runs.pieces.Pieces`."""

    desk: Desk

    def done(self, piece: str) -> Piece | None:
        """A piece that another task has made."""
        if piece.startswith("end-"):
            names = self.desk.note_of("ends") if self._needs("ends") else {}
            return self._piece(piece, "ends", names[piece]) if piece in names else None
        task = task_of(piece)
        return self._piece(piece, task, piece_file(piece)) if self._needs(task) else None

    def _needs(self, task: str) -> bool:
        assert self.desk.task is not None
        return task in self.desk.task.needs

    def _piece(self, piece: str, task: str, name: str) -> Piece:
        made = self.desk.files_of(task)[name]
        path = self.desk.input(task, name)
        return Piece(id=piece, name=str(path), bytes=made.bytes, sha256=made.sha256, note=self.desk.note_of(task))

    def path(self, piece: Piece) -> Path:
        """Where it lies on this machine."""
        return Path(piece.name)

    def write(self, piece: str, name: str, write: Callable[[Path], Mapping[str, Any] | None]) -> Piece:
        """Make the task's own piece."""
        assert self.desk.task is not None
        assert piece_of(self.desk.task) == piece
        path = self.desk.output(piece_file(piece))
        self.desk.note |= dict(write(path) or {})
        return Piece(id=piece, name=str(path), bytes=path.stat().st_size, sha256="", note=self.desk.note)


def _streams(job: Job) -> list[tuple[str, Stream]]:
    """A job's streams, by the names of their tensors in files."""
    return [("hidden", job.stream), *([("original", job.originals)] if job.originals is not None else [])]


def _entries(job: Job, rows: range, *, routed: bool) -> list[Entry]:
    return [
        entry
        for name, stream in _streams(job)
        for entry in (*hidden_entries(stream, rows, name), *(routed_entries(stream, rows, name) if routed else ()))
    ]


def _fill(job: Job, rows: range, stored: Mapping[str, Stored], *, routed: bool) -> None:
    for name, stream in _streams(job):
        fill_hidden(stream, rows, stored, name)
        if routed:
            fill_routed(stream, rows, stored, name)


def _write_behind(desk: Desk, job: Job) -> None:
    """The states behind a layer."""
    with phase("hidden states"):
        write_shard(desk.output(shard_file(0)), _entries(job, range(len(job.stream.hidden)), routed=False))


def _linears(job: Job, layer: int, desk: Desk) -> dict[str, Matrix]:
    stored = read_header(desk.input(f"begin-{layer}", LINEARS))
    return {name: read_coded(job, stored, name) for group in groups_of(job, layer) for name in group.names}


def _write_pooled(file: Path, pooled: Pooled) -> None:
    hessian, sample, originals, _metric = pooled
    entries = [tensor_entry("hessian", hessian.cpu()), tensor_entry("sample", sample.cpu())]
    if originals is not None:
        entries += [tensor_entry("cross", originals.pooled.cpu()), tensor_entry("originals", originals.sample.cpu())]
    write_shard(file, entries)


def _read_pooled(desk: Desk, job: Job, layer: int) -> Pooled:
    stored, device = read_header(desk.input(f"begin-{layer}", POOLED)), job.stream.model.device
    tensors = {name: read_tensor(entry).to(device) for name, entry in stored.items()}
    originals = None
    if job.originals is not None:
        originals = Originals(stream=job.originals, pooled=tensors["cross"], sample=tensors["originals"])
    return tensors["hessian"], tensors["sample"], originals, metric_of(job, layer)
