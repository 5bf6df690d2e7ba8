"""Where a run's time went: seconds, FLOP and bytes per layer and phase, for `--timings` and the benchmarks.

Never part of an output: a run that was killed and resumed ends with the same bytes as one that was not.
"""

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from moepress.errors import MoepressError

_LAYER, _PHASE = "moepress was in layer ", "moepress was in phase "
OUTSIDE = -1
"""The layer of what belongs to none: embeddings, the final norm, checks, companions."""


@dataclass(slots=True, kw_only=True)
class Spent:
    """What a phase of a layer took.

    Attributes:
        seconds: without the phases inside of it. Of a phase in the background: beside the others.
        flops: floating-point operations, counted from shapes; 0 where they say nothing.
        bytes: read or written, as they lie on the disk.
        background: it ran in a thread beside the others, and is not part of the run's own time.
    """

    seconds: float = 0.0
    flops: float = 0.0
    bytes: int = 0
    background: bool = False


@dataclass(slots=True)
class Clock:
    """The record of one run.

    Attributes:
        spent: (layer, phase) -> what it took.
        layer: which layer phases belong to now.
        owner: the thread whose seconds are counted.
    """

    spent: dict[tuple[int, str], Spent] = field(default_factory=dict)
    layer: int = OUTSIDE
    owner: int = field(default_factory=threading.get_ident)
    _inner: list[float] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _helping: dict[str, float] = field(default_factory=dict)
    _own: threading.local = field(default_factory=threading.local)

    def add(
        self, name: str, seconds: float, flops: float = 0.0, size: int = 0, *, layer: int, background: bool = False
    ) -> None:
        """Count something in; from any thread."""
        with self._lock:
            row = self.spent.setdefault((layer, name), Spent(background=background))
            row.seconds += seconds
            row.flops += flops
            row.bytes += size

    def rows(self) -> list[dict[str, Any]]:
        """As plain JSON, ordered by layer and then as first seen; a layer of None belongs to no layer."""
        ordered = sorted(self.spent.items(), key=lambda pair: pair[0][0])
        return [
            {
                "layer": None if layer == OUTSIDE else layer,
                "phase": name,
                "seconds": spent.seconds,
                "flops": spent.flops,
                "bytes": spent.bytes,
                "background": spent.background,
            }
            for (layer, name), spent in ordered
        ]


# Of the process, not of a context: threads that read ahead count into it too. None costs a phase next to nothing.
_running: list[Clock] = []


@contextmanager
def recording() -> Iterator[Clock]:
    """Record all phases until the end of the block."""
    clock = Clock()
    _running.append(clock)
    try:
        yield clock
    finally:
        _running.remove(clock)


@contextmanager
def in_layer(layer: int) -> Iterator[None]:
    """Phases of the block belong to this layer."""
    try:
        if not _running:
            yield
            return
        clock = _running[-1]
        before, clock.layer = clock.layer, layer
        try:
            yield
        finally:
            clock.layer = before
    except Exception as error:
        _tell(error, _LAYER, str(layer))
        raise


@contextmanager
def phase(name: str, *, flops: float = 0.0, size: int = 0) -> Iterator[None]:
    """Count the time of the block, in the main thread, less that of the phases inside.

    In a thread that the main one waits for, the seconds are the main one's: FLOP and bytes alone are counted, and by
    `shared` the phases of such threads share what the main one waited.

    Args:
        name: read, forward, Hessian, factor, scales, columns, sweeps, losses, pack, write, ...
        flops: floating-point operations of the block.
        size: bytes that it moves from or to the disk.
    """
    try:
        with _counted(name, flops, size) if _running else nullcontext():
            yield
    except Exception as error:
        _tell(error, _PHASE, name)
        raise


@contextmanager
def _counted(name: str, flops: float, size: int) -> Iterator[None]:
    clock = _running[-1]
    if threading.get_ident() != clock.owner:
        with _helping(clock, name):
            yield
        clock.add(name, 0.0, flops, size, layer=clock.layer)
        return
    _wait_for_gpu()
    start = time.perf_counter()
    clock._inner.append(0.0)
    try:
        yield
    finally:
        _wait_for_gpu()
        whole = time.perf_counter() - start
        inside = clock._inner.pop()
        if clock._inner:
            clock._inner[-1] += whole
        clock.add(name, whole - inside, flops, size, layer=clock.layer)


@contextmanager
def _helping(clock: Clock, name: str) -> Iterator[None]:
    """Count the time of a phase of a thread that the main one waits for, less that of the phases inside."""
    inner: list[float] = clock._own.__dict__.setdefault("inner", [])
    start = time.perf_counter()
    inner.append(0.0)
    try:
        yield
    finally:
        whole = time.perf_counter() - start
        inside = inner.pop()
        if inner:
            inner[-1] += whole
        with clock._lock:
            clock._helping[name] = clock._helping.get(name, 0.0) + whole - inside


@contextmanager
def shared() -> Iterator[None]:
    """The main thread waits for others in the block: their phases share the time, each by what it took of them."""
    if not _running or threading.get_ident() != _running[-1].owner:
        yield
        return
    clock, start = _running[-1], time.perf_counter()
    clock._helping.clear()
    try:
        yield
    finally:
        whole, taken = time.perf_counter() - start, dict(clock._helping)
        clock._helping.clear()
        if clock._inner and taken:
            clock._inner[-1] += whole
            for name, seconds in taken.items():
                clock.add(name, whole * seconds / sum(taken.values()), layer=clock.layer)


def place_of(error: BaseException) -> str:
    """Where an error came up, `layer 3 (solve)`; empty where it was in no layer and no phase."""
    notes = getattr(error, "__notes__", [])
    layer, name = (
        next((note.removeprefix(kind) for note in notes if note.startswith(kind)), None) for kind in (_LAYER, _PHASE)
    )
    if layer is None:
        return f"the phase `{name}`" if name else ""
    return f"layer {layer} ({name})" if name else f"layer {layer}"


def _tell(error: Exception, kind: str, what: str) -> None:
    """Note on an error where it came up; the innermost place counts. What a user can mend says itself where it is."""
    if not isinstance(error, MoepressError) and not any(n.startswith(kind) for n in getattr(error, "__notes__", [])):
        error.add_note(f"{kind}{what}")


@contextmanager
def beside(name: str, *, size: int = 0) -> Iterator[None]:
    """Count the time of the block in a thread that works beside the main one."""
    if not _running:
        yield
        return
    clock, start = _running[-1], time.perf_counter()
    layer = clock.layer
    try:
        yield
    finally:
        clock.add(name, time.perf_counter() - start, size=size, layer=layer, background=True)


def _wait_for_gpu() -> None:
    """A GPU works on after a call has returned; its time belongs to the phase that asked for it."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.synchronize()
