"""What the experts of one layer do: all accumulators of all pruning criteria, in one pass.

Every expert sees only its own tokens. Per (token, slot) only the norm and the peak of the expert's output are kept, so
that sums can be formed afterwards, when the whole routed output y_t is known. Leave-one-out with re-routing needs one
more expert per token, the (K+1)-th choice, and the outputs themselves; tokens then go through in chunks.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moepress.models.family import Shape
from moepress.models.forward import apply_expert, tokens_of
from moepress.models.routing import Router, choice_scores, combine_weights, router_of, scores
from moepress.models.walk import Stream, read_ahead

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
_ROWS_AT_ONCE = 8192
# Per layer, fp64 [S, B]: number of tokens, sum |y_t|^2, sum |h_t|^2.
TOTALS = ("tokens", "routed_squared", "residual_squared")


@dataclass(frozen=True, slots=True, kw_only=True)
class Cells:
    """Which accumulator cell every token belongs to.

    Attributes:
        index: int64 [N * T], domain * shards + shard.
        domains: S.
        shards: B.
    """

    index: Tensor
    domains: int
    shards: int

    @property
    def count(self) -> int:
        """Number of cells, S * B."""
        return self.domains * self.shards


def observe_layer(stream: Stream, layer: int, cells: Cells, *, leave_one_out: bool) -> dict[str, Tensor]:
    """Run the experts of a layer whose first step has been done; add their output and return the layer's accumulators.

    Args:
        stream: walked with `observe=True`; its hidden states become the layer's output.
        layer: an MoE layer.
        cells: domain and shard of every token.
        leave_one_out: also form L_e, at the cost of one more expert per token.

    Returns:
        The accumulators of `ACCUMULATORS` (fp64 [S, B, E]) and `TOTALS` (fp64 [S, B]).
    """
    assert stream.residual is not None
    out = {name: torch.zeros(cells.count, stream.model.shape.experts, dtype=torch.float64) for name in ACCUMULATORS}
    out |= {name: torch.zeros(cells.count, dtype=torch.float64) for name in TOTALS}
    for rows in _chunks(stream, leave_one_out):
        _observe_rows(stream, layer, rows, cells, out, leave_one_out=leave_one_out)
    return {name: value.unflatten(0, (cells.domains, cells.shards)) for name, value in out.items()}


def tokens_at_once(shape: Shape, memory_bytes: int, *, leave_one_out: bool) -> int:
    """Tokens whose outputs of all chosen experts fit into a quarter of the memory limit; experts are read per chunk."""
    per_token = shape.hidden * 4 * (6 + (shape.top_k + 1 if leave_one_out else 0))
    return max(1024, memory_bytes // 4 // per_token)


def _chunks(stream: Stream, leave_one_out: bool) -> list[slice]:
    size = tokens_at_once(stream.model.shape, stream.limits.memory_bytes, leave_one_out=leave_one_out)
    return [slice(start, min(start + size, stream.tokens)) for start in range(0, stream.tokens, size)]


def _observe_rows(
    stream: Stream, layer: int, rows: slice, cells: Cells, out: dict[str, Tensor], *, leave_one_out: bool
) -> None:
    model, flat = stream.model, stream.flat()
    assert stream.residual is not None
    chosen, weights, cell = stream.chosen[rows], stream.weights[rows], cells.index[rows]
    top_k = chosen.shape[1]
    spare = _spare_choice(stream, layer, rows) if leave_one_out else None
    wanted = chosen if spare is None else torch.cat((chosen, spare.expert[:, None]), dim=1)
    shape = (*wanted.shape, model.shape.hidden)
    outputs = torch.zeros(shape if leave_one_out else (0,), dtype=torch.float32)
    norms, peaks = torch.zeros(wanted.shape), torch.zeros(wanted.shape)
    routed = torch.zeros(wanted.shape[0], model.shape.hidden)
    positions = tokens_of(wanted, model.shape.experts)
    busy = [e for e in range(model.shape.experts) if len(positions[e][0])]
    activation = model.activation(layer)
    for expert, matrices in read_ahead(model, layer, busy):
        for tokens, slots in zip(*(p.split(_ROWS_AT_ONCE) for p in positions[expert]), strict=True):
            inputs = stream.inputs[rows][tokens].to(model.device)
            output = apply_expert(matrices, inputs, activation).float().to("cpu")
            norms[tokens, slots], peaks[tokens, slots] = output.norm(dim=1), output.abs().amax(dim=1)
            own = slots < top_k
            routed.index_add_(0, tokens[own], output[own] * weights[tokens[own], slots[own], None])
            if leave_one_out:
                outputs[tokens, slots] = output
    residual = stream.residual[rows].float()
    turn = (1 - torch.cosine_similarity(residual, residual + routed, dim=1)).clamp(min=0)
    _accumulate(out, cell, chosen, weights, norms[:, :top_k], peaks[:, :top_k], turn)
    if spare is not None:
        loss = leave_one_out_loss(spare.router, spare.scores, chosen, weights, spare.expert, spare.valid, outputs)
        _add(out["leave_one_out"], cell, chosen, loss)
    for name, value in (("routed_squared", routed), ("residual_squared", residual)):
        out[name].index_add_(0, cell, value.double().square().sum(dim=1))
    out["tokens"].index_add_(0, cell, torch.ones(len(cell), dtype=torch.float64))
    flat[rows] = (flat[rows].float() + routed).to(flat.dtype)


def _accumulate(
    out: dict[str, Tensor], cell: Tensor, chosen: Tensor, weights: Tensor, norms: Tensor, peaks: Tensor, turn: Tensor
) -> None:
    weighted = weights.double() * norms.double()
    for name, value in (
        ("count", torch.ones_like(weighted)),
        ("gate", weights),
        ("norm", norms),
        ("norm_squared", norms.double().square()),
        ("weighted_norm", weighted),
        ("weighted_norm_squared", weighted.square()),
        ("turned_norm", turn.double()[:, None] * weighted),
    ):
        _add(out[name], cell, chosen, value)
    index = (cell[:, None] * out["peak"].shape[1] + chosen).reshape(-1)
    out["peak"].view(-1).scatter_reduce_(0, index, peaks.double().reshape(-1), reduce="amax")


def _add(target_CE: Tensor, cell_T: Tensor, chosen_TK: Tensor, value_TK: Tensor) -> None:
    index = (cell_T[:, None] * target_CE.shape[1] + chosen_TK).reshape(-1)
    target_CE.view(-1).index_add_(0, index, value_TK.double().reshape(-1))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Spare:
    """The (K+1)-th choice of every token: `valid` is False where groups leave no further expert."""

    router: Router
    scores: Tensor
    expert: Tensor
    valid: Tensor


def _spare_choice(stream: Stream, layer: int, rows: slice) -> _Spare:
    model = stream.model
    assert stream.logits is not None
    router = router_of(model.family, model.source.config)
    bias = model.router_bias(layer)
    scored = scores(router, stream.logits[rows])
    choice = choice_scores(router, scored, bias).scatter(1, stream.chosen[rows], float("-inf"))
    best = choice.max(dim=1)
    return _Spare(router=router, scores=scored, expert=best.indices, valid=torch.isfinite(best.values))


def leave_one_out_loss(
    router: Router,
    scores_TE: Tensor,
    chosen_TK: Tensor,
    weights_TK: Tensor,
    spare_T: Tensor,
    valid_T: Tensor,
    outputs_TJD: Tensor,
) -> Tensor:
    """Squared change of the routed output when one expert is away and the router takes the next one instead.

    Args:
        router: the routing rule.
        scores_TE: router scores, before the bias.
        chosen_TK: the experts chosen.
        weights_TK: their weights, from the model's own router.
        spare_T: the (K+1)-th choice.
        valid_T: False where there is none; the token then gets only K - 1 experts.
        outputs_TJD: outputs of the K chosen experts and the spare one, J = K + 1.

    Returns:
        fp64 [T, K]: |sum_j delta_j f_tj|^2 for the removal of each chosen expert.
    """
    candidates = torch.cat((chosen_TK, spare_T[:, None]), dim=1)
    top_k = chosen_TK.shape[1]
    present = torch.ones_like(candidates, dtype=torch.float32)
    present[:, top_k] = valid_T.float()
    gram_TJJ = torch.bmm(outputs_TJD, outputs_TJD.mT).double()
    raw = scores_TE.gather(1, candidates) * present
    before = torch.cat((weights_TK, torch.zeros_like(weights_TK[:, :1])), dim=1)
    losses = []
    for slot in range(top_k):
        mask = present.clone()
        mask[:, slot] = 0
        after = _weights_over(router, raw * mask / _remaining(router, scores_TE, chosen_TK[:, slot, None]))
        delta = (before - after).double()
        losses.append(torch.einsum("tj,tjk,tk->t", delta, gram_TJJ, delta))
    return torch.stack(losses, dim=1).clamp(min=0)


def _remaining(router: Router, scores_TE: Tensor, removed_T1: Tensor) -> Tensor:
    """What the other experts' scores are divided by when one goes, [T, 1]: a softmax is then over one logit less."""
    if router.sigmoid:
        return torch.ones_like(scores_TE[:, :1])
    return scores_TE.scatter(1, removed_T1, 0.0).sum(dim=1, keepdim=True).clamp(min=1e-30)


def _weights_over(router: Router, raw_TJ: Tensor) -> Tensor:
    """Combine weights over a set given by its scores (0 outside of it)."""
    everything = torch.arange(raw_TJ.shape[1]).expand(raw_TJ.shape)
    return combine_weights(router, raw_TJ, everything)


def shard_of_windows(windows_NT: Tensor, shards: int) -> Tensor:
    """A token shard for every window, int64 [N], by a hash of its tokens, so that merged profiles agree."""
    import hashlib

    digests: Sequence[bytes] = [hashlib.sha256(row.numpy().tobytes()).digest() for row in windows_NT.contiguous()]
    return torch.tensor([int.from_bytes(d[:4], "little") % shards for d in digests], dtype=torch.int64)
