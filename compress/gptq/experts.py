"""GPTQ for the routed experts of a layer: Hessians of a few experts at a time, solved as one batch."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from moepress.calibration.hessian import HessianOptions, Moments, add_cross, add_gram, mirror, shares
from moepress.compress.gptq import counting
from moepress.compress.gptq.asymmetry import Step, against_original, move_target
from moepress.compress.gptq.balance import topped_up
from moepress.compress.gptq.block_choice import BlockChoice
from moepress.compress.gptq.block_solver import BlockCoded, SolvedBlocks, solve_blocks
from moepress.compress.gptq.options import SolverOptions
from moepress.compress.gptq.parts import part_slices, side_by_side
from moepress.compress.gptq.sides import expert_side, floored, spread
from moepress.compress.gptq.solver import Solved, solve
from moepress.compress.gptq.two_sided import Side, Sides
from moepress.converters.safetensors import floats
from moepress.converters.safetensors.artifact import dense
from moepress.converters.safetensors.scheme import Codes, Scheme
from moepress.models.families.family import Part, Shape
from moepress.models.forward.card import free_bytes
from moepress.models.forward.streamed import StreamedModel
from moepress.models.forward.walk import Stream
from moepress.models.storage.block_types import BlockType
from moepress.models.storage.experts import Expert
from moepress.runs.phases import phase

_ROWS_AT_ONCE, _POOLED_AT_ONCE = 8192, 65536
_EXPERTS_A_THREAD = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizeOptions:
    """How matrices are quantized.

    Attributes:
        scheme: bits, group size and what codes are.
        scale_dtype: dtype the scales of integers are rounded to before codes are chosen.
        stored_dtype: dtype they are stored in, the model's.
        hessian: how tokens are weighed.
        solver: options of the GPTQ solver.
        layer_bits: layer -> bits, of the layers that do not have the scheme's.
        part_bits: of the parts besides the routed experts that have bits of their own, whatever their layer's are.
        blocks: GGUF's types, in the place of the scheme; None for the scheme.
    """

    scheme: Scheme
    scale_dtype: torch.dtype
    stored_dtype: torch.dtype
    hessian: HessianOptions = field(default_factory=HessianOptions)
    solver: SolverOptions = field(default_factory=SolverOptions)
    layer_bits: Mapping[int, int] = field(default_factory=dict)
    part_bits: Mapping[Part, int] = field(default_factory=dict)
    blocks: BlockChoice | None = None

    def kind_of(self, name: str, layer: int | None, columns: int) -> BlockType | None:
        """The block type of a matrix by its name on disk; None where it gets codes by the scheme."""
        return None if self.blocks is None else self.blocks.of(name, layer, columns)

    def scheme_of(self, layer: int | None, part: Part = Part.ROUTED) -> Scheme:
        """The scheme of a part's matrices in a layer, or of those outside of the layers."""
        bits = self.scheme.bits if layer is None else self.layer_bits.get(layer, self.scheme.bits)
        return self.scheme.of_bits(self.part_bits.get(part, bits))

    def of_layer(self, layer: int) -> "QuantizeOptions":
        """The same, with that layer's scheme."""
        return replace(self, scheme=self.scheme_of(layer), layer_bits={})

    def of_part(self, part: Part) -> "QuantizeOptions":
        """The same, with that part's scheme."""
        return replace(self, scheme=self.scheme_of(None, part))


@dataclass(frozen=True, slots=True, kw_only=True)
class Coded:
    """A quantized matrix of integers, on the CPU: codes int8 [O, I], scales [O, G] in the dtype they are stored in;
    zero points int16 [O, G] where it has some."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None = None

    def dense(self, device: torch.device | None = None) -> Tensor:
        """What it stands for, [O, I], in the scales' dtype, computed on that device."""
        zeros = None if self.zeros is None else self.zeros.to(device)
        return dense(self.codes.to(device), self.scales.to(device), zeros)

    def rows(self, rows: slice) -> "Coded":
        """Some of its rows."""
        zeros = None if self.zeros is None else self.zeros[rows]
        return Coded(codes=self.codes[rows], scales=self.scales[rows], zeros=zeros)


@dataclass(frozen=True, slots=True, kw_only=True)
class FloatCoded:
    """A quantized matrix of 4-bit floats, on the CPU.

    Attributes:
        codes: int8 [O, I], 0 to 15.
        scales: fp32 [O, G], as they are stored.
        divisor: what scales are divided by, of the whole matrix and those that were solved with it; or None.
    """

    codes: Tensor
    scales: Tensor
    divisor: Tensor | None = None

    def dense(self, device: torch.device | None = None) -> Tensor:
        """What it stands for, [O, I] bf16, computed on that device."""
        scales = self.scales if self.divisor is None else self.scales / self.divisor
        return floats.dense(self.codes.to(device), scales.to(device))

    def rows(self, rows: slice) -> "FloatCoded":
        """Some of its rows."""
        return replace(self, codes=self.codes[rows], scales=self.scales[rows])


Matrix = Coded | FloatCoded | BlockCoded


@dataclass(frozen=True, slots=True, kw_only=True)
class CodedExpert:
    """One quantized expert and what is known of its error.

    Attributes:
        gate, up, down: the matrices; `gate` is None where experts have none.
        biases: by their names in `Expert`, as they are in the original.
        tokens: calibration tokens that reached it.
        error: relative output error of gate/up and of down on its Hessians, ||(W - Q) X||^2 / ||W X||^2; W is the
            original matrix, whatever the codes were to meet.
        rounded: a Hessian could not be factorised and the matrix was rounded to nearest.
        middle: what the quantized gate and up give its tokens [T, F], in the compute dtype on the device; None where it
            was not kept.
    """

    gate: Matrix | None
    up: Matrix
    down: Matrix
    tokens: int
    error: tuple[float, float]
    rounded: bool
    middle: Tensor | None = None
    biases: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def matrices(self) -> tuple[Matrix, ...]:
        """Gate (where there is one), up and down."""
        return tuple(matrix for matrix in (self.gate, self.up, self.down) if matrix is not None)

    def expert(self, model: StreamedModel) -> Expert:
        """Dequantized, on the model's device, in its compute dtype; without gate and up where `middle` was kept."""
        if self.middle is None:
            return self.dense(model.device).to(model.device, model.dtype)
        down = Expert(gate=None, up=torch.empty(0), down=self.down.dense(model.device), **self.biases)
        return down.to(model.device, model.dtype)

    def dense(self, device: torch.device | None = None) -> Expert:
        """What the codes stand for, computed on that device."""
        gate = None if self.gate is None else self.gate.dense(device)
        return Expert(gate=gate, up=self.up.dense(device), down=self.down.dense(device), **self.biases)


def experts_at_once(model: StreamedModel, memory_bytes: int) -> int:
    """How many experts of a model are solved together: those that fit into a quarter of the memory limit.

    On the CPU no more than a few a thread: each thread solves one after the other there, and more of them in hand are
    only more memory that has to come from the system. A CUDA device has its own memory, and half of what is free there
    is for a batch.
    """
    if model.solver_device.type == "cuda":
        memory_bytes = 2 * free_bytes(model.solver_device)
    return experts_that_fit(model.shape, memory_bytes, model.solver_device)


def experts_that_fit(shape: Shape, memory_bytes: int, device: torch.device) -> int:
    """`experts_at_once` of any model of that shape, one at least, on the solver's device."""
    hessians = 4 * shape.hidden * shape.hidden
    matrices = 10 * 2 * shape.expert_width * shape.hidden
    most = _EXPERTS_A_THREAD * torch.get_num_threads() if device.type == "cpu" else shape.experts
    return max(1, min(shape.experts, most, memory_bytes // 4 // (4 * (hessians + matrices))))


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
        for start in range(0, stream.tokens, _POOLED_AT_ONCE):
            rows = slice(start, start + _POOLED_AT_ONCE)
            part, weights = stream.inputs[rows].to(device), counting.of_tokens(stream, rows)
            add_gram(total, part, None if weights is None else weights.to(device))
            stream.touch(len(part))
        return mirror(total).div_(max(stream.tokens, 1))


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
        for start in range(0, stream.tokens, _POOLED_AT_ONCE):
            rows = slice(start, start + _POOLED_AT_ONCE)
            part, weights = stream.inputs[rows].to(device), counting.of_tokens(stream, rows)
            original = reference.inputs[rows].to(device)
            add_cross(total, part, original, None if weights is None else weights.to(device))
            stream.touch(2 * len(part))
        total /= max(stream.tokens, 1)
    return Originals(stream=reference, pooled=total, sample=pooled_inputs(reference, options))


def solve_experts(
    stream: Stream,
    layer: int,
    weights: Mapping[int, Expert],
    positions: Sequence[tuple[Tensor, Tensor]],
    pooled_DD: Tensor,
    sample_PD: Tensor,
    options: QuantizeOptions,
    originals: Originals | None = None,
    metric_DD: Tensor | None = None,
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
        originals: `originals_of` the layer, where the original model's inputs give the targets.
        metric_DD: what errors of the experts' sum cost at the end of the network (`calibration.ends`), or None.
    """
    device, experts = stream.model.solver_device, list(weights)
    inputs = _Inputs(stream=stream, originals=originals, options=options.hessian)
    seen = topped_up(stream, positions, experts, options.hessian.least_tokens)
    with phase("load"):
        stacked = _stacked([[m for m in (weights[e].gate, weights[e].up) if m is not None] for e in experts], device)

    def of_inputs(index: int, out: Tensor) -> Moments:
        return _input_moments(inputs, seen[experts[index]], pooled_DD, out)

    hessians, steps = _targets(stacked, of_inputs, options, stream.model.device)
    *_gate, up_name, down_name = stream.model.family.expert_names(layer, experts[0])
    kind = options.kind_of(up_name, layer, stacked.shape[2])
    sides: Sides = None
    if metric_DD is not None:
        sides = [_side(inputs, layer, weights[e], positions[e], sample_PD, metric_DD) for e in experts]
    first = solve_stacked(stacked, hessians, options, kind, sides)
    del hessians, stacked
    with phase("pack"):
        first = first.on_host()
        first_error = [first.error(n, steps[n], weights[e].first) for n, e in enumerate(experts)]
        del steps
        gated = [weights[expert].gate is not None for expert in experts]
        coded = [_split(first.matrix(index), gated=gated[index]) for index in range(len(experts))]
    with phase("load"):
        downs = _stacked([[weights[e].down] for e in experts], device)
    middles: dict[int, Tensor] | None = {} if _middles_fit(stream, seen) else None

    def of_middles(index: int, out: Tensor) -> Moments:
        expert = experts[index]
        found, middle = _down_moments(
            inputs,
            layer,
            seen[expert],
            sample_PD,
            coded[index],
            weights[expert],
            out,
            chose=len(positions[expert][0]),
            keep=middles is not None,
        )
        if middles is not None and middle is not None:
            middles[index] = middle[: len(positions[expert][0])]
        return found

    hessians, steps = _targets(downs, of_middles, options, stream.model.device)
    kind = options.kind_of(down_name, layer, downs.shape[2])
    sides = None
    if metric_DD is not None and stream.model.gating(layer).after is None:
        sides = [floored([metric_DD], options.hessian.end_floor, device)] * len(experts)
    second = solve_stacked(downs, hessians, options, kind, sides)
    with phase("pack"):
        second = second.on_host()
        second_error = [second.error(n, steps[n], weights[e].down) for n, e in enumerate(experts)]
        down = [second.matrix(index) for index in range(len(experts))]
    return [
        CodedExpert(
            gate=coded[index][0],
            up=coded[index][1],
            down=down[index],
            tokens=len(positions[expert][0]),
            error=(first_error[index], second_error[index]),
            rounded=first.rounded(index) or second.rounded(index),
            middle=None if middles is None else middles.get(index),
            biases=biases_of(weights[expert], options.stored_dtype),
        )
        for index, expert in enumerate(experts)
    ]


def _side(
    inputs: "_Inputs",
    layer: int,
    expert: Expert,
    position: tuple[Tensor, Tensor],
    sample_PD: Tensor,
    metric_DD: Tensor,
) -> Side | None:
    """B of gate and up of an expert, by what it does with the original's tokens where those are known."""
    stream = inputs.stream
    picked = spread(len(position[0]))
    tokens, slots = position[0][picked], position[1][picked]
    source, sample = (
        (stream, sample_PD) if inputs.originals is None else (inputs.originals.stream, inputs.originals.sample)
    )
    own = source.inputs[tokens].to(stream.model.device), stream.weights[tokens, slots].to(stream.model.device)
    few = sample[picked_tokens(len(sample), len(tokens))]
    side = expert_side(expert, stream.model.gating(layer), own, few, metric_DD, inputs.options)
    return None if side is None else tuple(block.to(stream.model.solver_device) for block in side)


def _stacked(parts: Sequence[Sequence[Tensor]], device: torch.device) -> Tensor:
    """Matrices [E, O, I] in fp32 on a device, each made of parts one above the other."""
    sizes = [len(part) for part in parts[0]]
    out_EOI = torch.empty(len(parts), sum(sizes), parts[0][0].shape[1], device=device)
    for matrix_OI, own in zip(out_EOI, parts, strict=True):
        for rows_OI, part in zip(matrix_OI.split(sizes), own, strict=True):
            rows_OI.copy_(part)
    return out_EOI


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """A solved batch of matrices, codes by a scheme or in GGUF's blocks.

    Attributes:
        found: what the solver gave.
        stored: dtype of a scheme's scales, where codes are integers.
        codes: what they are.
    """

    found: Solved | SolvedBlocks
    stored: torch.dtype
    codes: Codes = Codes.INT

    def matrix(self, index: int) -> Matrix:
        """One of them, on the CPU."""
        if isinstance(self.found, SolvedBlocks):
            return self.found.matrix(index)
        if self.codes is not Codes.INT:
            return FloatCoded(
                codes=floats.from_levels(self.found.codes[index].cpu()),
                scales=self.found.scales[index].cpu(),
                divisor=None if self.found.divisor is None else self.found.divisor[index].cpu(),
            )
        codes, scales = self.found.codes[index].cpu(), self.found.scales[index].to("cpu", self.stored)
        zeros = None if self.found.zeros is None else self.found.zeros[index].cpu()
        return Coded(codes=codes, scales=scales, zeros=zeros)

    @property
    def solved(self) -> Solved:
        """Losses and the like, whatever the codes are."""
        return self.found.solved if isinstance(self.found, SolvedBlocks) else self.found

    def rounded(self, index: int) -> bool:
        """Whether it was rounded to nearest for want of a Hessian."""
        return bool(self.solved.rounded[index])

    def error(self, index: int, step: Step | None, weight_OI: Tensor) -> float:
        """||(W - Q) X||^2 / ||W X||^2 of one of them.

        Args:
            index: which.
            step: how far the solver's W was moved from the original, None: not at all.
            weight_OI: the original W.
        """
        loss, energy = float(self.solved.loss[index]), float(self.solved.energy[index])
        if step is not None:
            device = step.pull.device
            off_OI = weight_OI.to(device) - self.matrix(index).dense(device).float()
            loss, energy = against_original(loss, energy, step, off_OI)
        return max(loss, 0.0) / max(energy, 1e-300)

    def on_host(self) -> "Batch":
        """The same, copied at once from a GPU: each copy waits for it."""
        if isinstance(self.found, SolvedBlocks):
            return replace(self, found=replace(self.found, solved=_on_host(self.found.solved)))
        return replace(self, found=_on_host(self.found))


def solve_stacked(
    weight_EOI: Tensor,
    hessian_EII: Tensor,
    options: QuantizeOptions,
    kind: BlockType | None = None,
    sides: Sides = None,
) -> Batch:
    """`solve` by these options, in a block type where one is given."""
    with phase("solve"):
        if kind is not None:
            blocks = solve_blocks(weight_EOI, hessian_EII, kind, options.solver, sides)
            return Batch(found=blocks, stored=options.stored_dtype)
        scale_dtype, solver = options.scale_dtype, options.solver
        solved = solve(weight_EOI, hessian_EII, options.scheme, scale_dtype=scale_dtype, options=solver, sides=sides)
        return Batch(found=solved, stored=options.stored_dtype, codes=options.scheme.codes)


def _targets(
    weight_EOI: Tensor, of: Callable[[int, Tensor], Moments], options: QuantizeOptions, device: torch.device
) -> tuple[Tensor, list[Step | None]]:
    """The Hessians of a batch; its weights become, in place, what their codes are to meet, by these steps.

    Args:
        weight_EOI: on the device of the solver, where the Hessians will be.
        of: the moments of one expert of the batch, the Hessian in a given matrix [I, I]; one C a thread is held.
        options: see `QuantizeOptions`.
        device: where the moments are formed.
    """
    experts, columns = weight_EOI.shape[0], weight_EOI.shape[2]
    hessian_EII = torch.empty(experts, columns, columns, device=weight_EOI.device)
    steps: list[Step | None] = [None] * experts

    def some(part: slice) -> None:
        for index in range(experts)[part]:
            there = hessian_EII[index]
            found = of(index, there if there.device == device else torch.empty_like(there, device=device))
            if found.hessian is not there:
                there.copy_(found.hessian)
            steps[index] = move_target(weight_EOI[index], found, options.hessian.asymmetry, options.solver.damp)

    parts = part_slices(experts, device)
    with phase("Hessian"), side_by_side(len(parts)) as each:
        each(some, parts)
    return hessian_EII, steps


def _middles_fit(stream: Stream, seen: Mapping[int, tuple[Tensor, Tensor]]) -> bool:
    """Whether the intermediates of a batch of experts may be kept for their outputs: an eighth of the memory limit."""
    tokens, model = sum(len(rows) for rows, _ in seen.values()), stream.model
    return tokens * model.shape.expert_width * model.dtype.itemsize <= stream.limits.memory_bytes // 8


def _on_host(solved: Solved) -> Solved:
    """A batch that a GPU solved, copied at once: each copy waits for the GPU."""
    every: dict[str, Tensor | None] = {each.name: getattr(solved, each.name) for each in fields(solved)}
    moved: dict[str, Any] = {name: None if tensor is None else tensor.cpu() for name, tensor in every.items()}
    return Solved(**moved)


def biases_of(expert: Expert, stored: torch.dtype) -> dict[str, Tensor]:
    """Those that an expert has, by their names in `Expert`, as they are stored."""
    found = {name: getattr(expert, name) for name in BIASES}
    return {name: value.to("cpu", stored) for name, value in found.items() if value is not None}


BIASES = ("gate_bias", "up_bias", "down_bias")


def _split(both: Matrix, *, gated: bool) -> tuple[Matrix | None, Matrix]:
    """Gate and up of rows that were solved one above the other."""
    if not gated:
        return None, both
    half = both.codes.shape[0] // 2
    return both.rows(slice(half)), both.rows(slice(half, None))


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
class _Inputs:
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


def _input_moments(
    inputs: _Inputs, position: tuple[Tensor, Tensor], pooled_DD: Tensor, out_DD: Tensor | None = None
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


def _down_moments(
    inputs: _Inputs,
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
    """Like `_input_moments`, of the intermediate that the quantized gate and up give, and that the original ones do.

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
