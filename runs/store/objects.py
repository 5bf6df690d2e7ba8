"""A bucket as a store, through obstore: S3 and what speaks like it, Google Cloud Storage, Azure.

Credentials, addresses and regions are found by obstore alone, in the usual variables of the environment or from the
machine's role (docs/store.md). What it says of an error is shown shortened: never an address with its query.

obstore repeats what failed by a time that is bounded here, and reports what it cannot know, such as a connection cut
after a conditional write was sent. `create` then looks at what is there. Processes that use a bucket are started anew
(`spawn`), not forked: the library has threads of its own.
"""

import os
import re
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeVar

from moepress.errors import StoreError
from moepress.runs.files import create as create_file
from moepress.runs.files import new_id, require_plain, room_for, sync_folder, temporary_for
from moepress.runs.store.library import pause_seconds, require_unforked, settings, status_of, why
from moepress.runs.store.store import OWN, check_name, check_prefix

_T = TypeVar("_T")
INSTALL = "pip install 'moepress[store]'"
PATIENCE_SECONDS = 60.0
_SMALL_SECONDS, _LARGE_SECONDS = 10.0, 120.0  # one request: a small object, a part of a large one
_PART_BYTES, _MOST_PARTS, _AT_ONCE = 16 << 20, 9_000, 4
_TRIES = 5  # of ours, each with those of the library in it
_AGAIN = {408, 409, 425, 429}  # of the 4xx, those that may pass
_NO_BUCKET = re.compile(r"NoSuchBucket|ContainerNotFound|bucket does not exist")


@dataclass(frozen=True, slots=True)
class Facts:
    """What a listing tells of an object: its bytes, and what changes with its content."""

    size: int
    version: str | None


class ObjectStore:
    """Objects of a bucket; see `store.Store` for what the methods promise."""

    def __init__(self, url: str, *, patience_seconds: float = PATIENCE_SECONDS):
        """`url` as `open_store` has checked it; after that many seconds without success an error is raised."""
        try:
            import obstore
            from obstore import exceptions
            from obstore.store import from_url
        except ImportError as error:
            raise StoreError(f"{url} is a bucket, which needs obstore; install it with: {INSTALL}") from error
        require_unforked(url)
        self.url = url
        self._library, self._errors = obstore, exceptions
        self._patience_seconds = patience_seconds
        self._checked = threading.Lock()
        self._creates = False
        try:
            self._small = from_url(url, **settings(url, _SMALL_SECONDS, patience_seconds))
            self._large = from_url(url, **settings(url, _LARGE_SECONDS, patience_seconds))
        except (exceptions.BaseError, ValueError) as error:
            raise StoreError(f"{url} cannot be opened: {why(error)}; check the URL and docs/store.md.") from error

    def get(self, name: str) -> bytes | None:
        """A whole object; None where there is none."""
        return self._get(check_name(name))

    def _get(self, name: str) -> bytes | None:
        return self._tried("read", name, lambda: bytes(self._library.get(self._small, name).bytes()))

    def read(self, name: str, begin: int, end: int, *, version: str | None = None) -> bytes:
        """A range of an object, of that version alone where one is named."""
        check_name(name)
        if begin == end:
            return b""
        data = self._range(name, begin, end, version)
        if data is None or len(data) != end - begin:
            raise StoreError(f"{name} in {self.url} ends before byte {end}, or is not there; was it deleted?")
        return bytes(data)

    def _range(self, name: str, begin: int, end: int, version: str | None) -> Any:
        """What there is of a range; None where there is no such object."""
        options: dict[str, Any] = {"range": (begin, end)}
        if version is not None:
            options["if_match"] = version
        try:
            return self._tried("read", name, lambda: self._library.get(self._large, name, options=options).bytes())
        except StoreError as error:
            if isinstance(error.__cause__, self._errors.PreconditionError):
                raise StoreError(f"{name} in {self.url} changed while it was read; repeat the command.") from error
            raise

    def put(self, name: str, data: bytes) -> None:
        """Write or replace an object."""
        check_name(name)
        self._tried("written", name, lambda: self._library.put(self._small, name, data, use_multipart=False))

    def create(self, name: str, data: bytes) -> bool:
        """Write an object where there is none; True for exactly one writer."""
        check_name(name)
        self._require_conditions()
        return self._create(name, data)

    def _create(self, name: str, data: bytes) -> bool:
        require_unforked(self.url)
        begun = time.monotonic()
        for again in range(_TRIES):
            try:
                self._library.put(self._small, name, data, mode="create", use_multipart=False)
                return True
            except Exception as error:
                taken = isinstance(error, self._errors.AlreadyExistsError)
                if not taken and not self._passes(error, again, begun):
                    raise self._refusal("written", name, error) from error
            # Taken, perhaps by a try of ours whose answer was lost; or nobody knows what became of it.
            there = self._get(name)
            if there is not None:
                return there == data
            time.sleep(pause_seconds(again))
        raise StoreError(f"{name} in {self.url} could not be written: it is refused as taken, and is not there.")

    def _require_conditions(self) -> None:
        """Refuse a server that lets a second writer create what is there: several machines would win."""
        with self._checked:
            if self._creates:
                return
            name = f"{OWN}/{new_id()}"
            try:
                alone = self._create(name, b"first") and not self._create(name, b"second")
            except StoreError as error:
                if isinstance(error.__cause__, self._errors.NotSupportedError) or status_of(error.__cause__) == 501:
                    alone = False
                else:
                    raise
            if not alone:
                raise StoreError(
                    f"The server of {self.url} does not know conditional writes (If-None-Match: *), so several writers "
                    "cannot share it; choose a newer server, another bucket, or a shared folder."
                )
            self._delete(name)
            self._creates = True

    def names(self, prefix: str) -> list[str]:
        """Names below a folder of names, sorted."""
        folder = check_prefix(prefix)

        def listed() -> list[str]:
            rows = self._library.list(self._small, folder or None)
            return [row["path"] for chunk in rows for row in chunk]

        found = self._tried("listed", folder or "/", listed) or []
        return sorted(name for name in found if name.split("/")[0] != OWN)

    def listing(self) -> dict[str, Facts]:
        """The objects of the store's own folder by name, those below deeper folders left out."""
        found = self._tried("listed", "/", lambda: self._library.list_with_delimiter(self._small)["objects"]) or []
        return {row["path"]: Facts(row["size"], row["e_tag"]) for row in found}

    def size(self, name: str) -> int | None:
        """Bytes of an object; None where there is none."""
        facts = self._facts(check_name(name))
        return None if facts is None else int(facts["size"])

    def _facts(self, name: str) -> Any:
        return self._tried("read", name, lambda: self._library.head(self._small, name))

    def send(self, path: Path, name: str, *, give: bool = False) -> None:
        """Store a file, in parts where it is large."""
        check_name(name)
        require_plain(path)
        size = path.stat().st_size
        part = max(_PART_BYTES, -(-size // _MOST_PARTS))
        self._tried(
            "written",
            name,
            lambda: self._library.put(self._large, name, path, chunk_size=part, max_concurrency=_AT_ONCE),
        )
        there = self.size(name)
        if there != size:
            raise StoreError(f"{name} in {self.url} has {there} bytes, {size} were sent; did {path} change?")
        if give:
            path.unlink(missing_ok=True)

    def fetch(self, name: str, path: Path) -> None:
        """Write an object to a file, in parts."""
        check_name(name)
        temporary = temporary_for(path)
        with room_for(path):
            try:
                with os.fdopen(create_file(temporary), "wb") as sink:
                    self._fetch(name, sink)
                    sink.flush()
                    os.fsync(sink.fileno())
                temporary.replace(path)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
        sync_folder(path.parent)

    def _fetch(self, name: str, sink: IO[bytes]) -> None:
        """All parts of one version of an object."""
        facts = self._facts(name)
        if facts is None:
            raise StoreError(f"There is no {name} in {self.url}; was it deleted?")
        size, version, writing = facts["size"], facts["e_tag"], threading.Lock()

        def part(begin: int) -> None:
            data = self.read(name, begin, min(begin + _PART_BYTES, size), version=version)
            with writing:
                sink.seek(begin)
                sink.write(data)

        with ThreadPoolExecutor(max_workers=_AT_ONCE) as pool:
            for _ in pool.map(part, range(0, size, _PART_BYTES)):
                pass

    def delete(self, name: str) -> None:
        """Remove an object; no error where there is none."""
        self._delete(check_name(name))

    def _delete(self, name: str) -> None:
        self._tried("deleted", name, lambda: self._library.delete(self._small, name))

    def local(self, name: str) -> Path | None:
        """None: an object of a bucket is no file."""
        check_name(name)
        return None

    def _tried(self, done: str, name: str, act: Callable[[], _T]) -> _T | None:
        """What can be repeated without harm; None where there is no such object."""
        require_unforked(self.url)
        begun, again = time.monotonic(), 0
        while True:
            try:
                return act()
            except FileNotFoundError as error:
                if _NO_BUCKET.search(str(error)):
                    raise StoreError(f"There is no bucket of {self.url}; check its name, or create it.") from error
                return None
            except Exception as error:
                if not self._passes(error, again, begun):
                    raise self._refusal(done, name, error) from error
            time.sleep(pause_seconds(again))
            again += 1

    def _passes(self, error: Exception, again: int, begun: float) -> bool:
        """Whether another try is worth it."""
        lasting = (
            FileNotFoundError,
            self._errors.PermissionDeniedError,
            self._errors.UnauthenticatedError,
            self._errors.NotSupportedError,
            self._errors.PreconditionError,
            self._errors.UnknownConfigurationKeyError,
        )
        if not isinstance(error, self._errors.BaseError | OSError) or isinstance(error, lasting):
            return False
        status = status_of(error)
        if status is not None and (status < 500 or status == 501) and status not in _AGAIN:
            return False
        return again + 1 < _TRIES and time.monotonic() - begun < self._patience_seconds

    def _refusal(self, done: str, name: str, error: Exception) -> Exception:
        if not isinstance(error, self._errors.BaseError | OSError | ValueError):
            return error
        if _NO_BUCKET.search(str(error)):
            return StoreError(f"There is no bucket of {self.url}; check its name, or create it.")
        hint = "check the network, the credentials and docs/store.md, and repeat the command"
        return StoreError(f"{name} in {self.url} could not be {done}: {why(error)}; {hint}.")
