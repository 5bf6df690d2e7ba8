"""GPTQ for the Linears besides the routed experts: each on what reaches it once those before it are quantized, or, of
independent layers, on what reaches it in the original model."""

import itertools
from collections.abc import Callable, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor

from moepress.calibration.hessian import Moments, moments
from moepress.compress.gptq import counting
from moepress.compress.gptq.asymmetry import move_target
from moepress.compress.gptq.coded import Matrix, QuantizeOptions
from moepress.compress.gptq.experts import solve_stacked
from moepress.compress.gptq.include import LinearGroup
from moepress.compress.gptq.kept import kept_linear
from moepress.compress.gptq.sides import rows_of
from moepress.compress.gptq.two_sided import Side
from moepress.models.families.family import Part
from moepress.models.forward.costs import stored_bytes
from moepress.models.forward.stepping import Stepping, held_bytes
from moepress.models.forward.walk import Stream, batches_of
from moepress.models.storage.block_types import BlockType
from moepress.runs.phases import phase

SideOf = Callable[[LinearGroup], Side | None]
"""B of the rows of a group, one Linear's above the other's; None for 1."""


def _no_side(_group: LinearGroup) -> Side | None:
    return None


def solve_head(stream: Stream, options: QuantizeOptions, reference: Stream | None = None) -> tuple[Matrix, float]:
    """Quantize lm_head on the hidden states after the last layer; its matrix and relative error."""
    model, total = stream.model, None
    with phase("forward"):
        for batch in batches_of(stream):
            rows = slice(batch.start, batch.stop)
            found = [s.model.head_inputs(s.hidden[rows].to(model.device)) for s in (stream, reference) if s is not None]
            total = _added(total, _moments(stream, rows, found))
    assert total is not None
    own = options.of_part(Part.LM_HEAD)
    (matrix,), errors = _solve_stack(stream, own, [model.family.head], total.over(stream.tokens))
    return matrix, errors[0]


def solve_linears(
    stream: Stream,
    options: QuantizeOptions,
    layer: int,
    groups: Sequence[LinearGroup],
    reference: Stream | None = None,
    side_of: SideOf = _no_side,
) -> tuple[dict[str, Matrix], dict[str, float]]:
    """Quantize attention, shared expert or dense MLP, group after group, each on what the groups before it give.

    Args:
        stream: before the layer's first step; its hidden states stay as they are.
        options: see `QuantizeOptions`.
        layer: the layer's number.
        groups: `linear_groups` of the layer.
        reference: the original model's stream before the same layer, which its own model has loaded, where its inputs
            give the targets.
        side_of: what errors of a group's outputs cost (`compress.gptq.sides`), where that is known.

    Returns:
        Matrices and relative errors, by name on disk.
    """
    coded: dict[str, Matrix] = {}
    errors: dict[str, float] = {}
    model, independent = stream.model, options.hessian.independent
    for group in groups:
        model.load_layer(layer, {} if independent else {name: matrix.dense() for name, matrix in coded.items()})
        total = _captured_moments(stream, reference, layer, _place(stream, layer, group.names[0]))
        own = options.of_part(group.part)
        matrices, losses = _solve_stack(stream, own, group.names, total.over(stream.tokens), side_of(group))
        coded |= dict(zip(group.names, matrices, strict=True))
        errors |= dict(zip(group.names, losses, strict=True))
    return coded, errors


def steps_fit(stream: Stream, reference: Stream | None = None) -> bool:
    """Whether all windows of a layer, of both streams, may wait in memory while its Linears are solved."""
    return sum(held_bytes(s) for s in (stream, reference) if s is not None) <= stream.limits.memory_bytes // 4


def solve_stepping(
    stream: Stream,
    options: QuantizeOptions,
    layer: int,
    groups: Sequence[LinearGroup],
    reference: Stream | None = None,
    side_of: SideOf = _no_side,
) -> tuple[dict[str, Matrix], dict[str, float], bool]:
    """`solve_linears` and the first step of both streams in one forward pass each, which waits before each group.

    Gives the same bits, in a third of the time where attention is quantized; `steps_fit` says whether memory is enough.
    The reference must have a model of its own.

    Returns:
        Matrices and relative errors, by name on disk; whether the layer has routed experts.
    """
    coded: dict[str, Matrix] = {}
    errors: dict[str, float] = {}
    model, streams = stream.model, [s for s in (stream, reference) if s is not None]
    model.load_layer(layer)
    stops = [[_place(stream, layer, name) for name in group.names] for group in groups]
    with ExitStack() as stack:
        steppings = [stack.enter_context(Stepping(s, layer, stops)) for s in streams]
        for group, places in zip(groups, stops, strict=True):
            total, parts = None, zip(*(steps.inputs() for steps in steppings), strict=True)
            batches = iter(batches_of(stream))
            while True:
                with phase("forward"):  # FLOP are not counted: how much of the layer runs depends on the Linear
                    found = next(parts, None)
                if found is None:
                    break
                batch = next(batches)
                total = _added(total, _moments(stream, slice(batch.start, batch.stop), found))
            assert total is not None
            own = options.of_part(group.part)
            matrices, losses = _solve_stack(stream, own, group.names, total.over(stream.tokens), side_of(group))
            coded |= dict(zip(group.names, matrices, strict=True))
            errors |= dict(zip(group.names, losses, strict=True))
            for place, matrix in () if options.hessian.independent else zip(places, matrices, strict=True):
                steppings[0].replace(place, matrix.dense().to(model.device, model.dtype))
        with phase("forward"):
            routed = [steps.finish() for steps in steppings]
    return coded, errors, routed[0]


def _place(stream: Stream, layer: int, name: str) -> str:
    """A Linear's name inside of its layer."""
    return stream.model.family.inner_name(name, layer).removesuffix(".weight")


class _CapturedError(Exception):
    """The input of the Linear was seen; the rest of the layer need not run."""


def _captured_moments(stream: Stream, reference: Stream | None, layer: int, inner: str) -> Moments:
    """Sums of a Linear's inputs over all windows."""
    total = None
    for batch in batches_of(stream):
        rows = slice(batch.start, batch.stop)
        with phase("forward"):  # FLOP are not counted: how much of the layer runs depends on the Linear
            found = [_captured(s, layer, inner, rows) for s in (stream, reference) if s is not None]
        total = _added(total, _moments(stream, rows, found))
    assert total is not None
    return total


def _moments(stream: Stream, windows: slice, found: Sequence[Tensor]) -> Moments:
    """Sums over a batch of windows, of a Linear's inputs [..., I], and of the original's where those are there too."""
    weights = counting.of_rows(stream, windows, found[0])
    inputs, *originals = (part.flatten(0, -2) for part in found)
    return moments(inputs, next(iter(originals), None), weights)


def _captured(stream: Stream, layer: int, inner: str, windows: slice) -> Tensor:
    """Inputs [..., I] of a loaded layer's Linear; the layer stops as soon as the Linear is reached."""
    seen: list[Tensor] = []

    def hook(_module: torch.nn.Module, arguments: tuple[Tensor, ...]) -> None:
        seen.append(arguments[0])
        raise _CapturedError

    handle = stream.model.layer(layer).get_submodule(inner).register_forward_pre_hook(hook)
    try:
        stream.model.run_layer(layer, stream.before(windows), stream.windows[windows])
    except _CapturedError:
        pass
    finally:
        handle.remove()
    return seen[0]


def _added(total: Moments | None, part: Moments) -> Moments:
    if total is None:
        return part
    total.add(part)
    return total


def _solve_stack(
    stream: Stream, options: QuantizeOptions, names: Sequence[str], found: Moments, side: Side | None = None
) -> tuple[list[Matrix], list[float]]:
    """Solve Linears with the same input as one, their rows being independent; in two where their types differ."""
    model = stream.model
    columns, layer = model.source.shapes[names[0]][1], model.family.layer_of(names[0])
    kinds = [options.kind_of(name, layer, columns) for name in names]
    kept = {name: kept_linear(model.source, name, options.scheme) for name in names}
    matrices: dict[str, Matrix] = {name: matrix for name, matrix in kept.items() if matrix is not None}
    errors = dict.fromkeys(matrices, 0.0)
    for kind in dict.fromkeys(kinds):
        alike = [name for name, own in zip(names, kinds, strict=True) if own == kind and kept[name] is None]
        if not alike:
            continue
        own = None if side is None else rows_of(side, _numbers(stream, names, alike))
        solved, error = _solve_alike(stream, options, alike, found, kind, own)
        matrices |= dict(zip(alike, solved, strict=True))
        errors |= dict.fromkeys(alike, error)
    return [matrices[name] for name in names], [errors[name] for name in names]


def _numbers(stream: Stream, names: Sequence[str], wanted: Sequence[str]) -> Tensor:
    """Which rows of these Linears, one above the other, are those of the wanted ones: int64."""
    counts = torch.tensor([stream.model.source.shapes[name][0] for name in names])
    return torch.tensor([name in wanted for name in names]).repeat_interleave(counts).nonzero()[:, 0]


def _solve_alike(
    stream: Stream,
    options: QuantizeOptions,
    names: Sequence[str],
    found: Moments,
    kind: BlockType | None,
    side: Side | None,
) -> tuple[list[Matrix], float]:
    model = stream.model
    with phase("read", size=sum(stored_bytes(model.source, name) for name in names)):
        stored = [model.source.read(name) for name in names]
    with phase("load"):
        stacked = torch.cat([weight.to(model.solver_device, torch.float32) for weight in stored]).unsqueeze(0)
        hessian_EII = found.hessian.to(model.solver_device).unsqueeze(0)
    original = stacked.clone() if found.cross is not None else None
    step = move_target(stacked[0], found, options.hessian.asymmetry, options.solver.damp)
    batch = solve_stacked(stacked, hessian_EII, options, kind, None if side is None else [side])
    whole, error = batch.matrix(0), batch.error(0, step, stacked[0] if original is None else original[0])
    with phase("pack"):
        ends = list(itertools.accumulate(len(weight) for weight in stored))
        parts = [whole.rows(slice(end - len(weight), end)) for end, weight in zip(ends, stored, strict=True)]
    return parts, error
