"""What a profile holds of each layer's experts: names, and how two profiles are merged. See docs/formulas.md."""

# Name of an accumulator -> how two profiles are merged. All are fp64 [S, B, E]: domains, token shards, experts.
ACCUMULATORS = {
    "count": "sum",  # n_e
    "gate": "sum",  # G_e
    "norm": "sum",  # A1_e
    "norm_squared": "sum",  # A2_e
    "weighted_norm": "sum",  # R1_e
    "weighted_norm_squared": "sum",  # R2_e
    "turned_norm": "sum",  # Q_e
    "leave_one_out": "sum",  # L_e
    "peak": "max",  # M_e
}
# Per layer, fp64 [S, B]: number of tokens, sum |y_t|^2, sum |h_t|^2.
TOTALS = ("tokens", "routed_squared", "residual_squared")
