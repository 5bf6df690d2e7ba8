"""What a store is: objects by name, each whole or not there, and a name that only one writer can create.

A folder is one (`folder`), and so is a bucket (`objects`). All that several machines agree on rests on `create`, which
one of any number of writers wins. Names look like `done/layer-003.json`. Those below `.moepress/` are a store's own.
"""

from pathlib import Path
from typing import Protocol
from urllib.parse import unquote, urlsplit

from moepress.errors import UsageError

OWN = ".moepress"
_LONGEST = 800  # bytes of a name; S3 takes 1,024 with what comes before it
_BUCKETS = ("s3", "gs", "az")
KNOWN = "a folder, file:///FOLDER, s3://BUCKET/PATH, gs://BUCKET/PATH or az://CONTAINER/PATH"


class Store(Protocol):
    """Objects by name. All methods may be called from any thread.

    Raises (every method):
        StoreError: the store does not answer after all tries, refuses, or is full.
        ValueError: a name is not legal (`check_name`).
    """

    url: str
    """As people may see it: without credentials or query."""

    def get(self, name: str) -> bytes | None:
        """A whole small object; None where there is none."""

    def read(self, name: str, begin: int, end: int) -> bytes:
        """Bytes from `begin` up to `end`; StoreError where the object is not there or ends before."""

    def put(self, name: str, data: bytes) -> None:
        """Write a small object, or replace it: readers see the old one or the new one, whole."""

    def create(self, name: str, data: bytes) -> bool:
        """Write a small object where there is none.

        Args:
            name: of the object.
            data: with something in it that no other writer has. A bucket's answer may be lost after it took effect;
                on the next try the object is taken for ours where it is `data` byte for byte.

        Returns:
            True for exactly one writer: the object is that writer's `data`.
        """

    def names(self, prefix: str) -> list[str]:
        """Names below a folder of names (`""` for all), sorted. May lag: for looking, never for deciding."""

    def size(self, name: str) -> int | None:
        """Bytes of an object; None where there is none."""

    def send(self, path: Path, name: str, *, give: bool = False) -> None:
        """Store a file of any size in bounded memory; an object of that name is replaced, as by `put`.

        Args:
            path: of a file that does not change.
            name: of the object.
            give: the caller does not need the file any more: it may be moved, and is gone afterwards.
        """

    def fetch(self, name: str, path: Path) -> None:
        """Write an object to a file, which is replaced: temporary name, flush, rename. In bounded memory."""

    def delete(self, name: str) -> None:
        """Remove an object; no error where there is none."""

    def local(self, name: str) -> Path | None:
        """Where the object lies as a plain file that may be read in place; None elsewhere."""


def open_store(url: str) -> Store:
    """The store of a URL, or of a folder's path. A folder is made by the first object that is written.

    Raises:
        UsageError: the URL is of no known kind, is incomplete, or holds what does not belong there.
        StoreError: the library for buckets is not installed, or does not take the URL.
    """
    scheme, colon, rest = url.partition("://")
    if not colon:
        return _folder(Path(url), url)
    if scheme.lower() == "file":
        parts = urlsplit(url)
        if parts.netloc not in ("", "localhost") or not parts.path or parts.query or parts.fragment:
            raise UsageError("A store's file URL is file:///FOLDER, with three slashes and nothing behind the path.")
        return _folder(Path(unquote(parts.path)), url)
    if scheme.lower() not in _BUCKETS:
        raise UsageError(f"A store's URL cannot begin with {scheme[:20]}://; give {KNOWN}.")
    if "@" in rest or "?" in rest or "#" in rest:
        raise UsageError(
            f"The URL of the {scheme} store holds a user, a query or a fragment; give only {KNOWN}, and credentials "
            "by the environment (docs/store.md)."
        )
    if any(part in ("", ".", "..") for part in rest.rstrip("/").split("/")):
        raise UsageError(f"{url} names no bucket, or holds an empty part, `.` or `..`; give {KNOWN}.")
    from moepress.runs.store.objects import ObjectStore

    return ObjectStore(f"{scheme.lower()}://{rest.rstrip('/')}")


def _folder(path: Path, given: str) -> Store:
    from moepress.runs.store.folder import FolderStore

    if not given or "\0" in given:
        raise UsageError(f"A store needs a place; give {KNOWN}.")
    if path.exists() and not path.is_dir():
        raise UsageError(f"{path} is a file, not a folder; give {KNOWN}.")
    return FolderStore(path.absolute())


def check_name(name: str) -> str:
    """An object's name, if it is legal: relative, plain parts between single slashes, nothing of the store's own.

    Raises:
        ValueError: it is not; a bug of the caller, so that this is no sentence for users.
    """
    parts = name.split("/")
    bad = any(part in ("", ".", "..") for part in parts) or parts[0] == OWN
    if bad or not name.isprintable() or "\\" in name or len(name.encode("utf-8", "replace")) > _LONGEST:
        raise ValueError(f"{name!r} is no name of an object")
    return name


def check_prefix(prefix: str) -> str:
    """A folder of names without its last slash, or "" for all; raises as `check_name`."""
    prefix = prefix.removesuffix("/")
    return check_name(prefix) if prefix else ""
