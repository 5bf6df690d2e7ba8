"""How a finished work folder becomes the output, and what the next run mends where that was cut short.

An output is worked on in OUT.partial and appears as OUT by one rename. With --force it replaces an output of before:

    journal     {"ends": true, "aside": "OUT.replaced-<pid>-<random>", "files": {...}}, flushed
    rename      OUT -> OUT.replaced-...                     killed here, the next run puts it back
    rename      OUT.partial -> OUT
    delete      what the journal lists of OUT.replaced-..., then journal and lock

so at every moment the old or the new output is whole, and nothing is deleted that was not there when the run began.
"""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moepress.errors import InvalidInputError, UsageError
from moepress.runs.files import (
    JOURNAL,
    LOCK,
    contents,
    new_id,
    remove_listed,
    sync_folder,
    write_atomically,
)
from moepress.runs.lock import take_lock
from moepress.runs.output import is_begun, is_finished, partial_folder
from moepress.runs.progress import note
from moepress.runs.rows import append, first_settings, holds_journal, read_rows


def _ending(folder: Path) -> dict[str, Any]:
    """The last row in a folder's journal that says what was set aside for it; empty where there is none."""
    if not holds_journal(folder):
        return {}
    try:
        rows = [row for row in read_rows(folder / JOURNAL) if "aside" in row]
    except InvalidInputError:
        return {}
    return rows[-1] if rows else {}


def _aside(out: Path, row: Mapping[str, Any]) -> tuple[Path, dict[str, list[int]]] | None:
    """The folder beside OUT that a row names, and what is ours in it; None where it is gone."""
    name, files = row.get("aside"), row.get("files")
    pattern = rf"{re.escape(out.name)}\.replaced-\d+-[0-9a-f]{{16}}"
    if not isinstance(name, str) or not isinstance(files, dict) or not re.fullmatch(pattern, name):
        return None
    if any(Path(below).is_absolute() or ".." in Path(below).parts or "\0" in below for below in files):
        return None
    place = out.with_name(name)
    return (place, files) if place.is_dir() and not place.is_symlink() else None


def recover(out: Path) -> bool:
    """Put an output back that a killed run had set aside before it put its own in place; whether it did."""
    found = _aside(out, _ending(partial_folder(out)))
    if found is None or os.path.lexists(out):
        return False
    found[0].rename(out)
    sync_folder(out.parent)
    return True


def drop_seed(partial: Path) -> None:
    """Remove what `replace_run_folder` had begun before it was killed: a journal and a lock, and nothing else.

    Raises:
        OutputLockedError: another live process writes to it.
    """
    if not partial.is_dir() or partial.is_symlink() or any(p.name not in (JOURNAL, LOCK) for p in partial.iterdir()):
        return
    if not (holds_journal(partial) or is_begun(partial)):
        return
    take_lock(partial)
    for name in (JOURNAL, LOCK):
        (partial / name).unlink(missing_ok=True)
    partial.rmdir()


def settle(out: Path, settings: Mapping[str, Any], *, resume: bool, force: bool) -> None:
    """End what a run began that was killed after its output was in place: it is whole, but has its journal still.

    A resume with the same settings makes it a work folder again, to be finished as any other.

    Raises:
        OutputLockedError: another live process writes to it.
    """
    row = _ending(out)
    if not row.get("ends") or not (resume or force):
        return
    same = first_settings(out) == settings
    if not (force or same):
        return
    take_lock(out)
    discard(out, row)
    if resume and same and not os.path.lexists(partial_folder(out)):
        out.rename(partial_folder(out))
        sync_folder(out.parent)
    else:
        _tidy(out)


def new_aside(out: Path) -> str:
    """A name beside an output for what it replaces."""
    return f"{out.name}.replaced-{os.getpid()}-{new_id()}"


def discard(out: Path, row: Mapping[str, Any]) -> None:
    """Delete what a row says was set aside; what it does not list stays, with a note."""
    found = _aside(out, row)
    if found is not None and not remove_listed(*found):
        note(f"{found[0]} holds what was not in the old output; it is kept.")


def put_in_place(out: Path, partial: Path, before: Mapping[str, list[int]] | None) -> None:
    """Turn a work folder that is whole and flushed into the output, in place of what was there at the start.

    Args:
        out: the output.
        partial: its work folder.
        before: `contents` of the output at the start; what it holds may be replaced.

    Raises:
        UsageError: something else is there now.
    """
    require_same(out, partial, before)
    row = {"ends": True, "aside": new_aside(out) if before else None, "files": dict(before or {})}
    append(partial / JOURNAL, row)
    if before:
        out.rename(out.with_name(str(row["aside"])))
        sync_folder(out.parent)
    elif before is not None and os.name == "nt":  # elsewhere a rename replaces an empty folder
        out.rmdir()
    try:
        partial.rename(out)
    except OSError as error:
        require_same(out, partial, None if before else before, error)
        raise
    sync_folder(out.parent)
    discard(out, row)
    _tidy(out)


def require_same(
    out: Path, partial: Path, before: Mapping[str, list[int]] | None, cause: OSError | None = None
) -> None:
    """Refuse to replace what was not there at the start.

    Raises:
        UsageError: naming one of the files.
    """
    now = contents(out)
    if now == before and (now is not None) == os.path.lexists(out):
        return
    old = before or {}
    new = sorted(name for name in now or {} if (now or {})[name] != old.get(name))
    what = f"{out / new[0]} appeared or changed" if new else f"{out} changed"
    raise UsageError(
        f"{what} while the output was made, and nothing is replaced that was not there at the start: the result is in "
        f"{partial}; move {out} away and repeat with --resume."
    ) from cause


def _tidy(out: Path) -> None:
    for name in (LOCK, JOURNAL):  # after the rename: without its journal a killed run could not be resumed
        (out / name).unlink(missing_ok=True)
    sync_folder(out)


def replace_run_folder(out: Path, partial: Path, head: Mapping[str, Any]) -> None:
    """Begin a run folder anew in place of one that is finished, which is kept aside until the new one is.

    Args:
        out: the run folder, locked by this process.
        partial: a name beside it for the new one.
        head: the first row of the new journal.
    """
    if os.path.lexists(partial):
        raise UsageError(f"{partial} is in the way; end that run with --resume, or move it away.")
    aside = new_aside(out)
    row = {"aside": aside, "files": contents(out)}
    partial.mkdir()
    take_lock(partial)
    for line in (head, row):
        append(partial / JOURNAL, line)
    sync_folder(partial)
    out.rename(out.with_name(aside))
    partial.rename(out)
    sync_folder(out.parent)


def settle_in_place(out: Path, partial: Path) -> None:
    """End what a run folder's last run did not come to: it is locked by this process."""
    drop_seed(partial)
    if is_finished(out):
        discard(out, _ending(out))


def empty_run_folder(out: Path, head: Mapping[str, Any]) -> None:
    """Throw away what an unfinished run has left in its folder; what it had set aside stays noted.

    Args:
        out: the run folder, locked by this process.
        head: the first row of the new journal.
    """
    row = _ending(out)
    lines = [head, row] if row else [head]
    write_atomically(out / JOURNAL, "".join(json.dumps(line, sort_keys=True) + "\n" for line in lines))
    listed = {name: facts for name, facts in (contents(out) or {}).items() if name not in (JOURNAL, LOCK)}
    for below in sorted(listed, key=lambda name: name.count("/"), reverse=True):
        (out / below).unlink() if listed[below] else (out / below).rmdir()
