"""An ONNX decoder in a session of ONNX Runtime, fed token by token or window by window.

Letters: B batch, S tokens given, P tokens in the cache, V vocabulary, T tokens of a window.
"""

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moepress.converters.onnx.folder import MODEL, OnnxFolder
from moepress.converters.onnx.runtime import CPU_PROVIDER, require_onnxruntime, session_options
from moepress.errors import InvalidInputError, MoepressError, UnsupportedError, UsageError

CUDA_PROVIDER = "CUDAExecutionProvider"
# ONNX Runtime reads this when a session is made: 0 makes 8-bit experts compute with fp32 activations on the CPU.
_INT8_SWITCH = "ORT_QMOE_CPU_QNBIT_GEMM"
_CHUNK = 256  # tokens of a window that go through together: bounds the logits in memory


@dataclass(frozen=True, slots=True, kw_only=True)
class OnnxModel:
    """A session.

    Attributes:
        folder: what it runs.
        session: of ONNX Runtime.
        providers: that it really got, best first.
        number: of the CUDA device.
    """

    folder: OnnxFolder
    session: Any
    providers: tuple[str, ...]
    number: int = 0

    @property
    def provider(self) -> str:
        """The one that runs what it can, without `ExecutionProvider`."""
        return self.providers[0].removesuffix("ExecutionProvider")


def open_session(folder: OnnxFolder, device: str = "auto", *, exact: bool = True, file: str = MODEL) -> OnnxModel:
    """Load a decoder.

    Args:
        folder: from `open_onnx`.
        device: `cpu`, `cuda`, `cuda:1`, or `auto`: CUDA when the folder was made for it and a session gets it, else the
            CPU.
        exact: compute with fp32 activations wherever the CPU kernels can; for measuring quality, not speed.
        file: of the graph, in the folder.

    Raises:
        UsageError: CUDA was asked for and the session did not get it or the graph is not for it, or another device was.
        UnsupportedError: ONNX Runtime is not installed, or has no kernel for a node.
    """
    number = cuda_number(device)
    if number is not None and folder.dtype == "float32" and folder.summary:
        raise UsageError(
            f"--device {device}: {folder.folder} is an fp32 graph, most of which CUDA has no kernels for; export it "
            "again with --for cuda."
        )
    runtime = require_onnxruntime()
    wants_cuda = number is not None or (device == "auto" and folder.summary.get("for") == "cuda")
    wanted: list[Any] = [CPU_PROVIDER]
    if wants_cuda and CUDA_PROVIDER in runtime.get_available_providers():
        wanted.insert(0, (CUDA_PROVIDER, {"device_id": number or 0}))
    options = session_options()
    options.intra_op_num_threads = torch.get_num_threads()
    # Threads that go on spinning after a run slow down whatever comes next, such as another model that is timed.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    with _switch(exact):
        try:
            session = runtime.InferenceSession(str(folder.folder / file), options, providers=wanted)
        except Exception as error:  # ONNX Runtime raises types of its own
            why = " ".join(str(error).split())[:300]
            raise UnsupportedError(f"ONNX Runtime can not load {folder.folder / MODEL} ({why}).") from error
    providers = tuple(session.get_providers())
    model = OnnxModel(folder=folder, session=session, providers=providers, number=number or 0)
    if number is not None and model.providers[0] != CUDA_PROVIDER:
        raise UsageError(
            f"--device {device}: the session got {', '.join(model.providers)} instead of CUDA; `moepress doctor` says "
            "why."
        )
    return model


def cuda_number(device: str) -> int | None:
    """The number in `cuda` (0) or `cuda:1`; None for `cpu` and `auto`.

    Raises:
        UsageError: another device.
    """
    if device in {"auto", "cpu"}:
        return None
    found = re.fullmatch(r"cuda(?::(\d{1,4}))?", device)
    if found is None:
        raise UsageError(f"--device {device}: ONNX models run on cpu, cuda or cuda:1; give one of them, or auto.")
    return int(found[1] or 0)


@contextmanager
def _switch(exact: bool) -> Iterator[None]:
    before = os.environ.get(_INT8_SWITCH)
    if exact:
        os.environ[_INT8_SWITCH] = "0"
    try:
        yield
    finally:
        if exact:
            os.environ.pop(_INT8_SWITCH, None)
            if before is not None:
                os.environ[_INT8_SWITCH] = before


class Decoding:
    """Sequences in the making: one cache, tokens in, logits out."""

    def __init__(self, model: OnnxModel) -> None:
        self.model, self.length = model, 0
        self._cache: list[Any] | None = None
        self._names = [
            f"past_key_values.{layer}.{part}" for layer in range(len(model.folder.caches)) for part in ("key", "value")
        ]
        self._outputs = ["logits", *(name.replace("past_key_values", "present") for name in self._names)]

    def step(self, tokens_BS: Tensor) -> Tensor:
        """Logits fp32 [B, S, V] of the tokens given, int64 [B, S], which go into the cache.

        The CPU continues several sequences by one token at a time only, a single one by any number.

        Raises:
            InvalidInputError: the logits hold NaN.
            MoepressError: ONNX Runtime stops: the graph and its config.json do not agree, or memory ran out.
        """
        runtime = require_onnxruntime()
        batch, given = tokens_BS.shape
        self.length += given
        folder = self.model.folder
        feed: dict[str, Any] = {
            "input_ids": np.ascontiguousarray(tokens_BS.numpy()),
            "attention_mask": np.ones((batch, self.length), dtype=np.int64),
        }
        if "position_ids" in folder.inputs:
            positions = np.arange(self.length - given, self.length, dtype=np.int64)
            feed["position_ids"] = np.tile(positions, (batch, 1))
        cache = self._cache or [runtime.OrtValue.ortvalue_from_numpy(empty) for empty in self._empty(batch)]
        values = {name: runtime.OrtValue.ortvalue_from_numpy(array) for name, array in feed.items()}
        values |= dict(zip(self._names, cache, strict=True))
        try:
            made = self.model.session.run_with_ort_values(self._outputs, values)
        except Exception as error:  # ONNX Runtime raises types of its own
            why = " ".join(str(error).split())[:300]
            raise MoepressError(f"ONNX Runtime stopped in {folder.folder} ({why}); export it again.") from error
        self._cache = made[1:]
        logits = torch.from_numpy(made[0].numpy()).float()
        if not bool(torch.isfinite(logits).all()):
            raise InvalidInputError(f"{folder.folder} gives NaN or Inf logits; export with --for cpu, which is fp32.")
        return logits

    def _empty(self, batch: int) -> list[Any]:
        dtype = np.float32 if self.model.folder.dtype == "float32" else np.float16
        shapes = [(batch, heads, 0, size) for heads, size in self.model.folder.caches for _part in range(2)]
        return [np.zeros(shape, dtype=dtype) for shape in shapes]


def read_logits(model: OnnxModel, windows_NT: Tensor) -> Callable[[int], Tensor]:
    """A reader: logits fp32 [R, V] of the next R positions, counted through all windows without their last tokens.

    Each window has a cache of its own.
    """
    per_window, start, decoding = windows_NT.shape[1] - 1, 0, Decoding(model)

    def read(count: int) -> Tensor:
        nonlocal start, decoding
        logits_RV, filled = torch.empty(count, model.folder.vocabulary), 0
        while filled < count:
            window, place = divmod(start, per_window)
            if place == 0:
                decoding = Decoding(model)
            given = min(count - filled, per_window - place, _CHUNK)
            made = decoding.step(windows_NT[window, place : place + given][None])[0]
            if made.shape[1] != logits_RV.shape[1]:
                raise InvalidInputError(
                    f"{model.folder.folder} gives {made.shape[1]} logits and its config.json has a vocab_size of "
                    f"{logits_RV.shape[1]}; mend the config."
                )
            logits_RV[filled : filled + given] = made
            start, filled = start + given, filled + given
        return logits_RV

    return read


class OnnxDecoder:
    """A session as a `Decoder` of `validation.quality.decoding`: one sequence, its own cache."""

    def __init__(self, model: OnnxModel) -> None:
        self.context, self.vocabulary, self.provider = model.folder.context, model.folder.vocabulary, model.provider
        self._decoding = Decoding(model)

    def step(self, tokens_1S: Tensor) -> Tensor:
        """New tokens int64 [1, S] to fp32 logits [1, V] of the last one."""
        for chunk in torch.split(tokens_1S, _CHUNK, dim=1):
            logits = self._decoding.step(chunk)
        return logits[:, -1]
