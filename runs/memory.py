"""Memory: freed, it goes back to the system, whatever Python's collector and glibc would keep; where it runs out, a
batch is done in halves.
"""

import ctypes
import errno
import functools
import gc
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import psutil

from moepress.runs.phases import phase
from moepress.runs.progress import note

_MAPPED_BYTES, _MAPPED_SHARE = 4 << 20, 32  # tensors from here on get pages of their own: bytes, and share of the limit
_KEPT_SHARE = 8  # of the limit: what the process may hold, live or freed, before freed memory goes back
_ARENAS = 2
_MOST_MAPPED, _MOST_KEPT = 16 << 20, 64 << 20  # beyond these more memory saves no more time
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # of mallopt(3)


@dataclass(slots=True)
class _Settled:
    """Resident bytes above which freed memory goes back whenever `release_memory` is called; 0 for always."""

    resident: int = 0


_settled = _Settled()


def kept_bytes(memory_bytes: int) -> int:
    """How much of freed memory may be kept under this limit."""
    return min(max(_MAPPED_BYTES, memory_bytes // _KEPT_SHARE), _MOST_KEPT)


def settle(memory_bytes: int) -> None:
    """Before a walk over layers.

    What lives now is not looked through again whenever memory is released: transformers has a million objects.

    And freed memory is kept where the limit has room for it. A page that the system gives anew costs 3 us, so a tensor
    that comes and goes with every batch costs more than the arithmetic on it: with pages of their own for all of 4 MiB
    or more, and a trim whenever memory was released, that was a fifth of the CPU time of `quantize`. Where the limit
    is small they still have them: a heap has holes, which grow with what may lie in it. Threads that come from now on
    share one heap, because `models.forward.stepping` has a thread for each batch of windows, and each heap keeps what
    its largest moment left behind (13 threads: 130 MB of 700).

    Args:
        memory_bytes: the limit.
    """
    gc.unfreeze()
    gc.collect()
    gc.freeze()
    _trim()
    mallopt = getattr(_libc(), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, min(max(_MAPPED_BYTES, memory_bytes // _MAPPED_SHARE), _MOST_MAPPED))
        mallopt(_M_TRIM_THRESHOLD, kept_bytes(memory_bytes))
        mallopt(_M_ARENA_MAX, _ARENAS)
    _settled.resident = psutil.Process().memory_info().rss + kept_bytes(memory_bytes)


def release_memory() -> None:
    """Give freed memory back to the system, where the process holds more than it may keep (`settle`).

    Modules hold each other in cycles, and glibc keeps what tensors of many sizes leave behind: over sixty layers that
    adds up to gigabytes of resident memory that nobody uses.
    """
    with phase("release"):
        gc.collect()
        if psutil.Process().memory_info().rss > _settled.resident:
            _trim()


def _trim() -> None:
    trim = getattr(_libc(), "malloc_trim", None)
    if trim is not None:
        trim(0)


Item = TypeVar("Item")
Result = TypeVar("Result")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out: Python's, the system's, torch's of a device or of the CPU."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    text = str(error)
    said = ("can't allocate memory", "DefaultCPUAllocator", "not enough memory", "out of memory", "bad_alloc")
    return isinstance(error, RuntimeError) and any(words in text for words in said)


def peak_bytes() -> int:
    """The most memory that this process has had at once; where the system does not tell, what it has now."""
    memory = psutil.Process().memory_info()
    high: int | None = getattr(memory, "peak_wset", None)  # Windows
    if high is not None:
        return high
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) << 10
    except (OSError, StopIteration, ValueError):
        return int(memory.rss)


def in_halves(items: Sequence[Item], work: Callable[[Sequence[Item]], Sequence[Result]], what: str) -> Sequence[Result]:
    """What `work` gives for a batch; where memory runs out it is called once more for each half.

    Args:
        items: the batch.
        work: changes nothing before it has all of its result, which is one entry for each item or part.
        what: the items, for a note.
    """
    try:
        return work(items)
    except (MemoryError, RuntimeError) as error:
        if len(items) < 2 or not is_out_of_memory(error):
            raise
    release_memory()  # here, where nothing holds the frames of what failed
    _tell(f"Memory ran out with {len(items)} {what} at once, which are done in two halves; last bits may differ.")
    half = (len(items) + 1) // 2
    return [*work(items[:half]), *work(items[half:])]


@functools.cache
def _tell(text: str) -> None:
    note(text)  # once, however many batches there are


@functools.cache
def _libc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if sys.platform == "linux" else None
