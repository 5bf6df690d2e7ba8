"""The backward pass out of core: gradients of a loss at the end of the model, passed back through one layer at a time.

A layer is run again from the hidden states before it, which the forward pass has kept, and differentiated by autograd
in transformers' own modules. As forward (`models.forward.streamed`), the routed experts are apart: each is read once,
and run and differentiated for the tokens that chose it; what comes out of it joins the layer's own pass at the experts'
inputs and at the combine weights. So the memory needed is that of a forward pass, the gradients at the hidden states,
and what autograd keeps of one window in one layer.

What layers hand to each other besides hidden states carries no gradient; neither do the routers' choices, which have
none.

Letters: N windows of T tokens, D hidden size, K experts per token.
"""

from collections.abc import Callable, Iterable
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from moepress.models.forward.costs import expert_flops, layer_flops
from moepress.models.forward.recorder import Routed
from moepress.models.forward.replay import Returned, hidden_of
from moepress.models.forward.streamed import apply_expert, tokens_of
from moepress.models.forward.walk import Stream, add_output, read_ahead
from moepress.runs.memory import release_memory
from moepress.runs.phases import phase

_ROWS_AT_ONCE = 8192
_HEAD_ROWS = 256  # tokens whose logits are differentiated together

Seen = Callable[[str, Tensor], None]
"""Is told gradients [T, O] at the output of a module, of some tokens at a time, with the module's name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gradients:
    """Of a loss by what a layer of a stream works with, fp32 on the CPU.

    Attributes:
        hidden: by the hidden states behind the layer [N, T, ...], and once it is passed by those before it.
        inputs: by the experts' inputs, [N * T, D].
        weights: by the combine weights, [N * T, K].
    """

    hidden: Tensor
    inputs: Tensor
    weights: Tensor


def open_gradients(stream: Stream) -> Gradients:
    """Buffers for a stream."""

    def like(name: str, tensor: Tensor) -> Tensor:
        return stream.scratch.tensor(f"gradient-{name}", tensor.shape, torch.float32)

    return Gradients(
        hidden=like("hidden", stream.hidden),
        inputs=like("inputs", stream.inputs),
        weights=like("weights", stream.weights),
    )


def backward_layer(
    stream: Stream, gradients: Gradients, layer: int, *, modules: Iterable[str] = (), seen: Seen | None = None
) -> None:
    """Pass gradients back through a layer, which is loaded here and unloaded again.

    Outside of `torch.inference_mode`; the stream's model must not have been loaded inside of it.

    Args:
        stream: before the layer; its hidden states stay as they are.
        gradients: behind the layer, and afterwards before it.
        layer: its number.
        modules: names inside of the layer of those whose outputs' gradients are wanted.
        seen: is told them; and, under the name "", those at the sum of the routed experts' outputs, [T, D].
    """
    told: Seen = seen or (lambda _name, _gradient: None)
    model = stream.model
    with torch.no_grad():
        model.load_layer(layer)
        if routed := model.has_experts(layer):
            _record(stream, layer)
            given_TD = _at_experts(stream, gradients, layer)
            for windows in _windows(stream):
                told("", given_TD[_rows(stream, windows)].to(model.device))
            _through_experts(stream, gradients, layer, given_TD)
        _through_layer(stream, gradients, layer, modules=list(modules), told=told, routed=routed)
        model.unload_layer(layer)
    stream.forget()
    release_memory()


def _windows(stream: Stream) -> list[slice]:
    """One at a time, whatever the memory limit is: autograd keeps much of each."""
    return [slice(start, start + 1) for start in range(len(stream.windows))]


def _rows(stream: Stream, windows: slice) -> slice:
    """The tokens of some windows."""
    length = stream.windows.shape[1]
    return slice(windows.start * length, windows.stop * length)


def _run(
    stream: Stream, layer: int, windows: slice, before: Returned, given_TD: Tensor | None = None
) -> tuple[Returned, Routed | None]:
    return stream.model.run_layer(layer, before, stream.windows[windows], given_TD=given_TD)


def _record(stream: Stream, layer: int) -> None:
    """What reaches the experts, into the stream's buffers; and their sum, where the layer goes on behind it."""
    model = stream.model
    flops = layer_flops(model.layer(layer), model.config, stream.tokens, stream.windows.shape[1])
    with phase("forward", flops=flops):
        for windows in _windows(stream):
            _, routed = _run(stream, layer, windows, stream.before(windows))
            assert routed is not None
            rows = _rows(stream, windows)
            stream.inputs[rows] = routed.inputs.to("cpu")
            stream.chosen[rows] = routed.chosen.to("cpu")
            stream.weights[rows] = routed.weights.to("cpu", torch.float32)
            stream.touch(stream.windows.shape[1])
    if stream.sums is not None:
        stream.sums.zero_()
        positions = tokens_of(stream.chosen, model.shape.experts)
        with closing(read_ahead(model, layer, [e for e, own in enumerate(positions) if len(own[0])])) as experts:
            for expert, weights in experts:
                add_output(stream, stream.sums, weights, *positions[expert], layer)


def _at_experts(stream: Stream, gradients: Gradients, layer: int) -> Tensor:
    """Gradients at the sum of the experts' outputs, [N * T, D]."""
    if stream.sums is None:  # it is added to what the rest of the layer gives
        return gradients.hidden.view(-1, stream.inputs.shape[1])
    return torch.cat([_at_sum(stream, gradients, layer, windows) for windows in _windows(stream)])


def _at_sum(stream: Stream, gradients: Gradients, layer: int, windows: slice) -> Tensor:
    """Gradients [T, D] at the sum of the experts' outputs, which the layer does more with than add it."""
    assert stream.sums is not None
    device = stream.model.device
    sum_TD = stream.sums[_rows(stream, windows)].to(device).requires_grad_()
    with phase("backward"), torch.enable_grad():
        returned, _ = _run(stream, layer, windows, stream.before(windows), sum_TD)
        hidden = hidden_of(returned)
        (back_TD,) = torch.autograd.grad(hidden, sum_TD, gradients.hidden[windows].to(device, hidden.dtype))
    return back_TD.to("cpu", torch.float32)


def _through_experts(stream: Stream, gradients: Gradients, layer: int, given_TD: Tensor) -> None:
    """Pass back from the sum of the experts' outputs to their inputs and to the combine weights."""
    model = stream.model
    gradients.inputs.zero_()
    gradients.weights.zero_()
    positions = tokens_of(stream.chosen, model.shape.experts)
    with closing(read_ahead(model, layer, [e for e, own in enumerate(positions) if len(own[0])])) as experts:
        for expert, weights in experts:
            tokens, slots = positions[expert]
            with phase("backward", flops=3 * expert_flops(weights, len(tokens))):
                for start in range(0, len(tokens), _ROWS_AT_ONCE):
                    part = slice(start, start + _ROWS_AT_ONCE)
                    rows, columns = tokens[part], slots[part]
                    inputs_TD = stream.inputs[rows].to(model.device).requires_grad_()
                    given = given_TD[rows].to(model.device)
                    with torch.enable_grad():
                        output_TD = apply_expert(weights, inputs_TD, model.gating(layer)).float()
                    own = stream.weights[rows, columns, None].to(model.device)
                    (back_TD,) = torch.autograd.grad(output_TD, inputs_TD, own * given)
                    gradients.inputs.index_add_(0, rows, back_TD.to("cpu", torch.float32))
                    gradients.weights[rows, columns] = (output_TD.detach() * given).sum(dim=1).cpu()
                    stream.touch(2 * len(rows))


def _through_layer(
    stream: Stream, gradients: Gradients, layer: int, *, modules: list[str], told: Seen, routed: bool
) -> None:
    """Pass back through the rest of a layer, window by window."""
    model, length = stream.model, stream.windows.shape[1]
    flops = 3 * layer_flops(model.layer(layer), model.config, stream.tokens, length)
    with phase("backward", flops=flops), ExitStack() as stack:
        for name in modules:
            hook = model.layer(layer).get_submodule(name).register_forward_hook(partial(_watch, told, name))
            stack.callback(hook.remove)
        for windows in _windows(stream):
            rows = _rows(stream, windows)
            before = stream.before(windows)
            leaf = hidden_of(before).requires_grad_()
            sums = None if stream.sums is None or not routed else stream.sums[rows].to(model.device)
            with torch.enable_grad():
                start = leaf.clone()  # a layer may write into what it gets
                given: Returned = (start, *before[1:]) if isinstance(before, tuple) else start
                returned, found = _run(stream, layer, windows, given, sums)
            ends = {"hidden": (hidden_of(returned), gradients.hidden[windows])}
            if found is not None:
                ends["inputs"] = found.inputs, gradients.inputs[rows]
                ends["weights"] = found.weights, gradients.weights[rows]
            live = [(end, back) for end, back in ends.values() if end.requires_grad]
            (back,) = torch.autograd.grad(
                [end for end, _ in live],
                leaf,
                [back.to(end.device, end.dtype).view_as(end) for end, back in live],
            )
            gradients.hidden[windows] = back.to("cpu", torch.float32)


def _watch(told: Seen, name: str, _module: nn.Module, _given: Any, output: Any) -> None:
    """A forward hook: what comes back to this output is told."""
    if isinstance(output, Tensor) and output.requires_grad:
        output.register_hook(lambda gradient: told(name, gradient.detach().flatten(0, -2)))


def backward_head(
    stream: Stream, gradients: Gradients, loss: Callable[[Tensor, slice], Tensor], head: Callable[[Tensor], Tensor]
) -> None:
    """Gradients at the hidden states behind the last layer.

    Args:
        stream: behind the last layer.
        gradients: to be filled.
        loss: of fp32 logits [R, V] of the tokens with these numbers.
        head: `StreamedModel.head`, loaded.
    """
    device, length = stream.model.device, stream.windows.shape[1]
    for window in range(len(stream.windows)):
        for start in range(0, length, _HEAD_ROWS):
            part = slice(start, min(start + _HEAD_ROWS, length))
            leaf = stream.hidden[window, part].to(device).requires_grad_()
            with phase("head"), torch.enable_grad():
                own = loss(head(leaf), slice(window * length + part.start, window * length + part.stop))
            (back,) = torch.autograd.grad(own, leaf)
            gradients.hidden[window, part] = back.to("cpu", torch.float32)
