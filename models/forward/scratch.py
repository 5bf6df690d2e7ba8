"""Large buffers: in memory while they fit into a share of the limit, in files of a folder beyond that."""

import math
import mmap
import os
import shutil
import sys
from collections.abc import Sequence
from contextlib import suppress
from io import FileIO
from pathlib import Path

import torch
from torch import Tensor

from moepress.errors import MoepressError
from moepress.runs.byte_sizes import mib_text
from moepress.runs.files import mount_of, temporary_for
from moepress.runs.phases import phase

_MAPPED_SHARE, _LEAST_MAPPED_BYTES = 8, 16 << 20


def mapped_limit_bytes(memory_bytes: int) -> int:
    """How much of mapped files may be touched before their pages are given back, see `Scratch.touch`."""
    return max(memory_bytes // _MAPPED_SHARE, _LEAST_MAPPED_BYTES)


class Rows:
    """A table of rows that are written in any order and read in ascending order, in memory or in a file.

    Not mapped: a row that is written through a mapping is read from the disk first, and all that was touched counts as
    the process's own memory.

    Args:
        count: rows.
        width: entries of a row.
        dtype: of all entries.
        file: where the rows lie; None for memory.
    """

    def __init__(self, count: int, width: int, dtype: torch.dtype, file: FileIO | None) -> None:
        self.count, self.width, self.dtype, self.file = count, width, dtype, file
        self.memory = torch.empty(count if file is None else 0, width, dtype=dtype)

    def put(self, index_N: Tensor, values_NW: Tensor) -> None:
        """Write rows; `values` [N, W] on the CPU, of the table's dtype."""
        if self.file is None:
            self.memory[index_N] = values_NW
            return
        size = self.width * self.dtype.itemsize
        with phase("spill", size=len(index_N) * size):
            for place, row in zip(index_N.tolist(), values_NW.contiguous().view(torch.uint8).numpy(), strict=True):
                self.file.seek(place * size)
                written = self.file.write(row)
                if written != size:
                    raise MoepressError(f"{self.file.name!s} could not be written; see whether its disk is full.")

    def get(self, start: int, stop: int) -> Tensor:
        """Rows [stop - start, W]; those that were never written are undefined."""
        if self.file is None:
            return self.memory[start:stop]
        rows = torch.empty(stop - start, self.width, dtype=self.dtype)
        left = rows.view(torch.uint8).view(-1).numpy().data
        with phase("spill", size=len(left)):
            self.file.seek(start * self.width * self.dtype.itemsize)
            while len(left):
                got = self.file.readinto(left)
                if not got:
                    raise MoepressError(f"{self.file.name!s} was cut short while it was in use.")
                left = left[got:]
        return rows


class Scratch:
    """Buffers of a run, none of which outlives it.

    Args:
        folder: for the files.
        memory_bytes: the limit; half of it is for buffers in memory.
        name: its files begin with it; two that share a folder need two names.
    """

    def __init__(self, folder: Path, memory_bytes: int, name: str = "scratch") -> None:
        self.folder, self.left_bytes, self.name = folder, memory_bytes // 2, name
        self.files: dict[str, Path] = {}
        self._maps: list[mmap.mmap] = []
        self._opened: list[FileIO] = []
        self._touched_bytes, self._mapped_limit_bytes = 0, mapped_limit_bytes(memory_bytes)

    def tensor(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A buffer of that shape, its content undefined.

        Raises:
            MoepressError: the disk has no room for it.
        """
        count = math.prod(shape)
        if self._taken(count * dtype.itemsize):
            return torch.empty(tuple(shape), dtype=dtype)
        with self._file(name, count * dtype.itemsize) as file:
            mapped = mmap.mmap(file.fileno(), count * dtype.itemsize)
        self._maps.append(mapped)
        return torch.frombuffer(mapped, dtype=dtype, count=count).reshape(tuple(shape))

    def rows(self, name: str, count: int, width: int, dtype: torch.dtype) -> Rows:
        """A table of rows, its content undefined.

        Raises:
            MoepressError: the disk has no room for it.
        """
        if self._taken(count * width * dtype.itemsize):
            return Rows(count, width, dtype, None)
        file = self._file(name, count * width * dtype.itemsize)
        self._opened.append(file)
        return Rows(count, width, dtype, file)

    def free_bytes(self) -> int:
        """What the disk of the folder has free."""
        return shutil.disk_usage(self.folder).free

    def touch(self, size: int) -> None:
        """Count bytes of buffers that were gone over, and `forget` when mapped ones may be a share of the limit."""
        self._touched_bytes += size
        if self._touched_bytes > self._mapped_limit_bytes:
            self.forget()

    def forget(self) -> None:
        """Let go of the resident pages of mapped files: their content stays in the system's cache or on the disk.

        Of a shared mapping MADV_DONTNEED drops no data on Linux (madvise(2)); elsewhere this does nothing.
        """
        self._touched_bytes = 0
        if sys.platform == "linux":
            for mapped in self._maps:
                mapped.madvise(mmap.MADV_DONTNEED)

    def close(self) -> None:
        """Delete the files. Tensors in them stay valid where the system allows that, which Windows does not."""
        for file in self._opened:
            file.close()
        for path in self.files.values():
            with suppress(PermissionError):  # Windows keeps a mapped file as long as its tensor lives
                path.unlink(missing_ok=True)

    def _taken(self, size: int) -> bool:
        fits = size <= self.left_bytes
        self.left_bytes -= size if fits else 0
        return fits

    def _file(self, name: str, size: int) -> FileIO:
        if name in self.files:
            with suppress(PermissionError):
                self.files[name].unlink(missing_ok=True)  # a buffer of that name before this one keeps its content
        path = self.files[name] = temporary_for(self.folder / f"{self.name}-{name}")
        file = FileIO(path, "x+")
        try:
            _reserve(file, size)
        except OSError as error:
            file.close()
            path.unlink(missing_ok=True)
            raise MoepressError(
                f"The disk at {mount_of(self.folder)} has {mib_text(self.free_bytes())} free and a scratch file in "
                f"{self.folder} needs {mib_text(size)} ({error.strerror}); make room, give more --max-memory or fewer "
                "--tokens."
            ) from error
        return file


def _reserve(file: FileIO, size: int) -> None:
    """Take the room now: a full disk would kill a process that writes to a mapping, without a word."""
    reserve = getattr(os, "posix_fallocate", None)
    if reserve is None:
        file.truncate(size)
    else:
        reserve(file.fileno(), 0, size)
