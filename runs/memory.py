"""Freed memory goes back to the system: what Python's collector and glibc would keep."""

import ctypes
import functools
import gc
import sys

from moepress.runs.phases import phase

_MAPPED_BYTES = 4 << 20
_ARENAS = 2
_M_MMAP_THRESHOLD, _M_ARENA_MAX = -3, -8  # of mallopt(3)


def settle() -> None:
    """Before a walk over layers.

    What lives now is not looked through again whenever memory is released: transformers has a million objects. And
    tensors of 4 MiB or more get pages of their own, which go back as soon as they are freed. Left alone, glibc raises
    that size up to 32 MiB as it sees tensors go, and keeps the rest in a heap for each thread: threads that come from
    now on share one, because `models.forward.stepping` has a thread for each batch of windows, and each heap keeps what
    its largest moment left behind (13 threads: 130 MB of 700).
    """
    gc.unfreeze()
    gc.collect()
    gc.freeze()
    mallopt = getattr(_libc(), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _MAPPED_BYTES)
        mallopt(_M_ARENA_MAX, _ARENAS)


def release_memory() -> None:
    """Give freed memory back to the system.

    Modules hold each other in cycles, and glibc keeps what tensors of many sizes leave behind: over sixty layers that
    adds up to gigabytes of resident memory that nobody uses.
    """
    with phase("release"):
        gc.collect()
        trim = getattr(_libc(), "malloc_trim", None)
        if trim is not None:
            trim(0)


@functools.cache
def _libc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if sys.platform == "linux" else None
