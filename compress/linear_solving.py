"""GPTQ for the Linears besides the routed experts: each on what reaches it once those before it are quantized."""

from collections.abc import Sequence

import torch
from torch import Tensor

from moepress.calibration.hessian import gram
from moepress.compress.experts import Coded, QuantizeOptions, solve_measured
from moepress.compress.linears import LinearGroup
from moepress.models.costs import stored_bytes
from moepress.models.walk import Stream
from moepress.phases import phase


def solve_head(stream: Stream, options: QuantizeOptions) -> tuple[Coded, float]:
    """Quantize lm_head on the hidden states after the last layer; its matrix and relative error."""
    model, total = stream.model, None
    with phase("read"):
        normalise = model.final_norm()
    with phase("forward"):
        for batch in stream.hidden.split(stream.limits.batch_windows):
            part = gram(normalise(batch.to(model.device)).flatten(0, 1))
            total = part if total is None else total.add_(part)
    assert total is not None
    (matrix,), errors = _solve_stack(stream, options, ["lm_head.weight"], total / stream.tokens)
    return matrix, errors[0]


def solve_linears(
    stream: Stream, options: QuantizeOptions, layer: int, groups: Sequence[LinearGroup]
) -> tuple[dict[str, Coded], dict[str, float]]:
    """Quantize attention, shared expert or dense MLP, group after group, each on what the groups before it give.

    Args:
        stream: before the layer's first step; its hidden states stay as they are.
        options: see `QuantizeOptions`.
        layer: the layer's number.
        groups: `linear_groups` of the layer.

    Returns:
        Matrices and relative errors, by name on disk.
    """
    coded: dict[str, Coded] = {}
    errors: dict[str, float] = {}
    model = stream.model
    for group in groups:
        module = model.load_layer(layer, {name: matrix.dense() for name, matrix in coded.items()})
        inner = model.family.module_name(group.names[0]).split(f"layers.{layer}.", 1)[1].removesuffix(".weight")
        total = _captured_gram(stream, layer, module.get_submodule(inner))
        matrices, losses = _solve_stack(stream, options, group.names, total / stream.tokens)
        coded |= dict(zip(group.names, matrices, strict=True))
        errors |= dict(zip(group.names, losses, strict=True))
    return coded, errors


class _CapturedError(Exception):
    """The input of the Linear was seen; the rest of the layer need not run."""


def _captured_gram(stream: Stream, layer: int, linear: torch.nn.Module) -> Tensor:
    """sum x x^T of a Linear's inputs over all windows; every batch stops as soon as the Linear is reached."""
    grams: list[Tensor] = []

    def hook(_module: torch.nn.Module, arguments: tuple[Tensor, ...]) -> None:
        part = gram(arguments[0].flatten(0, -2))
        grams[:] = [part if not grams else grams[0].add_(part)]
        raise _CapturedError

    handle = linear.register_forward_pre_hook(hook)
    try:
        for batch in stream.hidden.split(stream.limits.batch_windows):
            try:
                with phase("forward"):  # FLOP are not counted: how much of the layer runs depends on the Linear
                    stream.model.run_layer(layer, batch.to(stream.model.device))
            except _CapturedError:
                continue
    finally:
        handle.remove()
    return grams[0]


def _solve_stack(
    stream: Stream, options: QuantizeOptions, names: Sequence[str], hessian_II: Tensor
) -> tuple[list[Coded], list[float]]:
    """Solve Linears with the same input as one: their rows are independent."""
    model = stream.model
    with phase("read", size=sum(stored_bytes(model.source, name) for name in names)):
        stored = [model.source.read(name) for name in names]
    with phase("load"):
        stacked = torch.cat([weight.to(model.solver_device, torch.float32) for weight in stored]).unsqueeze(0)
        hessian_EII = hessian_II.to(model.solver_device).unsqueeze(0)
    solved, (error,) = solve_measured(stacked, hessian_EII, options)
    with phase("pack"):
        sizes = [len(weight) for weight in stored]
        scales = solved.scales[0].to("cpu", options.stored_dtype)
        parts = zip(solved.codes[0].cpu().split(sizes), scales.split(sizes), strict=True)
        return [Coded(codes=codes, scales=scale) for codes, scale in parts], [error] * len(names)
