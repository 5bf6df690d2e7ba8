"""What removing experts and taking bits away costs, estimated from a profile in one unit, for `compress.budget.search`.

The unit is the squared error of the routed output as a share of its square, mean over layers, and over domains with
their weights. Experts that go cost twice the sum of their leave-one-out losses, which is what each would cost alone:
together they cost more, and their errors do not average out as those of rounding do. Bits cost the relative
error of sampled experts (`compress.budget.bit_losses`) times what all experts contribute: the tokens of an expert that
goes pass through another one, which is quantized too.

Where the profile has losses by kind of matrix, the unit is the KL divergence in nats per token instead
(`compress.budget.divergences`), which counts what is quantized besides the experts as well.
"""

import itertools
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from moepress.calibration.profile import BIT_LOSSES, BIT_TOKENS, Profile, Statistic
from moepress.compress.budget.divergences import Divergences, divergences_of, require_all
from moepress.compress.budget.search import Beside, Space, Unit, Width
from moepress.compress.budget.sizes import Linear, dense_bytes, linears_bytes, part_sizes
from moepress.compress.gptq.include import PART_BITS, Include, included_as
from moepress.compress.gptq.kinds import KINDS
from moepress.converters.safetensors.scheme import SUPPORTED_BITS, Scheme
from moepress.errors import InvalidInputError
from moepress.models.families.family import Part, Shape

PRUNING_WEIGHT = 2.0
"""Measured: for the same squared error of a layer, the KL divergence after pruning is 1.8 to 2.8 times that after
quantizing (docs/benchmarks.md); below the middle of it, for the share grows with the number of experts that go."""


def space_of(
    profile: Profile,
    kept: Mapping[int, Mapping[int, Sequence[int]]],
    *,
    weights: Mapping[str, float],
    widths: Sequence[Width],
    group_size: int,
    linears: Sequence[Linear] = (),
    free: Collection[Include] = (),
) -> Space:
    """Bytes and losses of every count and width.

    Args:
        profile: with leave-one-out losses and bit losses; with losses by kind too the unit is another.
        kept: count -> layer -> the experts that stay, for every count to choose from.
        weights: of the domains.
        widths: bits to choose from, or only None.
        group_size: of the quantized matrices.
        linears: quantized besides the experts, in their bits; what that costs is in the loss if it is a divergence.
        free: parts of these whose bits are to be chosen too, for a profile with losses by kind.

    Raises:
        InvalidInputError: the profile lacks what the estimate needs.
    """
    layers, bits = profile.layers, [width for width in widths if width is not None]
    _require_losses(profile, bits=bool(bits))
    sizes = bare_space(
        profile.inventory,
        profile.shape,
        len(layers),
        counts=tuple(kept),
        widths=widths,
        group_size=group_size,
        linears=linears,
        free=free,
    )
    found = divergences_of(profile)
    if found is not None:
        require_all(found.rows, found.places, profile.shape.layers)
        pruned = pruning_losses(found, profile, kept, weights)
        return replace(_in_nats(sizes, found, layers, linears), pruned=pruned)
    removal, contribution = removal_shares(profile, weights)
    errors = _errors(profile) if bits else {}
    pruned = {}
    for count, stay in kept.items():
        lost = sum(float(removal[n].sum() - removal[n].take(stay[n]).sum()) for n in layers)
        pruned[count] = PRUNING_WEIGHT * max(0.0, lost) / len(layers)
    quantized: dict[int, Mapping[Width, float]] = {
        n: {w: 0.0 if w is None else errors[n][w] * contribution[n] / len(layers) for w in widths} for n in layers
    }
    return replace(sizes, pruned=pruned, quantized=quantized)


def pruning_losses(
    found: Divergences, profile: Profile, kept: Mapping[int, Mapping[int, Sequence[int]]], weights: Mapping[str, float]
) -> dict[int, float]:
    """Count -> divergence by the experts that go; arguments as in `space_of`."""
    lost, contribution = removal_shares(profile, weights)
    slopes = {n: found.whole * PRUNING_WEIGHT * found.slope(n, contribution[n]) for n in profile.layers}
    return {
        count: sum(slopes[n] * max(0.0, float(lost[n].sum() - lost[n].take(stay[n]).sum())) for n in profile.layers)
        for count, stay in kept.items()
    }


def _in_nats(sizes: Space, found: Divergences, layers: Sequence[int], linears: Sequence[Linear]) -> Space:
    """With divergences by the bits of the routed experts and of all else that is quantized."""
    widths = next(iter(sizes.layer.values()))
    free = sizes.besides[0].include
    fixed = [n for n in linears if included_as(n.part) not in free]

    def lost(some: Iterable[Linear], width: Width) -> float:
        places = {(KINDS[n.part], n.layer, n.bits or width) for n in some}
        return math.fsum(found.of_matrices(kind, layer, bits) for kind, layer, bits in places if bits is not None)

    by_layer = {n: [linear for linear in fixed if linear.routed and linear.layer == n] for n in layers}
    outside = [linear for linear in fixed if not linear.routed]
    parts = {part: [replace(n, bits=None) for n in linears if included_as(n.part) is part] for part in free}
    quantized: dict[int, Mapping[Width, float]] = {
        n: {w: 0.0 if w is None else found.of_experts(n, w) + lost(own, w) for w in widths}
        for n, own in by_layer.items()
    }
    return replace(
        sizes,
        quantized=quantized,
        outside_losses={w: lost(outside, w) for w in widths},
        besides=tuple(
            replace(beside, loss=math.fsum(lost(parts[part], bits) for part, bits in beside.include.items()))
            for beside in sizes.besides
        ),
        unit=Unit.NATS,
    )


def bare_space(
    inventory: Mapping[str, Any],
    shape: Shape,
    layers: int,
    *,
    counts: Sequence[int],
    widths: Sequence[Width],
    group_size: int,
    linears: Sequence[Linear] = (),
    free: Collection[Include] = (),
) -> Space:
    """The bytes alone, without a profile: an expert that goes costs 1; bits cost less and so fill what is left."""
    rest, sizes = dict[int, int](), dict[int, Mapping[Width, int]]()
    fixed = [n for n in linears if included_as(n.part) not in free]
    inside, outside = [n for n in fixed if n.routed], [n for n in fixed if not n.routed]
    schemes = {w: Scheme(bits=w, group_size=group_size) for w in widths if w is not None}
    beside: dict[Width, int] = {
        w: _up(linears_bytes(inventory, inside, scheme) / layers) for w, scheme in schemes.items()
    }
    plain = dense_bytes(inventory, linears) if schemes else 0.0
    losses: dict[Width, float] = {w: 0.0 if w is None else 4.0**-w / layers for w in widths}
    for count in counts:
        parts = {w: part_sizes(inventory, shape, count, _scheme(w, group_size)) for w in widths}
        rest[count] = max(_up(sum(p.values()) - p[Part.ROUTED] - plain) for p in parts.values())
        sizes[count] = {w: _up(p[Part.ROUTED] / layers) + beside.get(w, 0) for w, p in parts.items()}
    return Space(
        rest=rest,
        layer=sizes,
        pruned={count: float(shape.experts - count) for count in counts},
        quantized=dict.fromkeys(range(layers), losses),
        outside={w: linears_bytes(inventory, outside, scheme) for w, scheme in schemes.items()},
        besides=_besides(inventory, [n for n in linears if included_as(n.part) in free], group_size),
    )


def _besides(inventory: Mapping[str, Any], linears: Sequence[Linear], group_size: int) -> tuple[Beside, ...]:
    """Parts whose bits are free, at each of `PART_BITS`, in all combinations; their losses are not known here."""
    parts: dict[Include, list[Linear]] = {}
    for linear in linears:
        if (part := included_as(linear.part)) is not None:
            parts.setdefault(part, []).append(linear)
    sizes = {
        (part, bits): linears_bytes(
            inventory, [replace(linear, bits=bits) for linear in own], Scheme(bits=bits, group_size=group_size)
        )
        for part, own in sorted(parts.items())
        for bits in PART_BITS
    }
    ways = itertools.product(PART_BITS, repeat=len(parts))
    includes = [dict(zip(sorted(parts), way, strict=True)) for way in ways]
    return tuple(
        Beside(include=include, size=sum(sizes[part, bits] for part, bits in include.items())) for include in includes
    )


def _up(size: float) -> int:
    return int(-(-size // 1))


def _scheme(width: Width, group_size: int) -> Scheme | None:
    return None if width is None else Scheme(bits=width, group_size=group_size)


def _require_losses(profile: Profile, *, bits: bool) -> None:
    if not any(bool(profile.statistics[n]["leave_one_out"].any()) for n in profile.layers):
        raise InvalidInputError(
            "A budget weighs experts by their leave-one-out losses and the profile has none; profile again without "
            "--no-loo."
        )
    if bits and not any(BIT_LOSSES in s and bool(s[BIT_TOKENS].any()) for s in profile.statistics.values()):
        raise InvalidInputError(
            "A budget weighs bits by losses that `profile` measures, and this profile has none (a `run` without budget "
            "measures none); profile again with `moepress profile`, without --no-bit-losses and on enough text."
        )


def removal_shares(profile: Profile, weights: Mapping[str, float]) -> tuple[dict[int, Statistic], dict[int, float]]:
    """Per layer: what removing each expert costs, fp64 [E], and what all contribute, as shares of the routed output."""
    weight_S = np.array([weights.get(d, 1.0) for d in profile.domains])
    removal, contribution = {}, {}
    for layer in profile.layers:
        found = profile.statistics[layer]
        whole_S = found["routed_squared"].sum(axis=1)
        share_S = np.where(whole_S > 0, weight_S / weight_S.sum() / np.maximum(whole_S, 1e-300), 0.0)
        removal[layer] = (share_S[:, None] * found["leave_one_out"].sum(axis=1)).sum(axis=0)
        contribution[layer] = float((share_S * found["weighted_norm_squared"].sum(axis=(1, 2))).sum())
    return removal, contribution


def _errors(profile: Profile) -> dict[int, dict[int, float]]:
    """Per layer, width -> relative error of an expert's output; the mean of the others where none was measured."""
    measured = {
        n: s[BIT_LOSSES] for n, s in profile.statistics.items() if BIT_LOSSES in s and bool(s[BIT_TOKENS].any())
    }
    mean = np.stack(list(measured.values())).mean(axis=0)
    return {n: dict(zip(SUPPORTED_BITS, measured.get(n, mean).tolist(), strict=True)) for n in profile.layers}
