"""Rounding to nearest, coarse and cheap: the known error by which a model's sensitivity is measured."""

from collections.abc import Collection
from dataclasses import replace

import torch
from torch import Tensor

from moepress.compress.gptq.grid import absmax_scales, dequantize, round_to_nearest
from moepress.compress.gptq.kinds import Kind
from moepress.converters.safetensors.scheme import PER_CHANNEL, Scheme
from moepress.models.storage.experts import Expert

_SCHEME = Scheme(bits=4, group_size=32)
_BOTH = frozenset({Kind.EXPERTS, Kind.DOWN})


def rounded(weight_OI: Tensor) -> Tensor:
    """Nearest of 15 levels, their scale by the largest of 32 columns; by the whole row where 32 do not divide it."""
    fits = weight_OI.shape[-1] % _SCHEME.group_size == 0
    scheme = _SCHEME if fits else replace(_SCHEME, group_size=PER_CHANNEL)
    weight_EOI = weight_OI.float()[None]
    scales = absmax_scales(weight_EOI, scheme, scale_dtype=torch.float32)
    return dequantize(round_to_nearest(weight_EOI, scales, scheme), scales, scheme)[0].to(weight_OI.dtype)


def rounded_expert(expert: Expert, kinds: Collection[Kind] = _BOTH) -> Expert:
    """An expert with gate and up rounded (`experts`), or down, or both."""
    first, down = Kind.EXPERTS in kinds, Kind.DOWN in kinds
    gate = rounded(expert.gate) if first and expert.gate is not None else expert.gate
    up = rounded(expert.up) if first else expert.up
    return replace(expert, gate=gate, up=up, down=rounded(expert.down) if down else expert.down)
