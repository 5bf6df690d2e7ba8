"""What quantizing matrices costs in KL divergence, estimated from a profile with losses by kind, for mixes of GGUF's
types and budgets of integers alike. Without torch.

    divergence of a kind k in a range r of layers = t * S_kr * e_r(code) / e_r(rounded)

S is the divergence that was measured with that kind rounded in that range alone (`kind_losses`), e the relative errors
of the experts' outputs by code (`bit_losses`), t what all at once cost over the sum of all alone. D_n, divergence per
share of a layer's squared output, is what rounding its experts cost over the error that this made.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from pydantic import ValidationError

from moepress.calibration.profile import BIT_LOSSES, BIT_TOKENS, GRID_LOSSES, Profile
from moepress.compress.budget.sensitivities import ROUNDED, Key, KindLoss, by_kind, ranges_of, together
from moepress.compress.budget.sizes import planned_linears
from moepress.compress.gptq.block_choice import MIX_TYPES
from moepress.compress.gptq.include import IN_LAYERS
from moepress.compress.gptq.kinds import KINDS, Kind, kind_text
from moepress.converters.safetensors.scheme import SUPPORTED_BITS
from moepress.errors import InvalidInputError

ROUTED = frozenset({Kind.EXPERTS, Kind.DOWN})
Code = str | int
"""A type of GGUF, `rounded`, or the bits of integers."""
Range = tuple[int, int] | None
"""The first and the last layer; None for what lies in no layer."""
Place = tuple[Kind, int | None]
"""A kind of matrix in a layer; None for what lies in none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Divergences:
    """What a profile knows, in nats per token.

    Attributes:
        rows: as they were measured.
        errors: layer -> code -> relative error of its experts' outputs, where that was measured.
        places: kind and layer of all matrices, each once.
    """

    rows: Sequence[KindLoss]
    errors: Mapping[int, Mapping[Code, float]]
    places: Collection[Place]

    @property
    def measured(self) -> Mapping[Key, KindLoss]:
        """Rows by kind and range."""
        return by_kind(self.rows)

    @property
    def whole(self) -> float:
        """What all at once cost over the sum of all alone."""
        return together(self.rows)

    def ratio(self, code: Code, layers: Range) -> float:
        """Relative error of experts at a code over that of rounding, in a range or where it has none in all layers."""
        within = self._within(layers)
        coarse = sum(self.errors[n][ROUNDED] for n in within)
        return sum(self.errors[n][code] for n in within) / max(coarse, 1e-300)

    def of(self, kind: Kind, layer: int | None) -> KindLoss:
        """The row that a kind of a layer is measured by.

        Raises:
            InvalidInputError: there is none.
        """
        for row in self.rows:
            if row.kind is kind and _lies_in(layer, row.layers):
                return row
        raise lacking(f"this one has none for {kind_text(kind)}" + ("" if layer is None else f" of layer {layer}"))

    def of_matrices(self, kind: Kind, layer: int | None, code: Code) -> float:
        """Divergence of a kind in one layer at a code; the layers of a range that have the kind are taken as alike."""
        row = self.of(kind, layer)
        return self.whole * row.kl / self._alike(row) * self.ratio(code, row.layers)

    def of_experts(self, layer: int, code: Code) -> float:
        """Divergence of a layer's routed experts at a code, of layers that were not solved as of their range's mean."""
        known = [layer] if layer in self.errors else self._within(self.of(Kind.DOWN, layer).layers)
        return self.whole * self.slope(layer) * sum(self.errors[n][code] for n in known) / len(known)

    def slope(self, layer: int, contribution: float = 1.0) -> float:
        """Divergence by one layer's experts, were it all that changes, per relative error of their outputs.

        With what they contribute to the squared routed output, a share of it, per share of that which is lost.
        """
        rows = [self.of(kind, layer) for kind in sorted(ROUTED)]
        within = self._within(rows[0].layers)
        error = sum(self.errors[n][ROUNDED] for n in within) / len(within) * contribution
        return sum(row.kl for row in rows) / self._alike(rows[0]) / max(error, 1e-300)

    def _alike(self, row: KindLoss) -> int:
        """Layers that a row is of."""
        return max(1, sum(kind is row.kind and _lies_in(layer, row.layers) for kind, layer in self.places))

    def _within(self, layers: Range) -> list[int]:
        return [n for n in self.errors if layers is None or layers[0] <= n <= layers[1]] or list(self.errors)


def _lies_in(layer: int | None, layers: Range) -> bool:
    return layers is None if layer is None else layers is not None and layers[0] <= layer <= layers[1]


def lacking(what: str) -> InvalidInputError:
    """Losses that a profile should have, and what is wrong with them."""
    return InvalidInputError(
        "Divergences are estimated from losses by kind of matrix, which a profile has where it was made with "
        f"--grid-losses and without --no-loo, and {what}; profile again."
    )


def divergences_of(profile: Profile) -> Divergences | None:
    """What a profile knows of divergences; None where it was made without, or on too little text.

    Raises:
        InvalidInputError: what it has is not sound.
    """
    if profile.grids != (*MIX_TYPES, ROUNDED) or not profile.kind_losses:
        return None
    errors = _solved_errors(profile)
    if not errors:
        return None
    try:
        rows = [KindLoss.model_validate(row) for row in profile.kind_losses]
    except ValidationError as error:
        raise lacking(f"this one's are not sound ({error.errors()[0]['msg']})") from error
    places = {(KINDS[linear.part], linear.layer) for linear in planned_linears(profile, IN_LAYERS)}
    places |= {(kind, layer) for kind in ROUTED for layer in profile.layers}
    places |= {(row.kind, None) for row in rows if row.kind is not None and row.layers is None}
    return Divergences(rows=rows, errors=errors, places=places)


def _solved_errors(profile: Profile) -> dict[int, dict[Code, float]]:
    """Layer -> code -> relative error of an expert's output, where it was measured on GGUF's types."""
    found = dict[int, dict[Code, float]]()
    for layer in profile.layers:
        kept = profile.statistics[layer]
        if GRID_LOSSES in kept and BIT_LOSSES in kept and bool(kept[BIT_TOKENS].any()):
            found[layer] = dict(zip(profile.grids, kept[GRID_LOSSES].tolist(), strict=True))
            found[layer] |= dict(zip(SUPPORTED_BITS, kept[BIT_LOSSES].tolist(), strict=True))
    return found


def require_all(rows: Sequence[KindLoss], there: Iterable[Place], layers: int) -> None:
    """Hold rows against the matrices of the model: each kind in each range where it lies, once, and all at once.

    Args:
        rows: that were measured.
        there: kind and layer of every matrix, as often as it likes.
        layers: of the model.

    Raises:
        InvalidInputError: they are not those of the model.
    """
    ranges = ranges_of(layers)
    wanted = {(kind, next((at for at in ranges if _lies_in(layer, at)), None)) for kind, layer in there}
    found = [(row.kind, row.layers) for row in rows if row.kind is not None]
    whole = [row.kl for row in rows if row.kind is None]
    if sorted(map(str, found)) != sorted(map(str, wanted)) or len(whole) != 1 or not whole[0] > 0:
        raise lacking("this one's are not those of its model, each kind in each range of layers once")
