"""Repair after pruning: the original and the pruned model walk side by side, and layer by layer the second is mended.

Both see the same calibration tokens. In an MoE layer the pruned model gives the outputs of its experts for the tokens
as they come to it, behind layers that are pruned and mended already. The target is what they would have to add to its
stream for the layer's output to be the original's. Bias and gains are found from these, and the mended output goes on.
Every expert is read once a layer, for both; where a router is refitted some are read again (`repair_router`).

Shapes: T tokens, K experts a token, J slots of a token (`slots_of`), E kept experts.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from moepress.calibration.corpus import Corpus
from moepress.compress.pruning.repair import Repair, balanced_bias, no_equations, solve_gains
from moepress.compress.pruning.repair_down import refit_downs
from moepress.compress.pruning.repair_router import refit_router, with_next
from moepress.compress.pruning.repair_streams import Routing, Walk, chunks, distance, outputs_of, slots_of, wanted_loads
from moepress.compress.pruning.repaired import LayerRepair, RouterRefit, RouterRows
from moepress.compress.pruning.repaired_down import DownFiles, down_piece, open_downs
from moepress.errors import UnsupportedError
from moepress.models.families.router import router_of
from moepress.models.families.routing import route, scores
from moepress.models.forward.streamed import StreamedModel, require_finite_hidden, tokens_of
from moepress.models.forward.walk import Limits, Scratch, first_step, last_step, open_stream, read_ahead
from moepress.models.storage.safetensors_file import read_header
from moepress.models.storage.tensors import read_tensor, tensor_entry
from moepress.models.storage.writer import write_shard
from moepress.runs.journal import Run
from moepress.runs.memory import release_memory
from moepress.runs.phases import in_layer, phase
from moepress.runs.progress import track

_PIECES = ("hidden-", "repair-")


def collect_repairs(
    original: StreamedModel,
    pruned: StreamedModel,
    keep: Mapping[int, Sequence[int]],
    parts: frozenset[Repair],
    corpus: Corpus,
    run: Run,
    limits: Limits,
) -> dict[int, LayerRepair]:
    """Find the repairs of all MoE layers; each, and the hidden states behind it, is a piece of the run.

    Raises:
        InvalidInputError: activations are NaN or Inf.
        MoepressError: the disk has no room for the experts' outputs.
    """
    layers, half = (
        original.shape.layers,
        Limits(memory_bytes=limits.memory_bytes // 2, batch_windows=limits.batch_windows),
    )
    text = f"{corpus.windows.numel():,} tokens"
    scratch = [Scratch(run.folder, half.memory_bytes, name) for name in ("scratch", "pruned")]
    try:
        with (
            torch.inference_mode(),
            track("repair", layers, unit="layers", about=text) as advance,
        ):
            with phase("embed"):
                walk = _open(original, pruned, keep, parts, corpus, scratch, half)
            first = _resume(run, walk)
            advance(first)
            for layer in range(first, layers):
                with in_layer(layer), phase("other"):
                    _repair_layer(walk, layer, run)
                    _save(run, walk, layer)
                advance(1)
    finally:
        for buffers in scratch:
            buffers.close()
    return {layer: _read(run, layer) for layer in sorted(original.moe_layers)}


def drop_walk(run: Run, *, downs: bool = False) -> None:
    """Remove what only a resume needed. Hidden states first: without them a resume begins anew, as it then must.

    `downs`: refitted down projections too, once they are in the model.
    """
    for prefix in (*_PIECES, *(("down-",) if downs else ())):
        for piece in sorted(name for name in run.pieces if name.startswith(prefix)):
            run.drop(piece)


def _open(
    original: StreamedModel,
    pruned: StreamedModel,
    keep: Mapping[int, Sequence[int]],
    parts: frozenset[Repair],
    corpus: Corpus,
    scratch: Sequence[Scratch],
    limits: Limits,
) -> Walk:
    first, second = (
        open_stream(model, corpus.windows, buffers, limits, observe=model is pruned)
        for model, buffers in zip((original, pruned), scratch, strict=True)
    )
    slots = slots_of(parts, pruned.shape.top_k)
    refitted = Repair.ROUTER in parts
    return Walk(
        original=first,
        pruned=second,
        keep=keep,
        parts=parts,
        routed=scratch[0].tensor("routed", (first.tokens, original.shape.hidden), torch.float32),
        table=scratch[1].rows("outputs", first.tokens * slots, original.shape.hidden, pruned.dtype),
        gram=scratch[1].tensor("gram", (first.tokens, slots, slots), torch.float32) if refitted else None,
        moment=scratch[1].tensor("moment", (first.tokens, slots), torch.float32) if refitted else None,
        lacking=scratch[1].tensor("lacking", (first.tokens, original.shape.hidden), torch.float32)
        if Repair.DOWN in parts
        else None,
    )


def _repair_layer(walk: Walk, layer: int, run: Run) -> None:
    model = walk.original.model
    scaled = sorted(walk.parts & {Repair.GAIN, Repair.DOWN})
    if scaled and layer in model.moe_layers and model.gating(layer).after is not None:
        raise UnsupportedError(
            f"--repair {scaled[0]}: {model.family.name} models have a norm behind each expert, which "
            f"{'undoes gains' if scaled[0] is Repair.GAIN else 'no linear fit sees'}; use --repair bias, or none."
        )
    streams = (walk.original, walk.pruned)
    routed = False
    for stream in streams:
        stream.model.load_layer(layer)
        routed = first_step(stream, layer)
    if routed:
        routing, refit = _routing(walk, layer), None
        if Repair.ROUTER in walk.parts:
            routing = with_next(walk, layer, routing)
        _run_experts(walk, layer, routing)
        if Repair.ROUTER in walk.parts:
            routing, refit, rows = refit_router(walk, layer, routing)
            if rows is not None:
                entries = [tensor_entry("rows", rows)]
                run.write(f"repair-rows-{layer}", f"repair-{layer:05d}.safetensors", lambda p: write_shard(p, entries))
        with phase("repair"):
            repair, gains, weights = _solve(walk, routing, refit)
            if Repair.DOWN in walk.parts:
                repair = _with_downs(walk, layer, routing, repair, run)
            _advance(walk, routing, gains, weights)
        run.write(f"repair-{layer}", f"repair-{layer:05d}.json", lambda path: _write(path, repair))
    for stream in streams:
        last_step(stream, layer)
        stream.model.unload_layer(layer)
        with phase("check"):
            require_finite_hidden(stream.hidden, layer)
        stream.forget()
    release_memory()


def _routing(walk: Walk, layer: int) -> Routing:
    """The pruned router's choice, and beside it the choice under a balanced bias where that is asked for."""
    stream, model = walk.pruned, walk.pruned.model
    if Repair.BIAS not in walk.parts:
        return Routing(slots=stream.chosen, weights=stream.weights)
    before = model.router_bias(layer)
    assert before is not None, "the stage refuses models without a bias"
    assert stream.logits is not None
    with phase("balance"):
        router, experts = router_of(model.family, model.source.config, model.shape), model.shape.experts
        wanted = wanted_loads(walk.original.chosen, walk.keep[layer], walk.original.model.shape.experts)
        bias = balanced_bias(router, scores(router, stream.logits), before, wanted)
        chosen, weights = route(router, stream.logits, bias)
        found = [distance(c, wanted) for c in (stream.chosen, chosen)]
        same_TKK = stream.chosen[:, :, None] == chosen[:, None, :]
        extra = ~same_TKK.any(dim=1)  # chosen now and not before
        shared = (same_TKK * weights[:, None, :]).sum(dim=2)
        return Routing(
            slots=torch.cat((stream.chosen, chosen.masked_fill(~extra, experts)), dim=1),
            weights=torch.cat((stream.weights, torch.zeros_like(weights)), dim=1),
            other=torch.cat((shared, weights * extra), dim=1),
            bias=bias,
            load_before=found[0],
            load_after=found[1],
        )


def _run_experts(walk: Walk, layer: int, routing: Routing) -> None:
    """Read every expert once: its part of the original's output, and if it stays its outputs for the other stream."""
    original, pruned = walk.original, walk.pruned
    number = {old: new for new, old in enumerate(walk.keep[layer])}
    before = tokens_of(original.chosen, original.model.shape.experts)
    after = tokens_of(routing.slots, pruned.model.shape.experts + 1)
    nobody = (torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64))
    places = {old: after[number[old]] if old in number else nobody for old in range(len(before))}
    wanted = [old for old in range(len(before)) if len(before[old][0]) or len(places[old][0])]
    walk.routed.zero_()
    for old, matrices in read_ahead(original.model, layer, wanted):
        for tokens, slots, output in outputs_of(original, matrices, layer, before[old]):
            weights = original.weights[tokens, slots, None]
            walk.routed.index_add_(0, tokens, output.float() * weights)
        for tokens, slots, output in outputs_of(pruned, matrices, layer, places[old]):
            walk.table.put(tokens * walk.slots + slots, output)


def _solve(walk: Walk, routing: Routing, refit: RouterRefit | None) -> tuple[LayerRepair, Tensor, Tensor]:
    """The layer's repair, the gains fp32 [E], and the weights of the routing that is taken."""
    experts = walk.pruned.model.shape.experts
    plain, other = no_equations(experts), no_equations(experts)
    for rows, chosen, outputs in chunks(walk, routing):
        target = walk.target(rows)
        plain.add(chosen, routing.weights[rows], outputs, target)
        if routing.other is not None:
            other.add(chosen, routing.other[rows], outputs, target)
    ones = torch.ones(experts)
    taken, weights = (plain, routing.weights) if routing.other is None else (other, routing.other)
    gains = solve_gains(taken) if Repair.GAIN in walk.parts else ones
    repair = LayerRepair(
        gains=gains.tolist() if Repair.GAIN in walk.parts else None,
        bias=None if routing.bias is None else routing.bias.tolist(),
        error_before=plain.error(ones),
        error_after=taken.error(gains),
        load_before=routing.load_before,
        load_after=routing.load_after,
        router=refit,
    )
    return repair, gains, weights


def _with_downs(walk: Walk, layer: int, routing: Routing, repair: LayerRepair, run: Run) -> LayerRepair:
    """The layer's repair once its down projections are refitted."""
    found, experts = refit_downs(walk, layer, routing, run), walk.pruned.model.shape.experts
    after, weights = no_equations(experts), routing.weights if routing.other is None else routing.other
    for rows, chosen, outputs in chunks(walk, routing):
        after.add(chosen, weights[rows], outputs, walk.target(rows))
    return repair.model_copy(update={"down": found, "error_after": after.error(torch.ones(experts))})


def _advance(walk: Walk, routing: Routing, gains_E: Tensor, weights_TJ: Tensor) -> None:
    """Add the original's routed output to its stream, and the mended one to the pruned model's."""
    original, pruned = walk.original.flat(), walk.pruned.flat()
    for rows, chosen, outputs in chunks(walk, routing):
        factors = weights_TJ[rows] * gains_E[chosen]
        mended = torch.bmm(factors[:, None], outputs).squeeze(1)
        original[rows] = (original[rows].float() + walk.routed[rows]).to(original.dtype)
        pruned[rows] = (pruned[rows].float() + mended).to(pruned.dtype)
        walk.original.touch(len(chosen))
        walk.pruned.touch(len(chosen))


def collected_rows(run: Run, layers: Mapping[int, LayerRepair]) -> RouterRows:
    """The routers' rows that were refitted, once all layers are done."""
    found = {layer: run.done(f"repair-rows-{layer}") for layer in layers}
    pieces = {layer: piece for layer, piece in found.items() if piece is not None}
    return RouterRows(by_layer={n: read_tensor(read_header(run.path(piece))["rows"]) for n, piece in pieces.items()})


def collected_downs(run: Run, layers: Mapping[int, LayerRepair]) -> DownFiles:
    """The down projections that were refitted, once all layers are done."""
    found = {layer: run.done(down_piece(layer)) for layer in layers}
    return DownFiles(by_layer={n: open_downs(run.path(piece)) for n, piece in found.items() if piece is not None})


def _write(path: Path, repair: LayerRepair) -> None:
    path.write_text(repair.model_dump_json() + "\n", encoding="utf-8")


def _read(run: Run, layer: int) -> LayerRepair:
    piece = run.done(f"repair-{layer}")
    assert piece is not None
    return LayerRepair.model_validate(json.loads(run.path(piece).read_text(encoding="utf-8")))


def _save(run: Run, walk: Walk, layer: int) -> None:
    """Keep both hidden states after a layer as a piece (behind the last an empty one), and drop those before it."""
    last = layer == walk.original.model.shape.layers - 1
    entries = [] if last else [*walk.original.kept("original"), *walk.pruned.kept("pruned")]
    with phase("hidden states", size=sum(entry.bytes for entry in entries)):
        run.write(f"hidden-{layer}", f"hidden-{layer:05d}.safetensors", lambda path: write_shard(path, entries))
        run.drop(f"hidden-{layer - 1}")


def _resume(run: Run, walk: Walk) -> int:
    """Load the last hidden states that were kept; returns the layer to go on with."""
    layers = walk.original.model.shape.layers
    for layer in reversed(range(layers)):
        piece = run.done(f"hidden-{layer}")
        if piece is None:
            continue
        stored = read_header(run.path(piece))
        for name, stream in (("original", walk.original), ("pruned", walk.pruned)) if layer < layers - 1 else ():
            with phase("hidden states", size=stored[name].bytes):
                stream.restore(stored, name)
        return layer + 1
    return 0
