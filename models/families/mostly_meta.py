"""A device for building skeletons: what is large is on meta, what is small is real.

Rotary frequencies, scales of embeddings and the like are in no file and follow from the config: they are computed as
the model is built, and so are right from the start.
"""

import math
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors

_SMALL = 1 << 14  # elements
_SIZED = (torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn)


class MostlyMeta(TorchFunctionMode):
    """While it is entered, tensors of more than 16,384 elements are made on the meta device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Choose the device of what is made without one."""
        keywords = dict(kwargs or {})
        if func in _device_constructors() and keywords.get("device") is None:
            keywords["device"] = "meta" if func in _SIZED and _elements(func, args, keywords) > _SMALL else "cpu"
        return func(*args, **keywords)


def _elements(func: Any, args: Any, keywords: Any) -> int:
    size = keywords.get("size", args[0] if len(args) == 1 or func is torch.full else args)
    return math.prod(size) if isinstance(size, list | tuple) else int(size)
