"""Rounding with a factor on both sides: codes Q that make tr(B (W - Q) H (W - Q)^T) small.

H [I, I] is the Hessian of the inputs, as everywhere; the side B [O, O] says what errors of two output rows cost
together. With B = 1 rows are independent, and this is what the solver minimises.
"""

from collections.abc import Sequence

from torch import Tensor

Side = tuple[Tensor, ...]
"""B of a matrix: fp32 [R, R] blocks down its diagonal, each positive definite, whose sizes add up to O."""
Sides = Sequence[Side | None] | None
"""Of each matrix of a batch, None where B is 1; or None where it is 1 for all."""
