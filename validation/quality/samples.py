"""What models write: the likeliest continuation of the same few beginnings of text, so that a person sees the loss."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from moepress.calibration.corpus import EvaluationCorpus
from moepress.converters.gguf.file import GgufModel
from moepress.converters.mlx.folder import MlxFolder
from moepress.converters.onnx.folder import OnnxFolder
from moepress.errors import MoepressError
from moepress.models.forward.dense import free_memory_bytes, load_dense, release_dense
from moepress.runs.progress import track
from moepress.validation.quality.decoding import Decoder, Sampling, TextStream, TorchDecoder, generate
from moepress.validation.quality.llama_cpp import LlamaDecoder, open_llama
from moepress.validation.quality.measure import Elsewhere, Subject
from moepress.validation.quality.mlx_session import MlxDecoder, MlxSession
from moepress.validation.quality.onnx_session import OnnxDecoder, open_session
from moepress.validation.quality.reference_file import SavedReference
from moepress.validation.quality.results import Continuation, Sample, Samples

PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 3, 24, 32


def write_samples(
    subjects: Sequence[Subject],
    corpus: EvaluationCorpus,
    tokenizer: Any,
    *,
    device: torch.device,
    dtype: torch.dtype,
    onnx_device: str = "auto",
) -> Samples:
    """Let each model go on from the first tokens of a window of the first few domains, greedily.

    The models are in memory one after the other, and only if each fits.

    Args:
        subjects: the reference first.
        corpus: the evaluation windows.
        tokenizer: a transformers tokenizer.
        device: of models that are no ONNX folders.
        dtype: of their weights in memory.
        onnx_device: `cpu`, `cuda` or `auto`, for ONNX folders.

    Raises:
        MoepressError: a model does not fit into memory, or can not be run.
    """
    for subject in subjects:
        require_room(subject, device, dtype, "to write text")
    prompts = _prompts(corpus)
    written = []
    with track("sample text", len(subjects) * len(prompts), unit="texts") as advance:
        for subject in subjects:
            stop = _stop_tokens(subject, tokenizer)
            written.append(_write(_decoders(subject, device, dtype, onnx_device), prompts, stop, advance))
            release_dense(device)
    rows = [
        Sample(
            domain=domain,
            prompt=text_of(tokenizer, (), ids),
            continuations=tuple(
                _continuation(subject.label, tokenizer, ids, new[number], written[0][number])
                for subject, new in zip(subjects, written, strict=True)
            ),
        )
        for number, (domain, ids) in enumerate(prompts)
    ]
    return Samples(prompt_tokens=len(prompts[0][1]), tokens=NEW_TOKENS, rows=tuple(rows))


def _prompts(corpus: EvaluationCorpus) -> list[tuple[str, list[int]]]:
    """The beginning of the first window of each of the first domains."""
    length = min(PROMPT_TOKENS, max(1, int(corpus.windows.shape[1]) // 2))
    domains = list(corpus.domain_index.tolist())
    return [
        (name, corpus.windows[domains.index(number), :length].tolist())
        for number, name in enumerate(corpus.domains[:PROMPTS])
    ]


def require_room(subject: Subject, device: torch.device, dtype: torch.dtype, why: str) -> None:
    """Refuse a model that does not fit into the memory that is free.

    Raises:
        MoepressError: it does not.
    """
    whole = isinstance(subject.source, Elsewhere)
    needed = subject.stored_bytes if whole else subject.parameters * dtype.itemsize
    free = free_memory_bytes(torch.device("cpu") if whole else device)
    if needed > free:
        raise MoepressError(
            f"{subject.label} needs {needed / 2**30:.1f} GiB of memory {why}, and {free / 2**30:.1f} GiB are free."
        )


def _decoders(subject: Subject, device: torch.device, dtype: torch.dtype, onnx_device: str) -> Callable[[], Decoder]:
    """Loads the model; what it gives makes decoders with nothing in their cache, and holds the model."""
    if isinstance(subject.source, Elsewhere):
        return decoders_elsewhere(subject.source, onnx_device, PROMPT_TOKENS + NEW_TOKENS)
    assert not isinstance(subject.source, SavedReference), "who saves predictions alone writes nothing"
    model = load_dense(subject.source, device=device, dtype=dtype)
    return lambda: TorchDecoder(model)


def decoders_elsewhere(source: Elsewhere, onnx_device: str, tokens: int) -> Callable[[], Decoder]:
    """The same for what has a runtime of its own; one decoder at a time, of sequences of so many tokens at most."""
    if isinstance(source, OnnxFolder):
        session = open_session(source, onnx_device)
        return lambda: OnnxDecoder(session)
    if isinstance(source, GgufModel):
        llama = open_llama(source.file, context=min(source.context, tokens))
        return lambda: LlamaDecoder(llama)
    assert isinstance(source, MlxFolder)
    in_mlx = MlxSession(source)
    return lambda: MlxDecoder(in_mlx)


def _write(
    fresh: Callable[[], Decoder],
    prompts: Sequence[tuple[str, list[int]]],
    stop: frozenset[int],
    advance: Callable[[int], None],
) -> list[list[int]]:
    written = []
    for _, ids in prompts:
        new = generate(fresh(), ids, max_new_tokens=NEW_TOKENS, stop=stop, sampling=Sampling())
        written.append(list(new))
        advance(1)
    return written


def _stop_tokens(subject: Subject, tokenizer: Any) -> frozenset[int]:
    """End-of-text tokens of the config and the tokenizer."""
    stated = (
        None if isinstance(subject.source, Elsewhere | SavedReference) else subject.source.config.get("eos_token_id")
    )
    numbers = [*(stated if isinstance(stated, list) else [stated]), getattr(tokenizer, "eos_token_id", None)]
    return frozenset(number for number in numbers if isinstance(number, int))


def _continuation(
    label: str, tokenizer: Any, prompt: Sequence[int], new: Sequence[int], reference: Sequence[int]
) -> Continuation:
    pairs = enumerate(zip(new, reference, strict=False))
    same = next((place for place, (one, other) in pairs if one != other), min(len(new), len(reference)))
    return Continuation(subject=label, text=text_of(tokenizer, prompt, new), tokens=len(new), same_tokens=same)


def text_of(tokenizer: Any, before: Sequence[int], ids: Sequence[int]) -> str:
    """The text of some tokens, as it goes on behind those before it."""
    pieces = TextStream(tokenizer, before=before)
    return "".join([*map(pieces.push, ids), pieces.flush()])
