"""Rounding by both sides: their loss, what it may depend on, and all kinds of codes; native loops and torch."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from moepress.compress.gptq import native
from moepress.compress.gptq.block_solver import solve_blocks
from moepress.compress.gptq.levels import Grid
from moepress.compress.gptq.options import SolverOptions
from moepress.compress.gptq.solver import Solved, solve
from moepress.compress.gptq.two_sided import Side, Sides
from moepress.converters.safetensors.scheme import Codes, Scheme
from moepress.models.storage.block_types import TYPES

SCHEME = Scheme(bits=3, group_size=32)
needs_native = pytest.mark.skipif(native.library() is None, reason=f"no native loops: {native.status()}")


@pytest.fixture(params=["native", "torch"])
def loops(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "torch":
        monkeypatch.setattr(native, "library", lambda: None)
    elif native.library() is None:
        pytest.skip(f"no native loops: {native.status()}")
    return str(request.param)


def correlated(size: int, generator: torch.Generator) -> Tensor:
    """Positive, with a mean diagonal of 1."""
    few = torch.randn(4 * size, size // 4, generator=generator) @ torch.randn(size // 4, size, generator=generator)
    mixed = few / (size // 4) ** 0.5 + 0.3 * torch.randn(4 * size, size, generator=generator)
    mixed *= (0.5 * torch.randn(size, generator=generator)).exp()
    found = mixed.T @ mixed
    return found * (size / float(found.trace()))


def problem(
    experts: int = 1, rows: int = 40, columns: int = 64, seed: int = 0
) -> tuple[Tensor, Tensor, list[Side | None]]:
    """Weights, Hessians, and sides of one block each."""
    generator = torch.Generator().manual_seed(seed)
    weight_EOI = torch.randn(experts, rows, columns, generator=generator) * 0.05
    hessian_EII = torch.stack([correlated(columns, generator) for _ in range(experts)])
    sides = [(correlated(rows, generator) + 0.3 * torch.eye(rows),) for _ in range(experts)]
    return weight_EOI, hessian_EII, list(sides)


def solved(
    weight_EOI: Tensor, hessian_EII: Tensor, sides: Sides, scheme: Scheme = SCHEME, **options: int | float
) -> Solved:
    given = SolverOptions(**options)  # type: ignore[arg-type]
    return solve(weight_EOI, hessian_EII, scheme, scale_dtype=torch.bfloat16, options=given, sides=sides)


def dense(found: Solved, scheme: Scheme = SCHEME) -> Tensor:
    """What codes stand for, [E, O, I]."""
    levels = Grid.of(scheme).values(found.codes).unflatten(-1, (found.scales.shape[-1], -1))
    if found.zeros is not None:
        levels = levels - found.zeros[..., None]
    scales = found.scales if found.divisor is None else found.scales / found.divisor[:, None, None]
    values: Tensor = (levels * scales[..., None]).flatten(-2)
    return values


def loss(residual_EOI: Tensor, hessian_EII: Tensor, sides: Sequence[Side | None], damping_E: Tensor) -> Tensor:
    """tr(B R H R^T) of each matrix with the damped H, fp64."""
    found = []
    for residual, hessian, side, share in zip(
        residual_EOI.double(), hessian_EII.double(), sides, damping_E, strict=True
    ):
        damped = hessian + share * hessian.diagonal().mean() * torch.eye(len(hessian))
        side_OO = torch.eye(len(residual)) if side is None else torch.block_diag(*side)
        found.append(((side_OO.double() @ residual) * (residual @ damped)).sum())
    return torch.stack(found)


def both_losses(
    weight_EOI: Tensor, hessian_EII: Tensor, sides: list[Side | None], scheme: Scheme = SCHEME
) -> tuple[Tensor, Tensor]:
    """With sides, and without."""
    found = [solved(weight_EOI, hessian_EII, given, scheme) for given in (sides, None)]
    mine, plain = (loss(weight_EOI - dense(one, scheme), hessian_EII, sides, one.damping) for one in found)
    return mine, plain


def test_the_loss_of_both_sides_falls(loops: str) -> None:
    mine, plain = both_losses(*problem(experts=2))
    assert bool((mine < 0.8 * plain).all())


def test_no_code_lowers_it_when_rows_have_come_to_rest(loops: str) -> None:
    weight_EOI, hessian_EII, sides = problem()
    found = solved(weight_EOI, hessian_EII, sides, row_sweeps=60, sweeps=20)

    def reached() -> float:
        return float(loss(weight_EOI - dense(found), hessian_EII, sides, found.damping))

    best = reached()
    for row, column in ((0, 0), (7, 30), (39, 63), (20, 5)):
        before = int(found.codes[0, row, column])
        for step in (-1, 1):
            if SCHEME.code_min <= before + step <= SCHEME.code_max:
                found.codes[0, row, column] = before + step
                assert reached() > best * (1 - 1e-5)
        found.codes[0, row, column] = before


def test_figures_are_those_of_one_side(loops: str) -> None:
    weight_EOI, hessian_EII, sides = problem(experts=2)
    found, plain = (solved(weight_EOI, hessian_EII, given) for given in (sides, None))
    none = torch.zeros(2)
    wanted = loss(weight_EOI - dense(found), hessian_EII, [None, None], none)
    torch.testing.assert_close(found.loss, wanted, rtol=1e-4, atol=0)
    torch.testing.assert_close(found.energy, plain.energy)
    assert torch.equal(found.damping, plain.damping)
    assert bool((found.loss > plain.loss).all())  # another loss has been lowered


def test_independent_rows_are_solved_as_without_sides(loops: str) -> None:
    weight_EOI, hessian_EII, _ = problem()
    found, plain = (solved(weight_EOI, hessian_EII, given, sweeps=20) for given in ([(torch.eye(40),)], None))
    assert (found.codes != plain.codes).float().mean() < 0.01  # a sum in another order may tip one
    torch.testing.assert_close(found.loss, plain.loss, rtol=2e-3, atol=0)


def test_matrices_without_a_side_or_a_hessian_stay_as_they_are(loops: str) -> None:
    weight_EOI, hessian_EII, sides = problem(experts=3)
    hessian_EII[1] = 0
    sides[2] = None
    found, plain = (solved(weight_EOI, hessian_EII, given) for given in (sides, None))
    assert found.rounded.tolist() == [False, True, False]
    for name in ("codes", "scales", "loss"):
        mine, theirs = getattr(found, name), getattr(plain, name)
        assert torch.equal(mine[1:], theirs[1:])
        assert not torch.equal(mine[0], theirs[0])


def test_blocks_of_a_side_are_solved_as_matrices_of_their_own(loops: str) -> None:
    weight_EOI, hessian_EII, _ = problem(rows=60)
    first, second = (problem(rows=rows, seed=rows)[2] for rows in (24, 36))
    assert first[0] is not None
    assert second[0] is not None
    whole = solved(weight_EOI, hessian_EII, [(*first[0], *second[0])])
    parts = [
        solved(weight_EOI[:, rows], hessian_EII, one) for rows, one in ((slice(24), first), (slice(24, 60), second))
    ]
    for mine, theirs in ((whole.codes, "codes"), (whole.scales, "scales")):
        apart = torch.cat([getattr(part, theirs) for part in parts], dim=1)
        assert (mine != apart).float().mean() < 0.01  # products of other sizes may sum in another order
    torch.testing.assert_close(whole.loss, parts[0].loss + parts[1].loss, rtol=2e-3, atol=0)


def test_native_loops_and_torch_come_to_the_same_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    if native.library() is None:
        pytest.skip(native.status())
    given = problem(experts=2, rows=64)
    mine, _ = both_losses(*given)
    monkeypatch.setattr(native, "library", lambda: None)
    theirs, _ = both_losses(*given)
    torch.testing.assert_close(mine, theirs, rtol=0.04, atol=0)


@needs_native
@pytest.mark.parametrize("rounds", [1, 3])
def test_rows_in_native_loops_are_those_of_one_row_after_the_other(rounds: int) -> None:
    weight_EOI, hessian_EII, sides = problem(rows=24)
    assert sides[0] is not None
    grid, side, hessian = Grid.of(SCHEME, either_sign=True), sides[0][0], hessian_EII[0]
    scales = weight_EOI[0].view(24, 2, 32).abs().amax(dim=2) / 4
    codes = grid.codes(grid.nearest((weight_EOI[0].view(24, 2, 32) / scales[..., None]).flatten(1)))
    ridge = torch.full((64,), 0.03)
    diagonal = hessian.diagonal() + ridge
    share = side / side.diagonal()[:, None]

    def own(codes_OI: Tensor) -> Tensor:
        left = weight_EOI[0].double() - codes_OI.double() * scales.double().repeat_interleave(32, dim=1)
        return left @ (hessian + ridge.diag()).double()

    slope, moved, changed = (
        (share.double() @ own(codes)).float(),
        torch.empty(24, 64),
        torch.empty(24, dtype=torch.bool),
    )
    found = codes.clone()
    native.descend_together(
        hessian, 1 / diagonal, diagonal, ridge, grid, 2, rounds, share, found, scales, slope, moved, changed
    )

    wanted = codes.clone()
    for _ in range(rounds):
        for row in range(24):
            for _sweep in range(2):
                for column in range(64):
                    met = float(share[row].double() @ own(wanted)[:, column]) / float(diagonal[column])
                    level = round(int(wanted[row, column]) + met / float(scales[row, column // 32]))
                    wanted[row, column] = min(max(level, SCHEME.code_min), SCHEME.code_max)
    assert torch.equal(found, wanted)
    assert torch.equal(changed, (found != codes).any(dim=1))
    assert bool(changed.any())
    torch.testing.assert_close(moved, (own(found) - own(codes)).float(), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(slope, (share.double() @ own(found)).float(), rtol=1e-3, atol=1e-4)


@needs_native
@pytest.mark.parametrize(("rows", "columns"), [(40, 64), (300, 96)])
def test_codes_hang_on_neither_threads_nor_batches(rows: int, columns: int) -> None:
    weight_EOI, hessian_EII, sides = problem(experts=4, rows=rows, columns=columns)
    half = rows // 2
    sides[1] = (torch.eye(half) + 0.1, torch.eye(rows - half) + 0.2)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append([solved(weight_EOI, hessian_EII, sides)])
            found.append([solved(weight_EOI[e, None], hessian_EII[e, None], sides[e : e + 1]) for e in range(4)])
    finally:
        torch.set_num_threads(before)
    for name in ("codes", "scales"):
        first, *others = (torch.cat([getattr(part, name) for part in parts]) for parts in found)
        for other in others:
            assert torch.equal(first, other)


@pytest.mark.parametrize(
    "scheme",
    [
        *(Scheme(bits=bits, group_size=32) for bits in (4, 3, 2)),
        Scheme(bits=3, group_size=32, symmetric=False),
        Scheme.of_floats(Codes.NVFP4),
        Scheme.of_floats(Codes.MXFP4),
    ],
    ids=["4 bits", "3 bits", "2 bits", "zero points", "NVFP4", "MXFP4"],
)
def test_no_scheme_gets_worse(scheme: Scheme, loops: str) -> None:
    mine, plain = both_losses(*problem(rows=24), scheme=scheme)
    assert bool((mine < 0.95 * plain).all())


@pytest.mark.parametrize("kind", ["Q4_K", "Q3_K", "Q4_0"])
def test_no_type_of_gguf_gets_worse(kind: str, loops: str) -> None:
    weight_EOI, hessian_EII, sides = problem(rows=16, columns=256)
    found = [solve_blocks(weight_EOI, hessian_EII, TYPES[kind], SolverOptions(), given) for given in (sides, None)]
    mine, plain = (
        loss(weight_EOI - one.matrix(0).dense()[None], hessian_EII, sides, one.solved.damping) for one in found
    )
    assert float(mine) < 0.97 * float(plain)


def test_a_side_that_does_not_fit_is_refused(loops: str) -> None:
    weight_EOI, hessian_EII, sides = problem()
    with pytest.raises(ValueError, match="does not fit a matrix of 40 rows"):
        solved(weight_EOI, hessian_EII, [(torch.eye(20), torch.eye(19))])
    with pytest.raises(ValueError, match="1 matrices and 2 sides"):
        solved(weight_EOI, hessian_EII, [*sides, None])
    with pytest.raises(ValueError, match="not positive definite"):
        solved(weight_EOI, hessian_EII, [(torch.ones(40, 40) - torch.eye(40),)])
