"""The forward pass out of core: transformers' own decoder layers, one at a time, with the experts streamed from disk.

A layer runs in two steps. First, over all calibration windows: attention, norms, router and shared experts in
transformers' modules, with the experts module replaced by a recorder; this gives the experts' inputs x and the router's
choices. Then, over all experts: each is read once and applied to its own tokens. Where the architecture adds the
experts' outputs to what the rest of the layer gives, the first step gave that rest and they are added to it. Elsewhere
the layer runs once more, with their sum in the place of the experts (`walk.last_step`). So the memory needed is one
layer without experts, a few experts, and the windows' hidden states.
"""

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from moepress.errors import InvalidInputError, UnsupportedError
from moepress.models.families.family import Family, Part, numbered
from moepress.models.families.places import Places, tensors_of
from moepress.models.families.skeleton import build_skeleton
from moepress.models.forward.costs import stored_bytes
from moepress.models.forward.gating import Gating, gating_of
from moepress.models.forward.recorder import Recorder, Routed, keep_logits, keep_residual, router_path
from moepress.models.forward.replay import Returned, hidden_of, put_away
from moepress.models.forward.tensor_check import check_tensors
from moepress.models.storage.checkpoint import Source
from moepress.models.storage.experts import Expert, experts_by_layer, pruned_config, read_expert, router_disk_names
from moepress.models.storage.mtp import prefix_of
from moepress.models.storage.placed import onto
from moepress.runs.phases import phase

_TABLE_BYTES = 1 << 28  # an embedding table that is larger in fp32 is not read as a whole
_HEAD_ROWS = 512  # rows that pass through the model's end together


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
        self.skeleton = _skeleton(source, counts).requires_grad_(False)  # no pass back wants gradients of weights
        check_tensors(
            source.family,
            source.config,
            shape,
            source.shapes,
            folder=getattr(source, "folder", "the model folder"),
            model=self.skeleton,
        )
        self.config = self.skeleton.config.get_text_config()
        self.moe_layers = frozenset(source.outline.moe_layers)
        self._places = Places(self.skeleton, source.shapes) if self.family.converted else None
        self._disk_names = _names_by_layer(source)
        self._computed = _computed(self.skeleton)
        path = self.family.module_layers_at
        self._gatings = {
            layer: self.skeleton.get_submodule(f"{path}{layer}.{self.family.experts_module}")
            for layer in sorted(self.moe_layers)
        }
        _require_width(self.family, self.shape.hidden, self._gatings)
        self._replay = put_away(self.skeleton, path, dtype=dtype, device=device)
        self._twins: dict[int, int] = {}
        self._usual: dict[str, str] = {}  # of added layers: name on disk -> the same tensor's in the layer's twin
        self._recorders = {layer: Recorder(module) for layer, module in self._gatings.items()}
        for layer, recorder in self._recorders.items():
            block, _, leaf = self.family.experts_module.rpartition(".")
            setattr(self.layer(layer).get_submodule(block), leaf, recorder)

    def layer(self, layer: int) -> nn.Module:
        """transformers' decoder layer, with the experts put away; its weights are there between load and unload."""
        return self._replay.module(layer)

    def has_experts(self, layer: int) -> bool:
        """Whether a layer has routed experts; of layers that were added too."""
        return layer in self._recorders

    def add_layer(self, layer: int, twin: int) -> None:
        """Put one more layer behind the last, which transformers' model does not have: a decoder layer like another.

        Args:
            layer: its number, behind those that there are.
            twin: a layer with experts whose module it is a copy of, and with whose arguments it is called.
        """
        if layer in self._twins:
            return
        family = self.family
        module = copy.deepcopy(self.layer(twin))
        recorder = module.get_submodule(family.experts_module)
        assert isinstance(recorder, Recorder)
        path, usual = family.module_layers_at, prefix_of(family, twin)
        own = prefix_of(family, layer)
        self._twins[layer], self._recorders[layer], self._gatings[layer] = twin, recorder, recorder.experts
        self._replay.behind[layer] = (twin, module)
        like = {own + name.removeprefix(usual): name for name in self._disk_names[twin]}
        self._usual |= like
        self._disk_names[layer] = {name: self._disk_names[twin][other] for name, other in like.items()}
        self._computed |= {f"{path}{layer}.{name}": found for name, found in _computed(module).items()}

    def embed(self, tokens_BT: Tensor) -> Tensor:
        """What the first layer gets of tokens: mostly embeddings [B, T, D], in the compute dtype, on the device."""
        return next(self.embed_all(iter((tokens_BT,))))

    def embed_all(self, batches: Iterator[Tensor]) -> Iterator[Tensor]:
        """`embed` for many batches, reading the table once; of a large table only the rows that a batch needs."""
        name, embedding = self.family.embeddings, self._replay.embedding
        self._load_outer()
        large = 4 * math.prod(self.source.shapes[name]) > _TABLE_BYTES
        whole = None if large and not self._looks_back else self._read(name)
        try:
            for tokens in batches:
                ids = torch.arange(len(whole)) if whole is not None else tokens.unique()
                rows = self._rows(ids) if whole is None else whole
                # Fewer rows than the module had, perhaps.
                embedding._parameters["weight"] = nn.Parameter(rows, requires_grad=False)
                embedding.__dict__["rows_read"] = ids.to(self.device)
                yield self._replay.embed(tokens.to(self.device)).to(self.dtype)
        finally:  # also where only the first batch was wanted
            if not self._looks_back:
                embedding.__dict__.pop("rows_read", None)
                table = torch.empty(self.source.shapes[name], device="meta")
                embedding._parameters["weight"] = nn.Parameter(table, requires_grad=False)

    def share_embeddings(self, other: "StreamedModel") -> None:
        """Take over what another model of the same source has embedded with, where layers look back at it."""
        if other._looks_back:
            mine, theirs = self._replay.embedding, other._replay.embedding
            mine._parameters["weight"] = theirs._parameters["weight"]
            mine.__dict__["rows_read"] = theirs.__dict__["rows_read"]

    def _rows(self, ids: Tensor) -> Tensor:
        """Some rows of the embedding table, [U, D]."""
        name = self.family.embeddings
        return torch.stack([self.source.read_row(name, row) for row in ids.tolist()]).to(self.device, self.dtype)

    @cached_property
    def _looks_back(self) -> bool:
        """Whether the model's code makes more of the embeddings than the first layer's input, for later layers."""
        return any(len(self.source.shapes[name]) == 2 for name in self._outer_names.values())

    def load_layer(self, layer: int, replaced: Mapping[str, Tensor] | None = None) -> nn.Module:
        """Materialise one decoder layer without its experts.

        Args:
            layer: its number.
            replaced: dense weights [O, I] by disk name that stand in for the stored ones (quantized attention, ...).
        """
        self._load_outer()
        module, twin = self.layer(layer), self._twins.get(layer, layer)
        given: dict[str, Tensor] = {}
        for disk_name in self._disk_names[layer]:
            usual = self._usual.get(disk_name, disk_name)
            if replaced is not None and disk_name in replaced:
                given[usual] = replaced[disk_name].to(self.device, self.dtype)
            else:
                with phase("read", size=stored_bytes(self.source, disk_name)):
                    given[usual] = self._read(disk_name)
        weights = self._made(given, f"{self.family.module_layers_at}{twin}.", self._disk_names[twin])
        self._fill(module, f"{self.family.module_layers_at}{layer}.", weights)
        return module

    def _made(self, given: Mapping[str, Tensor], prefix: str, names: Mapping[str, str]) -> dict[str, Tensor]:
        """Tensors of transformers' module, by their names inside of it, of those on disk."""
        if self._places is None:
            return {inner: given[disk_name] for disk_name, inner in names.items()}
        made, converted = dict[str, Tensor](), dict[str, Tensor]()
        for disk_name, inner in names.items():
            if numbered(disk_name)[0] in self.family.converted:
                converted[disk_name] = given[disk_name]
            else:
                made[inner] = given[disk_name]
        found = tensors_of(self._places, converted)
        return made | {name.removeprefix(prefix): tensor for name, tensor in found.items()}

    def _fill(self, module: nn.Module, prefix: str, weights: dict[str, Tensor]) -> None:
        weights |= {
            n: t.new_empty(t.shape, device=self.device) for n, t in empty_of(module).items() if n not in weights
        }
        module.load_state_dict(weights, strict=True, assign=True)
        for name, (owner, value) in self._computed.items():
            if name.startswith(prefix):
                owner._buffers[name.rpartition(".")[2]] = value.to(self.device)
        stray = [n for n, t in (*module.named_parameters(), *module.named_buffers()) if t.is_meta]
        assert not stray, f"not materialised: {stray}"

    def _load_outer(self) -> None:
        """Materialise what the model's code needs besides the layers, once: norms, and whatever else is small."""
        if self._outer_loaded:
            return
        for module_name, disk_name in self._outer_names.items():
            parent, _, leaf = module_name.rpartition(".")
            self.skeleton.get_submodule(parent).load_state_dict(
                {leaf: self._read(disk_name)}, strict=False, assign=True
            )
        for owner, value in self._computed.values():
            for name, buffer in owner._buffers.items():
                if buffer is value:
                    owner._buffers[name] = value.to(self.device)
        self._outer_loaded = True

    _outer_loaded = False

    @cached_property
    def _outer_names(self) -> dict[str, str]:
        """Tensors that belong to no layer, tower, table or head: name in transformers' model -> name on disk."""
        family = self.family
        head = family.head.rpartition(".")[0]
        names = [
            name
            for name in self.source.outline.names_by_layer.get(None, ())
            if name != family.embeddings
            and not name.startswith(f"{head}.")
            and not name.endswith("rotary_emb.inv_freq")
            and (not family.derived or family.part_of(name) not in (None, Part.TOWERS))
        ]
        there = {name: name for name, _ in (*self.skeleton.named_parameters(), *self.skeleton.named_buffers())}
        return {module: name for name in names if (module := family.module_name(name)) in there or family.derived}

    def unload_layer(self, layer: int) -> None:
        """Drop a layer's weights."""
        self.layer(layer).to("meta")

    def run_layer(
        self, layer: int, before: Returned, ids_BT: Tensor | None = None, *, given_TD: Tensor | None = None
    ) -> tuple[Any, Routed | None]:
        """Run a loaded layer without its routed experts.

        Args:
            layer: a layer that `load_layer` has made ready.
            before: what the layer before returned, of whole windows: hidden states [B, T, D], or those and more.
            ids_BT: the windows' tokens, int64; a few architectures look at them in their layers. None for zeros.
            given_TD: the routed experts' sum, where it is known and is to go on through the layer.

        Returns:
            What the layer returns, lacking the routed experts' part in MoE layers where it is not given, and what those
            experts would get.
        """
        hidden = hidden_of(before)
        ids = torch.zeros(hidden.shape[:2], dtype=torch.int64) if ids_BT is None else ids_BT
        if layer not in self._recorders:
            return self._replay.layer(layer, before, ids.to(self.device)), None
        module, recorder = self.layer(layer), self._recorders[layer]
        kept: dict[str, Any] = {}
        router = module.get_submodule(router_path(self.family, self.source, self._twins.get(layer, layer)))
        hooks = [router.register_forward_hook(keep_logits(kept, recompute=self.family.derived))]
        hooks += keep_residual(kept, module, derived=self.family.derived)
        recorder.give(given_TD)
        try:
            returned = self._replay.layer(layer, before, ids.to(self.device))
        finally:
            for hook in hooks:
                hook.remove()
        inputs, chosen, weights = recorder.take()
        width = inputs.shape[-1]
        residual = kept.get("residual") if not self.family.derived else kept["norms"].get(inputs.data_ptr())
        if residual is None or residual.numel() != inputs.numel():
            residual = inputs  # an architecture without a norm right before its experts
        return returned, Routed(
            inputs=inputs.reshape(-1, width),
            chosen=chosen,
            weights=weights,
            logits=kept["logits"].reshape(len(chosen), -1)[:, : self.shape.experts],
            residual=residual.reshape(-1, width),
        )

    def gating(self, layer: int) -> Gating:
        """What a layer's experts do between their matrices."""
        from transformers.activations import ACT2FN

        activation = getattr(self.config, "hidden_act", None)
        module = self._gatings[layer]
        return gating_of(module, ACT2FN[activation] if isinstance(activation, str) else nn.functional.silu)

    def router_bias(self, layer: int) -> Tensor | None:
        """The correction bias of a layer's router, fp32 [E] on the CPU, or None."""
        if self.family.rule is None or not self.family.rule.bias:
            return None
        own = self.family.correction
        names = [self.family.at(own, layer)] if own else router_disk_names(self.source, layer)
        found = next((name for name in names if name in self.source.shapes and (own or name.endswith("bias"))), None)
        return None if found is None else self.source.read(found).float().reshape(-1)

    def weighs_inputs(self, layer: int) -> bool:
        """Whether what a layer's experts get was weighed before, so that their outputs are not."""
        return self._recorders[layer].scattered

    def read_expert(self, layer: int, expert: int, dtype: torch.dtype | None = None) -> Expert:
        """One expert of a layer on the device, in the compute dtype or another one."""
        with onto(self.device):
            return read_expert(self.source, layer, expert).to(self.device, dtype or self.dtype)

    @property
    def solver_device(self) -> torch.device:
        """Where matrices are solved: MPS has no float64, so there it is the CPU."""
        return torch.device("cpu") if self.device.type == "mps" else self.device

    def head_inputs(self, hidden: Tensor) -> Tensor:
        """What lm_head gets of the last layer's hidden states [.., D], or [.., S, D] of models with several streams."""
        self._load_outer()
        return self._behind(hidden, self._replay.before_head)

    def head(self) -> Callable[[Tensor], Tensor]:
        """All behind the last layer, loaded: hidden states as of `head_inputs` to fp32 logits [.., V]."""
        self._load_outer()
        module, path = self._replay.output, self.family.head.rpartition(".")[0]
        tied = self.family.head not in self.source.shapes
        names = [n for n in self.source.outline.names_by_layer.get(None, ()) if n.startswith(f"{path}.")]
        weights = {name.removeprefix(f"{path}."): self._read(name) for name in names}
        if tied:
            weights["weight"] = self._read(self.family.embeddings)
        module.load_state_dict(weights, assign=True)
        return lambda hidden: self._behind(hidden, self._replay.logits).float()

    def _behind(self, hidden: Tensor, run: Callable[[Returned, Tensor], Tensor]) -> Tensor:
        """Pass the rows of hidden states through what is behind the layers, so many at a time."""
        streams = self.stream_shape
        leading = hidden.shape[: hidden.ndim - len(streams)]
        rows = hidden.reshape(-1, *streams).split(_HEAD_ROWS)
        states = (None,) * max(self._form - 1, 0)
        found = []
        for part in rows:
            ids = torch.zeros(1, len(part), dtype=torch.int64, device=self.device)
            found.append(run((part[None], *states) if self._form else part[None], ids))
        return torch.cat([part[0] for part in found]).reshape(*leading, -1)

    @cached_property
    def stream_shape(self) -> tuple[int, ...]:
        """The shape of one token's hidden states between layers: (D,), or (S, D) of models with several streams."""
        return tuple(self.embed(torch.zeros(1, 1, dtype=torch.int64)).shape[2:])

    def read(self, disk_name: str) -> Tensor:
        """A tensor as the model computes with it, on its device."""
        return self._read(disk_name)

    @cached_property
    def _form(self) -> int:
        """How many values a layer returns; 0 for hidden states alone, not in a tuple. One token tells."""
        token = torch.zeros(1, 1, dtype=torch.int64)
        loaded = not any(parameter.is_meta for parameter in self.layer(0).parameters())
        if not loaded:
            self.load_layer(0)
        returned, _ = self.run_layer(0, self.embed(token), token)
        if not loaded:
            self.unload_layer(0)
        return len(returned) if isinstance(returned, tuple) else 0

    def _read(self, disk_name: str) -> Tensor:
        keep = disk_name.endswith(self.family.float32) if self.family.float32 else False
        with onto(self.device):
            tensor = self.source.read(disk_name)
        if not tensor.is_floating_point():
            return tensor.to(self.device)
        return tensor.to(self.device, torch.float32 if keep else self.dtype)


def _skeleton(source: Source, counts: Mapping[int, int]) -> Any:
    """The model on the meta device; layers with a number of experts of their own come from a model of that number."""
    model = build_skeleton(source.config)
    stated, path = source.outline.shape.experts, source.family.module_layers_at.removesuffix(".")
    for count in sorted(set(counts.values()) - {stated}):
        other = build_skeleton(pruned_config(source.family, source.config, count))
        for layer in (layer for layer, own in counts.items() if own == count):
            model.get_submodule(path)[layer] = other.get_submodule(path)[layer]
    return model


def _require_width(family: Family, hidden: int, experts: Mapping[int, Any]) -> None:
    """Refuse experts that work on another width than the model's, for which no buffers are made.

    Raises:
        UnsupportedError: naming both widths.
    """
    for module in list(experts.values())[:1] if family.derived else ():
        _count, rows, columns = module.down_proj.shape
        if rows * columns != family.expert_width * hidden:
            raise UnsupportedError(
                f"The experts of this {family.name} model work on {rows * columns // family.expert_width} columns and "
                f"the model on {hidden}; such a model can not be run layer by layer here."
            )


def _computed(model: nn.Module) -> dict[str, tuple[nn.Module, Tensor]]:
    """Buffers that are in no file: the module that has it, and its value, which the skeleton has computed."""
    return {
        f"{path}.{name}" if path else name: (module, module._buffers[name])
        for path, module in model.named_modules()
        for name in module._non_persistent_buffers_set
        if module._buffers.get(name) is not None and not module._buffers[name].is_meta
    }


def empty_of(module: nn.Module) -> dict[str, Tensor]:
    """Its tensors without an element, such as a shared expert of width 0, which a checkpoint may leave out."""
    return {name: tensor for name, tensor in module.state_dict().items() if tensor.numel() == 0}


def _names_by_layer(source: Source) -> dict[int, dict[str, str]]:
    """Per layer: name on disk -> name inside transformers' decoder layer, without the routed experts."""
    outline, family = source.outline, source.family
    fused = {name for layer in outline.moe_layers for name in family.fused_names(layer)}
    return {
        layer: {
            name: family.inner_name(name, layer)
            for name in outline.names_by_layer.get(layer, ())
            if name not in fused and family.expert_of(name) is None and not name.endswith("rotary_emb.inv_freq")
        }
        for layer in range(outline.shape.layers)
    }


def apply_expert(expert: Expert, inputs_TD: Tensor, gating: Gating) -> Tensor:
    """One expert's output [T, D] for its tokens [T, D]."""
    return gating.output(expert, gating.intermediate(expert, inputs_TD))


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
