"""A run in a store: begun once, opened by many, and markers that only one writer creates."""

import json
import threading
from pathlib import Path
from typing import Any

import pytest
from small_runs import diamond, planned, reopened

from moepress.errors import InvalidInputError, UsageError
from moepress.runs.store.store import Store, open_store
from moepress.runs.work.shared import WORK, begin_shared, open_shared
from moepress.runs.work.tasks import Done


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return planned(tmp_path / "store", tmp_path)


def again(store: Store, tmp_path: Path, what: str = "small", text: bytes = b"text", layers: int = 2) -> bool:
    (tmp_path / "text").write_bytes(text)
    return begin_shared(store, {"what": what}, diamond(layers), {"text": tmp_path / "text"})


def test_the_same_run_is_found_and_another_is_refused(store: Store, tmp_path: Path) -> None:
    before = {name: store.get(name) for name in store.names("")}
    assert not again(store, tmp_path)
    for other in ({"what": "other"}, {"text": b"other"}, {"layers": 3}):
        with pytest.raises(UsageError, match="holds another shared run"):
            again(store, tmp_path, **other)  # type: ignore[arg-type]
    assert {name: store.get(name) for name in store.names("")} == before
    assert list(open_shared(store).tasks) == diamond()


def test_two_who_begin_another_run_at_once(tmp_path: Path) -> None:
    """One is refused, and what the other has put there is whole."""
    for trial in range(20):
        url, won, barrier = tmp_path / f"store-{trial}", [], threading.Barrier(2)

        def begin(number: int, url: Path = url, won: list[int] = won, barrier: Any = barrier) -> None:
            text = tmp_path / f"text-{number}"
            text.write_bytes(b"text" * (number + 1))
            barrier.wait()
            try:
                if begin_shared(open_store(str(url)), {"what": number}, diamond(number + 1), {"text": text}):
                    won.append(number)
            except UsageError:
                pass

        threads = [threading.Thread(target=begin, args=(number,)) for number in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        (number,) = won
        shared = open_shared(open_store(str(url)))
        assert list(shared.tasks) == diamond(number + 1)
        size, digest = shared.work["given"]["text"]
        assert shared.store.get(f"given/{digest[:16]}/text") == b"text" * (number + 1)
        assert size == 4 * (number + 1)


def test_a_plan_that_was_cut_short_is_repeated(store: Store, tmp_path: Path) -> None:
    store.delete(WORK)
    with pytest.raises(UsageError, match="holds no shared run"):
        open_shared(store)
    assert again(store, tmp_path)
    assert list(open_shared(store).tasks) == diamond()


@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b"3", b'{"work": 3, "tasks": ""}', b'{"work": {}}', b"\xff"])
def test_a_broken_beginning_is_refused(store: Store, raw: bytes) -> None:
    store.put(WORK, raw)
    with pytest.raises(InvalidInputError, match="plan the work anew"):
        open_shared(store)


@pytest.mark.parametrize("digest", ["0" * 64, "../../etc/passwd", "", "é"])
def test_a_digest_of_other_tasks_is_refused(store: Store, digest: str) -> None:
    stated = json.loads(store.get(WORK) or b"")
    store.put(WORK, json.dumps({**stated, "tasks": digest}).encode())
    with pytest.raises(InvalidInputError, match="plan the work anew"):
        open_shared(store)


@pytest.mark.parametrize("raw", [None, b"", b"[]"])
def test_tasks_that_were_changed_are_refused(store: Store, raw: bytes | None) -> None:
    (name,) = store.names("tasks")
    store.delete(name)
    if raw is not None:
        store.put(name, raw)
    with pytest.raises(InvalidInputError, match="are not those of its"):
        open_shared(store)


def made(tmp_path: Path, name: str, content: bytes) -> Path:
    path = tmp_path / name
    path.write_bytes(content)
    return path


def marker(worker: str) -> Done:
    return Done(task="begin-0", attempt=0, worker=worker, seconds=1, peak_bytes=1, files={})


def test_of_two_markers_the_first_counts_and_the_other_s_files_go(store: Store, tmp_path: Path) -> None:
    one, two = reopened(store), reopened(store)
    first, won = one.finish(marker("one"), {"bytes": made(tmp_path, "a", b"one")}, give=True)
    second, late = two.finish(marker("two"), {"bytes": made(tmp_path, "b", b"two!")}, give=True)
    assert (won, late) == (True, False)
    assert first == second == reopened(store).done("begin-0")
    assert first.worker == "one"
    assert [store.get(name) for name in store.names("out")] == [b"one"]


def test_a_broken_marker_is_refused_by_name(store: Store) -> None:
    store.put("done/begin-0.json", b"{}")
    with pytest.raises(InvalidInputError, match=r"done/begin-0\.json"):
        open_shared(store).done("begin-0")


def test_what_others_did_is_seen(store: Store, tmp_path: Path) -> None:
    one, two = reopened(store), reopened(store)
    assert two.look() == set()
    one.finish(marker("one"), {"bytes": made(tmp_path, "a", b"one")}, give=True)
    assert two.look() == {"begin-0"}
    found = two.done("begin-0")
    assert found is not None
    assert found.files["bytes"].bytes == 3
