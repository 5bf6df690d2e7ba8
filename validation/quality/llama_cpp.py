"""A GGUF file in llama.cpp, fed token by token or window by window.

Letters: S tokens given, V vocabulary, T tokens of a window, N windows, R positions.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moepress.converters.gguf.runtime import Llama, exact_context, require_llama
from moepress.errors import InvalidInputError, MoepressError

_CHUNK = 512  # tokens of a text that go through together


@dataclass(slots=True, kw_only=True)
class LlamaSession:
    """A model in llama.cpp with one context, whose cache holds one sequence.

    Attributes:
        file: the GGUF file, the first where there are several.
        vocabulary: number of token ids.
        context: tokens that the cache holds.
        length: tokens in it.
    """

    file: Path
    llama: Llama
    model: Any
    state: Any
    vocabulary: int
    context: int
    trained_context: int
    length: int = 0

    @property
    def provider(self) -> str:
        """What computes."""
        return "CPU"

    def clear(self) -> None:
        """Forget all tokens."""
        call = self.llama.call
        call["memory_clear"](call["get_memory"](self.state), True)
        self.length = 0

    def logits(self, tokens: Sequence[int], *, last: bool = False) -> Tensor:
        """fp32 logits [S, V] of the tokens given (with `last` [1, V], of the last), which go into the cache.

        Raises:
            MoepressError: llama.cpp can not go on: the cache is full.
        """
        call, count = self.llama.call, len(tokens)
        batch = call["batch_init"](count, 0, 1)
        try:
            batch.n_tokens = count
            for place, token in enumerate(tokens):
                batch.token[place], batch.pos[place] = int(token), self.length + place
                batch.n_seq_id[place], batch.seq_id[place][0] = 1, 0
                batch.logits[place] = not last or place == count - 1
            if call["decode"](self.state, batch):
                raise MoepressError(f"llama.cpp stopped in {self.file} ({self._why()}).")
            self.length += count
            rows = range(count - 1, count) if last else range(count)
            out = torch.empty(len(rows), self.vocabulary)
            for row, place in enumerate(rows):
                pointer = call["get_logits_ith"](self.state, place)
                out[row] = torch.from_numpy(np.ctypeslib.as_array(pointer, (self.vocabulary,)))
        finally:
            call["batch_free"](batch)
        if not bool(torch.isfinite(out).all()):
            raise InvalidInputError(f"{self.file} gives NaN or Inf logits in llama.cpp; make it again.")
        return out

    def tokenize(self, text: str, *, special: bool = True, dressed: bool = False) -> list[int]:
        """Token ids of a text, as llama.cpp splits it.

        Args:
            text: what is split.
            special: names of special tokens in the text are those tokens.
            dressed: with the tokens that a text begins or ends with.
        """
        call, raw = self.llama.call, text.encode()
        import ctypes

        room = (ctypes.c_int32 * (len(raw) + 16))()
        vocabulary = call["model_get_vocab"](self.model)
        count = call["tokenize"](vocabulary, raw, len(raw), room, len(room), dressed, special)
        return list(room[: max(0, count)])

    def close(self) -> None:
        """Free the model."""
        if self.model is not None:
            self.llama.call["free"](self.state)
            self.llama.call["model_free"](self.model)
            self.model = self.state = None

    def _why(self) -> str:
        said, self.llama.said[:] = list(self.llama.said), []
        return said[-1] if said else "it does not say why"


def open_llama(file: Path, *, context: int | None = None, threads: int | None = None) -> LlamaSession:
    """Load a GGUF file in llama.cpp, on the CPU, with its cache in fp32.

    What would make llama.cpp abort the process is for `validation.rules` to refuse before.

    Args:
        file: the first of its parts.
        context: tokens of the cache; None: 512.
        threads: None: as torch has.

    Raises:
        UnsupportedError: xllamacpp is not installed.
        InvalidInputError: llama.cpp refuses the file.
    """
    llama = require_llama()
    llama.said.clear()
    call = llama.call
    model = call["model_load_from_file"](os.fsencode(file), call["model_default_params"]())
    if not model:
        why = next((line for line in llama.said if "error" in line), "it does not say why")
        raise InvalidInputError(f"llama.cpp can not load {file} ({why[:200]}).")
    tokens = context or _CHUNK
    state = call["init_from_model"](model, exact_context(llama, tokens, threads or torch.get_num_threads()))
    if not state:
        call["model_free"](model)
        why = next(iter(llama.said), "it does not say why")
        raise MoepressError(
            f"llama.cpp can not make a context of {tokens} tokens for {file} ({why[:200]}); free some memory, or make "
            "the file again."
        )
    return LlamaSession(
        file=file,
        llama=llama,
        model=model,
        state=state,
        vocabulary=int(call["vocab_n_tokens"](call["model_get_vocab"](model))),
        context=tokens,
        trained_context=int(call["model_n_ctx_train"](model)),
    )


def read_logits(session: LlamaSession, windows_NT: Tensor) -> Callable[[int], Tensor]:
    """A reader: logits fp32 [R, V] of the next R positions, counted through all windows without their last tokens."""
    per_window, start = windows_NT.shape[1] - 1, 0

    def read(count: int) -> Tensor:
        nonlocal start
        logits_RV, filled = torch.empty(count, session.vocabulary), 0
        while filled < count:
            window, place = divmod(start, per_window)
            if place == 0:
                session.clear()
            given = min(count - filled, per_window - place)
            ids = windows_NT[window, place : place + given].tolist()
            logits_RV[filled : filled + given] = session.logits(ids)
            start, filled = start + given, filled + given
        return logits_RV

    return read


class LlamaDecoder:
    """A session as a `Decoder` of `validation.quality.decoding`: one sequence, its own cache."""

    def __init__(self, session: LlamaSession) -> None:
        session.clear()
        self.context, self.vocabulary, self.provider = session.context, session.vocabulary, session.provider
        self._session = session

    def step(self, tokens_1S: Tensor) -> Tensor:
        """New tokens int64 [1, S] to fp32 logits [1, V] of the last one."""
        for chunk in torch.split(tokens_1S[0], _CHUNK):
            logits = self._session.logits(chunk.tolist(), last=True)
        return logits
