"""Targets from the original's inputs: the algebra, against the objective itself in fp64."""

import pytest
import torch
from torch import Tensor

from moepress.calibration.hessian import Moments, moments
from moepress.compress.gptq.asymmetry import against_original, move_target
from moepress.compress.gptq.grid import dequantize
from moepress.compress.gptq.solver import solve
from moepress.converters.safetensors.scheme import Scheme

ROWS, COLUMNS, TOKENS = 6, 32, 400


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def streams(noise: float = 0.3) -> tuple[Tensor, Tensor]:
    """Inputs in the quantized stream and in the original, unlike by a linear part and by noise."""
    original = drawn(TOKENS, COLUMNS, seed=1)
    shifted = original @ (torch.eye(COLUMNS) + 0.1 * drawn(COLUMNS, COLUMNS, seed=2))
    return shifted + noise * drawn(TOKENS, COLUMNS, seed=3), original


def aim(quantized: Tensor, weight: Tensor, inputs: Tensor, originals: Tensor) -> float:
    """sum_t |Q x_t - W x~_t|^2."""
    return float((inputs.double() @ quantized.double().T - originals.double() @ weight.double().T).square().sum())


def moved(weight: Tensor, found: Moments, asymmetry: float = 1.0, damp: float = 1e-6) -> Tensor:
    target = weight.clone()
    move_target(target, found, asymmetry, damp)
    return target


def test_the_error_against_the_target_is_that_against_the_original_but_for_a_constant() -> None:
    inputs, originals = streams()
    weight, found = drawn(ROWS, COLUMNS, seed=4), moments(inputs, originals)
    target = moved(weight, found).double()
    constants = []
    for seed in range(3):
        other = weight + drawn(ROWS, COLUMNS, seed=10 + seed)
        away = other.double() - target
        constants.append(aim(other, weight, inputs, originals) - float(((away @ found.hessian.double()) * away).sum()))
    assert constants == pytest.approx([aim(target, weight, inputs, originals)] * 3, rel=1e-4)
    assert constants[0] < 0.9 * aim(weight, weight, inputs, originals)


def test_a_share_of_the_step_is_a_share_of_the_way() -> None:
    weight, found = drawn(ROWS, COLUMNS, seed=4), moments(*streams())
    half, whole = moved(weight, found, 0.5), moved(weight, found, 1.0)
    torch.testing.assert_close(half - weight, (whole - weight) / 2, rtol=1e-4, atol=1e-5)
    inputs, originals = streams()
    errors = [aim(w, weight, inputs, originals) for w in (weight, half, whole)]
    assert errors[0] > errors[1] > errors[2]


def test_codes_for_the_target_come_nearer_to_the_original_s_outputs() -> None:
    inputs, originals = streams()
    weight, found, scheme = drawn(ROWS, COLUMNS, seed=4), moments(inputs, originals), Scheme(bits=4, group_size=16)
    errors = []
    for aimed_at in (weight, moved(weight, found, damp=0.03)):
        solved = solve(aimed_at[None], found.hessian[None], scheme, scale_dtype=torch.float32)
        errors.append(aim(dequantize(solved.codes, solved.scales, scheme)[0], weight, inputs, originals))
    assert errors[1] < 0.9 * errors[0]


def test_equal_streams_leave_every_bit_as_it_is() -> None:
    inputs, _ = streams()
    weight, found = drawn(ROWS, COLUMNS, seed=4), moments(inputs, inputs)
    assert torch.equal(moved(weight, found), weight)


@pytest.mark.parametrize(
    "found",
    [
        Moments(hessian=torch.eye(COLUMNS)),
        Moments(hessian=torch.zeros(COLUMNS, COLUMNS), cross=torch.eye(COLUMNS)),
        Moments(hessian=torch.eye(COLUMNS) - 3 * torch.ones(COLUMNS, COLUMNS), cross=torch.eye(COLUMNS)),
    ],
    ids=["no original", "no token", "not positive"],
)
def test_without_a_usable_hessian_or_original_the_matrix_stays(found: Moments) -> None:
    weight = drawn(ROWS, COLUMNS, seed=4)
    target = weight.clone()
    assert move_target(target, found, 1.0, 0.01) is None
    assert torch.equal(target, weight)


def test_more_damping_is_tried_before_giving_up() -> None:
    almost = torch.eye(COLUMNS) - 0.06 * torch.ones(COLUMNS, COLUMNS)  # its least eigenvalue is below -0.9
    assert float(torch.linalg.eigvalsh(almost)[0]) < -0.9
    found = Moments(hessian=almost, cross=torch.eye(COLUMNS))
    assert move_target(drawn(ROWS, COLUMNS, seed=4), found, 1.0, 0.01)


@pytest.mark.parametrize("damp", [1e-6, 0.1])
@pytest.mark.parametrize("asymmetry", [1.0, 0.25])
def test_errors_against_the_original_follow_from_those_against_the_target(damp: float, asymmetry: float) -> None:
    inputs, originals = streams()
    weight, found = drawn(ROWS, COLUMNS, seed=4), moments(inputs, originals)
    target = weight.clone()
    step = move_target(target, found, asymmetry, damp)
    assert step is not None
    other = target + 0.03 * drawn(ROWS, COLUMNS, seed=5)  # as near to the target as codes come

    def squared(matrix: Tensor) -> float:
        return float((matrix.double() @ inputs.double().T).square().sum())

    told = against_original(squared(target - other), squared(target), step, weight - other)
    assert told == pytest.approx((squared(weight - other), squared(weight)), rel=1e-4)
    assert squared(weight - other) > 1.5 * squared(target - other)
