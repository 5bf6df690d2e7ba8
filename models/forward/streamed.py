"""The forward pass out of core: transformers' own decoder layers, one at a time, with the experts streamed from disk.

A layer runs in two steps. First, over all calibration windows: attention, norms, router and shared experts in
transformers' modules, with the experts module replaced by a recorder; this gives h + attention + shared(x), the
experts' inputs x, and the router's choices. Then, over all experts: each is read once, applied to its own tokens, and
added. So the memory needed is one layer without experts, a few experts, and the windows' hidden states.
"""

import math
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from moepress.errors import InvalidInputError
from moepress.models.families.family import Family
from moepress.models.forward.costs import stored_bytes
from moepress.models.forward.skeleton import build_skeleton
from moepress.models.forward.tensor_check import check_tensors
from moepress.models.storage.checkpoint import Source
from moepress.models.storage.experts import (
    Expert,
    experts_by_layer,
    pruned_config,
    read_expert,
    router_disk_names,
)
from moepress.runs.phases import phase

_TABLE_BYTES = 1 << 28  # an embedding table that is larger in fp32 is not read as a whole


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


class _Recorder(nn.Module):
    """Stands where the experts were: keeps what they would have got and returns zeros."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        self._seen[threading.get_ident()] = (hidden_states, top_k_index, top_k_weights)
        return torch.zeros_like(hidden_states)

    def take(self) -> tuple[Tensor, Tensor, Tensor]:
        """What this thread's forward pass brought; several may stand still in a layer (`models.forward.stepping`)."""
        return self._seen.pop(threading.get_ident())


class _Passage(nn.Module):
    """Stands where a decoder layer was: keeps the keyword arguments that transformers gives to that layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.attention_type = getattr(layer, "attention_type", None)
        self.arguments: dict[str, Any] = {}

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        self.arguments = kwargs
        return hidden_states


class StreamedModel:
    """A model that is never in memory as a whole.

    Args:
        source: where the weights come from.
        device: where the layers run.
        dtype: compute dtype; tensors that the family keeps in fp32 stay so.

    Raises:
        InvalidInputError: the source's tensors do not fit its config.
    """

    def __init__(self, source: Source, *, device: torch.device, dtype: torch.dtype) -> None:
        self.source, self.device, self.dtype = source, device, dtype
        counts = experts_by_layer(source)
        shape = source.outline.shape
        self.family, self.shape = source.family, replace(shape, experts=max([shape.experts, *counts.values()]))
        self.skeleton = _skeleton(source, counts)
        check_tensors(
            source.family,
            source.config,
            shape,
            source.shapes,
            folder=getattr(source, "folder", "the model folder"),
            model=self.skeleton,
        )
        self.config = self.skeleton.config
        self.moe_layers = frozenset(source.outline.moe_layers)
        self._disk_names = _names_by_layer(source)
        self._layers = list(self.skeleton.model.layers)
        self._passages = [_Passage(layer) for layer in self._layers]
        self._arguments: dict[tuple[int, int], list[dict[str, Any]]] = {}

    def embed(self, tokens_BT: Tensor) -> Tensor:
        """Token embeddings [B, T, D], in the compute dtype, on the device."""
        return next(self.embed_all(iter((tokens_BT,))))

    def embed_all(self, batches: Iterator[Tensor]) -> Iterator[Tensor]:
        """`embed` for many batches, reading the table once; of a large table only the rows that a batch needs."""
        name = "model.embed_tokens.weight"
        if 4 * math.prod(self.source.shapes[name]) > _TABLE_BYTES:
            for tokens in batches:
                ids, places = tokens.unique(return_inverse=True)
                rows = torch.stack([self.source.read_row(name, row) for row in ids.tolist()])
                yield rows.to(self.device, self.dtype)[places.to(self.device)]
            return
        weight = self._read(name)
        for tokens in batches:
            yield nn.functional.embedding(tokens.to(self.device), weight)

    def load_layer(self, layer: int, replaced: Mapping[str, Tensor] | None = None) -> nn.Module:
        """Materialise one decoder layer without its experts.

        Args:
            layer: its number.
            replaced: dense weights [O, I] by disk name that stand in for the stored ones (quantized attention, ...).
        """
        module: nn.Module = self._layers[layer]
        if layer in self.moe_layers:
            getattr(module, self.family.moe_module).experts = _Recorder()
        weights = {}
        for name, disk_name in self._disk_names[layer].items():
            if replaced is not None and disk_name in replaced:
                weights[name] = replaced[disk_name].to(self.device, self.dtype)
            else:
                with phase("read", size=stored_bytes(self.source, disk_name)):
                    weights[name] = self._read(disk_name)
        weights |= {
            n: t.new_empty(t.shape, device=self.device) for n, t in empty_of(module).items() if n not in weights
        }
        module.load_state_dict(weights, strict=True, assign=True)
        stray = [n for n, t in (*module.named_parameters(), *module.named_buffers()) if t.is_meta]
        assert not stray, f"not materialised: {stray}"
        return module

    def unload_layer(self, layer: int) -> None:
        """Drop a layer's weights."""
        self._layers[layer].to("meta")

    def run_layer(self, layer: int, hidden_BTD: Tensor) -> tuple[Tensor, Routed | None]:
        """Run a loaded layer without its routed experts.

        Args:
            layer: a layer that `load_layer` has made ready.
            hidden_BTD: hidden states of whole windows, [B, T, D].

        Returns:
            The layer's output, lacking the routed experts' part in MoE layers, and what those experts would get.
        """
        module = self._layers[layer]
        arguments = self._layer_arguments(hidden_BTD.shape[0], hidden_BTD.shape[1])[layer]
        if layer not in self.moe_layers:
            return _hidden(module(hidden_BTD, **arguments)), None
        block = getattr(module, self.family.moe_module)
        kept: dict[str, Tensor] = {}
        hooks = [
            module.post_attention_layernorm.register_forward_pre_hook(_keep(kept, "residual")),
            block.gate.register_forward_hook(_keep_logits(kept)),
        ]
        try:
            output = _hidden(module(hidden_BTD, **arguments))
        finally:
            for hook in hooks:
                hook.remove()
        inputs, chosen, weights = block.experts.take()
        return output, Routed(
            inputs=inputs.reshape(-1, self.shape.hidden),
            chosen=chosen,
            weights=weights,
            logits=kept["logits"],
            residual=kept["residual"].reshape(-1, self.shape.hidden),
        )

    def activation(self, layer: int) -> Callable[[Tensor], Tensor]:
        """The gate's activation function of a layer's experts."""
        from transformers.activations import ACT2FN

        return ACT2FN[self.config.hidden_act]  # type: ignore[no-any-return]

    def router_bias(self, layer: int) -> Tensor | None:
        """The correction bias of a layer's router, fp32 [E] on the CPU, or None."""
        names = [name for name in router_disk_names(self.source, layer) if name.endswith("bias")]
        return self.source.read(names[0]).float() if names else None

    def read_expert(self, layer: int, expert: int, dtype: torch.dtype | None = None) -> Expert:
        """One expert of a layer on the device, in the compute dtype or another one."""
        return read_expert(self.source, layer, expert).to(self.device, dtype or self.dtype)

    @property
    def solver_device(self) -> torch.device:
        """Where matrices are solved: MPS has no float64, so there it is the CPU."""
        return torch.device("cpu") if self.device.type == "mps" else self.device

    def final_norm(self) -> Callable[[Tensor], Tensor]:
        """The norm before lm_head, loaded."""
        norm = self.skeleton.model.norm
        norm.load_state_dict({"weight": self._read("model.norm.weight")}, assign=True)
        return norm  # type: ignore[no-any-return]

    def head(self) -> Callable[[Tensor], Tensor]:
        """Final norm and lm_head, loaded: hidden [.., D] to fp32 logits [.., V]."""
        norm = self.final_norm()
        tied = "lm_head.weight" not in self.source.shapes
        weight = self._read("model.embed_tokens.weight" if tied else "lm_head.weight")
        return lambda hidden: nn.functional.linear(norm(hidden), weight).float()

    def _read(self, disk_name: str) -> Tensor:
        keep = disk_name.endswith(self.family.float32) if self.family.float32 else False
        return self.source.read(disk_name).to(self.device, torch.float32 if keep else self.dtype)

    def _layer_arguments(self, batch: int, length: int) -> list[dict[str, Any]]:
        """Masks and rotary embeddings per layer, as transformers' own model code makes them for that shape."""
        if (batch, length) not in self._arguments:
            body = self.skeleton.model
            rotary, embed, norm = body.rotary_emb, body.embed_tokens, body.norm
            body.rotary_emb = type(rotary)(config=self.config).to(self.device)
            body.layers, body.norm = nn.ModuleList(self._passages), nn.Identity()
            try:
                hidden = torch.zeros(batch, length, self.shape.hidden, device=self.device, dtype=self.dtype)
                body(inputs_embeds=hidden, use_cache=False)
            finally:
                body.rotary_emb, body.embed_tokens, body.norm = rotary, embed, norm
                body.layers = nn.ModuleList(self._layers)
            self._arguments[batch, length] = [passage.arguments for passage in self._passages]
        return self._arguments[batch, length]


def _skeleton(source: Source, counts: Mapping[int, int]) -> Any:
    """The model on the meta device; layers with a number of experts of their own come from a model of that number."""
    model = build_skeleton(source.config)
    stated = source.outline.shape.experts
    for count in sorted(set(counts.values()) - {stated}):
        other = build_skeleton(pruned_config(source.family, source.config, count))
        for layer in (layer for layer, own in counts.items() if own == count):
            model.model.layers[layer] = other.model.layers[layer]
    return model


def empty_of(module: nn.Module) -> dict[str, Tensor]:
    """Its tensors without an element, such as a shared expert of width 0, which a checkpoint may leave out."""
    return {name: tensor for name, tensor in module.state_dict().items() if tensor.numel() == 0}


def _hidden(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output  # type: ignore[no-any-return]


def _keep(kept: dict[str, Tensor], name: str) -> Callable[..., None]:
    owner = threading.get_ident()

    def hook(_module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        if threading.get_ident() == owner:
            kept[name] = arguments[0]

    return hook


def _keep_logits(kept: dict[str, Tensor]) -> Callable[..., None]:
    owner = threading.get_ident()

    def hook(_module: nn.Module, _arguments: Any, output: tuple[Tensor, ...]) -> None:
        if threading.get_ident() == owner:
            kept["logits"] = output[0]

    return hook


def inner_name(family: Family, disk_name: str, layer: int) -> str:
    """A tensor's name inside of transformers' decoder layer."""
    return family.module_name(disk_name).split(f"layers.{layer}.", 1)[1]


def _names_by_layer(source: Source) -> dict[int, dict[str, str]]:
    """Per layer: name inside transformers' decoder layer -> name on disk, without the routed experts."""
    outline, family = source.outline, source.family
    return {
        layer: {
            inner: name
            for name in outline.names_by_layer.get(layer, ())
            if ".experts." not in (inner := inner_name(family, name, layer))
            and not name.endswith("rotary_emb.inv_freq")
        }
        for layer in range(outline.shape.layers)
    }


def apply_expert(expert: Expert, inputs_TD: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
    """One expert's output [T, D] for its tokens [T, D]."""
    linear = nn.functional.linear
    return linear(activation(linear(inputs_TD, expert.gate)) * linear(inputs_TD, expert.up), expert.down)


def tokens_of(chosen_TK: Tensor, experts: int) -> list[tuple[Tensor, Tensor]]:
    """Per expert, the positions that chose it: (token numbers ascending, their slots among the K), int64.

    One stable sort instead of E scans, so that the cost does not grow with the number of experts.
    """
    slots = chosen_TK.shape[1]
    flat = chosen_TK.reshape(-1)
    order = torch.sort(flat, stable=True).indices
    counts = torch.bincount(flat, minlength=experts).tolist()
    return [(part // slots, part % slots) for part in torch.split(order, counts)]


def require_finite_hidden(hidden: Tensor, layer: int) -> None:
    """Refuse to go on with NaN or Inf activations.

    Raises:
        InvalidInputError: naming the layer.
    """
    # Window by window: a test of all at once would take the memory that mapping them saves.
    if not all(bool(torch.isfinite(window).all()) for window in hidden):
        raise InvalidInputError(
            f"Layer {layer} gives NaN or Inf activations; use --dtype float32, or check the model with transformers."
        )
