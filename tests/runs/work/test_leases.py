"""Leases: who gets a task, when a worker counts as dead, and what a worker knows that was away."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import fault_proxy
import pytest
import s3_server

from moepress.runs.store.objects import ObjectStore
from moepress.runs.store.store import Store, open_store
from moepress.runs.work.leases import Leases
from moepress.runs.work.processes import is_gone, this_process

TERM = 1.0
WORKER = """
import sys, time
from moepress.runs.store.store import open_store
from moepress.runs.work import processes
from moepress.runs.work.leases import Leases

url, name, term, how = sys.argv[1:]
if "elsewhere" in how:
    processes._place = lambda: "another machine"
if "wrong clock" in how:
    real = time.time
    time.time = lambda: real() - 400 * 86400
with Leases(open_store(url), name, float(term)) as leases:
    print(leases.claim("task"), flush=True)
    for line in sys.stdin:
        print(leases.holds("task", int(line)), flush=True)
"""


class Worker:
    """A process with a lease on `task`."""

    def __init__(self, url: str, term_seconds: float, how: str = ""):
        self.process = subprocess.Popen(
            [sys.executable, "-c", WORKER, url, f"worker-{os.urandom(4).hex()}", str(term_seconds), how],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.attempt = self._line()

    def _line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def holds(self, attempt: int) -> bool:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{attempt}\n")
        self.process.stdin.flush()
        return {"True": True, "False": False}[self._line()]

    def send(self, number: int) -> None:
        self.process.send_signal(number)


@pytest.fixture
def workers() -> Iterator[Callable[..., Worker]]:
    """`workers(url, term, how)` starts one; all end with the test."""
    with ExitStack() as stack:

        def start(*arguments: Any) -> Worker:
            worker = Worker(*arguments)
            process = stack.enter_context(worker.process)
            stack.callback(process.kill)
            return worker

        yield start


@pytest.fixture(params=["folder", "bucket"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "store") if request.param == "folder" else request.getfixturevalue("bucket")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "store"))


def seconds_until_claimed(leases: Leases, task: str = "task", at_most: float = 20.0) -> float:
    begun = time.monotonic()
    while leases.claim(task) is None:
        assert time.monotonic() - begun < at_most
        time.sleep(0.02)
    return time.monotonic() - begun


def test_a_task_is_one_workers_until_it_is_given_back(url: str) -> None:
    store = open_store(url)
    with Leases(store, "one", 60) as one, Leases(store, "two", 60) as two:
        assert one.attempts("task") == 0
        assert one.claim("task") == 0
        assert two.claim("task") is None
        assert one.claim("task") is None  # it has it
        assert two.claim("other") == 0
        assert (one.holds("task", 0), two.holds("task", 0), one.holds("task", 1)) == (True, False, False)
        one.release("task", 0)
        assert not one.holds("task", 0)
        assert two.claim("task") == 1
        assert one.claim("task") is None
        assert one.attempts("task") == two.attempts("task") == 2
    with Leases(store, "three", 60) as three:  # the end gives all back
        assert three.claim("task") == 2
        assert three.claim("other") == 1


def test_what_stands_in_the_store(store: Store) -> None:
    with Leases(store, "one", 0.4) as one:
        one.claim("task")
        lease = json.loads(store.get("leases/task/0.json") or b"")
        assert lease["worker"] == "one"
        assert (lease["pid"], lease["host"], lease["id"]) == (os.getpid(), this_process()["host"], one.id)
        one.tell({"layer": 3, "of": 16})
        first = json.loads(store.get("beats/one.json") or b"")
        time.sleep(0.5)
        later = json.loads(store.get("beats/one.json") or b"")
        assert later["count"] > first["count"]
        assert later["progress"] == {"layer": 3, "of": 16}
        assert not later["ended"]
    assert json.loads(store.get("beats/one.json") or b"")["ended"]


def test_one_of_many_gets_a_task(url: str) -> None:
    ready, got = threading.Barrier(8), []
    with ExitStack() as stack:
        all_leases = [stack.enter_context(Leases(open_store(url), f"worker-{n}", 60)) for n in range(8)]

        def race(leases: Leases) -> None:
            ready.wait()
            got.extend(task for task in range(5) if leases.claim(f"task-{task}") is not None)

        threads = [threading.Thread(target=race, args=(leases,)) for leases in all_leases]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(got) == list(range(5))


def test_a_process_of_this_machine_that_is_gone_is_noticed_at_once(
    store: Store, workers: Callable[..., Worker]
) -> None:
    worker = workers(store.url, 60)
    assert worker.attempt == "0"
    with Leases(store, "me", 60) as me:
        assert me.claim("task") is None
        worker.send(signal.SIGKILL)
        assert seconds_until_claimed(me) < 5
        assert me.attempts("task") == 2


def test_a_dead_process_elsewhere_is_noticed_after_its_term(url: str, workers: Callable[..., Worker]) -> None:
    worker = workers(url, TERM, "elsewhere")
    with Leases(open_store(url), "me", TERM) as me:
        assert me.claim("task") is None
        worker.send(signal.SIGKILL)
        assert 0.7 * TERM < seconds_until_claimed(me) < 5 * TERM


@pytest.mark.parametrize("how", ["", "elsewhere", "elsewhere, wrong clock"])
def test_a_worker_that_lives_keeps_its_task(store: Store, workers: Callable[..., Worker], how: str) -> None:
    worker = workers(store.url, TERM, how)
    with Leases(store, "me", TERM) as me:
        begun = time.monotonic()
        while time.monotonic() - begun < 3 * TERM:
            assert me.claim("task") is None
            time.sleep(0.05)
    assert worker.holds(0)


def test_times_of_files_mean_nothing(store: Store, workers: Callable[..., Worker]) -> None:
    workers(store.url, TERM, "elsewhere")
    with Leases(store, "me", TERM) as me:
        begun, turn = time.monotonic(), 0
        while time.monotonic() - begun < 2 * TERM:
            turn += 1
            for name in (*store.names("beats"), *store.names("leases")):
                place = store.local(name)
                assert place is not None
                os.utime(place, (turn % 2 * 4e9, turn % 2 * 4e9))
            assert me.claim("task") is None
            time.sleep(0.05)


def test_a_stopped_worker_loses_its_task_and_knows_it(url: str, workers: Callable[..., Worker]) -> None:
    worker = workers(url, TERM)
    assert worker.holds(0)
    with Leases(open_store(url), "me", TERM) as me:
        worker.send(signal.SIGSTOP)
        assert 0.7 * TERM < seconds_until_claimed(me) < 5 * TERM  # the process is there: only silence tells
        worker.send(signal.SIGCONT)
        assert not worker.holds(0)
        time.sleep(TERM)
        assert not worker.holds(0)
        assert me.holds("task", 1)


def test_a_stopped_worker_whom_nobody_replaced_goes_on(store: Store, workers: Callable[..., Worker]) -> None:
    worker = workers(store.url, TERM)
    worker.send(signal.SIGSTOP)
    time.sleep(1.5 * TERM)
    worker.send(signal.SIGCONT)
    begun = time.monotonic()
    while not worker.holds(0):
        assert time.monotonic() - begun < 5 * TERM
        time.sleep(0.05)


def test_two_claim_what_a_stopped_worker_had_and_one_gets_it(store: Store, workers: Callable[..., Worker]) -> None:
    worker = workers(store.url, TERM)
    worker.send(signal.SIGSTOP)
    got: list[str] = []
    with Leases(store, "one", TERM) as one, Leases(store, "two", TERM) as two:

        def wait(leases: Leases) -> None:
            begun = time.monotonic()
            while time.monotonic() - begun < 3 * TERM:
                if leases.claim("task") is not None:
                    got.append(leases.worker)

        threads = [threading.Thread(target=wait, args=(leases,)) for leases in (one, two)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(got) == 1
    assert sorted(store.names("leases/task"))[:2] == ["leases/task/0.json", "leases/task/1.json"]
    assert store.get("leases/task/2.json") is None


def test_a_worker_begun_anew_under_its_name_does_not_keep_the_old_ones_tasks(
    store: Store, workers: Callable[..., Worker]
) -> None:
    worker = workers(store.url, TERM, "elsewhere")
    name = json.loads(store.get("leases/task/0.json") or b"")["worker"]
    worker.send(signal.SIGKILL)
    worker.process.wait()
    with Leases(store, name, TERM) as again, Leases(store, "me", TERM) as me:
        assert 0.7 * TERM < seconds_until_claimed(me) < 5 * TERM
        assert again.claim("task") is None


def test_a_worker_without_the_store_doubts_its_leases(s3: str, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with fault_proxy.between(s3, {}) as proxy:
        s3_server.tell_environment(proxy.url, monkeypatch)
        behind = ObjectStore(bucket, patience_seconds=0.3)
        s3_server.tell_environment(s3, monkeypatch)
        direct = ObjectStore(bucket)
        with Leases(behind, "cut-off", TERM) as cut_off, Leases(direct, "me", TERM) as me:
            assert (cut_off.claim("task"), cut_off.claim("other")) == (0, 0)
            assert cut_off.holds("task", 0)
            proxy.gone = True
            assert me.claim("task") is None
            assert seconds_until_claimed(me) > 0.7 * TERM
            assert not cut_off.holds("task", 0)
            assert not cut_off.holds("other", 0)
            proxy.gone = False
            begun = time.monotonic()
            while not cut_off.holds("other", 0):  # nobody took it
                assert time.monotonic() - begun < 10 * TERM
                time.sleep(0.05)
            assert not cut_off.holds("task", 0)
            assert cut_off.claim("task") is None
            assert me.holds("task", 1)


def test_a_worker_that_hangs_stops_beating(store: Store) -> None:
    with Leases(store, "hangs", 0.6, hang_seconds=0.5) as hangs, Leases(store, "me", 0.6) as me:
        assert hangs.claim("task") == 0
        for _ in range(10):  # it tells of progress: it lives
            time.sleep(0.2)
            hangs.tell({})
            assert me.claim("task") is None
        assert 0.8 < seconds_until_claimed(me) < 5
        assert not hangs.holds("task", 0)


def test_a_claim_whose_answer_was_lost_blocks_nobody(store: Store) -> None:
    with Leases(store, "one", 60) as one:
        one.claim("task")
        one._drop("task")  # as if `create` had raised after it took effect
        assert one.claim("task") == 1


def test_leases_that_are_none_expire(store: Store) -> None:
    for number, data in enumerate((b"", b"[]", b"{", b'{"worker": "../x", "pid": "1"}', b'{"worker": 5, "id": []}')):
        store.put(f"leases/task-{number}/0.json", data)
        with Leases(store, "me", 0.3) as me:
            assert seconds_until_claimed(me, f"task-{number}") > 0.2


@pytest.mark.parametrize("name", ["", "a/b", "..", "-a", "a b", "a" * 200])
def test_names_that_are_none(store: Store, name: str) -> None:
    with pytest.raises(ValueError, match="no name"):
        Leases(store, name)
    with Leases(store, "me") as me, pytest.raises(ValueError, match="no name"):
        me.claim(name)


def test_processes() -> None:
    mine = this_process()
    assert not is_gone(mine)
    assert is_gone(mine | {"process start": "1"})  # the number was given to another process since
    assert not is_gone(mine | {"process start": "1", "host": "another"})
    assert not is_gone({})
    child = subprocess.Popen([sys.executable, "-c", ""])
    while not is_gone(mine | {"pid": child.pid, "process start": "?"}):  # a zombie is gone
        time.sleep(0.01)
    child.wait()
    assert is_gone(mine | {"pid": child.pid})
