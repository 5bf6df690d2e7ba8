"""One layer of `quantize`, for all windows or a shard of them: its Linears are solved, its experts piece by piece, and
the hidden states are moved through it. What is finished already is taken as it is.
"""

import functools
import itertools
from collections.abc import Mapping, Sequence
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moepress.compress.gptq.block_solver import rounded_blocks
from moepress.compress.gptq.coded import CodedExpert, Matrix
from moepress.compress.gptq.ends import metric_of, side_of
from moepress.compress.gptq.experts import solve_experts
from moepress.compress.gptq.include import Include, LinearGroup, linear_groups
from moepress.compress.gptq.job import Job, expert_tensors, outer_entry, packed, plain, read_expert, read_linears
from moepress.compress.gptq.kept import kept_expert
from moepress.compress.gptq.linears import solve_head, solve_linears, solve_stepping, steps_fit
from moepress.compress.gptq.moments import Originals, originals_of, pooled_hessian, pooled_inputs
from moepress.compress.gptq.reference import (
    add_originals,
    check_original,
    finish_original,
    load_original,
    step_original,
)
from moepress.converters.safetensors.scheme import Codes
from moepress.models.forward.card import on_card
from moepress.models.forward.predicting import enter
from moepress.models.forward.streamed import require_finite_hidden, tokens_of
from moepress.models.forward.walk import Stream, add_output, first_step, last_step, read_ahead
from moepress.models.storage.experts import Expert
from moepress.models.storage.safetensors_file import read_header
from moepress.models.storage.tensors import tensor_entry
from moepress.models.storage.writer import Entry, write_shard
from moepress.runs.memory import in_halves, release_memory
from moepress.runs.phases import phase

Positions = Sequence[tuple[Tensor, Tensor]]


def quantize_layer(job: Job, layer: int) -> None:
    """Solve (or take from finished pieces) one layer, and move the hidden states through it."""
    coded, errors, routed = first_half(job, layer)
    with on_card(job.stream, job.originals) if routed else nullcontext():
        pooled = pooled_of(job, layer) if routed else None
        for part in range(len(job.frame.chunks[layer])):
            do_chunk(job, layer, part, pooled, coded if part == 0 else {}, errors if part == 0 else {})
    last_half(job, layer)


def groups_of(job: Job, layer: int) -> list[LinearGroup]:
    """The Linears of a layer that are quantized, those with the same input together."""
    model = job.stream.model
    return linear_groups(model.source, layer, model.shape.layers, job.frame.include, job.names.get(layer, []))


def begin(job: Job, layer: int) -> None:
    """Before anything else of a layer: the inputs of an MTP layer are made, the original's own weights are loaded."""
    if layer in job.frame.predicting:
        enter(job.stream, layer)
        if job.reference is not None:
            enter(job.reference.stream, layer)
    if job.reference is not None:
        load_original(job.reference, layer)


def first_half(job: Job, layer: int) -> tuple[dict[str, Matrix], dict[str, float], bool]:
    """The Linears, solved or taken, and the first step of both streams.

    Returns:
        Matrices and relative errors, by name on disk; whether the layer has routed experts.
    """
    begin(job, layer)
    done, groups = job.run.done(f"layer-{layer}-0"), groups_of(job, layer)
    stepping = done is None and bool(groups) and steps_fit(job.stream, job.originals)
    given = job.stream, job.options.of_layer(layer), layer, groups, job.originals
    side = functools.partial(side_of, job, layer)
    if stepping:
        coded, errors, routed = solve_stepping(*given, side)
        release_memory()  # what waited: many tensors too small to have gone back by themselves
    else:
        coded, errors = solve_linears(*given, side) if done is None else (read_linears(job, done, groups), {})
        routed = step_through(job, layer, coded)
    if job.reference is not None:
        step_original(job.reference, layer, stepped=stepping)
    return coded, errors, routed


def step_through(job: Job, layer: int, coded: Mapping[str, Matrix]) -> bool:
    """The first step of the stream alone, with these Linears; whether the layer has routed experts."""
    dense = {} if job.independent else {name: matrix.dense() for name, matrix in coded.items()}
    job.stream.model.load_layer(layer, dense)
    return first_step(job.stream, layer)


def last_half(job: Job, layer: int) -> None:
    """Once all experts' outputs are added.

    Raises:
        InvalidInputError: NaN or infinite hidden states.
    """
    last_step(job.stream, layer)
    if job.reference is not None:
        finish_original(job.reference, layer)
    job.stream.model.unload_layer(layer)
    release_memory()
    with phase("check"):
        require_finite_hidden(job.stream.hidden, layer)
        if job.reference is not None:
            check_original(job.reference, layer)


Pooled = tuple[Tensor, Tensor, Originals | None, Tensor | None]


def pooled_of(job: Job, layer: int) -> Pooled:
    """What `solve_experts` wants to know of a layer besides the experts."""
    stream, options = job.stream, job.options.hessian
    originals = None if job.originals is None else originals_of(stream, job.originals, options)
    return pooled_hessian(stream), pooled_inputs(stream, options), originals, metric_of(job, layer)


def do_chunk(
    job: Job,
    layer: int,
    part: int,
    pooled: Pooled | None,
    linears: Mapping[str, Matrix],
    errors: Mapping[str, float],
) -> None:
    """One piece: its experts are solved in batches, their output is added, their codes are written.

    Args:
        job: with `moves` unset, nothing is added.
        layer: after its first step.
        part: of `job.frame.chunks`.
        pooled: `pooled_of` the layer; None where nothing is to be solved.
        linears: quantized ones, which the first piece holds.
        errors: theirs.
    """
    piece, experts = f"layer-{layer}-{part}", job.frame.chunks[layer][part]
    done = job.run.done(piece)
    if done is None:
        job.allowance.require()
    stored = {} if done is None else read_header(job.run.path(done))
    tensors = dict[str, Tensor]()
    note: dict[str, Any] = {"layer": layer, "experts": {}, "linears": dict(errors)}
    positions = _positions(job.stream) if experts else []
    theirs = _positions(job.originals) if experts and job.originals is not None and job.moves else []
    if done is None and part == 0:
        tensors |= _rest_of_layer(job, layer, linears)
    # The next expert is read while the present ones are solved; of a finished piece only the original wants them.
    wanted = experts if done is None or job.reference is not None or job.independent else []
    # Closed here: what is raised while Python frees a generator, Ctrl-C too, is lost.
    with closing(read_ahead(job.stream.model, layer, wanted, torch.float32 if done is None else None)) as weights:
        for start in range(0, len(experts), job.at_once):
            batch = experts[start : start + job.at_once]
            loaded = dict(itertools.islice(weights, job.at_once))
            if done is None:
                assert pooled is not None
                solve = functools.partial(_solve, job, layer, loaded, positions, pooled)
                solved: Sequence[CodedExpert] = in_halves(batch, solve, "experts")
                for expert, coded in zip(batch, solved, strict=True):
                    tensors |= expert_tensors(job, layer, expert, coded)
                    note["experts"][str(expert)] = [coded.tokens, *coded.error, coded.rounded]
            else:
                solved = [read_expert(job, stored, layer, expert) for expert in batch]
            if job.moves:
                _move(job, layer, dict(zip(batch, solved, strict=True)), loaded, positions, theirs)
            del loaded, solved
    release_memory()
    if done is None:
        _write_piece(job, piece, [tensor_entry(name, tensor) for name, tensor in tensors.items()], note)


def _positions(stream: Stream) -> Positions:
    return tokens_of(stream.chosen, stream.model.shape.experts)


def _move(
    job: Job,
    layer: int,
    solved: Mapping[int, CodedExpert],
    loaded: Mapping[int, Expert],
    positions: Positions,
    theirs: Positions,
) -> None:
    """Add the outputs of some experts: original ones where layers are independent, and in the original's stream."""
    if job.originals is not None:
        add_originals(job.originals, layer, loaded, theirs)
    if job.independent:
        add_originals(job.stream, layer, loaded, positions)
        return
    for expert, coded in solved.items():
        own = coded.expert(job.stream.model)
        with phase("forward"):
            add_output(job.stream, job.stream.flat(), own, *positions[expert], layer, coded.middle)


def _solve(
    job: Job,
    layer: int,
    loaded: Mapping[int, Expert],
    positions: Positions,
    pooled: Pooled,
    experts: Sequence[int],
) -> list[CodedExpert]:
    """Those experts of a batch; what is asked for and there already is kept."""
    options, kept = job.options.of_layer(layer), dict[int, CodedExpert]()
    for expert in experts if options.scheme.codes is Codes.MXFP4 else ():
        given = loaded[expert], len(positions[expert][0]), options.stored_dtype
        if (found := kept_expert(job.stream.model.source, layer, expert, *given)) is not None:
            kept[expert] = found
    weights, (hessian, sample, originals, metric) = {e: loaded[e] for e in experts if e not in kept}, pooled
    if weights:
        solved = solve_experts(job.stream, layer, weights, positions, hessian, sample, options, originals, metric)
        kept |= dict(zip(weights, solved, strict=True))
    return [kept[expert] for expert in experts]


def _write_piece(job: Job, piece: str, entries: Sequence[Entry], note: Mapping[str, Any]) -> None:
    def write(path: Path) -> Mapping[str, Any]:
        write_shard(path, entries)
        return note

    with phase("write", size=sum(entry.bytes for entry in entries)):
        job.run.write(piece, job.frame.piece_names[piece], write)
    job.allowance.spend()


def _rest_of_layer(job: Job, layer: int, linears: Mapping[str, Matrix]) -> dict[str, Tensor]:
    """Everything of a layer but its routed experts: quantized where asked for, else as stored (fp8 becomes bf16)."""
    source, tensors = job.stream.model.source, dict[str, Tensor]()
    fused = set(source.family.fused_names(layer))
    for name in job.names.get(layer, []):
        if name in fused or source.family.expert_of(name) is not None:
            continue
        if name in linears:
            tensors |= packed(job, name, linears[name])
        else:
            tensors[name] = plain(job, name)
    return tensors


def write_outer(job: Job) -> None:
    """Embeddings, final norm and lm_head; lm_head quantized where asked for."""
    job.allowance.require()
    entries: list[Entry] = []
    note: dict[str, Any] = {"linears": {}}
    for name in job.names.get(None, []):
        if name == job.stream.model.family.head and Include.LM_HEAD in job.frame.include:
            matrix, error = solve_head(job.stream, job.options, job.originals)
            entries += [tensor_entry(*pair) for pair in packed(job, name, matrix).items()]
            note["linears"][name] = error
        elif name == job.stream.model.family.embeddings and job.options.blocks and job.options.blocks.is_mix:
            kind = job.options.kind_of(name, None, job.stream.model.source.shapes[name][1])
            assert kind is not None, "embeddings are quantized in GGUF's blocks alone"
            entries += [
                tensor_entry(*pair) for pair in packed(job, name, rounded_blocks(kind, plain(job, name))).items()
            ]
        else:
            entries.append(outer_entry(job, name))
    _write_piece(job, "outer", entries, note)
