"""Gradients at the hidden states before each layer: layer by layer as moepress takes them, and transformers' own."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import every_family
import torch
from torch import Tensor

from moepress.models.forward.backward import backward_head, backward_layer, open_gradients
from moepress.models.forward.streamed import StreamedModel
from moepress.models.forward.walk import Limits, Scratch, add_experts, first_step, last_step, open_stream
from moepress.models.storage.checkpoint import Source

LIMITS = Limits(memory_bytes=1 << 30, batch_windows=2)
Loss = Callable[[Tensor, slice], Tensor]
"""Of logits [R, V] of the tokens with these numbers."""


def streamed_gradients(source: Source, windows_NT: Tensor, loss: Loss, folder: Path) -> list[Tensor]:
    """Of each layer, [N, T, ...]."""
    model = StreamedModel(source, device=torch.device("cpu"), dtype=torch.float32)
    layers, before, found = model.shape.layers, [], list[Tensor]()
    scratch = Scratch(folder, LIMITS.memory_bytes)
    with torch.no_grad():
        stream = open_stream(model, windows_NT, scratch, LIMITS, observe=False)
        for layer in range(layers):
            before.append((stream.hidden.clone(), {k: v.clone() for k, v in stream.states.items()}, stream.form))
            model.load_layer(layer)
            if first_step(stream, layer):
                add_experts(stream, layer)
                last_step(stream, layer)
            model.unload_layer(layer)
        gradients = open_gradients(stream)
        backward_head(stream, gradients, loss, model.head())
        for layer in reversed(range(layers)):
            hidden, stream.states, stream.form = before[layer]
            stream.hidden.copy_(hidden)
            backward_layer(stream, gradients, layer)
            found.append(gradients.hidden.clone())
    scratch.close()
    return found[::-1]


def whole_gradients(model: Any, layers_at: str, windows_NT: Tensor, loss: Loss) -> dict[int, Tensor]:
    """Those of transformers' model, of the layers whose input it has some for."""
    seen: dict[int, list[Tensor]] = {}

    def keep(layer: int) -> Callable[..., None]:
        def hook(_module: Any, arguments: Any, keywords: Any) -> None:
            hidden = arguments[0] if arguments else keywords["hidden_states"]
            hidden.retain_grad()
            seen.setdefault(layer, []).append(hidden)

        return hook

    model.requires_grad_(True)
    modules = dict(model.get_submodule(layers_at.removesuffix(".")).named_children())
    hooks = [module.register_forward_pre_hook(keep(int(n)), with_kwargs=True) for n, module in modules.items()]
    logits_NTV = every_family.plain_logits(model, windows_NT).float()
    loss(logits_NTV.flatten(0, 1), slice(0, windows_NT.numel())).backward()
    for hook in hooks:
        hook.remove()
    model.zero_grad()
    model.requires_grad_(False)
    return {n: torch.cat([h.grad for h in found if h.grad is not None]) for n, found in seen.items()}
