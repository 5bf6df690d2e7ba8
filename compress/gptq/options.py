"""How the solver works: what it is asked for, and plain GPTQ to hold it against."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from moepress.compress.gptq.levels import DEFAULT_SEARCH, Grid, SearchPlan


@dataclass(frozen=True, slots=True, kw_only=True)
class SolverOptions:
    """How to solve; the defaults are what measured best for their time (docs/benchmarks.md).

    Attributes:
        damp: share of mean(diag H) added to the diagonal; times 10 on each failed Cholesky. Measured on new text, 0.03
            is never worse than 0.01; with about one token per column and no pooled H mixed in, 0.1 is better still.
        act_order: columns in order of decreasing diag H instead of their own order.
        scale_search: grid search weighted by diag H instead of absmax scales.
        sweeps: coordinate descent after GPTQ, so many sweeps over the codes of a row at most; a row ends earlier when
            none of its codes changes. 0 leaves plain GPTQ. None for as many as pay: a sweep of a native loop costs next
            to nothing, one in torch alone as much as all of GPTQ, and a GPU makes a product of each
            (`columns.Loops.sweeps`).
        refits: rounds of the descent in which every scale goes to its least-squares value and the codes follow.
        annealed: sweeps in which codes may also move where that raises the loss a little (`annealing`), between the
            descent and the refits. With native loops each costs as much as a search of scales; in torch, where it costs
            as much as all of GPTQ, there are `TORCH_ANNEALED` at most. 0 for none, and none where there are no sweeps.
        signed: scales of integer codes may be negative, which puts the code that the symmetric integers have more on
            one side where the largest weight of a group is.
        row_sweeps: at most so many sweeps over rows, where there are sides (`two_sided`).
    """

    damp: float = 0.03
    act_order: bool = True
    scale_search: bool = True
    sweeps: int | None = None
    refits: int = 1
    annealed: int = 0
    signed: bool = True
    row_sweeps: int = 2

    def __post_init__(self) -> None:
        counts = (self.sweeps or 0, self.refits, self.annealed, self.row_sweeps)
        if not 0 < self.damp < 1 or min(counts) < 0:
            raise ValueError(f"{self}: need 0 < damp < 1, and sweeps, refits, annealed and row_sweeps >= 0.")


MANY_SWEEPS = 20
"""In which nearly every row comes to rest."""
TORCH_ANNEALED = 10
"""Annealed sweeps at most without native loops."""
PLAIN = SolverOptions(damp=0.01, act_order=False, scale_search=False, sweeps=0, refits=0, signed=False)
"""GPTQ as in the paper, with absmax scales fixed beforehand."""

EFFORTS = {
    "fast": SolverOptions(refits=0),
    "normal": SolverOptions(),
    "high": SolverOptions(refits=2, annealed=80),
    "max": SolverOptions(annealed=40),
}
"""Levels of `--effort`, from least time to least loss; `max` has sides besides (`calibration.ends`), which are solved
twice, so that half of the annealed sweeps is what pays."""


def solver_of(effort: str, *, positive: bool = False) -> SolverOptions:
    """A level of `--effort`, with scales of either sign unless `--positive-scales` asks for those of one."""
    return replace(EFFORTS[effort], signed=not positive)


@dataclass(frozen=True, slots=True, kw_only=True)
class Lattice:
    """Scales that are a number of their block times a small integer, as GGUF's K types have them.

    Attributes:
        step: [..., O, G] fp32, that number for each group; 0 where a group has to keep its scale.
        least, most: the integers.
    """

    step: Tensor
    least: int
    most: int

    def of(self, *place: Any) -> "Lattice":
        """That of some experts, rows or groups."""
        return replace(self, step=self.step[place])

    def nearest(self, scales: Tensor) -> Tensor:
        """Its scale nearest to each; 0 where the step is."""
        safe = torch.where(self.step == 0, torch.ones_like(self.step), self.step)
        return (scales / safe).round().clamp(self.least, self.most) * self.step


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What is the same for all matrices of a call.

    Attributes:
        grid: what codes stand for.
        group: columns that share a scale.
        dtype: what scales are rounded to.
        options: of the solver.
        lattice: of which a refit takes its scales; None for all that `dtype` holds.
        search: which scales are tried.
        zeros: [..., O, G] fp32, the zero points of a grid that has them.
    """

    grid: Grid
    group: int
    dtype: torch.dtype
    options: SolverOptions
    lattice: Lattice | None = None
    search: SearchPlan = DEFAULT_SEARCH
    zeros: Tensor | None = None

    def of(self, *place: Any) -> "Task":
        """That of some experts, rows or groups."""
        if self.lattice is None and self.zeros is None:
            return self
        lattice = None if self.lattice is None else self.lattice.of(*place)
        return replace(self, lattice=lattice, zeros=None if self.zeros is None else self.zeros[place])

    def raised(self, weight: Tensor, scales: Tensor) -> Tensor:
        """Weights [..., O, I] plus what zero points take off, zero * scale [..., O, G]: what bare codes are to meet."""
        if self.zeros is None:
            return weight
        grouped = weight.unflatten(-1, (scales.shape[-1], -1))
        met: Tensor = (grouped + (self.zeros * scales).unsqueeze(-1)).flatten(-2)
        return met

    @property
    def sweeps(self) -> int:
        """With native loops."""
        return MANY_SWEEPS if self.options.sweeps is None else self.options.sweeps
