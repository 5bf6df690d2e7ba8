"""What profiling takes, before it starts."""

from collections.abc import Iterable
from dataclasses import replace

from moepress.calibration.accumulators import ACCUMULATORS
from moepress.calibration.observe import ROWS_AT_ONCE as OBSERVED_ROWS
from moepress.calibration.profile import SHARDS
from moepress.compress.budget.bit_losses import experts_to_solve
from moepress.compress.budget.sensitivities import TOKENS, streams_at
from moepress.compress.estimates.estimate import PROJECTED, Estimate
from moepress.compress.estimates.figures import Figures, expert_matrices
from moepress.compress.estimates.footprint import (
    Workload,
    bound_notes,
    buffer_bytes,
    device_bytes,
    disk_peak,
    freed,
    hidden_disk,
    kept_outputs,
    least_memory,
    limits_of,
    outputs_bytes,
    peak_of,
    probe_bytes,
    resident,
    shortages,
    slice_bytes,
)
from moepress.compress.estimates.rates import Rates
from moepress.compress.estimates.seconds import (
    START_SECONDS,
    forward_seconds,
    hidden_seconds,
    rest_parameters,
    solve_seconds,
)
from moepress.compress.gptq.block_choice import MIX_TYPES
from moepress.compress.gptq.experts import experts_that_fit
from moepress.converters.safetensors.scheme import SUPPORTED_BITS
from moepress.models.families.family import Part


def estimate_profile(
    figures: Figures,
    work: Workload,
    rates: Rates | None = None,
    *,
    leave_one_out: bool = True,
    bit_losses: bool = True,
    grid_losses: bool = False,
) -> Estimate:
    """One forward pass; where memory and disk are short, experts are read again for every pass over the tokens."""
    shape, limits = figures.shape, limits_of(figures, work)
    buffers, spilled = buffer_bytes(figures, work, limits, observe=True)
    kept = kept_outputs(figures, work, limits, buffers, leave_one_out=leave_one_out)
    passes, spilled = -(-work.tokens // kept.tokens), spilled + kept.mapped
    chosen = shape.top_k + (1 if leave_one_out else 0)
    expert = 3 * shape.hidden * shape.expert_width
    rows = min(kept.tokens, OBSERVED_ROWS)
    rest = resident(figures, work, limits, (buffers + kept.memory, spilled))
    # The expert in use, the next one, and what it is made of.
    outputs = outputs_bytes(figures, work, kept.tokens)
    rest |= {"routed outputs": outputs, "experts": 3 * expert * 8 + slice_bytes(figures, rows)}
    probed = experts_to_solve(shape, work.tokens, grids=grid_losses) if bit_losses else 0
    rest["bit losses"] = probe_bytes(figures, min(probed, experts_that_fit(shape, limits.memory_bytes, work.device)))
    rest["freed tensors"] = freed(limits, rest)
    statistics = figures.moe_layers * shape.experts * len(ACCUMULATORS) * SHARDS * 8 * work.domains
    disk = {"output": statistics, "statistics by layer": statistics} | hidden_disk(figures, work, spilled)
    disk["experts' outputs"] = kept.table
    if grid_losses:  # what is kept before a range of layers, and buffers that memory does not hold
        disk["losses by kind"] = 3 * streams_at(shape.layers)[1] * _sampled(work) * shape.hidden * 4
    time = {}
    if rates is not None:
        routed = passes * figures.parts[Part.ROUTED].bytes
        weights = passes * figures.parameters(Part.ROUTED) + rest_parameters(figures)
        time = {
            "start": START_SECONDS,
            "read": (routed + figures.stored(Part.ROUTED, Part.LM_HEAD)) / rates.read_bytes_per_second,
            "load": weights * rates.load_seconds,
            **forward_seconds(figures, work, rates, chosen),
            "observe": 2 * rates.load_seconds * work.tokens * chosen * shape.hidden * figures.moe_layers,
            "bit losses": _probe_seconds(figures, probed, rates, grids=grid_losses) if probed else 0.0,
            "experts' outputs": 2 * passes * kept.table * figures.moe_layers / rates.read_bytes_per_second,
            "hidden states": hidden_seconds(figures, work, spilled, rates),
            "losses by kind": _kind_seconds(figures, work, rates) if grid_losses else 0.0,
        }
    moments = ("embeddings",), ("layer", "activations"), ("layer", "bit losses")
    peak = peak_of(rest, *moments, ("layer", "routed outputs", "experts"))
    least = least_memory(figures, work, None)
    short = shortages(work, peak, least)
    return Estimate(
        disk_bytes=disk_peak(disk, shape.layers),
        output_bytes=statistics,
        peak_memory_bytes=peak,
        device_memory_bytes=device_bytes(work, rest, *moments, ("layer", "experts")),
        seconds=sum(time.values()) if rates is not None else None,
        tokens_per_expert=work.tokens * shape.top_k / shape.experts,
        time=time,
        memory=rest,
        disk=disk,
        notes=(PROJECTED, *_reread_note(passes), *short, *bound_notes(work, peak, least)),
        shortages=short,
    )


def _sampled(work: Workload) -> int:
    """Tokens that flow through the model once for every kind and range of layers."""
    return min(work.tokens, max(TOKENS, 2 * work.window))


def _kind_seconds(figures: Figures, work: Workload, rates: Rates) -> float:
    """Each layer is read once, its experts are rounded twice, and all ways through it are run."""
    ways, _ = streams_at(figures.shape.layers)
    run = forward_seconds(figures, replace(work, tokens=round(ways * _sampled(work))), rates, figures.shape.top_k)
    read = figures.parts[Part.ROUTED].bytes / rates.read_bytes_per_second
    return read + 3 * figures.parameters(Part.ROUTED) * rates.load_seconds + sum(run.values())


def _probe_seconds(figures: Figures, experts: int, rates: Rates, *, grids: bool) -> float:
    """Solving so many experts of every layer at every width, and on every type of GGUF."""
    terms = [solve_seconds(m, rates, experts) for m in expert_matrices(figures, experts)]
    return (len(SUPPORTED_BITS) + grids * len(MIX_TYPES)) * sum(sum(term.values()) for term in terms)


def _reread_note(passes: int) -> Iterable[str]:
    if passes > 1:
        yield (
            f"The experts' outputs of so many tokens fit neither into memory nor into half of the free disk: every "
            f"expert is read {passes} times. Free disk, more --max-memory, fewer --tokens or --no-loo make it fewer."
        )
