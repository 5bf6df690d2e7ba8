"""The second stream of `--match original`: the same tokens in the unquantized (but pruned) model.

Both streams are walked layer by layer. The original experts are in hand while they are solved, and are applied to this
one then, so that each is read once. Where nothing but routed experts is quantized in the layers, the rest of a layer is
the same in both streams, and is loaded once too.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from moepress.compress.gptq.include import Include
from moepress.models.forward.streamed import StreamedModel, require_finite_hidden
from moepress.models.forward.walk import Stream, add_output, first_step, last_step
from moepress.models.storage.experts import Expert
from moepress.models.storage.safetensors_file import read_header
from moepress.models.storage.writer import write_shard
from moepress.runs.journal import Run
from moepress.runs.phases import phase


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """The original's stream.

    Attributes:
        stream: like that of the quantized model.
        apart: its layers are loaded for it alone, because Linears of the other stream's layers are quantized.
    """

    stream: Stream
    apart: bool


def open_reference(stream: Stream, include: Iterable[Include], *, embed: bool = True) -> Reference:
    """Buffers as large as those of `stream`, whose windows are embedded; without `embed` nothing is copied."""
    model, scratch, apart = stream.model, stream.scratch, is_apart(include)
    if apart:
        model = StreamedModel(model.source, device=model.device, dtype=model.dtype)
        model.share_embeddings(stream.model)

    def like(name: str, tensor: Tensor) -> Tensor:
        return scratch.tensor(f"reference-{name}", tensor.shape, tensor.dtype)

    reference = Stream(
        model=model,
        limits=stream.limits,
        scratch=scratch,
        windows=stream.windows,
        hidden=like("hidden", stream.hidden),
        inputs=like("inputs", stream.inputs),
        chosen=like("chosen", stream.chosen),
        weights=like("weights", stream.weights),
        sums=None if stream.sums is None else like("sums", stream.sums),
    )
    for window, other in zip(reference.hidden, stream.hidden, strict=True) if embed else ():
        window.copy_(other)
        reference.touch(2 * len(window))
    stream.forget()
    return Reference(stream=reference, apart=apart)


def is_apart(include: Iterable[Include]) -> bool:
    """Whether Linears besides the routed experts are quantized in the layers."""
    return bool(set(include) - {Include.LM_HEAD})


def load_original(reference: Reference, layer: int) -> None:
    """Before the layer's Linears are solved."""
    if reference.apart:
        reference.stream.model.load_layer(layer)


def step_original(reference: Reference, layer: int, *, stepped: bool) -> None:
    """All of a loaded layer but its routed experts, as `first_step` does it for the other stream, if not done yet."""
    if not stepped:
        first_step(reference.stream, layer)
    if reference.apart and reference.stream.sums is None:
        reference.stream.model.unload_layer(layer)


def finish_original(reference: Reference, layer: int) -> None:
    """Once all experts' outputs are added, while the other stream's layer is still loaded too."""
    last_step(reference.stream, layer)
    if reference.apart and reference.stream.sums is not None:
        reference.stream.model.unload_layer(layer)


def add_originals(
    stream: Stream, layer: int, experts: Mapping[int, Expert], positions: Sequence[tuple[Tensor, Tensor]]
) -> None:
    """Add the outputs of original experts (in any dtype) to the tokens that chose them in the original's stream."""
    for expert, weights in experts.items():
        tokens, slots = positions[expert]
        if len(tokens):
            own = weights.to(stream.model.device, stream.model.dtype)
            add_output(stream, stream.flat(), own, tokens, slots, layer)


def check_original(reference: Reference, layer: int) -> None:
    """Refuse NaN or infinity.

    Raises:
        InvalidInputError: naming the layer.
    """
    require_finite_hidden(reference.stream.hidden, layer)


def _piece(layer: int) -> str:
    return f"hidden-original-{layer}"


def save_original(run: Run, reference: Reference, layer: int, *, last: bool) -> None:
    """Keep the hidden states after a layer as a piece: before those of the other stream, which say how far a run is."""
    hidden = reference.stream.hidden
    if not last:
        with phase("hidden states", size=hidden.numel() * hidden.element_size()):
            entries, file = reference.stream.kept(), f"hidden-original-{layer:05d}.safetensors"
            run.write(_piece(layer), file, lambda path: write_shard(path, entries))


def drop_original(run: Run, layer: int) -> None:
    """Forget what was kept after a layer, once both streams are kept after a later one."""
    run.drop(_piece(layer))


def resume_original(run: Run, reference: Reference, first: int, layers: int) -> None:
    """Load what was kept before layer `first` of so many, where a run goes on; nothing at the beginning and the end."""
    piece = run.done(_piece(first - 1)) if 0 < first < layers else None
    if piece is None:
        return
    stored = read_header(run.path(piece))
    with phase("hidden states", size=sum(entry.bytes for entry in stored.values())):
        reference.stream.restore(stored)
