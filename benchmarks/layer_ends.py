"""What errors of a matrix cost at the end of its own layer: `ends` without a backward pass.

Of an output D m with m = act(g) * u the second derivative of half the squared length by g and u is

    B = (sum_t a_t z_t z_t^T) o (1 1^T (x) D^T D),    z_t = (u act'(g), act(g)) of token t,

with o for products number by number, and the square of the token's combine weight as a_t. With a metric M, where errors
e of the layer's output count as e M e^T, it is D^T M D, and M is the factor of what writes the output. Attention has
no factor but of its output projection.

Letters: T tokens, O rows of gate and up, D hidden size, F expert width, K experts per token.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from ends import WINDOWS, Ends, Key
from torch import Tensor
from transformers import AutoModelForCausalLM

from moepress.models.storage.checkpoint import Source


@dataclass(slots=True)
class _Layers:
    """What is found, and layer -> M [D, D] or nothing for M = 1."""

    metrics: Mapping[int, Tensor]
    found: Ends = field(default_factory=Ends)

    def add(self, key: Key, module: Any, both_TO: Tensor, down_DF: Tensor, weights_T1: Tensor | float = 1.0) -> None:
        """Add some tokens of a gate and up, by what these give."""
        gate, up = (part.detach().requires_grad_() for part in both_TO.chunk(2, dim=-1))
        with torch.enable_grad():
            slopes = torch.autograd.grad((module.act_fn(gate) * up).sum(), (gate, up))
        slope_TO = torch.cat(slopes, dim=1) * weights_T1
        metric_DD = self.metrics.get(_layer_of(key[0]))
        inner_FF = down_DF.T @ (down_DF if metric_DD is None else metric_DD @ down_DF)
        side_OO = slope_TO.T @ slope_TO * inner_FF.repeat(2, 2)
        self.found.sides[key] = self.found.sides.get(key, torch.zeros(())) + side_OO

    def experts(
        self, names: Sequence[Key], module: Any, hidden_TD: Tensor, chosen_TK: Tensor, weights_TK: Tensor
    ) -> Tensor:
        """What transformers' experts give."""
        out_TD = torch.zeros_like(hidden_TD)
        for expert, (gate_name, up_name, _) in enumerate(names):
            tokens, slots = (chosen_TK == expert).nonzero(as_tuple=True)
            both_TO, own_T1 = hidden_TD[tokens] @ module.gate_up_proj[expert].T, weights_TK[tokens, slots, None]
            self.add((gate_name, up_name), module, both_TO, module.down_proj[expert], own_T1)
            gate, up = both_TO.chunk(2, dim=-1)
            out_TD.index_add_(0, tokens, (module.act_fn(gate) * up) @ module.down_proj[expert].T * own_T1)
        return out_TD

    def mlp(self, key: Key, module: Any, given: Any, _output: Any) -> None:
        """A shared expert or a dense MLP has run."""
        hidden_TD = given[0].flatten(0, -2)
        both_TO = torch.cat([module.gate_proj(hidden_TD), module.up_proj(hidden_TD)], dim=1)
        self.add(key, module, both_TO, module.down_proj.weight)


def gather_layers(source: Source, folder: str, windows_NT: Tensor, metrics: Mapping[int, Tensor] | None = None) -> Ends:
    """Factors of gate and up, with metrics also of what writes the layer's output; no token weights.

    Args:
        source, folder: the model.
        windows_NT: calibration tokens.
        metrics: layer -> M [D, D].
    """
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.requires_grad_(False).eval()
    layers = _Layers(metrics=metrics or {})
    for path, module in model.named_modules():
        if path.endswith(".mlp.experts"):
            names = [source.family.expert_names(_layer_of(path), expert) for expert in range(source.shape.experts)]
            module.forward = partial(layers.experts, names, module)
        elif hasattr(module, "gate_proj") and hasattr(module, "act_fn"):
            key = (f"{path}.gate_proj.weight", f"{path}.up_proj.weight")
            module.register_forward_hook(partial(layers.mlp, key))
    with torch.no_grad():
        for part_NT in windows_NT.split(WINDOWS):
            model(part_NT, use_cache=False)
    for name in source.shapes if metrics else ():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            layers.found.sides[(name,)] = layers.metrics[_layer_of(name)]
    return layers.found


def _layer_of(name: str) -> int:
    return int(name.split(".")[2])
