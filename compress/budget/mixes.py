"""A mix of GGUF's types under a budget: which type every kind of matrix takes in every range of layers, and how many
experts stay, by what each would cost in KL divergence.

    KL(mix) = t * ( sum over kinds k and ranges r of  S_kr * e_r(type) / e_r(rounded)
                    + 2 * sum over layers n of  D_n * sum over removed experts of their share of the routed output )

S, e, D and t are those of `divergences`; embeddings are not solved, and have the errors of `ROUNDING`. Pruning counts
twice, as in `damage`.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from moepress.calibration.profile import Profile
from moepress.compress.budget.damage import pruning_losses
from moepress.compress.budget.divergences import (
    ROUTED,
    Divergences,
    divergences_of,
    lacking,
    require_all,
)
from moepress.compress.budget.gguf_sizes import FileWeights, Matrix
from moepress.compress.budget.search import descent, hull
from moepress.compress.budget.sensitivities import ROUNDED, Key
from moepress.compress.gptq.block_choice import MIX_TYPES, fitting
from moepress.compress.gptq.grid_rows import GridRow
from moepress.compress.gptq.kinds import Kind
from moepress.errors import InvalidInputError

ROUNDING = {
    "Q2_K": 7.34,
    "Q3_K": 2.19,
    "Q4_0": 0.701,
    "IQ4_NL": 0.587,
    "IQ4_XS": 0.593,
    "Q4_K": 0.525,
    "Q5_0": 0.175,
    "Q5_K": 0.131,
    "Q5_1": 0.120,
    "Q6_K": 0.0312,
    "Q8_0": 0.00263,
}
"""Squared errors of matrices of normal numbers that see no tokens, over those of `rounded`; a test takes them again."""
POINTS = 9
"""Of a curve, besides what was chosen."""


class CurvePoint(BaseModel):
    """The best mix of a size.

    Attributes:
        weight_bytes: of the file.
        bits: per weight that stays, over all of it.
        experts: in every layer.
        kl: estimated divergence, in nats per token.
        chosen: this is the plan.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    weight_bytes: int = Field(gt=0)
    bits: float = Field(ge=0)
    experts: int = Field(gt=0)
    kl: float = Field(ge=0)
    chosen: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """What takes one type: a kind of matrix in a range of layers.

    Attributes:
        sizes: type -> bytes.
        losses: type -> estimated divergence.
        each: bytes are of one expert of every layer.
    """

    sizes: Mapping[str, int]
    losses: Mapping[str, float]
    each: bool

    def path(self, count: int) -> list[tuple[int, float, str]]:
        """Bytes, divergence and type of those worth taking, with so many experts; the smallest first."""
        times = count if self.each else 1
        return hull([(times * size, self.losses[name], name) for name, size in self.sizes.items()])


@dataclass(frozen=True, slots=True, kw_only=True)
class MixSpace:
    """All that a choice depends on.

    Attributes:
        items: what takes a type.
        rest: count of experts -> bytes of all that takes none.
        parameters: count -> weights in all.
        pruned: count -> divergence by the experts that go.
    """

    items: Mapping[Key, Item]
    rest: Mapping[int, int]
    parameters: Mapping[int, int]
    pruned: Mapping[int, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Mix:
    """One choice.

    Attributes:
        count: experts in every layer.
        types: of every item.
        size: bytes of the file.
        kl: estimated divergence, in nats per token.
    """

    count: int
    types: Mapping[Key, str]
    size: int
    kl: float

    def rows(self) -> tuple[GridRow, ...]:
        """As a plan has it: neighbouring ranges of a kind that have one type are one row."""
        rows: list[GridRow] = []
        for (kind, layers), name in sorted(self.types.items(), key=lambda item: (item[0][0], item[0][1] or (0, 0))):
            before = rows[-1] if rows else None
            if layers and before and before.layers and (before.kind, before.type) == (kind, name):
                rows[-1] = GridRow(kind=kind, layers=(before.layers[0], layers[1]), type=name)
            else:
                rows.append(GridRow(kind=kind, layers=layers, type=name))
        return tuple(rows)


def mix_space(
    profile: Profile, kept: Mapping[int, Mapping[int, Sequence[int]]], weights: Mapping[str, float]
) -> MixSpace:
    """Bytes and estimated divergences of every type and count.

    Args:
        profile: with leave-one-out, bit, grid and kind losses.
        kept: count -> layer -> the experts that stay, for every count to choose from.
        weights: of the domains; they weigh what pruning costs, while divergences are of all windows alike.

    Raises:
        InvalidInputError: the profile lacks what the estimate needs.
        UsageError: a matrix has columns that no type takes.
    """
    found, file = _divergences(profile), _file_of(profile)
    require_all(found.rows, [(matrix.kind, matrix.layer) for matrix in file.matrices], profile.shape.layers)
    items = dict[Key, Item]()
    for (kind, layers), sensitivity in found.measured.items():
        own = [matrix for matrix in file.matrices if _lies_in(matrix, kind, layers)]
        ratios = {name: _ratio(name, own, found, layers, profile.shape.hidden) for name in MIX_TYPES}
        items[kind, layers] = Item(
            sizes={name: sum(matrix.bytes(name) for matrix in own) for name in MIX_TYPES},
            losses={name: found.whole * sensitivity.kl * ratio for name, ratio in ratios.items()},
            each=kind in ROUTED,
        )
    return MixSpace(
        items=items,
        rest={count: file.rest(count) for count in kept},
        parameters={count: file.parameters(count) for count in kept},
        pruned=pruning_losses(found, profile, kept, weights),
    )


def _divergences(profile: Profile) -> Divergences:
    found = divergences_of(profile)
    if found is None and profile.kind_losses and profile.grids == (*MIX_TYPES, ROUNDED):
        raise InvalidInputError(
            "No expert saw enough calibration text to be solved on GGUF's types; profile again on more of it."
        )
    if found is None:
        raise lacking("this one has none")
    if not any(bool(s["leave_one_out"].any()) for s in profile.statistics.values()):
        raise lacking("this one has no leave-one-out losses")
    return found


def _ratio(
    name: str,
    matrices: Sequence[Matrix],
    found: Divergences,
    layers: tuple[int, int] | None,
    hidden: int,
) -> float:
    """What matrices lose on a type over what they lose by rounding.

    That is what experts lose there, in the range's layers or where it has none in all, corrected where these matrices
    fall back to another type than the experts' rows of the hidden size; embeddings are not solved.
    """
    weights = {matrix.type(name): 0 for matrix in matrices}
    for matrix in matrices:
        weights[matrix.type(name)] += matrix.rows * matrix.columns
    rounding = sum(ROUNDING[kind] * weight for kind, weight in weights.items()) / sum(weights.values())
    if all(matrix.kind is Kind.EMBEDDINGS for matrix in matrices):
        return rounding
    return found.ratio(name, layers) * (1.0 if matrices[0].each else rounding / ROUNDING[fitting(name, hidden).name])


def _lies_in(matrix: Matrix, kind: Kind, layers: tuple[int, int] | None) -> bool:
    inside = layers is None or (matrix.layer is not None and layers[0] <= matrix.layer <= layers[1])
    return matrix.kind is kind and inside


def _file_of(profile: Profile) -> FileWeights:
    if profile.file is None:
        raise lacking("this one does not say what a file is made of")
    try:
        file = FileWeights.model_validate(profile.file)
    except ValidationError as error:
        raise lacking(f"what this one says of a file is not sound ({error.errors()[0]['msg']})") from error
    if file.experts != profile.shape.experts or any((m.layer or 0) >= profile.shape.layers for m in file.matrices):
        raise lacking("what this one says of a file is of another model")
    return file


def fallen_back(profile: Profile, mix: Mix) -> Iterator[str]:
    """What is to be said of rows that no block of the types fills."""
    found = dict[str, str]()
    for matrix in _file_of(profile).matrices:
        for (kind, layers), name in mix.types.items():
            if _lies_in(matrix, kind, layers) and matrix.type(name) != name:
                found[name] = matrix.type(name)
    if found:
        instead = ", ".join(f"{name} is {other}" for name, other in sorted(found.items()))
        yield f"Rows that are no multiple of 256 columns take what llama.cpp falls back to: there {instead}."


def best_mix(space: MixSpace, limit: int) -> Mix | None:
    """The mix of the smallest estimated divergence that fits; of equals the smaller, then the one with more experts."""
    found = [mix for count in space.rest if (mix := _of_count(space, count, limit)) is not None]
    return min(found, key=lambda mix: (mix.kl, mix.size, -mix.count), default=None)


def smallest_mix(space: MixSpace) -> Mix:
    """Whatever it loses."""
    found = [_weighed(space, n, {key: item.path(n)[0][2] for key, item in space.items.items()}) for n in space.rest]
    return min(found, key=lambda mix: mix.size)


def _of_count(space: MixSpace, count: int, limit: int) -> Mix | None:
    """Down the multiplier's path as far as it fits, then by what else of it still does: more room is never worse."""
    paths = {key: item.path(count) for key, item in space.items.items()}
    types = {key: path[0][2] for key, path in paths.items()}
    size = space.rest[count] + sum(path[0][0] for path in paths.values())
    if size > limit:
        return None
    left_out = set[Key]()
    for key, more, name in descent(paths):
        if key in left_out or size + more > limit:
            left_out.add(key)
            continue
        types[key], size = name, size + more
    return _weighed(space, count, types)


def _weighed(space: MixSpace, count: int, types: Mapping[Key, str]) -> Mix:
    size = space.rest[count] + sum(
        item.sizes[types[key]] * (count if item.each else 1) for key, item in space.items.items()
    )
    kl = space.pruned[count] + sum(item.losses[types[key]] for key, item in space.items.items())
    return Mix(count=count, types=types, size=size, kl=kl)


def curve(space: MixSpace, chosen: Mix) -> list[CurvePoint]:
    """The best mixes of sizes from the smallest there is to the largest, evenly by ratio, and the one chosen."""
    low = smallest_mix(space).size
    every = [_weighed(space, n, {key: item.path(n)[-1][2] for key, item in space.items.items()}) for n in space.rest]
    step = (max(mix.size for mix in every) / low) ** (1 / (POINTS - 1))
    found = [best_mix(space, int(low * step**n) + 1) for n in range(POINTS)]
    mixes = {(mix.size, mix.count): mix for mix in (*found, chosen) if mix is not None}
    return [_point(space, mix, chosen=mix == chosen) for _, mix in sorted(mixes.items())]


def _point(space: MixSpace, mix: Mix, *, chosen: bool) -> CurvePoint:
    bits = 8 * mix.size / space.parameters[mix.count]
    return CurvePoint(weight_bytes=mix.size, bits=bits, experts=mix.count, kl=mix.kl, chosen=chosen)
