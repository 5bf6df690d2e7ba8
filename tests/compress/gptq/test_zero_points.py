"""Zero points: what the search finds, and that codes, refits and losses are those of (q - zero) * scale."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moepress.compress.gptq import cpu, native
from moepress.compress.gptq.batch import solve_batch
from moepress.compress.gptq.grid import above_zero, search_scales_on
from moepress.compress.gptq.levels import Grid
from moepress.compress.gptq.options import SolverOptions, Task
from moepress.compress.gptq.solver import Solved, solve
from moepress.compress.gptq.zero_points import search_with_zero
from moepress.converters.safetensors.scheme import Scheme

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def scheme_of(bits: int = 4, group_size: int = 16) -> Scheme:
    return Scheme(bits=bits, group_size=group_size, symmetric=False)


def problem(seed: int, experts: int = 2, rows: int = 40, columns: int = 96) -> tuple[Tensor, Tensor]:
    """Weights that lie to one side by group, and Hessians of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    weight_EOI = torch.randn(experts, rows, columns, generator=generator) * 0.05
    weight_EOI += torch.randn(experts, rows, columns // 16, generator=generator).repeat_interleave(16, dim=2) * 0.03
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5
    inputs = (torch.randn(experts, 300, columns, generator=generator) @ mixing) * torch.randn(columns).exp()
    return weight_EOI, inputs.mT @ inputs / 300


def dense(solved: Solved) -> Tensor:
    """(q - zero) * scale, one group after the other."""
    assert solved.zeros is not None
    parts = solved.codes.double().chunk(solved.scales.shape[2], dim=2)
    return torch.cat(
        [
            (part - solved.zeros[..., g, None].double()) * solved.scales[..., g, None].double()
            for g, part in enumerate(parts)
        ],
        dim=2,
    )


def loss_of(weight_EOI: Tensor, quantized_EOI: Tensor, hessian_EII: Tensor) -> Tensor:
    rest = weight_EOI.double() - quantized_EOI
    return (rest @ hessian_EII.double() * rest).sum(dim=(1, 2))


def error_of(group: Tensor, importance: Tensor, scale: float, zero: float, grid: Grid) -> float:
    levels = (group / scale + zero).round().clamp(grid.low, grid.high)
    return float((importance * ((levels - zero) * scale - group).square()).sum())


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_search_is_about_as_good_as_trying_every_zero_point_with_many_scales(bits: int, dtype: torch.dtype) -> None:
    grid = Grid.of(scheme_of(bits))
    generator = torch.Generator().manual_seed(bits)
    weight_EOI = torch.randn(1, 24, 32, generator=generator) + torch.randn(1, 24, 1, generator=generator)
    importance_EI = torch.rand(1, 32, generator=generator)
    scales, zeros = search_with_zero(weight_EOI, importance_EI, grid, 16, dtype)
    assert torch.equal(scales.to(dtype).float(), scales)
    assert bool((scales > 0).all())
    assert bool(((zeros == zeros.round()) & (zeros > grid.low) & (zeros <= grid.high)).all())
    mine = best = 0.0
    for row in range(24):
        for g in range(2):
            group, weigh = weight_EOI[0, row, 16 * g :][:16], importance_EI[0, 16 * g :][:16]
            span = float(group.max().clamp(min=0) - group.min().clamp(max=0)) / (grid.high - grid.low)
            mine += error_of(group, weigh, float(scales[0, row, g]), float(zeros[0, row, g]), grid)
            best += min(
                error_of(group, weigh, span * share / 40, zero, grid)
                for share in range(16, 56)
                for zero in range(int(grid.low) + 1, int(grid.high) + 1)
            )
    assert mine < 1.1 * best


def test_a_search_with_zero_points_finds_what_scales_of_either_sign_can_and_more() -> None:
    weight_EOI, _ = problem(1)
    importance_EI = torch.ones(2, 96)
    errors = []
    for bits in (2, 3, 4):
        grid = Grid.of(scheme_of(bits))
        scales, zeros = search_with_zero(weight_EOI, importance_EI, grid, 16, torch.bfloat16)
        turned = dataclasses.replace(grid, zero=False, either_sign=True)
        found = search_scales_on(weight_EOI, importance_EI, turned, 16, torch.bfloat16)
        grouped = weight_EOI.unflatten(2, (-1, 16))
        levels = grid.nearest(grouped / scales[..., None] + zeros[..., None]) - zeros[..., None]
        mine = (levels * scales[..., None] - grouped).square().sum()
        theirs = (turned.nearest(grouped / found[..., None]) * found[..., None] - grouped).square().sum()
        errors.append(float(mine / theirs))
    assert max(errors) < 1
    assert min(errors) < 0.75


@pytest.mark.parametrize("number", [0.0, 0.3, -2.0])
def test_a_constant_group_is_exact(number: float) -> None:
    grid, weight_EOI = Grid.of(scheme_of()), torch.full((1, 3, 16), number)
    scales, zeros = search_with_zero(weight_EOI, torch.ones(1, 16), grid, 16, torch.float32)
    levels = grid.nearest(weight_EOI / scales + zeros) - zeros
    torch.testing.assert_close(levels * scales, weight_EOI, rtol=1e-6, atol=0)


def test_chunks_do_not_change_what_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    weight_EOI, hessian_EII = problem(3)
    given_all = (weight_EOI, hessian_EII.diagonal(dim1=1, dim2=2), Grid.of(scheme_of()), 16, torch.bfloat16)
    whole = search_with_zero(*given_all)
    monkeypatch.setattr("moepress.compress.gptq.zero_points.CHUNK_ELEMENTS", 96 * 7)
    assert all(map(torch.equal, whole, search_with_zero(*given_all)))


@pytest.mark.parametrize("loops", ["native", "torch"])
@settings(deadline=None, max_examples=20)
@given(
    seed=st.integers(0, 2**20),
    bits=st.sampled_from([2, 3, 4, 8]),
    group_size=st.sampled_from([16, 48, -1]),
    refits=st.integers(0, 2),
    dtype=st.sampled_from(DTYPES),
)
def test_the_loss_is_that_of_the_weights_and_below_that_of_rounding(
    loops: str, seed: int, bits: int, group_size: int, refits: int, dtype: torch.dtype
) -> None:
    weight_EOI, hessian_EII = problem(seed)
    scheme, options = scheme_of(bits, group_size), SolverOptions(refits=refits)
    with pytest.MonkeyPatch.context() as patch:
        if loops == "torch":
            patch.setattr(native, "library", lambda: None)
        solved = solve(weight_EOI, hessian_EII, scheme, scale_dtype=dtype, options=options)
    assert solved.zeros is not None
    assert solved.zeros.dtype == torch.int16
    assert int(solved.zeros.min()) > scheme.code_min
    assert int(solved.zeros.max()) <= scheme.code_max
    assert bool((solved.scales > 0).all())
    assert torch.equal(solved.scales.to(dtype).float(), solved.scales)
    expected = loss_of(weight_EOI, dense(solved), hessian_EII)
    torch.testing.assert_close(solved.loss, expected, rtol=2e-3, atol=1e-9)
    energy = loss_of(weight_EOI, torch.zeros_like(weight_EOI).double(), hessian_EII)
    torch.testing.assert_close(solved.energy, energy, rtol=1e-4, atol=0)
    importance_EI = hessian_EII.diagonal(dim1=1, dim2=2)
    group = scheme.columns_per_group(96)
    scales, zeros = search_with_zero(weight_EOI, importance_EI, Grid.of(scheme), group, dtype)
    grouped = weight_EOI.unflatten(2, (-1, group))
    nearest = Grid.of(scheme).nearest(grouped / scales[..., None] + zeros[..., None]) - zeros[..., None]
    rounded = loss_of(weight_EOI, (nearest * scales[..., None]).flatten(2).double(), hessian_EII)
    assert bool((solved.loss <= rounded * (1 + 1e-4) + 1e-12).all())


@pytest.mark.skipif(native.library() is None, reason=f"no native loops: {native.status()}")
@pytest.mark.parametrize("refits", [0, 2])
def test_native_loops_and_torch_come_to_the_same(refits: int) -> None:
    weight_EOI, hessian_EII = problem(5, rows=200)
    grid, options = Grid.of(scheme_of()), SolverOptions(scale_search=False, sweeps=6, refits=refits)
    scales, zeros = search_with_zero(weight_EOI, torch.ones(2, 96), grid, 16, torch.bfloat16)
    task = Task(grid=grid, group=16, dtype=torch.bfloat16, options=options, zeros=zeros)
    mine, theirs = (solver(weight_EOI, hessian_EII, scales, task) for solver in (cpu.solve_all, solve_batch))
    assert float((mine.codes == theirs.codes).float().mean()) > 0.98
    assert float((mine.scales == theirs.scales).float().mean()) > 0.98
    torch.testing.assert_close(mine.loss, theirs.loss, rtol=0.01, atol=0)


def test_weights_on_one_side_lose_much_less_than_with_symmetric_codes() -> None:
    weight_EOI, hessian_EII = problem(7)
    shifted = weight_EOI + 0.15
    losses = [
        float(solve(shifted, hessian_EII, scheme, scale_dtype=torch.bfloat16).loss.sum())
        for scheme in (Scheme(bits=4, group_size=16), scheme_of())
    ]
    assert losses[1] < 0.6 * losses[0]


def test_an_expert_without_tokens_is_rounded_around_its_zero_points() -> None:
    weight_EOI, hessian_EII = problem(9)
    hessian_EII[1] = 0
    solved = solve(weight_EOI, hessian_EII, scheme_of(), scale_dtype=torch.bfloat16)
    assert solved.rounded.tolist() == [False, True]
    half_step = solved.scales[1].repeat_interleave(16, dim=1) * 0.5
    clipped = torch.isin(solved.codes[1], torch.tensor([-8, 7]))
    assert bool((((dense(solved)[1] - weight_EOI[1]).abs() <= half_step * 1.001) | clipped).all())


def test_levels_less_zero_points_go_by_groups() -> None:
    levels, zeros = torch.arange(8.0).view(1, 8), torch.tensor([[1.0, -2.0]])
    assert above_zero(levels, zeros).tolist() == [[-1.0, 0.0, 1.0, 2.0, 6.0, 7.0, 8.0, 9.0]]
    assert above_zero(levels, None) is levels
