"""What `--effort max` takes besides: the backward pass (`calibration.ends`), sides, and rounding by both of them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from moepress.calibration.ends import side_blocks
from moepress.compress.estimates.figures import Figures, Matrices, expert_matrices
from moepress.compress.estimates.footprint import ROWS_AT_ONCE, Workload, hidden_bytes, slice_bytes
from moepress.compress.estimates.rates import Rates
from moepress.compress.estimates.seconds import forward_seconds, rest_parameters, solve_seconds
from moepress.compress.gptq.options import SolverOptions
from moepress.compress.gptq.sides import MOST_TOKENS
from moepress.models.families.family import Part

_PASSES = 4  # forward, and in the backward pass forward again and two products for each of its
_KEPT = 3  # activations that autograd keeps of a window, against those that are alive in a forward pass
_HEAD_ROWS, _HEAD_COPIES = 256, 6  # tokens whose logits are differentiated together; of those, numbers drawn, gradients
_SQUARES, _COPIES = 5, 7  # of B and of W, which a thread holds while it solves
_ROW_PRODUCTS = 9.0  # O * O * I multiplications and additions: feedback, slopes, what rows that moved do to others


@dataclass(frozen=True, slots=True, kw_only=True)
class EndTerms:
    """Terms of an estimate: bytes on disk and in memory, seconds where rates are known."""

    disk: dict[str, int] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)
    time: dict[str, float] = field(default_factory=dict)


def end_terms(
    figures: Figures,
    count: int,
    work: Workload,
    few: Sequence[Matrices],
    tokens: int,
    at_once: int,
    activations: int,
    rates: Rates | None,
    solver: SolverOptions | None,
) -> EndTerms:
    """Of a model that keeps so many experts a layer.

    Args:
        figures: the model's.
        count: experts that stay.
        work: what is walked over.
        few: Linears besides the routed experts that get few bits.
        tokens: of the backward pass; 0 for none.
        at_once: experts that are solved together.
        activations: bytes of one window in a forward pass.
        rates: of this machine, if they are known.
        solver: how it is asked to solve.
    """
    if not tokens:
        return EndTerms()
    passed = replace(work, tokens=min(work.tokens, math.ceil(tokens / work.window) * work.window))
    few = [matrices for matrices in few if matrices.part is not Part.LM_HEAD]
    solved = [*expert_matrices(figures, count), *few]
    return EndTerms(
        disk=_disk(figures, passed, few),
        memory=_memory(figures, passed, solved, at_once, activations),
        time={} if rates is None else _seconds(figures, count, passed, solved, at_once, rates, solver),
    )


def _disk(figures: Figures, passed: Workload, few: Sequence[Matrices]) -> dict[str, int]:
    """Hidden states go as factors come, and factors as codes come."""
    hidden, layers = figures.shape.hidden, figures.shape.layers
    squares = [m.count * sum(rows**2 for rows in side_blocks(m.rows, hidden)) for m in few]
    factors = 2 * (figures.moe_layers * hidden**2 + sum(squares))
    gradients = 2 * 4 * passed.tokens * hidden
    return {
        "end of the network": max((layers + 1) * hidden_bytes(figures, passed), factors) + gradients,
        "factors": factors,
    }


def _memory(
    figures: Figures, passed: Workload, solved: Sequence[Matrices], at_once: int, activations: int
) -> dict[str, int]:
    hidden, vocabulary = figures.shape.hidden, figures.shape.vocabulary
    gate_up = solved[0].rows
    threads = torch.get_num_threads() if passed.device.type == "cpu" else at_once
    widest = max(m.rows for m in solved)
    held = max(_SQUARES * m.rows**2 + _COPIES * m.rows * m.columns for m in solved)
    grams = 4 * hidden**2 + sum(4 * m.rows**2 for m in solved[2:])
    return {
        "sides": 4 * (at_once * gate_up**2 + 3 * max(hidden, widest) ** 2) + 4 * threads * held,
        "gradients": _KEPT * activations + 2 * slice_bytes(figures, min(passed.tokens, ROWS_AT_ONCE)) + grams,
        "logits": 4 * vocabulary * (hidden + _HEAD_COPIES * _HEAD_ROWS),
    }


def _seconds(
    figures: Figures,
    count: int,
    passed: Workload,
    solved: Sequence[Matrices],
    at_once: int,
    rates: Rates,
    solver: SolverOptions | None,
) -> dict[str, float]:
    shape = figures.shape
    kept = figures.stored(Part.ROUTED) + figures.parts[Part.ROUTED].bytes * count / shape.experts
    weights = rest_parameters(figures) + figures.parameters(Part.ROUTED) * count / shape.experts
    once = sum(forward_seconds(figures, passed, rates, shape.top_k).values())
    logits = 3 * 2.0 * passed.tokens * shape.vocabulary * shape.hidden / rates.forward_flops
    gate_up, down = solved[:2]
    own = min(MOST_TOKENS, passed.tokens * shape.top_k // max(count, 1))
    flops = gate_up.count * 2.0 * (own * gate_up.rows * (shape.hidden + gate_up.rows))
    flops += down.count * 2.0 * down.columns * (shape.hidden**2 + shape.hidden * down.columns)
    rows = sum(m.count * (_ROW_PRODUCTS * m.rows**2 * m.columns + 2.0 * m.rows * m.columns**2) for m in solved)
    again = [solve_seconds(m, rates, at_once if m.part is Part.ROUTED else 1, solver) for m in solved]
    second = sum(seconds for terms in again for term, seconds in terms.items() if term != "factor")
    return {
        "backward": _PASSES * once + logits + 2 * (kept / rates.read_bytes_per_second + weights * rates.load_seconds),
        "sides": flops / rates.solver_flops,
        "rows": rows / rates.solver_flops + second,
    }
