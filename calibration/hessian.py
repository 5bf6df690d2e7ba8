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
ORIGINAL_BITS = 4
"""With `--match auto`: at 3 bits it takes a quarter of the divergence away, at 4 a seventh (docs/benchmarks.md)."""
END_TOKENS = 8192
"""What `--effort max` takes for `HessianOptions.end_tokens`: of 32,768 a quarter keeps nine tenths of the gain."""
END_BITS = 8
"""With so many bits, errors are too small for it to matter which outputs they are in."""
MOST_END_WEIGHT = 1000
"""Of `HessianOptions.end_weight`: with more, other tokens no longer count."""
_ROWS_AT_ONCE = 8192
_CPU = torch.device("cpu")
_NARROW = 1024  # columns; narrower Hessians are formed in narrower strips
_STRIPS, _STRIP_ON_GPU = (128, 256), 1024  # columns that are formed together, of narrow and of wide ones


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
        end_tokens: tokens of the text whose gradients say what errors of outputs cost at the end of the network
            (`calibration.ends`); 0 for none, and then errors of all outputs of a matrix count alike.
        end_floor: so many times the identity is added to what they say, whose mean diagonal is 1.
        independent: every layer is solved on what reaches it in the *original* model, so that no layer waits for
            another; `asymmetry` then draws a matrix to what the original ones of its own expert give.
        end_weight: how many times a token near the end of an answer or of reasoning counts (`calibration.answer_ends`);
            1: as any other.
        end_marks: the tokens that are such ends.
    """

    weight_power: int = 0
    shrinkage_tokens: float = 128.0
    pooled_tokens: int = 1024
    least_tokens: int = 0
    asymmetry: float = 0.0
    end_tokens: int = 0
    end_floor: float = 0.3
    independent: bool = False
    end_weight: float = 1.0
    end_marks: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.asymmetry <= 1:
            raise ValueError(f"{self}: need 0 <= asymmetry <= 1.")
        if self.least_tokens < 0:
            raise ValueError(f"{self}: need least_tokens >= 0.")
        if self.end_tokens < 0 or self.end_floor <= 0:
            raise ValueError(f"{self}: need end_tokens >= 0 and end_floor > 0.")
        if not 1 <= self.end_weight <= MOST_END_WEIGHT:
            raise ValueError(f"{self}: need 1 <= end_weight <= {MOST_END_WEIGHT}.")


def matches_original(match: str, bits: int, layer_bits: Mapping[int, int], effort: str = "normal") -> bool:
    """Whether targets come from the original: with auto where a layer gets at most `ORIGINAL_BITS`, time allowing.

    Args:
        match: own, original or auto.
        bits: of the scheme.
        layer_bits: layer -> its bits, where they are not the scheme's.
        effort: with `fast`, auto does without.
    """
    few = min([bits, *layer_bits.values()]) <= ORIGINAL_BITS
    return match == "original" or (match == "auto" and few and effort != "fast")


def hessian_for(
    match: str, bits: int, layer_bits: Mapping[int, int], effort: str = "normal", end_weight: float = 1.0
) -> HessianOptions:
    """The options for `--match`, `--effort` and `--end-weight`; other arguments as of `matches_original`."""
    original = matches_original(match, bits, layer_bits, effort)
    few = min([bits, *layer_bits.values()]) < END_BITS
    return HessianOptions(
        asymmetry=ORIGINAL_ASYMMETRY if original else 0.0,
        end_tokens=END_TOKENS if few and effort == "max" else 0,
        end_weight=end_weight,
    )


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

    def gather(
        self,
        inputs_TI: Tensor,
        originals_TI: Tensor | None = None,
        weights_T: Tensor | None = None,
        *,
        scale: float = 1.0,
    ) -> None:
        """Add so many times the sums over more tokens, in place: of the Hessian the lower triangle, see `complete`.

        Arguments as of `moments`.
        """
        add_gram(self.hessian, inputs_TI, weights_T, scale=scale)
        if self.cross is not None and originals_TI is not None:
            add_cross(self.cross, inputs_TI, originals_TI, weights_T, scale=scale)

    def complete(self) -> "Moments":
        """Fill in what `gather` leaves out; itself."""
        mirror(self.hessian)
        return self

    def times(self, scale: float, out: Tensor | None = None) -> "Moments":
        """So many times the same, to gather more into; the Hessian in `out` [I, I], where that is given."""
        hessian = torch.mul(self.hessian, scale, out=out)
        return Moments(hessian=hessian, cross=None if self.cross is None else self.cross * scale)

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
    size = inputs_TI.shape[1]
    out = torch.zeros(size, size, dtype=torch.float32, device=inputs_TI.device)
    add_cross(out, inputs_TI, originals_TI, weights_T)
    return out


def add_cross(
    out_II: Tensor, inputs_TI: Tensor, originals_TI: Tensor, weights_T: Tensor | None = None, *, scale: float = 1.0
) -> None:
    """Add so many times `cross`, in place."""
    tokens, size = inputs_TI.shape
    with phase("Hessian", flops=2.0 * tokens * size * size):
        for start in range(0, tokens, _ROWS_AT_ONCE):
            rows = slice(start, start + _ROWS_AT_ONCE)
            part = inputs_TI[rows].float()
            moved = originals_TI[rows].float() - part
            if weights_T is not None:
                moved.mul_(weights_T[rows, None].float())
            out_II.addmm_(moved.T, part, alpha=scale)


def gram(inputs_TI: Tensor, weights_T: Tensor | None = None) -> Tensor:
    """sum_t a_t x_t x_t^T, fp32 [I, I]; zero for no tokens.

    Args:
        inputs_TI: any float dtype.
        weights_T: a_t >= 0, or None for 1.
    """
    size = inputs_TI.shape[1]
    with phase("Hessian"):
        out = torch.zeros(size, size, dtype=torch.float32, device=inputs_TI.device)
        add_gram(out, inputs_TI, weights_T)
        return mirror(out)


def add_gram(out_II: Tensor, inputs_TI: Tensor, weights_T: Tensor | None = None, *, scale: float = 1.0) -> None:
    """Add so many times `gram` to the lower triangle, in place: half of the work where it is wide. `mirror` ends it."""
    tokens, size = inputs_TI.shape
    strip = _strip(size, inputs_TI.device)
    with phase("Hessian", flops=gram_flops(tokens, size, inputs_TI.device)):
        for start in range(0, tokens, _ROWS_AT_ONCE):
            part = inputs_TI[start : start + _ROWS_AT_ONCE].float()
            if weights_T is not None:
                part = part * weights_T[start : start + _ROWS_AT_ONCE, None].float().sqrt()
            for first in range(0, size, strip):
                columns = slice(first, first + strip)
                out_II[first:, columns].addmm_(part[:, first:].T, part[:, columns], alpha=scale)


def mirror(out_II: Tensor) -> Tensor:
    """Copy the lower triangle of a square matrix into the upper one, in place, but for the strips' own squares."""
    strip = _strip(len(out_II), out_II.device)
    for first in range(strip, len(out_II), strip):
        columns = slice(first, first + strip)
        out_II[:first, columns] = out_II[columns, :first].T
    return out_II


def _strip(size: int, device: torch.device) -> int:
    if device.type != "cpu":
        return _STRIP_ON_GPU
    return _STRIPS[size >= _NARROW]


def gram_flops(tokens: int, size: int, device: torch.device = _CPU) -> float:
    """What `gram` computes: two per token and entry of the strips below the diagonal."""
    strip = _strip(size, device)
    return 2.0 * tokens * sum((size - first) * min(strip, size - first) for first in range(0, size, strip))


def shares(tokens: int, mass: float, tau: float) -> tuple[float, float]:
    """What the Hessian used for an expert is: so many times the sum over its own tokens, and so many the pooled mean.

    It is the own mean, drawn towards the pooled one where tokens are few.

    Args:
        tokens: number of the expert's tokens.
        mass: sum of a_t.
        tau: shrinkage in tokens.
    """
    own = tokens / (tokens + tau) if tokens else 0.0
    return own / mass if mass > 0 else 0.0, 1 - own
