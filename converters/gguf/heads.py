"""Whether a GGUF file's head lies within the file, before the `gguf` package reads it, which reads on past the end.

Source: the GGUF specification (ggml, docs/gguf.md), versions 2 and 3.
"""

import os
import struct
from pathlib import Path
from typing import IO

from moepress.errors import InvalidInputError

_MAGIC = b"GGUF"
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Bytes of a value by its type."""
_STRING, _ARRAY = 8, 9
_DEEPEST = 4  # arrays within arrays


def require_whole_head(file: Path) -> None:
    """Walk over a file's metadata.

    Raises:
        InvalidInputError: it is no GGUF file, or what it states reaches past its end.
    """
    with file.open("rb") as stream:
        try:
            if stream.read(4) != _MAGIC:
                raise ValueError("it does not begin as one")
            version, _tensors, keys = struct.unpack("<IQQ", _taken(stream, 20))
            if version not in (2, 3):
                raise ValueError(f"version {version} is not known")
            for _ in range(keys):
                _skip_string(stream)
                _skip(stream, *struct.unpack("<I", _taken(stream, 4)))
        except ValueError as error:
            raise InvalidInputError(
                f"{file} is no GGUF file that can be read ({error}); download or make it again."
            ) from error


def _taken(stream: IO[bytes], size: int) -> bytes:
    found = stream.read(size)
    if len(found) < size:
        raise ValueError("it is cut off")
    return found


def _pass(stream: IO[bytes], size: int) -> None:
    if size > os.fstat(stream.fileno()).st_size - stream.tell():
        raise ValueError("a length in it reaches past its end")
    stream.seek(size, os.SEEK_CUR)


def _skip_string(stream: IO[bytes]) -> None:
    _pass(stream, struct.unpack("<Q", _taken(stream, 8))[0])


def _skip(stream: IO[bytes], kind: int, depth: int = 0) -> None:
    if kind in _SIZES:
        _pass(stream, _SIZES[kind])
    elif kind == _STRING:
        _skip_string(stream)
    elif kind == _ARRAY and depth < _DEEPEST:
        inner, count = struct.unpack("<IQ", _taken(stream, 12))
        if inner in _SIZES:
            _pass(stream, count * _SIZES[inner])
            return
        for _ in range(count):
            _skip(stream, inner, depth + 1)
    else:
        raise ValueError(f"a value of type {kind} is not known")
