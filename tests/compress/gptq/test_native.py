"""The native loops against torch: bit for bit where sums are exact, the same loss where they are not."""

import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moepress.compress.gptq import cholesky, cpu, native
from moepress.compress.gptq.batch import solve_batch
from moepress.compress.gptq.descent import quadratic
from moepress.compress.gptq.grid import absmax_scales, search_scales_on, storable_scales
from moepress.compress.gptq.levels import DEFAULT_SEARCH, Grid
from moepress.compress.gptq.options import SolverOptions, Task
from moepress.converters.safetensors.scheme import Scheme

needs_native = pytest.mark.skipif(native.library() is None, reason=f"no native loops: {native.status()}")
INT3, INT4 = (Grid.of(Scheme(bits=bits, group_size=16)) for bits in (3, 4))
FP4 = Grid(levels=(-6.0, -4.0, -3.0, -2.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0))
EITHER = dataclasses.replace(INT4, either_sign=True)
GRIDS = {"int3": INT3, "int4": INT4, "fp4": FP4, "int4 of either sign": EITHER}


def exact_problem(seed: int, experts: int, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights and Hessians with which no sum of the solver is ever rounded, so that the order of sums changes nothing.

    Backwards, H + 2 = L L^T for a sparse L of whole numbers with 2 on its diagonal. The diagonal of H is 2 and 6 in
    turn, so its mean is 4 and a damping of 0.5 adds those 2; with it, the diagonal has powers of two alone.
    """
    generator = torch.Generator().manual_seed(seed)
    weight_EOI = torch.randint(-64, 65, (experts, rows, columns), generator=generator).float() / 64
    lower = torch.zeros(experts, columns, columns)
    for row in range(1, columns, 2):
        count, size = (4, 1.0) if row >= 8 else (1, 2.0)
        for e in range(experts):
            before = torch.randperm(min(row, 16), generator=generator)[:count]
            signs = torch.randint(0, 2, (count,), generator=generator) * 2.0 - 1
            lower[e, row, row - 1 - before] = signs * size
    lower.diagonal(dim1=1, dim2=2).fill_(2.0)
    return weight_EOI, (lower @ lower.mT).flip(1, 2) - 2 * torch.eye(columns)


def random_problem(seed: int, experts: int, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight_EOI = torch.randn(experts, rows, columns, generator=generator) * 0.05
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5
    inputs = (torch.randn(experts, 300, columns, generator=generator) @ mixing) * torch.randn(columns).exp()
    return weight_EOI, inputs.mT @ inputs / 300


def task_of(grid: Grid, columns: int, group: int, **options: object) -> Task:
    return Task(
        grid=grid,
        group=columns if group == -1 else group,
        dtype=torch.bfloat16,
        options=SolverOptions(**options),  # type: ignore[arg-type]
    )


def absmax(weight_EOI: torch.Tensor, task: Task) -> torch.Tensor:
    """Powers of two: scales that no product rounds."""
    found = absmax_scales(weight_EOI, Scheme(bits=4, group_size=task.group), scale_dtype=task.dtype)
    return torch.exp2(found.log2().round())


@needs_native
@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("group", [16, 48, -1])
@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize(("sweeps", "annealed"), [(0, 0), (3, 0), (3, 7)])
def test_codes_are_those_of_torch_where_sums_are_exact(
    name: str, group: int, rows: int, sweeps: int, annealed: int
) -> None:
    steps = {"sweeps": sweeps, "annealed": annealed, "refits": 0}
    task = task_of(GRIDS[name], 96, group, act_order=False, scale_search=False, damp=0.5, **steps)
    weight_EOI, hessian_EII = exact_problem(group + rows, 2, rows, 96)
    scales_EOG = absmax(weight_EOI, task)
    mine, theirs = (solver(weight_EOI, hessian_EII, scales_EOG, task) for solver in (cpu.solve_all, solve_batch))
    assert torch.equal(mine.codes, theirs.codes)
    assert torch.equal(mine.scales, theirs.scales)


@needs_native
@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn, torch.float8_e8m0fnu]
)
@pytest.mark.parametrize("rows", [1, 31, 64])
def test_searched_scales_are_those_of_torch(name: str, dtype: torch.dtype, rows: int) -> None:
    weight_EOI, _ = exact_problem(rows, 1, rows, 64)
    importance_EI = torch.ones(1, 64)
    wanted = search_scales_on(weight_EOI, importance_EI, GRIDS[name], 32, dtype)
    found_GO = torch.empty(2, rows)
    turned_IO = weight_EOI[0].T.contiguous()
    native.search_scales(turned_IO, importance_EI[0], GRIDS[name], DEFAULT_SEARCH, 32, dtype, found_GO)

    def error(scales_OG: torch.Tensor) -> torch.Tensor:
        grouped = weight_EOI[0].view(rows, 2, 32).double()
        levels = GRIDS[name].nearest((grouped / scales_OG[..., None]).float()).double()
        return (levels * scales_OG[..., None] - grouped).square().sum(-1)

    torch.testing.assert_close(error(found_GO.T), error(wanted[0]), rtol=1e-5, atol=1e-9)
    assert (wanted[0] != found_GO.T).float().mean() <= 0.1  # two shares that serve equally well
    assert torch.equal(storable_scales(found_GO, dtype, either_sign=True), found_GO)
    if GRIDS[name].either_sign:
        assert bool((found_GO < 0).any()) or rows == 1
    else:
        assert bool((found_GO > 0).all())


@needs_native
@settings(deadline=None, max_examples=20)
@given(
    seed=st.integers(0, 2**20),
    name=st.sampled_from(sorted(GRIDS)),
    group=st.sampled_from([16, 32, -1]),
    rows=st.sampled_from([1, 33, 200]),
    refits=st.integers(0, 2),
    annealed=st.sampled_from([0, 10]),
)
def test_the_loss_is_that_of_the_codes_and_near_that_of_torch(
    seed: int, name: str, group: int, rows: int, refits: int, annealed: int
) -> None:
    task = task_of(GRIDS[name], 96, group, sweeps=4, refits=refits, annealed=annealed)
    weight_EOI, hessian_EII = random_problem(seed, 2, rows, 96)
    scales_EOG = absmax(weight_EOI, task)
    mine, theirs = (solver(weight_EOI, hessian_EII, scales_EOG, task) for solver in (cpu.solve_all, solve_batch))
    levels = task.grid.values(mine.codes).view(*mine.scales.shape, -1)
    rest_EIO = (weight_EOI - (levels * mine.scales[..., None]).view(weight_EOI.shape)).mT.double()
    torch.testing.assert_close(mine.loss, quadratic(rest_EIO, hessian_EII.double()).sum(1), rtol=1e-3, atol=1e-7)
    torch.testing.assert_close(mine.energy, theirs.energy, rtol=1e-4, atol=0)
    torch.testing.assert_close(mine.loss, theirs.loss, rtol=0.1, atol=1e-7)


@needs_native
@pytest.mark.parametrize("columns", [512, 640, 1000])
def test_the_factor_is_that_of_lapack(columns: int) -> None:
    inputs = torch.randn(2 * columns, columns, generator=torch.Generator().manual_seed(columns))
    matrix = inputs.T @ inputs / columns + 0.1 * torch.eye(columns)
    found = matrix.clone()
    assert cholesky.factor_in_place(found, torch.empty(columns // 64 + 1, 64, 64))
    wanted = torch.linalg.cholesky(matrix.double())
    torch.testing.assert_close(found.tril().double(), wanted, rtol=0, atol=1e-5)
    matrix[columns // 2, columns // 2] = -1.0
    assert not cholesky.factor_in_place(matrix, torch.empty(columns // 64 + 1, 64, 64))


@needs_native
def test_rows_that_share_the_threads_are_solved_as_those_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    task = task_of(INT4, 64, 16, annealed=5)
    weight_EOI, hessian_EII = random_problem(3, 3, 1000, 64)
    monkeypatch.setattr(cpu, "row_blocks", lambda rows, _: [slice(a, min(a + 128, rows)) for a in range(0, rows, 128)])
    before = torch.get_num_threads()
    found = []
    for threads in (1, 2, 4):  # three matrices: each alone, two and one shared, all shared
        torch.set_num_threads(threads)
        try:
            found.append(cpu.solve_all(weight_EOI, hessian_EII, absmax(weight_EOI, task), task))
        finally:
            torch.set_num_threads(before)
    for other in found[1:]:
        assert torch.equal(other.codes, found[0].codes)
        assert torch.equal(other.scales, found[0].scales)


def test_grids_say_what_codes_stand_for() -> None:
    for grid in GRIDS.values():
        levels = torch.tensor(grid.levels)
        assert torch.equal(grid.values(grid.codes(levels)), levels)
        assert torch.equal(grid.nearest(levels + 0.1), levels)
        assert torch.equal(grid.nearest(torch.tensor([-99.0, 99.0])), levels[[0, -1]])
        up = torch.tensor([True]).expand_as(levels)
        assert torch.equal(grid.beside(levels, up), levels[[*range(1, len(levels)), -1]])
        assert torch.equal(grid.beside(levels, ~up), levels[[0, *range(len(levels) - 1)]])
    assert (INT4.integers, FP4.integers) == (True, False)
    assert FP4.codes(torch.tensor([-6.0, 6.0])).tolist() == [0, 14]
    assert INT4.codes(torch.tensor([-8.0, 7.0])).tolist() == [-8, 7]


@needs_native
@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_every_build_that_this_processor_can_run_gives_the_same_codes(capability: str) -> None:
    code = (
        "import torch\n"
        "from moepress.compress.gptq import native\n"
        "from moepress.compress.gptq.solver import solve\n"
        "from moepress.converters.safetensors.scheme import Scheme\n"
        "g = torch.Generator().manual_seed(0)\n"
        "w, x = torch.randn(2, 40, 64, generator=g), torch.randn(2, 200, 64, generator=g)\n"
        "r = solve(w, x.mT @ x, Scheme(bits=4, group_size=16), scale_dtype=torch.bfloat16)\n"
        "print(native.status(), int(r.codes.long().sum()), f'{float(r.loss.sum()):.3g}')\n"
    )
    said = []
    for asked in (capability, None):
        environment = {**os.environ, **({"ATEN_CPU_CAPABILITY": asked} if asked else {})}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        said.append(done.stdout.split())
    assert said[0][0] == ("base" if capability == "default" else said[0][0])
    assert said[0][2] == said[1][2]


def test_a_library_of_another_version_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(native.__file__).parent
    monkeypatch.setattr(native, "__file__", str(tmp_path / "native.py"))
    native._open.cache_clear()
    try:
        assert native._open() == (None, "not built: no compiler when moepress was installed")
        (tmp_path / "_loops_base.native").write_bytes(b"no library")
        native._open.cache_clear()
        assert native._open()[0] is None
        assert "does not load" in native._open()[1]
        built = sorted(folder.glob("_loops_base.native"))
        if built:
            shutil.copy(built[0], tmp_path / "_loops_base.native")
            monkeypatch.setattr(native, "VERSION", native.VERSION + 1)
            native._open.cache_clear()
            assert "install moepress again" in native._open()[1]
        monkeypatch.setenv("MOEPRESS_NATIVE", "0")
        native._open.cache_clear()
        assert native._open() == (None, "not used, since MOEPRESS_NATIVE is 0")
    finally:
        monkeypatch.undo()
        native._open.cache_clear()
