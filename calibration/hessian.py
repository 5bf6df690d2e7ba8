"""Hessians of the layer-wise reconstruction error: H = sum_t a_t x_t x_t^T over the tokens that reach a matrix.

Where the original model's inputs x~ are known too, the cross moments C = sum_t a_t (x~_t - x_t) x_t^T go with it.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from moepress.runs.phases import phase

ORIGINAL_ASYMMETRY = 1.0
"""What `--match original` takes for `HessianOptions.asymmetry`."""
ORIGINAL_BITS = 3
"""With `--match auto`: at 3 bits it takes a quarter of the divergence away, at 4 a sixth (docs/benchmarks.md)."""
_ROWS_AT_ONCE = 8192
_STRIP = 256  # columns of a Hessian that are formed together: what is above them is not computed


@dataclass(frozen=True, slots=True, kw_only=True)
class HessianOptions:
    """How tokens are weighed.

    Attributes:
        weight_power: a_t = w^power with the token's combine weight w; 0 counts every token alike, 2 is the error that
            reaches the residual stream (MoEQuant's AGQ uses 1).
        shrinkage_tokens: tau; an expert with n tokens gets n / (n + tau) of its own mean Hessian and tau / (n + tau)
            of the layer's pooled one, so that an expert without tokens falls back to the pooled one.
        pooled_tokens: tokens of the layer that the pooled Hessian of `down` is formed of, by sending them through the
            expert as if they had been routed to it; with n tokens of its own n fewer, but at least a quarter.
        least_tokens: an expert that fewer tokens chose is topped up to so many, in its Hessians alone, with those that
            the router ranks next for it (`compress.gptq.balance`); they count for `shrinkage_tokens`. 0 for never; then
            no router logits are kept.
        asymmetry: how far a matrix is drawn to what the *original* model's inputs give (`compress.gptq.asymmetry`): 0,
            not at all, and no second stream of hidden states is kept; 1, all the way.
    """

    weight_power: int = 0
    shrinkage_tokens: float = 128.0
    pooled_tokens: int = 1024
    least_tokens: int = 0
    asymmetry: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.asymmetry <= 1:
            raise ValueError(f"{self}: need 0 <= asymmetry <= 1.")
        if self.least_tokens < 0:
            raise ValueError(f"{self}: need least_tokens >= 0.")


def matches_original(match: str, bits: int, layer_bits: Mapping[int, int]) -> bool:
    """Whether targets come from the original: with auto where a layer gets at most `ORIGINAL_BITS`.

    Args:
        match: own, original or auto.
        bits: of the scheme.
        layer_bits: layer -> its bits, where they are not the scheme's.
    """
    return match == "original" or (match == "auto" and min([bits, *layer_bits.values()]) <= ORIGINAL_BITS)


def hessian_for(match: str, bits: int, layer_bits: Mapping[int, int]) -> HessianOptions:
    """The options for `--match`, all else as it is by default; arguments as of `matches_original`."""
    return HessianOptions(asymmetry=ORIGINAL_ASYMMETRY if matches_original(match, bits, layer_bits) else 0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Moments:
    """Second moments of what reaches a matrix, sums or means.

    Attributes:
        hessian: of a x x^T, fp32 [I, I].
        cross: of a (x~ - x) x^T, fp32 [I, I], x~ being the input of the same token in the original model; None where
            only x is known.
    """

    hessian: Tensor
    cross: Tensor | None = None

    def add(self, other: "Moments") -> None:
        """Add sums over more tokens, in place."""
        self.hessian.add_(other.hessian)
        if self.cross is not None and other.cross is not None:
            self.cross.add_(other.cross)

    def over(self, tokens: float) -> "Moments":
        """Means, from sums over so many tokens."""
        return Moments(hessian=self.hessian / tokens, cross=None if self.cross is None else self.cross / tokens)


def moments(inputs_TI: Tensor, originals_TI: Tensor | None = None, weights_T: Tensor | None = None) -> Moments:
    """Sums over tokens; zero for none.

    Args:
        inputs_TI: x, any float dtype.
        originals_TI: x~ of the same tokens, or None.
        weights_T: a_t >= 0, or None for 1.
    """
    crossed = None if originals_TI is None else cross(inputs_TI, originals_TI, weights_T)
    return Moments(hessian=gram(inputs_TI, weights_T), cross=crossed)


def cross(inputs_TI: Tensor, originals_TI: Tensor, weights_T: Tensor | None = None) -> Tensor:
    """sum_t a_t (x~_t - x_t) x_t^T, fp32 [I, I]; arguments as of `moments`."""
    tokens, size = inputs_TI.shape
    with phase("Hessian", flops=2.0 * tokens * size * size):
        out = torch.zeros(size, size, dtype=torch.float32, device=inputs_TI.device)
        for start in range(0, tokens, _ROWS_AT_ONCE):
            rows = slice(start, start + _ROWS_AT_ONCE)
            part = inputs_TI[rows].float()
            moved = originals_TI[rows].float() - part
            if weights_T is not None:
                moved.mul_(weights_T[rows, None].float())
            out.addmm_(moved.T, part)
    return out


def gram(inputs_TI: Tensor, weights_T: Tensor | None = None) -> Tensor:
    """sum_t a_t x_t x_t^T, fp32 [I, I]; zero for no tokens.

    Args:
        inputs_TI: any float dtype.
        weights_T: a_t >= 0, or None for 1.
    """
    tokens, size = inputs_TI.shape
    with phase("Hessian", flops=gram_flops(tokens, size)):
        out = torch.zeros(size, size, dtype=torch.float32, device=inputs_TI.device)
        for start in range(0, tokens, _ROWS_AT_ONCE):
            part = inputs_TI[start : start + _ROWS_AT_ONCE].float()
            if weights_T is not None:
                part = part * weights_T[start : start + _ROWS_AT_ONCE, None].float().sqrt()
            for strip in range(0, size, _STRIP):  # only the lower triangle: half of the work where it is wide
                out[strip:, strip : strip + _STRIP].addmm_(part[:, strip:].T, part[:, strip : strip + _STRIP])
        for strip in range(_STRIP, size, _STRIP):
            out[:strip, strip : strip + _STRIP] = out[strip : strip + _STRIP, :strip].T
    return out


def gram_flops(tokens: int, size: int) -> float:
    """What `gram` computes: two per token and entry of the strips below the diagonal."""
    return 2.0 * tokens * sum((size - strip) * min(_STRIP, size - strip) for strip in range(0, size, _STRIP))


def shrink(own_II: Tensor, mass: float, tokens: int, pooled_II: Tensor, tau: float) -> Tensor:
    """The Hessian used for an expert: its own mean, drawn towards the pooled mean where tokens are few.

    Args:
        own_II: sum of a_t x_t x_t^T over the expert's tokens; becomes the result.
        mass: sum of a_t.
        tokens: number of the expert's tokens.
        pooled_II: mean of x_t x_t^T over the layer's tokens.
        tau: shrinkage in tokens.
    """
    share = tokens / (tokens + tau) if tokens else 0.0
    return own_II.mul_(share / mass if mass > 0 else 0.0).add_(pooled_II, alpha=1 - share)


def shrink_moments(own: Moments, mass: float, tokens: int, pooled: Moments, tau: float) -> Moments:
    """`shrink` of both moments alike, so that they stay those of one mixture of tokens."""
    crossed = None
    if own.cross is not None and pooled.cross is not None:
        crossed = shrink(own.cross, mass, tokens, pooled.cross, tau)
    return Moments(hessian=shrink(own.hessian, mass, tokens, pooled.hessian, tau), cross=crossed)
