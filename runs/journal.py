"""Runs that survive being killed: a work folder beside the output, with a journal of finished pieces.

    OUT                 appears, complete, when the run ends (`runs.placing`)
    OUT.partial/        while it runs, and after it was killed
        journal.jsonl   line 1: settings and the run's id; then one line per finished piece with file, size and SHA-256
        lock.json       pid and host of the process that writes here
        moepress-traceback-*.txt   of a bug that ended the run; gone when it ends well
        <files>         finished pieces, under their final names

A piece is written to a temporary name, fsynced, renamed, and only then entered in the journal, so a line in the journal
stands for a whole file. A torn last line (the process was killed while writing it) is dropped.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moepress.errors import UsageError
from moepress.runs.files import (
    JOURNAL,
    LOCK,
    contents,
    create,
    make_folders,
    new_id,
    room_for,
    run_id,
    sha256_of,
    sweep,
    sync_file,
    sync_folder,
    sync_tree,
    temporary_for,
)
from moepress.runs.inputs import Stamps, require_unchanged
from moepress.runs.lock import release_lock, take_lock
from moepress.runs.output import (
    is_begun,
    is_finished,
    is_ours,
    not_ours,
    partial_folder,
    require_work_folder,
    resolve_output,
)
from moepress.runs.pieces import Piece, digests, parse_piece, remove_piece, require_whole
from moepress.runs.placing import (
    discard,
    empty_run_folder,
    put_in_place,
    recover,
    replace_run_folder,
    require_same,
    settle,
    settle_in_place,
    throw_away,
)
from moepress.runs.rows import append, damaged, read_rows
from moepress.runs.settings import changes

TRACEBACK = "moepress-traceback-"  # how the name of a file begins that tells of a bug; never part of an output


@dataclass(slots=True, kw_only=True)
class Run:
    """One output in the making. Use `open_run` to get one.

    Attributes:
        out: where it will be.
        folder: its work folder.
        settings: what the result depends on.
        resumed: it had begun before.
        pieces: what is finished, by id.
        before: `contents` of the output at the start, which may be replaced.
        inputs: the files it is made of, as they were at the start.
        aside: of a run folder, the journal's row about the one that it replaces.
    """

    out: Path
    folder: Path
    settings: Mapping[str, Any]
    resumed: bool
    pieces: dict[str, Piece] = field(default_factory=dict)
    before: Mapping[str, list[int]] | None = None
    inputs: Stamps = field(default_factory=dict)
    aside: Mapping[str, Any] | None = None

    def done(self, piece: str) -> Piece | None:
        """The finished piece of that id, or None."""
        return self.pieces.get(piece)

    def path(self, piece: Piece) -> Path:
        """Where a finished piece lies."""
        return self.folder / piece.name

    def write(self, piece: str, name: str, write: Callable[[Path], Mapping[str, Any] | None]) -> Piece:
        """Make a piece: `write` fills a temporary file and may return a note for the journal.

        Raises:
            MoepressError: the disk is full.
        """
        temporary = temporary_for(self.folder / name)
        with room_for(self.folder / name, resumable=True):
            os.close(create(temporary))
            try:
                note = write(temporary) or {}
                sync_file(temporary)
                size, digest = temporary.stat().st_size, sha256_of(temporary)
                temporary.replace(self.folder / name)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
            sync_folder(self.folder)
            row = {"piece": piece, "file": name, "bytes": size, "sha256": digest, "note": note}
            append(self.folder / JOURNAL, row)
        made = Piece(id=piece, name=name, bytes=size, sha256=digest, note=note)
        self.pieces[piece] = made
        return made

    def mark(self, stage: str, note: Mapping[str, Any] | None = None, *, folder: str | None = None) -> None:
        """Note that a stage is done whose output is a folder of its own.

        Args:
            stage: its id.
            note: for its maker.
            folder: where its output lies, below the work folder; a resume refuses it when its files were changed.
        """
        files = None if folder is None else digests(self.folder / folder)
        row = {"piece": stage, "file": "", "bytes": 0, "sha256": "", "note": note or {}}
        append(self.folder / JOURNAL, row if files is None else row | {"file": folder, "files": files})
        self.pieces[stage] = Piece(id=stage, name=folder or "", bytes=0, sha256="", note=note or {}, files=files)

    def drop(self, piece: str) -> None:
        """Remove a piece that was only needed on the way (hidden states of the layer before)."""
        found = self.pieces.pop(piece, None)
        if found is not None:
            append(self.folder / JOURNAL, {"dropped": piece})
            remove_piece(self.folder, found)

    def require_ready(self) -> None:
        """Refuse to finish; to be called before what a resume would need is dropped.

        Raises:
            InvalidInputError: an input changed since the start.
            UsageError: something appeared where the output is to be.
        """
        require_unchanged(self.inputs)
        if self.folder != self.out:
            require_same(self.out, self.folder, self.before)

    def finish(self, keep_journal: Path | None = None) -> None:
        """Turn the work folder into the output: everything whole and on the disk, then one rename.

        Raises:
            InvalidInputError, UsageError: as `require_ready`.
        """
        self.require_ready()
        if keep_journal is not None:
            shutil.copyfile(self.folder / JOURNAL, keep_journal)
        for told in self.folder.glob(f"{TRACEBACK}*.txt"):
            told.unlink()
        sync_tree(self.folder, {self.path(piece) for piece in self.pieces.values()})
        put_in_place(self.out, self.folder, self.before)

    def throw_away(self) -> None:
        """Delete all that was made: it is wrong, so there is nothing to go on with."""
        throw_away(self.folder)
        self.pieces.clear()
        release_lock(self.folder)
        self.folder.rmdir()

    def complete(self) -> None:
        """End a run folder, which is its own work folder: everything on the disk, and what it replaces deleted.

        Raises:
            InvalidInputError: an input changed since the start.
        """
        require_unchanged(self.inputs)
        sync_tree(self.folder)
        append(self.folder / JOURNAL, {"finished": True})
        if self.aside is not None:
            discard(self.out, self.aside)


@contextmanager
def open_run(
    out: Path,
    settings: Mapping[str, Any],
    *,
    resume: bool = False,
    force: bool = False,
    in_place: bool = False,
    inputs: Stamps | None = None,
) -> Iterator[Run]:
    """Start or resume a run.

    Args:
        out: the output folder to be made; `check_output` has allowed it.
        settings: everything that the result depends on, JSON-able; a resume with other settings is refused.
        resume: go on with an unfinished run where there is one.
        force: throw an unfinished run away, and replace an output that is there.
        in_place: the output folder is its own work folder, and keeps its journal.
        inputs: `runs.inputs.stamps` of what it is made of, from before anything of it was read.

    Raises:
        UsageError: the settings differ from those of the unfinished run, or the work folder is not moepress's.
        InvalidInputError: a finished piece was changed.
        OutputLockedError: another live process writes to this output.
        MoepressError: the disk is full.
    """
    out, settings = resolve_output(out), json.loads(json.dumps(settings))
    run_name = new_id()
    head: dict[str, Any] = {"settings": settings, "id": run_name}
    opened = _open_in_place if in_place else _open_beside
    folder, may_replace = opened(out, head, resume=resume, force=force)
    run = Run(out=out, folder=folder, settings=settings, resumed=False, inputs=inputs or {})
    rows: list[dict[str, Any]] = [{}]  # until they are read, there may be finished pieces
    try:
        rows = list(read_rows(folder / JOURNAL, mend=True))
        if rows:
            _load(run, rows)
            run.resumed = rows[0].get("id") != head["id"]
        with room_for(folder / JOURNAL, resumable=True):
            if not rows:
                append(folder / JOURNAL, head)
            sweep(folder, run_id(folder) or new_id())
            if not in_place:
                run.before = _before(out, may_replace=may_replace)
            yield run
    except Exception:
        if not (rows or run.pieces or in_place):  # nothing is lost: the next try needs no --resume or --force
            _drop_empty(folder, run_name)
        raise
    finally:
        release_lock(folder)


def _open_beside(out: Path, head: Mapping[str, Any], *, resume: bool, force: bool) -> tuple[Path, bool]:
    """The locked work folder of an output, and whether a run before was allowed to replace what is there."""
    folder = partial_folder(out)
    settle(out, head["settings"], resume=resume, force=force)
    make_folders(out.parent)
    recovered = False
    if os.path.lexists(folder):
        require_work_folder(folder)
        take_lock(folder)
        recovered = recover(out)
        if force and not resume:
            throw_away(folder)
    folder.mkdir(exist_ok=True)
    take_lock(folder)
    return folder, force or recovered


def _open_in_place(out: Path, head: Mapping[str, Any], *, resume: bool, force: bool) -> tuple[Path, bool]:
    """A run folder, locked; with --force anew."""
    partial = partial_folder(out)
    make_folders(out.parent)
    recover(out)
    make_folders(out)
    take_lock(out)
    settle_in_place(out, partial)
    full = any(path.name != LOCK for path in out.iterdir())
    if full and not force:
        require_work_folder(out)
    if full and force and not resume:
        if not (is_ours(out) or is_begun(out)):
            raise not_ours(out)
        if is_finished(out):
            replace_run_folder(out, partial, head)
        else:
            empty_run_folder(out, head)
    return out, force


def _before(out: Path, *, may_replace: bool) -> Mapping[str, list[int]] | None:
    """What is there now and may be replaced at the end: `check_output` may have been long ago."""
    found = contents(out)
    if found and not may_replace:
        raise UsageError(f"The output {out} is not empty; choose another name, or pass --force to replace it.")
    if found and not is_ours(out):
        raise not_ours(out)
    return found


def _drop_empty(folder: Path, run: str) -> None:
    """Remove a work folder in which nothing was finished; what somebody else put there stays, and so does it."""
    sweep(folder, run)
    (folder / JOURNAL).unlink(missing_ok=True)
    (folder / LOCK).unlink(missing_ok=True)
    left = contents(folder)
    if left == {}:
        folder.rmdir()


def _load(run: Run, rows: list[dict[str, Any]]) -> None:
    before, journal = rows[0].get("settings"), run.folder / JOURNAL
    if not isinstance(before, dict):
        raise damaged(journal)
    changed = changes(before, run.settings)
    if changed:
        raise UsageError(
            f"Cannot resume {run.folder}: {'; '.join(changed)}. Use the settings of before, or --force to start anew."
        )
    dropped: list[Piece] = []
    for row in rows[1:]:
        if "dropped" in row:
            gone = run.pieces.pop(str(row["dropped"]), None)
            dropped += [gone] if gone else []
        elif "aside" in row:
            run.aside = row
        elif "finished" not in row:
            piece = parse_piece(journal, row)
            run.pieces[piece.id] = piece
    kept = {piece.name for piece in run.pieces.values()}
    for piece in dropped:  # killed between journal and unlink
        if piece.name not in kept:
            remove_piece(run.folder, piece)
    for piece in run.pieces.values():
        require_whole(run.folder, piece)
