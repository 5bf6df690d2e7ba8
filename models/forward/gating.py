"""What an expert does between and after its matrices: the module's own code, whatever the architecture."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from moepress.models.storage.experts import Expert


@dataclass(frozen=True, slots=True, kw_only=True)
class Gating:
    """g of f(x) = down @ g(gate @ x, up @ x), and what follows.

    Attributes:
        between: gate's output [T, F] (None where experts have no gate) and up's [T, F] to the intermediate [T, F].
        after: of the output [T, D], where the architecture does something to it before it is weighed.
    """

    between: Callable[[Tensor | None, Tensor], Tensor]
    after: Callable[[Tensor], Tensor] | None = None

    def intermediate(self, expert: Expert, inputs_TD: Tensor) -> Tensor:
        """What reaches the down projection, [T, F]."""
        linear = nn.functional.linear
        gate = None if expert.gate is None else linear(inputs_TD, expert.gate, expert.gate_bias)
        return self.between(gate, linear(inputs_TD, expert.up, expert.up_bias))

    def output(self, expert: Expert, intermediate_TF: Tensor) -> Tensor:
        """The expert's output [T, D]."""
        out = nn.functional.linear(intermediate_TF, expert.down, expert.down_bias)
        return out if self.after is None else self.after(out)


def gating_of(module: nn.Module, activation: Callable[[Tensor], Tensor]) -> Gating:
    """The gating of transformers' experts module.

    Args:
        module: the experts module; on the meta device, but for a norm behind the experts.
        activation: of the model, where the module has none of its own.
    """
    found: Any = getattr(module, "act_fn", activation)
    normed = getattr(module, "has_post_expert_norm", False)
    after = cast(nn.Module, module.post_expert_norm) if normed else None
    if not hasattr(module, "gate_up_proj"):
        return Gating(between=lambda _gate, up: found(up), after=after)
    own = getattr(module, "_apply_gate", None)
    if own is None or _is_usual(own):
        return Gating(between=lambda gate, up: found(gate) * up, after=after)
    if getattr(module, "is_concatenated", True):
        return Gating(between=lambda gate, up: own(torch.cat((_there(gate), up), dim=-1)), after=after)
    return Gating(between=lambda gate, up: own(torch.stack((_there(gate), up), dim=-1).flatten(-2)), after=after)


def _there(gate: Tensor | None) -> Tensor:
    assert gate is not None, "experts of this kind have a gate"
    return gate


def _is_usual(own: Any) -> bool:
    from transformers.integrations import moe

    return getattr(own, "__func__", own) is moe._default_apply_gate
