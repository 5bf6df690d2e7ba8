"""Models in whatever runtime they have, as what tasks need: logits behind a prompt, and the likeliest tokens after it.

Letters: B batch, S tokens of the longest input, K positions that are kept, V vocabulary.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from moepress.converters.gguf.file import GgufModel
from moepress.converters.gguf.runtime import llama_version
from moepress.converters.mlx.folder import MlxFolder, mlx_version
from moepress.converters.onnx.folder import OnnxFolder
from moepress.converters.onnx.runtime import require_onnxruntime
from moepress.errors import InvalidInputError, UsageError
from moepress.models.forward.dense import load_dense, release_dense
from moepress.validation.quality.decoding import Decoder, Sampling, generate
from moepress.validation.quality.llama_cpp import LlamaDecoder, LlamaSession, open_llama
from moepress.validation.quality.measure import Subject
from moepress.validation.quality.mlx_session import MlxDecoder, MlxSession
from moepress.validation.quality.onnx_session import Decoding, OnnxDecoder, open_session
from moepress.validation.quality.reference_file import SavedReference

_CHUNK = 256  # tokens that go through a session together
_BATCH_TOKENS = 4096  # of inputs that go through a model in torch together
_BATCH_LOGITS = 1 << 28  # bytes of their logits
_BATCH_PROMPTS = 8  # that are written on together


@dataclass(frozen=True, slots=True, kw_only=True)
class Input:
    """Tokens, and the first position whose logits are wanted.

    Attributes:
        tokens: at least one.
        first: from here on to the end.
    """

    tokens: tuple[int, ...]
    first: int


Ended = Callable[[Sequence[int]], bool]
"""Whether new tokens are enough."""


class Runner(Protocol):
    """A loaded model."""

    @property
    def runtime(self) -> str:
        """What computes, with its version."""

    def logits(self, inputs: Sequence[Input]) -> Iterator[Tensor]:
        """For each input, in order, fp32 logits [its tokens - first, V] on the CPU."""

    def greedy(
        self, prompts: Sequence[Sequence[int]], *, room: int, stop: frozenset[int], ended: Ended
    ) -> Iterator[list[int]]:
        """For each prompt, in order, the likeliest new tokens.

        Args:
            prompts: none is empty.
            room: new tokens at most.
            stop: end-of-text tokens, which are the last ones given.
            ended: asked after each token.
        """

    def close(self) -> None:
        """Give its memory back."""


class TorchRunner:
    """A model of transformers; inputs go through in batches, padded behind, where causal models do not look."""

    def __init__(self, model: Any, *, device: torch.device, dtype: torch.dtype) -> None:
        import transformers

        self._model, self._device = model, device
        self._vocabulary = int(model.config.get_text_config().vocab_size)
        self.runtime = f"transformers {transformers.__version__}, {str(dtype).removeprefix('torch.')} on {device}"

    def logits(self, inputs: Sequence[Input]) -> Iterator[Tensor]:
        """See `Runner.logits`."""
        start = 0
        while start < len(inputs):
            batch = inputs[start : start + self._fitting(inputs[start:])]
            yield from self._batch(batch)
            start += len(batch)

    def _fitting(self, inputs: Sequence[Input]) -> int:
        """How many of the first inputs go together."""
        longest, first = 0, inputs[0].first
        for count, one in enumerate(inputs, start=1):
            longest, first = max(longest, len(one.tokens)), min(first, one.first)
            logits_bytes = count * (longest - first) * self._vocabulary * 4
            if count > 1 and (count * longest > _BATCH_TOKENS or logits_bytes > _BATCH_LOGITS):
                return count - 1
        return len(inputs)

    def _batch(self, batch: Sequence[Input]) -> Iterator[Tensor]:
        longest = max(len(one.tokens) for one in batch)
        kept = longest - min(one.first for one in batch)
        tokens_BS = torch.zeros(len(batch), longest, dtype=torch.int64)
        for row, one in enumerate(batch):
            tokens_BS[row, : len(one.tokens)] = torch.tensor(one.tokens)
        with torch.inference_mode():
            made = self._model(tokens_BS.to(self._device), use_cache=False, logits_to_keep=kept)
            logits_BKV = made.logits.float().cpu()
        skipped = longest - kept
        for row, one in enumerate(batch):
            yield logits_BKV[row, one.first - skipped : len(one.tokens) - skipped]

    def greedy(
        self, prompts: Sequence[Sequence[int]], *, room: int, stop: frozenset[int], ended: Ended
    ) -> Iterator[list[int]]:
        """See `Runner.greedy`; prompts are padded before, under a mask."""
        for start in range(0, len(prompts), _BATCH_PROMPTS):
            yield from self._written(prompts[start : start + _BATCH_PROMPTS], room, stop, ended)

    def _written(
        self, prompts: Sequence[Sequence[int]], room: int, stop: frozenset[int], ended: Ended
    ) -> Iterator[list[int]]:
        from transformers import GenerationConfig

        longest, padding = max(map(len, prompts)), min(stop, default=0)
        tokens_BS = torch.full((len(prompts), longest), padding, dtype=torch.int64)
        mask_BS = torch.zeros_like(tokens_BS)
        for row, prompt in enumerate(prompts):
            tokens_BS[row, longest - len(prompt) :] = torch.tensor(list(prompt))
            mask_BS[row, longest - len(prompt) :] = 1

        def all_ended(seen_BS: Tensor, _scores: Any, **_: Any) -> Tensor:
            new = seen_BS[:, longest:].tolist()
            return torch.tensor([ended(one) for one in new], device=seen_BS.device)

        config = GenerationConfig(
            do_sample=False,
            max_new_tokens=room,
            eos_token_id=sorted(stop) or None,
            pad_token_id=padding,
        )
        with torch.inference_mode():
            made = self._model.generate(
                tokens_BS.to(self._device),
                attention_mask=mask_BS.to(self._device),
                generation_config=config,
                stopping_criteria=[all_ended],
            )
        for new in made[:, longest:].tolist():
            yield _until_end(new, stop, ended)

    def close(self) -> None:
        """See `Runner.close`."""
        self._model = None
        release_dense(self._device)


def _until_end(new: list[int], stop: frozenset[int], ended: Ended) -> list[int]:
    """Without what was written while others of a batch went on."""
    kept: list[int] = []
    for token in new:
        kept.append(token)
        if token in stop or ended(kept):
            break
    return kept


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """A session of another runtime, as functions.

    Attributes:
        runtime: what computes, with its version.
        start: for sequences of so many tokens, a function that appends tokens to a new one: fp32 logits [S, V], or with
            True those of the last token alone [1, V].
        decoder: for sequences of so many tokens, a decoder with nothing in its cache.
        close: gives the memory back.
    """

    runtime: str
    start: Callable[[int], Callable[[Sequence[int], bool], Tensor]]
    decoder: Callable[[int], Decoder]
    close: Callable[[], None] = lambda: None


class SessionRunner:
    """A session as a `Runner`: one sequence at a time."""

    def __init__(self, session: Session) -> None:
        self._session, self.runtime = session, session.runtime

    def logits(self, inputs: Sequence[Input]) -> Iterator[Tensor]:
        """See `Runner.logits`."""
        longest = max((len(one.tokens) for one in inputs), default=0)
        for one in inputs:
            push = self._session.start(longest)
            for chunk in _chunks(one.tokens[: one.first]):
                push(chunk, True)
            yield torch.cat([push(chunk, False) for chunk in _chunks(one.tokens[one.first :])])

    def greedy(
        self, prompts: Sequence[Sequence[int]], *, room: int, stop: frozenset[int], ended: Ended
    ) -> Iterator[list[int]]:
        """See `Runner.greedy`."""
        longest = max(map(len, prompts), default=0) + room
        for prompt in prompts:
            new: list[int] = []
            decoder = self._session.decoder(longest)
            for token in generate(decoder, list(prompt), max_new_tokens=room, stop=stop, sampling=Sampling()):
                new.append(token)
                if ended(new):
                    break
            yield new

    def close(self) -> None:
        """See `Runner.close`."""
        self._session.close()


def _chunks(tokens: Sequence[int]) -> Iterator[Sequence[int]]:
    for start in range(0, len(tokens), _CHUNK):
        yield tokens[start : start + _CHUNK]


def open_runner(subject: Subject, *, device: torch.device, dtype: torch.dtype, onnx_device: str = "auto") -> Runner:
    """Load a model in the runtime that it has.

    Args:
        subject: one side of a comparison.
        device: of models that transformers runs.
        dtype: of their weights in memory.
        onnx_device: `cpu`, `cuda` or `auto`, for ONNX folders.

    Raises:
        UsageError: it is a saved reference.
        MoepressError: it does not fit into memory, or can not be run.
    """
    source = subject.source
    if isinstance(source, SavedReference):
        raise UsageError(
            f"{subject.label} is a saved reference and can not be asked; give the model itself."
        )
    if isinstance(source, OnnxFolder):
        return SessionRunner(_onnx(source, onnx_device))
    if isinstance(source, GgufModel):
        return SessionRunner(_llama(source))
    if isinstance(source, MlxFolder):
        return SessionRunner(_mlx(source))
    return TorchRunner(load_dense(source, device=device, dtype=dtype), device=device, dtype=dtype)


def _onnx(folder: OnnxFolder, device: str) -> Session:
    model = open_session(folder, device, exact=not folder.int8_activations)

    def start(_longest: int) -> Callable[[Sequence[int], bool], Tensor]:
        decoding = Decoding(model)

        def push(tokens: Sequence[int], last: bool) -> Tensor:
            logits = decoding.step(torch.tensor([list(tokens)]))[0]
            return logits[-1:] if last else logits

        return push

    return Session(
        runtime=f"ONNX Runtime {require_onnxruntime().__version__}, provider {model.provider}",
        start=start,
        decoder=lambda _longest: OnnxDecoder(model),
    )


def _llama(model: GgufModel) -> Session:
    open_now: list[LlamaSession] = []

    def session(longest: int) -> LlamaSession:
        """One whose cache holds so many tokens: llama.cpp makes room for all of it before the first."""
        if not open_now or open_now[0].context < longest:
            close()
            open_now.append(open_llama(model.file, context=min(model.context, max(longest, 2 * _CHUNK))))
        return open_now[0]

    def start(longest: int) -> Callable[[Sequence[int], bool], Tensor]:
        own = session(longest)
        own.clear()
        return lambda tokens, last: own.logits(tokens, last=last)

    def close() -> None:
        while open_now:
            open_now.pop().close()

    return Session(
        runtime=f"llama.cpp {llama_version()}",
        start=start,
        decoder=lambda longest: LlamaDecoder(session(longest)),
        close=close,
    )


def _mlx(folder: MlxFolder) -> Session:
    session = MlxSession(folder)

    def start(_longest: int) -> Callable[[Sequence[int], bool], Tensor]:
        session.clear()
        return lambda tokens, last: session.logits(tokens)[-1:] if last else session.logits(tokens)

    return Session(runtime=f"mlx-lm {mlx_version()}", start=start, decoder=lambda _longest: MlxDecoder(session))


@contextlib.contextmanager
def opened_runner(
    subject: Subject, *, device: torch.device, dtype: torch.dtype, onnx_device: str = "auto"
) -> Iterator[Runner]:
    """`open_runner`, closed at the end."""
    runner = open_runner(subject, device=device, dtype=dtype, onnx_device=onnx_device)
    try:
        yield runner
    finally:
        runner.close()


def require_finite(logits: Tensor, what: str) -> None:
    """Refuse logits that are no numbers.

    Raises:
        InvalidInputError: naming the model.
    """
    if not bool(torch.isfinite(logits).all()):
        raise InvalidInputError(f"{what} gives NaN or Inf logits; use --dtype float32, or make the model again.")
