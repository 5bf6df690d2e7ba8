"""Quality of several models on the same windows, a few positions of the logits at a time.

A model folder has one streamed forward, then its head chunk by chunk; an ONNX folder goes through its session window by
window. Shapes: N windows, T tokens in a window, H hidden size, V vocabulary, R rows (positions) in a chunk.
"""

import dataclasses
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from moepress.calibration.corpus import EvaluationCorpus
from moepress.converters.gguf.file import GgufModel
from moepress.converters.mlx.folder import MlxFolder, mlx_version
from moepress.converters.onnx.folder import OnnxFolder
from moepress.converters.safetensors.artifact import Artifact
from moepress.errors import InvalidInputError, UsageError
from moepress.models.forward.streamed import StreamedModel
from moepress.models.forward.walk import Limits, Scratch, forward
from moepress.models.storage.checkpoint import Source
from moepress.validation.quality.reference_file import SavedReference
from moepress.validation.quality.results import Quality, QualityRow, RoutingRow
from moepress.validation.quality.routing import Changes, Choices, Kept, Routers, same_experts
from moepress.validation.quality.scores import Pass, Reader, Reference, TokenScores, quality_rows, score_tokens

CONVENTION = (
    'GPTQ papers: each domain\'s documents joined with "\\n\\n", one tokenizer call, windows that do not overlap, '
    "tail dropped; perplexity = exp(mean of window means)"
)


Elsewhere = OnnxFolder | GgufModel | MlxFolder
"""What runs in a runtime of its own, and not layer by layer in torch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """A model to be measured.

    Attributes:
        label: its name in the report, unique.
        source: its weights, what another runtime runs, or (of the first alone) what was kept of its predictions.
        folder: where it lies as a folder that its runtime can load; None: only in memory, so no throughput.
        stored_bytes: size of its weights on disk.
        parameters: how many weights it has when dense.
        parts: stored bytes by part of the model; empty where they are not known.
        kept: which experts of its original it has; None: all, or nobody knows.
    """

    label: str
    source: Source | Elsewhere | SavedReference
    folder: Path | None
    stored_bytes: int
    parameters: int
    parts: Mapping[str, int] = field(default_factory=dict)
    kept: Kept | None = None


def measure(
    subjects: Sequence[Subject],
    corpus: EvaluationCorpus,
    *,
    device: torch.device,
    dtype: torch.dtype,
    limits: Limits,
    scratch_folder: Path,
    onnx_device: str = "auto",
    seen: Callable[[Tensor, Tensor], None] | None = None,
) -> Quality:
    """Measure all subjects on all windows; the first subject is the reference that the others are paired with.

    At any time the hidden states and the heads, or the sessions, of at most two subjects are held, and no more than
    `LOGITS_BYTES` of logits; of the reference also what its routers chose. An ONNX folder as reference is computed anew
    for each other subject.

    Args:
        subjects: at least one, with different labels and vocabularies of the same size.
        corpus: from `evaluation_windows`.
        device: where the models run that are no ONNX folders.
        dtype: their compute dtype; log-probabilities are fp32, means fp64.
        limits: from `choose_limits`.
        scratch_folder: where buffers go that do not fit into memory; made if it is not there, left as it was.
        onnx_device: `cpu`, `cuda` or `auto`, for ONNX folders.
        seen: is shown the log-probabilities [R, V] of the first subject, and the tokens [R] that follow in the text.

    Raises:
        UsageError: no subject, or two of the same label.
        InvalidInputError: vocabularies differ, tokens lie outside of them, or a model gives NaN.
    """
    vocabulary = _common_vocabulary(subjects)
    corpus.require_vocabulary(vocabulary)
    scratch_folder.mkdir(parents=True, exist_ok=True)
    half = Limits(memory_bytes=limits.memory_bytes // 2, batch_windows=limits.batch_windows)
    place = _Place(device=device, dtype=dtype, limits=half, onnx_device=onnx_device)
    rows, routing, choices = list[QualityRow](), list[RoutingRow](), _choices(subjects)
    with torch.inference_mode(), tempfile.TemporaryDirectory(dir=scratch_folder, prefix="validate-") as name:
        folder = Path(name)
        with _passed(subjects[0], corpus, place, folder, choices) as before:
            reference = _scores(subjects[0].label, before, None, corpus.windows, seen=seen)
            rows += quality_rows(subjects[0].label, corpus, reference)
            runtimes = {subjects[0].label: before.runtime}
            for subject in subjects[1:]:
                changes = _changes(subjects[0], subject, choices, len(corpus.windows))
                with _passed(subject, corpus, place, folder, changes) as after:
                    scores = _scores(subject.label, after, before, corpus.windows)
                rows += quality_rows(subject.label, corpus, scores)
                routing += [] if changes is None else changes.rows(subject.label, corpus)
                runtimes[subject.label] = after.runtime
    quality = _quality(corpus, rows, vocabulary, device, dtype)
    notes = [note for subject in subjects for note in _onnx_notes(subject)]
    first = subjects[0].source
    return dataclasses.replace(
        quality,
        runtimes=runtimes,
        routing=tuple(routing),
        notes=(*quality.notes, *notes),
        saved=first.summary if isinstance(first, SavedReference) else None,
    )


def _routers(subject: Subject) -> Routers | None:
    """Its routers, where they are seen: another runtime shows none, and nothing is kept of them."""
    return (
        None
        if isinstance(subject.source, Elsewhere | SavedReference)
        else Routers(source=subject.source, kept=subject.kept)
    )


def _choices(subjects: Sequence[Subject]) -> Choices | None:
    """A place for what the first subject's routers choose, where another's are seen too."""
    first, *others = map(_routers, subjects)
    return Choices(first.source.outline.moe_layers) if first is not None and any(others) else None


def _changes(first: Subject, other: Subject, choices: Choices | None, windows: int) -> Changes | None:
    """Compares another subject's routers; None where they are not seen, or nothing tells which experts are the same."""
    before, after = _routers(first), _routers(other)
    if choices is None or before is None or after is None:
        return None
    numbers = same_experts(before, after)
    return None if numbers is None else Changes(choices=choices, numbers=numbers, windows=windows)


def _quality(
    corpus: EvaluationCorpus, rows: Sequence[QualityRow], vocabulary: int, device: torch.device, dtype: torch.dtype
) -> Quality:
    windows, length = corpus.windows.shape
    return Quality(
        convention=CONVENTION,
        window=length,
        windows=windows,
        tokens=windows * (length - 1),
        bos_policy=corpus.bos_policy,
        digest=corpus.digest,
        embedded=corpus.embedded,
        bytes_exact=corpus.bytes_exact,
        vocabulary=vocabulary,
        device=str(device),
        dtype=str(dtype).removeprefix("torch."),
        domains=corpus.domains,
        rows=tuple(rows),
        notes=corpus.notes,
    )


def _common_vocabulary(subjects: Sequence[Subject]) -> int:
    labels = [subject.label for subject in subjects]
    if not labels or len(set(labels)) != len(labels):
        raise UsageError(f"Subjects need different names; these were given: {', '.join(labels) or 'none'}.")
    sizes = [vocabulary_of(subject.source) for subject in subjects]
    for label, size in zip(labels, sizes, strict=True):
        if size != sizes[0]:
            raise InvalidInputError(
                f"{labels[0]} has a vocabulary of {sizes[0]} and {label} one of {size}, so they can not be "
                "compared; give models with the same tokenizer."
            )
    return sizes[0]


def vocabulary_of(source: Source | Elsewhere | SavedReference) -> int:
    """Number of tokens that a model knows."""
    if isinstance(source, Elsewhere | SavedReference):
        return source.vocabulary
    return source.outline.shape.vocabulary


@dataclass(frozen=True, slots=True, kw_only=True)
class _Place:
    device: torch.device
    dtype: torch.dtype
    limits: Limits
    onnx_device: str


@contextmanager
def _passed(
    subject: Subject, corpus: EvaluationCorpus, place: _Place, folder: Path, routers: Choices | Changes | None
) -> Iterator[Pass | SavedReference]:
    """A subject after its forward pass, seen by `routers`, or in its session; its buffers are freed at the end."""
    if isinstance(subject.source, SavedReference):
        yield subject.source
        return
    if isinstance(subject.source, OnnxFolder):
        yield _onnx_pass(subject.source, corpus.windows, place.onnx_device)
        return
    if isinstance(subject.source, GgufModel):
        with _llama_pass(subject.source, corpus.windows) as passed:
            yield passed
        return
    if isinstance(subject.source, MlxFolder):
        yield _mlx_pass(subject.source, corpus.windows)
        return
    own = Path(tempfile.mkdtemp(dir=folder))
    scratch = Scratch(own, place.limits.memory_bytes)
    try:
        model = StreamedModel(subject.source, device=place.device, dtype=place.dtype)
        hidden = forward(
            model,
            corpus.windows,
            scratch,
            place.limits,
            title=f"{subject.label}: forward",
            chose=None if routers is None else lambda layer, chosen: routers.see(layer, chosen, scratch),
        )
        head, dtype = model.head(), str(place.dtype).removeprefix("torch.")
        runtime = f"torch {torch.__version__} layer by layer, {dtype} on {place.device}"
        if isinstance(subject.source, Artifact):
            kept = "bfloat16" if subject.source.floats else "the dtype of their scales"
            runtime += f", codes multiplied out in {'float32' if subject.source.exact else kept}"
        yield hidden_pass(hidden, lambda rows: head(rows.to(place.device)), runtime)
    finally:
        scratch.close()


def hidden_pass(hidden: Tensor, head: Callable[[Tensor], Tensor], runtime: str) -> Pass:
    """A pass from hidden states before the final norm, [N, T, H] on the CPU, and the head that makes logits of them."""
    per_window = hidden.shape[1] - 1

    def reader() -> Reader:
        start = 0

        def read(count: int) -> Tensor:
            nonlocal start
            rows = torch.arange(start, start + count)
            start += count
            return head(hidden[rows // per_window, rows % per_window])

        return read

    return Pass(reader=reader, runtime=runtime)


def _onnx_pass(folder: OnnxFolder, windows_NT: Tensor, device: str) -> Pass:
    from moepress.converters.onnx.runtime import require_onnxruntime
    from moepress.validation.quality.onnx_session import open_session, read_logits

    # An export with int8 activations is measured as such; elsewhere our numbers are those of the weights.
    model = open_session(folder, device, exact=not folder.int8_activations)
    activations = "int8 activations" if folder.int8_activations else f"{folder.dtype} activations"
    runtime = f"ONNX Runtime {require_onnxruntime().__version__}, {activations}, provider {model.provider}"
    return Pass(reader=lambda: read_logits(model, windows_NT), runtime=runtime)


@contextmanager
def _llama_pass(model: GgufModel, windows_NT: Tensor) -> Iterator[Pass]:
    from moepress.converters.gguf.runtime import llama_version
    from moepress.validation.quality.llama_cpp import open_llama, read_logits

    session = open_llama(model.file, context=int(windows_NT.shape[1]))
    activations = "8-bit activations where weights are codes" if model.rounds_activations else "float32 activations"
    try:
        runtime = f"llama.cpp {llama_version()}, {activations}, provider {session.provider}"
        yield Pass(reader=lambda: read_logits(session, windows_NT), runtime=runtime)
    finally:
        session.close()


def _mlx_pass(folder: MlxFolder, windows_NT: Tensor) -> Pass:
    from moepress.validation.quality.mlx_session import MlxSession, read_logits

    session = MlxSession(folder)
    runtime = f"mlx-lm {mlx_version()}, float32, {session.provider}"
    return Pass(reader=lambda: read_logits(session, windows_NT), runtime=runtime)


def _onnx_notes(subject: Subject) -> list[str]:
    """What the reader must know of an ONNX folder whose speed and quality are not those of the same arithmetic."""
    folder = subject.source
    if isinstance(folder, SavedReference):
        saved = folder.summary
        return [
            (
                f"{subject.label} was not run: {saved.file} keeps the {saved.top} likeliest tokens of each position, "
                f"and the others, {100 * saved.rest:.2g} % of the probability, as one. KL divergences are lower "
                "bounds; all else is exact."
            )
        ]
    if isinstance(folder, GgufModel) and folder.rounds_activations:
        return [
            (
                f"{subject.label}: llama.cpp rounds activations to 8 bits where weights are codes, on the CPU and with "
                "CUDA alike, which is in its figures; a file of `export --to gguf --outtype f32` has the same weights "
                "without."
            )
        ]
    if not isinstance(folder, OnnxFolder):
        return []
    if folder.int8_activations:
        return [f"{subject.label}: measured with int8 activations, as it was exported (accuracy level 4)."]
    bits = folder.summary.get("bits") if folder.summary.get("kernel") == "qmoe" else None
    if bits == 8:
        own = "quality is measured with fp32 activations (ORT_QMOE_CPU_QNBIT_GEMM=0)"
        usual = "without that, and in the throughput, ONNX Runtime's CPU kernel rounds those of 8-bit experts to int8"
        return [f"{subject.label}: {own}; {usual}."]
    if bits == 2:
        return [f"{subject.label}: ONNX Runtime's CPU kernel rounds the activations of 2-bit experts to int8."]
    return []


def _scores(
    label: str,
    subject: Pass | SavedReference,
    reference: Reference | None,
    windows_NT: Tensor,
    seen: Callable[[Tensor, Tensor], None] | None = None,
) -> TokenScores:
    if isinstance(subject, SavedReference):
        return TokenScores(nll=subject.nll, against=None)
    scores = score_tokens(subject, reference, windows_NT, title=f"{label}: scores", seen=seen)
    if not bool(torch.isfinite(scores.nll).all()):
        raise InvalidInputError(f"{label} gives NaN or Inf logits; use --dtype float32, or check the model.")
    return scores
