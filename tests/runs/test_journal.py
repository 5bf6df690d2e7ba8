"""Runs that are killed and resumed, fought over, or pointed at the wrong folder."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moepress.errors import InvalidInputError, MoepressError, OutputLockedError, UsageError
from moepress.runs.files import JOURNAL, LOCK, sha256_of, temporary_for
from moepress.runs.journal import Run, open_run
from moepress.runs.output import check_output, partial_folder
from moepress.runs.rows import first_settings

SETTINGS: dict[str, Any] = {"model": "abc", "keep": 12, "criterion": "reap"}


def put(run: Run, piece: str, text: str, note: dict[str, Any] | None = None) -> None:
    def write(file: Path) -> dict[str, Any] | None:
        file.write_text(text)
        return note

    run.write(piece, f"{piece}.txt", write)


def unfinished(out: Path, *pieces: str) -> Path:
    """A run that stopped after some pieces; its work folder."""
    with open_run(out, SETTINGS) as run:
        for piece in pieces:
            put(run, piece, piece * 3, {"from": piece})
    return partial_folder(out)


def old_output(out: Path) -> None:
    """An output of an earlier run."""
    out.mkdir()
    (out / "moepress.json").write_text('{"moepress": "0.1.0", "stage": "prune"}')
    (out / "old.txt").write_text("old")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def test_a_fresh_run_has_no_pieces_and_no_output_yet(out: Path) -> None:
    with open_run(out, SETTINGS) as run:
        assert not run.resumed
        assert run.done("a") is None
        put(run, "a", "text")
        assert not out.exists()
    assert not (partial_folder(out) / LOCK).exists()


def test_pieces_survive_with_hash_and_note(out: Path) -> None:
    folder = unfinished(out, "a", "b")
    with open_run(out, SETTINGS, resume=True) as run:
        assert run.resumed
        piece = run.done("b")
        assert piece is not None
        assert run.path(piece) == folder / "b.txt"
        assert (piece.bytes, piece.sha256, piece.note) == (3, sha256_of(folder / "b.txt"), {"from": "b"})
        put(run, "c", "new")
        run.finish()
    assert {p.name: p.read_text() for p in out.iterdir()} == {"a.txt": "aaa", "b.txt": "bbb", "c.txt": "new"}


def test_a_crash_inside_a_piece_leaves_the_finished_ones(out: Path) -> None:
    def fail(file: Path) -> None:
        file.write_text("half")
        raise OSError("disk full")

    def crash() -> None:
        with open_run(out, SETTINGS) as run:
            put(run, "a", "text")
            run.write("b", "b.txt", fail)

    with pytest.raises(OSError, match="disk full"):
        crash()
    assert not (partial_folder(out) / LOCK).exists()
    with open_run(out, SETTINGS, resume=True) as run:
        assert set(run.pieces) == {"a"}
        assert not list(run.folder.glob("b.txt*"))


@pytest.mark.parametrize("torn", [b"{", b'{"piece": "c", "fi', b'{"piece": "c", "file": "a.txt", "bytes": 3}'])
def test_a_torn_last_line_is_dropped(out: Path, torn: bytes) -> None:
    journal = unfinished(out, "a") / JOURNAL
    whole = journal.read_bytes()
    journal.write_bytes(whole + torn)
    assert first_settings(journal.parent) == SETTINGS
    assert journal.read_bytes() == whole + torn  # only the run that holds the lock mends it
    with open_run(out, SETTINGS, resume=True) as run:
        assert set(run.pieces) == {"a"}
        put(run, "b", "more")
    with open_run(out, SETTINGS, resume=True) as run:
        assert set(run.pieces) == {"a", "b"}


@pytest.mark.parametrize("start", [b"", b'{"settings": {"mod'])
def test_a_run_killed_in_its_first_line_starts_anew(out: Path, start: bytes) -> None:
    folder = unfinished(out)
    (folder / JOURNAL).write_bytes(start)
    with open_run(out, SETTINGS, resume=True) as run:
        assert not run.resumed
        put(run, "a", "text")
    assert len((folder / JOURNAL).read_bytes().splitlines()) == 2


def test_a_resume_with_changed_settings_is_refused_by_name(out: Path) -> None:
    unfinished(out, "a")
    changed = {**SETTINGS, "keep": 8, "seed": 1}
    with pytest.raises(UsageError) as caught, open_run(out, changed, resume=True):
        pass
    message = str(caught.value)
    assert "--keep was 12, now 8" in message
    assert "--seed was not given, now 1" in message
    assert "criterion" not in message
    assert caught.value.exit_code == 2
    assert not (partial_folder(out) / LOCK).exists()


def test_settings_are_compared_as_json(out: Path) -> None:
    with open_run(out, {"block": (1, 2), "name": None}):
        pass
    with open_run(out, {"block": [1, 2], "name": None}, resume=True) as run:
        assert run.resumed


@pytest.mark.parametrize("text", ["aaA", "aaaa", None])
def test_a_modified_piece_is_refused(out: Path, text: str | None) -> None:
    file = unfinished(out, "a") / "a.txt"
    if text is None:
        file.unlink()
    else:
        file.write_text(text)
    with pytest.raises(InvalidInputError, match=r"a\.txt was changed"), open_run(out, SETTINGS, resume=True):
        pass


def test_force_starts_anew_and_resume_goes_on(out: Path) -> None:
    folder = unfinished(out, "a")
    with open_run(out, SETTINGS, resume=True, force=True) as run:
        assert set(run.pieces) == {"a"}
    with open_run(out, {"model": "other"}, force=True) as run:
        assert not run.resumed
        assert not (folder / "a.txt").exists()


def test_a_dropped_piece_is_gone_for_good(out: Path) -> None:
    with open_run(out, SETTINGS) as run:
        put(run, "a", "text")
        put(run, "b", "text")
        run.drop("a")
        run.drop("never there")
        assert not (run.folder / "a.txt").exists()
    with open_run(out, SETTINGS, resume=True) as run:
        assert set(run.pieces) == {"b"}


def test_a_piece_dropped_in_the_journal_but_not_yet_on_disk_is_swept(out: Path) -> None:
    folder = unfinished(out, "a", "b")
    with (folder / JOURNAL).open("a") as stream:
        stream.write('{"dropped": "a"}\n')
    with open_run(out, SETTINGS, resume=True) as run:
        assert not (folder / "a.txt").exists()
        run.finish()
    assert [p.name for p in out.iterdir()] == ["b.txt"]


def test_a_piece_made_again_after_a_drop_stays(out: Path) -> None:
    with open_run(out, SETTINGS) as run:
        put(run, "a", "old")
        run.drop("a")
        put(run, "a", "new")
    with open_run(out, SETTINGS, resume=True) as run:
        piece = run.done("a")
        assert piece is not None
        assert run.path(piece).read_text() == "new"


def test_a_marked_stage_is_remembered_and_can_be_dropped(out: Path) -> None:
    with open_run(out, SETTINGS) as run:
        run.mark("profile", {"tokens": 5})
    with open_run(out, SETTINGS, resume=True) as run:
        stage = run.done("profile")
        assert stage is not None
        assert stage.note == {"tokens": 5}
        run.drop("profile")
    with open_run(out, SETTINGS, resume=True) as run:
        assert run.done("profile") is None


def test_a_live_process_keeps_its_lock(out: Path) -> None:
    folder = unfinished(out, "a")
    other, host = os.getppid(), socket.gethostname()
    (folder / LOCK).write_text(json.dumps({"pid": other, "host": host}))
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    for options in ({"resume": True}, {"force": True}):
        with pytest.raises(OutputLockedError) as caught, open_run(out, SETTINGS, **options):
            pass
        assert caught.value.exit_code == 6
        assert f"process {other} on {host}" in str(caught.value)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


def test_a_lock_of_another_host_is_respected(out: Path) -> None:
    folder = unfinished(out)
    (folder / LOCK).write_text(json.dumps({"pid": 1, "host": "elsewhere"}))
    with pytest.raises(OutputLockedError, match="process 1 on elsewhere"), open_run(out, SETTINGS, resume=True):
        pass


def test_a_second_process_is_refused_while_the_first_runs(out: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from moepress.runs.journal import open_run\n"
        "with open_run(Path(sys.argv[1]), {'model': 'abc'}, resume=True): pass"
    )
    with open_run(out, {"model": "abc"}):
        second = subprocess.run([sys.executable, "-c", program, str(out)], capture_output=True, text=True, check=False)
        assert second.returncode == 1
        assert f"OutputLockedError: {partial_folder(out)} is being written by process {os.getpid()}" in second.stderr
        assert json.loads((partial_folder(out) / LOCK).read_text())["pid"] == os.getpid()


def dead_pid() -> int:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


@pytest.mark.parametrize("text", ["dead", "", "[]", '{"pid": "x", "host": "HERE"}', '{"pid": 1e400, "host": "HERE"}'])
def test_a_stale_lock_is_taken_over(out: Path, text: str) -> None:
    lock = unfinished(out, "a") / LOCK
    host = socket.gethostname()
    lock.write_text(json.dumps({"pid": dead_pid(), "host": host}) if text == "dead" else text.replace("HERE", host))
    with open_run(out, SETTINGS, resume=True) as run:
        assert set(run.pieces) == {"a"}
        assert json.loads(lock.read_text()) == {"pid": os.getpid(), "host": host}
    assert not lock.exists()


def test_finish_leaves_only_the_pieces(out: Path, tmp_path: Path) -> None:
    with open_run(out, SETTINGS) as run:
        put(run, "a", "text")
        run.finish(keep_journal=tmp_path / "kept.jsonl")
    assert [p.name for p in out.iterdir()] == ["a.txt"]
    assert not partial_folder(out).exists()
    assert json.loads((tmp_path / "kept.jsonl").read_text().splitlines()[0])["settings"] == SETTINGS


def test_finish_fills_an_empty_folder(out: Path) -> None:
    out.mkdir()
    with open_run(out, SETTINGS) as run:
        put(run, "a", "text")
        run.finish()
    assert [p.name for p in out.iterdir()] == ["a.txt"]


def test_finish_replaces_a_full_folder_as_a_whole(out: Path) -> None:
    old_output(out)
    with open_run(out, SETTINGS, force=True) as run:
        put(run, "a", "text")
        assert (out / "old.txt").read_text() == "old"  # the old output stays until the new one is whole
        run.finish()
    assert [p.name for p in out.iterdir()] == ["a.txt"]
    assert [p.name for p in out.parent.iterdir()] == ["out"]


def test_a_run_killed_while_finishing_can_still_be_finished(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old_output(out)

    def kill(*_arguments: object, **_keywords: object) -> None:
        raise KeyboardInterrupt

    def finish() -> None:
        with open_run(out, SETTINGS, force=True) as run:
            put(run, "a", "text")
            monkeypatch.setattr(Path, "unlink", kill)
            run.finish()

    with pytest.raises(KeyboardInterrupt):
        finish()
    monkeypatch.undo()
    assert {p.name for p in out.iterdir()} == {"a.txt", JOURNAL, LOCK}  # whole, but its journal is still there
    check_output(out, [], resume=True, force=False)
    with pytest.raises(UsageError, match="not empty"), open_run(out, {**SETTINGS, "keep": 1}, resume=True):
        pass
    with open_run(out, SETTINGS, resume=True) as run:
        assert set(run.pieces) == {"a"}
        run.finish()
    assert [p.name for p in out.iterdir()] == ["a.txt"]
    assert [p.name for p in out.parent.iterdir()] == ["out"]


def test_our_orphan_temporary_files_are_swept_and_no_others(out: Path) -> None:
    folder = unfinished(out, "a")
    ours = temporary_for(folder / "b.txt")
    ours.write_text("half")
    (folder / "sub").mkdir()
    foreign = [
        *(out.parent / name for name in ("download.tmp", "out.partial.tmp")),
        *(folder / name for name in ("notes.md", "b.txt.tmp", "scratch-hidden.tmp", "sub/deep.tmp")),
        folder / "b.txt.0123456789abcdef-01234567.tmp",  # of another run
    ]
    for file in foreign:
        file.write_text("others'")
    with open_run(out, SETTINGS, resume=True):
        assert not ours.exists()
        assert all(path.read_text() == "others'" for path in foreign)


@pytest.mark.parametrize("options", [{"resume": True}, {"force": True}, {}])
def test_a_folder_that_only_has_the_name_of_a_work_folder_is_left_alone(out: Path, options: dict[str, bool]) -> None:
    folder = partial_folder(out)
    folder.mkdir()
    (folder / "thesis.txt").write_text("years of work")
    with pytest.raises(UsageError, match="no unfinished run"), open_run(out, SETTINGS, **options):
        pass
    assert [p.name for p in folder.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(
    "row",
    [
        "nonsense",
        "[]",
        "3",
        "{}",
        '{"piece": "b"}',
        '{"piece": "b", "file": "../a.txt", "bytes": 3, "sha256": "x", "note": {}}',
        '{"piece": "b", "file": "/etc/passwd", "bytes": 3, "sha256": "x", "note": {}}',
        '{"piece": ["b"], "file": "a.txt", "bytes": 3, "sha256": "x", "note": {}}',
        '{"piece": "b", "file": "a.txt", "bytes": "3", "sha256": "x", "note": {}}',
    ],
)
def test_a_damaged_journal_is_refused(out: Path, row: str) -> None:
    journal = unfinished(out, "a") / JOURNAL
    with journal.open("a") as stream:
        stream.write(row + "\n")
    with pytest.raises(InvalidInputError, match=r"journal\.jsonl is damaged; pass --force"):
        open_run(out, SETTINGS, resume=True).__enter__()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tail=st.binary(max_size=60), cut=st.integers(0, 200))
def test_a_fuzzed_journal_gives_only_our_errors(
    tmp_path_factory: pytest.TempPathFactory, tail: bytes, cut: int
) -> None:
    out = tmp_path_factory.mktemp("fuzz") / "out"
    journal = unfinished(out, "a") / JOURNAL
    journal.write_bytes(journal.read_bytes()[:cut] + tail + b"\n")
    try:
        with open_run(out, SETTINGS, resume=True) as run:
            assert run.pieces.keys() <= {"a"}
    except MoepressError:
        pass


def test_an_in_place_run_is_gone_on_with_and_keeps_its_journal(out: Path) -> None:
    with open_run(out, SETTINGS, in_place=True) as run:
        assert run.folder == out
        run.mark("profile")
    assert (out / JOURNAL).exists()
    assert not partial_folder(out).exists()
    with pytest.raises(UsageError, match="holds a run; pass --resume"):
        check_output(out, [], in_place=True)
    check_output(out, [], resume=True, in_place=True)
    with open_run(out, SETTINGS, resume=True, in_place=True) as run:
        assert run.done("profile")
