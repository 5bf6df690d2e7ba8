"""An output that is one file: made in a folder beside it like any other output, and moved out when it is whole.

FILE.making/        the run's folder, which is worked on in FILE.making.partial (`runs.journal`)
FILE                appears by one link or rename; then the folder goes
"""

import errno
import os
from collections.abc import Callable
from pathlib import Path

from moepress.errors import UsageError
from moepress.runs.files import check_file, contents, new_id, remove_listed, sync_folder
from moepress.runs.progress import note

_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}


def making(file: Path) -> Path:
    """The folder in which a file is made."""
    return file.with_name(f"{file.name}.making")


def check_single(file: Path, ours: Callable[[Path], bool], *, force: bool) -> None:
    """Refuse a place for a file before any work.

    Args:
        file: what is to be written.
        ours: whether a file that is there was made by moepress; nothing else is replaced.
        force: it may replace one of ours.

    Raises:
        UsageError: with what to do instead.
    """
    check_file(file, "-o", force=force)
    if os.path.lexists(file) and (file.is_symlink() or not ours(file)):
        raise UsageError(f"{file} was not made by moepress, so --force will not replace it; delete it.")


def put_single(name: str, file: Path, ours: Callable[[Path], bool], *, force: bool) -> None:
    """Move a finished file out of the folder in which it was made, and remove that folder.

    Args:
        name: of the file in its folder.
        file: where it goes.
        ours, force: as of `check_single`.

    Raises:
        UsageError: a file has appeared there that may not be replaced; what was made stays in its folder.
    """
    folder = making(file)
    made = contents(folder) or {}
    try:
        check_single(file, ours, force=force)
        if force:
            (folder / name).replace(file)
        else:
            _move_new(folder / name, file)
    except (UsageError, FileExistsError) as error:
        raise UsageError(f"{file} has appeared meanwhile; what was made is {folder / name}.") from error
    # Under another name first: a kill leaves nothing that a later run would take for an output.
    aside = folder.with_name(f"{folder.name}.done-{new_id()}")
    folder.rename(aside)
    sync_folder(file.parent)
    if not remove_listed(aside, made):
        note(f"{aside} holds what this run did not make; it is kept.")


def _move_new(made: Path, file: Path) -> None:
    """A move that never replaces; where the file system has no links, all but a moment's chance of it is excluded."""
    try:
        os.link(made, file)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        if os.path.lexists(file):
            raise FileExistsError(str(file)) from error
        made.rename(file)
        return
    made.unlink()
