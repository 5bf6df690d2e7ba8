"""Files: read only where they are plain ones, written whole or not at all, flushed to the disk, hashed.

Temporary files have random names that nobody can plant a link at, and are made with O_EXCL. In the work folder of a run
the names hold the run's id, which stands in its journal, so that the next run can tell its own leftovers from others'.
"""

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from moepress.errors import InvalidInputError, MoepressError, UsageError
from moepress.runs.byte_sizes import mib_text

JOURNAL, LOCK, TEMPORARY = "journal.jsonl", "lock.json", ".tmp"
_KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}
_FULL = {errno.ENOSPC: "is full", errno.EDQUOT: "has no more room for this user", errno.EFBIG: "takes no file so large"}
_TEMPORARY_PART = re.compile(r"\.[0-9a-f]{16}-[0-9a-f]{8}\.tmp$")
_FIRST_LINE_BYTES = 16 << 20


def require_plain(file: Path) -> None:
    """Refuse what is there and is no plain file, without opening it: reading a pipe waits, a device may do anything.

    Raises:
        InvalidInputError: it is a pipe, a socket, a device or a folder.
        OSError: it cannot be looked at.
    """
    kind = _KINDS.get(stat.S_IFMT(file.stat().st_mode))
    if kind is not None:
        raise InvalidInputError(f"{file} is {kind}, not a plain file; give a file that can be read again and again.")


def open_plain(file: Path, *, buffering: int = -1) -> IO[bytes]:
    """Open a plain file for reading bytes.

    Raises:
        InvalidInputError: it is a pipe, a socket, a device or a folder.
        OSError: it cannot be opened.
    """
    require_plain(file)
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
    number = os.open(file, flags)  # does not wait, should it have become a pipe since
    try:
        if not stat.S_ISREG(os.fstat(number).st_mode):
            raise InvalidInputError(f"{file} is no plain file any more; give a file that can be read again and again.")
        return os.fdopen(number, "rb", buffering)
    except BaseException:
        os.close(number)
        raise


def read_text(file: Path) -> str:
    """A plain UTF-8 file's text; raises as `open_plain`, and UnicodeDecodeError."""
    with open_plain(file) as stream:
        return stream.read().decode("utf-8").replace("\r\n", "\n")


def create(file: Path) -> int:
    """Make a file that is not there yet, for writing; a link at its name is an error and is not followed."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0)
    return os.open(file, flags | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0), 0o666)


def rewrite(file: Path) -> IO[bytes]:
    """Open a file for writing from its start, made where it is not there; a link at its name is not followed."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    return os.fdopen(os.open(file, flags | getattr(os, "O_BINARY", 0), 0o666), "wb")


def run_id(folder: Path) -> str | None:
    """The id of the run whose work folder that is, or one of the two folders around it."""
    for place in (folder, *folder.parents[:2]):
        try:
            with open_plain(place / JOURNAL) as stream:
                found = json.loads(stream.readline(_FIRST_LINE_BYTES)).get("id")
        except (OSError, ValueError, AttributeError, RecursionError, InvalidInputError):
            continue
        if isinstance(found, str) and found.isalnum():
            return found
    return None


def new_id() -> str:
    """An id that nobody can guess."""
    return secrets.token_hex(8)


def temporary_for(file: Path) -> Path:
    """A name beside a file that is taken by nothing: `NAME.<id of the run>-<random>.tmp`."""
    return file.with_name(f"{file.name[:40]}.{run_id(file.parent) or new_id()}-{secrets.token_hex(4)}{TEMPORARY}")


def sweep(folder: Path, run: str) -> None:
    """Delete the temporary files that the run of that id has left, below a folder."""
    for leftover in list(folder.rglob(f"*.{run}-*{TEMPORARY}")):
        if not leftover.is_dir() or leftover.is_symlink():
            leftover.unlink()


def put(file: Path, data: bytes, *, sync: bool = False) -> None:
    """Write a small file: temporary name, rename. A link at its name is replaced, not followed.

    Args:
        file: what is there of that name is replaced.
        data: its content.
        sync: flush file and folder; not needed in a work folder, which is flushed as a whole before it is renamed.

    Raises:
        MoepressError: the disk is full.
    """
    temporary = temporary_for(file)
    with room_for(file, len(data)):
        try:
            with os.fdopen(create(temporary), "wb") as stream:
                stream.write(data)
                stream.flush()
                if sync:
                    os.fsync(stream.fileno())
            temporary.replace(file)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    if sync:
        sync_folder(file.parent)


def write_atomically(file: Path, text: str) -> None:
    """Write a small text file: temporary name, fsync, rename."""
    put(file, text.encode("utf-8"), sync=True)


def check_file(file: Path, option: str, *, force: bool) -> None:
    """Refuse a place for an output of one file: called before any work.

    Args:
        file: what is to be written.
        option: how the user named it, such as `-o` or `--timings`.
        force: it may replace a file.

    Raises:
        UsageError: with what to do instead.
    """
    try:
        found = file.lstat()
        parent = file.parent.resolve()
    except FileNotFoundError:
        found, parent = None, file.parent.resolve()
    except OSError as error:
        raise UsageError(f"{option} {file}: {error.strerror or error}; choose another name.") from error
    if found is not None and stat.S_ISDIR(found.st_mode):
        raise UsageError(f"{option} {file} is a folder, not a file in a folder that exists; choose another name.")
    if not parent.is_dir():
        raise UsageError(f"{option} {file} is not a file in a folder that exists; make {parent} first.")
    if found is not None and not (stat.S_ISREG(found.st_mode) or stat.S_ISLNK(found.st_mode)):
        raise UsageError(f"{option} {file} is no plain file and would be replaced by one; choose another name.")
    if found is not None and not force:
        raise UsageError(f"{option} {file} is there already; choose another name, or pass --force to replace it.")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise UsageError(f"{option} {file}: {parent} may not be written to; choose another folder.")


def sha256_of(file: Path) -> str:
    """SHA-256 of a plain file, in hex."""
    with open_plain(file) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()  # type: ignore[arg-type]


def sync_file(file: Path) -> None:
    """Flush a file to the disk, which may tell only now that it is full.

    Raises:
        MoepressError: it is.
    """
    with room_for(file, resumable=True), file.open("rb") as stream:
        os.fsync(stream.fileno())


def sync_folder(folder: Path) -> None:
    """Flush a folder's names to the disk, where its file system can do that for folders."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


def sync_tree(folder: Path, synced: Collection[Path] = ()) -> None:
    """Flush everything below a folder, but for files that are known to be, and at last the folder itself."""
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.is_dir(follow_symlinks=False):
            sync_tree(Path(entry.path), synced)
        elif entry.is_file(follow_symlinks=False) and Path(entry.path) not in synced:
            sync_file(Path(entry.path))
    sync_folder(folder)


def make_folders(folder: Path) -> None:
    """Make a folder and those above it, so that they are there after a power cut too."""
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    for place in reversed(missing):
        place.mkdir(exist_ok=True)
        sync_folder(place.parent)


def contents(folder: Path) -> dict[str, list[int]] | None:
    """All that lies below a folder by its path from there: size and mtime in ns of what is no folder, [] of folders;
    None where there is nothing of that name.
    """
    if not folder.is_dir() or folder.is_symlink():
        return None
    found: dict[str, list[int]] = {}
    waiting = [folder]
    while waiting:
        for entry in os.scandir(waiting.pop()):
            path = Path(entry.path)
            below = path.relative_to(folder).as_posix()
            if entry.is_dir(follow_symlinks=False):
                found[below] = []
                waiting.append(path)
            else:
                facts = entry.stat(follow_symlinks=False)
                found[below] = [facts.st_size, facts.st_mtime_ns]
    return found


def remove_listed(folder: Path, listed: Mapping[str, list[int]]) -> bool:
    """Delete of a folder what `contents` has listed and nothing else; whether the folder is gone then."""
    for below in sorted(listed, key=lambda name: name.count("/"), reverse=True):
        path = folder / below
        try:
            facts = path.lstat()
            if not listed[below]:
                path.rmdir()
            elif [facts.st_size, facts.st_mtime_ns] == listed[below]:
                path.unlink()
        except OSError:  # gone already, or a folder that holds something else
            continue
    try:
        folder.rmdir()
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True


@contextmanager
def room_for(file: Path, needed_bytes: int | None = None, *, resumable: bool = False) -> Iterator[None]:
    """Say of a full disk in the block which file did not fit, where, and how much is free and needed.

    Raises:
        MoepressError: the disk is full, the user's share of it, or no file may be so large.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        known = Path(os.fsdecode(error.filename)) if isinstance(error.filename, str | bytes) else file
        raise disk_full(error, known, needed_bytes, resumable=resumable) from error


def disk_full(error: OSError, file: Path, needed_bytes: int | None, *, resumable: bool) -> MoepressError:
    """The sentence for an error of a full disk."""
    file = file.with_name(_TEMPORARY_PART.sub("", file.name))
    place = next(p for p in file.absolute().parents if p.exists())
    free = mib_text(shutil.disk_usage(place).free)
    needed = f", {mib_text(needed_bytes)} needed" if needed_bytes is not None else ""
    again = "repeat with --resume" if resumable else "repeat the command"
    what, hint = _FULL[error.errno or 0], "make room there"
    if error.errno == errno.EFBIG:
        hint = "raise the limit (ulimit -f) or write to another disk,"
    elif error.errno == errno.ENOSPC and hasattr(os, "statvfs") and 0 == os.statvfs(place).f_favail < _files_of(place):
        what, hint = "holds as many files as it can", "delete some there"
    return MoepressError(
        f"{file} could not be written: the disk at {mount_of(place)} {what} ({free} free{needed}); {hint} and {again}."
    )


def _files_of(place: Path) -> int:
    """How many files a disk can hold; 0 where it does not count them."""
    return int(os.statvfs(place).f_files)


def full_disk_of(error: OSError) -> MoepressError:
    """The sentence for a full disk that was found where nobody knows the file: of those in use, the fullest."""
    if error.filename is not None:
        return disk_full(error, Path(os.fsdecode(error.filename)), None, resumable=True)
    places = (Path.cwd(), Path(tempfile.gettempdir()))
    fullest = min(places, key=lambda place: shutil.disk_usage(place).free)
    return disk_full(error, fullest / "a temporary file", None, resumable=True)


def is_full(error: OSError) -> bool:
    """Whether an error is that of a full disk."""
    return error.errno in _FULL


def mount_of(place: Path) -> Path:
    """Where the disk begins that a path is on."""
    place = place.resolve()
    return next((p for p in (place, *place.parents) if os.path.ismount(p)), place)
