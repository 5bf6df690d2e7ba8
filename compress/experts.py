"""GPTQ for the routed experts of a layer: Hessians of a few experts at a time, solved as one batch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moepress.calibration.hessian import HessianOptions, gram, shrink
from moepress.compress.gptq import Solved, SolverOptions, solve
from moepress.converters.artifact import dense
from moepress.converters.scheme import Scheme
from moepress.models.experts import Expert
from moepress.models.family import Shape
from moepress.models.forward import StreamedModel
from moepress.models.walk import Stream
from moepress.phases import phase

_ROWS_AT_ONCE = 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizeOptions:
    """How matrices are quantized.

    Attributes:
        scheme: bits and group size.
        scale_dtype: dtype the scales are rounded to before codes are chosen.
        stored_dtype: dtype the scales are stored in, the model's.
        hessian: how tokens are weighed.
        solver: options of the GPTQ solver.
    """

    scheme: Scheme
    scale_dtype: torch.dtype
    stored_dtype: torch.dtype
    hessian: HessianOptions = field(default_factory=HessianOptions)
    solver: SolverOptions = field(default_factory=SolverOptions)


@dataclass(frozen=True, slots=True, kw_only=True)
class Coded:
    """A quantized matrix: codes int8 [O, I], scales [O, G] in the dtype they are stored in, on the CPU."""

    codes: Tensor
    scales: Tensor

    def dense(self) -> Tensor:
        """What it stands for, [O, I], in the scales' dtype."""
        return dense(self.codes, self.scales)


@dataclass(frozen=True, slots=True, kw_only=True)
class CodedExpert:
    """One quantized expert and what is known of its error.

    Attributes:
        gate, up, down: the matrices.
        tokens: calibration tokens that reached it.
        error: relative output error of gate/up and of down on its Hessians, ||(W - Q) X||^2 / ||W X||^2.
        rounded: a Hessian could not be factorised and the matrix was rounded to nearest.
    """

    gate: Coded
    up: Coded
    down: Coded
    tokens: int
    error: tuple[float, float]
    rounded: bool

    def expert(self, model: StreamedModel) -> Expert:
        """Dequantized, on the model's device, in its compute dtype."""
        return Expert(gate=self.gate.dense(), up=self.up.dense(), down=self.down.dense()).to(model.device, model.dtype)


def experts_at_once(model: StreamedModel, memory_bytes: int) -> int:
    """How many experts of a model fit into a quarter of the memory limit while they are solved."""
    return experts_that_fit(model.shape, memory_bytes)


def experts_that_fit(shape: Shape, memory_bytes: int) -> int:
    """`experts_at_once` of any model of that shape, one at least."""
    hessians = 4 * shape.hidden * shape.hidden
    matrices = 10 * 2 * shape.expert_width * shape.hidden
    return max(1, min(shape.experts, memory_bytes // 4 // (4 * (hessians + matrices))))


def pooled_inputs(stream: Stream, options: HessianOptions) -> Tensor:
    """A fixed, evenly spread sample of the layer's tokens [P, D], for Hessians of experts with few tokens."""
    count = min(options.pooled_tokens, stream.tokens)
    rows = torch.arange(count) * stream.tokens // max(count, 1)
    with phase("Hessian"):
        return stream.inputs[rows].to(stream.model.device)


def pooled_hessian(stream: Stream) -> Tensor:
    """Mean of x x^T over all tokens of the layer, fp32 [D, D] on the device."""
    device = stream.model.device
    total = torch.zeros(stream.model.shape.hidden, stream.model.shape.hidden, device=device)
    with phase("Hessian"):
        for part in stream.inputs.split(65536):
            total += gram(part.to(device))
            stream.touch(len(part))
        return total / max(stream.tokens, 1)


def solve_experts(
    stream: Stream,
    layer: int,
    weights: Mapping[int, Expert],
    positions: Sequence[tuple[Tensor, Tensor]],
    pooled_DD: Tensor,
    sample_PD: Tensor,
    options: QuantizeOptions,
) -> list[CodedExpert]:
    """Quantize a batch of experts of one layer.

    Gate and up share their input and so one Hessian and one solve (their rows are stacked); down sees what the
    quantized gate and up give.

    Args:
        stream: after the layer's first step.
        layer: the layer's number.
        weights: which of its experts, and their matrices in fp32.
        positions: `tokens_of` the layer.
        pooled_DD: `pooled_hessian`.
        sample_PD: `pooled_inputs`.
        options: see `QuantizeOptions`.
    """
    device, experts = stream.model.solver_device, list(weights)
    with phase("load"):
        stacked = torch.stack([torch.cat((weights[e].gate, weights[e].up)) for e in experts]).to(device)
        hessians = torch.stack([_input_hessian(stream, positions[e], pooled_DD, options.hessian) for e in experts])
        hessians = hessians.to(device)
    first, first_error = solve_measured(stacked, hessians, options)
    del hessians, stacked
    with phase("pack"):
        coded = [_split(first, index, options.stored_dtype) for index in range(len(experts))]
    middle = [
        _down_hessian(stream, layer, positions[e], sample_PD, gate_up, options.hessian)
        for e, gate_up in zip(experts, coded, strict=True)
    ]
    with phase("load"):
        downs, hessians = torch.stack([weights[e].down for e in experts]).to(device), torch.stack(middle).to(device)
    second, second_error = solve_measured(downs, hessians, options)
    with phase("pack"):
        down = [_stored(second, index, options.stored_dtype) for index in range(len(experts))]
    return [
        CodedExpert(
            gate=coded[index][0],
            up=coded[index][1],
            down=down[index],
            tokens=len(positions[expert][0]),
            error=(first_error[index], second_error[index]),
            rounded=bool(first.rounded[index]) or bool(second.rounded[index]),
        )
        for index, expert in enumerate(experts)
    ]


def solve_measured(weight_EOI: Tensor, hessian_EII: Tensor, options: QuantizeOptions) -> tuple[Solved, list[float]]:
    """`solve` by these options, and `relative_errors` of what it gave."""
    with phase("solve"):
        solved = solve(weight_EOI, hessian_EII, options.scheme, scale_dtype=options.scale_dtype, options=options.solver)
        return solved, relative_errors(solved)


def _stored(solved: Solved, index: int, stored: torch.dtype) -> Coded:
    return Coded(codes=solved.codes[index].cpu(), scales=solved.scales[index].to("cpu", stored))


def _split(solved: Solved, index: int, stored: torch.dtype) -> tuple[Coded, Coded]:
    both = _stored(solved, index, stored)
    half = both.codes.shape[0] // 2
    gate, up = (Coded(codes=both.codes[rows], scales=both.scales[rows]) for rows in (slice(half), slice(half, None)))
    return gate, up


def token_weights(stream: Stream, position: tuple[Tensor, Tensor], options: HessianOptions) -> Tensor | None:
    """a_t of an expert's tokens, or None for 1."""
    if options.weight_power == 0:
        return None
    return stream.weights[position[0], position[1]].pow(options.weight_power).to(stream.model.device)


def _slices(tokens: int) -> list[slice]:
    """An expert's tokens in parts: of a model with few experts one of them may see most of the text."""
    return [slice(start, start + _ROWS_AT_ONCE) for start in range(0, tokens, _ROWS_AT_ONCE)]


def _mass(weights: Tensor | None, tokens: int) -> float:
    return float(tokens) if weights is None else float(weights.sum())


def _input_hessian(
    stream: Stream, position: tuple[Tensor, Tensor], pooled_DD: Tensor, options: HessianOptions
) -> Tensor:
    weights, tokens = token_weights(stream, position, options), len(position[0])
    own = torch.zeros_like(pooled_DD)
    with phase("Hessian"):
        for rows in _slices(tokens):
            part = stream.inputs[position[0][rows]].to(stream.model.device)
            own += gram(part, None if weights is None else weights[rows])
            stream.touch(len(part))
        return shrink(own, _mass(weights, tokens), tokens, pooled_DD, options.shrinkage_tokens)


def _down_hessian(
    stream: Stream,
    layer: int,
    position: tuple[Tensor, Tensor],
    sample_PD: Tensor,
    gate_up: tuple[Coded, Coded],
    options: HessianOptions,
) -> Tensor:
    """Like `_input_hessian`, of the intermediate that the quantized gate and up give.

    The hidden units of different experts have nothing in common, so the pooled Hessian is that of a sample of the
    layer's tokens sent through this expert.
    """
    model, tokens, activation = stream.model, len(position[0]), stream.model.activation(layer)
    flops = 2.0 * (tokens + sample_PD.shape[0]) * sum(m.codes.numel() for m in gate_up)
    with phase("Hessian", flops=flops):
        gate, up = (m.dense().to(model.device, model.dtype) for m in gate_up)

        def middle(inputs: Tensor) -> Tensor:
            linear = torch.nn.functional.linear
            return activation(linear(inputs, gate)) * linear(inputs, up)

        weights = token_weights(stream, position, options)
        pooled = gram(middle(sample_PD)) / max(sample_PD.shape[0], 1)
        own = torch.zeros_like(pooled)
        for rows in _slices(tokens):
            part = middle(stream.inputs[position[0][rows]].to(model.device))
            own += gram(part, None if weights is None else weights[rows])
            stream.touch(len(part))
        return shrink(own, _mass(weights, tokens), tokens, pooled, options.shrinkage_tokens)


def relative_errors(solved: Solved) -> list[float]:
    """||(W - Q) X||^2 / ||W X||^2 of every matrix of a batch."""
    return (solved.loss / solved.energy.clamp(min=1e-300)).tolist()
