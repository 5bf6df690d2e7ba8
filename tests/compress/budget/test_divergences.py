"""Divergences by kind, layer and code, from losses that are made up."""

import pytest

from moepress.compress.budget.divergences import Divergences, require_all
from moepress.compress.budget.sensitivities import KindLoss
from moepress.compress.gptq.kinds import Kind
from moepress.errors import InvalidInputError

PLACES = [
    *((kind, layer) for kind in (Kind.EXPERTS, Kind.DOWN) for layer in (1, 2, 3)),
    *((Kind.ATTENTION, layer) for layer in range(4)),
    (Kind.HEAD, None),
]


def row(kind: Kind | None, layers: tuple[int, int] | None, kl: float) -> KindLoss:
    return KindLoss(kind=kind, layers=layers, kl=kl, error=0.0)


FOUND = Divergences(
    rows=[
        row(Kind.ATTENTION, (0, 0), 0.1),
        row(Kind.ATTENTION, (1, 3), 0.3),
        row(Kind.EXPERTS, (1, 3), 0.4),
        row(Kind.DOWN, (1, 3), 0.8),
        row(Kind.HEAD, None, 0.4),
        row(None, None, 1.0),
    ],
    errors={1: {"rounded": 0.02, 4: 0.01}, 2: {"rounded": 0.04, 4: 0.02}},  # layer 3 was not solved
    places=PLACES,
)


def test_what_a_range_lost_is_shared_by_its_layers_and_scaled_by_the_errors() -> None:
    assert FOUND.whole == pytest.approx(0.5)
    assert FOUND.ratio(4, (1, 3)) == pytest.approx(0.5)
    assert FOUND.of_matrices(Kind.ATTENTION, 2, 4) == pytest.approx(0.5 * 0.3 / 3 * 0.5)
    assert FOUND.of_matrices(Kind.ATTENTION, 0, 4) == pytest.approx(
        0.5 * 0.1 * 0.5
    )  # no expert in layer 0: all others'
    assert FOUND.of_matrices(Kind.HEAD, None, 4) == pytest.approx(0.5 * 0.4 * 0.5)


def test_experts_of_all_layers_lose_what_their_range_does_and_each_by_its_own_error() -> None:
    each = [FOUND.of_experts(layer, 4) for layer in (1, 2, 3)]
    assert sum(each) == pytest.approx(0.5 * 1.2 * 0.5)
    assert each[1] == pytest.approx(2 * each[0])
    assert each[2] == pytest.approx((each[0] + each[1]) / 2)  # taken as the mean of its range
    assert FOUND.slope(1, contribution=0.5) == pytest.approx(2 * FOUND.slope(1)) == pytest.approx(1.2 / 3 / 0.015)


def test_losses_that_are_not_there_are_missed() -> None:
    with pytest.raises(InvalidInputError, match="has none for shared of layer 2; profile again"):
        FOUND.of_matrices(Kind.SHARED, 2, 4)
    few = [(Kind.ATTENTION, 0), (Kind.HEAD, None)]
    rows = [row(Kind.ATTENTION, (0, 0), 0.1), row(Kind.HEAD, None, 0.1), row(None, None, 0.1)]
    require_all(rows, few * 2, 1)
    for wrong in (rows[1:], rows[:-1], [*rows, rows[0]], [*rows[:-1], row(None, None, 0.0)]):
        with pytest.raises(InvalidInputError, match="not those of its model"):
            require_all(wrong, few, 1)
