"""How an output takes its place: processes killed at every step of it, power cuts, and files that others put there."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moepress.errors import OutputLockedError, UsageError
from moepress.runs.files import JOURNAL, LOCK, contents
from moepress.runs.journal import open_run
from moepress.runs.output import check_output, partial_folder

OLD = {"moepress.json": '{"moepress": "0.1.0", "stage": "prune"}', "old.txt": "old", "deep/old.txt": "older"}
NEW = {"moepress.json": '{"moepress": "0.2.0", "stage": "prune"}', "a.txt": "new", "config.json": "{}"}
STEPS = ("rename", "replace", "unlink", "rmdir", "mkdir", "fsync", "open", "scandir")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "parent" / "out"


def texts(folder: Path) -> dict[str, str]:
    if not folder.is_dir():
        return {}
    return {p.relative_to(folder).as_posix(): p.read_text() for p in folder.rglob("*") if p.is_file()}


def without_journal(folder: Path) -> dict[str, str]:
    return {name: text for name, text in texts(folder).items() if name not in (JOURNAL, LOCK)}


def lay(folder: Path, files: dict[str, str] = OLD) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def make(out: Path, *, before_end: Callable[[], Any] = lambda: None, **options: bool) -> None:
    """A run as the commands do it."""
    check_output(out, [], **options)
    with open_run(out, {"seed": 0}, **options) as run:
        for name in ("moepress.json", "a.txt"):
            if run.done(name) is None:
                run.write(name, name, lambda file, text=NEW[name]: file.write_text(text) and None)  # type: ignore[misc]
        (run.folder / "config.json").write_text("{}")  # beside the pieces, as companions are
        before_end()
        run.finish()


def make_run_folder(out: Path, *, before_end: Callable[[], Any] = lambda: None, **options: bool) -> None:
    check_output(out, [], in_place=True, **options)
    before_end()
    with open_run(out, {"seed": 0}, in_place=True, **options) as run:
        if run.done("plan") is None:
            run.write("plan", "plan.json", lambda file: file.write_text("new") and None)
        run.complete()


def killed_at(step: int, work: Callable[[Callable[[], None]], None]) -> bool:
    """Do work in a child that kills itself before its n-th call of the system; whether it was killed.

    Args:
        step: n, from 1; counted from when the work calls what it is given.
        work: what to do.
    """
    child = os.fork()
    if child == 0:
        count = 0

        def counted(call: Callable[..., Any]) -> Callable[..., Any]:
            def instead(*arguments: Any, **keywords: Any) -> Any:
                nonlocal count
                count += 1
                if count == step:
                    os.kill(os.getpid(), signal.SIGKILL)
                return call(*arguments, **keywords)

            return instead

        def arm() -> None:
            for name in STEPS:
                setattr(os, name, counted(getattr(os, name)))

        try:
            work(arm)
            os._exit(0)
        except BaseException as error:
            os.write(2, f"{error!r}\n".encode())
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def kept(out: Path) -> list[dict[str, str]]:
    """What folders of an output are there: in place, or set aside."""
    return [without_journal(place) for place in out.parent.iterdir() if ".partial" not in place.name]


@pytest.mark.parametrize("again", [{"resume": True, "force": True}, {"force": True}], ids=str)
def test_a_kill_at_every_step_of_a_replacement_leaves_one_of_both_whole_and_the_next_run_cleans_up(
    out: Path, again: dict[str, bool]
) -> None:
    step, states = 0, set()
    while True:
        step += 1
        shutil.rmtree(out.parent, ignore_errors=True)
        lay(out)
        killed = killed_at(step, lambda arm: make(out, force=True, before_end=arm))
        states.add(("old" if OLD in kept(out) else "") + (" new" if NEW in kept(out) else ""))
        assert OLD in kept(out) or without_journal(out) == NEW
        if not killed:
            break
        make(out, **again)
        assert texts(out) == NEW
        assert [p.name for p in out.parent.iterdir()] == ["out"]
    assert step > 20
    assert states == {"old", "old new", " new"}


def test_a_kill_at_every_step_of_a_first_output_is_gone_on_with(out: Path) -> None:
    for empty in (False, True):
        step, killed = 0, True
        while killed:
            step += 1
            shutil.rmtree(out.parent, ignore_errors=True)
            if empty:
                out.mkdir(parents=True)
            killed = killed_at(step, lambda arm: make(out, before_end=arm))
            assert without_journal(out) in ({}, NEW)
            if killed and texts(out) != NEW:  # else it was killed after the very end
                make(out, resume=True)
            assert texts(out) == NEW
            assert [p.name for p in out.parent.iterdir()] == ["out"]
        assert step > 10


def test_a_resume_of_a_replacement_that_was_killed_before_says_that_it_needs_force_too(out: Path) -> None:
    lay(out)
    assert killed_at(3, lambda arm: make(out, force=True, before_end=arm))
    with pytest.raises(UsageError, match="pass --force beside --resume to replace it"):
        make(out, resume=True)
    make(out, resume=True, force=True)
    assert texts(out) == NEW


def test_a_resume_goes_on_without_force_once_the_old_output_was_set_aside(out: Path) -> None:
    found = 0
    for step in range(1, 60):
        shutil.rmtree(out.parent, ignore_errors=True)
        lay(out)
        if killed_at(step, lambda arm: make(out, force=True, before_end=arm)) and not out.exists():
            found += 1
            make(out, resume=True)
            assert texts(out) == NEW
            assert [p.name for p in out.parent.iterdir()] == ["out"]
    assert found


@pytest.mark.parametrize("again", [{"resume": True}, {"force": True}], ids=str)
def test_a_kill_at_every_step_of_a_run_folder_s_replacement_keeps_the_old_one_until_the_new_one_is_done(
    out: Path, again: dict[str, bool]
) -> None:
    step = 0
    while True:
        step += 1
        shutil.rmtree(out.parent, ignore_errors=True)
        make_run_folder(out)
        (out / "model").mkdir()
        (out / "model" / "weights").write_text("old")
        old = without_journal(out)
        killed = killed_at(step, lambda arm: make_run_folder(out, force=True, before_end=arm))
        done = [place for place in out.parent.iterdir() if '"finished"' in texts(place).get(JOURNAL, "")]
        assert done
        if not killed:
            break
        whole = old in kept(out)
        if "resume" in again and not (out / JOURNAL).exists():
            make_run_folder(out, force=True)
        else:
            make_run_folder(out, **again)
        assert whole or without_journal(out) == {"plan.json": "new"}
        assert [p.name for p in out.parent.iterdir()] == ["out"]
    assert without_journal(out) == {"plan.json": "new"}
    assert step > 20


def test_a_run_folder_that_is_unfinished_is_thrown_away_by_force(out: Path) -> None:
    with open_run(out, {"seed": 0}, in_place=True) as run:
        run.write("plan", "plan.json", lambda file: file.write_text("old") and None)
    (out / "profile").mkdir()
    (out / "profile" / "file").write_text("x")
    make_run_folder(out, force=True)
    assert without_journal(out) == {"plan.json": "new"}
    assert [p.name for p in out.parent.iterdir()] == ["out"]


def test_a_kill_while_an_unfinished_run_is_thrown_away_leaves_what_the_next_run_knows(out: Path) -> None:
    step, killed = 0, True
    while killed:
        step += 1
        shutil.rmtree(out.parent, ignore_errors=True)
        lay(partial_folder(out), {JOURNAL: '{"settings": {"seed": 1}}\n', "b.txt": "b", "c/d.txt": "d", "zz": "z"})

        def work(arm: Callable[[], None]) -> None:
            arm()
            make(out, force=True)

        killed = killed_at(step, work)
        if killed and texts(out) != NEW:
            make(out, force=True)
        assert texts(out) == NEW
        assert [p.name for p in out.parent.iterdir()] == ["out"]
    assert step > 30


def put_file(folder: Path, name: str = "mine.txt") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("years of work")


@pytest.mark.parametrize("start", ["absent", "empty", "old"])
def test_a_file_that_somebody_puts_there_during_the_run_is_kept_and_the_result_too(out: Path, start: str) -> None:
    if start == "old":
        lay(out)
    elif start == "empty":
        out.mkdir(parents=True)
    with pytest.raises(UsageError, match=r"mine\.txt appeared or changed while the output was made"):
        make(out, force=start == "old", before_end=lambda: put_file(out))
    assert texts(out) == (OLD if start == "old" else {}) | {"mine.txt": "years of work"}
    assert without_journal(partial_folder(out)) == NEW
    out.rename(out.parent / "moved")
    make(out, resume=True)
    assert texts(out) == NEW
    assert (out.parent / "moved" / "mine.txt").exists()


def test_a_file_of_the_old_output_that_is_written_to_during_the_run_is_kept(out: Path) -> None:
    lay(out)
    with pytest.raises(UsageError, match=r"old\.txt appeared or changed"):
        make(out, force=True, before_end=lambda: (out / "old.txt").write_text("improved by hand"))
    assert (out / "old.txt").read_text() == "improved by hand"


def test_what_appears_between_the_check_and_the_rename_is_not_deleted(
    out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lay(out)
    rename = os.rename

    def late(source: Any, target: Any, **keywords: Any) -> None:
        if Path(source) == out:
            put_file(out)
        rename(source, target, **keywords)

    monkeypatch.setattr(os, "rename", late)
    make(out, force=True)
    assert texts(out) == NEW
    (aside,) = (p for p in out.parent.iterdir() if p != out)
    assert texts(aside) == {"mine.txt": "years of work"}
    assert f"Note: {aside} holds what was not in the old output; it is kept." in capsys.readouterr().err


def test_a_file_that_appears_in_a_folder_after_the_first_check_is_not_replaced(out: Path) -> None:
    check_output(out, [], force=True)
    put_file(out)
    with pytest.raises(UsageError, match="will not replace it"), open_run(out, {}, force=True):
        pass
    with pytest.raises(UsageError, match="not empty"), open_run(out, {}):
        pass
    assert texts(out) == {"mine.txt": "years of work"}
    assert not partial_folder(out).exists()


@pytest.mark.parametrize("name", ["out.replaced-17", "out.replaced-17-0123456789abcdef", "out.replaced-1.tmp", "x.tmp"])
def test_a_folder_with_such_a_name_as_we_set_aside_is_never_touched(out: Path, name: str) -> None:
    lay(out)
    lay(out.parent / name)
    make(out, force=True)
    assert texts(out.parent / name) == OLD


@pytest.mark.parametrize("name", ["victim", "../victim", "out.replaced-17-0123456789abcdef", ".", 3])
def test_a_planted_journal_deletes_nothing_outside_of_what_was_set_aside(out: Path, name: Any) -> None:
    aside = out.parent / "out.replaced-17-0123456789abcdef"
    put_file(out.parent / "victim")
    put_file(aside, "theirs.txt")
    facts = (out.parent / "victim" / "mine.txt").stat()
    listed = {"../victim/mine.txt": [facts.st_size, facts.st_mtime_ns], "mine.txt": [facts.st_size, facts.st_mtime_ns]}
    rows = [{"settings": {"seed": 0}, "id": "0" * 16}, {"ends": True, "aside": name, "files": listed}]
    for place in (out, partial_folder(out)):
        lay(place, {JOURNAL: "".join(json.dumps(row) + "\n" for row in rows)})
        make(out, resume=True, force=True)
        assert texts(out) == NEW
        shutil.rmtree(out)
    assert texts(out.parent / "victim") == {"mine.txt": "years of work"}
    assert texts(aside) == {"theirs.txt": "years of work"}


def test_every_file_and_folder_is_on_the_disk_before_the_output_appears(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a power cut leaves: the recorded fsyncs, held against what lies there when the folder gets its name."""
    synced: dict[tuple[int, int], tuple[int, int]] = {}
    fsync, rename = os.fsync, os.rename
    checked = []

    def noted_sync(number: int) -> None:
        facts = os.fstat(number)
        synced[facts.st_dev, facts.st_ino] = (facts.st_size, facts.st_mtime_ns)
        fsync(number)

    def noted_rename(source: Any, target: Any, **keywords: Any) -> None:
        if Path(target) == out:
            for path in (Path(source), *Path(source).rglob("*")):
                facts = path.stat()
                assert synced.get((facts.st_dev, facts.st_ino)) == (facts.st_size, facts.st_mtime_ns), path
                checked.append(path.name)
        rename(source, target, **keywords)

    monkeypatch.setattr(os, "fsync", noted_sync)
    monkeypatch.setattr(os, "rename", noted_rename)
    lay(out)

    def companions() -> None:
        lay(partial_folder(out), {"tokenizer.json": "{}", "templates/one.jinja": "x"})

    make(out, force=True, before_end=companions)
    assert {"a.txt", "config.json", "tokenizer.json", "templates", "one.jinja", JOURNAL} <= set(checked)
    facts = out.parent.stat()
    assert (facts.st_dev, facts.st_ino) in synced
    grand = out.parent.parent.stat()
    assert (grand.st_dev, grand.st_ino) not in synced  # it was there before


@pytest.mark.parametrize("made", [make, make_run_folder], ids=["output", "run folder"])
def test_folders_that_are_made_for_an_output_are_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made: Callable[[Path], None]
) -> None:
    synced = set()
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda number: (synced.add(os.fstat(number).st_ino), fsync(number))[1])
    made(tmp_path / "one" / "two" / "out")
    assert {place.stat().st_ino for place in (tmp_path, tmp_path / "one", tmp_path / "one" / "two")} <= synced


def test_an_output_that_is_whole_but_has_its_journal_still_is_not_taken_from_a_live_process(out: Path) -> None:
    lay(out)
    rows = [{"settings": {"seed": 0}}, {"ends": True, "aside": None, "files": {}}]
    (out / JOURNAL).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (out / LOCK).write_text(json.dumps({"pid": os.getppid(), "host": os.uname().nodename}))
    before = contents(out)
    for options in ({"resume": True}, {"force": True}):
        with pytest.raises(OutputLockedError), open_run(out, {"seed": 0}, **options):
            pass
    assert contents(out) == before
