"""What a stage will take, before it starts: disk, memory, and time projected from this machine's matmul rate."""

import time
from dataclasses import dataclass

import torch

from moepress.compress.plan import Plan, estimate_sizes
from moepress.converters.scheme import Scheme
from moepress.models.checkpoint import Checkpoint
from moepress.models.family import Part
from moepress.models.inventory import active_parameters, inventory, weigh


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A projection, not a measurement.

    Attributes:
        disk_bytes: free space needed for the output and what lies beside it while it is made.
        output_bytes: size of the result.
        peak_memory_bytes: of the process, beyond Python and torch.
        seconds: projected time; None where it is the disk's speed that counts.
        tokens_per_expert: mean calibration tokens that reach a routed expert.
        notes: how the figures come about.
    """

    disk_bytes: int
    output_bytes: int
    peak_memory_bytes: int
    seconds: float | None
    tokens_per_expert: float | None
    notes: tuple[str, ...] = ()


def matmul_rate(device: torch.device) -> float:
    """fp32 multiply-adds of this machine in FLOP/s, measured in a fraction of a second."""
    size = 768 if device.type == "cpu" else 4096
    left = torch.randn(size, size, device=device)
    (left @ left).sum().item()
    start, rounds = time.perf_counter(), 0
    while time.perf_counter() - start < 0.2:
        (left @ left)[0, 0].item()
        rounds += 1
    return 2 * size**3 * rounds / (time.perf_counter() - start)


def estimate_prune(checkpoint: Checkpoint, plan: Plan) -> Estimate:
    """Pruning copies bytes: the output's size is all that matters."""
    after = estimate_sizes(inventory(checkpoint), checkpoint.shape, plan.experts, None).after_bytes
    return Estimate(
        disk_bytes=after,
        output_bytes=after,
        peak_memory_bytes=64 << 20,
        seconds=None,
        tokens_per_expert=None,
        notes=("Tensors are copied in chunks of 32 MiB; the time is that of the disk.",),
    )


def estimate_forward(checkpoint: Checkpoint, tokens: int, device: torch.device) -> Estimate:
    """Profiling: one forward pass, with the hidden states of all tokens kept."""
    shape = checkpoint.shape
    active = active_parameters(weigh(checkpoint), shape.experts, shape.top_k)
    hidden = tokens * shape.hidden * 4
    return Estimate(
        disk_bytes=2 * hidden,
        output_bytes=shape.experts * shape.layers * 9 * 8 * 8,
        peak_memory_bytes=4 * hidden,
        seconds=2 * active * tokens / matmul_rate(device),
        tokens_per_expert=tokens * shape.top_k / shape.experts,
        notes=("Projected from this machine's matmul rate; reading the weights comes on top.",),
    )


def estimate_quantize(
    checkpoint: Checkpoint, count: int, scheme: Scheme, *, tokens: int, device: torch.device
) -> Estimate:
    """Forward pass twice, Hessians, and the solver's cubic part."""
    shape = checkpoint.shape
    after = estimate_sizes(inventory(checkpoint), shape, count, scheme).after_bytes
    forward = estimate_forward(checkpoint, tokens, device)
    parts = weigh(checkpoint)
    layers = parts[Part.ROUTED].parameters // (3 * shape.hidden * shape.expert_width * shape.experts)
    hidden, width = shape.hidden, shape.expert_width
    # Hessians of the routed tokens; Cholesky and inverse; column loop, sweeps and scale search over the weights.
    hessians = 2 * tokens * shape.top_k * (hidden**2 + width**2)
    factors = count * 2 * (hidden**3 + width**3)
    solving = count * 4 * 2 * (2 * width * hidden**2 + hidden * width**2)
    flops = layers * (hessians + factors + solving)
    return Estimate(
        disk_bytes=after + forward.disk_bytes,
        output_bytes=after,
        peak_memory_bytes=forward.peak_memory_bytes + 4 * 4 * hidden**2 + 40 * 2 * width * hidden,
        seconds=(forward.seconds or 0.0) * 2 + flops / matmul_rate(device),
        tokens_per_expert=tokens * shape.top_k / count,
        notes=("Projected from this machine's matmul rate; reading the weights comes on top.",),
    )
