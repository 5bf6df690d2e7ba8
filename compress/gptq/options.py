"""How the solver works: what it is asked for, and plain GPTQ to hold it against."""

from dataclasses import dataclass

import torch

from moepress.compress.gptq.levels import Grid


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
    """

    damp: float = 0.03
    act_order: bool = True
    scale_search: bool = True
    sweeps: int | None = None
    refits: int = 1

    def __post_init__(self) -> None:
        if not 0 < self.damp < 1 or (self.sweeps or 0) < 0 or self.refits < 0:
            raise ValueError(f"{self}: need 0 < damp < 1, sweeps >= 0 and refits >= 0.")


MANY_SWEEPS = 20
"""In which nearly every row comes to rest."""
PLAIN = SolverOptions(damp=0.01, act_order=False, scale_search=False, sweeps=0, refits=0)
"""GPTQ as in the paper, with absmax scales fixed beforehand."""

EFFORTS = {
    "fast": SolverOptions(refits=0),
    "normal": SolverOptions(),
    "high": SolverOptions(refits=4),
}
"""Levels of `--effort`, from least time to least loss."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What is the same for all matrices of a call.

    Attributes:
        grid: what codes stand for.
        group: columns that share a scale.
        dtype: what scales are rounded to.
        options: of the solver.
    """

    grid: Grid
    group: int
    dtype: torch.dtype
    options: SolverOptions

    @property
    def sweeps(self) -> int:
        """With native loops."""
        return MANY_SWEEPS if self.options.sweeps is None else self.options.sweeps
