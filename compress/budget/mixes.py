"""A mix of GGUF's types under a budget: which type every kind of matrix takes in every range of layers, and how many
experts stay, by what each would cost in KL divergence.

    KL(mix) = t * ( sum over kinds k and ranges r of  S_kr * e_r(type) / e_r(rounded)
                    + 2 * sum over layers n of  D_n * sum over removed experts of their share of the routed output )

S is the divergence that was measured with that kind rounded in that range alone (`kind_losses`), e the relative errors
of the experts' outputs by type, of matrices that were solved (`bit_losses`); embeddings are not solved, and have those
of `ROUNDING`. D_n, divergence per share of a layer's squared output, is what rounding its experts cost over the error
that this made; pruning counts twice, as in `damage`. t is what all at once cost over the sum of all alone.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from moepress.calibration.profile import BIT_TOKENS, GRID_LOSSES, Profile
from moepress.compress.budget.damage import PRUNING_WEIGHT, removal_shares
from moepress.compress.budget.gguf_sizes import FileWeights, Matrix
from moepress.compress.budget.search import descent, hull
from moepress.compress.budget.sensitivities import ROUNDED, Key, KindLoss, by_kind, ranges_of, together
from moepress.compress.gptq.block_choice import MIX_TYPES, fitting
from moepress.compress.gptq.grid_rows import GridRow
from moepress.compress.gptq.kinds import OUTSIDE, Kind
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
_ROUTED = frozenset({Kind.EXPERTS, Kind.DOWN})


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
    rows = _kind_rows(profile)
    whole, solved = together(rows), _solved_errors(profile)
    file = _file_of(profile)
    _require_all(rows, file, profile.shape.layers)
    measured = by_kind(rows)
    items = dict[Key, Item]()
    for (kind, layers), sensitivity in measured.items():
        own = [matrix for matrix in file.matrices if _lies_in(matrix, kind, layers)]
        ratios = {name: _ratio(name, own, solved, layers, profile.shape.hidden) for name in MIX_TYPES}
        items[kind, layers] = Item(
            sizes={name: sum(matrix.bytes(name) for matrix in own) for name in MIX_TYPES},
            losses={name: whole * sensitivity.kl * ratio for name, ratio in ratios.items()},
            each=kind in _ROUTED,
        )
    lost, contribution = removal_shares(profile, weights)
    slopes = {n: whole * PRUNING_WEIGHT * _slope(profile, measured, solved, contribution, n) for n in profile.layers}
    pruned = {
        count: sum(slopes[n] * max(0.0, float(lost[n].sum() - lost[n].take(stay[n]).sum())) for n in profile.layers)
        for count, stay in kept.items()
    }
    return MixSpace(
        items=items,
        rest={count: file.rest(count) for count in kept},
        parameters={count: file.parameters(count) for count in kept},
        pruned=pruned,
    )


def _lacking(what: str) -> InvalidInputError:
    return InvalidInputError(
        f"A mix of GGUF's types is chosen by losses that a profile has where it was made with --grid-losses and "
        f"without --no-loo, and {what}; profile again."
    )


def _kind_rows(profile: Profile) -> list[KindLoss]:
    if profile.grids != (*MIX_TYPES, ROUNDED) or not profile.kind_losses:
        raise _lacking("this one has none")
    if not any(bool(s["leave_one_out"].any()) for s in profile.statistics.values()):
        raise _lacking("this one has no leave-one-out losses")
    try:
        return [KindLoss.model_validate(row) for row in profile.kind_losses]
    except ValidationError as error:
        raise _lacking(f"this one's are not sound ({error.errors()[0]['msg']})") from error


def _solved_errors(profile: Profile) -> dict[int, dict[str, float]]:
    """Layer -> type, and `rounded` -> relative error of an expert's output, where it was measured."""
    found = {
        n: dict(zip(profile.grids, s[GRID_LOSSES].tolist(), strict=True))
        for n, s in profile.statistics.items()
        if GRID_LOSSES in s and bool(s[BIT_TOKENS].any())
    }
    if not found:
        raise InvalidInputError(
            "No expert saw enough calibration text to be solved on GGUF's types; profile again on more of it."
        )
    return found


def _ratio(
    name: str,
    matrices: Sequence[Matrix],
    solved: Mapping[int, Mapping[str, float]],
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
    within = _within(solved, layers)
    coarse = sum(solved[n][ROUNDED] for n in within)
    own = sum(solved[n][name] for n in within) / max(coarse, 1e-300)
    return own * (1.0 if matrices[0].each else rounding / ROUNDING[fitting(name, hidden).name])


def _lies_in(matrix: Matrix, kind: Kind, layers: tuple[int, int] | None) -> bool:
    inside = layers is None or (matrix.layer is not None and layers[0] <= matrix.layer <= layers[1])
    return matrix.kind is kind and inside


def _file_of(profile: Profile) -> FileWeights:
    if profile.file is None:
        raise _lacking("this one does not say what a file is made of")
    try:
        file = FileWeights.model_validate(profile.file)
    except ValidationError as error:
        raise _lacking(f"what this one says of a file is not sound ({error.errors()[0]['msg']})") from error
    if file.experts != profile.shape.experts or any((m.layer or 0) >= profile.shape.layers for m in file.matrices):
        raise _lacking("what this one says of a file is of another model")
    return file


def _require_all(rows: Sequence[KindLoss], file: FileWeights, layers: int) -> None:
    """Hold rows of losses against the matrices: each kind in each range where it lies, once."""
    wanted: set[Key] = {(kind, None) for kind in OUTSIDE if any(m.kind is kind for m in file.matrices)}
    for at in ranges_of(layers):
        wanted |= {(m.kind, at) for m in file.matrices if m.layer is not None and at[0] <= m.layer <= at[1]}
    found = [(row.kind, row.layers) for row in rows if row.kind is not None]
    whole = [row.kl for row in rows if row.kind is None]
    if sorted(map(str, found)) != sorted(map(str, wanted)) or len(whole) != 1 or not whole[0] > 0:
        raise _lacking("this one's are not those of its model, each kind in each range of layers once")


def _within(solved: Mapping[int, Mapping[str, float]], layers: tuple[int, int] | None) -> list[int]:
    return [n for n in solved if layers is None or layers[0] <= n <= layers[1]] or list(solved)


def _slope(
    profile: Profile,
    measured: Mapping[Key, KindLoss],
    solved: Mapping[int, Mapping[str, float]],
    contribution: Mapping[int, float],
    layer: int,
) -> float:
    """Divergence per share of a layer's squared output that is lost."""
    own = next((at for kind, at in measured if kind in _ROUTED and at is not None and at[0] <= layer <= at[1]), None)
    if own is None or any((kind, own) not in measured for kind in _ROUTED):
        raise _lacking(f"this one has none for the experts of layer {layer}")
    within = _within(solved, own)
    error = sum(solved[n][ROUNDED] for n in within) / len(within) * contribution[layer]
    layers = sum(own[0] <= n <= own[1] for n in profile.layers)
    return sum(measured[kind, own].kl for kind in _ROUTED) / layers / max(error, 1e-300)


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
