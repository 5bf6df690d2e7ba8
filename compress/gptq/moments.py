"""Hessians of an expert's matrices, and cross moments with what the original model gives (`calibration.hessian`)."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moepress.calibration.hessian import HessianOptions, Moments, add_cross, add_gram, mirror, shares
from moepress.compress.gptq import counting
from moepress.compress.gptq.coded import Matrix
from moepress.models.forward.walk import Stream
from moepress.models.storage.experts import Expert
from moepress.runs.phases import phase

_ROWS_AT_ONCE, _POOLED_AT_ONCE = 8192, 65536


def pooled_inputs(stream: Stream, options: HessianOptions) -> Tensor:
    """A fixed, evenly spread sample of the layer's tokens [P, D], for Hessians of experts with few tokens."""
    rows = pooled_rows(stream, options)
    with phase("Hessian"):
        return stream.inputs[rows].to(stream.model.device)


def pooled_rows(stream: Stream, options: HessianOptions) -> Tensor:
    """Which of the layer's tokens these are, int64 [P]."""
    count, window = min(options.pooled_tokens, stream.tokens), stream.hidden.shape[1]
    rows = torch.arange(count) * stream.tokens // max(count, 1)
    if (step := stream.tokens // max(count, 1)) > window:  # domains take turns, window by window: no step is to follow
        rows += (torch.arange(count, dtype=torch.float64).mul((5**0.5 - 1) / 2).frac() * step).long()
    return rows


def pooled_hessian(stream: Stream) -> Tensor:
    """Mean of x x^T over all tokens of the layer, weighted where some count more, fp32 [D, D] on the device."""
    device = stream.model.device
    total = torch.zeros(stream.model.shape.hidden, stream.model.shape.hidden, device=device)
    with phase("Hessian"):
        for _, part, weights in _pooled_parts(stream):
            add_gram(total, part, weights)
            stream.touch(len(part))
        return mirror(total).div_(max(stream.tokens, 1))


def _pooled_parts(stream: Stream) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
    """All tokens of the layer, so many at once: which, their inputs, and how much they count."""
    device = stream.model.device
    for start in range(0, stream.tokens, _POOLED_AT_ONCE):
        rows = slice(start, start + _POOLED_AT_ONCE)
        weights = counting.of_tokens(stream, rows)
        yield rows, stream.inputs[rows].to(device), None if weights is None else weights.to(device)


@dataclass(frozen=True, slots=True, kw_only=True)
class Originals:
    """What the original model gives the same tokens before a layer's experts, where it is walked too.

    Attributes:
        stream: after the layer's first step.
        pooled: mean of (x~ - x) x^T over all tokens of the layer, fp32 [D, D] on the device.
        sample: `pooled_inputs` of that stream.
    """

    stream: Stream
    pooled: Tensor
    sample: Tensor


def originals_of(stream: Stream, reference: Stream, options: HessianOptions) -> Originals:
    """Everything of a layer that does not depend on the expert, once both streams have done its first step."""
    device = stream.model.device
    total = torch.zeros(stream.model.shape.hidden, stream.model.shape.hidden, device=device)
    with phase("Hessian"):
        for rows, part, weights in _pooled_parts(stream):
            add_cross(total, part, reference.inputs[rows].to(device), weights)
            stream.touch(2 * len(part))
        total /= max(stream.tokens, 1)
    return Originals(stream=reference, pooled=total, sample=pooled_inputs(reference, options))


def token_weights(stream: Stream, position: tuple[Tensor, Tensor], options: HessianOptions) -> Tensor | None:
    """a_t of an expert's tokens, or None for 1."""
    counted = counting.of_tokens(stream, position[0])
    if options.weight_power == 0:
        return counted
    combined = stream.weights[position[0], position[1]].pow(options.weight_power)
    return combined if counted is None else combined * counted.to(combined.device)


def _slices(tokens: int) -> list[slice]:
    """An expert's tokens in parts: of a model with few experts one of them may see most of the text."""
    return [slice(start, start + _ROWS_AT_ONCE) for start in range(0, tokens, _ROWS_AT_ONCE)]


def _slices_of(stream: Stream, tokens: Tensor, chose: int) -> list[list[slice]]:
    """The same, of parts that are multiplied each by itself: of tokens that chose the expert those of `Stream.parts`,
    of others, with which it was topped up, any."""
    parts = stream.parts(tokens[:chose])
    parts += [slice(chose + some.start, min(chose + some.stop, len(tokens))) for some in _slices(len(tokens) - chose)]
    together: list[list[slice]] = []
    for part in parts:
        if together and part.stop - together[-1][0].start <= _ROWS_AT_ONCE:
            together[-1].append(part)
        else:
            together.append([part])
    return together


def _mass(weights: Tensor | None, tokens: int) -> float:
    return float(tokens) if weights is None else float(weights.sum())


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """What reaches the experts of a layer."""

    stream: Stream
    originals: Originals | None
    options: HessianOptions

    def rows(self, tokens: Tensor, weights: Tensor | None, rows: slice) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Some of an expert's tokens, on the device: inputs, those in the original model, and weights."""
        tokens = tokens[rows]
        device = self.stream.model.device
        part = self.stream.inputs[tokens].to(device)
        self.stream.touch(len(part) * (1 if self.originals is None else 2))
        original = None if self.originals is None else self.originals.stream.inputs[tokens].to(device)
        return part, original, None if weights is None else weights[rows].to(device)


def input_moments(
    inputs: Inputs, position: tuple[Tensor, Tensor], pooled_DD: Tensor, out_DD: Tensor | None = None
) -> Moments:
    """The Hessian used for an expert's gate and up, in `out` where that is given, and its C."""
    options, tokens, originals = inputs.options, len(position[0]), inputs.originals
    weights = token_weights(inputs.stream, position, options)
    with phase("Hessian"):
        own, rest = shares(tokens, _mass(weights, tokens), options.shrinkage_tokens)
        found = Moments(hessian=pooled_DD, cross=originals.pooled if originals else None).times(rest, out_DD)
        for rows in _slices(tokens):
            found.gather(*inputs.rows(position[0], weights, rows), scale=own)
        return found.complete()


def down_moments(
    inputs: Inputs,
    layer: int,
    position: tuple[Tensor, Tensor],
    sample_PD: Tensor,
    gate_up: tuple[Matrix | None, Matrix],
    original: Expert,
    out_FF: Tensor | None = None,
    *,
    chose: int,
    keep: bool,
) -> tuple[Moments, Tensor | None]:
    """Like `input_moments`, of the intermediate that the quantized gate and up give, and that the original ones do.

    The hidden units of different experts have nothing in common, so the pooled Hessian is that of a sample of the
    layer's tokens sent through this expert. What the quantized ones give, [T, F], is returned too, to be kept: of the
    first `chose` tokens, which chose this expert, in the very products in which `walk.add_output` would form it.
    """
    model, tokens, options, originals = inputs.stream.model, len(position[0]), inputs.options, inputs.originals
    crossed = originals is not None or (options.independent and options.asymmetry > 0)
    streams, gating = 2 if crossed else 1, model.gating(layer)
    picked = picked_tokens(len(sample_PD), tokens)
    flops = 2.0 * streams * (tokens + len(picked)) * sum(m.codes.numel() for m in gate_up if m is not None)
    with phase("Hessian", flops=flops):
        kept: list[Tensor] = []
        whole = original.to(model.device, model.dtype)
        gate = None if gate_up[0] is None else gate_up[0].dense(model.device).to(model.dtype)
        quantized = replace(whole, gate=gate, up=gate_up[1].dense(model.device).to(model.dtype))
        weights = token_weights(inputs.stream, position, options)
        own, rest = shares(tokens, _mass(weights, tokens), options.shrinkage_tokens)
        width = original.down.shape[1]
        nothing = torch.zeros(width, width, device=model.device) if out_FF is None else out_FF.zero_()
        found = Moments(hessian=nothing, cross=torch.zeros_like(nothing) if crossed else None)

        def gather(
            inputs_TD: Tensor, originals_TD: Tensor | None, weights_T: Tensor | None, scale: float, sizes: Sequence[int]
        ) -> Tensor:
            aimed_TD = inputs_TD if options.independent else originals_TD
            aim = None if aimed_TD is None or not crossed else gating.intermediate(whole, aimed_TD)
            got = torch.cat([gating.intermediate(quantized, part) for part in inputs_TD.split(sizes)])
            found.gather(got, aim, weights_T, scale=scale)
            return got

        pooled = sample_PD[picked], originals.sample[picked] if originals else None
        counted = counting.of_tokens(inputs.stream, pooled_rows(inputs.stream, options)[picked])
        rest /= _mass(counted, len(picked)) or 1.0
        gather(*pooled, None if counted is None else counted.to(model.device), rest, [len(picked)])
        for parts in _slices_of(inputs.stream, position[0], chose):
            rows = slice(parts[0].start, parts[-1].stop)
            got = gather(*inputs.rows(position[0], weights, rows), own, [part.stop - part.start for part in parts])
            if keep:
                kept.append(got)
        return found.complete(), torch.cat(kept) if len(kept) > 1 else next(iter(kept), None)


def picked_tokens(sampled: int, tokens: int) -> Tensor:
    """Which of the layer's sampled tokens an expert with so many of its own is shown besides, spread evenly.

    They weigh as much as 128 tokens together: an expert that has many is told little by them, and each costs as much as
    one of its own.
    """
    count = max(sampled // 4, sampled - tokens)
    return torch.arange(count) * sampled // max(count, 1)
