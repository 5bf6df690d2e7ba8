"""`plan-work`, `work` and `status`: what they say, refuse and return."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from shared_runs import assert_same, hands, moepress, text_of, with_tokenizer
from stage_runs import command, content

from moepress.runs.store.store import open_store
from moepress.runs.work.leases import Leases
from moepress.runs.work.shared import WORK

OPTIONS = ("--bits", "4", "--group-size", "32", "--match", "own")


@pytest.fixture(scope="module")
def model(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "model"
    shutil.copytree(tiny_model("qwen2_moe"), folder)
    return with_tokenizer(folder)


@pytest.fixture(scope="module")
def planned(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with a run that nobody has begun."""
    place = tmp_path_factory.mktemp("planned")
    moepress("plan-work", model, "--store", place / "store", *OPTIONS, *text_of(place))
    return place / "store"


@pytest.fixture
def store(planned: Path, tmp_path: Path) -> Path:
    shutil.copytree(planned, tmp_path / "store")
    return tmp_path / "store"


def refused(code: int, *arguments: object) -> str:
    """The one sentence of a command that is refused."""
    found, printed, errors = command(*arguments)
    assert found == code, errors
    assert printed == ""
    (said,) = [line for line in errors.splitlines() if line.startswith("Error: ")]
    return said


def status(store: Path) -> dict[str, Any]:
    return dict(json.loads(moepress("status", store, "--json")))


def test_the_whole_way(model: Path, store: Path, tmp_path: Path) -> None:
    before = status(store)
    assert (before["done"], before["running"], before["workers"], before["seconds_left"]) == (0, 0, [], None)
    said = moepress("work", "--store", store, "-o", tmp_path / "out")
    assert f"This worker did {before['tasks']} of {before['tasks']} tasks; all are done." in said
    moepress("quantize", model, *OPTIONS, *text_of(tmp_path), "-o", tmp_path / "plain")
    assert_same(tmp_path / "out", tmp_path / "plain")
    after = status(store)
    assert after["done"] == after["tasks"] == before["tasks"]
    assert [worker["state"] for worker in after["workers"]] == ["ended"]
    assert after["workers"][0]["did"] == after["tasks"]
    assert f"All is done: moepress work --store {store} -o FOLDER fetches the result." in moepress("status", store)
    again = json.loads(moepress("work", "--store", store, "-o", tmp_path / "again", "--json"))
    assert again["did"] == 0
    assert_same(tmp_path / "again", tmp_path / "plain")


def test_the_result_is_no_part_of_the_store(store: Path, tmp_path: Path) -> None:
    """Its files may be changed where they lie, and the store still has what was made."""
    moepress("work", "--store", store, "-o", tmp_path / "out")
    first = content(tmp_path / "out")
    for file in (tmp_path / "out").glob("*.safetensors"):
        with file.open("r+b") as stream:
            stream.write(b"changed")
    moepress("work", "--store", store, "-o", tmp_path / "again")
    assert content(tmp_path / "again") == first


def test_status_tells_who_works_who_waits_and_who_is_gone(store: Path, tmp_path: Path) -> None:
    with hands(store, tmp_path, 2) as (one, _two):
        one.turn(3)
        one.worker.leases.tell({"doing": one.shared.tasks[3].id, "did": 3})
        one.worker.leases._beat()
        found = status(store)
        assert (found["done"], found["running"]) == (3, 1)
        assert {row["worker"]: (row["state"], row["did"]) for row in found["workers"]} == {
            "hand-0": ("working", 3),
            "hand-1": ("waiting", 0),
        }
        assert found["seconds_left"] > 0
        said = moepress("status", store)
        assert f"3 of {found['tasks']} tasks done, 1 running, about" in said
        beats = open_store(str(store)).get("beats/hand-0.json")
    beat = json.loads(beats or b"")
    dead = {**beat, "worker": "dead", "pid": 2**22 + 1, "count": 7}
    lost = {**beat, "worker": "lost", "host": "elsewhere", "place": None, "time": 0, "count": 7}
    for row in (dead, lost):
        open_store(str(store)).put(f"beats/{row['worker']}.json", json.dumps(row).encode())
    found = status(store)
    assert {row["worker"]: row["state"] for row in found["workers"]} == {
        "hand-0": "ended",
        "hand-1": "ended",
        "dead": "gone",
        "lost": "silent",
    }
    assert found["seconds_left"] is None


def test_status_tells_what_failed(store: Path, tmp_path: Path) -> None:
    with hands(store, tmp_path, 1) as (one,):
        one.turn(1)
        first, second = (task.id for task in one.shared.tasks[:2])
        one.shared.fail(first, 0, "it was mended since", final=False)
        one.shared.fail(second, 0, "MemoryError: all is gone", "Traceback ...", final=True)
    assert status(store)["failures"] == [{"task": second, "error": "MemoryError: all is gone", "final": True}]
    assert f"Failed: {second}: MemoryError: all is gone" in moepress("status", store)


def test_broken_notes_of_workers_stop_no_status(store: Path) -> None:
    for number, raw in enumerate((b"", b"{", b"[]", b"\xff", b'{"progress": 3, "time": "x", "term seconds": "y"}')):
        open_store(str(store)).put(f"beats/{number}.json", raw)
        open_store(str(store)).put(f"failed/a/{number}.json", raw)
    assert len(status(store)["workers"]) == 5


def change(store: Path, **values: Any) -> None:
    file = store / WORK
    stated = json.loads(file.read_text())
    stated["work"] |= values
    file.write_text(json.dumps({**stated, "work": {k: v for k, v in stated["work"].items() if v is not ...}}))


@pytest.mark.parametrize(
    ("values", "code", "said"),
    [
        ({"moepress": "0.0.1"}, 2, "was planned with moepress 0.0.1 and this is"),
        ({"torch": "1.0"}, 2, "was planned with torch 1.0 and this is"),
        ({"device": "cuda"}, 2, "--device cuda is not available"),
        ({"digest": "0" * 64}, 4, "is not the model that the work was planned for; give its place with --model"),
        ({"request": {}}, 4, "work.json of the shared run is broken"),
        ({"request": ...}, 4, "work.json of the shared run is broken"),
        ({"corpus": ...}, 4, "work.json of the shared run is broken (corpus)"),
        ({"plan": {}}, 4, "work.json of the shared run is broken"),
        ({"shard_windows": 1}, 4, "are not those of this model"),
        ({"model": "/nowhere"}, 4, "/nowhere is not a folder"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_run_of_another_version_or_model_is_refused(store: Path, values: Any, code: int, said: str) -> None:
    change(store, **values)
    assert said in refused(code, "work", "--store", store)
    assert open_store(str(store)).names("leases") == []


@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b"\xff"])
def test_a_broken_run_is_refused(store: Path, raw: bytes) -> None:
    (store / WORK).write_bytes(raw)
    for arguments in (("work", "--store", store), ("status", store)):
        assert "plan the work anew" in refused(4, *arguments)


def test_what_is_no_run_is_refused(tmp_path: Path, store: Path) -> None:
    (tmp_path / "file").write_text("x")
    for arguments in (("work", "--store"), ("status",)):
        assert "holds no shared run" in refused(2, *arguments, tmp_path / "nothing")
        assert "is a file, not a folder" in refused(2, *arguments, tmp_path / "file")
    assert not (tmp_path / "nothing").exists()


def test_the_same_run_is_gone_on_with(model: Path, planned: Path, tmp_path: Path) -> None:
    before = content(planned)
    code, _, errors = command("plan-work", model, "--store", planned, *OPTIONS, *text_of(planned.parent))
    assert code == 0
    assert "holds this very run already" in errors
    assert content(planned) == before


def test_another_run_in_the_same_place_is_refused(model: Path, store: Path, tmp_path: Path) -> None:
    before = content(store)
    said = refused(2, "plan-work", model, "--store", store, *OPTIONS, *text_of(tmp_path), "--seed", "7")
    assert "holds another shared run" in said
    assert content(store) == before


def test_options_that_do_not_go_together(store: Path, tmp_path: Path) -> None:
    assert "--resume and --force are for the folder of -o" in refused(2, "work", "--store", store, "--resume")
    assert "--workers goes with --ray" in refused(2, "work", "--store", store, "--workers", "2")
    for bad in ("3/3", "x", "-1/3", "1/0"):
        code, _, errors = command("work", "--store", store, "--shard", bad)
        assert code == 2, errors
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    assert "out" in refused(2, "work", "--store", store, "-o", tmp_path / "out")
    assert open_store(str(store)).names("leases") == []


def test_a_store_that_lost_a_piece_says_so(store: Path, tmp_path: Path) -> None:
    moepress("work", "--store", store)
    found = open_store(str(store))
    name = next(name for name in found.names("out") if "experts-1-0" in name)
    found.put(name, b"x")
    assert "is not what was stored there" in refused(4, "work", "--store", store, "-o", tmp_path / "out")
    found.delete(name)
    assert "was it deleted?" in refused(1, "work", "--store", store, "-o", tmp_path / "out", "--resume")
    assert not (tmp_path / "out").exists()


def test_folders_of_dead_workers_are_deleted(store: Path) -> None:
    with Leases(open_store(str(store)), "alive") as leases:
        living = leases._process
    for name, process in (("dead", {**living, "pid": 2**22 + 1}), ("alive", living)):
        folder = store / "scratch" / f"moepress-{name}-x"
        folder.mkdir(parents=True)
        (folder / "owner.json").write_text(json.dumps(process))
    (store / "scratch" / "moepress-mine").mkdir()
    moepress("work", "--store", store)
    assert sorted(path.name for path in (store / "scratch").iterdir()) == ["moepress-alive-x", "moepress-mine"]
