"""The packages for GGUF, which are an extra: whether they are there, and llama.cpp's library in one of them.

`gguf` writes and reads the files' heads. `xllamacpp` brings llama.cpp for the CPU; its one shared library exports the
C API of llama.h, which is called through ctypes. What its structures look like changes between releases, so that the
defaults it gives are looked at before any of it is trusted.
"""

import ctypes
import functools
import importlib.metadata
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moepress.errors import UnsupportedError

INSTALL = "pip install 'moepress[gguf]'"
_F32 = 0


def require_gguf() -> None:
    """Refuse where the package that writes GGUF's heads is not installed.

    Raises:
        UnsupportedError: naming the extra.
    """
    if importlib.util.find_spec("gguf") is None:
        raise UnsupportedError(f"GGUF needs the package gguf; install it with: {INSTALL}")


def llama_version() -> str | None:
    """The build of llama.cpp in the package, such as b11549; None where it is not installed."""
    try:
        version = importlib.metadata.version("xllamacpp")
    except importlib.metadata.PackageNotFoundError:
        return None
    return f"b{version.rpartition('.')[2]}"


class ModelParams(ctypes.Structure):
    """`llama_model_params`, with room behind for what later releases add; only defaults are used."""

    _fields_ = (("raw", ctypes.c_uint8 * 256),)


class ContextParams(ctypes.Structure):
    """`llama_context_params` of b11549, with room behind."""

    _fields_ = (
        ("n_ctx", ctypes.c_uint32),
        ("n_batch", ctypes.c_uint32),
        ("n_ubatch", ctypes.c_uint32),
        ("n_seq_max", ctypes.c_uint32),
        ("counts", ctypes.c_uint32 * 3),
        ("n_threads", ctypes.c_int32),
        ("n_threads_batch", ctypes.c_int32),
        ("enums", ctypes.c_int32 * 4),
        ("flash_attn_type", ctypes.c_int32),
        ("rope_freq_base", ctypes.c_float),
        ("rope_freq_scale", ctypes.c_float),
        ("yarn", ctypes.c_float * 4),
        ("yarn_orig_ctx", ctypes.c_uint32),
        ("defrag_thold", ctypes.c_float),
        ("cb_eval", ctypes.c_void_p * 2),
        ("type_k", ctypes.c_int32),
        ("type_v", ctypes.c_int32),
        ("rest", ctypes.c_uint8 * 256),
    )


class Batch(ctypes.Structure):
    """`llama_batch`."""

    _fields_ = (
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.POINTER(ctypes.c_float)),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    )


_LOG = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
_POINTER = ctypes.c_void_p
_FUNCTIONS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "llama_backend_init": (None, ()),
    "llama_model_default_params": (ModelParams, ()),
    "llama_context_default_params": (ContextParams, ()),
    "llama_model_load_from_file": (_POINTER, (ctypes.c_char_p, ModelParams)),
    "llama_init_from_model": (_POINTER, (_POINTER, ContextParams)),
    "llama_free": (None, (_POINTER,)),
    "llama_model_free": (None, (_POINTER,)),
    "llama_model_get_vocab": (_POINTER, (_POINTER,)),
    "llama_model_n_ctx_train": (ctypes.c_int32, (_POINTER,)),
    "llama_vocab_n_tokens": (ctypes.c_int32, (_POINTER,)),
    "llama_get_memory": (_POINTER, (_POINTER,)),
    "llama_memory_clear": (None, (_POINTER, ctypes.c_bool)),
    "llama_batch_init": (Batch, (ctypes.c_int32, ctypes.c_int32, ctypes.c_int32)),
    "llama_batch_free": (None, (Batch,)),
    "llama_decode": (ctypes.c_int32, (_POINTER, Batch)),
    "llama_get_logits_ith": (ctypes.POINTER(ctypes.c_float), (_POINTER, ctypes.c_int32)),
    "llama_tokenize": (
        ctypes.c_int32,
        (
            _POINTER,
            ctypes.c_char_p,
            ctypes.c_int32,
            ctypes.POINTER(ctypes.c_int32),
            ctypes.c_int32,
            ctypes.c_bool,
            ctypes.c_bool,
        ),
    ),
    "llama_log_set": (None, (_LOG, _POINTER)),
}


class Llama:
    """llama.cpp's library.

    Attributes:
        call: its functions by name, without `llama_`.
        said: what it wrote of errors since it was last emptied.
    """

    def __init__(self, library: Any) -> None:
        self.said: list[str] = []
        self._log = _LOG(self._heard)  # kept alive as long as the library may call it
        self.call: dict[str, Callable[..., Any]] = {}
        for name, (result, arguments) in _FUNCTIONS.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
            self.call[name.removeprefix("llama_")] = function
        self.call["log_set"](self._log, None)
        self.call["backend_init"]()

    def _heard(self, level: int, text: bytes | None, _data: object) -> None:
        if level == 4 and text:  # GGML_LOG_LEVEL_ERROR
            self.said.append(text.decode("utf-8", "replace").strip())


@functools.cache
def require_llama() -> Llama:
    """llama.cpp, loaded once.

    Raises:
        UnsupportedError: the package is not installed, does not load, or is a release whose structures are not known.
    """
    found = importlib.util.find_spec("xllamacpp")
    if found is None or found.origin is None:
        raise UnsupportedError(f"Running GGUF files needs the package xllamacpp; install it with: {INSTALL}")
    places = [*Path(found.origin).parent.glob("xllamacpp*.so"), *Path(found.origin).parent.glob("xllamacpp*.pyd")]
    try:
        llama = Llama(ctypes.CDLL(str(places[0])))
        defaults = llama.call["context_default_params"]()
    except (OSError, AttributeError, IndexError) as error:
        raise UnsupportedError(f"xllamacpp can not be loaded ({error}); install it again: {INSTALL}") from error
    seen = (defaults.n_ctx, defaults.n_batch, defaults.type_k, defaults.type_v, defaults.yarn_orig_ctx)
    if seen != (512, 2048, 1, 1, 0):
        raise UnsupportedError(
            f"llama.cpp {llama_version()} has other structures than the releases that moepress knows; install the "
            f"version of the extra: {INSTALL}"
        )
    return llama


def exact_context(llama: Llama, tokens: int, threads: int) -> ContextParams:
    """Parameters of a context for comparisons: the cache in fp32, all tokens of a window in one batch."""
    params = llama.call["context_default_params"]()
    params.n_ctx = params.n_batch = params.n_ubatch = tokens
    params.n_threads = params.n_threads_batch = threads
    params.type_k = params.type_v = _F32
    params.flash_attn_type = 0
    assert isinstance(params, ContextParams)
    return params
