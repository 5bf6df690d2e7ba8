"""Files of a folder that lie in a bucket: read in place by ranges, never downloaded as a whole.

Such a folder has a stand-in for each of them: a small plain file, so that names, links and changes are looked at as in
any folder. What reads the files' bytes opens them by `open_file`, which knows where they lie from `register`; whatever
else opens one meets a text that says what it is.

Ranges come in blocks, some of them ahead where a file is read from front to back, and a bounded number is kept. Small
ranges elsewhere are read alone. All are of the version that was there at first: a file that changes is an error.
"""

import io
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import IO, Any

from moepress.runs.files import open_plain
from moepress.runs.store.objects import ObjectStore

STAND_IN = b"moepress: stand-in"
_BLOCK_BYTES, _AHEAD, _AT_ONCE, _KEPT = 8 << 20, 3, 8, 16  # at most 128 MiB are kept, and 64 MiB under way
_SMALL_BYTES = 256 << 10
_HEAD_BYTES = 100_000  # holds most headers of weights' files


@dataclass(eq=False, slots=True, kw_only=True)
class RemoteFile:
    """A file in a bucket.

    Attributes:
        store: where it lies.
        name: of the object.
        size: in bytes.
        version: that all ranges have to be of; None where the store tells none.
        head: its beginning, where that was asked for before.
        reached: the end of the last range: what begins there is read on.
    """

    store: ObjectStore
    name: str
    size: int
    version: str | None
    head: bytes = b""
    reached: int = field(default=0)

    def direct(self, begin: int, end: int) -> bytes:
        """A range, by a request of its own."""
        return self.store.read(self.name, begin, end, version=self.version)

    def readinto(self, view: memoryview, begin: int) -> None:
        """Fill a buffer with the bytes from `begin` on."""
        end = begin + len(view)
        ahead = 0 <= begin - self.reached <= _BLOCK_BYTES
        self.reached = end
        if end <= len(self.head):
            view[:] = self.head[begin:end]
        elif end - begin <= _SMALL_BYTES and not ahead and not _BLOCKS.has(self, begin // _BLOCK_BYTES):
            view[:] = self.direct(begin, end)
        else:
            _BLOCKS.fill(self, view, begin, _AHEAD if ahead else 0)


class _Blocks:
    """Blocks of files that were read last, or are under way."""

    def __init__(self) -> None:
        self._found: OrderedDict[tuple[RemoteFile, int], Future[bytes]] = OrderedDict()
        self._lock = threading.Lock()

    def has(self, file: RemoteFile, block: int) -> bool:
        """Whether a block was asked for and is still kept."""
        with self._lock:
            return (file, block) in self._found

    def fill(self, file: RemoteFile, view: memoryview, begin: int, ahead: int) -> None:
        """Copy a range into a buffer, a block after the other, while the next ones are on their way."""
        end = begin + len(view)
        first, last = begin // _BLOCK_BYTES, (end - 1) // _BLOCK_BYTES
        furthest = min(last + ahead, (file.size - 1) // _BLOCK_BYTES)
        for block in range(first, last + 1):
            for coming in range(block, min(block + _AT_ONCE, furthest + 1)):
                self._ask(file, coming)
            data, place = self._wait(file, block), block * _BLOCK_BYTES
            low, high = max(begin, place), min(end, place + len(data))
            view[low - begin : high - begin] = memoryview(data)[low - place : high - place]

    def _ask(self, file: RemoteFile, block: int) -> Future[bytes]:
        key, begin = (file, block), block * _BLOCK_BYTES
        with self._lock:
            found = self._found.get(key)
            if found is None:
                found = pool().submit(file.direct, begin, min(begin + _BLOCK_BYTES, file.size))
                self._found[key] = found
                while len(self._found) > _KEPT:
                    self._found.popitem(last=False)
            else:
                self._found.move_to_end(key)
            return found

    def _wait(self, file: RemoteFile, block: int) -> bytes:
        asked = self._ask(file, block)
        try:
            return asked.result()
        except Exception:
            with self._lock:
                self._found.pop((file, block), None)  # the next who asks tries again
            raise


_BLOCKS = _Blocks()
_FILES: dict[Path, RemoteFile] = {}


@cache
def pool() -> ThreadPoolExecutor:
    """The threads that read."""
    return ThreadPoolExecutor(max_workers=_AT_ONCE, thread_name_prefix="moepress reads")


class _Stream(io.RawIOBase):
    """A file in a bucket as a stream to read from."""

    def __init__(self, file: RemoteFile):
        self._file, self._position = file, 0

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is."""
        return True

    def tell(self) -> int:
        """Where the next byte is read."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Read on from another place."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._file.size}[whence]
        self._position = max(0, base + offset)
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer, as far as the file goes."""
        view = memoryview(buffer).cast("B")
        view = view[: max(0, self._file.size - self._position)]
        if len(view):
            self._file.readinto(view, self._position)
        self._position += len(view)
        return len(view)


def register(files: dict[Path, RemoteFile]) -> None:
    """Say of stand-ins where their files lie, and read the beginnings of all.

    Raises:
        StoreError: one can not be read.
    """

    def begin(file: RemoteFile) -> None:
        file.head = file.direct(0, min(_HEAD_BYTES, file.size))

    for _ in pool().map(begin, [file for path, file in files.items() if path not in _FILES]):
        pass
    for path, file in files.items():
        _FILES.setdefault(path, file)
        _FILES.setdefault(path.resolve(), file)


def url_of(folder: Path) -> str | None:
    """The URL of the store that a folder's files lie in; None of any other folder."""
    return next((file.store.url for path, file in _FILES.items() if path.parent == folder), None)


def size_of(file: Path) -> int:
    """Bytes of a file, wherever it lies; raises OSError as `stat`."""
    remote = _FILES.get(file)
    return file.stat().st_size if remote is None else remote.size


def open_file(file: Path, *, buffering: int = -1) -> IO[bytes]:
    """`files.open_plain`, also of a file that lies in a bucket; what reads of that raises StoreError too."""
    remote = _FILES.get(file)
    if remote is None:
        return open_plain(file, buffering=buffering)
    stream = _Stream(remote)
    return stream if buffering == 0 else io.BufferedReader(stream)  # type: ignore[return-value]


def pieces(file: Path, ranges: Sequence[tuple[int, int]]) -> Iterator[bytes]:
    """Small ranges of a file, in their order; of a bucket some at the same time."""
    remote = _FILES.get(file)
    if remote is not None:
        ends: Iterable[tuple[int, int]] = [(begin, min(end, remote.size)) for begin, end in ranges]
        yield from pool().map(lambda both: remote.direct(*both), ends)
        return
    with open_plain(file) as stream:
        for begin, end in ranges:
            stream.seek(begin)
            yield stream.read(end - begin)
