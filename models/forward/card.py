"""What a GPU is given while a layer's experts pass: a lane for what is read ahead, and the tokens' rows as a whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moepress.models.storage.experts import Expert
from moepress.models.storage.placed import Staging

if TYPE_CHECKING:
    from moepress.models.forward.walk import Stream

_SENT_ROWS = 8192  # of a buffer that are sent together


def free_bytes(device: torch.device) -> int:
    """What a CUDA device has room for: free memory, and what torch keeps there for itself and does not use."""
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + int(kept)


@contextmanager
def on_card(*streams: Stream | None) -> Iterator[None]:
    """In the block the experts' inputs, and what their outputs are added to, lie on a CUDA device that has room.

    Rows are gathered and added up there, and cross the bus twice a layer instead of twice for each expert that a token
    chose. They take a third of what is free at most, so that the experts have the rest.
    """
    given = [stream for stream in streams if stream is not None and stream.model.device.type == "cuda"]
    wanted = sum(rows.numel() * rows.itemsize for stream in given for rows in (stream.inputs, stream.flat()))
    if not given or wanted > free_bytes(given[0].model.device) // 3:
        yield
        return
    with moved(given):
        yield


@contextmanager
def moved(streams: list[Stream]) -> Iterator[None]:
    """`on_card`, wherever there is room."""
    before = [(stream, stream.inputs, stream.hidden, stream.sums) for stream in streams]
    try:
        for stream in streams:
            device = stream.model.device
            stream.inputs = _sent(stream.inputs, device)
            if stream.sums is None:
                stream.hidden = _sent(stream.hidden.flatten(0, 1), device).view(stream.hidden.shape)
            else:
                stream.sums = _sent(stream.sums, device)
        yield
        for stream, _inputs, hidden, sums in before:
            if sums is None or stream.sums is None:
                hidden.copy_(stream.hidden)
            else:
                sums.copy_(stream.sums)
    finally:
        for stream, inputs, hidden, sums in before:
            stream.inputs, stream.hidden, stream.sums = inputs, hidden, sums


def _sent(rows: Tensor, device: torch.device) -> Tensor:
    """Rows on a device, whole, through buffers that they are read into."""
    out, staging = torch.empty(rows.shape, dtype=rows.dtype, device=device), Staging()
    for start in range(0, len(rows), _SENT_ROWS):
        part = slice(start, start + _SENT_ROWS)
        out[part] = staging.copy(rows[part], device)
    return out


class Lane:
    """A stream of a CUDA device; on other devices nothing is done aside."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def send(self, read: Callable[[], Expert]) -> tuple[Expert, torch.cuda.Event | None]:
        """What is read, its work queued in the lane, and the event after it."""
        if self.stream is None:
            return read(), None
        with torch.cuda.stream(self.stream):
            expert = read()
            return expert, self.stream.record_event()

    def take(self, sent: tuple[Expert, torch.cuda.Event | None]) -> Expert:
        """The same for the stream that goes on with it: that waits for the lane, and this thread for nothing."""
        expert, event = sent
        if self.stream is not None and event is not None:
            current = torch.cuda.current_stream(self.stream.device)
            current.wait_event(event)
            for tensor in expert.tensors:
                tensor.record_stream(current)  # its memory is the lane's, which must not use it again before
        return expert
