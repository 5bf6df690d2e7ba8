"""How the solver works: what it is asked for, and plain GPTQ to hold it against."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class SolverOptions:
    """How to solve; the defaults are what measured best at about three times the time of plain GPTQ.

    Attributes:
        damp: share of mean(diag H) added to the diagonal; times 10 on each failed Cholesky. Measured on new text, 0.03
            is never worse than 0.01; with about one token per column and no pooled H mixed in, 0.1 is better still.
        act_order: columns in order of decreasing diag H instead of their own order.
        block: columns between two lazy updates.
        scale_search: grid search weighted by diag H instead of absmax scales.
        refit_scales: let the descent move the scales too.
        sweeps: coordinate-descent sweeps after GPTQ; 0 leaves plain GPTQ.
    """

    damp: float = 0.03
    act_order: bool = True
    block: int = 128
    scale_search: bool = True
    refit_scales: bool = True
    sweeps: int = 3

    def __post_init__(self) -> None:
        if not 0 < self.damp < 1 or self.block < 1 or self.sweeps < 0:
            raise ValueError(f"{self}: need 0 < damp < 1, block >= 1 and sweeps >= 0.")


PLAIN = SolverOptions(damp=0.01, act_order=False, scale_search=False, refit_scales=False, sweeps=0)
"""GPTQ as in the paper, with absmax scales fixed beforehand."""
