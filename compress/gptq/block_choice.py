"""Which of GGUF's block types each matrix is solved on: one for all, or a mix that people know by its name.

The mixes are the type maps of llama-quantize (`src/llama-quant.cpp`, b11434, read), so that files of ours and of its
can be compared at equal bytes. What a type can not hold, because its blocks do not fill a row, falls back as there.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from moepress.compress.gptq.kinds import Kind, kind_of
from moepress.converters.safetensors.scheme import SUPPORTED_BITS, Scheme
from moepress.errors import UsageError
from moepress.models.families.family import part_of
from moepress.models.storage.block_types import TYPES, BlockType

if TYPE_CHECKING:
    from moepress.compress.gptq.grid_rows import GridRow
    from moepress.models.families.family import Family, Part

GRIDS = ("q4_k", "q5_k", "q6_k", "q3_k", "q2_k", "iq4_xs", "iq4_nl", "q4_0", "q4_1", "q5_0", "q5_1", "q8_0")
"""Types that `--grid` takes, in lower case."""
PRESETS = ("Q2_K", "Q3_K_M", "Q4_K_M", "Q5_K_M", "IQ4_XS")
"""Mixes that `--grid` takes by these names, in capitals."""
MIX_TYPES = ("Q2_K", "Q3_K", "IQ4_XS", "Q4_K", "Q5_K", "Q6_K", "Q8_0")
"""Types that a plan's mix is made of, the smallest first."""
PLANNED = "mix"
"""The name of one that a plan has chosen, row by row."""
_FALLBACKS = {
    "Q2_K": "Q4_0",
    "Q3_K": "Q4_0",
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
    "IQ4_XS": "IQ4_NL",
}
BLOCK = 32
"""Columns of the smallest blocks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """What a mix asks about a matrix.

    Attributes:
        role: value, key, output (of attention), down, head, embeddings or other.
        layer, layers: which of how many; layer is 0 outside of them.
        experts: routed experts of a layer.
        shared_heads: query heads that share keys and values.
    """

    role: str
    layer: int
    layers: int
    experts: int
    shared_heads: int

    @property
    def more(self) -> bool:
        """Whether the layer is among those that the middle mixes give more bits."""
        first, last = self.layers // 8, 7 * self.layers // 8
        return self.layer < first or self.layer >= last or (self.layer - first) % 3 == 2


def _q2_k(at: Place) -> str:
    if at.role == "value":
        return "Q4_K" if at.shared_heads >= 4 else "Q3_K"
    return {"head": "Q6_K", "down": "Q3_K", "output": "Q3_K"}.get(at.role, "Q2_K")


def _q3_k_m(at: Place) -> str:
    if at.role == "value":
        return "Q5_K" if at.layer < 2 else "Q4_K"
    if at.role == "down":
        return "Q5_K" if at.layer < at.layers // 16 else "Q4_K"
    return {"head": "Q6_K", "output": "Q4_K"}.get(at.role, "Q3_K")


def _middle(usual: str) -> Callable[[Place], str]:
    def choose(at: Place) -> str:
        if at.role == "head" or (at.role in ("value", "down") and at.more):
            return "Q6_K"
        return usual

    return choose


def _iq4_xs(at: Place) -> str:
    if at.role == "value" and at.shared_heads >= 4:
        return "Q5_K"
    return "Q6_K" if at.role == "head" else "IQ4_XS"


_MIXES: Mapping[str, Callable[[Place], str]] = {
    "Q2_K": _q2_k,
    "Q3_K_M": _q3_k_m,
    "Q4_K_M": _middle("Q4_K"),
    "Q5_K_M": _middle("Q5_K"),
    "IQ4_XS": _iq4_xs,
}
_EIGHT_TOO = ("Q2_K", "Q3_K_M", "Q4_K_M", "IQ4_XS")


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockChoice:
    """What `--grid` names, or what a plan says.

    Attributes:
        name: a type in lower case, or a mix in capitals, or `PLANNED`.
        layers, experts, shared_heads: of the model, as in `Place`.
        rows: of a planned mix.
        family: the model's, which tells kinds and parts by names; wanted for rows and `beside` alone.
        beside: the type of parts besides the routed experts that have one of their own; of a plain type alone.
        runs: name of a matrix whose columns get another order -> how many stay together: no block may be larger.
    """

    name: str
    layers: int
    experts: int
    shared_heads: int
    rows: "tuple[GridRow, ...]" = ()
    family: "Family | None" = None
    beside: "Mapping[Part, str]" = field(default_factory=dict)
    runs: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.rows:
            return
        if self.name not in (*GRIDS, *PRESETS):
            raise UsageError(f"--grid {self.name} is not there; choose one of {', '.join((*GRIDS, *PRESETS))}.")

    @property
    def is_mix(self) -> bool:
        """Whether it is a mix, which stands for all matrices of a model, embeddings and head among them."""
        return self.name in PRESETS or bool(self.rows)

    @property
    def main(self) -> str:
        """The type of most matrices; of a plan's that of the experts in most layers."""
        if self.rows:
            return main_type(self.rows)
        return next(name for name in TYPES if self.name.upper().startswith(name))

    @property
    def bits(self) -> int:
        """Of most codes."""
        return TYPES[self.main].bits

    def of(self, name: str, layer: int | None, columns: int) -> BlockType:
        """The type of a matrix.

        Args:
            name: on disk.
            layer: whose; None outside of the layers.
            columns: of the matrix.

        Raises:
            UsageError: no type takes that many columns, or a plan says nothing of such a matrix.
        """
        columns = math.gcd(columns, self.runs.get(name, 0))
        if not self.is_mix:
            part = part_of(self.family, name, self.layers) if self.beside and self.family is not None else None
            return fitting(self.name.upper() if part is None else self.beside.get(part, self.name.upper()), columns)
        if self.rows:
            return fitting(self._planned(name, layer), columns)
        role = role_of(name)
        at = Place(
            role=role,
            layer=layer or 0,
            layers=self.layers,
            experts=self.experts,
            shared_heads=self.shared_heads,
        )
        kind = _MIXES[self.name](at)
        if self.experts == 8 and role in ("value", "key"):  # llama-quantize asks for exactly 8
            kind = "Q8_0" if role == "key" or self.name in ("Q4_K_M", "Q5_K_M") else kind
        if self.experts == 8 and role == "output" and self.name in _EIGHT_TOO:
            kind = "Q5_K"
        return fitting(kind, columns)

    def _planned(self, name: str, layer: int | None) -> str:
        """The type that a plan gives a matrix; layers behind the last, of multi-token prediction, have the last's."""
        assert self.family is not None
        kind, at = kind_of(self.family, name), None if layer is None else min(layer, self.layers - 1)
        for row in self.rows:
            if row.kind is kind and (row.layers is None or (at is not None and row.layers[0] <= at <= row.layers[1])):
                return row.type
        where = "" if at is None else f" in layer {at}"
        raise UsageError(f"The plan's grids give {kind or 'this kind of matrix'}{where} no type ({name}); add a row.")


def main_type(rows: "tuple[GridRow, ...]") -> str:
    """The type that the experts of most layers have in a plan's mix."""
    counts = Counter[str]()
    for row in rows:
        if row.kind in (Kind.EXPERTS, Kind.DOWN) and row.layers is not None:
            counts[row.type] += row.layers[1] - row.layers[0] + 1
    return counts.most_common(1)[0][0] if counts else rows[0].type


def nearest_scheme(name: str, rows: "tuple[GridRow, ...]" = ()) -> Scheme:
    """The scheme of integers that a grid, or a plan's mix, is counted as where time and size are estimated: never more
    bits than it has.

    Raises:
        UsageError: there is no such grid.
    """
    bits = BlockChoice(name=name, layers=1, experts=1, shared_heads=1, rows=rows).bits
    return Scheme(bits=max(width for width in SUPPORTED_BITS if width <= bits), group_size=BLOCK)


def fitting(name: str, columns: int) -> BlockType:
    """A type, or the one that llama.cpp would take in its place for rows of so many columns.

    Raises:
        UsageError: rows are no whole number of 32 columns.
    """
    kind = TYPES[name]
    if columns % kind.columns:
        kind = TYPES[_FALLBACKS.get(name, name)]
    if columns % BLOCK:
        raise UsageError(
            f"A matrix has {columns} columns, which GGUF's blocks of {BLOCK} do not fill; such a model is quantized by "
            "--bits alone."
        )
    return kind


_ROLES = {"v_proj": "value", "k_proj": "key", "o_proj": "output", "down_proj": "down", "w2": "down"}
_ROLES |= {"lm_head": "head", "embed_tokens": "embeddings"}


def role_of(name: str) -> str:
    """The role of a matrix, by its name on disk."""
    return _ROLES.get(name.removesuffix(".weight").rpartition(".")[2], "other")
