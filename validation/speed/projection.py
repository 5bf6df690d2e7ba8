"""Tokens per second on a GPU that is not there: intervals from what a token reads and computes. Nothing is measured.

The bounds are chosen so that published measurements of llama.cpp lie inside;
`tests/validation/speed/test_projection.py` has them with their sources.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from moepress.models.families.family import Part, Shape

if TYPE_CHECKING:
    from moepress.models.forward.inventory import Weight

PROMPT, DECODE = 512, 128
BANDWIDTH_SHARES = (0.7, 0.9)
"""Of the memory's bandwidth, slow and fast."""
COMPUTE_SHARES = (0.25, 0.7)
"""Of the tensor cores' fp16 FLOP/s, slow and fast; experts see few tokens each."""
LAYER_SECONDS = (150e-6, 50e-6)
"""What starting a layer's kernels takes, slow and fast."""
FORMULAS = {
    "tg128": (
        "tokens/s = 1 / ((decode_bytes + 64 * cache_bytes_per_token) / (bandwidth * b) + layers * t); "
        "low: b = 0.7, t = 150 us; high: b = 0.9, t = 50 us"
    ),
    "pp512": (
        "tokens/s = 512 / (512 * flops_per_token / (fp16 * c) + prefill_bytes / (bandwidth * b) + layers * t); "
        "low: c = 0.25, b = 0.7, t = 150 us; high: c = 0.7, b = 0.9, t = 50 us"
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What a model asks of a GPU that holds all of it.

    Attributes:
        layers: decoder layers.
        decode_bytes: weights that one token reads: everything but embeddings, and top-k of the routed experts.
        prefill_bytes: weights that a prompt of 512 tokens reads: every expert is some token's.
        flops_per_token: two for each weight that a token passes.
        cache_bytes_per_token: KV cache of one token, all layers.
        expert_layers: numbers of the decoder layers with routed experts.
        routed_bytes: all routed experts.
        routed_decode_bytes: those that one token reads; a part of `decode_bytes`.
    """

    layers: int
    decode_bytes: int
    prefill_bytes: int
    flops_per_token: int
    cache_bytes_per_token: int
    expert_layers: tuple[int, ...] = ()
    routed_bytes: int = 0
    routed_decode_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """Tokens per second, projected: slowest and fastest, batch 1."""

    low: float
    high: float
    kind: Literal["projected"] = "projected"


def interval_text(low: float, high: float) -> str:
    """Both ends in three figures, without a decimal above ten: 9.25-21, 98-210, 1,310-3,500."""
    ends = (float(f"{end:.3g}") for end in (low, high))
    return "-".join(f"{end:,.0f}" if end >= 10 else f"{end:g}" for end in ends)


def load_of(
    parts: Mapping[Part, Weight], shape: Shape, cache_bytes_per_token: int, expert_layers: Sequence[int] | None = None
) -> Load:
    """What a model of these parts asks; its MTP layer is not run.

    Args:
        parts: parameters and stored bytes of what it has.
        shape: its config's.
        cache_bytes_per_token: of its KV cache.
        expert_layers: numbers of those with routed experts; None for all.
    """
    from moepress.models.forward.inventory import Weight  # here, so that the table of GPUs costs no torch

    # Tied embeddings are read as the head.
    unread = {Part.MTP} | ({Part.EMBEDDINGS} if Part.LM_HEAD in parts else set())
    used = {part: weight for part, weight in parts.items() if part not in unread}
    top_k, experts = shape.top_k, shape.experts
    routed = used.get(Part.ROUTED, Weight(parameters=0, bytes=0))
    whole = sum(weight.bytes for weight in used.values())
    parameters = sum(weight.parameters for weight in used.values())
    return Load(
        layers=shape.layers,
        decode_bytes=whole - routed.bytes + routed.bytes * top_k // experts,
        prefill_bytes=whole,
        flops_per_token=2 * (parameters - routed.parameters + routed.parameters * top_k // experts),
        cache_bytes_per_token=cache_bytes_per_token,
        expert_layers=tuple(range(shape.layers) if expert_layers is None else expert_layers),
        routed_bytes=routed.bytes,
        routed_decode_bytes=routed.bytes * top_k // experts,
    )


HYBRID_SHARES = (0.5, 0.8)
"""Of the card's bandwidth where experts lie in the memory behind it, slow and fast."""
RAM_SHARES = (0.35, 0.6)
"""Of that memory's theoretical bandwidth, slow and fast."""
DISK_SHARES = (0.3, 0.7)
"""Of a disk's, from which experts are read through the system's cache, slow and fast."""
HOT_EXPERTS = (1.0, 0.3)
"""Exponents, slow and fast: memory that holds a share c of the experts serves c to that power of what is chosen. 1:
the text uses all alike. In profiles of our trained models a quarter of the experts has 58 to 75 % of the choices."""


def project_behind(
    load: Load,
    *,
    bandwidth: float,
    ram_bandwidth: float,
    share: float,
    disk_bandwidth: float = 0.0,
    held: float = 1.0,
) -> Interval:
    """Decoding with a share of the routed experts in the memory behind the card, as `tg128`.

    1/t = (all but those experts) / (card * g) + (those experts that a token reads) / (memory * r) + layers * t0, with
    g from 0.5 to 0.8 and r from 0.35 to 0.6 of the theoretical bandwidth. What memory does not hold of them is read
    from the disk, at 0.3 to 0.7 of its bandwidth: 1 - c of what a token reads where it holds c, or as little as
    1 - c^0.3, for some experts are chosen far more often than others.

    Args:
        load: of the model.
        bandwidth: of the card's memory, bytes per second.
        ram_bandwidth: of the memory behind it.
        share: of what the router sends there, as much as of the experts: each layer sends K tokens' worth.
        disk_bandwidth: of the disk that they lie on, bytes per second.
        held: share of them that memory holds.
    """
    away = load.routed_decode_bytes * share
    near = load.decode_bytes - away + DECODE // 2 * load.cache_bytes_per_token
    ends = []
    for place, (card, behind, started) in enumerate(zip(HYBRID_SHARES, RAM_SHARES, LAYER_SECONDS, strict=True)):
        cached = away * held ** HOT_EXPERTS[place]
        seconds = near / (bandwidth * card) + cached / (ram_bandwidth * behind) + load.layers * started
        if held < 1:
            seconds += (away - cached) / (disk_bandwidth * DISK_SHARES[place])
        ends.append(1 / seconds)
    return Interval(low=ends[0], high=ends[1])


def project(load: Load, *, bandwidth: float, flops: float) -> tuple[Interval, Interval]:
    """Prefill of 512 tokens and decoding of 128 from an empty cache, as llama-bench's `pp512` and `tg128`.

    Args:
        load: of a model that lies in this memory as a whole.
        bandwidth: of the memory, bytes per second.
        flops: FLOP/s in fp16, dense.

    Returns:
        Tokens per second of `pp512` and of `tg128`.
    """
    prefill, decode = [], []
    for share, compute, layer in zip(BANDWIDTH_SHARES, COMPUTE_SHARES, LAYER_SECONDS, strict=True):
        started = load.layers * layer
        read = load.decode_bytes + DECODE // 2 * load.cache_bytes_per_token
        decode.append(1 / (read / (bandwidth * share) + started))
        work = PROMPT * load.flops_per_token / (flops * compute)
        prefill.append(PROMPT / (work + load.prefill_bytes / (bandwidth * share) + started))
    return Interval(low=prefill[0], high=prefill[1]), Interval(low=decode[0], high=decode[1])
