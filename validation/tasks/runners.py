"""Models as a `Runner` in the runtime that they have: ONNX Runtime, llama.cpp, mlx-lm, else transformers.

Letters: S tokens given, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moepress.converters.gguf.file import GgufModel
from moepress.converters.gguf.runtime import llama_version
from moepress.converters.mlx.folder import MlxFolder, mlx_version
from moepress.converters.onnx.folder import OnnxFolder
from moepress.converters.onnx.runtime import require_onnxruntime
from moepress.errors import UsageError
from moepress.models.forward.dense import load_dense
from moepress.validation.quality.decoding import Decoder, Sampling, generate
from moepress.validation.quality.llama_cpp import LlamaDecoder, LlamaSession, open_llama
from moepress.validation.quality.measure import Subject
from moepress.validation.quality.mlx_session import MlxDecoder, MlxSession
from moepress.validation.quality.onnx_session import Decoding, OnnxDecoder, open_session
from moepress.validation.quality.reference_file import SavedReference
from moepress.validation.tasks.runner import Ended, Input, Runner
from moepress.validation.tasks.torch_runner import TorchRunner

_CHUNK = 256  # tokens that go through a session together


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
        raise UsageError(f"{subject.label} is a saved reference and can not be asked; give the model itself.")
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
