"""Seconds of what several stages do, at the rates of this machine: terms of an estimate."""

from moepress.compress.estimates.figures import Figures, Matrices
from moepress.compress.estimates.footprint import (
    Workload,
    hidden_bytes,
)
from moepress.compress.estimates.rates import Rates
from moepress.compress.gptq.costs import solve_flops
from moepress.compress.gptq.options import TORCH_ANNEALED, SolverOptions
from moepress.models.families.family import Part

# Fitted to compress/gptq on 2 cores at 1024 to 4096 columns; the spread between widths was a third.
_FACTOR_COST = 3.0  # Cholesky, against I^3 / 3 at the rate of a large matmul
_GROUP = 128
_NATIVE_PASSES = 5  # over all weights, each as long as a search of scales: rounding, sweeps, refits (annealed: more)
_TORCH_PASSES = 3
_COLUMN_SECONDS = 50e-6  # some eight small operations for each column of a loop in torch
START_SECONDS = 2.0  # transformers' model on the meta device, text to tokens
_FEW_TOKENS_COST = 1.3  # an expert's matmuls with a few hundred tokens, against large ones


def rest_parameters(figures: Figures) -> int:
    """Parameters that every token passes in the layers: all but routed experts, embeddings and lm_head."""
    parts = [p for p in figures.parts if p not in {Part.ROUTED, Part.EMBEDDINGS, Part.LM_HEAD, Part.MTP}]
    return figures.parameters(*parts)


def _routed_flops(figures: Figures, tokens: int, chosen: int) -> float:
    return 2 * tokens * figures.parameters(Part.ROUTED) * chosen / figures.shape.experts


def forward_seconds(figures: Figures, work: Workload, rates: Rates, chosen: int) -> dict[str, float]:
    """The forward pass of all layers, `chosen` experts a token, and the scores of attention."""
    attention = figures.attention
    scores = 2 * work.tokens * work.window * attention.heads * (attention.key_width + attention.value_width)
    dense = 2 * work.tokens * rest_parameters(figures)
    routed = _routed_flops(figures, work.tokens, chosen) * _FEW_TOKENS_COST
    return {
        "forward": (dense + routed) / rates.forward_flops,
        "attention scores": scores * figures.shape.layers / rates.forward_flops,
    }


def hidden_seconds(figures: Figures, work: Workload, spilled: int, rates: Rates) -> float:
    """Kept after every layer but the last; buffers in files are written and read a few times in every layer."""
    layers = figures.shape.layers
    return ((layers - 1) * hidden_bytes(figures, work) + 4 * layers * spilled) / rates.read_bytes_per_second


def solve_seconds(
    matrices: Matrices, rates: Rates, at_once: int, solver: SolverOptions | None = None
) -> dict[str, float]:
    """Products at the rate of large ones, and the loops over columns: natively they go over each weight a few times."""
    flops = solve_flops(matrices.rows, matrices.columns, _GROUP, solver)
    annealed = (solver or SolverOptions()).annealed
    products = sum(count for name, count in flops.items() if name != "factor")
    passes, loops = _NATIVE_PASSES + annealed, 0.0
    if rates.device != "cpu" or not rates.native:
        passes = _TORCH_PASSES + min(annealed, TORCH_ANNEALED)
        loops = matrices.columns * passes * _COLUMN_SECONDS / at_once
    return {
        "factor": matrices.count * _FACTOR_COST * flops["factor"] / rates.solver_flops,
        "solve": matrices.count * products / rates.solver_flops,
        "rounding": matrices.weights * passes * rates.search_seconds + matrices.count * loops,
    }
