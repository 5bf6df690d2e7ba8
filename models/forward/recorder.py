"""What is looked at while a decoder layer runs: what its experts would get, router logits, the residual stream."""

import inspect
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from moepress.errors import UnsupportedError
from moepress.models.families.family import Family
from moepress.models.storage.checkpoint import Source
from moepress.models.storage.experts import router_disk_names


@dataclass(frozen=True, slots=True, kw_only=True)
class Routed:
    """What reached the experts of one layer, for a batch of T tokens.

    Attributes:
        inputs: the experts' inputs [T, D].
        chosen: expert numbers int64 [T, K], from the model's own router.
        weights: combine weights [T, K], from the model's own router.
        logits: router logits [T, E].
        residual: residual stream before the MoE block [T, D].
    """

    inputs: Tensor
    chosen: Tensor
    weights: Tensor
    logits: Tensor
    residual: Tensor


class Recorder(nn.Module):
    """Stands where the experts were: keeps what they would have got and returns zeros, or their sum where it is known.

    Args:
        experts: transformers' experts module, of which a norm behind the experts is kept.
    """

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self._seen: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        self._given: dict[int, Tensor | None] = {}
        self.__dict__["experts"] = experts
        # Some models hand every expert all tokens, already weighed, and sum up themselves.
        self.scattered = len(inspect.signature(type(experts).forward).parameters) == 2
        # A norm behind the experts is a child here too, under its own name, so that its weight is loaded.
        for name, child in experts.named_children():
            if "norm" in name:
                self._modules[name] = child
        self.has_norm = bool(getattr(experts, "has_post_expert_norm", False))

    def __getattr__(self, name: str) -> Any:
        """What the block asks of its experts, such as their number."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["experts"], name)

    def give(self, given_TD: Tensor | None) -> None:
        """The sum that this thread's next forward pass returns; None for zeros."""
        self._given[threading.get_ident()] = given_TD

    def forward(self, hidden_states: Tensor, *arguments: Tensor, **keywords: Tensor) -> Tensor:
        """In the place of the experts."""
        me = threading.get_ident()
        given = self._given.pop(me, None)
        if self.scattered:
            return self._scattered(hidden_states, given)
        chosen, weights = (*arguments, *keywords.values())[:2]  # some name them otherwise
        self._seen[me] = (hidden_states, chosen.flatten(0, -2), weights.flatten(0, -2))
        return torch.zeros_like(hidden_states) if given is None else given.to(hidden_states).view_as(hidden_states)

    def _scattered(self, hidden_states: Tensor, given: Tensor | None) -> Tensor:
        """All tokens once per expert [E * T, D], zeros where the router did not choose it; one choice a token."""
        experts = self.experts.down_proj.shape[0]
        by_expert = hidden_states.view(experts, -1, hidden_states.shape[-1])
        active = by_expert.abs().amax(dim=2) > 0
        if bool((active.sum(dim=0) > 1).any()):
            raise UnsupportedError(
                "This model weighs the inputs of several experts a token, which can not be told apart; models with one "
                "expert a token can be pressed."
            )
        chosen = active.int().argmax(dim=0)
        inputs = by_expert[chosen, torch.arange(len(chosen), device=chosen.device)]
        self._seen[threading.get_ident()] = (inputs, chosen[:, None], torch.ones_like(inputs[:, :1]))
        out = torch.zeros_like(by_expert)
        if given is not None:
            out[0] = given
        return out.view_as(hidden_states)

    def take(self) -> tuple[Tensor, Tensor, Tensor]:
        """What this thread's forward pass brought; several may stand still in a layer (`models.forward.stepping`)."""
        return self._seen.pop(threading.get_ident())


def router_path(family: Family, source: Source, layer: int) -> str:
    """The module inside of a layer that holds the router's weight."""
    weight = router_disk_names(source, layer)[0]
    return family.inner_name(weight, layer).rpartition(".")[0]


def keep_logits(kept: dict[str, Any], *, recompute: bool) -> Callable[..., None]:
    """A hook of the router that keeps its logits.

    Args:
        kept: gets `logits`, [T, E].
        recompute: the module is not known to return them first; if it is no Linear they are made of what it gets.
    """
    owner = threading.get_ident()

    def hook(module: nn.Module, arguments: tuple[Tensor, ...], output: Any) -> None:
        if threading.get_ident() != owner:
            return
        if isinstance(module, nn.Linear) and isinstance(output, Tensor):
            kept["logits"] = output.flatten(0, -2)
        elif recompute:
            weight, bias = cast(Tensor, module.weight), cast("Tensor | None", getattr(module, "bias", None))
            added = bias.float() if bias is not None and bias.shape == weight.shape[:1] else None
            logits = nn.functional.linear(arguments[0].float(), weight.float(), added)
            kept["logits"] = logits.flatten(0, -2)
        else:
            kept["logits"] = output[0]

    return hook


def keep_residual(kept: dict[str, Any], layer: nn.Module, *, derived: bool) -> list[RemovableHandle]:
    """Hooks that keep the residual stream before the MoE block.

    Args:
        kept: gets `residual`; of a derived family `norms`: address of what a norm of the layer gave -> what it got.
        layer: the decoder layer.
        derived: it is not known which norm is the one before the block.
    """
    owner = threading.get_ident()
    if not derived:

        def before(_module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            if threading.get_ident() == owner:
                kept["residual"] = arguments[0]

        norm = cast(nn.Module, layer.post_attention_layernorm)
        return [norm.register_forward_pre_hook(before)]
    kept["norms"] = {}

    def after(_module: nn.Module, arguments: tuple[Tensor, ...], output: Any) -> None:
        if threading.get_ident() == owner and isinstance(output, Tensor):
            kept["norms"][output.data_ptr()] = arguments[0]

    norms = [module for name, module in layer.named_children() if "norm" in type(module).__name__.lower()]
    return [norm.register_forward_hook(after) for norm in norms]
