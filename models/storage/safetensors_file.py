"""Read safetensors files piece by piece, in the memory of one tensor, and refuse what is not exactly right.

Layout (https://github.com/huggingface/safetensors#format): 8 bytes little-endian header length N, N bytes of JSON, then
the data. The library maps whole files, which counts as resident memory; moepress reads byte ranges instead.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moepress.errors import InvalidInputError
from moepress.models.storage.misnamed import misnamed
from moepress.runs.parsing import parse_json
from moepress.runs.store.remote import open_file, size_of

_BY_BITS = {
    64: ("F64", "I64", "U64", "C64"),
    32: ("F32", "I32", "U32"),
    16: ("F16", "BF16", "I16", "U16"),
    8: ("F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "I8", "U8", "BOOL"),
    6: ("F6_E2M3", "F6_E3M2"),
    4: ("F4",),
}
ITEM_BITS = {name: bits for bits, names in _BY_BITS.items() for name in names}
"""Sizes of the dtypes of the format, by their names in a header; not all are read (`foreign`)."""
_HEADER_LIMIT_BYTES = 100_000_000  # the library's own limit


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """One tensor in a file: `begin` and `end` are absolute byte offsets."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def bytes(self) -> int:
        """Size of the data."""
        return self.end - self.begin


def read_header(file: Path) -> dict[str, Stored]:
    """Parse and check a file's header.

    Raises:
        InvalidInputError: the file is missing, truncated, has trailing bytes, duplicate names, unknown dtypes, holes or
            overlaps.
    """
    try:
        size = size_of(file)
        with open_file(file) as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(size - 8, _HEADER_LIMIT_BYTES):
                if other := misnamed(file):
                    raise InvalidInputError(other)
                raise _broken(file, f"its header claims {length} bytes and the file has {size}")
            raw = stream.read(length)
    except OSError as error:
        raise InvalidInputError(f"Cannot read {file}: {error.strerror or error}; restore the file.") from error
    try:
        header = parse_json(raw.decode("utf-8"), _no_duplicates)
    except (ValueError, RecursionError) as error:
        raise _broken(file, f"its header is not valid: {error}") from error
    if not isinstance(header, dict):
        raise _broken(file, "its header is not a JSON object")
    header.pop("__metadata__", None)
    start = 8 + length
    entries = sorted((_entry(file, name, row, start) for name, row in header.items()), key=lambda e: (e.begin, e.end))
    position = start
    for entry in entries:
        if entry.begin != position:
            raise _broken(file, f"the data of {entry.name} does not follow the tensor before it")
        position = entry.end
    if position != size:
        raise _broken(file, f"it has {size} bytes and its header describes {position}")
    return {entry.name: entry for entry in entries}


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"the name {name!r} appears twice")
        found[name] = value
    return found


def _entry(file: Path, name: str, row: Any, start: int) -> Stored:
    try:
        dtype, shape, (begin, end) = row["dtype"], row["shape"], row["data_offsets"]
    except (TypeError, KeyError, ValueError) as error:
        raise _broken(file, f"the entry of {name!r} lacks dtype, shape or data_offsets") from error
    if not isinstance(dtype, str) or dtype not in ITEM_BITS:
        raise _broken(file, f"{name} has the unknown dtype {dtype!r}")
    numbers = [*shape, begin, end] if isinstance(shape, list) else [None]
    if not all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in numbers):
        raise _broken(file, f"the entry of {name} holds something other than sizes")
    if 8 * (end - begin) != math.prod(shape) * ITEM_BITS[dtype]:
        raise _broken(file, f"{name} claims {end - begin} bytes, which is not the size of {dtype} {shape}")
    return Stored(name=name, file=file, dtype=dtype, shape=tuple(shape), begin=start + begin, end=start + end)


def _broken(file: Path, why: str) -> InvalidInputError:
    return InvalidInputError(f"{file} is not a sound safetensors file: {why}; download or copy it again.")


def read_bytes(entry: Stored, begin: int = 0, length: int | None = None) -> bytearray:
    """Read a byte range of a tensor's data.

    Raises:
        InvalidInputError: the file is gone or ends too early (it changed after its header was read).
    """
    length = entry.bytes - begin if length is None else length
    buffer = bytearray(length)
    view, got = memoryview(buffer), 0
    try:
        with open_file(entry.file, buffering=0) as stream:
            stream.seek(entry.begin + begin)
            while got < length:
                count = stream.readinto(view[got:])  # type: ignore[attr-defined]
                if not count:
                    raise _broken(entry.file, f"it ends inside {entry.name}")
                got += count
    except OSError as error:
        raise InvalidInputError(f"Cannot read {entry.file}: {error.strerror or error}; restore the file.") from error
    return buffer


def read_array(entry: Stored) -> NDArray[Any]:
    """Read a whole tensor of a dtype that numpy has too, without torch.

    Raises:
        InvalidInputError: numpy has no such dtype.
    """
    dtype = _NUMPY.get(entry.dtype)
    if dtype is None:
        raise _broken(entry.file, f"{entry.name} is {entry.dtype}, which is not what belongs there")
    return np.frombuffer(read_bytes(entry), dtype=dtype).reshape(entry.shape)


_NUMPY = {"F64": "<f8", "F32": "<f4", "I64": "<i8", "I32": "<i4"}
