"""What a store promises, of a folder and of a bucket on a real S3 server alike."""

import errno
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from moepress.errors import StoreError, UsageError
from moepress.runs.store.folder import FolderStore
from moepress.runs.store.store import Store, check_name, open_store

PART = 16 << 20
RACER = """
import json, os, sys
from moepress.runs.store.store import open_store
store = open_store(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
print(json.dumps([n for n in range(25) if store.create(f"race/{n}", f"{os.getpid()} {n}".encode())]))
"""
CARRIER = """
import resource, sys
from pathlib import Path
from moepress.runs.store.store import open_store
store, folder = open_store(sys.argv[1]), Path(sys.argv[2])
store.put("warm", b"1")
store.get("warm")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
store.send(folder / "large", "some/large")
store.fetch("some/large", folder / "back")
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@pytest.fixture(params=["folder", "bucket"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "folder":
        return str(tmp_path / "new" / "store")
    return f"{request.getfixturevalue('bucket')}/some/run"


@pytest.fixture
def store(url: str) -> Store:
    return open_store(url)


def test_objects_are_written_replaced_read_and_deleted(store: Store) -> None:
    assert store.get("done/a.json") is None
    assert store.size("done/a.json") is None
    store.put("done/a.json", b"old")
    store.put("done/a.json", b"newer")
    store.put("empty", b"")
    assert (store.get("done/a.json"), store.size("done/a.json")) == (b"newer", 5)
    assert (store.get("empty"), store.size("empty")) == (b"", 0)
    store.delete("done/a.json")
    store.delete("done/a.json")
    assert store.get("done/a.json") is None


def test_only_the_first_creates(store: Store) -> None:
    assert store.create("done/a.json", b"first")
    assert not store.create("done/a.json", b"second")
    assert store.get("done/a.json") == b"first"
    store.put("b", b"put")
    assert not store.create("b", b"created")
    store.delete("b")
    assert store.create("b", b"created")


def test_names_are_those_below_a_folder_of_names(store: Store) -> None:
    for name in ("b", "a/2", "a/10/x", "ab/1", "a.json", "a b/ü%20#?*"):
        assert store.create(name, b"1")
    assert store.names("") == sorted(["b", "a/2", "a/10/x", "ab/1", "a.json", "a b/ü%20#?*"])
    assert store.names("a") == store.names("a/") == ["a/10/x", "a/2"]
    assert store.names("a/10") == ["a/10/x"]
    assert store.names("a.json") == store.names("nothing") == []
    assert store.get("a b/ü%20#?*") == b"1"


def test_ranges(store: Store) -> None:
    data = bytes(range(256)) * 40
    store.put("x/data", data)
    for begin, end in ((0, 0), (0, 1), (100, 5000), (len(data) - 1, len(data)), (0, len(data))):
        assert store.read("x/data", begin, end) == data[begin:end]
    for name, begin, end in (("x/data", 5, len(data) + 1), ("x/data", len(data) + 5, len(data) + 9), ("no", 0, 4)):
        with pytest.raises(StoreError, match=r"x/data|no") as caught:
            store.read(name, begin, end)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("size", [0, 1, PART, PART + 1, 3 * PART + 12345])
def test_files_go_there_and_back(store: Store, tmp_path: Path, size: int) -> None:
    file, back = tmp_path / "file", tmp_path / "back"
    file.write_bytes(os.urandom(size))
    store.send(file, "deep/er/file")
    assert file.stat().st_size == size
    assert store.size("deep/er/file") == size
    back.write_bytes(b"what is replaced")
    store.fetch("deep/er/file", back)
    assert back.read_bytes() == file.read_bytes()
    place = store.local("deep/er/file")
    assert place is None or place.read_bytes() == file.read_bytes()
    assert {path.name for path in tmp_path.iterdir()} <= {"file", "back", "new"}


def test_a_given_file_is_gone(store: Store, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content")
    store.put("x", b"old")
    store.send(tmp_path / "file", "x", give=True)
    assert not (tmp_path / "file").exists()
    assert store.get("x") == b"content"


def test_what_is_not_there_leaves_no_file(store: Store, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no/such"):
        store.fetch("no/such", tmp_path / "back")
    assert store.local("no/such") is None
    assert not (tmp_path / "back").exists()
    assert not list(tmp_path.glob("*.tmp"))


def test_one_of_sixteen_threads_creates(store: Store) -> None:
    ready, wins = threading.Barrier(16), []

    def race(number: int) -> None:
        ready.wait()
        mine = f"thread {number}".encode()
        wins.extend((name, number) for name in range(5) if store.create(f"race/{name}", mine))

    threads = [threading.Thread(target=race, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(name for name, _ in wins) == list(range(5))
    for name, number in wins:
        assert store.get(f"race/{name}") == f"thread {number}".encode()


def test_one_of_four_processes_creates(url: str) -> None:
    racers = [
        subprocess.Popen([sys.executable, "-c", RACER, url], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    for racer in racers:
        assert racer.stdout is not None
        assert racer.stdout.readline() == "ready\n"
    for racer in racers:
        assert racer.stdin is not None
        racer.stdin.write("go\n")
        racer.stdin.flush()
    wins = {racer.pid: json.loads(racer.communicate(timeout=120)[0]) for racer in racers}
    assert sorted(name for names in wins.values() for name in names) == list(range(25))
    store = open_store(url)
    for pid, names in wins.items():
        for name in names:
            assert store.get(f"race/{name}") == f"{pid} {name}".encode()


def test_readers_see_whole_objects_only(store: Store) -> None:
    stop, seen = threading.Event(), set()
    store.put("x", b"0" * 200_000)

    def watch() -> None:
        while not stop.is_set():
            data = store.get("x")
            assert data is not None
            seen.add((len(data), data[:1], len(set(data))))

    threads = [threading.Thread(target=watch) for _ in range(3)]
    for thread in threads:
        thread.start()
    for number in range(1, 30):
        store.put("x", str(number % 10).encode() * (200_000 + number % 10))
    stop.set()
    for thread in threads:
        thread.join()
    assert len(seen) > 1
    assert all(different == 1 and size == 200_000 + int(digit) for size, digit, different in seen)


def test_large_files_take_little_memory(url: str, tmp_path: Path) -> None:
    with (tmp_path / "large").open("wb") as stream:
        stream.truncate(160 << 20)
    done = subprocess.run([sys.executable, "-c", CARRIER, url, tmp_path], stdout=subprocess.PIPE, check=True, text=True)
    assert int(done.stdout) < 110 << 20  # four parts of 16 MiB at once, and some
    assert (tmp_path / "back").stat().st_size == 160 << 20


@pytest.mark.parametrize(
    "name", ["", "/etc/passwd", "../x", "a/../b", "a//b", "a/", "./a", "a\0b", "a\nb", "a\\b", ".moepress/x", "a" * 900]
)
def test_names_that_are_none(store: Store, name: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"1")
    acts: list[Callable[[], object]] = [
        lambda: store.get(name),
        lambda: store.read(name, 0, 1),
        lambda: store.put(name, b""),
        lambda: store.create(name, b""),
        lambda: store.size(name),
        lambda: store.send(tmp_path / "file", name),
        lambda: store.fetch(name, tmp_path / "back"),
        lambda: store.delete(name),
        lambda: store.local(name),
    ]
    for act in acts:
        with pytest.raises(ValueError, match="is no name of an object"):
            act()


def test_names_that_are_some() -> None:
    for name in ("a", ".gitattributes", "leases/layer-003/0.json", "...", "a..b/c"):
        assert check_name(name) == name


def test_urls_of_folders(tmp_path: Path) -> None:
    assert open_store(f"file://{tmp_path}/a%20b").url == str(tmp_path / "a b")
    assert open_store(f"file://localhost{tmp_path}").url == open_store(str(tmp_path)).url == str(tmp_path)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UsageError, match="is a file"):
        open_store(str(tmp_path / "file"))


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("", "needs a place"),
        ("ftp://host/x", "cannot begin with ftp://"),
        ("http://host/x", "cannot begin with http://"),
        ("file://host/x", "three slashes"),
        ("s3://", "names no bucket"),
        ("s3://bucket/../x", "names no bucket"),
        ("s3://key:secret@bucket/x", "holds a user"),
        ("az://account/container?sig=secret", "holds a user"),
    ],
)
def test_urls_that_are_refused_are_told_without_their_secrets(url: str, why: str) -> None:
    with pytest.raises(UsageError, match=why) as caught:
        open_store(url)
    assert "secret" not in str(caught.value)
    assert "s3://BUCKET" in str(caught.value) or "file:///FOLDER" in str(caught.value)


def test_without_hard_links_the_first_still_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: object, **_options: object) -> None:
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    store = FolderStore(tmp_path)
    assert store.create("a/b", b"first")
    assert not store.create("a/b", b"second")
    target, temporary = tmp_path / "a" / "b", tmp_path / "temporary"
    temporary.write_bytes(b"third")
    from moepress.runs.store.folder import _rename_once

    assert not _rename_once(temporary, target)  # whoever lost the race after both had looked
    assert target.read_bytes() == b"first"


@pytest.mark.parametrize("number", [errno.EEXIST, errno.EIO])
def test_a_link_whose_answer_was_lost_is_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    link = os.link

    def lose(source: Path, target: Path, **options: bool) -> None:
        link(source, target, **options)
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "link", lose)
    store = FolderStore(tmp_path)
    assert store.create("a/b", b"first")
    assert not store.create("a/b", b"second")
    assert store.get("a/b") == b"first"


def test_killed_writers_leave_nothing_that_is_seen(tmp_path: Path) -> None:
    own = tmp_path / ".moepress"
    own.mkdir()
    (own / "0123456789abcdef.tmp").write_bytes(b"half")
    (own / "fedcba9876543210.tmp").write_bytes(b"half")
    os.utime(own / "0123456789abcdef.tmp", (0, 0))
    store = FolderStore(tmp_path)
    assert store.names("") == []
    store.put("a", b"1")
    assert store.names("") == ["a"]
    assert [path.name for path in own.iterdir()] == ["fedcba9876543210.tmp"]  # that writer may still be at it


def test_a_folder_that_may_not_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    store = FolderStore(tmp_path)
    with pytest.raises(StoreError, match=r"file/x in .* could not be written"):
        store.put("file/x", b"1")
    assert store.get("file/x") is None
