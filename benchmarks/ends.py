"""What errors at a matrix's output cost at the end of the network: factors from a backward pass over calibration text.

The whole model is in memory, in transformers' own modules. For each matrix, or Linears with one input, the gradients
g_t at its output give the factor B = sum_t g_t g_t^T of a Kronecker approximation of the Fisher information, and token
weights a_t = |g_t|^2. Gradients are of one of two things:

- the cross-entropy to labels drawn from the model's own output, which gives the Fisher information itself (and that is
  the second derivative of KL at 0);
- the routers' margins: how far a chosen expert's score is above that of the best one not chosen, each with a random
  sign and divided by sqrt(m^2 + median(m)^2), so that near ties count most. By Chebyshev's inequality that bounds what
  errors of a given size do to the choice. The signs make products of different tokens vanish in the mean.

Letters: T tokens, O output rows, D hidden size, E experts, K experts per token.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from moepress.compress.gptq.include import Include, linear_groups
from moepress.models.storage.checkpoint import Source

Key = tuple[str, ...]
"""Matrices that are solved as one, their rows one above the other, by their names on disk."""
WINDOWS = 4  # at a time


@dataclass(slots=True)
class Ends:
    """Of every key: B fp32 [O, O], a sum; and a_t fp32 [T], 0 for tokens that do not reach it."""

    sides: dict[Key, Tensor] = field(default_factory=dict)
    tokens: dict[Key, Tensor] = field(default_factory=dict)

    def add(self, key: Key, gradient_TO: Tensor, places_T: Tensor, total: int) -> None:
        """Add the gradients of some tokens, of so many in all."""
        if key not in self.sides:
            rows = gradient_TO.shape[1]
            self.sides[key], self.tokens[key] = torch.zeros(rows, rows), torch.zeros(total)
        self.sides[key].addmm_(gradient_TO.T, gradient_TO)
        self.tokens[key].index_add_(0, places_T, gradient_TO.square().sum(dim=1))

    def side(self, key: Key, floor: float) -> Tensor | None:
        """B with a mean diagonal of 1 + `floor`, of which the latter is a multiple of the identity."""
        side_OO = self.sides.get(key)
        if side_OO is None or float(side_OO.trace()) <= 0:
            return None
        return side_OO * (len(side_OO) / float(side_OO.trace())) + floor * torch.eye(len(side_OO))

    def weights(self, key: Key, power: float) -> Tensor | None:
        """a_t^power with a mean of 1 over the tokens that reach it; those that do not get 1."""
        found_T = self.tokens.get(key)
        if found_T is None or not bool((found_T > 0).any()):
            return None
        seen_T = found_T > 0
        weights_T = found_T.pow(power)
        return torch.where(seen_T, weights_T / weights_T[seen_T].mean(), 1.0)


@dataclass(slots=True)
class _Seen:
    """What one forward pass leaves for the backward ones: routers' margins; and gradients as they come."""

    margins: list[Tensor] = field(default_factory=list)
    gradients: dict[str, Tensor] = field(default_factory=dict)
    places: dict[str, Tensor] = field(default_factory=dict)

    def watch(self, name: str, output: Tensor, places_T: Tensor | None = None) -> None:
        if places_T is not None:
            self.places[name] = places_T
        output.register_hook(partial(self.gradients.__setitem__, name))


def layer_key(layer: int) -> Key:
    """Of what is found at a layer's output: B [D, D]."""
    return (f"model.layers.{layer}",)


def gather_ends(
    source: Source, folder: str, windows_NT: Tensor, include: frozenset[Include], *, samples: int = 2, seed: int = 0
) -> tuple[Ends, Ends]:
    """Factors of all matrices that are quantized, by the network's end and by the routers.

    Args:
        source, folder: the model.
        windows_NT: calibration tokens.
        include: parts besides the routed experts.
        samples: labels (and signs) drawn for each token.
        seed: of what is drawn.
    """
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.requires_grad_(False).eval()
    seen, layers = _Seen(), source.shape.layers
    keys = [group.names for n in range(layers) for group in linear_groups(source, n, layers, include)]
    for name in [name for key in keys for name in key]:
        model.get_submodule(name.removesuffix(".weight")).register_forward_hook(partial(_watch_linear, seen, name))
    for layer in range(layers):
        keys.append(layer_key(layer))
        model.get_submodule(*layer_key(layer)).register_forward_hook(partial(_watch_linear, seen, *layer_key(layer)))
    for path, module in model.named_modules():
        if path.endswith(".mlp.experts"):
            layer = int(path.split(".")[-3])
            names = [source.family.expert_names(layer, expert) for expert in range(source.shape.experts)]
            module.forward = partial(_experts_forward, seen, module, names)
            keys += [key for gate, up, down in names for key in ((gate, up), (down,))]
        elif path.endswith(".mlp.gate"):
            module.register_forward_hook(partial(_watch_router, seen))
    end, routers, drawn = Ends(), Ends(), torch.Generator().manual_seed(seed)
    total, window = windows_NT.numel(), windows_NT.shape[1]
    for start in range(0, len(windows_NT), WINDOWS):
        part_NT = windows_NT[start : start + WINDOWS]
        seen.margins.clear()
        seen.places.clear()
        embedded = model.get_input_embeddings()(part_NT).requires_grad_()
        logits_TV = model(inputs_embeds=embedded, use_cache=False).logits.flatten(0, 1)
        labels_ST = logits_TV.detach().softmax(dim=1).multinomial(samples, replacement=True, generator=drawn).T
        for labels_T in labels_ST:
            aims: list[tuple[Ends, Callable[[], Tensor]]] = [
                (end, partial(torch.nn.functional.cross_entropy, logits_TV, labels_T, reduction="sum")),
                (routers, partial(_routers_loss, seen.margins, drawn)),
            ]
            for ends, loss in aims:
                seen.gradients.clear()
                loss().backward(retain_graph=True)
                _add(ends, seen, keys, start * window, part_NT.numel(), total)
    return end, routers


def _add(ends: Ends, seen: _Seen, keys: Sequence[Key], first: int, tokens: int, total: int) -> None:
    """Take the gradients of a backward pass over `tokens` tokens, of which `first` came before."""
    for key in keys:
        if key[0] not in seen.gradients:  # no token, or nothing of what is asked for hangs on it
            continue
        whole = key[:1] if key[0] in seen.places else key  # experts' gate and up are one product
        gradient_TO = torch.cat([seen.gradients[name].flatten(0, -2) for name in whole], dim=1)
        ends.add(key, gradient_TO, seen.places.get(key[0], torch.arange(tokens)) + first, total)


def _watch_linear(seen: _Seen, name: str, _module: Any, _given: Any, output: Tensor) -> None:
    seen.watch(name, output)


def _watch_router(seen: _Seen, module: Any, _given: Any, output: Any) -> None:
    """Margins [T]: scores as far as they decide, so without what is the same for all experts of a token."""
    logits_TE, _, chosen_TK = output
    scores_TE = logits_TE
    if hasattr(module, "e_score_correction_bias"):
        scores_TE = logits_TE.sigmoid() + module.e_score_correction_bias
    least_T = scores_TE.gather(1, chosen_TK).amin(dim=1)
    chosen_TE = torch.zeros_like(scores_TE, dtype=torch.bool).scatter_(1, chosen_TK, True)
    barred_TE = chosen_TE | (scores_TE > least_T[:, None])  # the latter are of groups that were not chosen
    seen.margins.append(least_T - scores_TE.masked_fill(barred_TE, -1e4).amax(dim=1))


def _routers_loss(margins: Sequence[Tensor], drawn: torch.Generator) -> Tensor:
    total = torch.zeros(())
    for margin_T in margins:
        signs_T = torch.randint(0, 2, margin_T.shape, generator=drawn) * 2.0 - 1
        scale_T = (margin_T.detach().square() + margin_T.detach().median().square()).rsqrt()
        total = total + (signs_T * scale_T * margin_T).sum()
    return total


def _experts_forward(
    seen: _Seen, module: Any, names: Sequence[tuple[str, ...]], hidden_TD: Tensor, chosen_TK: Tensor, weights_TK: Tensor
) -> Tensor:
    """What transformers' experts give, with the outputs of each expert's matrices watched."""
    out_TD = torch.zeros_like(hidden_TD)
    for expert, (gate_name, _, down_name) in enumerate(names):
        tokens, slots = (chosen_TK == expert).nonzero(as_tuple=True)
        if not len(tokens):
            continue
        both = hidden_TD[tokens] @ module.gate_up_proj[expert].T
        seen.watch(gate_name, both, tokens)
        gate, up = both.chunk(2, dim=-1)
        own = (module.act_fn(gate) * up) @ module.down_proj[expert].T
        seen.watch(down_name, own, tokens)
        out_TD = out_TD.index_add(0, tokens, own * weights_TK[tokens, slots, None])
    return out_TD
