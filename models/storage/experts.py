"""One expert at a time, wherever and however it is stored."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moepress.models.families.family import Family, experts_key, layer_of, with_experts
from moepress.models.storage.checkpoint import Source
from moepress.models.storage.outline import Outline, outline_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Expert:
    """The three matrices of a gated MLP: f(x) = down @ (act(gate @ x) * (up @ x)).

    Attributes:
        gate: [F, D].
        up: [F, D].
        down: [D, F].
    """

    gate: Tensor
    up: Tensor
    down: Tensor

    def to(self, device: torch.device, dtype: torch.dtype) -> "Expert":
        """The same expert on another device, in another dtype."""
        return Expert(gate=self.gate.to(device, dtype), up=self.up.to(device, dtype), down=self.down.to(device, dtype))


def is_fused(source: Source, layer: int) -> bool:
    """Whether a layer's experts are stored as the two three-dimensional tensors of transformers 5."""
    return source.family.fused_gate_up.format(layer=layer) in source.shapes


def mtp_layers(source: Source) -> tuple[int, ...]:
    """The multi-token-prediction layers behind the last decoder layer, ascending; mostly there is none or one."""
    if not source.family.mtp:
        return ()
    layers, marker = source.outline.shape.layers, ".eh_proj.weight"
    found = {layer_of(name) for name in source.shapes if name.endswith(marker)} - {None}
    return tuple(sorted(layer for layer in found if layer is not None and layer >= layers))


def experts_by_layer(source: Source) -> dict[int, int]:
    """Routed experts of every MoE layer, by the rows of its router; only what ONNX runs may differ between layers."""
    routers = {layer: source.shapes[router_disk_names(source, layer)[0]] for layer in source.outline.moe_layers}
    return {layer: shape[0] if shape else 0 for layer, shape in routers.items()}


def read_expert(source: Source, layer: int, expert: int) -> Expert:
    """Read one expert's matrices, in the source's own dtype (fp32 where it dequantizes)."""
    family = source.family
    if is_fused(source, layer):
        gate, up = source.read_row(family.fused_gate_up.format(layer=layer), expert).chunk(2, dim=0)
        return Expert(gate=gate, up=up, down=source.read_row(family.fused_down.format(layer=layer), expert))
    gate, up, down = (source.read(name) for name in family.expert_names(layer, expert))
    return Expert(gate=gate, up=up, down=down)


def router_disk_names(source: Source, layer: int) -> tuple[str, ...]:
    """Names on disk of the tensors of a layer's router that have an expert axis.

    A checkpoint saved in transformers' own form uses the module names; both forms are looked for.
    """
    names = source.family.router_names(layer)
    return tuple(name if name in source.shapes else source.family.module_name(name) for name in names)


@dataclass(frozen=True, slots=True, kw_only=True)
class PrunedSource:
    """A source seen through a keep list: expert i is the i-th kept one, the router has only their rows.

    Nothing is copied; the forward pass over it is the forward pass of the pruned model.

    Attributes:
        base: the source with all experts.
        keep: per MoE layer, the experts kept, ascending, by their old numbers.
        config: the pruned model's config.
        outline: of that config and of the pruned model's names.
        shapes: the pruned model's tensors.
        renamed: new name on disk -> old name, for experts' tensors.
        routers: names of tensors whose rows are selected -> layer.
    """

    base: Source
    keep: Mapping[int, Sequence[int]]
    config: dict[str, Any]
    outline: Outline
    shapes: dict[str, tuple[int, ...]]
    renamed: dict[str, str]
    routers: dict[str, int]

    @property
    def family(self) -> Family:
        """The row of the family table."""
        return self.base.family

    def read(self, name: str) -> Tensor:
        """One tensor of the pruned model."""
        tensor = self.base.read(self.renamed.get(name, name))
        kept = self._rows(name)
        return tensor if kept is None else tensor[torch.tensor(list(kept))]

    def read_row(self, name: str, row: int) -> Tensor:
        """`read(name)[row]`: one expert of a fused tensor, or a row of another, reading nothing else."""
        kept = self._rows(name)
        return self.base.read_row(self.renamed.get(name, name), row if kept is None else kept[row])

    def _rows(self, name: str) -> Sequence[int] | None:
        """The rows kept of a tensor with an expert axis, None for others."""
        layer = layer_of(name)
        if layer not in self.keep or layer is None:
            return None
        fused = {pattern.format(layer=layer) for pattern in (self.family.fused_gate_up, self.family.fused_down)}
        return self.keep[layer] if name in self.routers or name in fused else None


def pruned_config(
    family: Family, config: Mapping[str, Any], count: int, *, degroup: bool = False, keep_mtp: bool = False
) -> dict[str, Any]:
    """The config of a model that keeps `count` experts in every layer; only keys that are there are changed."""
    experts_key(family, config)  # refuses a config without any
    out = with_experts(config, count)
    if degroup and family.groups_key and family.top_groups_key:
        out[family.groups_key] = out[family.top_groups_key] = 1
    if config.get("num_nextn_predict_layers") and not keep_mtp:
        out["num_nextn_predict_layers"] = 0
    return out


def prune_source(base: Source, keep: Mapping[int, Sequence[int]], *, degroup: bool = False) -> PrunedSource:
    """See a source through a keep list. It must be legal and uniform (see `moepress.compress.pruning.plan`)."""
    family, shapes, renamed = base.family, dict(base.shapes), dict[str, str]()
    routers: dict[str, int] = {}
    counts = {len(kept) for kept in keep.values()}
    assert len(counts) == 1, "the same number of experts is kept in every layer"
    for layer, kept in keep.items():
        for name in router_disk_names(base, layer):
            routers[name] = layer
            shapes[name] = (len(kept), *shapes[name][1:])
        if is_fused(base, layer):
            for name in (family.fused_gate_up.format(layer=layer), family.fused_down.format(layer=layer)):
                shapes[name] = (len(kept), *shapes[name][1:])
            continue
        _renumber(base, layer, kept, shapes, renamed)
    config = pruned_config(family, base.config, counts.pop(), degroup=degroup)
    return PrunedSource(
        base=base,
        keep=keep,
        config=config,
        outline=outline_of(family, config, shapes),
        shapes=shapes,
        renamed=renamed,
        routers=routers,
    )


def _renumber(
    base: Source, layer: int, kept: Sequence[int], shapes: dict[str, tuple[int, ...]], renamed: dict[str, str]
) -> None:
    for old in range(base.outline.shape.experts):
        for name in base.family.expert_names(layer, old):
            shapes.pop(name, None)
    for new, old in enumerate(kept):
        pairs = zip(base.family.expert_names(layer, new), base.family.expert_names(layer, old), strict=True)
        for new_name, old_name in pairs:
            shapes[new_name], renamed[new_name] = base.shapes[old_name], old_name
