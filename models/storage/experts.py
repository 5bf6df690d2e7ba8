"""One expert at a time, wherever and however it is stored.

Names and shapes of experts are asked for by commands that read no tensor: torch is imported where one is computed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from moepress.models.families.family import MTP_KEYS, Family, experts_key, with_experts, with_text
from moepress.models.storage.checkpoint import Source
from moepress.models.storage.outline import Outline, outline_of

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Expert:
    """The matrices of an MLP: f(x) = down @ g(gate @ x, up @ x), with biases where the model has some.

    What g is, the model's own code says (`forward.gating`); mostly act(gate @ x) * (up @ x).

    Attributes:
        gate: [F, D]; None where experts have no gate.
        up: [F, D].
        down: [D, F].
        gate_bias, up_bias: [F]; down_bias: [D]; None where there is none.
    """

    gate: Tensor | None
    up: Tensor
    down: Tensor
    gate_bias: Tensor | None = None
    up_bias: Tensor | None = None
    down_bias: Tensor | None = None

    def to(self, device: torch.device, dtype: torch.dtype) -> Expert:
        """The same expert on another device, in another dtype."""
        every: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        moved: dict[str, Any] = {n: None if value is None else value.to(device, dtype) for n, value in every.items()}
        return Expert(**moved)

    @property
    def matrices(self) -> tuple[Tensor, ...]:
        """Gate (where there is one), up and down."""
        return tuple(matrix for matrix in (self.gate, self.up, self.down) if matrix is not None)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All that it has."""
        every = (getattr(self, field.name) for field in fields(self))
        return tuple(tensor for tensor in every if tensor is not None)

    @property
    def first(self) -> Tensor:
        """Gate and up, which see the same input, one above the other: [2F, D], or [F, D] without a gate."""
        import torch

        return self.up if self.gate is None else torch.cat((self.gate, self.up))


def is_fused(source: Source, layer: int) -> bool:
    """Whether a layer's experts are stored as two three-dimensional tensors, as transformers 5 has them."""
    family = source.family
    return bool(family.fused_gate_up) and family.at(family.fused_gate_up, layer) in source.shapes


def mtp_layers(source: Source) -> tuple[int, ...]:
    """The multi-token-prediction layers behind the last decoder layer, ascending; mostly there is none or one."""
    family, layers = source.family, source.outline.shape.layers
    if not family.mtp:
        return ()
    if family.mtp_at:
        found = {family.layer_of(name) for name in source.shapes if name.startswith(family.mtp_at)} - {None}
    else:
        found = {family.layer_of(name) for name in source.shapes if name.endswith(".eh_proj.weight")} - {None}
    return tuple(sorted(layer for layer in found if layer is not None and layer >= layers))


def experts_by_layer(source: Source) -> dict[int, int]:
    """Routed experts of every MoE layer, by the rows of its router; only what ONNX runs may differ between layers."""
    routers = {layer: source.shapes[router_disk_names(source, layer)[0]] for layer in source.outline.moe_layers}
    extra = source.family.router_extra
    return {layer: shape[0] - extra if shape else 0 for layer, shape in routers.items()}


def read_expert(source: Source, layer: int, expert: int) -> Expert:
    """Read one expert's matrices, in the source's own dtype (fp32 where it dequantizes)."""
    family = source.family
    if is_fused(source, layer):
        return _apart(family, [source.read_row(name, expert) for name in family.fused_names(layer)])
    *gate, up, down = (source.read(name) for name in family.expert_names(layer, expert))
    return Expert(gate=gate[0] if gate else None, up=up, down=down, **_biases(source, layer, expert))


def _apart(family: Family, rows: Sequence[Tensor]) -> Expert:
    """The matrices of an expert's rows of the fused tensors."""
    first, down, *biases = rows
    if family.fused_gate:
        alone, first = biases.pop(), first.mT.contiguous() if family.fused_transposed else first
        if family.fused_transposed:
            alone, down = alone.mT.contiguous(), down.mT.contiguous()
        return Expert(gate=alone, up=first, down=down)
    if family.fused_transposed:
        first, down = first.mT.contiguous(), down.mT.contiguous()
    gate, up = halves(family, first)
    if not biases:
        return Expert(gate=gate, up=up, down=down)
    gate_bias, up_bias = halves(family, biases[0])
    return Expert(gate=gate, up=up, down=down, gate_bias=gate_bias, up_bias=up_bias, down_bias=biases[1])


def halves(family: Family, rows: Tensor) -> tuple[Tensor | None, Tensor]:
    """Gate's and up's part of rows that hold both."""
    if not family.gate:
        return None, rows
    if family.fused_interleaved:
        return rows[0::2].contiguous(), rows[1::2].contiguous()
    gate, up = rows.chunk(2, dim=0)
    return gate, up


def bias_names(family: Family, layer: int, expert: int) -> dict[str, str]:
    """Names on disk that the biases of one expert have where each expert has its own tensors, by `Expert`'s fields."""
    roles = ("gate_bias", "up_bias", "down_bias")[0 if family.gate else 1 :]
    names = family.expert_names(layer, expert)
    return {role: f"{name.removesuffix('weight')}bias" for role, name in zip(roles, names, strict=True)}


def _biases(source: Source, layer: int, expert: int) -> dict[str, Tensor]:
    names = bias_names(source.family, layer, expert)
    return {role: source.read(name) for role, name in names.items() if name in source.shapes}


def router_disk_names(source: Source, layer: int) -> tuple[str, ...]:
    """Names on disk of the tensors of a layer's router that have an expert axis.

    A checkpoint saved in transformers' own form uses the module names; both forms are looked for.
    """
    family = source.family
    names = family.router_names(layer)
    if family.derived:  # not every layer has all of them
        return tuple(name for name in names if name in source.shapes)
    return tuple(name if name in source.shapes else family.module_name(name) for name in names)


def router_axis(family: Family, number: int) -> int:
    """Which axis of a router's tensor is that of the experts; `number` counts in `Family.router`."""
    return family.router_axes[number] if family.router_axes else 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """What of a tensor with an axis of experts stays.

    Attributes:
        axis: that axis.
        kept: indices along it, ascending.
        table: it has no such axis, and holds the numbers of experts: `kept` are those that stay.
    """

    axis: int
    kept: tuple[int, ...]
    table: bool = False

    def of(self, tensor: Tensor) -> Tensor:
        """The tensor, cut."""
        import torch

        if self.table:
            return renumbered(tensor.cpu(), self.kept).to(tensor.device)
        return tensor.index_select(self.axis, torch.tensor(self.kept, device=tensor.device))

    def shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of the tensor, cut."""
        return tuple(shape) if self.table else (*shape[: self.axis], len(self.kept), *shape[self.axis + 1 :])


def cuts_of(source: Source, layer: int, kept: Sequence[int]) -> dict[str, Cut]:
    """Tensors of a layer that are cut when only these experts stay, by name on disk; not those of single experts."""
    family, cuts = source.family, dict[str, Cut]()
    experts = source.outline.shape.experts
    for number, pattern in enumerate(family.router):
        names = (family.at(pattern, layer), family.module_name(family.at(pattern, layer)))
        name = next((n for n in names if n in source.shapes), None)
        if name is not None:
            axis = router_axis(family, number)
            behind = range(experts, source.shapes[name][axis])  # rows that belong to no expert
            cuts[name] = Cut(axis=axis, kept=(*kept, *behind))
    for pattern in family.tables:
        name = family.at(pattern, layer)
        if name in source.shapes:
            cuts[name] = Cut(axis=0, kept=tuple(kept), table=True)
    if is_fused(source, layer):
        cuts |= {name: Cut(axis=0, kept=tuple(kept)) for name in family.fused_names(layer)}
    return cuts


def renumbered(table_VK: Tensor, kept: Sequence[int]) -> Tensor:
    """A table of K expert numbers per token for a model that keeps these experts; dtype and shape stay.

    Experts that stay get their new numbers. In the place of one that goes comes one that stays and that the token does
    not have yet, counted on from the token's own number, so that tokens spread over all.
    """
    import torch

    table = table_VK.to(torch.int64)
    number = torch.full((int(max(int(table.max()), *kept)) + 1,), -1, dtype=torch.int64)
    number[torch.tensor(list(kept))] = torch.arange(len(kept))
    new = number[table]
    rows = torch.arange(len(new))
    for slot in range(new.shape[1]):
        gone, candidate = new[:, slot] < 0, (rows + slot) % len(kept)
        for _ in range(new.shape[1]):
            taken = (new == candidate[:, None]).any(dim=1)
            candidate = torch.where(taken, (candidate + 1) % len(kept), candidate)
        new[:, slot] = torch.where(gone, candidate, new[:, slot])
    return new.to(table_VK.dtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class PrunedSource:
    """A source seen through a keep list: expert i is the i-th kept one, the router has only their rows.

    Nothing is copied; the forward pass over it is the forward pass of the pruned model.

    Attributes:
        base: the source with all experts.
        keep: per MoE layer, the experts kept, ascending, by their old numbers. Multi-token-prediction layers that are
            not among them are no part of the pruned model, though their tensors can be read.
        config: the pruned model's config.
        outline: of that config and of the pruned model's names.
        shapes: the pruned model's tensors.
        renamed: new name on disk -> old name, for experts' tensors.
        cuts: tensors of which a part stays.
    """

    base: Source
    keep: Mapping[int, Sequence[int]]
    config: dict[str, Any]
    outline: Outline
    shapes: dict[str, tuple[int, ...]]
    renamed: dict[str, str]
    cuts: dict[str, Cut]

    @property
    def family(self) -> Family:
        """What the architecture is."""
        return self.base.family

    def read(self, name: str) -> Tensor:
        """One tensor of the pruned model."""
        tensor, cut = self.base.read(self.renamed.get(name, name)), self.cuts.get(name)
        return tensor if cut is None else cut.of(tensor)

    def read_row(self, name: str, row: int) -> Tensor:
        """`read(name)[row]`: one expert of a fused tensor, or a row of another, reading nothing else."""
        cut = self.cuts.get(name)
        if cut is not None and (cut.table or cut.axis):
            return cut.of(self.base.read(name))[row]
        return self.base.read_row(self.renamed.get(name, name), row if cut is None else cut.kept[row])


def pruned_config(
    family: Family, config: Mapping[str, Any], count: int, *, degroup: bool = False, keep_mtp: bool = False
) -> dict[str, Any]:
    """The config of a model that keeps `count` experts in every layer; only keys that are there are changed."""
    experts_key(family, config)  # refuses a config without any
    out = with_experts(family, config, count)
    if degroup and family.groups_key and family.top_groups_key:
        out = with_text(family, out, {family.groups_key: 1, family.top_groups_key: 1})
    return out if keep_mtp else without_mtp(family, out)


def without_mtp(family: Family, config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a model whose multi-token-prediction layers are dropped."""
    stated = family.text(config)
    return with_text(family, config, {key: 0 for key in MTP_KEYS if stated.get(key)})


def prune_source(base: Source, keep: Mapping[int, Sequence[int]], *, degroup: bool = False) -> PrunedSource:
    """See a source through a keep list. It must be legal and uniform (see `moepress.compress.pruning.plan`)."""
    family, shapes, renamed = base.family, dict(base.shapes), dict[str, str]()
    cuts: dict[str, Cut] = {}
    counts = {len(kept) for kept in keep.values()}
    assert len(counts) == 1, "the same number of experts is kept in every layer"
    for layer, kept in keep.items():
        here = cuts_of(base, layer, kept)
        shapes |= {name: cut.shape(shapes[name]) for name, cut in here.items()}
        cuts |= here
        if not is_fused(base, layer):
            _renumber(base, layer, kept, shapes, renamed)
    keep_mtp = any(layer >= base.outline.shape.layers for layer in keep)
    config = pruned_config(family, base.config, counts.pop(), degroup=degroup, keep_mtp=keep_mtp)
    return PrunedSource(
        base=base,
        keep=keep,
        config=config,
        outline=outline_of(family, config, shapes),
        shapes=shapes,
        renamed=renamed,
        cuts=cuts,
    )


def _renumber(
    base: Source, layer: int, kept: Sequence[int], shapes: dict[str, tuple[int, ...]], renamed: dict[str, str]
) -> None:
    family = base.family
    names = [
        [*family.expert_names(layer, e), *bias_names(family, layer, e).values()]
        for e in range(base.outline.shape.experts)
    ]
    for of_expert in names:
        for name in of_expert:
            shapes.pop(name, None)
    for new, old in enumerate(kept):
        for new_name, old_name in zip(names[new], names[old], strict=True):
            if old_name in base.shapes:
                shapes[new_name], renamed[new_name] = base.shapes[old_name], old_name
