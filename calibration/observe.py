"""What the experts of one layer do: all accumulators of all pruning criteria, in one pass.

Every expert is read once and sees only its own tokens. Per (token, slot) the norm and the peak of the expert's output
are kept, so that sums can be formed afterwards, when the whole routed output y_t is known. Leave-one-out with
re-routing needs one more expert per token, the (K+1)-th choice, and the outputs themselves: they go to a table of all
(token, slot) pairs, in a file where memory has no room for it. Only where the disk has none either do tokens go through
in several passes, each of which reads all experts.

No sum depends on the passes: work is done in blocks of tokens of one size, and a pass is some whole blocks. And none
depends on who has which shards of the windows (`walk.Limits`): each has sums of its own, which are added in order.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moepress.calibration.accumulators import ACCUMULATORS, TOTALS
from moepress.models.families.family import Shape
from moepress.models.families.router import Router, router_of
from moepress.models.families.routing import choice_scores, combine_weights, scores
from moepress.models.forward.costs import expert_flops
from moepress.models.forward.scratch import Rows
from moepress.models.forward.streamed import apply_expert, tokens_of
from moepress.models.forward.walk import Stream, read_ahead
from moepress.runs.phases import phase

BLOCK_TOKENS = 8192
"""Tokens that an expert sees together."""
ROWS_AT_ONCE = 2048
"""Rows of them that pass through it together."""
CHUNK_BYTES = 16 << 20
"""Outputs that are summed up together."""
_DISK_SHARE = 2  # of the free disk, the part that the table of outputs may take


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
    count, blocks = cells.count, blocks_of(stream)
    sums = [_zeros(count, stream.model.shape.experts) for _ in range(blocks.shards)]
    size = _open_buffers(stream, blocks, leave_one_out=leave_one_out)
    for start in range(0, stream.tokens, size):
        tokens = slice(start, min(start + size, stream.tokens))
        _observe_pass(stream, layer, tokens, blocks, cells, sums, leave_one_out=leave_one_out)
    stream.forget()
    return added([{n: v.unflatten(0, (cells.domains, cells.shards)) for n, v in out.items()} for out in sums])


def _zeros(cells: int, experts: int) -> dict[str, Tensor]:
    out = {name: torch.zeros(cells, experts, dtype=torch.float64) for name in ACCUMULATORS}
    return out | {name: torch.zeros(cells, dtype=torch.float64) for name in TOTALS}


def added(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The accumulators of all shards, of each shard's, in their order."""
    total = {name: value.clone() for name, value in parts[0].items()}
    for part in parts[1:]:
        for name, value in part.items():
            if ACCUMULATORS.get(name) == "max":
                torch.maximum(total[name], value, out=total[name])
            else:
                total[name] += value
    return total


@dataclass(frozen=True, slots=True, kw_only=True)
class Blocks:
    """How tokens are cut: into shards of so many, and these into blocks.

    Attributes:
        tokens: in all.
        shard: of a shard; the last may have fewer.
    """

    tokens: int
    shard: int

    @property
    def shards(self) -> int:
        """How many, one at least."""
        return max(1, -(-self.tokens // self.shard))

    @property
    def whole(self) -> int:
        """Passes begin at multiples of so many tokens."""
        return BLOCK_TOKENS if self.shard % BLOCK_TOKENS == 0 or self.shard >= self.tokens else self.shard

    def within(self, rows: slice) -> list[slice]:
        """The blocks of a pass."""
        starts = [
            start
            for first in range(rows.start - rows.start % self.shard, rows.stop, self.shard)
            for start in range(first, min(first + self.shard, rows.stop), BLOCK_TOKENS)
            if start >= rows.start
        ]
        return [slice(*pair) for pair in zip(starts, [*starts[1:], rows.stop], strict=True)]


def blocks_of(stream: Stream) -> Blocks:
    """Those of a walk."""
    length = stream.hidden.shape[1]
    return Blocks(tokens=stream.tokens, shard=min(stream.limits.shard_windows, len(stream.hidden)) * length)


def bytes_per_token(shape: Shape, dtype: torch.dtype, *, leave_one_out: bool) -> int:
    """What is kept of a token until all experts have been read: their outputs as computed, or their sum in fp32."""
    return shape.hidden * ((shape.top_k + 1) * dtype.itemsize if leave_one_out else 4)


def tokens_at_once(
    tokens: int, per_token_bytes: int, memory_bytes: int, disk_bytes: int | None, block: int | None = None
) -> int:
    """Tokens of a pass: all of them where memory or half of the free disk holds what is kept, else some whole blocks.

    Args:
        tokens: of the calibration text.
        per_token_bytes: see `bytes_per_token`.
        memory_bytes: what is left for buffers.
        disk_bytes: what is free; None for enough.
        block: tokens of a block; None for the usual ones.
    """
    block = block or BLOCK_TOKENS
    room = None if disk_bytes is None else max(memory_bytes, disk_bytes // _DISK_SHARE)
    if room is None or tokens * per_token_bytes <= room:
        return max(tokens, 1)
    blocks = -(-tokens // block)
    passes = -(-blocks // max(1, room // (per_token_bytes * block)))
    return min(tokens, -(-blocks // passes) * block)


def _open_buffers(stream: Stream, blocks: Blocks, *, leave_one_out: bool) -> int:
    """Make the walk's buffer at the first layer; returns the tokens of a pass."""
    shape, top_k, dtype, scratch = stream.model.shape, stream.chosen.shape[1], stream.model.dtype, stream.scratch
    kept = bytes_per_token(shape, dtype, leave_one_out=leave_one_out)
    if stream.outputs is None and stream.routed is None:
        size = tokens_at_once(stream.tokens, kept, scratch.left_bytes, scratch.free_bytes(), blocks.whole)
        if leave_one_out:
            stream.outputs = scratch.rows("outputs", size * (top_k + 1), shape.hidden, dtype)
        else:
            stream.routed = scratch.tensor("routed", (size, shape.hidden), torch.float32)
    if stream.outputs is not None:
        return stream.outputs.count // (top_k + 1)
    assert stream.routed is not None
    return len(stream.routed)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """Tokens of one pass, N of them, the experts that they want, J each, and what is known of the experts' outputs.

    Attributes:
        rows: where the tokens stand among all.
        wanted: int64 [N, J], the K chosen experts and with leave-one-out the spare one.
        valid: [N], False where groups leave no spare expert.
        norms, peaks: fp32 [N, J].
    """

    rows: slice
    wanted: Tensor
    valid: Tensor
    norms: Tensor
    peaks: Tensor


def _observe_pass(
    stream: Stream,
    layer: int,
    rows: slice,
    blocks: Blocks,
    cells: Cells,
    sums: Sequence[dict[str, Tensor]],
    *,
    leave_one_out: bool,
) -> None:
    model, router = stream.model, None
    if leave_one_out:
        router = router_of(model.family, model.source.config, model.shape)
    bias = model.router_bias(layer) if leave_one_out else None
    wanted, valid = stream.chosen[rows], torch.ones(rows.stop - rows.start, dtype=torch.bool)
    if router is not None:
        with phase("observe"):
            spare, valid = _spare_choices(stream, rows, router, bias)
            wanted = torch.cat((wanted, spare[:, None]), dim=1)
    norms, peaks = torch.zeros(wanted.shape), torch.zeros(wanted.shape)
    part = _Part(rows=rows, wanted=wanted, valid=valid, norms=norms, peaks=peaks)
    if stream.routed is not None:
        stream.routed.zero_()
    positions, own = tokens_of(wanted, model.shape.experts), blocks.within(rows)
    for expert, matrices in read_ahead(model, layer, [e for e in range(model.shape.experts) if len(positions[e][0])]):
        for tokens, slots in _slices(*positions[expert], own):
            with phase("forward", flops=expert_flops(matrices, len(tokens))):
                inputs = stream.inputs[tokens + rows.start].to(model.device)
                output = apply_expert(matrices, inputs, model.gating(layer)).to("cpu")
            with phase("observe"):
                _keep_output(stream, part, tokens, slots, output)
    with phase("observe"):
        for chunk in _chunks(part, own, bytes_per_token(model.shape, model.dtype, leave_one_out=True)):
            out = sums[(chunk.start + rows.start) // blocks.shard]
            _sum_up(stream, part, chunk, cells, out, router)


def _slices(tokens: Tensor, slots: Tensor, blocks: Sequence[slice]) -> Iterator[tuple[Tensor, Tensor]]:
    """An expert's (ascending) tokens of a pass, block by block, and of a block so many at once."""
    ends = torch.tensor([block.stop - blocks[0].start for block in blocks])
    counts = torch.searchsorted(tokens.contiguous(), ends).diff(prepend=torch.zeros(1, dtype=torch.int64)).tolist()
    for block in zip(tokens.split(counts), slots.split(counts), strict=True):
        yield from zip(*(part.split(ROWS_AT_ONCE) for part in block if len(part)), strict=True)


def _keep_output(stream: Stream, part: _Part, tokens: Tensor, slots: Tensor, output: Tensor) -> None:
    values, top_k = output.float(), stream.chosen.shape[1]
    part.norms[tokens, slots], part.peaks[tokens, slots] = values.norm(dim=1), values.abs().amax(dim=1)
    if stream.outputs is not None:
        stream.outputs.put(tokens * (top_k + 1) + slots, output)
    else:
        assert stream.routed is not None
        stream.routed.index_add_(0, tokens, values * stream.weights[tokens + part.rows.start, slots, None])
    stream.touch(len(tokens))


def _chunks(part: _Part, blocks: Sequence[slice], per_token_bytes: int) -> list[slice]:
    """Few enough tokens of a block to have all outputs of in memory; counted from the start of the pass."""
    size, first = max(1, CHUNK_BYTES // per_token_bytes), part.rows.start
    return [
        slice(start - first, min(start + size, block.stop) - first)
        for block in blocks
        for start in range(block.start, block.stop, size)
    ]


def _sum_up(
    stream: Stream, part: _Part, chunk: slice, cells: Cells, out: dict[str, Tensor], router: Router | None
) -> None:
    """Add a chunk's tokens to the accumulators, and the routed output to their hidden states."""
    assert stream.residual is not None
    rows, flat = slice(chunk.start + part.rows.start, chunk.stop + part.rows.start), stream.flat()
    chosen, weights, cell = stream.chosen[rows], stream.weights[rows], cells.index[rows]
    top_k, residual = chosen.shape[1], stream.residual[rows].float()
    if router is None:
        assert stream.routed is not None
        routed = stream.routed[chunk]
    else:
        outputs = _outputs_of(stream.outputs, part, chunk)
        routed = torch.bmm(weights[:, None], outputs[:, :top_k]).squeeze(1)
        assert stream.logits is not None
        scored, spare = scores(router, stream.logits[rows]), part.wanted[chunk, top_k]
        loss = leave_one_out_loss(router, scored, chosen, weights, spare, part.valid[chunk], outputs)
        _add(out["leave_one_out"], cell, chosen, loss)
    turn = (1 - torch.cosine_similarity(residual, residual + routed, dim=1)).clamp(min=0)
    _accumulate(out, cell, chosen, weights, part.norms[chunk, :top_k], part.peaks[chunk, :top_k], turn)
    for name, value in (("routed_squared", routed), ("residual_squared", residual)):
        out[name].index_add_(0, cell, value.double().square().sum(dim=1))
    out["tokens"].index_add_(0, cell, torch.ones(len(cell), dtype=torch.float64))
    flat[rows] = (flat[rows].float() + routed).to(flat.dtype)
    stream.touch(len(chosen))


def _outputs_of(table: Rows | None, part: _Part, chunk: slice) -> Tensor:
    """Outputs of a chunk's tokens, fp32 [T, J, D]."""
    assert table is not None
    wanted = part.wanted.shape[1]
    outputs = table.get(chunk.start * wanted, chunk.stop * wanted).float()
    return outputs.view(-1, wanted, outputs.shape[1])


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


def _spare_choices(stream: Stream, rows: slice, router: Router, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """The (K+1)-th choice of every token, int64 [N], and whether groups leave one, bool [N]."""
    assert stream.logits is not None
    found = []
    for start in range(rows.start, rows.stop, ROWS_AT_ONCE):
        some = slice(start, min(start + ROWS_AT_ONCE, rows.stop))
        choice = choice_scores(router, scores(router, stream.logits[some]), bias)
        found.append(choice.scatter(1, stream.chosen[some], float("-inf")).max(dim=1))
    best = torch.cat([part.values for part in found])
    return torch.cat([part.indices for part in found]), torch.isfinite(best)


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
    if router.scoring != "softmax":
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
