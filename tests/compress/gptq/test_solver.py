import dataclasses
import itertools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moepress.compress.gptq import native
from moepress.compress.gptq.grid import absmax_scales, dequantize, round_to_nearest, search_scales, search_scales_on
from moepress.compress.gptq.levels import Grid
from moepress.compress.gptq.options import PLAIN, SolverOptions
from moepress.compress.gptq.solver import Solved, solve
from moepress.converters.safetensors.scheme import Scheme

SCHEME = Scheme(bits=3, group_size=16)


@pytest.fixture(autouse=True, params=["native", "torch"])
def loops(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every test, with the native loops and in torch alone."""
    if request.param == "torch":
        monkeypatch.setattr(native, "library", lambda: None)
    elif native.library() is None:
        pytest.skip(f"no native loops: {native.status()}")
    return str(request.param)


def problem(
    seed: int, *, experts: int = 3, rows: int = 7, columns: int = 48, tokens: int = 200
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights and Hessians of correlated inputs with very different column norms."""
    generator = torch.Generator().manual_seed(seed)
    weight_EOI = torch.randn(experts, rows, columns, generator=generator) * 0.05
    mixing_EII = torch.randn(experts, columns, columns, generator=generator) / columns**0.5
    spread_EI = torch.randn(experts, 1, columns, generator=generator).exp()
    inputs_ETI = (torch.randn(experts, tokens, columns, generator=generator) @ mixing_EII) * spread_EI
    return weight_EOI, inputs_ETI.mT @ inputs_ETI


def damped_problem(seed: int, **sizes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """As `problem`, with the damping in H already, so that next to none is needed in the solver."""
    weight_EOI, hessian_EII = problem(seed, **sizes)
    mean_E = hessian_EII.diagonal(dim1=1, dim2=2).mean(dim=1)
    return weight_EOI, hessian_EII + 0.01 * mean_E[:, None, None] * torch.eye(hessian_EII.shape[1])


def loss_of(weight_OI: torch.Tensor, quantized_OI: torch.Tensor, hessian_II: torch.Tensor) -> torch.Tensor:
    residual_OI = (weight_OI - quantized_OI).double()
    return (residual_OI @ hessian_II.double() @ residual_OI.T).trace()


def reference_row(
    row_I: torch.Tensor, hessian_II: torch.Tensor, scale_I: torch.Tensor, scheme: Scheme, order: list[int], damp: float
) -> torch.Tensor:
    """GPTQ on one row in fp64, from equations 2 and 3 of arXiv 2210.17323: eliminate one column at a time."""
    damped_II = hessian_II.double() + damp * hessian_II.diagonal().double().mean() * torch.eye(len(order))
    row_I, codes_I, left = row_I.double().clone(), torch.zeros(len(order), dtype=torch.int8), list(order)
    while left:
        inverse = torch.linalg.inv(damped_II[left][:, left])
        column, scale = left[0], scale_I[left[0]].double()
        code = (row_I[column] / scale).round().clamp(scheme.code_min, scheme.code_max)
        row_I[left] -= (row_I[column] - code * scale) / inverse[0, 0] * inverse[:, 0]
        codes_I[column] = int(code)
        left.pop(0)
    return codes_I


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("bits", [2, 4])
def test_plain_gptq_agrees_with_the_papers_formulas(act_order: bool, bits: int) -> None:
    scheme = Scheme(bits=bits, group_size=16)
    weight_EOI, hessian_EII = problem(0)
    options = dataclasses.replace(PLAIN, act_order=act_order)
    solved = solve(weight_EOI, hessian_EII, scheme, scale_dtype=torch.bfloat16, options=options)
    scales_EOG = absmax_scales(weight_EOI, scheme, scale_dtype=torch.bfloat16)
    nearest_EOI = dequantize(round_to_nearest(weight_EOI, scales_EOG, scheme), scales_EOG, scheme)
    assert torch.equal(solved.scales, scales_EOG)
    for e in range(3):
        order = hessian_EII[e].diagonal().argsort(descending=True).tolist() if act_order else list(range(48))
        for o in range(7):
            scale_I = scales_EOG[e, o].repeat_interleave(16)
            codes_I = reference_row(weight_EOI[e, o], hessian_EII[e], scale_I, scheme, order, damp=0.01)
            row = weight_EOI[e, o : o + 1]
            reached = loss_of(row, (codes_I * scale_I)[None], hessian_EII[e])
            if reached < loss_of(row, nearest_EOI[e, o : o + 1], hessian_EII[e]):
                assert torch.equal(solved.codes[e, o], codes_I)


def test_the_reported_loss_is_the_loss_of_the_returned_weights() -> None:
    weight_EOI, hessian_EII = problem(1)
    solved = solve(weight_EOI, hessian_EII, SCHEME, scale_dtype=torch.float16)
    quantized_EOI = dequantize(solved.codes, solved.scales, SCHEME)
    expected = torch.stack([loss_of(weight_EOI[e], quantized_EOI[e], hessian_EII[e]) for e in range(3)])
    torch.testing.assert_close(solved.loss, expected, rtol=1e-4, atol=0)


def nearest_loss(
    weight_EOI: torch.Tensor, hessian_EII: torch.Tensor, scheme: Scheme, dtype: torch.dtype
) -> torch.Tensor:
    importance_EI = hessian_EII.diagonal(dim1=1, dim2=2)
    scales_EOG = search_scales(weight_EOI, importance_EI, scheme, scale_dtype=dtype)
    nearest_EOI = dequantize(round_to_nearest(weight_EOI, scales_EOG, scheme), scales_EOG, scheme)
    return torch.stack([loss_of(*parts) for parts in zip(weight_EOI, nearest_EOI, hessian_EII, strict=True)])


def assert_valid(solved: Solved, scheme: Scheme, scale_dtype: torch.dtype) -> None:
    assert solved.codes.dtype == torch.int8
    assert scheme.code_min <= solved.codes.min() <= solved.codes.max() <= scheme.code_max
    assert bool((solved.scales != 0).all())
    assert torch.equal(solved.scales.to(scale_dtype).float(), solved.scales)
    assert bool(solved.loss.isfinite().all())


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 2**20),
    bits=st.sampled_from([2, 3, 4, 8]),
    group_size=st.sampled_from([8, 16, -1]),
    tokens=st.integers(1, 100),
    scale_dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    magnitude=st.floats(-4, 4),
)
def test_codes_are_valid_and_never_worse_than_round_to_nearest(
    seed: int, bits: int, group_size: int, tokens: int, scale_dtype: torch.dtype, magnitude: float
) -> None:
    scheme = Scheme(bits=bits, group_size=group_size)
    weight_EOI, hessian_EII = problem(seed, tokens=tokens)
    hessian_EII *= 10.0**magnitude
    solved = solve(weight_EOI, hessian_EII, scheme, scale_dtype=scale_dtype)
    assert_valid(solved, scheme, scale_dtype)
    limit_E = nearest_loss(weight_EOI, hessian_EII, scheme, scale_dtype)
    assert bool((solved.loss <= limit_E * (1 + 1e-3) + 1e-9 * 10.0**magnitude).all())


@settings(deadline=None, max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**20), group_size=st.sampled_from([8, 16, -1]), refits=st.booleans())
def test_another_sweep_or_refit_never_raises_the_loss(seed: int, group_size: int, refits: bool) -> None:
    scheme = Scheme(bits=2, group_size=group_size)
    weight_EOI, hessian_EII = damped_problem(seed, tokens=60)
    losses = [
        solve(
            weight_EOI,
            hessian_EII,
            scheme,
            scale_dtype=torch.bfloat16,
            options=SolverOptions(sweeps=20 if refits else steps, refits=steps if refits else 0, damp=1e-7),
        ).loss
        for steps in range(4)
    ]
    for before, after in itertools.pairwise(losses):
        assert bool((after <= before * (1 + 1e-4)).all())


def test_a_finished_descent_cannot_be_improved_by_changing_one_code() -> None:
    weight_EOI, hessian_EII = damped_problem(2, experts=1, rows=3, columns=16)
    scheme = Scheme(bits=2, group_size=8)
    options = SolverOptions(sweeps=30, refits=0, damp=1e-7)
    solved = solve(weight_EOI, hessian_EII, scheme, scale_dtype=torch.float32, options=options)
    best = loss_of(weight_EOI[0], dequantize(solved.codes, solved.scales, scheme)[0], hessian_EII[0])
    for row in range(3):
        for column in range(16):
            for code in range(scheme.code_min, scheme.code_max + 1):
                codes_EOI = solved.codes.clone()
                codes_EOI[0, row, column] = code
                changed_OI = dequantize(codes_EOI, solved.scales, scheme)[0]
                assert loss_of(weight_EOI[0], changed_OI, hessian_EII[0]) >= best * (1 - 1e-5)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_every_stage_of_the_default_lowers_the_loss_on_correlated_inputs(bits: int) -> None:
    scheme = Scheme(bits=bits, group_size=16)
    weight_EOI, hessian_EII = problem(3, experts=4, rows=64)
    stages = (
        PLAIN,
        dataclasses.replace(PLAIN, act_order=True),
        SolverOptions(refits=0, sweeps=0),
        SolverOptions(refits=0),
        SolverOptions(),
    )
    losses = [
        solve(weight_EOI, hessian_EII, scheme, scale_dtype=torch.bfloat16, options=options).loss.sum().item()
        for options in stages
    ]
    assert losses == sorted(losses, reverse=True)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_annealed_sweeps_find_what_a_descent_does_not(bits: int) -> None:
    scheme = Scheme(bits=bits, group_size=16)
    weight_EOI, hessian_EII = problem(15, experts=2, rows=64)
    descended, annealed = (
        solve(
            weight_EOI,
            hessian_EII,
            scheme,
            scale_dtype=torch.bfloat16,
            options=SolverOptions(refits=0, annealed=sweeps, damp=1e-3),
        )
        for sweeps in (0, 40)
    )
    assert bool((annealed.loss < 0.98 * descended.loss).all())
    assert torch.equal(annealed.scales, descended.scales)
    assert_valid(annealed, scheme, torch.bfloat16)


def test_a_batch_of_experts_is_solved_as_each_would_be_alone() -> None:
    weight_EOI, hessian_EII = problem(4)
    together = solve(weight_EOI, hessian_EII, SCHEME, scale_dtype=torch.bfloat16)
    for e in range(3):
        alone = solve(weight_EOI[e : e + 1], hessian_EII[e : e + 1], SCHEME, scale_dtype=torch.bfloat16)
        assert (alone.codes[0] != together.codes[e]).float().mean() < 0.01
        torch.testing.assert_close(alone.loss[0], together.loss[e], rtol=1e-2, atol=0)


def test_the_order_of_experts_does_not_matter() -> None:
    weight_EOI, hessian_EII = problem(5)
    order = [2, 0, 1]
    straight = solve(weight_EOI, hessian_EII, SCHEME, scale_dtype=torch.bfloat16)
    shuffled = solve(weight_EOI[order], hessian_EII[order], SCHEME, scale_dtype=torch.bfloat16)
    assert torch.equal(straight.codes[order], shuffled.codes)
    assert torch.equal(straight.scales[order], shuffled.scales)


def test_solving_twice_gives_the_same_bits() -> None:
    weight_EOI, hessian_EII = problem(6)
    first, second = (solve(weight_EOI, hessian_EII, SCHEME, scale_dtype=torch.bfloat16) for _ in range(2))
    for name in ("codes", "scales", "loss", "energy", "damping", "rounded"):
        assert torch.equal(getattr(first, name), getattr(second, name))


def test_inputs_are_left_alone() -> None:
    weight_EOI, hessian_EII = problem(7)
    copies = weight_EOI.clone(), hessian_EII.clone()
    solve(weight_EOI, hessian_EII, SCHEME, scale_dtype=torch.bfloat16)
    assert torch.equal(weight_EOI, copies[0])
    assert torch.equal(hessian_EII, copies[1])


def test_dead_columns_are_rounded_to_nearest() -> None:
    weight_EOI, hessian_EII = problem(8)
    dead = [0, 17, 40]
    hessian_EII[:, dead, :] = 0
    hessian_EII[:, :, dead] = 0
    options = SolverOptions(sweeps=0, refits=0)
    solved = solve(weight_EOI, hessian_EII, SCHEME, scale_dtype=torch.bfloat16, options=options)
    nearest_EOI = round_to_nearest(weight_EOI, solved.scales, SCHEME)
    assert torch.equal(solved.codes[:, :, dead], nearest_EOI[:, :, dead])
    assert_valid(solve(weight_EOI, hessian_EII, SCHEME, scale_dtype=torch.bfloat16), SCHEME, torch.bfloat16)
    assert not solved.rounded.any()


def test_an_expert_without_tokens_is_rounded_to_nearest_and_says_so() -> None:
    weight_EOI, hessian_EII = problem(9)
    untouched = solve(weight_EOI, hessian_EII, SCHEME, scale_dtype=torch.bfloat16)
    hessian_EII[1] = 0
    solved = solve(weight_EOI, hessian_EII, SCHEME, scale_dtype=torch.bfloat16)
    either = Grid.of(SCHEME, either_sign=True)
    group = SCHEME.columns_per_group(48)
    scales_EOG = search_scales_on(weight_EOI, torch.ones(3, 48), either, group, torch.bfloat16)
    assert torch.equal(solved.scales[1], scales_EOG[1])
    assert torch.equal(solved.codes[1], round_to_nearest(weight_EOI, scales_EOG, SCHEME)[1])
    assert solved.rounded.tolist() == [False, True, False]
    assert solved.damping.tolist() == [0.03, 0.0, 0.03]
    assert torch.equal(solved.codes[[0, 2]], untouched.codes[[0, 2]])


def test_scales_have_either_sign_unless_one_is_asked_for() -> None:
    weight_EOI, hessian_EII = problem(14, rows=64)
    either = solve(weight_EOI, hessian_EII, SCHEME, scale_dtype=torch.bfloat16)
    plain = solve(weight_EOI, hessian_EII, SCHEME, scale_dtype=torch.bfloat16, options=SolverOptions(signed=False))
    assert 0.3 < float((either.scales < 0).double().mean()) < 0.7
    assert bool((plain.scales > 0).all())
    assert bool((either.loss < plain.loss).all())
    turned = weight_EOI.abs() * torch.tensor([1.0, -1.0]).repeat(24)  # half of each group reaches further down
    absmax = solve(turned, hessian_EII, SCHEME, scale_dtype=torch.bfloat16, options=SolverOptions(scale_search=False))
    assert bool((absmax.scales > 0).all())


def test_fewer_tokens_than_columns_work() -> None:
    weight_EOI, hessian_EII = problem(10, tokens=3)
    solved = solve(weight_EOI, hessian_EII, SCHEME, scale_dtype=torch.bfloat16)
    assert_valid(solved, SCHEME, torch.bfloat16)
    assert not solved.rounded.any()
    assert bool((solved.loss < nearest_loss(weight_EOI, hessian_EII, SCHEME, torch.bfloat16) / 2).all())


def test_damping_rises_tenfold_for_the_one_expert_whose_cholesky_fails() -> None:
    weight_EOI, hessian_EII = problem(11)
    smallest = torch.linalg.eigvalsh(hessian_EII[1])[0]
    mean = hessian_EII[1].diagonal().mean()
    hessian_EII[1] -= (smallest + 0.05 * mean) * torch.eye(48)
    solved = solve(weight_EOI, hessian_EII, SCHEME, scale_dtype=torch.bfloat16)
    torch.testing.assert_close(solved.damping, torch.tensor([0.03, 0.3, 0.03], dtype=torch.float64))
    assert not solved.rounded.any()


def test_a_hopeless_hessian_is_rounded_to_nearest_and_says_so() -> None:
    weight_EOI, hessian_EII = problem(12)
    hessian_EII[2] = torch.eye(48) - 1e4 * torch.ones(48, 48).fill_diagonal_(0)
    solved = solve(weight_EOI, hessian_EII, SCHEME, scale_dtype=torch.bfloat16)
    assert solved.rounded.tolist() == [False, False, True]
    assert torch.equal(solved.codes[2], round_to_nearest(weight_EOI, solved.scales, SCHEME)[2])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("which", [0, 1])
def test_non_finite_input_is_refused_with_the_experts_number(bad: float, which: int) -> None:
    tensors = problem(13)
    tensors[which][1, 2, 3] = bad
    with pytest.raises(ValueError, match=r"experts \[1\]"):
        solve(*tensors, SCHEME, scale_dtype=torch.bfloat16)


def test_shapes_dtypes_and_options_that_do_not_fit_are_refused() -> None:
    weight_EOI, hessian_EII = problem(14)
    with pytest.raises(ValueError, match="need"):
        solve(weight_EOI, hessian_EII[:2], SCHEME, scale_dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="pass float32"):
        solve(weight_EOI.bfloat16(), hessian_EII, SCHEME, scale_dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="damp"):
        SolverOptions(damp=0.0)
    with pytest.raises(ValueError, match="annealed"):
        SolverOptions(annealed=-1)


IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)  # GGUF's IQ4_NL
GRIDS = {
    "either sign": Grid(levels=tuple(map(float, range(-4, 4))), either_sign=True),
    "minimum": Grid(levels=tuple(map(float, range(8))), minimum=True),
    "table": Grid(levels=tuple(map(float, IQ4))),
}


@pytest.mark.parametrize("name", GRIDS)
def test_other_grids_are_solved_by_the_same_solver(name: str) -> None:
    grid = GRIDS[name]
    weight_EOI, hessian_EII = problem(20, rows=40)
    losses = []
    for options in (PLAIN, SolverOptions(refits=0), SolverOptions()):
        solved = solve(weight_EOI, hessian_EII, SCHEME, scale_dtype=torch.bfloat16, options=options, grid=grid)
        levels = grid.values(solved.codes).view(*solved.scales.shape, -1)
        assert bool(torch.isin(levels, torch.tensor(grid.levels)).all())
        offsets = torch.zeros_like(solved.scales) if solved.offsets is None else solved.offsets
        quantized_EOI = (levels * solved.scales[..., None] + offsets[..., None]).view(weight_EOI.shape)
        for e in range(3):
            expected = loss_of(weight_EOI[e], quantized_EOI[e], hessian_EII[e])
            torch.testing.assert_close(solved.loss[e], expected, rtol=1e-3, atol=0)
        losses.append(float(solved.loss.sum()))
        assert bool((solved.scales < 0).any()) == (grid.either_sign and options.scale_search)
    assert losses == sorted(losses, reverse=True)


def test_scales_of_either_sign_and_a_minimum_lose_less_than_symmetric_codes() -> None:
    weight_EOI, hessian_EII = problem(21, rows=64)
    plain, either = (
        float(solve(weight_EOI, hessian_EII, SCHEME, scale_dtype=torch.bfloat16, grid=grid).loss.sum())
        for grid in (Grid.of(SCHEME), GRIDS["either sign"])
    )
    shifted = weight_EOI + 0.1  # what symmetric codes serve badly
    without, above = (
        float(solve(shifted, hessian_EII, SCHEME, scale_dtype=torch.bfloat16, grid=grid).loss.sum())
        for grid in (None, GRIDS["minimum"])
    )
    assert either < plain
    assert above < without
