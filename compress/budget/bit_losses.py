"""What quantizing costs a layer's experts, bits by bits: a few of them are solved while `profile` is at their layer.

The figure is the relative error of an expert's output on tokens that its Hessian has not seen,

    sum_t w_t^2 |f(x_t) - q(x_t)|^2 / sum_t w_t^2 |f(x_t)|^2

with the combine weights w. Times the accumulator `weighted_norm_squared` it is a squared error of the routed output,
the unit of `leave_one_out`, so that removing experts and taking bits away can be weighed against each other.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from moepress.calibration.hessian import gram
from moepress.compress.budget.rounding import rounded_expert
from moepress.compress.budget.sizes import probe_scheme
from moepress.compress.gptq.block_choice import MIX_TYPES, BlockChoice
from moepress.compress.gptq.coded import CodedExpert, QuantizeOptions
from moepress.compress.gptq.experts import experts_at_once, solve_experts
from moepress.compress.gptq.layer_bits import model_dtype, scale_value_dtype
from moepress.compress.gptq.moments import pooled_inputs
from moepress.converters.safetensors.scheme import SUPPORTED_BITS
from moepress.models.families.family import Shape
from moepress.models.forward.streamed import apply_expert, tokens_of
from moepress.models.forward.walk import Stream
from moepress.models.storage.experts import Expert
from moepress.runs.phases import phase

EXPERTS = 4
"""Of every layer, where solving them costs little beside the forward pass."""
TOKENS = 2048
"""Of one expert, at most; three quarters form its Hessian, the rest is held out."""
POOLED_TOKENS = 4096
"""Of the layer, for the Hessian that experts with few tokens are drawn to."""
_PARTS = 4  # so much of the windows is held out
_GOLDEN, _SHIFT = (5**0.5 - 1) / 2, 0.6  # the shift comes nearest to a fourth of few
_FEWEST = (16, 4)  # tokens that an expert needs to form a Hessian and to be measured on
_SHARE = 0.2  # of the forward pass's time that solving may take, where fewer experts will do
_SOLVER_COST = 3.0  # a solver's FLOP against those of a forward pass, in time


Position = tuple[Tensor, Tensor]
"""Tokens of an expert and their slots among the K, as `tokens_of` gives them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """Measures a layer after it was observed; `collect` calls it.

    Attributes:
        scale_dtype, stored_dtype: as in `QuantizeOptions`.
        grids: GGUF's types are measured too.
    """

    scale_dtype: torch.dtype
    stored_dtype: torch.dtype
    grids: bool = False

    def __call__(self, stream: Stream, layer: int, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See `bit_losses`."""
        shape = stream.model.shape
        options = QuantizeOptions(
            scheme=probe_scheme(shape, SUPPORTED_BITS[0]), scale_dtype=self.scale_dtype, stored_dtype=self.stored_dtype
        )
        experts = experts_to_solve(shape, stream.tokens, grids=self.grids)
        return bit_losses(stream, layer, found, options, experts, grids=self.grids)


def bit_loss_probe(config: Mapping[str, Any], *, grids: bool = False) -> Probe:
    """The probe for a model with that config; with `grids` it solves on GGUF's types too."""
    stored = model_dtype(config)
    return Probe(scale_dtype=scale_value_dtype(stored), stored_dtype=stored, grids=grids)


def experts_to_solve(shape: Shape, tokens: int, *, grids: bool = False) -> int:
    """How many experts of a layer: four, or fewer where they are wide and the text is short, one at least."""
    forward = 2.0 * tokens * (shape.top_k + 1) * 3 * shape.hidden * shape.expert_width
    return max(1, min(EXPERTS, round(_SHARE * forward / (_SOLVER_COST * solver_flops(shape, grids=grids)))))


def solver_flops(shape: Shape, *, grids: bool = False) -> float:
    """Of one expert at all widths: ten multiply-adds for each weight and column, and the factors of two Hessians."""
    hidden, width = shape.hidden, shape.expert_width
    each = 10.0 * (2 * width * hidden**2 + hidden * width**2) + 2.0 * (hidden**3 + width**3)
    return (len(SUPPORTED_BITS) + grids * len(MIX_TYPES)) * each


def bit_losses(
    stream: Stream,
    layer: int,
    found: Mapping[str, Tensor],
    options: QuantizeOptions,
    experts: int,
    *,
    grids: bool = False,
) -> dict[str, Tensor]:
    """Solve a sample of a layer's experts at every supported width and measure their outputs.

    Args:
        stream: after the layer was observed; nothing in it is changed.
        layer: an MoE layer.
        found: the layer's accumulators.
        options: of the solver; the bits are replaced.
        experts: how many, spread over the ranking by tokens; each stands for its part of the ranking.
        grids: solve on `MIX_TYPES` too.

    Returns:
        `bit_losses`, fp64 [4], relative errors at `SUPPORTED_BITS`, and `bit_tokens`, fp64 [1], the tokens that they
        were measured on; both 0 where no expert saw enough tokens. With `grids` also `grid_losses`, fp64 [8], at
        `MIX_TYPES` and of matrices that are merely `rounded`.
    """
    held = held_out(stream)
    fit, test = _divided(stream, held)
    enough = [len(a[0]) >= _FEWEST[0] and len(b[0]) >= _FEWEST[1] for a, b in zip(fit, test, strict=True)]
    counts, mass = (found[name].sum(dim=(0, 1)) for name in ("count", "weighted_norm_squared"))
    chosen = spread(counts, mass, torch.tensor(enough), experts)
    schemes = [replace(options, scheme=replace(options.scheme, bits=bits)) for bits in SUPPORTED_BITS]
    ways = [*schemes, *(map(functools.partial(_on_type, options), MIX_TYPES) if grids else ())]
    losses = torch.zeros(len(ways) + grids, dtype=torch.float64)
    with phase("bit losses"):
        pooled, sample = _pooled(stream, held), pooled_inputs(stream, options.hessian)
        names, size = list(chosen), experts_at_once(stream.model, stream.limits.memory_bytes)
        for start in range(0, len(names), size):
            batch = names[start : start + size]
            weights = {e: stream.model.read_expert(layer, e, torch.float32) for e in batch}
            errors = functools.partial(_weighed_error, stream, layer, weights, chosen, test)
            for index, own in enumerate(ways):
                coded = solve_experts(stream, layer, weights, fit, pooled, sample, own)
                losses[index] += errors([_dense(stream, matrices) for matrices in coded])
            if grids:
                losses[-1] += errors([rounded_expert(expert) for expert in weights.values()])
    tokens = float(sum(len(test[e][0]) for e in chosen))
    of_bits = len(SUPPORTED_BITS)
    made = {"bit_losses": losses[:of_bits], "bit_tokens": torch.tensor([tokens], dtype=torch.float64)}
    return made | ({"grid_losses": losses[of_bits:]} if grids else {})


def _weighed_error(
    stream: Stream,
    layer: int,
    originals: Mapping[int, Expert],
    chosen: Mapping[int, float],
    test: Sequence[Position],
    made: Sequence[Expert],
) -> float:
    """`output_error` of those experts, each with the share that it stands for."""
    return sum(
        chosen[expert] * output_error(stream, layer, original, other, test[expert])
        for (expert, original), other in zip(originals.items(), made, strict=True)
    )


def _on_type(options: QuantizeOptions, name: str) -> QuantizeOptions:
    return replace(options, blocks=BlockChoice(name=name.lower(), layers=1, experts=1, shared_heads=1))


def _divided(stream: Stream, held: Tensor) -> tuple[list[Position], list[Position]]:
    """Of every expert some tokens, evenly spread: those for its Hessian and those to measure it on."""
    fit, test = list[Position](), list[Position]()
    for tokens, slots in tokens_of(stream.chosen, stream.model.shape.experts):
        rows = _spread_rows(len(tokens), TOKENS)
        out = held[tokens[rows]]
        fit.append((tokens[rows[~out]], slots[rows[~out]]))
        test.append((tokens[rows[out]], slots[rows[out]]))
    return fit, test


def _spread_rows(count: int, most: int) -> Tensor:
    taken = min(count, most)
    return torch.arange(taken) * count // max(1, taken)


def _dense(stream: Stream, coded: CodedExpert) -> Expert:
    return coded.dense().to(stream.model.device, torch.float32)


def held_out(stream: Stream) -> Tensor:
    """Which tokens no Hessian sees, bool [N * T]: a fourth of the windows, of few windows a fourth of stretches.

    Not every fourth: domains take turns in a corpus, and of four all that is held out would be of one. Multiples of the
    golden ratio take a fourth of whatever comes in turns.
    """
    windows, length = stream.hidden.shape[:2]
    unit = length if windows >= 2 * _PARTS else max(1, stream.tokens // (4 * _PARTS))
    return (torch.arange(stream.tokens) // unit).double().mul(_GOLDEN).add(_SHIFT).frac() >= 1 - 1 / _PARTS


def spread(counts_E: Tensor, mass_E: Tensor, enough_E: Tensor, experts: int) -> dict[int, float]:
    """Experts in the middle of equal parts of the ranking by tokens, with the share of the mass in their part.

    Args:
        counts_E: tokens of every expert.
        mass_E: what they contribute, `weighted_norm_squared`.
        enough_E: which can be measured.
        experts: how many at most.

    Returns:
        expert -> share; the shares sum to 1.
    """
    ranked = sorted(torch.nonzero(enough_E).flatten().tolist(), key=lambda e: (-float(counts_E[e]), e))
    parts = min(experts, len(ranked))
    cut = [ranked[len(ranked) * n // parts : len(ranked) * (n + 1) // parts] for n in range(parts)]
    shares = [float(mass_E[torch.tensor(members)].sum()) for members in cut]
    every = sum(shares)
    return {
        members[len(members) // 2]: share / every if every > 0 else 1 / parts
        for members, share in zip(cut, shares, strict=True)
    }


def _pooled(stream: Stream, held: Tensor) -> Tensor:
    """Mean of x x^T over some of the layer's tokens that are not held out, fp32 [D, D] on the device."""
    rows = torch.nonzero(~held).flatten()
    rows = rows[_spread_rows(len(rows), POOLED_TOKENS)]
    return gram(stream.inputs[rows].to(stream.model.device)) / max(1, len(rows))


def output_error(stream: Stream, layer: int, original: Expert, quantized: Expert, position: Position) -> float:
    """Relative squared error of an expert's output over its tokens, weighted by their squared combine weights."""
    tokens, slots = position
    inputs = stream.inputs[tokens].to(stream.model.device, torch.float32)
    gating = stream.model.gating(layer)
    before, after = (apply_expert(expert, inputs, gating) for expert in (original, quantized))
    weights = stream.weights[tokens, slots].double().square()
    error, energy = (
        float((weights * value.square().sum(dim=1).cpu().double()).sum()) for value in (before - after, before)
    )
    return error / max(energy, 1e-300)
