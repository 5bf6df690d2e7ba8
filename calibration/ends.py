"""What errors cost at the end of the network: a second factor for the loss of each matrix, on its output side.

The solver's own loss, tr((W - Q) H (W - Q)^T), counts errors of all outputs alike and stops at the matrix. What they do
to the model's output is, to second order, their Fisher information. With gradients g_t at a matrix's outputs of the
cross-entropy to labels drawn from the model's own output, its Kronecker approximation is H and B = sum_t g_t g_t^T
(YAQA, arXiv 2505.22988), so that the loss is tr(B (W - Q) H (W - Q)^T).

The gradients come from one forward and one backward pass through the unquantized model over some of the calibration
windows, layer by layer. Kept of a layer are B of its Linears, and for all of its experts together that of the sum of
their outputs, the metric M [D, D]; `compress.gptq.sides` makes each expert's own of it, since 256 experts with 4,096
rows each would be 17 GB.

Everything is a piece of the run: hidden states before a layer and gradients behind it as long as a resume wants them, a
layer's factors until it is quantized.

Letters: N windows of T tokens, D hidden size, O output rows.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from moepress.calibration.corpus import Corpus, sampled
from moepress.models.forward.backward import Gradients, backward_head, backward_layer, open_gradients
from moepress.models.forward.streamed import StreamedModel
from moepress.models.forward.walk import Limits, Scratch, Stream, go_through, open_stream
from moepress.models.storage.safetensors_file import read_header
from moepress.models.storage.tensors import read_tensor, tensor_entry
from moepress.models.storage.writer import Entry, write_shard
from moepress.runs.journal import Run
from moepress.runs.memory import release_memory
from moepress.runs.phases import in_layer, phase
from moepress.runs.pieces import Piece, Pieces
from moepress.runs.progress import Advance, track

Groups = Mapping[int, Sequence[Sequence[str]]]
"""Per layer: Linears that are solved as one, their rows one above the other, by their names on disk."""
_BLOCK_ROWS = 2048  # rows of a Linear beyond these, or beyond the hidden size, are cut into independent blocks
_LARGEST = torch.finfo(torch.float16).max
_METRIC = "metric"
_MARK = "ends"


def side_blocks(rows: int, hidden: int) -> list[int]:
    """Sizes of the diagonal blocks that are kept of a B of so many rows."""
    count = math.ceil(rows / max(hidden, _BLOCK_ROWS))
    return [len(part) for part in torch.arange(rows).tensor_split(count)]


def gather_ends(model: StreamedModel, corpus: Corpus, run: Run, limits: Limits, tokens: int, groups: Groups) -> None:
    """Make the factors of all layers, as far as they are not there yet.

    Args:
        model: not quantized (but perhaps pruned), and not yet used in `torch.inference_mode`.
        corpus: the calibration text, of which `sampled` windows are taken.
        run: the output in the making.
        limits: memory.
        tokens: how many.
        groups: Linears whose factors are wanted, by layers.
    """
    if run.done(_MARK):
        return
    layers, windows_NT = model.shape.layers, sampled(corpus, tokens)
    text = f"{windows_NT.numel():,} tokens forward and back"
    scratch = Scratch(run.folder, limits.memory_bytes)
    try:
        with (
            torch.no_grad(),
            track("end of the network", 2 * layers, unit="layers", about=text) as advance,
        ):
            with phase("embed"):
                stream = open_stream(model, windows_NT, scratch, limits, observe=False)
            behind = _resumed(run, layers)
            if behind is None:
                _go_forward(run, stream, advance)
            else:
                advance(layers)
            gradients = open_gradients(stream)
            _go_back(run, stream, gradients, behind, groups, advance)
    finally:
        scratch.close()
    run.write(_MARK, f"{_MARK}.end", _touch)
    run.drop(_gradient(0))
    release_memory()


def _go_forward(run: Run, stream: Stream, advance: Advance) -> None:
    """Through all layers, from the last whose hidden states are kept."""
    layers = stream.model.shape.layers
    first = next((n for n in range(layers, 0, -1) if run.done(_hidden(n))), 0)
    if first:
        _restore(run, stream, first)
    advance(first)
    for layer in range(first, layers):
        with in_layer(layer), phase("other"):
            _forward(run, stream, layer)
        advance(1)


def _go_back(
    run: Run, stream: Stream, gradients: Gradients, behind: int | None, groups: Groups, advance: Advance
) -> None:
    """Through the head, unless gradients before some layer are kept, and through the layers before that."""
    layers = stream.model.shape.layers
    if behind is None:
        _head(run, stream, gradients)
        behind = layers
    else:
        _restore_gradient(run, gradients, behind)
    advance(layers - behind)
    for layer in reversed(range(behind)):
        with in_layer(layer), phase("other"):
            _restore(run, stream, layer)
            _backward(run, stream, gradients, layer, groups.get(layer, ()))
        advance(1)


def _touch(path: Path) -> None:
    path.write_bytes(b"")


def _hidden(layer: int) -> str:
    return f"end-hidden-{layer}"


def _gradient(layer: int) -> str:
    return f"end-gradient-{layer}"


def _factors(layer: int) -> str:
    return f"end-factors-{layer}"


def _resumed(run: Run, layers: int) -> int | None:
    """The layer before which gradients are known, its number of those behind all layers; None before the first."""
    return next(
        (n for n in range(layers + 1) if run.done(_gradient(n)) and (n == layers or run.done(_factors(n)))), None
    )


def _keep(run: Run, stream: Stream, layer: int) -> None:
    """Hidden states before a layer."""
    if run.done(_hidden(layer)) is None:
        entries = stream.kept()
        with phase("hidden states", size=sum(entry.bytes for entry in entries)):
            run.write(_hidden(layer), f"{_hidden(layer)}.safetensors", lambda path: write_shard(path, entries))


def _restore(run: Run, stream: Stream, layer: int) -> None:
    piece = run.done(_hidden(layer))
    assert piece is not None, f"no hidden states before layer {layer}"
    stored = read_header(run.path(piece))
    with phase("hidden states", size=sum(entry.bytes for entry in stored.values())):
        stream.states.clear()
        stream.restore(stored)


def _forward(run: Run, stream: Stream, layer: int) -> None:
    _keep(run, stream, layer)
    go_through(stream, layer)
    if layer == stream.model.shape.layers - 1:
        _keep(run, stream, layer + 1)


def _head(run: Run, stream: Stream, gradients: Gradients) -> None:
    """Gradients of something at random whose second moments are the Fisher information of the model's output.

    With odds p and normal numbers e, the vector sqrt(p) e - p sum(sqrt(p) e) has the covariance diag(p) - p p^T, which
    that of the cross-entropy to a label drawn by p has too; but labels are seldom other than the likeliest, and then
    count for a lot.
    """
    drawn = torch.Generator().manual_seed(0)

    def loss(logits_RV: Tensor, _rows: slice) -> Tensor:
        odds_RV = logits_RV.detach().softmax(dim=1)
        root_RV = torch.randn(odds_RV.shape, generator=drawn).to(odds_RV) * odds_RV.sqrt()
        return (logits_RV * (root_RV - odds_RV * root_RV.sum(dim=1, keepdim=True))).sum()

    backward_head(stream, gradients, loss, stream.model.head())
    layers = stream.model.shape.layers
    _keep_gradient(run, gradients, layers)
    run.drop(_hidden(layers))


def _keep_gradient(run: Run, gradients: Gradients, layer: int) -> None:
    if run.done(_gradient(layer)) is not None:  # killed before the factors were written
        return
    entries = [tensor_entry("gradient", gradients.hidden)]
    with phase("hidden states", size=sum(entry.bytes for entry in entries)):
        run.write(_gradient(layer), f"{_gradient(layer)}.safetensors", lambda path: write_shard(path, entries))


def _restore_gradient(run: Run, gradients: Gradients, layer: int) -> None:
    piece = run.done(_gradient(layer))
    assert piece is not None, f"no gradients before layer {layer}"
    gradients.hidden.copy_(read_tensor(read_header(run.path(piece))["gradient"]))


@dataclass(slots=True, kw_only=True)
class Outer:
    """What is summed up of vectors g_t, as they come.

    Attributes:
        total: sum of g g^T, fp32 [R, R].
        fourth: sum of |g|^4.
        count: how many.
    """

    total: Tensor
    fourth: float = 0.0
    count: int = 0

    def add(self, some_TR: Tensor) -> None:
        """Add some vectors."""
        with phase("Hessian", flops=2.0 * some_TR.shape[0] * some_TR.shape[1] ** 2):
            self.total.addmm_(some_TR.T, some_TR)
            self.fourth += float(some_TR.square().sum(dim=1).square().sum(dtype=torch.float64))
            self.count += len(some_TR)

    def estimate(self) -> Tensor | None:
        """The mean of g g^T, with a mean diagonal of 1, drawn towards the identity as far as few vectors want it.

        How far, their spread says (Ledoit and Wolf, J. Multivariate Analysis 88, 2004; the mean of g is 0). None where
        no vector was but zero.
        """
        rows = len(self.total)
        level = float(self.total.trace()) / rows / max(self.count, 1)
        if not 0 < level < float("inf"):
            return None
        mean_RR = self.total / (self.count * level)
        square = float(mean_RR.square().sum(dtype=torch.float64))
        noise = max(self.fourth / (self.count * level**2) - square, 0.0) / self.count
        share = min(1.0, noise / (square - rows)) if square > rows else 1.0
        mean_RR.mul_(1 - share).diagonal().add_(share)
        return mean_RR


@dataclass(slots=True, kw_only=True)
class _Found:
    """What comes back to the outputs of a layer.

    Attributes:
        group_of: name inside of the layer -> Linears that are solved as one, likewise.
        sizes: first name of a group, or `metric` -> sizes of the blocks that are kept of its B.
        waiting: gradients of Linears of whose group others are still to come.
        sums: of each block.
    """

    group_of: Mapping[str, tuple[str, ...]]
    sizes: Mapping[str, Sequence[int]]
    waiting: dict[str, Tensor] = field(default_factory=dict)
    sums: dict[str, list[Outer]] = field(default_factory=dict)

    def take(self, name: str, gradient_TO: Tensor) -> None:
        """As `backward.Seen`; "" is the sum of the experts' outputs."""
        if not name:
            self._add(_METRIC, gradient_TO)
            return
        self.waiting[name] = gradient_TO
        group = self.group_of[name]
        if all(own in self.waiting for own in group):
            self._add(group[0], torch.cat([self.waiting.pop(own) for own in group], dim=1))

    def _add(self, key: str, gradient_TO: Tensor) -> None:
        parts = gradient_TO.float().split(list(self.sizes[key]), dim=1)
        if key not in self.sums:
            self.sums[key] = [Outer(total=part.new_zeros(part.shape[1], part.shape[1])) for part in parts]
        for outer, part_TR in zip(self.sums[key], parts, strict=True):
            outer.add(part_TR)


def _backward(run: Run, stream: Stream, gradients: Gradients, layer: int, groups: Sequence[Sequence[str]]) -> None:
    model = stream.model
    family, shapes = model.family, model.source.shapes
    inner = [tuple(family.inner_name(n, layer).removesuffix(".weight") for n in names) for names in groups]
    first = {own[0]: names[0] for own, names in zip(inner, groups, strict=True)} | {_METRIC: _METRIC}
    rows = {own[0]: sum(shapes[n][0] for n in names) for own, names in zip(inner, groups, strict=True)}
    sizes = {key: side_blocks(count, model.shape.hidden) for key, count in rows.items()}
    sizes[_METRIC] = [stream.inputs.shape[1]]
    found = _Found(group_of={name: group for group in inner for name in group}, sizes=sizes)
    backward_layer(stream, gradients, layer, modules=found.group_of, seen=found.take)
    entries: list[Entry] = []
    for key, blocks in sorted(found.sums.items()):
        made = [block.estimate() for block in blocks]
        if all(side_RR is not None for side_RR in made):
            entries += [_entry(f"{first[key]}.{n}", side_RR) for n, side_RR in enumerate(made) if side_RR is not None]
    _keep_gradient(run, gradients, layer)
    with phase("write", size=sum(entry.bytes for entry in entries)):
        run.write(_factors(layer), f"{_factors(layer)}.safetensors", lambda path: write_shard(path, entries))
    run.drop(_gradient(layer + 1))
    run.drop(_hidden(layer))


def _entry(name: str, side_RR: Tensor) -> Entry:
    """In fp16, which holds it: no number is above the number of rows."""
    return tensor_entry(name, side_RR.clamp(-_LARGEST, _LARGEST).half().cpu())


def read_side(run: Pieces, layer: int, name: str = _METRIC) -> tuple[Tensor, ...] | None:
    """B of a group of Linears by the name on disk of the first, or the metric, fp32 [R, R] down the diagonal.

    Each block has a mean diagonal of 1. None where nothing is known: an MTP layer, a part that no gradient reached.
    """
    piece = run.done(_factors(layer))
    if piece is None:
        return None
    stored = read_header(run.path(piece))
    blocks: list[Tensor] = []
    while (entry := stored.get(f"{name}.{len(blocks)}")) is not None:
        with phase("read", size=entry.bytes):
            blocks.append(read_tensor(entry).float())
    return tuple(blocks) or None


def factor_pieces(run: Run) -> list[Piece]:
    """The factors of all layers."""
    return [piece for name, piece in run.pieces.items() if name.startswith(_factors(0).removesuffix("0"))]


def drop_ends(run: Run, layer: int) -> None:
    """Forget a layer's factors, once it is quantized and kept."""
    run.drop(_factors(layer))


def drop_all_ends(run: Run) -> None:
    """Forget all that is left."""
    for piece in [p for p in run.pieces if p.startswith("end-")]:
        run.drop(piece)
    run.drop(_MARK)
