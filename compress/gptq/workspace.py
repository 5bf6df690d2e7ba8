"""Buffers that are used again: fresh ones of the solver's size cost a page fault every 4 KiB, a fifth of its time."""

import math
import threading
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(slots=True)
class Workspace:
    """Buffers by name, as large as the largest ever asked for."""

    _flat: dict[str, Tensor] = field(default_factory=dict)

    def tensor(self, name: str, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """A contiguous buffer of that shape with whatever is in it."""
        wanted = math.prod(shape)
        flat = self._flat.get(name)
        if flat is None or flat.numel() < wanted:
            flat = self._flat[name] = torch.empty(wanted, dtype=dtype)
        return flat[:wanted].view(shape)


class Workspaces(threading.local):
    """A workspace for each thread that asks."""

    def __init__(self) -> None:
        self.own = Workspace()
