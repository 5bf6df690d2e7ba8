"""Runs that survive being killed: a work folder beside the output, with a journal of finished pieces.

    OUT                 appears, complete, when the run ends
    OUT.partial/        while it runs, and after it was killed
        journal.jsonl   line 1: settings; then one line per finished piece with its file, size and SHA-256
        lock.json       pid and host of the process that writes here
        moepress-traceback-*.txt   of a bug that ended the run; gone when it ends well
        <files>         finished pieces, under their final names

A piece is written to a temporary name, fsynced, renamed, and only then entered in the journal, so a line in the journal
stands for a whole file. A torn last line (the process was killed while writing it) is dropped.
"""

import hashlib
import json
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moepress.errors import InvalidInputError, OutputLockedError, UsageError

JOURNAL, LOCK, TEMPORARY = "journal.jsonl", "lock.json", ".tmp"
TRACEBACK = "moepress-traceback-"  # how the name of a file begins that tells of a bug; never part of an output
_MARKERS = (JOURNAL, "moepress.json", "profile.json")  # what --force may replace holds one of these


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A finished file: `name` inside the work folder, its size in bytes, its SHA-256, and what its maker noted."""

    id: str
    name: str
    bytes: int
    sha256: str
    note: Mapping[str, Any]


@dataclass(slots=True, kw_only=True)
class Run:
    """One output in the making. Use `open_run` to get one."""

    out: Path
    folder: Path
    settings: Mapping[str, Any]
    resumed: bool
    pieces: dict[str, Piece] = field(default_factory=dict)

    def done(self, piece: str) -> Piece | None:
        """The finished piece of that id, or None."""
        return self.pieces.get(piece)

    def path(self, piece: Piece) -> Path:
        """Where a finished piece lies."""
        return self.folder / piece.name

    def write(self, piece: str, name: str, write: Callable[[Path], Mapping[str, Any] | None]) -> Piece:
        """Make a piece: `write` fills a temporary file and may return a note for the journal."""
        temporary = self.folder / f"{name}{TEMPORARY}"
        note = write(temporary) or {}
        sync_file(temporary)
        size, digest = temporary.stat().st_size, sha256_of(temporary)
        temporary.replace(self.folder / name)
        sync_folder(self.folder)
        made = Piece(id=piece, name=name, bytes=size, sha256=digest, note=note)
        row = {"piece": piece, "file": name, "bytes": size, "sha256": digest, "note": note}
        _append(self.folder / JOURNAL, row)
        self.pieces[piece] = made
        return made

    def mark(self, stage: str, note: Mapping[str, Any] | None = None) -> None:
        """Note that a stage is done whose output is a folder of its own."""
        self.pieces[stage] = Piece(id=stage, name="", bytes=0, sha256="", note=note or {})
        _append(self.folder / JOURNAL, {"piece": stage, "file": "", "bytes": 0, "sha256": "", "note": note or {}})

    def drop(self, piece: str) -> None:
        """Remove a piece that was only needed on the way (hidden states of the layer before)."""
        found = self.pieces.pop(piece, None)
        if found is not None:
            _append(self.folder / JOURNAL, {"dropped": piece})
            if found.name:
                (self.folder / found.name).unlink(missing_ok=True)

    def finish(self, keep_journal: Path | None = None) -> None:
        """Turn the work folder into the output: everything whole, then one rename."""
        if keep_journal is not None:
            shutil.copyfile(self.folder / JOURNAL, keep_journal)
        for told in self.folder.glob(f"{TRACEBACK}*.txt"):
            told.unlink()
        sync_folder(self.folder)
        replaced = f"{self.out.name}.replaced-"
        if self.out.exists():
            if any(self.out.iterdir()):
                self.out.replace(self.out.with_name(f"{replaced}{os.getpid()}"))
            else:
                self.out.rmdir()
        self.folder.replace(self.out)
        sync_folder(self.out.parent)
        for name in (LOCK, JOURNAL):  # after the rename: without its journal a killed run could not be resumed
            (self.out / name).unlink()
        for old in list(self.out.parent.iterdir()):  # also that of a run which was killed here
            if old.name.startswith(replaced) and old.name.removeprefix(replaced).isdigit():
                shutil.rmtree(old)


def partial_folder(out: Path) -> Path:
    """The work folder of an output."""
    return out.with_name(f"{out.name}.partial")


def previous_settings(folder: Path) -> dict[str, Any]:
    """The settings of an unfinished run in that work folder, empty when there is none."""
    if not (folder / JOURNAL).is_file():
        return {}
    first = next(_rows(folder / JOURNAL), {}).get("settings")
    return first if isinstance(first, dict) else {}


def check_output(
    out: Path, inputs: Sequence[Path], *, resume: bool = False, force: bool = False, in_place: bool = False
) -> None:
    """Refuse an output that would overwrite something or lie inside an input; called before any work.

    `in_place` is for a run folder, which is its own work folder and may be gone on with.

    Raises:
        UsageError: with what to do instead.
    """
    target = out.resolve()
    for source in inputs:
        root = source.resolve()
        if root.is_dir() and (target == root or root in target.parents):
            raise UsageError(f"The output {out} lies inside the input {source}; choose a folder outside of it.")
        if target in root.parents and force:
            raise UsageError(f"The output {out} holds the input {source} and would be replaced; choose another folder.")
    if out.exists() and not out.is_dir():
        raise UsageError(f"The output {out} is a file; give the name of a folder to be made.")
    unfinished = (in_place or resume) and (out / JOURNAL).exists()
    if unfinished and not (resume or force):
        raise UsageError(f"{out} holds a run; pass --resume to go on with it, or --force to start anew.")
    if out.is_dir() and any(out.iterdir()) and not (force or unfinished):
        raise UsageError(f"The output {out} is not empty; choose another name, or pass --force to replace it.")
    if force and out.is_dir() and any(out.iterdir()) and not any((out / name).exists() for name in _MARKERS):
        raise UsageError(
            f"{out} does not look like a model, profile or run, so --force will not replace it; delete it."
        )
    if not in_place and partial_folder(out).exists() and not (resume or force):
        raise UsageError(
            f"{partial_folder(out)} holds an unfinished run; pass --resume to go on, or --force to start anew."
        )


@contextmanager
def open_run(
    out: Path, settings: Mapping[str, Any], *, resume: bool = False, force: bool = False, in_place: bool = False
) -> Iterator[Run]:
    """Start or resume a run.

    Args:
        out: the output folder to be made; `check_output` has allowed it.
        settings: everything that the result depends on, JSON-able; a resume with other settings is refused.
        resume: go on with an unfinished run where there is one.
        force: throw an unfinished run away.
        in_place: the output folder is its own work folder, and keeps its journal.

    Raises:
        UsageError: the settings differ from those of the unfinished run, or the work folder is not moepress's.
        InvalidInputError: a finished piece was changed.
        OutputLockedError: another live process writes to this output.
    """
    folder = out if in_place else partial_folder(out)
    settings = json.loads(json.dumps(settings))
    if resume and not in_place and (out / JOURNAL).exists():
        _take_back(out, settings)
    out.parent.mkdir(parents=True, exist_ok=True)
    if folder.exists():
        _require_ours(folder)
        _take_lock(folder)
        if force and not resume:
            shutil.rmtree(folder)
    folder.mkdir(exist_ok=True)
    _take_lock(folder)
    run = Run(out=out, folder=folder, settings=settings, resumed=False)
    rows: list[dict[str, Any]] = [{}]  # until they are read, there may be finished pieces
    try:
        rows = list(_rows(folder / JOURNAL, mend=True))
        if rows:
            _load(run, rows)
        else:
            _append(folder / JOURNAL, {"settings": settings})
        for leftover in folder.glob(f"*{TEMPORARY}"):
            leftover.unlink()
        yield run
    except Exception:
        if not (rows or run.pieces or in_place):  # nothing is lost: the next try needs no --resume or --force
            shutil.rmtree(folder, ignore_errors=True)
        raise
    finally:
        (folder / LOCK).unlink(missing_ok=True)


def _take_back(out: Path, settings: Mapping[str, Any]) -> None:
    """Make an output a work folder again: its run was killed after the last rename, before its journal was removed."""
    if partial_folder(out).exists() or previous_settings(out) != settings:
        raise UsageError(f"The output {out} is not empty; choose another name, or pass --force to replace it.")
    _take_lock(out)
    out.replace(partial_folder(out))


def _require_ours(folder: Path) -> None:
    ours = {JOURNAL, LOCK}
    if not (folder / JOURNAL).exists() and any(p.name not in ours and p.suffix != TEMPORARY for p in folder.iterdir()):
        raise UsageError(f"{folder} holds files but no {JOURNAL}, so it is no unfinished run; move it away.")


def _load(run: Run, rows: list[dict[str, Any]]) -> None:
    before = rows[0].get("settings")
    if not isinstance(before, dict):
        raise _damaged(run.folder / JOURNAL)
    changed = sorted(k for k in before.keys() | run.settings.keys() if before.get(k) != run.settings.get(k))
    if changed:
        details = "; ".join(f"{k} was {_short(before.get(k))}, now {_short(run.settings.get(k))}" for k in changed)
        raise UsageError(
            f"Cannot resume {run.folder}: {details}. Use the settings of before, or --force to start anew."
        )
    run.resumed, dropped = True, set[str]()
    for row in rows[1:]:
        if "dropped" in row:
            gone = run.pieces.pop(str(row["dropped"]), None)
            dropped |= {gone.name} if gone and gone.name else set()
        else:
            piece = _piece(run.folder / JOURNAL, row)
            run.pieces[piece.id] = piece
    for name in dropped - {piece.name for piece in run.pieces.values()}:  # killed between journal and unlink
        (run.folder / name).unlink(missing_ok=True)
    for piece in run.pieces.values():
        path = run.folder / piece.name
        if piece.name and (not path.is_file() or path.stat().st_size != piece.bytes or sha256_of(path) != piece.sha256):
            raise InvalidInputError(f"{path} was changed since it was written; pass --force to start anew.")


def _piece(journal: Path, row: Mapping[str, Any]) -> Piece:
    values = [row.get(key) for key in ("piece", "file", "bytes", "sha256")]
    note = row.get("note", {})
    match values:
        case [str(id_), str(name), int(size), str(digest)] if Path(name).name == name and isinstance(note, dict):
            return Piece(id=id_, name=name, bytes=size, sha256=digest, note=note)
    raise _damaged(journal)


def _damaged(journal: Path) -> InvalidInputError:
    return InvalidInputError(f"{journal} is damaged; pass --force to start anew.")


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _rows(journal: Path, *, mend: bool = False) -> Iterator[dict[str, Any]]:
    """The journal's rows without a torn last line; `mend` cuts that off, so that appending stays sound."""
    raw = journal.read_bytes() if journal.exists() else b""
    whole = raw[: raw.rfind(b"\n") + 1]
    if mend and len(whole) != len(raw):
        with journal.open("r+b") as stream:
            stream.truncate(len(whole))
    for line in whole.splitlines():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise _damaged(journal) from error
        if not isinstance(row, dict):
            raise _damaged(journal)
        yield row


def _append(journal: Path, row: Mapping[str, Any]) -> None:
    with journal.open("ab") as stream:
        stream.write(json.dumps(row, sort_keys=True).encode() + b"\n")
        stream.flush()
        os.fsync(stream.fileno())


def _take_lock(folder: Path) -> None:
    lock, mine = folder / LOCK, {"pid": os.getpid(), "host": socket.gethostname()}
    while True:
        try:
            with lock.open("x") as stream:  # fails when another process was faster
                stream.write(json.dumps(mine))
            return
        except FileExistsError:
            held = _lock_holder(lock)
        if held == mine:
            return
        if held is not None and (held.get("host") != mine["host"] or _alive(held.get("pid"))):
            raise OutputLockedError(
                f"{folder} is being written by process {held.get('pid')} on {held.get('host')}; wait for it, or delete "
                f"{lock} if that process is gone."
            )
        lock.unlink(missing_ok=True)  # stale


def _lock_holder(lock: Path) -> dict[str, Any] | None:
    """Who holds a lock; None when its writer died before it could say so."""
    for pause_seconds in (0.1, 0.4, 0.0):
        try:
            held = json.loads(lock.read_text())
            return held if isinstance(held, dict) else None
        except FileNotFoundError:
            return None
        except ValueError:  # just being written
            time.sleep(pause_seconds)
    return None


def _alive(pid: Any) -> bool:
    if not isinstance(pid, int) or pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sync_file(path: Path) -> None:
    """Flush a file to the disk."""
    with path.open("rb") as stream:
        os.fsync(stream.fileno())


def sync_folder(path: Path) -> None:
    """Flush a folder's names to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomically(path: Path, text: str) -> None:
    """Write a small text file: temporary name, fsync, rename."""
    temporary = path.with_name(f"{path.name}{TEMPORARY}")
    temporary.write_text(text, encoding="utf-8")
    sync_file(temporary)
    temporary.replace(path)
    sync_folder(path.parent)
