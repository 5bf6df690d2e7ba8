"""The second factor of the loss, B [O, O], of each matrix that is solved: see `calibration.ends`.

Of Linears it is what was gathered. Of an expert it is made of the metric M [D, D] of its layer, the factor of the sum
of the experts' outputs, while the expert is in hand. What writes into that sum, `down`, has M itself. Gate and up have,
for the intermediate m = act(g) * u (or whatever the architecture makes of both) and to second order,

    B = (sum_t a_t z_t z_t^T) o (1 1^T (x) D^T M D),    z_t = (dm/dg, dm/du) of token t,

with `down` as D, o for products number by number, and the square of the token's combine weight as a_t.

Letters: O output rows, I input columns, D hidden size, F expert width, T tokens.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from moepress.calibration.hessian import HessianOptions, shares
from moepress.compress.gptq.two_sided import Side
from moepress.models.forward.gating import Gating
from moepress.models.storage.experts import Expert
from moepress.runs.phases import phase

MOST_TOKENS = 2048
"""Of an expert, of which its B is made."""


def floored(blocks: Sequence[Tensor], floor: float, device: torch.device) -> Side:
    """B for the solver, of blocks with a mean diagonal of 1: what gradients of few tokens did not see counts too."""
    return tuple(
        block_RR.to(device, torch.float32) + floor * torch.eye(len(block_RR), device=device) for block_RR in blocks
    )


def rows_of(side: Side, rows: Tensor) -> Side:
    """B of some of its rows, by their numbers, ascending."""
    found, first = [], 0
    for block_RR in side:
        own = rows[(rows >= first) & (rows < first + len(block_RR))] - first
        first += len(block_RR)
        if len(own):
            found.append(block_RR[own][:, own])
    return tuple(found)


def inner_metric(down_DF: Tensor, metric_DD: Tensor) -> Tensor:
    """D^T M D, [F, F]."""
    width = down_DF.shape[1]
    with phase("sides", flops=2.0 * width * metric_DD.numel() + 2.0 * width * down_DF.numel()):
        return down_DF.T @ (metric_DD @ down_DF)


def slopes_gram(
    expert: Expert, gating: Gating, inputs_TD: Tensor, weights_T: Tensor | None, out_OO: Tensor, scale: float
) -> None:
    """Add so many times sum_t a_t z_t z_t^T of some tokens, in place.

    Args:
        expert: its matrices, in one dtype on one device.
        gating: of its layer.
        inputs_TD: what reaches it, in the same dtype.
        weights_T: a_t, or None for 1.
        out_OO: fp32, of gate and up one above the other, or of up alone.
        scale: times.
    """
    linear = torch.nn.functional.linear
    with phase("sides", flops=2.0 * len(inputs_TD) * (inputs_TD.shape[1] * len(out_OO) + out_OO.numel())):
        gate = None if expert.gate is None else linear(inputs_TD, expert.gate, expert.gate_bias)
        up = linear(inputs_TD, expert.up, expert.up_bias)
        slopes_TO = torch.cat(_slopes(gating.between, gate, up), dim=1).float()
        if weights_T is not None:
            slopes_TO = slopes_TO * weights_T[:, None].float().sqrt()
        out_OO.addmm_(slopes_TO.T, slopes_TO, alpha=scale)


def _slopes(between: Callable[[Tensor | None, Tensor], Tensor], gate: Tensor | None, up: Tensor) -> list[Tensor]:
    """By how much the intermediate moves with gate's output (where there is one) and with up's, each [T, F]."""
    with torch.inference_mode(mode=False), torch.enable_grad():
        leaves = [part.clone().requires_grad_() for part in (gate, up) if part is not None]
        middle = between(leaves[0] if gate is not None else None, leaves[-1])
        return list(torch.autograd.grad(middle.sum(), leaves))


def normalised(side_OO: Tensor) -> Tensor | None:
    """The same with a mean diagonal of 1; None where it is zero or not finite."""
    mean = float(side_OO.diagonal().mean())
    return side_OO / mean if 0 < mean < float("inf") else None


def expert_side(
    expert: Expert,
    gating: Gating,
    own: tuple[Tensor, Tensor],
    sample_PD: Tensor,
    metric_DD: Tensor,
    options: HessianOptions,
) -> Side | None:
    """B of an expert's gate and up, one above the other.

    As in its Hessians an expert with few tokens of its own is drawn towards what it would do with any of the layer's.

    Args:
        expert: fp32, on the device.
        gating: of its layer.
        own: its tokens' inputs [T, D] and combine weights [T].
        sample_PD: inputs of any tokens of the layer; of an expert without tokens there is one at least.
        metric_DD: M, fp32 on the device.
        options: for the floor, and how far it is drawn.

    Returns:
        None where nothing is known: the output of the expert is changed before it is added up, or does not matter.
    """
    if gating.after is not None:
        return None
    inputs_TD, squares_T = own[0].float(), own[1].float().square()
    rows = sum(len(matrix) for matrix in (expert.gate, expert.up) if matrix is not None)
    gram_OO = metric_DD.new_zeros(rows, rows)
    share, rest = shares(len(inputs_TD), float(squares_T.sum()), options.shrinkage_tokens)
    if len(inputs_TD):
        slopes_gram(expert, gating, inputs_TD, squares_T, gram_OO, share)
    if len(sample_PD):
        slopes_gram(expert, gating, sample_PD.float(), None, gram_OO, rest / len(sample_PD))
    times = rows // expert.down.shape[1]
    found_OO = normalised(gram_OO.mul_(inner_metric(expert.down, metric_DD).repeat(times, times)))
    return None if found_OO is None else floored([found_OO], options.end_floor, found_OO.device)


def spread(count: int, most: int = MOST_TOKENS) -> Tensor:
    """Which of so many, at most so many, evenly spread: int64."""
    taken = min(count, most)
    return torch.arange(taken) * count // max(taken, 1)
