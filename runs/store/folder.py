"""A folder as a store, on this machine's disk or on a network file system that several machines mount.

    NAME                        an object
    .moepress/ID.tmp            an object that is being written

An object gets its name by a rename, which replaces, or by a hard link, which does not (`create`): never before its
content is on the disk. On NFS the answer to a link may be lost after it took effect; the number of links that the
temporary file has then tells. Where a file system has no hard links, a rename that does not replace is asked for
(Linux: `renameat2`, Windows: any rename); where it has neither, no writer could know that it is alone, and the folder
is refused.
"""

import ctypes
import errno
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TypeVar

from moepress.errors import InvalidInputError, StoreError
from moepress.runs.files import create as create_file
from moepress.runs.files import make_folders, new_id, open_plain, room_for, sync_folder, temporary_for
from moepress.runs.store.store import OWN, check_name, check_prefix

_T = TypeVar("_T")
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}
_COPIED_BYTES = 8 << 20
_STALE_TRIES = 5
_AT_FDCWD, _RENAME_NOREPLACE = -100, 1
_ABANDONED_SECONDS = 7 * 86400


class FolderStore:
    """Objects are files; see `store.Store` for what the methods promise."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.url = str(folder)
        self._swept = self._seen = False

    def get(self, name: str) -> bytes | None:
        """A whole object; None where there is none."""
        with self._said("read", name):
            return _unless_stale(lambda: self._whole(check_name(name)))

    def _whole(self, name: str) -> bytes | None:
        with _open(self.folder / name) as stream:
            self._seen |= stream is not None
            return None if stream is None else stream.read()

    def read(self, name: str, begin: int, end: int) -> bytes:
        """A range of an object."""
        with self._said("read", name):
            data = _unless_stale(lambda: self._range(check_name(name), begin, end))
        if len(data) != end - begin:
            raise StoreError(f"{name} in {self.url} ends before byte {end}, or is not there; was it deleted?")
        return data

    def _range(self, name: str, begin: int, end: int) -> bytes:
        with _open(self.folder / name) as stream:
            if stream is None:
                return b""
            stream.seek(begin)
            return stream.read(end - begin)

    def put(self, name: str, data: bytes) -> None:
        """Write or replace an object."""
        target = self.folder / check_name(name)
        with self._said("written", name), self._temporary(target, len(data)) as temporary:
            _write(temporary, data)
            temporary.replace(target)
            sync_folder(target.parent)

    def create(self, name: str, data: bytes) -> bool:
        """Write an object where there is none; True for exactly one writer."""
        target = self.folder / check_name(name)
        with self._said("written", name):
            if target.exists():  # the usual way to lose, without writing anything
                return False
            with self._temporary(target, len(data)) as temporary:
                _write(temporary, data)
                won = _name_once(temporary, target)
                sync_folder(target.parent)
                return won

    def names(self, prefix: str) -> list[str]:
        """Names below a folder, sorted."""
        top = self.folder / check_prefix(prefix)
        with self._said("listed", prefix or "."):
            return sorted(path.relative_to(self.folder).as_posix() for path in self._files(top))

    def _files(self, folder: Path) -> Iterator[Path]:
        try:
            entries = list(os.scandir(folder))
        except (FileNotFoundError, NotADirectoryError):
            return
        for entry in entries:
            path = Path(entry.path)
            if path == self.folder / OWN:
                continue
            if entry.is_dir():
                yield from self._files(path)
            elif entry.is_file():
                yield path

    def size(self, name: str) -> int | None:
        """Bytes of an object; None where there is none."""
        with self._said("read", name):
            place = self.local(name)
            try:
                return None if place is None else place.stat().st_size
            except FileNotFoundError:
                return None

    def send(self, path: Path, name: str, *, give: bool = False) -> None:
        """Store a file: moved where it is given and lies on the same file system, else copied."""
        target = self.folder / check_name(name)
        with self._said("written", name), self._temporary(target, path.stat().st_size) as temporary:
            if not (give and _moved(path, target)):
                with open_plain(path) as source:
                    _copy(source, temporary)
                temporary.replace(target)
            sync_folder(target.parent)
        if give:
            path.unlink(missing_ok=True)

    def fetch(self, name: str, path: Path) -> None:
        """Copy an object to a file."""
        temporary = temporary_for(path)
        with self._said("read", name), room_for(path), _open(self.folder / check_name(name)) as source:
            if source is None:
                raise StoreError(f"There is no {name} in {self.url}; was it deleted?")
            try:
                _copy(source, temporary)
                temporary.replace(path)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
        sync_folder(path.parent)

    def delete(self, name: str) -> None:
        """Remove an object; no error where there is none. Its folders stay, for others may be writing to them."""
        with self._said("deleted", name), suppress(FileNotFoundError, NotADirectoryError):
            (self.folder / check_name(name)).unlink()

    def local(self, name: str) -> Path | None:
        """The object's file."""
        place = self.folder / check_name(name)
        return place if place.is_file() else None

    @contextmanager
    def _temporary(self, target: Path, needed_bytes: int) -> Iterator[Path]:
        """A name for a file on the store's own file system; what is left of it is deleted."""
        own = self.folder / OWN
        if self._seen and not self.folder.is_dir():  # or a late writer would begin it anew, with nothing in it
            raise StoreError(f"{self.url} is gone; was it finished and deleted, or is it not mounted any more?")
        make_folders(own)
        self._seen = True
        make_folders(target.parent)
        self._sweep(own)
        temporary = own / f"{new_id()}.tmp"
        try:
            with room_for(target, needed_bytes):
                yield temporary
        finally:
            temporary.unlink(missing_ok=True)

    def _sweep(self, own: Path) -> None:
        """Once per process: delete what killed writers left a week ago, by the file system's own clock."""
        if self._swept:
            return
        self._swept = True
        mark = own / f"{new_id()}.tmp"
        os.close(create_file(mark))
        now = mark.stat().st_mtime
        mark.unlink()
        for leftover in own.glob("*.tmp"):
            with suppress(OSError):
                if leftover.stat().st_mtime < now - _ABANDONED_SECONDS:
                    leftover.unlink()

    @contextmanager
    def _said(self, done: str, name: str) -> Iterator[None]:
        """Errors of the system as a sentence."""
        try:
            yield
        except InvalidInputError as error:
            raise StoreError(f"{name} in {self.url} could not be {done}: {error}") from error
        except OSError as error:
            raise StoreError(
                f"{name} in {self.url} could not be {done}: {error.strerror or error}; check the folder, and that it "
                "is mounted and may be written to."
            ) from error


@contextmanager
def _open(file: Path) -> Iterator[IO[bytes] | None]:
    """A plain file's stream; None where there is none."""
    try:
        stream = open_plain(file)
    except (FileNotFoundError, NotADirectoryError):
        yield None
        return
    with stream:
        yield stream


def _unless_stale(act: Callable[[], _T]) -> _T:
    """Read again where NFS says that the file was replaced meanwhile on another machine."""
    for _ in range(_STALE_TRIES):
        try:
            return act()
        except OSError as error:
            if error.errno != errno.ESTALE:
                raise
            time.sleep(0.01)
    return act()


def _write(temporary: Path, data: bytes) -> None:
    with os.fdopen(create_file(temporary), "wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


def _copy(source: IO[bytes], temporary: Path) -> None:
    with os.fdopen(create_file(temporary), "wb") as sink:
        shutil.copyfileobj(source, sink, _COPIED_BYTES)
        sink.flush()
        os.fsync(sink.fileno())


def _moved(path: Path, target: Path) -> bool:
    """Rename a plain file that is on the disk as a whole; False where it lies on another file system."""
    if path.is_symlink():
        return False
    with open_plain(path) as stream:
        os.fsync(stream.fileno())
    try:
        path.replace(target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        return False
    return True


def _name_once(temporary: Path, target: Path) -> bool:
    """Give a file its name where nothing has it; whether this writer did."""
    try:
        os.link(temporary, target, follow_symlinks=False)
    except OSError as error:
        with suppress(OSError):
            if temporary.stat().st_nlink == 2:  # it took effect, and NFS lost the answer or repeated the request
                return True
        if isinstance(error, FileExistsError):
            return False
        if error.errno not in _NO_LINKS:
            raise
        return _rename_once(temporary, target)
    return True


def _rename_once(temporary: Path, target: Path) -> bool:
    """The same where there are no hard links."""
    if sys.platform == "win32":
        try:
            temporary.rename(target)
        except FileExistsError:
            return False
        return True
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):
        raise _no_way(target)
    names = os.fsencode(temporary), os.fsencode(target)
    if libc.renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_NOREPLACE) == 0:
        return True
    number = ctypes.get_errno()
    if number == errno.EEXIST:
        return False
    if number in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EPERM):
        raise _no_way(target)
    raise OSError(number, os.strerror(number), str(target))


def _no_way(target: Path) -> StoreError:
    return StoreError(
        f"The file system of {target.parent} has neither hard links nor a rename that does not replace, so several "
        "writers cannot share a folder there; choose a folder on another, or a bucket."
    )
