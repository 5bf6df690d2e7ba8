"""What quantizing takes, before it starts."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import chain

from moepress.calibration.hessian import END_BITS, HessianOptions, gram_flops
from moepress.compress.estimates.ends import end_terms
from moepress.compress.estimates.estimate import PROJECTED, Estimate
from moepress.compress.estimates.figures import (
    Figures,
    Matrices,
    expert_matrices,
    included_matrices,
    mtp_bytes,
    pressed_sizes,
)
from moepress.compress.estimates.footprint import (
    ROWS_AT_ONCE,
    Workload,
    bound_notes,
    buffer_bytes,
    device_bytes,
    disk_peak,
    freed,
    hidden_disk,
    least_memory,
    limits_of,
    middles,
    quantize_peak,
    resident,
    shortages,
    slice_bytes,
    solver_memory,
    waiting,
)
from moepress.compress.estimates.rates import Rates
from moepress.compress.estimates.seconds import (
    START_SECONDS,
    forward_seconds,
    hidden_seconds,
    rest_parameters,
    solve_seconds,
)
from moepress.compress.gptq.experts import experts_that_fit
from moepress.compress.gptq.include import Include, included, included_as
from moepress.compress.gptq.moments import picked_tokens
from moepress.compress.gptq.options import SolverOptions
from moepress.compress.gptq.reference import is_apart
from moepress.converters.safetensors.scheme import Scheme
from moepress.models.families.family import Part
from moepress.models.storage.checkpoint import Checkpoint


def estimate_quantize(
    checkpoint: Checkpoint,
    figures: Figures,
    count: int,
    scheme: Scheme,
    work: Workload,
    rates: Rates | None = None,
    *,
    include: Iterable[Include] = (),
    layer_bits: Mapping[int, int] | None = None,
    original_targets: bool = False,
    balanced: bool = False,
    predicting: Iterable[int] = (),
    solver: SolverOptions | None = None,
    end_tokens: int = 0,
) -> Estimate:
    """One forward pass, in which every layer is solved before the next.

    Args:
        checkpoint: the original.
        figures: its numbers.
        count: experts that stay.
        scheme: bits and group size.
        work: the calibration text, and where it runs.
        rates: of this machine; without them no time is estimated.
        include: parts besides the routed experts.
        layer_bits: of layers that do not have the scheme's.
        original_targets: the original model is walked beside the quantized one, see `compress.gptq.reference`.
        balanced: the router's logits are kept, see `compress.gptq.balance`.
        predicting: multi-token-prediction layers that stay; only their disk is counted.
        solver: how it is asked to solve; by default as it does by default.
        end_tokens: of the backward pass before it, see `calibration.ends`.
    """
    shape, limits, streams = figures.shape, limits_of(figures, work), 2 if original_targets else 1
    include = included(include)
    extra = included_matrices(checkpoint, include)
    sizes = pressed_sizes(checkpoint, figures, count, scheme, include, layer_bits)
    output = sum(sizes.values()) + mtp_bytes(checkpoint, figures, predicting, count, scheme)
    buffers, spilled = buffer_bytes(figures, work, limits, observe=False, streams=streams, logits=balanced)
    at_once = experts_that_fit(replace(shape, experts=count), limits.memory_bytes, work.device)
    layers = streams if is_apart(include) else 1
    rest = resident(figures, work, limits, (buffers, spilled), streams=streams, layers=layers)
    rest |= solver_memory(figures, at_once, extra, sizes, output, moved=original_targets)
    stepped = waiting(figures, work, limits, streams) if is_apart(include) else 0
    rest |= {"waiting tokens": stepped, "intermediates": middles(figures, work, limits, at_once / count)}
    rest["expert's tokens"] = streams * slice_bytes(figures, min(work.tokens, ROWS_AT_ONCE))
    rest["freed tensors"] = freed(limits, rest)
    few = [m for m in extra if (include.get(included_as(m.part) or Include.LM_HEAD) or scheme.bits) < END_BITS]
    window = rest["activations"] // limits.batch_windows
    ends = end_terms(figures, count, work, few, end_tokens, at_once, window, rates, solver)
    rest |= ends.memory
    disk = {"output": output} | hidden_disk(figures, work, spilled, streams) | ends.disk
    time = {}
    if rates is not None:
        again = [] if stepped else extra
        time = _quantize_seconds(figures, count, work, rates, at_once, extra, again, spilled, output, solver)
        if original_targets:
            time = _moved_seconds(figures, count, work, rates, extra, time)
        time |= ends.time
    peak, least = quantize_peak(rest), least_memory(figures, work, (extra, sizes, output))
    short, sides = shortages(work, peak, least), [name for name in ends.memory if name == "sides"]
    return Estimate(
        disk_bytes=disk_peak(disk, shape.layers),
        output_bytes=output,
        peak_memory_bytes=peak,
        device_memory_bytes=device_bytes(
            work,
            rest,
            ("embeddings",),
            ("layer", "activations", "waiting tokens", "other Linears", *sides),
            ("layer", "solver", "expert's tokens", "intermediates", *sides),
            ("layer", "gradients") if sides else (),
        ),
        seconds=sum(time.values()) if rates is not None else None,
        tokens_per_expert=work.tokens * shape.top_k / count,
        time=time,
        memory=rest,
        disk=disk,
        notes=(PROJECTED, *short, *bound_notes(work, peak, least)),
        shortages=short,
    )


def _quantize_seconds(
    figures: Figures,
    count: int,
    work: Workload,
    rates: Rates,
    at_once: int,
    extra: Sequence[Matrices],
    passed: Sequence[Matrices],
    spilled: int,
    output: int,
    solver: SolverOptions | None,
) -> dict[str, float]:
    """`passed`: of the extra matrices those that want a forward pass of their own."""
    shape = figures.shape
    kept = figures.stored(Part.ROUTED) + figures.parts[Part.ROUTED].bytes * count / shape.experts
    weights = rest_parameters(figures) + figures.parameters(Part.ROUTED) * count / shape.experts
    forward = forward_seconds(figures, work, rates, shape.top_k)
    gate_up, down = expert_matrices(figures, count)
    routed_tokens = work.tokens * shape.top_k * figures.moe_layers
    # down's Hessian wants gate and up once more; of an expert with few tokens also a sample of the layer's.
    usual = work.tokens * shape.top_k // max(count, 1)
    sample = len(picked_tokens(min(HessianOptions().pooled_tokens, work.tokens), usual))
    again = 2 * shape.hidden * 2 * shape.expert_width * (routed_tokens + sample * down.count)
    grams = work.tokens * figures.moe_layers * gram_flops(1, shape.hidden)
    grams += routed_tokens * gram_flops(1, gate_up.columns)
    grams += (routed_tokens + sample * down.count) * gram_flops(1, down.columns)
    grams += sum(m.count * work.tokens * gram_flops(1, m.columns) for m in extra)
    for matrices in passed:  # each wants its layer's attention once more
        share = matrices.count / max(shape.layers, 1)
        forward = {term: seconds * (1 + share / 2) for term, seconds in forward.items()}
    every = chain((gate_up, down), extra)
    solved = [solve_seconds(m, rates, at_once if m.part is Part.ROUTED else 1, solver) for m in every]
    return {
        "start": START_SECONDS,
        "read": kept / rates.read_bytes_per_second,
        "load": weights * rates.load_seconds,
        **forward,
        "Hessians": (grams + again) / rates.solver_flops,
        **{term: sum(terms[term] for terms in solved) for term in solved[0]},
        "pack": 2 * weights * rates.load_seconds,
        "hidden states": hidden_seconds(figures, work, spilled, rates),
        "write": output / rates.read_bytes_per_second,
    }


def _moved_seconds(
    figures: Figures, count: int, work: Workload, rates: Rates, extra: Sequence[Matrices], time: dict[str, float]
) -> dict[str, float]:
    """With targets from the original's inputs: all tokens pass twice, and every matrix is moved before it is solved."""
    gate_up, down = expert_matrices(figures, count)
    routed = (work.tokens * figures.shape.top_k + work.tokens) * figures.moe_layers
    crosses = sum(2.0 * routed * m.columns**2 for m in (gate_up, down))
    crosses += sum(2.0 * m.count * work.tokens * m.columns**2 for m in extra)
    moves = sum(m.count * (8.0 * m.rows * m.columns**2 + m.columns**3 / 3) for m in (gate_up, down, *extra))
    twice = {term: 2 * time[term] for term in ("forward", "attention scores", "hidden states")}
    moved = (crosses + moves) / rates.solver_flops + time["Hessians"] / 2  # down's inputs in the original
    return time | twice | {"targets": moved}
