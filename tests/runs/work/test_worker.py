"""Workers of a shared run: orders, errors, deaths, and workers who come too late."""

import itertools
import json
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from small_runs import Perform, diamond, kept, outputs, planned, reopened, work, worker

from moepress.errors import InvalidInputError, MoepressError, StoreError
from moepress.runs.store.store import Store
from moepress.runs.work.desk import Desk
from moepress.runs.work.tasks import Task
from moepress.runs.work.worker import FailedError


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return planned(tmp_path / "store", tmp_path)


@pytest.fixture
def whole(tmp_path: Path) -> dict[str, bytes]:
    """What one worker makes of the same run."""
    (tmp_path / "alone").mkdir()
    store = planned(tmp_path / "alone" / "store", tmp_path)
    with worker(store, tmp_path / "alone") as one:
        work(one)
    return kept(store)


def at(name: str, act: Callable[[], None]) -> Callable[[Task, Desk], None]:
    """Trouble at one task."""
    return lambda task, _desk: act() if task.id == name else None


def raising(error: BaseException) -> Callable[[], None]:
    def act() -> None:
        raise error

    return act


def test_one_worker_does_all_and_leaves_what_is_kept(store: Store, tmp_path: Path) -> None:
    with worker(store, tmp_path) as one:
        work(one)
    assert one.did == [task.id for task in diamond()]
    assert outputs(store) == {task.id for task in diamond() if task.keep} | {"end-1"}
    assert {name for name in store.names("leases") if not name.endswith(".released.json")} == {
        f"leases/{task.id}/0.json" for task in diamond()
    }


def test_files_that_somebody_needs_yet_stay(store: Store, tmp_path: Path) -> None:
    with worker(store, tmp_path) as one:
        work(one, 4)
        assert outputs(store) == {"begin-0", "wide-0-0", "wide-0-1", "wide-0-2"}
        work(one, 5)
        assert outputs(store) == {"end-0", "wide-0-0", "wide-0-1", "wide-0-2"}


def test_each_begins_with_its_own_share_and_goes_on_with_those_of_others(store: Store, tmp_path: Path) -> None:
    with worker(store, tmp_path, "one") as one, worker(store, tmp_path, "two", share=(1, 2)) as two:
        work(one, 1)
        work(two, 1)
        assert two.did == ["wide-0-0"]  # the second of all
        work(two)
    assert len(two.did) == len(diamond()) - 1


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_shards_of_an_array_in_any_order_give_the_same(
    store: Store, tmp_path: Path, whole: dict[str, bytes], order: tuple[int, ...]
) -> None:
    for number in order:
        with worker(store, tmp_path, f"w{number}", share=(number, 3)) as one:
            work(one, 4)
    assert kept(store) == whole


def test_many_at_once_do_each_task_once(store: Store, tmp_path: Path, whole: dict[str, bytes]) -> None:
    did: list[str] = []

    def run(name: str) -> None:
        with worker(store, tmp_path, name) as one:
            work(one)
        did.extend(one.did)

    threads = [threading.Thread(target=run, args=(f"w{number}",)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(did) == sorted(task.id for task in diamond())
    assert kept(store) == whole


def test_a_task_that_runs_out_of_memory_is_tried_again_smaller_once(store: Store, tmp_path: Path) -> None:
    errors = iter([MemoryError("all is gone")])
    perform = Perform(at("wide-0-1", lambda: raising(e)() if (e := next(errors, None)) else None))
    with worker(store, tmp_path, perform=perform) as one:
        work(one)
    assert [seen for seen in perform.seen if seen[0] == "wide-0-1"] == [("wide-0-1", False), ("wide-0-1", True)]
    assert sum(smaller for _, smaller in perform.seen) == 1


def test_out_of_memory_twice_is_the_end_for_all(store: Store, tmp_path: Path) -> None:
    perform = Perform(at("wide-0-1", raising(MemoryError("all is gone"))))
    with worker(store, tmp_path, "one", perform) as one, worker(store, tmp_path, "two") as two:
        with pytest.raises(FailedError, match=r"wide-0-1 was given up: MemoryError: all is gone\. Mend that"):
            work(one)
        assert len([seen for seen in perform.seen if seen[0] == "wide-0-1"]) == 2
        work(two, 4)
    assert store.get("done/wide-0-1.json") is not None  # two had no trouble with it


def test_others_end_where_a_task_was_given_up(store: Store, tmp_path: Path) -> None:
    with worker(store, tmp_path, "two") as two:
        two._known_failures = frozenset()
        reopened(store).fail("end-1", 0, "it is broken", final=True)
        with worker(store, tmp_path, "one") as one:
            work(one, 9)
        with pytest.raises(FailedError, match="end-1 was given up: it is broken"):
            two._heed_failures()
        with worker(store, tmp_path, "three") as three:
            work(three)  # begun after: it tries again
        two._heed_failures()  # done since
    assert three.did == ["end-1"]


def test_an_error_of_the_model_ends_all_at_once(store: Store, tmp_path: Path) -> None:
    perform = Perform(at("begin-0", raising(InvalidInputError("The model is broken."))))
    with worker(store, tmp_path, perform=perform) as one, pytest.raises(InvalidInputError, match="The model is broken"):
        work(one)
    assert [row["final"] for row in one.shared.failures().values()] == [True]
    with worker(store, tmp_path, "two") as two:
        work(two)  # it was mended
    assert len(two.did) == len(diamond())


@pytest.mark.parametrize("error", [OSError(28, "No space left"), MoepressError("The disk is full."), StoreError("x")])
def test_an_error_of_this_machine_ends_this_worker_alone(store: Store, tmp_path: Path, error: Exception) -> None:
    perform = Perform(at("begin-0", raising(error)))
    with worker(store, tmp_path, "two") as two:
        with worker(store, tmp_path, "one", perform) as one, pytest.raises(type(error)):
            work(one)
        assert one.shared.failures() == {}
        work(two)
    assert len(two.did) == len(diamond())


def test_a_bug_is_tried_three_times(store: Store, tmp_path: Path) -> None:
    perform = Perform(at("begin-0", raising(ZeroDivisionError("by nothing"))))
    with worker(store, tmp_path, perform=perform) as one, pytest.raises(FailedError, match="ZeroDivisionError: by no"):
        work(one)
    assert perform.seen == [("begin-0", False), ("begin-0", True), ("begin-0", True)]
    rows = one.shared.failures().values()
    assert sorted(row["final"] for row in rows) == [False, False, True]
    assert all("Traceback" in row["trace"] for row in rows)


def test_what_was_given_back_is_not_lost(store: Store, tmp_path: Path) -> None:
    """Somebody who is interrupted again and again does not make a task impossible, nor smaller."""
    perform = Perform(at("begin-0", raising(KeyboardInterrupt())))
    for number in range(15):
        with worker(store, tmp_path, f"w{number}", perform) as one, pytest.raises(KeyboardInterrupt):
            work(one)
    with worker(store, tmp_path, perform=(perform := Perform())) as one:
        work(one)
    assert not any(smaller for _, smaller in perform.seen)


def test_a_task_that_kills_every_worker_is_given_up_until_somebody_says_otherwise(store: Store, tmp_path: Path) -> None:
    for number in range(12):  # claimed, and never given back
        store.create(f"leases/begin-0/{number}.json", json.dumps({"worker": "gone", "term seconds": 0}).encode())
    with worker(store, tmp_path, "one", term_seconds=1) as one, pytest.raises(FailedError) as raised:
        work(one)
    assert f"12 workers began it and none came back; to have it tried again, delete leases/begin-0/ in {store.url}" in (
        str(raised.value)
    )
    for name in store.names("leases/begin-0"):
        store.delete(name)
    with worker(store, tmp_path, "two") as two:
        work(two)
    assert len(two.did) == len(diamond())


def test_a_late_writer_changes_nothing(store: Store, tmp_path: Path, whole: dict[str, bytes]) -> None:
    """One is overtaken while it does each task; what it writes then is thrown away, and no error of it counts."""
    for name in (task.id for task in diamond()):

        def overtake(name: str = name) -> None:
            lease = store.get(f"leases/{name}/0.json")
            assert lease is not None
            store.put(f"leases/{name}/0.released.json", lease)  # taken for dead
            with worker(store, tmp_path, f"fast-{name}") as fast:
                work(fast, 1)
            assert fast.did == [name]

        with worker(store, tmp_path, f"late-{name}", Perform(at(name, overtake))) as late:
            late.work(lambda *_: None, lambda name=name: store.get(f"done/{name}.json") is not None)
        assert late.did == []
    assert kept(store) == whole
    assert outputs(store) == {task.id for task in diamond() if task.keep} | {"end-1"}
    assert all(len(store.names(f"out/{name}")) == 1 for name in outputs(store))


@pytest.mark.parametrize("error", [FileNotFoundError("input"), InvalidInputError("cut short"), ValueError("a bug")])
def test_who_was_overtaken_may_fail_in_any_way(
    store: Store, tmp_path: Path, whole: dict[str, bytes], error: Exception
) -> None:
    """Its inputs are deleted while it reads them, once nobody else needs them."""

    def overtake() -> None:
        store.put("leases/end-0/0.released.json", b"{}")
        with worker(store, tmp_path, "fast") as fast:
            work(fast)
        raise error

    with worker(store, tmp_path, "late", Perform(at("end-0", overtake))) as late:
        work(late)
    assert late.shared.failures() == {}
    assert kept(store) == whole


def test_what_killed_attempts_left_is_deleted(store: Store, tmp_path: Path) -> None:
    store.create("leases/begin-0/0.json", json.dumps({"worker": "gone", "term seconds": 0}).encode())
    store.put("out/begin-0/0-half/bytes", b"half")
    store.put("out/wide-0-0/0-half/bytes", b"half")
    store.create("leases/wide-0-0/0.json", json.dumps({"worker": "gone", "term seconds": 0}).encode())
    with worker(store, tmp_path, term_seconds=1) as one:
        work(one)
    assert not [name for name in store.names("out") if "half" in name]


def test_a_run_that_is_gone_is_not_begun_anew_by_a_late_writer(store: Store, tmp_path: Path) -> None:
    """It was finished by others, and its folder deleted."""

    def vanish() -> None:
        (tmp_path / "store").rename(tmp_path / "elsewhere")

    with (
        pytest.raises(StoreError, match="is gone"),
        worker(store, tmp_path, perform=Perform(at("end-1", vanish))) as one,
    ):
        work(one)
    assert not (tmp_path / "store").exists()


def test_a_broken_note_of_a_failure_stops_nobody(store: Store, tmp_path: Path) -> None:
    def spoil() -> None:
        for number, raw in enumerate((b"", b"{", b"[]", b"\xff", b"3")):
            store.put(f"failed/begin-0/{number}-x.json", raw)
        raise ZeroDivisionError

    with worker(store, tmp_path, perform=Perform(at("begin-0", spoil))) as one, pytest.raises(FailedError):
        work(one)
    with worker(store, tmp_path) as one:
        work(one)
    assert len(one.did) == len(diamond())
