"""Where an output goes and what may be there already: all that can be refused before any work."""

import json
import os
import re
import stat
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moepress.errors import InvalidInputError, UsageError
from moepress.runs.files import JOURNAL, LOCK, TEMPORARY, read_text
from moepress.runs.lock import require_unlocked
from moepress.runs.rows import holds_journal, is_torn, read_rows

_SUMMARY, _PROFILE = "moepress.json", "profile.json"
_MARKER_BYTES = 64 << 20
_LONGEST_SUFFIX = ".replaced-4194304-0123456789abcdef"
_LONGEST_NAME = 96  # of a file in the work folder


def resolve_output(out: Path) -> Path:
    """The folder that an output really is: a link is followed, to where the output then appears.

    Raises:
        UsageError: links lead round in circles, or the path can not be followed.
    """
    try:
        target = out.resolve()
        itself = target.is_symlink()
    except (OSError, RuntimeError, ValueError) as error:
        raise _unusable(out, error) from error
    if itself:
        raise UsageError(f"The output {out} is a link that leads to itself; choose another name.")
    return target


def _unusable(out: Path, error: Exception) -> UsageError:
    why = getattr(error, "strerror", None) or "a link leads to itself, or the name holds what no name may"
    return UsageError(f"The output {cut(str(out))} can not be used ({why}); choose another name.")


def partial_folder(out: Path) -> Path:
    """The work folder of an output."""
    target = resolve_output(out)
    return target.with_name(f"{target.name}.partial")


def is_ours(folder: Path) -> bool:
    """Whether moepress has made a folder: one of its files says so, by its content."""
    if holds_journal(folder):
        return True
    summary, profile = (_marker(folder / name) for name in (_SUMMARY, _PROFILE))
    made = isinstance(summary.get("moepress"), str) and isinstance(summary.get("stage"), str)
    return made or {"schema_version", "model", "domains", "layers", "inventory"} <= profile.keys()


def _marker(file: Path) -> dict[str, Any]:
    try:
        if not stat.S_ISREG(file.lstat().st_mode) or file.lstat().st_size > _MARKER_BYTES:
            return {}
        found = json.loads(read_text(file))
    except (OSError, ValueError, RecursionError, InvalidInputError):
        return {}
    return found if isinstance(found, dict) else {}


def check_output(
    out: Path, inputs: Sequence[Path], *, resume: bool = False, force: bool = False, in_place: bool = False
) -> None:
    """Refuse an output that could not be put in place, would overwrite something, lies inside an input, or is being
    written; called before any work.

    `in_place` is for a run folder, which is its own work folder and may be gone on with.

    Raises:
        UsageError: with what to do instead.
        OutputLockedError: another live process writes to it.
    """
    target = resolve_output(out)
    try:
        _check_output(out, target, inputs, resume=resume, force=force, in_place=in_place)
    except OSError as error:
        raise _unusable(out, error) from error


def _check_output(
    out: Path, target: Path, inputs: Sequence[Path], *, resume: bool, force: bool, in_place: bool
) -> None:
    _check_names(out, target, next(p for p in (*target.parents, target) if p.exists()))
    _check_inputs(out, target, inputs, force=force)
    if target.exists() and not target.is_dir():
        raise UsageError(f"The output {out} is a file; give the name of a folder to be made.")
    partial = partial_folder(target)
    for folder in (target, partial):
        require_unlocked(folder)
    full = target.is_dir() and any(target.iterdir())
    begun = in_place and full and is_begun(target)
    unfinished = begun or ((in_place or resume) and holds_journal(target))
    if unfinished and not (resume or force):
        raise UsageError(f"{out} holds a run; pass --resume to go on with it, or --force to start anew.")
    if full and not (force or unfinished):
        raise UsageError(f"The output {out} is not empty; choose another name, or pass --force to replace it.")
    if full and not (begun or unfinished or is_ours(target)):
        raise not_ours(out)
    if not in_place and os.path.lexists(partial):
        if not (resume or force):
            raise UsageError(f"{partial} holds an unfinished run; pass --resume to go on, or --force to start anew.")
        require_work_folder(partial)
    moves = not in_place or (full and force and not resume and is_finished(target))
    _check_place(out, target, moves=moves, full=full)


def _check_inputs(out: Path, target: Path, inputs: Sequence[Path], *, force: bool) -> None:
    for source in inputs:
        root = source.resolve()
        if root.is_dir() and (target == root or root in target.parents):
            raise UsageError(f"The output {out} lies inside the input {source}; choose a folder outside of it.")
        if target in root.parents and force:
            raise UsageError(f"The output {out} holds the input {source} and would be replaced; choose another folder.")


def _check_place(out: Path, target: Path, *, moves: bool, full: bool) -> None:
    """Refuse what could not be made or renamed at the end.

    Args:
        out: as the user wrote it.
        target: as it was resolved.
        moves: it appears by a rename, instead of being written to where it is.
        full: it is there and holds something.
    """
    inside = f"write to a folder inside of it, such as {out / 'pressed'}"
    if moves and (target in (Path.cwd(), *Path.cwd().parents) or target == Path(target.anchor)):
        raise UsageError(f"The output {out} is the folder that you are in, or one around it; {inside}.")
    if moves and is_mount(target):
        raise UsageError(f"The output {out} is a mount point, which can not be put in place as a whole; {inside}.")
    place = next(p for p in target.parents if p.exists())
    if not place.is_dir():
        raise UsageError(f"The output {out} would lie in {place}, which is no folder; choose another name.")
    for folder in (*([place] if moves or not target.exists() else []), *([target] if full or not moves else [])):
        if folder.exists() and not os.access(folder, os.W_OK | os.X_OK):
            why = "is on a read-only file system" if _is_read_only(folder) else "may not be written to"
            hint = inside if moves and target.exists() and os.access(target, os.W_OK) else "choose another folder"
            raise UsageError(f"The output {out}: {folder} {why}; {hint}.")
    if moves and target.exists() and _is_stuck(target, place):
        raise UsageError(f"The output {out} belongs to another user and can not be replaced in {place}; {inside}.")


def _check_names(out: Path, target: Path, place: Path) -> None:
    if not hasattr(os, "pathconf"):
        return
    longest = os.fsencode(target.with_name(f"{target.name}{_LONGEST_SUFFIX}"))
    most_name, most_path = os.pathconf(place, "PC_NAME_MAX"), os.pathconf(place, "PC_PATH_MAX")
    if max(map(len, longest.split(b"/"))) > most_name or len(longest) + _LONGEST_NAME > most_path:
        raise UsageError(
            f"The output {cut(str(out))} has too long a name: {place} takes {most_name} bytes a name, of which the "
            f"work folder's takes {len(_LONGEST_SUFFIX)} more, and {most_path} in all; choose a shorter one."
        )


def cut(text: str) -> str:
    """A long name for a sentence."""
    return text if len(text) <= 80 else f"{text[:60]}...{text[-17:]}"


def _is_read_only(folder: Path) -> bool:
    return hasattr(os, "statvfs") and bool(os.statvfs(folder).f_flag & os.ST_RDONLY)


def _is_stuck(target: Path, parent: Path) -> bool:
    """Whether a folder's owner alone may rename it, as in /tmp."""
    if not hasattr(os, "geteuid") or os.geteuid() == 0 or not parent.stat().st_mode & stat.S_ISVTX:
        return False
    return os.geteuid() not in (target.stat().st_uid, parent.stat().st_uid)


def check_writable(folder: Path) -> None:
    """Refuse a folder for single files that may not be written to, or could not be made.

    Raises:
        UsageError: with what to do instead.
    """
    target = resolve_output(folder)
    try:
        place = next(p for p in (target, *target.parents) if p.exists())
        _check_names(folder, target, place)
    except OSError as error:
        raise _unusable(folder, error) from error
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        raise UsageError(f"The output {folder}: {place} may not be written to; choose another folder.")


def is_mount(folder: Path) -> bool:
    """Whether something is mounted at a folder; also a part of the same disk, which only Linux's own table tells."""
    if os.path.ismount(folder):
        return True
    if sys.platform != "linux":
        return False
    try:
        table = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:
        return False
    places = (re.sub(r"\\([0-7]{3})", lambda m: chr(int(m[1], 8)), row.split(" ")[4]) for row in table.splitlines())
    return str(folder) in places


def require_work_folder(folder: Path) -> None:
    """Refuse a folder that only has the name of a work folder.

    Raises:
        UsageError: it is a link, or holds files and no journal of ours.
    """
    if folder.is_symlink() or not folder.is_dir():
        raise UsageError(f"{folder} is in the way and is no work folder of moepress; move it away.")
    if not holds_journal(folder) and not is_begun(folder):
        raise UsageError(
            f"{folder} holds files but no {JOURNAL} of moepress, so it is no unfinished run; move it away."
        )


def is_begun(folder: Path) -> bool:
    """Whether a run was killed there before the first line of its journal was whole, so that it holds nothing."""
    if not folder.is_dir() or any(p.name not in (JOURNAL, LOCK) and p.suffix != TEMPORARY for p in folder.iterdir()):
        return False
    return not os.path.lexists(folder / JOURNAL) or is_torn(folder / JOURNAL)


def not_ours(out: Path) -> UsageError:
    """The refusal to replace a folder."""
    return UsageError(f"{out} does not look like a model, profile or run, so --force will not replace it; delete it.")


def is_finished(folder: Path) -> bool:
    """Whether a folder that is there holds a finished output; of a run folder its journal says so."""
    if not holds_journal(folder):
        return True
    try:
        return any(row.get("finished") or row.get("ends") for row in read_rows(folder / JOURNAL))
    except InvalidInputError:
        return False
