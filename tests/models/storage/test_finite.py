"""NaN and Inf seen in bytes, held against torch's own judgement of every value of the short dtypes."""

from pathlib import Path

import numpy as np
import pytest
import torch

from moepress.errors import InvalidInputError
from moepress.models.storage.finite import all_finite
from moepress.models.storage.safetensors_file import Stored
from moepress.models.storage.tensors import DTYPES, require_finite, tensor_bytes

FLOATS = {name: dtype for name, dtype in DTYPES.items() if dtype.is_floating_point}


def every_value(dtype: torch.dtype) -> torch.Tensor:
    """Of one and two bytes all; of longer ones the edges between finite and not, and many at random."""
    if dtype.itemsize == 1:
        return torch.arange(256, dtype=torch.uint8).view(dtype)
    if dtype.itemsize == 2:
        return torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16).view(dtype)
    most = torch.finfo(dtype).max
    edges = [0.0, -0.0, most, -most, torch.finfo(dtype).tiny / 2, float("inf"), -float("inf"), float("nan")]
    whole = {4: torch.int32, 8: torch.int64}[dtype.itemsize]
    limits = torch.iinfo(whole)
    bits = torch.randint(limits.min, limits.max, (4096,), dtype=whole, generator=torch.Generator().manual_seed(1))
    just = torch.tensor(float("inf"), dtype=dtype).view(whole) + torch.arange(-2, 3)
    return torch.cat([torch.tensor(edges, dtype=dtype), bits.view(dtype), just.view(dtype)])


@pytest.mark.parametrize("name", FLOATS)
def test_every_value_is_judged_as_torch_judges_it(name: str) -> None:
    values = every_value(FLOATS[name])
    finite = torch.isfinite(values.float() if values.dtype.itemsize == 1 else values)
    assert [all_finite(name, tensor_bytes(value)) for value in values.split(1)] == finite.tolist()
    assert all_finite(name, tensor_bytes(values[finite]))
    assert not all_finite(name, tensor_bytes(values))


@pytest.mark.parametrize("place", [0, (1 << 18) - 1, 1 << 18, -1])
def test_one_nan_in_a_large_tensor_is_seen_wherever_it_is(place: int) -> None:
    values = torch.ones((1 << 19) + 7, dtype=torch.bfloat16)
    assert all_finite("BF16", tensor_bytes(values))
    values[place] = float("nan")
    assert not all_finite("BF16", tensor_bytes(values))


def test_whole_numbers_and_nothing_are_finite() -> None:
    assert all_finite("I32", np.full(3, -1, dtype=np.int32).tobytes())
    assert all_finite("U8", b"\xff\x7f")
    assert all_finite("F32", b"")


def test_the_refusal_names_the_tensor_its_file_and_the_expert() -> None:
    entry = Stored(name="a.b", file=Path("x.safetensors"), dtype="F16", shape=(2,), begin=0, end=4)
    require_finite(entry, torch.zeros(2, dtype=torch.float16))
    with pytest.raises(InvalidInputError, match=r"^a\.b \(expert 3\) in x\.safetensors holds NaN or Inf"):
        require_finite(entry, torch.tensor([0.0, float("inf")], dtype=torch.float16), 3)
