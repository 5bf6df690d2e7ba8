"""A worker's files: what it fetches is what was stored, and no more of it stays than it may keep."""

from pathlib import Path

import pytest
from small_runs import Perform, planned, reopened, work, worker

from moepress.errors import StoreError
from moepress.runs.store.store import Store
from moepress.runs.work.desk import Desk


@pytest.fixture
def store(tmp_path: Path) -> Store:
    found = planned(tmp_path / "store", tmp_path)
    with worker(found, tmp_path) as one:
        work(one, 4)
    return found


class Afar:
    """A folder store whose objects are no files of this machine, as those of a bucket."""

    def __init__(self, inner: Store) -> None:
        self.inner, self.fetched = inner, []

    def __getattr__(self, name: str) -> object:
        return getattr(self.inner, name)

    def local(self, name: str) -> None:
        return None

    def fetch(self, name: str, path: Path) -> None:
        self.fetched.append(name)
        self.inner.fetch(name, path)


def desk_of(store: object, folder: Path, cache_bytes: int) -> Desk:
    shared = reopened(store)  # type: ignore[arg-type]
    shared.store = store  # type: ignore[assignment]
    return Desk(shared, folder, cache_bytes)


def test_a_folder_s_files_are_read_in_place(store: Store, tmp_path: Path) -> None:
    desk = desk_of(store, tmp_path / "desk", 0)
    assert desk.input("begin-0", "bytes").is_relative_to(tmp_path / "store")
    assert desk.fetched_bytes == 0
    assert desk.note_of("begin-0") == {"of": "begin-0"}


def test_what_is_fetched_stays_within_the_limit_and_for_the_task_that_has_it(store: Store, tmp_path: Path) -> None:
    afar = Afar(store)
    desk = desk_of(afar, tmp_path / "desk", 7000)  # two of 3200 bytes
    parts = ["begin-0", "wide-0-0", "wide-0-1", "wide-0-2"]
    desk.begin(desk.shared.tasks[4])
    paths = [desk.input(part, "bytes") for part in parts]
    assert all(path.is_file() for path in paths)  # all of a task's at once, whatever the limit
    desk.end()
    assert [path.is_file() for path in paths] == [False, False, True, True]
    count = len(afar.fetched)
    desk.input("wide-0-2", "bytes")
    assert len(afar.fetched) == count
    desk.input("begin-0", "bytes")
    assert len(afar.fetched) == count + 1
    assert desk.fetched_bytes == 3200 * 5


@pytest.mark.parametrize("afar", [False, True], ids=["folder", "bucket"])
@pytest.mark.parametrize("content", [b"short", None], ids=["changed", "missing"])
def test_what_is_not_what_was_stored_is_refused(
    store: Store, tmp_path: Path, content: bytes | None, *, afar: bool
) -> None:
    (name,) = store.names("out/begin-0")
    store.delete(name)
    if content is not None:
        store.put(name, content)
    desk = desk_of(Afar(store) if afar else store, tmp_path / "desk", 0)
    with pytest.raises(StoreError, match=r"changed|not what was stored|no out/begin-0"):
        desk.input("begin-0", "bytes")


def test_what_has_the_same_size_is_refused_from_afar(store: Store, tmp_path: Path) -> None:
    (name,) = store.names("out/begin-0")
    store.put(name, b"x" * 3200)
    with pytest.raises(StoreError, match="is not what was stored there"):
        desk_of(Afar(store), tmp_path / "desk", 0).input("begin-0", "bytes")
    assert not list((tmp_path / "desk").rglob("*bytes"))


def test_a_missing_marker_is_said(store: Store, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="its marker is gone"):
        desk_of(store, tmp_path / "desk", 0).input("end-1", "bytes")


def test_a_task_begins_and_ends_with_an_empty_place(store: Store, tmp_path: Path) -> None:
    desk = desk_of(store, tmp_path / "desk", 0)
    desk.begin(desk.shared.tasks[0])
    desk.output("bytes").write_bytes(b"x")
    (desk.scratch() / "more").write_bytes(b"x")
    desk.begin(desk.shared.tasks[1])
    assert desk.made == {}
    assert list((tmp_path / "desk" / "making").iterdir()) == []
    desk.end()
    assert list((tmp_path / "desk").iterdir()) == []


def test_a_worker_leaves_nothing_on_its_desk(store: Store, tmp_path: Path) -> None:
    with worker(store, tmp_path, "again", Perform()) as one:
        work(one)
    assert list((tmp_path / "again").iterdir()) == []
