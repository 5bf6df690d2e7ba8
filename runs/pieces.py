"""Finished pieces as a journal tells of them: a file, or a stage's folder with the digests of its files."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from moepress.errors import InvalidInputError
from moepress.runs.files import contents, remove_listed, sha256_of
from moepress.runs.rows import damaged


class Pieces(Protocol):
    """Where pieces are made and found again: a `journal.Run`, or what a task of a shared run has of it."""

    def done(self, piece: str) -> "Piece | None":
        """The finished piece of that id, or None."""

    def path(self, piece: "Piece") -> Path:
        """Where a finished piece lies."""

    def write(self, piece: str, name: str, write: Callable[[Path], Mapping[str, Any] | None]) -> "Piece":
        """Make a piece: `write` fills a file and may return a note."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A finished file: `name` inside the work folder, its size in bytes, its SHA-256, and what its maker noted.

    Of a finished stage `name` is empty or that of its folder, and `files` has size and SHA-256 of what lies in that.
    """

    id: str
    name: str
    bytes: int
    sha256: str
    note: Mapping[str, Any]
    files: Mapping[str, Sequence[Any]] | None = None


def parse_piece(journal: Path, row: Mapping[str, Any]) -> Piece:
    """A piece from its row.

    Raises:
        InvalidInputError: it is none, or names something outside of the folder.
    """
    values = [row.get(key) for key in ("piece", "file", "bytes", "sha256")]
    note, files = row.get("note", {}), row.get("files")
    match values:
        case [str(id_), str(name), int(size), str(digest)] if isinstance(note, dict):
            if _is_plain(name) if files is None else _are_inside(name, files):
                return Piece(id=id_, name=name, bytes=size, sha256=digest, note=note, files=files)
    raise damaged(journal)


def _is_plain(name: str) -> bool:
    return Path(name).name == name and "\0" not in name


def _are_inside(folder: str, files: Any) -> bool:
    """Whether a stage's row names nothing outside of its folder, and that nothing outside of the run's."""
    if not isinstance(files, dict) or not all(isinstance(facts, list) and len(facts) == 2 for facts in files.values()):
        return False
    names = [folder, *files]
    return all(n and "\0" not in n and not Path(n).is_absolute() and ".." not in Path(n).parts for n in names)


def digests(folder: Path) -> dict[str, list[Any]]:
    """Size and SHA-256 of every file below a folder, by its path from there."""
    listed = contents(folder) or {}
    return {name: [facts[0], sha256_of(folder / name)] for name, facts in sorted(listed.items()) if facts}


def require_whole(folder: Path, piece: Piece) -> None:
    """Hold a piece's files against size and digest.

    Raises:
        InvalidInputError: one was changed or is gone.
    """
    expected: dict[Path, Sequence[Any]] = {}
    if piece.files is not None:
        expected = {folder / piece.name / name: facts for name, facts in piece.files.items()}
    elif piece.name:
        expected = {folder / piece.name: (piece.bytes, piece.sha256)}
    for path, (size, digest) in expected.items():
        if not path.is_file() or path.stat().st_size != size or sha256_of(path) != digest:
            raise InvalidInputError(f"{path} was changed since it was written; pass --force to start anew.")


def remove_piece(folder: Path, piece: Piece) -> None:
    """Delete a dropped piece; of a stage's folder what its row lists."""
    if not piece.name:
        return
    if piece.files is None:
        (folder / piece.name).unlink(missing_ok=True)
        return
    place = folder / piece.name
    now = contents(place) or {}
    remove_listed(place, {name: facts for name, facts in now.items() if not facts or name in piece.files})
