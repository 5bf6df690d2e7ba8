"""Make a profile: one resumable walk of the model over its calibration text, its MTP layers behind the last."""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from moepress.calibration.corpus import Corpus
from moepress.calibration.observe import Cells, observe_layer, shard_of_windows
from moepress.calibration.profile import SHARDS, Statistic
from moepress.models.forward.predicting import add_predicting, enter
from moepress.models.forward.streamed import StreamedModel, require_finite_hidden
from moepress.models.forward.walk import Limits, Scratch, Stream, first_step, last_step, open_stream
from moepress.models.storage.safetensors_file import read_array, read_header
from moepress.models.storage.tensors import tensor_entry
from moepress.models.storage.writer import write_shard
from moepress.runs.journal import Run
from moepress.runs.memory import release_memory
from moepress.runs.phases import in_layer, phase
from moepress.runs.progress import track

Probe = Callable[[Stream, int, Mapping[str, Tensor]], Mapping[str, Tensor]]
"""Looks at a layer after it was observed (stream, its number, its accumulators); what it finds is kept with them."""


def cells_of(corpus: Corpus) -> Cells:
    """Domain and token shard of every token of a corpus."""
    shard = shard_of_windows(corpus.windows, SHARDS)
    index = (corpus.domain_index * SHARDS + shard).repeat_interleave(corpus.windows.shape[1])
    return Cells(index=index, domains=len(corpus.domains), shards=SHARDS)


def collect(
    model: StreamedModel,
    corpus: Corpus,
    run: Run,
    limits: Limits,
    *,
    leave_one_out: bool = True,
    probe: Probe | None = None,
) -> dict[int, dict[str, Statistic]]:
    """Walk the model over the corpus; every layer's statistics and the hidden states after it are pieces of the run.

    Returns:
        layer -> accumulators, for the MoE layers, and behind them for the multi-token-prediction layers.
    """
    text = f"{corpus.windows.numel():,} tokens"
    scratch = Scratch(run.folder, limits.memory_bytes)
    cells, predicting = cells_of(corpus), add_predicting(model)
    layers = model.shape.layers + len(predicting)
    try:
        with (
            torch.inference_mode(),
            track("profile", layers, unit="layers", about=text) as advance,
        ):
            with phase("embed"):
                stream = open_stream(model, corpus.windows, scratch, limits, observe=True)
            first = resume_hidden(run, stream, layers)
            advance(first)
            for layer in range(first, layers):
                with in_layer(layer), phase("other"):
                    if layer in predicting:
                        enter(stream, layer)
                    # What bits cost is asked for budgets, which know nothing of MTP layers.
                    looks = None if layer in predicting else probe
                    _profile_layer(stream, layer, run, cells, leave_one_out=leave_one_out, probe=looks)
                    save_hidden(run, stream, layer, last=layer == layers - 1)
                    stream.forget()
                advance(1)
    finally:
        scratch.close()
    return {layer: _read_statistics(run, layer) for layer in (*sorted(model.moe_layers), *predicting)}


def _profile_layer(
    stream: Stream, layer: int, run: Run, cells: Cells, *, leave_one_out: bool, probe: Probe | None
) -> None:
    stream.model.load_layer(layer)
    if first_step(stream, layer):
        with phase("observe"):
            found = observe_layer(stream, layer, cells, leave_one_out=leave_one_out)
        if probe is not None:
            found |= probe(stream, layer, found)
        last_step(stream, layer)
        entries = [tensor_entry(name, value) for name, value in sorted(found.items())]
        with phase("write", size=sum(entry.bytes for entry in entries)):
            file = f"statistics-{layer:05d}.safetensors"
            run.write(f"statistics-{layer}", file, lambda path: write_shard(path, entries))
    stream.model.unload_layer(layer)
    release_memory()
    with phase("check"):
        require_finite_hidden(stream.hidden, layer)


def _read_statistics(run: Run, layer: int) -> dict[str, Statistic]:
    piece = run.done(f"statistics-{layer}")
    assert piece is not None
    return {name: read_array(entry) for name, entry in read_header(run.path(piece)).items()}


def save_hidden(run: Run, stream: Stream, layer: int, *, last: bool) -> None:
    """Keep the hidden states after a layer as a piece, and drop those of the one before; after the last only a mark."""
    size = 0 if last else stream.hidden.numel() * stream.hidden.element_size()
    with phase("hidden states", size=size):
        if last:
            run.write("hidden-end", "hidden.end", _touch)
        else:
            entries = stream.kept()
            run.write(f"hidden-{layer}", f"hidden-{layer:05d}.safetensors", lambda path: write_shard(path, entries))
        run.drop(f"hidden-{layer - 1}")


def _touch(path: Path) -> None:
    path.write_bytes(b"")


def resume_hidden(run: Run, stream: Stream, layers: int) -> int:
    """Load the last hidden states that were kept; returns the layer to go on with, of so many that are walked."""
    if run.done("hidden-end"):
        return layers
    for layer in reversed(range(layers - 1)):
        piece = run.done(f"hidden-{layer}")
        if piece is not None:
            stored = read_header(run.path(piece))
            with phase("hidden states", size=sum(entry.bytes for entry in stored.values())):
                stream.restore(stored)
            return layer + 1
    return 0


def drop_hidden(run: Run) -> None:
    """Remove what only a resume needed."""
    # Hidden states first: killed in between, a resume must not think that all statistics are there.
    for piece in sorted(p for p in run.pieces if p.startswith(("hidden-", "statistics-"))):
        run.drop(piece)
