"""Where tensors go while they are read: a GPU gets codes, fp8 and bf16 as they are stored, and makes dense weights of
them itself. A quarter to a half of the bytes cross the bus, and the CPU has nothing to compute.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_KINDS = ("cuda", "meta")  # MPS has no fp8; on the CPU tensors are where they should be


class _Place(threading.local):
    """A thread's own: where to, and the memory that copies go through."""

    def __init__(self) -> None:
        self.device: torch.device | None = None
        self.staging = Staging()


class Staging:
    """Two buffers that copies to a GPU go through in turn, so that one is filled while the other is sent.

    Only from pinned memory a copy runs beside the CPU; tensors of files are not.
    """

    def __init__(self) -> None:
        self._buffers: list[Tensor | None] = [None, None]
        self._sent: list[torch.cuda.Event | None] = [None, None]
        self._turn = 0

    def copy(self, tensor: Tensor, device: torch.device) -> Tensor:
        """The tensor on a device; on CUDA the copy is under way on the current stream."""
        self._turn ^= 1
        turn, on_card = self._turn, device.type == "cuda"
        sent = self._sent[turn]
        if sent is not None:
            sent.synchronize()
        size, buffer = tensor.numel() * tensor.itemsize, self._buffers[turn]
        if buffer is None or buffer.numel() < size:
            buffer = self._buffers[turn] = torch.empty(size, dtype=torch.uint8, pin_memory=on_card)
        staged = buffer[:size].view(tensor.dtype).view(tensor.shape)
        staged.copy_(tensor)
        out = torch.empty(tensor.shape, dtype=tensor.dtype, device=device).copy_(staged, non_blocking=True)
        if on_card:
            sent = self._sent[turn] = torch.cuda.Event() if sent is None else sent
            sent.record()
        return out


_PLACE = _Place()


@contextmanager
def onto(device: torch.device) -> Iterator[None]:
    """In the block, what this thread reads of a checkpoint is on that device before it is dequantized."""
    before, _PLACE.device = _PLACE.device, device if device.type in _KINDS else None
    try:
        yield
    finally:
        _PLACE.device = before


def place(tensor: Tensor) -> Tensor:
    """A tensor that was read and checked, where `onto` wants it."""
    if _PLACE.device is None or tensor.device.type != "cpu":
        return tensor
    if _PLACE.device.type != "cuda" or not tensor.numel():
        return tensor.to(_PLACE.device)
    return _PLACE.staging.copy(tensor, _PLACE.device)
