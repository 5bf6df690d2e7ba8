"""The second factor of an expert's loss, held against derivatives of the whole expert."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from moepress.calibration.hessian import HessianOptions
from moepress.compress.gptq.sides import expert_side, floored, rows_of, spread
from moepress.models.forward.gating import Gating
from moepress.models.storage.experts import Expert

D, F, T = 12, 8, 40
OPTIONS = HessianOptions(shrinkage_tokens=0.0, end_floor=0.5)
Between = Callable[[Tensor | None, Tensor], Tensor]


def _silu(gate: Tensor | None, up: Tensor) -> Tensor:
    assert gate is not None
    return torch.nn.functional.silu(gate) * up


def _clamped(gate: Tensor | None, up: Tensor) -> Tensor:
    assert gate is not None
    return gate.clamp(max=1.0) * torch.sigmoid(1.7 * gate) * (up.clamp(-1, 1) + 1)


def _alone(_gate: Tensor | None, up: Tensor) -> Tensor:
    return torch.relu(up).square()


@pytest.mark.parametrize(("between", "gated"), [(_silu, True), (_clamped, True), (_alone, False)])
def test_an_experts_side_is_the_second_derivative_of_its_weighed_output(between: Between, gated: bool) -> None:
    drawn = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=drawn)

    expert = Expert(
        gate=normal(F, D) if gated else None,
        up=normal(F, D),
        down=normal(D, F),
        gate_bias=normal(F) if gated else None,
        up_bias=normal(F),
    )
    inputs_TD, weights_T, root_DD = normal(T, D), normal(T).abs(), normal(D, D)
    metric_DD = root_DD @ root_DD.T
    given = expert, Gating(between=between), (inputs_TD, weights_T), torch.empty(0, D), metric_DD, OPTIONS
    with torch.inference_mode():
        found = expert_side(*given)
    assert found is not None

    def output(both_O: Tensor) -> Tensor:
        gate_F, up_F = (both_O[:F], both_O[F:]) if gated else (None, both_O)
        return expert.down @ between(gate_F, up_F)

    wanted = torch.zeros(found[0].shape)
    for input_D, weight in zip(inputs_TD, weights_T, strict=True):
        up_F = expert.up @ input_D + expert.up_bias
        both_O = torch.cat([expert.gate @ input_D + expert.gate_bias, up_F]) if gated else up_F
        slope_DO = torch.autograd.functional.jacobian(output, both_O)
        wanted += weight.square() * slope_DO.T @ metric_DD @ slope_DO
    wanted /= wanted.diagonal().mean()
    torch.testing.assert_close(found[0], wanted + 0.5 * torch.eye(len(wanted)), rtol=1e-4, atol=1e-4)


def test_an_expert_without_tokens_is_weighed_by_the_layers() -> None:
    drawn = torch.Generator().manual_seed(1)
    gate, up, down = (torch.randn(*shape, generator=drawn) for shape in ((F, D), (F, D), (D, F)))
    expert = Expert(gate=gate, up=up, down=down)
    sample_PD, none = torch.randn(9, D, generator=drawn), (torch.empty(0, D), torch.empty(0))
    gating = Gating(between=_silu)
    found = expert_side(expert, gating, none, sample_PD, torch.eye(D), HessianOptions())
    wanted = expert_side(expert, gating, (sample_PD, torch.ones(9)), torch.empty(0, D), torch.eye(D), HessianOptions())
    assert found is not None
    assert wanted is not None
    torch.testing.assert_close(found, wanted)


def test_an_output_that_is_changed_before_it_is_added_up_has_no_side() -> None:
    expert = Expert(gate=torch.ones(F, D), up=torch.ones(F, D), down=torch.ones(D, F))
    given = (torch.ones(3, D), torch.ones(3)), torch.ones(2, D), torch.eye(D), HessianOptions()
    assert expert_side(expert, Gating(between=_silu, after=torch.tanh), *given) is None
    assert expert_side(expert, Gating(between=_silu), *given) is not None


def test_rows_of_blocks_keep_what_they_have_to_do_with_each_other() -> None:
    side = floored([torch.arange(9.0).view(3, 3), torch.arange(4.0).view(2, 2)], 0.0, torch.device("cpu"))
    first, second = rows_of(side, torch.tensor([0, 2, 4]))
    assert first.tolist() == [[0.0, 2.0], [6.0, 8.0]]
    assert second.tolist() == [[3.0]]
    assert len(rows_of(side, torch.tensor([3, 4]))) == 1


def test_tokens_are_spread_evenly() -> None:
    assert spread(5, 10).tolist() == [0, 1, 2, 3, 4]
    assert spread(10, 5).tolist() == [0, 2, 4, 6, 8]
    assert spread(0, 5).tolist() == []
