"""What a repair takes, before it starts: a profile's pass, with two streams instead of one."""

from dataclasses import replace

from moepress.compress.estimates.estimate import Estimate
from moepress.compress.estimates.figures import Figures
from moepress.compress.estimates.footprint import Workload, limits_of
from moepress.compress.estimates.profile import estimate_profile
from moepress.compress.estimates.rates import Rates
from moepress.models.families.family import Part

_ONCE = {"start", "read"}  # experts are read once for both streams
_REREAD = 1.5  # where a router is refitted: at most those that stay are read once more
ROUNDS, PART_TOKENS = 12, 8192  # as in compress.pruning.refit
_TWICE = ("token buffers", "mapped files", "layer")


def estimate_repair(
    figures: Figures, work: Workload, rates: Rates | None = None, *, router: bool = False, down: int = 0
) -> Estimate:
    """Twice a profile's forward pass; every expert is read once, and of K outputs a token K are kept for the second.

    A refitted router takes more: 2K outputs a token, their inner products, the inputs' squares and rounds over them.
    Refitted down projections, `down` in each layer: what is lacking, an expert's equations, another pass over these
    experts, and their files.
    """
    profile = estimate_profile(figures, work, rates, leave_one_out=True, bit_losses=False)
    time = {term: seconds * (1 if term in _ONCE else 2) for term, seconds in profile.time.items()}
    memory = {term: size * (2 if term in _TWICE else 1) for term, size in profile.memory.items()}
    disk = {term: 0 if term in {"output", "statistics by layer"} else 2 * size for term, size in profile.disk.items()}
    if router:
        fit = _refit_bytes(figures, work)
        limits = limits_of(figures, work)
        inside = fit["inner products"] <= limits.memory_bytes // 4
        memory |= {"router": fit["router"], "inner products": fit["inner products"] if inside else 0}
        disk |= {"experts' outputs": 2 * disk.get("experts' outputs", 0)}
        disk |= {"inner products": 0 if inside else fit["inner products"], "router rows": fit["rows"]}
        if rates is not None:
            time = {term: seconds * (_REREAD if term in {"read", "load"} else 1) for term, seconds in time.items()}
            time |= {"router": _refit_seconds(figures, work, rates)}
    if down:
        lacking = 4 * work.tokens * figures.shape.hidden
        inside = lacking <= limits_of(figures, work).memory_bytes // 4
        memory |= {"down projections": _down_bytes(figures), "what is lacking": lacking if inside else 0}
        disk |= {"down projections": _down_file_bytes(figures, down), "what is lacking": 0 if inside else lacking}
        if rates is not None:
            time |= {"down projections": _down_seconds(figures, work, rates, down)}
    more = sum(memory.values()) - sum(profile.memory.values())
    return replace(
        profile,
        disk_bytes=sum(disk.values()),
        output_bytes=0,
        peak_memory_bytes=profile.peak_memory_bytes + more,
        device_memory_bytes=profile.device_memory_bytes and 2 * profile.device_memory_bytes,
        seconds=sum(time.values()) if rates is not None else None,
        time=time,
        memory=memory,
        disk=disk,
    )


def _refit_bytes(figures: Figures, work: Workload) -> dict[str, int]:
    """What refitting one layer's router holds, and the rows of all layers on disk."""
    shape = figures.shape
    logits = 4 * shape.experts * work.tokens
    squares = 3 * 8 * shape.hidden**2  # the inputs' squares, their factor, and one to make it
    slots = 2 * shape.top_k
    return {
        "router": squares + 3 * logits + 40 * slots * work.tokens + 5 * PART_TOKENS * 8 * shape.hidden,
        "inner products": 4 * work.tokens * slots * (slots + 1),
        "rows": 4 * shape.experts * shape.hidden * figures.moe_layers,
    }


def _down_bytes(figures: Figures) -> int:
    """One expert in fp32, the next one, its equations in fp64 with their factor, and the step."""
    width, hidden = figures.shape.expert_width, figures.shape.hidden
    return 2 * 12 * width * hidden + 3 * 8 * width**2 + 3 * 8 * width * hidden


def _down_file_bytes(figures: Figures, kept: int) -> int:
    """The down projections of the experts that stay, as they are stored."""
    routed = figures.parts[Part.ROUTED]
    weights = figures.moe_layers * kept * figures.shape.expert_width * figures.shape.hidden
    return weights * routed.bytes // routed.parameters


def _down_seconds(figures: Figures, work: Workload, rates: Rates, kept: int) -> float:
    """Two passes of gate and up, squares and moments, a test and what changes behind; a factor for each expert."""
    width, hidden = figures.shape.expert_width, figures.shape.hidden
    token = 2 * 4.0 * width * hidden + 2.0 * width**2 + 4 * 2.0 * width * hidden
    expert = width**3 / 3 + 2.0 * width**2 * hidden
    return figures.moe_layers * (work.tokens * figures.shape.top_k * token + kept * expert) / rates.solver_flops


def _refit_seconds(figures: Figures, work: Workload, rates: Rates) -> float:
    """The inputs' squares and their factor, in fp64, and the rounds: three products of inputs and rows, two errors."""
    shape = figures.shape
    squares = 2 * (2.0 * work.tokens * shape.hidden**2 + shape.hidden**3 / 3)
    rounds = ROUNDS * 2.0 * work.tokens * shape.hidden * shape.experts * 6
    return figures.moe_layers * (squares + rounds) / rates.solver_flops
