"""Tensors of safetensors files in torch: read one at a time, and written from memory."""

import torch
from torch import Tensor

from moepress.models.storage.finite import all_finite, nonfinite
from moepress.models.storage.safetensors_file import Stored, read_bytes
from moepress.models.storage.writer import Entry

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def read_tensor(entry: Stored) -> Tensor:
    """Read a whole tensor, in its stored dtype and shape."""
    return _tensor(read_bytes(entry), entry.dtype, entry.shape)


def read_row(entry: Stored, row: int) -> Tensor:
    """Read `tensor[row]`, reading no other bytes."""
    length = entry.bytes // entry.shape[0]
    return _tensor(read_bytes(entry, row * length, length), entry.dtype, entry.shape[1:])


def read_rows(entry: Stored, begin: int, end: int) -> Tensor:
    """Read `tensor[begin:end]`, reading no other bytes."""
    length = entry.bytes // entry.shape[0]
    return _tensor(
        read_bytes(entry, begin * length, (end - begin) * length), entry.dtype, (end - begin, *entry.shape[1:])
    )


def _tensor(data: bytearray, dtype: str, shape: tuple[int, ...]) -> Tensor:
    if not data:
        return torch.empty(shape, dtype=DTYPES[dtype])
    return torch.frombuffer(data, dtype=DTYPES[dtype]).reshape(shape)


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The data of a tensor as it lies in a file: contiguous, little-endian."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]


def require_finite(entry: Stored, tensor: Tensor, expert: int | None = None) -> None:
    """Refuse NaN and Inf in what was read of an entry, in its dtype.

    Raises:
        InvalidInputError: naming the tensor (its name holds the layer and the expert) and its file.
    """
    if not all_finite(entry.dtype, tensor_bytes(tensor)):
        raise nonfinite(entry, expert)


def tensor_entry(name: str, tensor: Tensor) -> Entry:
    """An entry for a tensor that is in memory."""
    data = tensor_bytes(tensor)
    return Entry(
        name=name,
        dtype=DTYPE_NAMES[tensor.dtype],
        shape=tuple(tensor.shape),
        bytes=data.nbytes,
        data=lambda: iter((data,)),
    )
