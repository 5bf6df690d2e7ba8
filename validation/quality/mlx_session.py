"""A folder in mlx-lm, computing in fp32: fed token by token or window by window.

Letters: S tokens given, V vocabulary, N windows, T tokens of a window, R positions.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moepress.converters.mlx.folder import MlxFolder, require_mlx
from moepress.errors import InvalidInputError, UnsupportedError

_CHUNK = 256  # tokens of a window that go through together: bounds the logits in memory


class MlxSession:
    """A loaded model; scales and what is not quantized are cast to fp32, codes stay."""

    def __init__(self, folder: MlxFolder) -> None:
        require_mlx()
        import mlx.core as mx
        from mlx_lm.models.cache import make_prompt_cache
        from mlx_lm.utils import load_model

        self.folder, self._mx, self._fresh = folder, mx, make_prompt_cache
        try:
            self._model, _ = load_model(folder.folder, strict=True)
        except Exception as error:  # mlx-lm raises many types here
            why = " ".join(str(error).split())[:200]
            raise UnsupportedError(f"mlx-lm can not load {folder.folder} ({why}).") from error
        self._model.set_dtype(mx.float32)
        self._cache: Any = None
        self.clear()

    @property
    def provider(self) -> str:
        """The device that computes."""
        return str(self._mx.default_device())

    def clear(self) -> None:
        """Forget all tokens."""
        self._cache = self._fresh(self._model)

    def logits(self, tokens: Sequence[int]) -> Tensor:
        """fp32 logits [S, V] of the tokens given, which go into the cache.

        Raises:
            InvalidInputError: they hold NaN.
        """
        ids = self._mx.array(np.asarray(tokens, dtype=np.int32)[None])
        made = self._model(ids, cache=self._cache)[0].astype(self._mx.float32)
        out = torch.from_numpy(np.array(made))
        if not bool(torch.isfinite(out).all()):
            raise InvalidInputError(f"{self.folder.folder} gives NaN or Inf logits in mlx-lm; make it again.")
        return out


def read_logits(session: MlxSession, windows_NT: Tensor) -> Callable[[int], Tensor]:
    """A reader: logits fp32 [R, V] of the next R positions, counted through all windows without their last tokens."""
    per_window, start = windows_NT.shape[1] - 1, 0

    def read(count: int) -> Tensor:
        nonlocal start
        parts, filled = [], 0
        while filled < count:
            window, place = divmod(start, per_window)
            if place == 0:
                session.clear()
            given = min(count - filled, per_window - place, _CHUNK)
            parts.append(session.logits(windows_NT[window, place : place + given].tolist()))
            start, filled = start + given, filled + given
        return torch.cat(parts)

    return read


class MlxDecoder:
    """A session as a `Decoder` of `validation.quality.decoding`: one sequence, its own cache."""

    def __init__(self, session: MlxSession) -> None:
        session.clear()
        self.context, self.vocabulary = session.folder.context, session.folder.vocabulary
        self.provider, self._session = session.provider, session

    def step(self, tokens_1S: Tensor) -> Tensor:
        """New tokens int64 [1, S] to fp32 logits [1, V] of the last one."""
        for chunk in torch.split(tokens_1S[0], _CHUNK):
            logits = self._session.logits(chunk.tolist())
        return logits[-1:]
