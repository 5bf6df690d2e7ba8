"""What a stage will take, before it starts: time, memory and disk, term by term. All of it is projected."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain

from moepress.calibration.accumulators import ACCUMULATORS
from moepress.calibration.hessian import HessianOptions
from moepress.calibration.observe import ROWS_AT_ONCE as OBSERVED_ROWS
from moepress.calibration.profile import SHARDS
from moepress.compress.budget.bit_losses import experts_to_solve
from moepress.compress.estimates.figures import Figures, Matrices, expert_matrices, included_matrices, pressed_sizes
from moepress.compress.estimates.footprint import (
    ROWS_AT_ONCE,
    Workload,
    buffer_bytes,
    device_bytes,
    disk_peak,
    hidden_bytes,
    hidden_disk,
    kept_outputs,
    least_memory,
    libraries_bytes,
    limits_of,
    memory_notes,
    middles,
    outputs_bytes,
    peak_of,
    probe_bytes,
    quantize_peak,
    resident,
    slice_bytes,
    solver_memory,
    waiting,
)
from moepress.compress.estimates.rates import Rates
from moepress.compress.gptq.experts import experts_that_fit
from moepress.compress.gptq.include import Include
from moepress.compress.gptq.reference import is_apart
from moepress.compress.gptq.solver import SolverOptions
from moepress.converters.safetensors.scheme import SUPPORTED_BITS, Scheme
from moepress.models.families.family import Part
from moepress.models.storage.checkpoint import Checkpoint

PROJECTED = "Projected, not measured: within a factor of two or three where nothing else keeps the machine busy."
# Fitted to gptq.py on 2 cores at 1024 to 4096 columns; the spread between widths was a third.
_FACTOR_COST = 3.0  # Cholesky and inverse, against 2/3 I^3 at the rate of a large matmul
_COLUMN_SECONDS = 50e-6  # some eight small operations for each column of a loop
_START_SECONDS = 2.0  # transformers' model on the meta device, text to tokens
_FEW_TOKENS_COST = 1.3  # an expert's matmuls with a few hundred tokens, against large ones


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A projection, not a measurement.

    Attributes:
        disk_bytes: free space needed for the output and what lies beside it while it is made.
        output_bytes: size of the result.
        peak_memory_bytes: of the process, Python and its libraries included.
        device_memory_bytes: of the GPU; None on the CPU.
        seconds: of all terms; None where rates were not measured.
        tokens_per_expert: mean calibration tokens that reach a routed expert.
        time: term -> seconds.
        memory: term -> bytes; `libraries`, `token buffers` and `mapped files` (what is resident of the token buffers
            beyond the limit) are there all the time, of the others those that meet.
        disk: term -> bytes; not all of the output is there while the most hidden states are.
        notes: what a user should know beforehand.
    """

    disk_bytes: int
    output_bytes: int
    peak_memory_bytes: int
    seconds: float | None
    tokens_per_expert: float | None
    device_memory_bytes: int | None = None
    time: dict[str, float] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)
    disk: dict[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def estimate_prune(output_bytes: int, rates: Rates | None = None) -> Estimate:
    """Pruning copies bytes in chunks: what is read is what is written."""
    memory = {"libraries": libraries_bytes(), "chunks": 4 * (32 << 20)}
    time = {}
    if rates is not None:
        each = output_bytes / rates.read_bytes_per_second
        time = {"read": each, "check": output_bytes * rates.load_seconds / 4, "write": each}
    return Estimate(
        disk_bytes=output_bytes,
        output_bytes=output_bytes,
        peak_memory_bytes=sum(memory.values()),
        seconds=sum(time.values()) if rates is not None else None,
        tokens_per_expert=None,
        time=time,
        memory=memory,
        disk={"output": output_bytes},
        notes=(PROJECTED,),
    )


def estimate_profile(
    figures: Figures,
    work: Workload,
    rates: Rates | None = None,
    *,
    leave_one_out: bool = True,
    bit_losses: bool = True,
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
    probed = experts_to_solve(shape, work.tokens) if bit_losses else 0
    rest["bit losses"] = probe_bytes(figures, min(probed, experts_that_fit(shape, limits.memory_bytes)))
    statistics = figures.moe_layers * shape.experts * len(ACCUMULATORS) * SHARDS * 8 * work.domains
    disk = {"output": statistics, "statistics by layer": statistics} | hidden_disk(figures, work, spilled)
    disk["experts' outputs"] = kept.table
    time = {}
    if rates is not None:
        routed = passes * figures.parts[Part.ROUTED].bytes
        weights = passes * figures.parameters(Part.ROUTED) + rest_parameters(figures)
        time = {
            "start": _START_SECONDS,
            "read": (routed + figures.stored(Part.ROUTED, Part.LM_HEAD)) / rates.read_bytes_per_second,
            "load": weights * rates.load_seconds,
            **_forward_seconds(figures, work, rates, chosen),
            "observe": 2 * rates.load_seconds * work.tokens * chosen * shape.hidden * figures.moe_layers,
            "bit losses": _probe_seconds(figures, probed, rates) if probed else 0.0,
            "experts' outputs": 2 * passes * kept.table * figures.moe_layers / rates.read_bytes_per_second,
            "hidden states": _hidden_seconds(figures, work, spilled, rates),
        }
    moments = ("embeddings",), ("layer", "activations"), ("layer", "bit losses")
    peak = peak_of(rest, *moments, ("layer", "routed outputs", "experts"))
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
        notes=(PROJECTED, *_reread_note(passes), *memory_notes(work, peak, least_memory(figures, work, None))),
    )


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
    """
    shape, limits, streams = figures.shape, limits_of(figures, work), 2 if original_targets else 1
    include = frozenset(include)
    extra = included_matrices(checkpoint, include)
    sizes = pressed_sizes(checkpoint, figures, count, scheme, include, layer_bits)
    output = sum(sizes.values())
    buffers, spilled = buffer_bytes(figures, work, limits, observe=False, streams=streams, logits=balanced)
    at_once = experts_that_fit(replace(shape, experts=count), limits.memory_bytes)
    layers = streams if is_apart(include) else 1
    rest = resident(figures, work, limits, (buffers, spilled), streams=streams, layers=layers)
    rest |= solver_memory(figures, at_once, extra, sizes, output, moved=original_targets)
    stepped = waiting(figures, work, limits, streams) if is_apart(include) else 0
    rest |= {"waiting tokens": stepped, "intermediates": middles(figures, work, limits, at_once / count)}
    rest["expert's tokens"] = streams * slice_bytes(figures, min(work.tokens, ROWS_AT_ONCE))
    disk = {"output": output} | hidden_disk(figures, work, spilled, streams)
    time = {}
    if rates is not None:
        again = [] if stepped else extra
        time = _quantize_seconds(figures, count, work, rates, at_once, extra, again, spilled, output)
        if original_targets:
            time = _moved_seconds(figures, count, work, rates, extra, time)
    peak = quantize_peak(rest)
    return Estimate(
        disk_bytes=disk_peak(disk, shape.layers),
        output_bytes=output,
        peak_memory_bytes=peak,
        device_memory_bytes=device_bytes(
            work,
            rest,
            ("embeddings",),
            ("layer", "activations", "waiting tokens", "other Linears"),
            ("layer", "solver", "expert's tokens", "intermediates"),
        ),
        seconds=sum(time.values()) if rates is not None else None,
        tokens_per_expert=work.tokens * shape.top_k / count,
        time=time,
        memory=rest,
        disk=disk,
        notes=(PROJECTED, *memory_notes(work, peak, least_memory(figures, work, (extra, sizes, output)))),
    )


def rest_parameters(figures: Figures) -> int:
    """Parameters that every token passes in the layers: all but routed experts, embeddings and lm_head."""
    parts = [p for p in figures.parts if p not in {Part.ROUTED, Part.EMBEDDINGS, Part.LM_HEAD, Part.MTP}]
    return figures.parameters(*parts)


def _routed_flops(figures: Figures, tokens: int, chosen: int) -> float:
    return 2 * tokens * figures.parameters(Part.ROUTED) * chosen / figures.shape.experts


def _forward_seconds(figures: Figures, work: Workload, rates: Rates, chosen: int) -> dict[str, float]:
    attention = figures.attention
    scores = 2 * work.tokens * work.window * attention.heads * (attention.key_width + attention.value_width)
    dense = 2 * work.tokens * rest_parameters(figures)
    routed = _routed_flops(figures, work.tokens, chosen) * _FEW_TOKENS_COST
    return {
        "forward": (dense + routed) / rates.forward_flops,
        "attention scores": scores * figures.shape.layers / rates.forward_flops,
    }


def _hidden_seconds(figures: Figures, work: Workload, spilled: int, rates: Rates) -> float:
    """Kept after every layer but the last; buffers in files are written and read a few times in every layer."""
    layers = figures.shape.layers
    return ((layers - 1) * hidden_bytes(figures, work) + 4 * layers * spilled) / rates.read_bytes_per_second


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
) -> dict[str, float]:
    """`passed`: of the extra matrices those that want a forward pass of their own."""
    shape, sample = figures.shape, HessianOptions().pooled_tokens
    kept = figures.stored(Part.ROUTED) + figures.parts[Part.ROUTED].bytes * count / shape.experts
    weights = rest_parameters(figures) + figures.parameters(Part.ROUTED) * count / shape.experts
    forward = _forward_seconds(figures, work, rates, shape.top_k)
    gate_up, down = expert_matrices(figures, count)
    routed_tokens = work.tokens * shape.top_k * figures.moe_layers
    # down's Hessian wants gate and up once more; of an expert with few tokens also a sample of the layer's.
    again = 2 * shape.hidden * 2 * shape.expert_width * (routed_tokens + sample * down.count)
    grams = routed_tokens * _gram_flops(gate_up.columns) + work.tokens * figures.moe_layers * _gram_flops(shape.hidden)
    grams += (routed_tokens + sample * down.count) * _gram_flops(down.columns)
    grams += sum(m.count * work.tokens * _gram_flops(m.columns) for m in extra)
    for matrices in passed:  # each wants its layer's attention once more
        share = matrices.count / max(shape.layers, 1)
        forward = {term: seconds * (1 + share / 2) for term, seconds in forward.items()}
    solved = [_solve_seconds(m, rates, at_once if m.part is Part.ROUTED else 1) for m in chain((gate_up, down), extra)]
    return {
        "start": _START_SECONDS,
        "read": kept / rates.read_bytes_per_second,
        "load": weights * rates.load_seconds,
        **forward,
        "Hessians": (grams + again) / rates.solver_flops,
        **{term: sum(terms[term] for terms in solved) for term in solved[0]},
        "pack": 2 * weights * rates.load_seconds,
        "hidden states": _hidden_seconds(figures, work, spilled, rates),
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


def _gram_flops(columns: int) -> float:
    """2 I^2 of a token, of wide matrices the lower triangle in strips of 1024 columns."""
    return columns**2 * (2 if columns <= 1024 else 1 + 1024 / columns)


def _solve_seconds(matrices: Matrices, rates: Rates, at_once: int) -> dict[str, float]:
    """One Cholesky and inverse, the column loop, the sweeps, three losses: 1 + 2 x sweeps + 3 times O I^2."""
    sweeps = SolverOptions().sweeps
    square = matrices.rows * matrices.columns**2
    loops = matrices.columns * (1 + sweeps) * _COLUMN_SECONDS / at_once
    return {
        "factor": matrices.count * _FACTOR_COST * 2 / 3 * matrices.columns**3 / rates.solver_flops,
        "solve": matrices.count * (4 + 2 * sweeps) * square / rates.solver_flops,
        "rounding": matrices.weights * (2 + sweeps) * rates.search_seconds + matrices.count * loops,
    }


def _probe_seconds(figures: Figures, experts: int, rates: Rates) -> float:
    """Solving so many experts of every layer at every width."""
    terms = [_solve_seconds(m, rates, experts) for m in expert_matrices(figures, experts)]
    return len(SUPPORTED_BITS) * sum(sum(term.values()) for term in terms)


def _reread_note(passes: int) -> Iterable[str]:
    if passes > 1:
        yield (
            f"The experts' outputs of so many tokens fit neither into memory nor into half of the free disk: every "
            f"expert is read {passes} times. Free disk, more --max-memory, fewer --tokens or --no-loo make it fewer."
        )
