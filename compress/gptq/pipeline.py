"""quantize: one walk over the layers. Calibration tokens flow through the pruned model; each layer is solved on what
reaches it, and its quantized output goes on to the next.

Pieces are the shards of the result: a layer, or where a layer is large its parts. A run that was killed, or that
stopped after as many pieces as were asked for, finds its finished pieces, takes their dequantized weights in place of
solving, and so ends with the same bytes.
"""

import functools
import itertools
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moepress import __version__
from moepress.calibration.collect import resume_hidden, save_hidden
from moepress.calibration.corpus import Corpus
from moepress.calibration.ends import drop_all_ends, drop_ends, gather_ends
from moepress.compress.gptq.block_solver import rounded_blocks
from moepress.compress.gptq.ends import end_groups, metric_of, side_of
from moepress.compress.gptq.experts import (
    CodedExpert,
    Matrix,
    Originals,
    QuantizeOptions,
    experts_at_once,
    originals_of,
    pooled_hessian,
    pooled_inputs,
    solve_experts,
)
from moepress.compress.gptq.include import Include, included, linear_groups, part_bits, unquantized_modules
from moepress.compress.gptq.job import (
    Job,
    expert_tensors,
    outer_entry,
    packed,
    plain,
    read_expert,
    read_linears,
)
from moepress.compress.gptq.kept import kept_expert
from moepress.compress.gptq.layer_bits import check_scheme, config_groups, mixed_note, zeros_note
from moepress.compress.gptq.linears import solve_head, solve_linears, solve_stepping, steps_fit
from moepress.compress.gptq.pieces import Allowance, SpentError, layer_report, piece_names, plan_chunks
from moepress.compress.gptq.reference import (
    add_originals,
    check_original,
    drop_original,
    finish_original,
    load_original,
    open_reference,
    positions_of,
    resume_original,
    save_original,
    step_original,
)
from moepress.converters.safetensors import compressed_tensors_config
from moepress.converters.safetensors.scheme import Codes
from moepress.models.forward.card import on_card
from moepress.models.forward.predicting import add_predicting, enter
from moepress.models.forward.streamed import StreamedModel, require_finite_hidden, tokens_of
from moepress.models.forward.walk import (
    Limits,
    Scratch,
    add_output,
    first_step,
    last_step,
    open_stream,
    read_ahead,
)
from moepress.models.storage.experts import Expert, without_mtp
from moepress.models.storage.foreign import BLOCKS_METHOD
from moepress.models.storage.mtp import mtp_note
from moepress.models.storage.safetensors_file import read_header
from moepress.models.storage.tensors import tensor_entry
from moepress.models.storage.writer import Entry, copy_companions, write_index, write_json, write_shard
from moepress.runs.journal import Run
from moepress.runs.memory import in_halves, release_memory
from moepress.runs.phases import in_layer, phase
from moepress.runs.progress import track


def quantize(
    model: StreamedModel,
    corpus: Corpus,
    run: Run,
    limits: Limits,
    *,
    options: QuantizeOptions,
    include: Iterable[Include],
    companions: Path,
    summary: Mapping[str, Any],
    mtp_notes: Sequence[str] = (),
    max_pieces: int | None = None,
) -> dict[str, Any]:
    """Quantize a model (perhaps seen through a keep list) into a compressed-tensors folder and finish the run.

    Args:
        model: the streamed model that calibration flows through.
        corpus: calibration windows.
        run: the output in the making.
        limits: memory and batch size.
        options: scheme, Hessians, solver.
        include: parts besides the routed experts, with their bits where they have their own (`include.Included`).
        companions: the folder whose tokenizer and other files go along.
        summary: what moepress.json is to say about the plan and the calibration.
        mtp_notes: what is to be said of the multi-token-prediction layers, which then stay; without it they go.
        max_pieces: stop after so many new pieces; the run is then not finished and can be resumed.

    Returns:
        `finished`, `pieces_done` and `pieces`; of a finished run also bytes, per-layer errors, experts that fell back,
        notes.
    """
    include = included(include)
    options = replace(options, part_bits=part_bits(include))
    check_scheme(model.source, options.scheme, include, options.blocks)
    predicting = add_predicting(model) if mtp_notes else ()
    layers = model.shape.layers + len(predicting)
    if options.layer_bits:  # they have what most layers have
        options = replace(options, layer_bits={**options.layer_bits, **dict.fromkeys(predicting, options.scheme.bits)})
    counts = dict.fromkeys((*model.moe_layers, *predicting), model.shape.experts)
    chunks = plan_chunks(model.source, layers, counts, options)
    if options.hessian.end_tokens:
        wanted = end_groups(model.source, model.shape.layers, options, include)
        gather_ends(model, corpus, run, limits, options.hessian.end_tokens, wanted)
    scratch, text = Scratch(run.folder, limits.memory_bytes), f"{corpus.windows.numel():,} tokens"
    try:
        with (
            torch.inference_mode(),
            track("quantize", layers, unit="layers", about=text) as advance,
        ):
            with phase("embed"):
                ranks = options.hessian.least_tokens > 0
                stream = open_stream(model, corpus.windows, scratch, limits, observe=False, logits=ranks)
                reference = open_reference(stream, include) if options.hessian.asymmetry else None
            if reference is not None and predicting:
                add_predicting(reference.stream.model)
            job = Job(
                stream=stream,
                reference=reference,
                run=run,
                options=options,
                include=include,
                chunks=chunks,
                piece_names=piece_names(chunks),
                names=model.source.outline.names_by_layer,
                at_once=experts_at_once(model, limits.memory_bytes),
                allowance=Allowance(left=max_pieces),
                predicting=predicting,
            )
            first = resume_hidden(run, stream, layers)
            if reference is not None:
                resume_original(run, reference, first, layers)
            advance(first)
            for layer in range(first, layers):
                job.allowance.require()
                with in_layer(layer), phase("other"):
                    _quantize_layer(job, layer)
                if layer == model.shape.layers - 1 and run.done("outer") is None:
                    _write_outer(job)
                with in_layer(layer):
                    _save(job, layer, last=layer == layers - 1)
                    stream.forget()
                advance(1, _error_text(run, layer))
    except SpentError:
        return {"finished": False, **_progress(job)}
    finally:
        scratch.close()
    return {"finished": True, **_progress(job), **_finish(job, companions, summary, mtp_notes)}


def _save(job: Job, layer: int, *, last: bool) -> None:
    if job.reference is not None:
        save_original(job.run, job.reference, layer, last=last)
    save_hidden(job.run, job.stream, layer, last=last)
    if job.reference is not None:
        drop_original(job.run, layer - 1)
    drop_ends(job.run, layer)


def _error_text(run: Run, layer: int) -> str:
    """The relative error of a layer that is done, for people who wait."""
    found = layer_report(piece for piece in run.pieces.values() if piece.note.get("layer") == layer)["layer_error"]
    return f"error {next(iter(found.values())):.2%}" if found else ""


def _progress(job: Job) -> dict[str, int]:
    return {"pieces_done": sum(piece in job.run.pieces for piece in job.piece_names), "pieces": len(job.piece_names)}


def _quantize_layer(job: Job, layer: int) -> None:
    """Solve (or take from finished pieces) one layer, and move the hidden states through it."""
    stream, reference, model = job.stream, job.reference, job.stream.model
    if layer in job.predicting:
        enter(stream, layer)
        if reference is not None:
            enter(reference.stream, layer)
    if reference is not None:
        load_original(reference, layer)
    done = job.run.done(f"layer-{layer}-0")
    groups = linear_groups(model.source, layer, model.shape.layers, job.include, job.names.get(layer, []))
    stepping = done is None and bool(groups) and steps_fit(stream, job.originals)
    given = stream, job.options.of_layer(layer), layer, groups, job.originals, functools.partial(side_of, job, layer)
    if stepping:
        coded, errors, routed = solve_stepping(*given)
        release_memory()  # what waited: many tensors too small to have gone back by themselves
    else:
        if done is None:
            coded, errors = solve_linears(*given)
        else:
            coded, errors = read_linears(job, done, groups), {}
        model.load_layer(layer, {name: matrix.dense() for name, matrix in coded.items()})
        routed = first_step(stream, layer)
    if reference is not None:
        step_original(reference, layer, stepped=stepping)
    with on_card(stream, job.originals) if routed else nullcontext():
        pooled = _pooled(job, layer) if routed else None
        for part, experts in enumerate(job.chunks[layer]):
            _do_chunk(job, layer, part, experts, pooled, coded if part == 0 else {}, errors if part == 0 else {})
    last_step(stream, layer)
    if reference is not None:
        finish_original(reference, layer)
    model.unload_layer(layer)
    release_memory()
    with phase("check"):
        require_finite_hidden(stream.hidden, layer)
        if reference is not None:
            check_original(reference, layer)


Pooled = tuple[Tensor, Tensor, Originals | None, Tensor | None]


def _pooled(job: Job, layer: int) -> Pooled:
    """What `solve_experts` wants to know of a layer besides the experts."""
    stream, options = job.stream, job.options.hessian
    originals = None if job.originals is None else originals_of(stream, job.originals, options)
    return pooled_hessian(stream), pooled_inputs(stream, options), originals, metric_of(job, layer)


def _do_chunk(
    job: Job,
    layer: int,
    part: int,
    experts: Sequence[int],
    pooled: Pooled | None,
    linears: Mapping[str, Matrix],
    errors: Mapping[str, float],
) -> None:
    """One piece: its experts are solved in batches, their output is added, their codes are written."""
    piece = f"layer-{layer}-{part}"
    done = job.run.done(piece)
    if done is None:
        job.allowance.require()
    stored = {} if done is None else read_header(job.run.path(done))
    model, tensors = job.stream.model, dict[str, Tensor]()
    note: dict[str, Any] = {"layer": layer, "experts": {}, "linears": dict(errors)}
    positions = tokens_of(job.stream.chosen, model.shape.experts) if experts else []
    if done is None and part == 0:
        tensors |= _rest_of_layer(job, layer, linears)
    theirs = positions_of(job.reference) if experts and job.reference is not None else []
    # The next expert is read while the present ones are solved; of a finished piece only the original wants them.
    wanted = experts if done is None or job.reference is not None else []
    # Closed here: what is raised while Python frees a generator, Ctrl-C too, is lost.
    with closing(read_ahead(model, layer, wanted, torch.float32 if done is None else None)) as weights:
        for start in range(0, len(experts), job.at_once):
            batch = experts[start : start + job.at_once]
            loaded = dict(itertools.islice(weights, job.at_once))
            if done is None:
                assert pooled is not None
                solved: Sequence[CodedExpert] = in_halves(
                    batch, functools.partial(_solve, job, layer, loaded, positions, pooled), "experts"
                )
            else:
                solved = [read_expert(job, stored, layer, expert) for expert in batch]
            if job.reference is not None:
                add_originals(job.reference, layer, loaded, theirs)
            del loaded
            for expert, coded in zip(batch, solved, strict=True):
                tokens, slots = positions[expert]
                with phase("forward"):
                    add_output(job.stream, job.stream.flat(), coded.expert(model), tokens, slots, layer, coded.middle)
                if done is None:
                    tensors |= expert_tensors(job, layer, expert, coded)
                    note["experts"][str(expert)] = [coded.tokens, *coded.error, coded.rounded]
    release_memory()
    if done is None:
        _write_piece(job, piece, [tensor_entry(name, tensor) for name, tensor in tensors.items()], note)


def _solve(
    job: Job,
    layer: int,
    loaded: Mapping[int, Expert],
    positions: Sequence[tuple[Tensor, Tensor]],
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
        job.run.write(piece, job.piece_names[piece], write)
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


def _write_outer(job: Job) -> None:
    """Embeddings, final norm and lm_head; lm_head quantized where asked for."""
    job.allowance.require()
    entries: list[Entry] = []
    note: dict[str, Any] = {"linears": {}}
    for name in job.names.get(None, []):
        if name == job.stream.model.family.head and Include.LM_HEAD in job.include:
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


def _finish(job: Job, companions: Path, summary: Mapping[str, Any], mtp_notes: Sequence[str]) -> dict[str, Any]:
    """Index, config, tokenizer, moepress.json; then the folder takes its final name."""
    run, source, options = job.run, job.stream.model.source, job.options
    weight_map: dict[str, str] = {}
    total = 0
    for piece, name in job.piece_names.items():
        done = run.done(piece)
        assert done is not None, piece
        entries = read_header(run.path(done))
        weight_map |= dict.fromkeys(entries, name)
        total += sum(entry.bytes for entry in entries.values())
    write_index(run.folder, weight_map, total)
    ignored = unquantized_modules(source, job.stream.model.shape.layers, job.include, job.predicting)
    groups = config_groups(source, options.scheme, options.layer_bits, job.include)
    kept = source.config if job.predicting else without_mtp(source.family, source.config)
    if options.blocks is None:
        stated = compressed_tensors_config.quantization_config(options.scheme, ignored, groups)
    else:
        stated = {"quant_method": BLOCKS_METHOD, "grid": options.blocks.name, "modules_to_not_convert": ignored}
    config = {**kept, "quantization_config": stated}
    write_json(run.folder / "config.json", config)
    copied = copy_companions(companions, run.folder)
    dropped = sum(len(names) for n, names in job.names.items() if (n or 0) >= job.stream.model.shape.layers)
    notes = [
        *(mtp_notes or mtp_note(dropped, {}, job.stream.model.shape.experts)),
        *mixed_note(options.layer_bits, job.include),
        *zeros_note(options.scheme, options.blocks),
    ]
    result = {"bytes_after": total, "copied": copied, "notes": notes, **layer_report(run.pieces.values())}
    if options.layer_bits:
        result["layer_bits"] = {str(layer): bits for layer, bits in sorted(options.layer_bits.items())}
    result["include"] = sorted(job.include)
    if any(job.include.values()):
        result["part_bits"] = {part.value: bits for part, bits in sorted(job.include.items()) if bits is not None}
    note = {"moepress": __version__, "stage": "quantize", **result}
    note["scheme"] = options.scheme.stated()
    if options.blocks is not None:
        note["scheme"] = {"grid": options.blocks.name, "bits": options.blocks.bits}
    write_json(run.folder / "moepress.json", note | dict(summary))
    run.require_ready()
    for name in [p for p in run.pieces if p.startswith("hidden-")]:
        run.drop(name)
    drop_all_ends(run)
    run.finish()
    return result
