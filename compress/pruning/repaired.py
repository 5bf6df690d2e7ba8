"""What a repair changes in a pruned model: down projections are scaled or replaced, router biases and rows replaced.

`Repairs` is the record of one (in `moepress.json`, and as `repair.json` in a run's folder, the values beside it). A
`RepairedSource` shows a pruned source with it applied; `Edits` name the same changes for a folder that is being
written.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, SkipValidation, ValidationError
from torch import Tensor

from moepress.compress.pruning.repair import Repair
from moepress.compress.pruning.repaired_down import DownFiles, downs_by_name
from moepress.errors import InvalidInputError
from moepress.models.storage.checkpoint import Source, SourceView
from moepress.models.storage.experts import bias_names, experts_by_layer, is_fused, router_axis, router_disk_names
from moepress.models.storage.safetensors_file import Stored
from moepress.models.storage.tensors import read_row, read_tensor, tensor_bytes


class RouterRefit(BaseModel):
    """What came of the refit of one layer's router.

    Errors are those of `LayerRepair`, before any gain, on calibration tokens that the refit did not learn from.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    error_before: float
    error_after: float
    tokens: int
    rounds: int
    change: float
    sha256: str | None

    @property
    def taken(self) -> bool:
        """Whether the rows are other ones; else the refit lowered no error, and the router stays as it was."""
        return self.sha256 is not None


class DownRefit(BaseModel):
    """What came of the refit of one layer's down projections.

    Errors are those of `LayerRepair` on calibration tokens that are held out: before, and less what the test fits took
    off, which did not learn from them. `taken` of the layer's experts have other values, fitted to all tokens; the rest
    stay. The digest is `downs_digest`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    error_before: float
    error_after: float
    tokens: int
    taken: int
    sha256: str


class LayerRepair(BaseModel):
    """One layer's repair; experts by their new numbers.

    Errors are sum_t |o_t - o'_t|^2, o the original layer's output and o' the pruned one's behind layers that are
    mended, as a share of the squared norm of what the routed experts would have to add, on the calibration tokens.
    Loads are half the sum of |load - load wanted|, shares of all choices, 0 to 1.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    gains: list[float] | None
    bias: list[float] | None
    error_before: float
    error_after: float
    load_before: float | None = None
    load_after: float | None = None
    router: RouterRefit | None = None
    down: DownRefit | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RouterRows:
    """Rows of routers, by layer: [E, D] in the dtype in which the router is stored."""

    by_layer: Mapping[int, Tensor] = field(default_factory=dict)

    def __eq__(self, other: object) -> bool:
        """Whether both hold the same bytes."""
        return isinstance(other, RouterRows) and self.digests() == other.digests()

    __hash__ = None  # type: ignore[assignment]

    def digests(self) -> dict[int, str]:
        """Layer -> `rows_digest`."""
        return {layer: rows_digest(rows) for layer, rows in self.by_layer.items()}


def rows_digest(rows_ED: Tensor) -> str:
    """SHA-256 of a router's rows as they are stored, in hex."""
    return hashlib.sha256(bytes(tensor_bytes(rows_ED.contiguous()))).hexdigest()


class Repairs(BaseModel):
    """Repairs of all MoE layers of a model that was pruned by one plan."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    schema_version: Literal["1.0"] = "1.0"
    model: str
    experts: int = Field(gt=0)
    parts: list[Repair]
    layers: dict[int, LayerRepair]
    calibration: dict[str, Any]
    rows: SkipValidation[RouterRows] = Field(default_factory=RouterRows, exclude=True, repr=False)
    downs: SkipValidation[DownFiles] = Field(default_factory=DownFiles, exclude=True, repr=False)

    def __eq__(self, other: object) -> bool:
        """Whether both say the same and hold the same bytes; where those of down projections lie does not count."""
        return isinstance(other, Repairs) and (self.digest, self.rows) == (other.digest, other.rows)

    __hash__ = None  # type: ignore[assignment]

    @property
    def digest(self) -> str:
        """SHA-256 of all of it, in hex."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()


def parse_repairs(text: str, where: object) -> Repairs:
    """Read the JSON of a `Repairs`; rows of routers are not in it.

    Raises:
        InvalidInputError: it is none.
    """
    try:
        return Repairs.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise InvalidInputError(f"{where} holds no valid repair: {place}: {first['msg']}; repair again.") from error


def scaled(values: Tensor, factor: float) -> Tensor:
    """`values * factor`, computed in fp32 (fp64 stays) and rounded to the dtype that values have."""
    return (values.to(torch.promote_types(values.dtype, torch.float32)) * factor).to(values.dtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class Edits:
    """Changes by the names that tensors have in the pruned folder.

    Attributes:
        factors: down projection -> factor; of a fused tensor one for every expert, of others one.
        tensors: what takes the place of a tensor.
        stored: likewise, where that lies in files; of a fused tensor a row for every expert, of others one whole.
    """

    factors: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    stored: Mapping[str, tuple[Stored, ...]] = field(default_factory=dict)


def edits_of(pruned: Source, repairs: Repairs) -> Edits:
    """The changes that repairs mean for a pruned source, or for a folder of that layout.

    Raises:
        InvalidInputError: the repairs are for other layers or another number of experts, or lack what belongs to them.
    """
    factors, tensors, stored = dict[str, tuple[float, ...]](), dict[str, Tensor](), dict[str, tuple[Stored, ...]]()
    counts = experts_by_layer(pruned)
    for layer, repair in repairs.layers.items():
        routers, experts = router_disk_names(pruned, layer), counts.get(layer, 0)
        if any(values is not None and len(values) != experts for values in (repair.gains, repair.bias)):
            raise InvalidInputError(f"The repair of layer {layer} is not for {experts} experts; repair again.")
        if repair.gains is not None:
            factors |= _gains(pruned, layer, repair.gains)
        if repair.bias is not None:
            own = pruned.family.correction and pruned.family.at(pruned.family.correction, layer)
            bias = own or next(name for name in routers if name.endswith("bias"))
            tensors[bias] = torch.tensor(repair.bias, dtype=torch.float32).reshape(pruned.shapes[bias])
        if repair.router is not None and repair.router.taken:
            rows = repairs.rows.by_layer.get(layer)
            if rows is None or len(rows) != experts or rows_digest(rows) != repair.router.sha256:
                raise InvalidInputError(
                    f"The rows of layer {layer}'s router are not those of its repair; repair again."
                )
            tensors[routers[0]] = with_rows(pruned, routers[0], rows)
        if repair.down is not None:
            stored |= downs_by_name(pruned, layer, repairs.downs.by_layer.get(layer, ()), experts)
    return Edits(factors=factors, tensors=tensors, stored=stored)


def router_rows(source: Source, layer: int) -> Tensor:
    """The rows of a layer's router, one for each expert [E, D], as they are stored."""
    name = router_disk_names(source, layer)[0]
    weight = source.read(name).movedim(router_axis(source.family, 0), 0)
    return weight[: len(weight) - source.family.router_extra]


def with_rows(source: Source, name: str, rows_ED: Tensor) -> Tensor:
    """A router's weight with other rows for its experts; shape, dtype and what belongs to no expert stay."""
    weight = source.read(name).clone()
    weight.movedim(router_axis(source.family, 0), 0)[: len(rows_ED)] = rows_ED.to(weight.dtype)
    return weight


def _gains(pruned: Source, layer: int, gains: Sequence[float]) -> dict[str, tuple[float, ...]]:
    """What experts' outputs are multiplied by, as factors on their down projections and the biases of those."""
    family = pruned.family
    if is_fused(pruned, layer):
        names = [family.fused_names(layer)[1], *(family.at(bias, layer) for bias in family.fused_biases[1:])]
        return {name: tuple(gains) for name in names}
    found: dict[str, tuple[float, ...]] = {}
    for expert, gain in enumerate(gains):
        found[family.expert_names(layer, expert)[-1]] = (gain,)
        bias = bias_names(family, layer, expert)["down_bias"]
        if bias in pruned.shapes:
            found[bias] = (gain,)
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class RepairedSource(SourceView):
    """A pruned source with its repairs, as if the repaired folder had been written.

    Attributes:
        edits: what is changed.
    """

    edits: Edits

    def read(self, name: str) -> Tensor:
        """One tensor, repaired."""
        if name in self.edits.tensors:
            return self.edits.tensors[name].clone()
        if name in self.edits.stored:
            rows = [read_tensor(entry) for entry in self.edits.stored[name]]
            return torch.stack(rows) if len(self.shapes[name]) > rows[0].dim() else rows[0]
        tensor, factors = self.base.read(name), self.edits.factors.get(name)
        if factors is None:
            return tensor
        if len(factors) == 1:
            return scaled(tensor, factors[0])
        return torch.stack([scaled(row, factor) for row, factor in zip(tensor, factors, strict=True)])

    def read_row(self, name: str, row: int) -> Tensor:
        """`read(name)[row]`, reading nothing else."""
        if name in self.edits.tensors:
            return self.edits.tensors[name][row].clone()
        if name in self.edits.stored:
            stored = self.edits.stored[name]
            fused = len(self.shapes[name]) > len(stored[0].shape)
            return read_tensor(stored[row]) if fused else read_row(stored[0], row)
        tensor, factors = self.base.read_row(name, row), self.edits.factors.get(name)
        if factors is None:
            return tensor
        return scaled(tensor, factors[row] if len(factors) > 1 else factors[0])


def repaired_source(pruned: Source, repairs: Repairs) -> RepairedSource:
    """See a pruned source with its repairs.

    Raises:
        InvalidInputError: the repairs are for another model.
    """
    return RepairedSource(base=pruned, edits=edits_of(pruned, repairs))
