"""What solving one matrix computes, counted from its shape: for `phases`, estimates and projections alike.

A multiply and an add are two FLOP. Only matrix products and factorisations are counted: what goes over the weights one
by one (scale search, rounding, scales that are rounded to their dtype) is bound by memory, and no share of a matmul's
rate would tell anything about it.
"""

from moepress.compress.gptq.options import SolverOptions

SKETCHED = 32
"""Random directions, at most, by which `cpu` bounds the loss of rounding to nearest."""


def solve_flops(rows: int, columns: int, group: int, options: SolverOptions | None = None) -> dict[str, float]:
    """FLOP of one W [O, I] by phase, as `cpu` solves it; of a batch, so many times as much.

    Args:
        rows: O; rows of matrices that share their input are stacked and count together.
        columns: I.
        group: columns that share a scale, I where there is one scale per row.
        options: of the solver; without sweeps, no slope is formed.

    Returns:
        factor: Cholesky of the damped H.
        scales: 0, see above.
        sketch: H times a few directions.
        columns: each column's feedback from the residuals of those before it, a product with a triangle.
        slope: (W - Q) H from the loop's own errors, a product with a triangle again.
        refit: each group's response to its codes, and the slopes of the other columns after its change.
        losses: none for the codes, whose loss the loops tell; a product with a triangle for the energy, and the bound
            for rounding to nearest.
    """
    options = options or SolverOptions()
    square, inside = float(rows) * columns**2, float(rows) * columns * group
    refits = options.refits if options.sweeps != 0 else 0
    return {
        "factor": columns**3 / 3,
        "scales": 0.0,
        "sketch": 2.0 * SKETCHED * columns**2,
        "columns": square,
        "slope": square if options.sweeps != 0 else 0.0,
        "refit": refits * 2 * (square + inside),
        "losses": square + 2.0 * SKETCHED * rows * columns,
    }
