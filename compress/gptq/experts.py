"""GPTQ for the routed experts of a layer: Hessians of a few experts at a time, solved as one batch."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from moepress.calibration.hessian import Moments
from moepress.compress.gptq.asymmetry import Step, against_original, move_target
from moepress.compress.gptq.balance import topped_up
from moepress.compress.gptq.block_solver import SolvedBlocks, solve_blocks
from moepress.compress.gptq.coded import Coded, CodedExpert, FloatCoded, Matrix, QuantizeOptions, biases_of
from moepress.compress.gptq.moments import (
    Inputs,
    Originals,
    down_moments,
    input_moments,
    picked_tokens,
)
from moepress.compress.gptq.parts import part_slices, side_by_side
from moepress.compress.gptq.sides import expert_side, floored, spread
from moepress.compress.gptq.solver import Solved, solve
from moepress.compress.gptq.two_sided import Side, Sides
from moepress.converters.safetensors import floats
from moepress.converters.safetensors.scheme import Codes
from moepress.models.families.family import Shape
from moepress.models.forward.card import free_bytes
from moepress.models.forward.streamed import StreamedModel
from moepress.models.forward.walk import Stream
from moepress.models.storage.block_types import BlockType
from moepress.models.storage.experts import Expert
from moepress.runs.phases import phase

_EXPERTS_A_THREAD = 4


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
    inputs = Inputs(stream=stream, originals=originals, options=options.hessian)
    seen = topped_up(stream, positions, experts, options.hessian.least_tokens)
    with phase("load"):
        stacked = _stacked([[m for m in (weights[e].gate, weights[e].up) if m is not None] for e in experts], device)

    def of_inputs(index: int, out: Tensor) -> Moments:
        return input_moments(inputs, seen[experts[index]], pooled_DD, out)

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
        found, middle = down_moments(
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
    inputs: "Inputs",
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


def _split(both: Matrix, *, gated: bool) -> tuple[Matrix | None, Matrix]:
    """Gate and up of rows that were solved one above the other."""
    if not gated:
        return None, both
    half = both.codes.shape[0] // 2
    return both.rows(slice(half)), both.rows(slice(half, None))
