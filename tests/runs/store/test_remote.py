"""Files that lie in a bucket and are read in place: the same bytes as of a file, little else, and of one version."""

import io
import os
import random
import threading
from collections.abc import Iterator
from pathlib import Path

import fault_proxy
import pytest
import s3_server

from moepress.errors import StoreError
from moepress.runs.store import remote
from moepress.runs.store.objects import ObjectStore
from moepress.runs.store.remote import RemoteFile, open_file, pieces, register, size_of, url_of

SIZE = 30_000_000
MIB = 1 << 20


@pytest.fixture(scope="module")
def content() -> bytes:
    return random.Random(0).randbytes(SIZE)


@pytest.fixture
def proxy(s3: str, bucket: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[fault_proxy.Proxy]:
    with fault_proxy.between(s3, {}) as found:
        s3_server.tell_environment(found.url, monkeypatch)
        yield found


@pytest.fixture
def store(proxy: fault_proxy.Proxy, bucket: str, tmp_path: Path, content: bytes) -> ObjectStore:
    (tmp_path / "content").write_bytes(content)
    store = ObjectStore(f"{bucket}/model")
    store.send(tmp_path / "content", "weights", give=True)
    return store


@pytest.fixture
def place(store: ObjectStore, tmp_path: Path, proxy: fault_proxy.Proxy) -> Path:
    """The stand-in of a file that was just found."""
    facts = store.listing()["weights"]
    file = tmp_path / "weights"
    file.write_bytes(b"a stand-in")
    register({file: RemoteFile(store=store, name="weights", size=facts.size, version=facts.version)})
    proxy.passed_bytes = 0
    return file


def test_it_reads_as_a_file_does(place: Path, content: bytes) -> None:
    assert size_of(place) == SIZE
    rng = random.Random(1)
    for buffering in (0, -1):
        with open_file(place, buffering=buffering) as stream, io.BytesIO(content) as same:
            assert stream.read(8) == same.read(8)
            for _ in range(60):
                at, length = rng.randrange(SIZE + 1000), rng.choice((0, 1, 100, 5000, 300_000, 9 * MIB))
                if rng.random() < 0.5:
                    assert stream.seek(at) == same.seek(at)
                assert bytes(stream.read(length)) == same.read(length)
                assert stream.tell() == min(same.tell(), max(stream.tell(), same.tell()))
            assert stream.seek(-10, os.SEEK_END) == SIZE - 10
            assert stream.read() == content[-10:]
            assert stream.read() == b""


def test_it_reads_from_front_to_back(place: Path, content: bytes, proxy: fault_proxy.Proxy) -> None:
    with open_file(place) as stream:
        assert b"".join(iter(lambda: stream.read(MIB), b"")) == content
    assert proxy.passed_bytes <= SIZE  # nothing twice


def test_little_ranges_fetch_little(place: Path, content: bytes, proxy: fault_proxy.Proxy) -> None:
    with open_file(place, buffering=0) as stream:
        assert stream.read(90_000) == content[:90_000]
    assert proxy.passed_bytes == 0  # the beginning is known
    ranges = [(SIZE * n // 256, SIZE * n // 256 + 4096) for n in range(256)] + [(SIZE - 5, SIZE + 5)]
    assert list(pieces(place, ranges)) == [content[begin:end] for begin, end in ranges]
    with open_file(place, buffering=0) as stream:
        stream.seek(20_000_000)
        assert stream.read(10_000) == content[20_000_000:20_010_000]
    assert proxy.passed_bytes < 257 * 4096 + 20_000


def test_many_threads_read_what_is_there(place: Path, content: bytes) -> None:
    wrong: list[int] = []

    def read(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(20):
            at = rng.randrange(SIZE)
            with open_file(place, buffering=0) as stream:
                stream.seek(at)
                if stream.read(2 * MIB) != content[at : at + 2 * MIB]:
                    wrong.append(at)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_no_more_than_some_blocks_are_kept(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_BLOCK_BYTES", 100_000)
    monkeypatch.setattr(remote, "_BLOCKS", remote._Blocks())
    with open_file(place) as stream:
        while stream.read(1_000_000):
            assert len(remote._BLOCKS._found) <= remote._KEPT


@pytest.mark.parametrize("seed", range(2))
def test_in_all_trouble_the_bytes_are_right(place: Path, content: bytes, proxy: fault_proxy.Proxy, seed: int) -> None:
    proxy.trouble = fault_proxy.ALL
    with open_file(place) as stream:
        assert b"".join(iter(lambda: stream.read(MIB), b"")) == content
    ranges = [(n * 100_000, n * 100_000 + 50) for n in range(60)]
    assert list(pieces(place, ranges)) == [content[begin:end] for begin, end in ranges]
    assert proxy.met


def test_a_file_that_changes_is_an_error(place: Path, store: ObjectStore) -> None:
    with open_file(place, buffering=0) as stream:
        stream.seek(9 * MIB)
        assert stream.read(10)
        store.put("weights", b"x" * SIZE)
        for length in (10, 20 * MIB):
            stream.seek(12 * MIB)
            with pytest.raises(StoreError, match=r"weights in .* changed while it was read"):
                stream.read(length)
        store.delete("weights")
        with pytest.raises(StoreError, match="was it deleted"):
            stream.read(10)


def test_after_an_error_it_goes_on(place: Path, content: bytes, proxy: fault_proxy.Proxy) -> None:
    proxy.trouble = {"403 before": 1.0}
    with open_file(place) as stream:
        with pytest.raises(StoreError, match="403"):
            stream.read(5 * MIB)
        proxy.trouble = {}
        stream.seek(0)
        assert stream.read(5 * MIB) == content[: 5 * MIB]


def test_other_files_are_read_as_ever(tmp_path: Path) -> None:
    (tmp_path / "plain").write_bytes(b"0123456789")
    with open_file(tmp_path / "plain") as stream:
        assert stream.read() == b"0123456789"
    assert size_of(tmp_path / "plain") == 10
    assert list(pieces(tmp_path / "plain", [(2, 4), (8, 20)])) == [b"23", b"89"]
    assert url_of(tmp_path) is None


def test_the_folder_knows_its_url(place: Path, bucket: str) -> None:
    assert url_of(place.parent) == f"{bucket}/model"
