"""Solves with the Triton kernels and with the torch loops that they stand for: `python fused_solves.py` compares them.

Prints a line of JSON for each: how many codes, scales and losses differ. A program of its own, since Triton decides
when it is imported whether it interprets (TRITON_INTERPRET=1, where there is no GPU).
"""

import json
import sys
import time
from dataclasses import dataclass, replace
from unittest.mock import patch

import torch
from torch import Tensor

from moepress.compress.gptq import batch, columns, descent, fused
from moepress.compress.gptq.batch import Found, solve_batch
from moepress.compress.gptq.columns import FUSED_LOOPS, PLAIN_LOOPS, Loops
from moepress.compress.gptq.grid import storable_scales
from moepress.compress.gptq.levels import DEFAULT_SEARCH, Grid, SearchPlan
from moepress.compress.gptq.options import SolverOptions, Task

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
INTEGERS = {bits: Grid(levels=tuple(map(float, range(-(2 ** (bits - 1)), 2 ** (bits - 1))))) for bits in (2, 3, 4, 8)}
TABLE = Grid(levels=(-6.0, -4.0, -3.0, -2.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0))  # FP4
EITHER = replace(INTEGERS[4], either_sign=True)
IN_TORCH = replace(
    FUSED_LOOPS,
    round_columns=columns.round_columns,
    improve_columns=columns.improve_columns,
    search_scales=PLAIN_LOOPS.search_scales,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A problem; `group` -1 is one group a row, and `launch` how many columns one launch takes."""

    grid: Grid
    group: int
    columns: int
    rows: int = 20
    experts: int = 1
    sweeps: int | None = 2
    refits: int = 1
    dtype: torch.dtype = torch.bfloat16
    launch: int = fused.COLUMNS


EXACT = {
    "2 bits": Case(grid=INTEGERS[2], group=16, columns=16),
    "3 bits": Case(grid=INTEGERS[3], group=32, columns=32),
    "4 bits, a group a row": Case(grid=INTEGERS[4], group=-1, columns=24),
    "8 bits, float16 scales": Case(grid=INTEGERS[8], group=16, columns=16, dtype=torch.float16),
    "a table": Case(grid=TABLE, group=8, columns=16, experts=2, rows=5),
    "scales of either sign": Case(grid=EITHER, group=8, columns=16, sweeps=None),
    "wider than a launch, three rows": Case(grid=INTEGERS[4], group=20, columns=40, rows=3, launch=16),
    "more rows than a program": Case(grid=INTEGERS[3], group=8, columns=16, rows=fused._INTERPRETED_ROWS + 3),
}
"""Solved with sums that are exact, whatever their order: all bits must agree."""
USUAL = {
    "4 bits, usual numbers": Case(grid=INTEGERS[4], group=16, columns=32),
    "a table, usual numbers": Case(grid=TABLE, group=16, columns=16),
}
"""Gaussian numbers and a search of scales: a code may differ where a last bit decides."""


def exact_hessian(experts: int, columns: int) -> Tensor:
    """H [E, I, I] whose damped factor (damp 1/8, a ridge of 1/2) has few bits: H + 1/2 = U D U^T in order of solving.

    Both rows of a pair in U take from the same columns, none in the first two pairs, two in the next I / 8 and four in
    the others, by +-1; D is 1, and 9 in the last two, where no other row takes from it. So the mean of diag H is 4,
    diagonals ascend, and every row of H + 1/2 has an odd sum.
    """
    generator = torch.Generator().manual_seed(columns)
    unit_EII = torch.eye(columns).repeat(experts, 1, 1)
    for unit_II in unit_EII:
        for pair in range(4, columns, 2):
            count = 2 if pair < 4 + columns // 4 else 4
            taken = torch.randperm(min(pair, columns - 2), generator=generator)[:count]
            unit_II[pair : pair + 2, taken] = torch.randint(0, 2, (2, count), generator=generator).float() * 2 - 1
    square_I = torch.ones(columns)
    square_I[-2:] = 9
    damped_EII = (unit_EII * square_I) @ unit_EII.mT
    # In the order of solving diagonals ascend, and columns of equal diagonals go backwards: dealt out at random.
    kinds_I = damped_EII[0].diagonal()[torch.randperm(columns, generator=generator)]
    own_I = kinds_I.argsort(descending=True, stable=True).flip(0).argsort()
    return damped_EII[:, own_I][:, :, own_I] - torch.eye(columns) / 2


def exact_problem(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """Weights, Hessians and scales [E, O, G].

    Weights are odd multiples of 2^-12 and scales even ones of 2^-11, so that slopes are odd multiples of 2^-12 and no
    step of the descent is a tie, which a last bit of a quotient would settle.
    """
    generator = torch.Generator().manual_seed(case.rows)
    shape = case.experts, case.rows, case.columns
    half = int(case.grid.high * 0.4 * 2048)
    weight_EOI = (2 * torch.randint(-half, half, shape, generator=generator) + 1).float() / 4096
    groups = 1 if case.group == -1 else case.columns // case.group
    scales_EOG = torch.randint(320, 512, (case.experts, case.rows, groups), generator=generator) / 1024
    if case.grid.either_sign:
        scales_EOG *= 2 * torch.randint(0, 2, scales_EOG.shape, generator=generator) - 1
    scales_EOG = storable_scales(scales_EOG, case.dtype, either_sign=True)
    return weight_EOI, exact_hessian(case.experts, case.columns), scales_EOG


def usual_problem(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """Gaussian weights, and Hessians of correlated inputs."""
    generator = torch.Generator().manual_seed(case.columns)
    weight_EOI = torch.randn(case.experts, case.rows, case.columns, generator=generator) * 0.05
    inputs_ETI = torch.randn(case.experts, 200, case.columns, generator=generator).cumsum(dim=2)
    return weight_EOI, inputs_ETI.mT @ inputs_ETI, weight_EOI[:, :, :1]


def solved(case: Case, loops: Loops, *, exact: bool) -> Found:
    """A case by these loops; with exact sums no scale is searched, for squares have too many bits."""
    weight_EOI, hessian_EII, scales_EOG = exact_problem(case) if exact else usual_problem(case)
    options = SolverOptions(sweeps=case.sweeps, refits=case.refits)
    if exact:
        options = replace(options, damp=0.125, scale_search=False)
    group = case.columns if case.group == -1 else case.group
    task = Task(grid=case.grid, group=group, dtype=case.dtype, options=options)
    loops = replace(loops, columns=case.launch)
    with patch.object(batch, "inner_loops", lambda _: loops), patch.object(descent, "inner_loops", lambda _: loops):
        return solve_batch(weight_EOI.to(DEVICE), hessian_EII.to(DEVICE), scales_EOG.to(DEVICE), task)


def compared(case: Case, *, exact: bool) -> dict[str, float]:
    """How much differs between the kernels and torch, and between both and what GPTQ alone gives."""
    began = time.process_time()
    mine = solved(case, FUSED_LOOPS, exact=exact)
    seconds = time.process_time() - began
    theirs = solved(case, IN_TORCH, exact=exact)
    alone = solved(replace(case, sweeps=0), IN_TORCH, exact=exact)
    return {
        "codes": float((mine.codes != theirs.codes).double().mean()),
        "scales": float((mine.scales != theirs.scales).double().mean()),
        "loss": float(((mine.loss - theirs.loss) / theirs.energy).abs().max()),
        "moved": float((theirs.codes != alone.codes).double().mean()),
        "damped": float((mine.damping > 0).double().mean()),
        "seconds": seconds,
    }


def searched(grid: Grid, group: int, columns: int, dtype: torch.dtype) -> dict[str, float]:
    """How many scales differ, of weights whose squares have few bits."""
    generator = torch.Generator().manual_seed(group)
    weight_EIO = torch.randint(-7, 8, (2, columns, 9), generator=generator).float().to(DEVICE)
    weight_EIO[0, :group, 0] = 0
    importance_EI = torch.randint(0, 3, (2, columns), generator=generator).float().to(DEVICE)
    importance_EI[:, ::group] = 2
    importance_EI[1, :group] = 0
    plan = DEFAULT_SEARCH if dtype == torch.bfloat16 else SearchPlan(factors=(1.0, 0.75, 0.5), halvings=2)
    given = (weight_EIO, importance_EI, grid, group, dtype, plan)
    mine, theirs = FUSED_LOOPS.search_scales(*given), PLAIN_LOOPS.search_scales(*given)
    clipped = theirs != storable_scales(weight_EIO.unflatten(1, (-1, group)).abs().amax(dim=2) / grid.high, dtype)
    return {"scales": float((mine != theirs).double().mean()), "clipped": float(clipped.double().mean())}


SEARCHES = {
    "2 bits": (INTEGERS[2], 16, 16, torch.bfloat16),
    "3 bits, more columns than are held at a time": (INTEGERS[3], 96, 96, torch.bfloat16),
    "8 bits, float16": (INTEGERS[8], 8, 16, torch.float16),
    "a table": (TABLE, 16, 16, torch.bfloat16),
    "either sign": (EITHER, 8, 16, torch.bfloat16),
}


def main() -> None:
    """Compare everything, or what is named."""
    wanted = set(sys.argv[1:])
    for kind, cases in (("exact", EXACT), ("usual", USUAL)):
        for name, case in cases.items():
            if not wanted or name in wanted:
                print(json.dumps({"kind": kind, "name": name, **compared(case, exact=kind == "exact")}), flush=True)
    for name, search in SEARCHES.items():
        if not wanted or f"scales, {name}" in wanted:
            print(json.dumps({"kind": "search", "name": f"scales, {name}", **searched(*search)}), flush=True)
    with patch.object(fused, "available", lambda _: True):
        found = columns.inner_loops(DEVICE) is FUSED_LOOPS
    print(json.dumps({"kind": "agreement", "name": str(DEVICE.type), "agrees": found}), flush=True)


if __name__ == "__main__":
    main()
