"""Buckets when things go wrong: requests that fail, connections that are cut, servers that are gone or too old."""

import builtins
import os
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import fault_proxy
import pytest
import s3_server

from moepress.errors import StoreError
from moepress.runs.store.objects import ObjectStore
from moepress.runs.store.store import open_store

Open = Callable[[fault_proxy.Proxy], ObjectStore]


@pytest.fixture
def through(bucket: str, monkeypatch: pytest.MonkeyPatch) -> Open:
    """A store behind a proxy."""

    def get(proxy: fault_proxy.Proxy, patience_seconds: float = 20.0) -> ObjectStore:
        s3_server.tell_environment(proxy.url, monkeypatch)
        return ObjectStore(f"{bucket}/run", patience_seconds=patience_seconds)

    return get


@pytest.fixture
def between(s3: str) -> Callable[..., AbstractContextManager[fault_proxy.Proxy]]:
    return lambda *arguments, **options: fault_proxy.between(s3, *arguments, **options)


def at_once(acts: list[Callable[[], None]]) -> None:
    """Run in a thread each; what one raises is raised."""
    raised: list[BaseException] = []

    def run(act: Callable[[], None]) -> None:
        try:
            act()
        except BaseException as error:
            raised.append(error)

    threads = [threading.Thread(target=run, args=(act,)) for act in acts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if raised:
        raise raised[0]


@pytest.mark.parametrize("seed", range(2))
def test_in_all_trouble_one_creates_and_it_is_whole(between: Any, through: Open, seed: int) -> None:
    wins: list[tuple[int, int]] = []
    with between(fault_proxy.ALL, seed) as proxy:
        store = through(proxy)

        def race(number: int) -> None:
            mine = f"{number} ".encode() * 1000
            wins.extend((name, number) for name in range(12) if store.create(f"race/{name}", mine))

        at_once([lambda number=number: race(number) for number in range(6)])  # type: ignore[misc]
        proxy.trouble = {}
        assert sorted(name for name, _ in wins) == list(range(12))
        for name, number in wins:
            assert store.get(f"race/{name}") == f"{number} ".encode() * 1000
        assert len(proxy.met) >= 6


@pytest.mark.parametrize("seed", range(2))
def test_in_all_trouble_nothing_is_lost_and_readers_see_whole_objects(between: Any, through: Open, seed: int) -> None:
    seen = set()
    with between(fault_proxy.ALL, seed) as proxy:
        store = through(proxy)
        store.put("changing", b"0" * 100_000)

        def write(number: int) -> None:
            for name in range(10):
                store.put(f"of/{number}/{name}", f"{number} {name}".encode() * 500)
                assert store.get(f"of/{number}/{name}") == f"{number} {name}".encode() * 500
            store.delete(f"of/{number}/0")

        def change() -> None:
            for number in range(1, 15):
                store.put("changing", str(number % 10).encode() * (100_000 + number % 10))

        def watch() -> None:
            for _ in range(15):
                data = store.get("changing")
                assert data is not None
                seen.add((len(data), data[:1], len(set(data))))

        at_once([lambda: write(0), lambda: write(1), change, watch])
        proxy.trouble = {}
        for number in (0, 1):
            assert store.get(f"of/{number}/0") is None
            for name in range(1, 10):
                assert store.get(f"of/{number}/{name}") == f"{number} {name}".encode() * 500
    assert all(different == 1 and size == 100_000 + int(digit) for size, digit, different in seen)


def test_in_all_trouble_large_files_go_there_and_back(between: Any, through: Open, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(os.urandom(34_000_000))
    with between(fault_proxy.ALL | {"cut in the answer": 0.2}, 1) as proxy:
        store = through(proxy)
        for _ in range(2):
            store.send(tmp_path / "file", "large")
            store.fetch("large", tmp_path / "back")
            assert (tmp_path / "back").read_bytes() == (tmp_path / "file").read_bytes()
            assert (
                store.read("large", 20_000_000, 20_100_000) == (tmp_path / "file").read_bytes()[20_000_000:20_100_000]
            )
        assert proxy.met.total() > 1


@pytest.mark.parametrize("kind", [kind for kind in fault_proxy.ALL if kind not in ("old listing", "delay")])
def test_each_trouble_alone_does_not_make_two_writers_win_or_none(between: Any, through: Open, kind: str) -> None:
    with between({}) as proxy:
        store = through(proxy)
        assert store.create("before", b"1")  # the server has shown what it can
        for number in range(3):
            proxy.trouble = {kind: 1.0}
            threading.Timer(0.2, proxy.trouble.clear).start()
            assert store.create(f"x/{number}", b"ours")
            proxy.trouble = {kind: 1.0}
            threading.Timer(0.2, proxy.trouble.clear).start()
            assert not store.create(f"x/{number}", b"theirs")
            proxy.trouble = {}
            assert store.get(f"x/{number}") == b"ours"
        assert proxy.met[kind] >= 6


def test_listings_that_lag_change_nothing_but_listings(between: Any, through: Open) -> None:
    with between({"old listing": 1.0}) as proxy:
        store = through(proxy)
        assert store.names("") == []
        assert store.create("a", b"1")
        assert store.names("") == []
        assert not store.create("a", b"2")
        assert (store.get("a"), store.size("a")) == (b"1", 1)


def test_a_slow_server_is_waited_for_and_one_too_slow_is_not(between: Any, through: Any) -> None:
    with between({"delay": 1.0}) as proxy:
        store = through(proxy)
        store.put("a", b"1")
        assert store.get("a") == b"1"
        hurried = through(proxy, 0.2)
        begun = time.monotonic()
        with pytest.raises(StoreError, match="does not answer in time"):
            hurried.get("a")
        assert time.monotonic() - begun < 5


def test_a_server_that_is_gone_is_told_in_one_sentence(between: Any, through: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"1")
    with between({}) as proxy:
        store = through(proxy, 0.6)
        assert store.create("a", b"1")
        proxy.gone = True
        acts: list[Callable[[], object]] = [
            lambda: store.get("a"),
            lambda: store.put("a", b"2"),
            lambda: store.create("b", b"2"),
            lambda: store.names(""),
            lambda: store.send(tmp_path / "file", "c"),
            lambda: store.fetch("a", tmp_path / "back"),
        ]
        for act in acts:
            assert "is cut" in told(act)
        assert not (tmp_path / "back").exists()
        proxy.gone = False
        assert store.get("a") == b"1"
    assert "nothing answers at its address" in told(lambda: store.get("a"))


def told(act: Callable[[], object]) -> str:
    """The sentence of a StoreError, which comes within some seconds; no secret is in it or in its traceback."""
    begun = time.monotonic()
    with pytest.raises(StoreError) as caught:
        act()
    assert time.monotonic() - begun < 15
    text = str(caught.value)
    assert "\n" not in text
    assert s3_server.SECRET not in "".join(traceback.format_exception(caught.value))
    return text


def test_no_such_bucket(bucket: str) -> None:
    store = open_store("s3://no-such-bucket-anywhere/run")
    acts: list[Callable[[], object]] = [
        lambda: store.get("a"),
        lambda: store.put("a", b""),
        lambda: store.create("a", b""),
        lambda: store.names(""),
    ]
    for act in acts:
        assert told(act) == "There is no bucket of s3://no-such-bucket-anywhere/run; check its name, or create it."


def test_a_refusal_is_told_at_once(between: Any, through: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    with between({"403 before": 1.0}) as proxy:
        begun = time.monotonic()
        assert "403 Forbidden" in told(lambda: through(proxy).get("a"))
        assert time.monotonic() - begun < 2


def test_a_forked_process_is_refused_and_does_not_wait(bucket: str) -> None:
    script = f"""
import os
from moepress.runs.store.store import open_store
store = open_store({bucket!r})
store.put("a", b"1")
if os.fork() == 0:
    for act in (lambda: store.get("a"), lambda: store.create("b", b""), lambda: open_store({bucket!r})):
        try:
            act()
        except Exception as error:
            print(type(error).__name__, error, flush=True)
    os._exit(0)
os.wait()
print(store.get("a"))
"""
    done = subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, timeout=60, check=True)
    lines = done.stdout.splitlines()
    assert lines[:3] == [f"StoreError {bucket} can not be used in a forked process; start processes anew (spawn)."] * 3
    assert lines[3] == "b'1'"


@pytest.fixture(scope="module")
def old_server() -> Iterator[str]:
    with s3_server.running("unconditional") as address:
        yield address


def test_a_server_without_conditional_writes_is_refused(old_server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    s3_server.tell_environment(old_server, monkeypatch)
    store = open_store(s3_server.new_bucket(old_server))
    store.put("a", b"1")
    assert "does not know conditional writes" in told(lambda: store.create("b", b"1"))
    assert store.get("b") is None


def test_a_server_that_refuses_conditional_writes_is_refused(between: Any, through: Any) -> None:
    with between({}) as proxy:
        store = through(proxy, 1.0)
        proxy.trouble = {"501 before": 1.0}
        assert "does not know conditional writes" in told(lambda: store.create("b", b"1"))


def test_the_probe_leaves_nothing_behind(bucket: str) -> None:
    store = open_store(bucket)
    assert store.create("a", b"1")
    whole = open_store(bucket)._library.list(store._small)  # type: ignore[attr-defined]
    assert [row["path"] for rows in whole for row in rows] == ["a"]


def test_without_the_library_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def missing(name: str, *arguments: Any, **options: Any) -> Any:
        if name.startswith("obstore"):
            raise ImportError(name)
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(StoreError, match=r"install it with: pip install 'moepress\[store\]'"):
        open_store("s3://bucket/x")
