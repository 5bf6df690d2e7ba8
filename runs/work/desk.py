"""What a worker has before it while it does a task: the files that the task needs, and room for those that it makes."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moepress.errors import StoreError
from moepress.runs.files import make_folders, sha256_of
from moepress.runs.work.shared import Shared, given_name
from moepress.runs.work.tasks import Done, Made, Task


class Desk:
    """Files of one worker.

    Args:
        shared: the run.
        folder: of this worker alone, which is its to delete.
        cache_bytes: how much of files fetched from afar may stay there beyond the task that wanted them.
    """

    def __init__(self, shared: Shared, folder: Path, cache_bytes: int):
        self.shared, self.folder, self.cache_bytes = shared, folder, cache_bytes
        self.made: dict[str, Path] = {}
        self.note: dict[str, Any] = {}
        self.task: Task | None = None
        self._fetched: dict[str, Path] = {}  # by object, those used last behind
        self._used: set[str] = set()
        self.fetched_bytes = 0

    def begin(self, task: Task) -> None:
        """An empty place for a task."""
        self.task, self.made, self.note, self._used = task, {}, {}, set()
        shutil.rmtree(self.folder / "making", ignore_errors=True)
        make_folders(self.folder / "making")

    def end(self) -> None:
        """Delete what was made and not taken, and what was fetched beyond the limit."""
        shutil.rmtree(self.folder / "making", ignore_errors=True)
        self._used.clear()
        self._evict()

    def output(self, name: str) -> Path:
        """Where the task is to write a file that it makes."""
        self.made[name] = self.folder / "making" / name
        return self.made[name]

    def scratch(self) -> Path:
        """A folder for what does not outlive the task."""
        make_folders(self.folder / "making" / "scratch")
        return self.folder / "making" / "scratch"

    def note_of(self, task: str) -> Mapping[str, Any]:
        """What a finished task noted."""
        return self._done(task).note

    def files_of(self, task: str) -> Mapping[str, Made]:
        """What a finished task made."""
        return self._done(task).files

    def input(self, task: str, name: str) -> Path:
        """A file that a finished task made, on this machine.

        Raises:
            StoreError: it is gone, or is not what was stored.
        """
        made = self._done(task).files[name]
        return self._here(made.object, made.bytes, made.sha256)

    def given(self, name: str) -> Path:
        """A file that the run was begun with."""
        size, digest = self.shared.work["given"][name]
        return self._here(given_name(name, digest), size, digest)

    def _done(self, task: str) -> Done:
        found = self.shared.done(task)
        if found is None:
            raise StoreError(f"{task} was done and its marker is gone from {self.shared.store.url}; was it deleted?")
        return found

    def _here(self, name: str, size: int, digest: str) -> Path:
        self._used.add(name)
        place = self.shared.store.local(name)
        if place is not None:
            if place.stat().st_size != size:
                raise StoreError(f"{name} in {self.shared.store.url} was changed since it was written.")
            return place
        if name in self._fetched:
            self._fetched[name] = self._fetched.pop(name)
            return self._fetched[name]
        self._evict(size)
        make_folders(self.folder / "fetched")
        path = self.folder / "fetched" / name.replace("/", "~")
        self.shared.store.fetch(name, path)
        if path.stat().st_size != size or sha256_of(path) != digest:
            path.unlink()
            raise StoreError(f"{name} in {self.shared.store.url} is not what was stored there.")
        self._fetched[name] = path
        self.fetched_bytes += size
        return path

    def _evict(self, wanted_bytes: int = 0) -> None:
        held = sum(path.stat().st_size for path in self._fetched.values())
        for name in [name for name in self._fetched if name not in self._used]:
            if held + wanted_bytes <= self.cache_bytes:
                return
            path = self._fetched.pop(name)
            held -= path.stat().st_size
            path.unlink()
