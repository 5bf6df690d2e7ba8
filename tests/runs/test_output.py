"""Where an output may go: found out before any work, whatever OUT is."""

import json
import os
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from moepress.errors import OutputLockedError, UsageError
from moepress.runs.files import JOURNAL, LOCK
from moepress.runs.journal import open_run
from moepress.runs.output import check_output, partial_folder

MADE = '{"moepress": "0.1.0", "stage": "prune"}'
PROFILED = '{"schema_version": "1.0", "model": "x", "domains": [], "layers": [], "inventory": {}}'


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A mount point with a disk of 1 MiB; skips where none can be mounted."""
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", place], capture_output=True).returncode:
        pytest.skip("mounting needs root")
    yield place
    subprocess.run(["umount", place], check=True)


def make(out: Path, *, force: bool = False, resume: bool = False, text: str = "new") -> None:
    check_output(out, [], force=force, resume=resume)
    with open_run(out, {"seed": 0}, force=force, resume=resume) as run:
        run.write("a", "a.txt", lambda file: file.write_text(text) and None)
        run.write("made", "moepress.json", lambda file: file.write_text(MADE) and None)
        run.finish()


def refusal(out: Path, *, in_place: bool = False, force: bool = False) -> str:
    with pytest.raises(UsageError) as caught:
        check_output(out, [], in_place=in_place, force=force)
    return str(caught.value)


class TestCheckOutput:
    def refusal(self, out: Path, *inputs: Path, resume: bool = False, force: bool = False) -> str:
        with pytest.raises(UsageError) as caught:
            check_output(out, list(inputs), resume=resume, force=force)
        return str(caught.value)

    def test_a_new_name_is_fine(self, out: Path, tmp_path: Path) -> None:
        source = tmp_path / "model"
        source.mkdir()
        check_output(out, [source], resume=False, force=False)
        out.mkdir()
        check_output(out, [source], resume=False, force=False)

    def test_the_output_may_not_lie_inside_an_input(self, tmp_path: Path) -> None:
        source = tmp_path / "model"
        source.mkdir()
        link = tmp_path / "link"
        link.symlink_to(source)
        for inside in (source, source / "out", source / "deep" / "out", link / "out", tmp_path / "x" / ".." / "model"):
            assert "lies inside the input" in self.refusal(inside, source, force=True)

    def test_the_output_may_not_hold_an_input(self, tmp_path: Path) -> None:
        source = tmp_path / "models" / "model"
        source.mkdir(parents=True)
        assert "holds the input" in self.refusal(tmp_path / "models", source, force=True)
        assert "not empty" in self.refusal(tmp_path / "models", source)

    def test_a_file_is_refused(self, out: Path) -> None:
        out.write_text("")
        assert "is a file" in self.refusal(out, force=True)

    def test_a_full_folder_needs_force(self, out: Path) -> None:
        out.mkdir()
        (out / "old.txt").write_text("")
        assert "not empty" in self.refusal(out)
        assert "not empty" in self.refusal(out, resume=True)
        assert "--force will not replace it" in self.refusal(out, force=True)
        (out / "config.json").write_text("{}")
        assert "--force will not replace it" in self.refusal(out, force=True)  # it may be anybody's model
        (out / "moepress.json").write_text("{}")
        assert "--force will not replace it" in self.refusal(out, force=True)  # only the name is ours
        (out / "moepress.json").write_text(MADE)
        assert "not empty" in self.refusal(out)
        check_output(out, [], resume=False, force=True)

    def test_an_unfinished_run_needs_resume_or_force(self, out: Path) -> None:
        with open_run(out, {"seed": 0}) as run:
            run.write("a", "a.txt", lambda file: file.write_text("x") and None)
        assert "pass --resume to go on, or --force" in self.refusal(out)
        check_output(out, [], resume=True, force=False)
        check_output(out, [], resume=False, force=True)


def test_a_mount_point_is_refused_before_any_work_and_a_folder_inside_of_it_works(disk: Path) -> None:
    message = refusal(disk)
    assert "is a mount point, which can not be put in place as a whole" in message
    assert f"write to a folder inside of it, such as {disk}" in message
    make(disk / "inside")
    assert (disk / "inside" / "a.txt").read_text() == "new"


def test_a_part_of_the_same_disk_that_is_mounted_is_a_mount_point_too(tmp_path: Path) -> None:
    source, place = tmp_path / "source", tmp_path / "a place"
    for folder in (source, place):
        folder.mkdir()
    if subprocess.run(["mount", "--bind", source, place], capture_output=True).returncode:
        pytest.skip("mounting needs root")
    try:
        assert "is a mount point" in refusal(place)
        link = tmp_path / "link"
        link.symlink_to(place)
        assert "is a mount point" in refusal(link)
    finally:
        subprocess.run(["umount", place], check=True)


def test_a_run_folder_may_be_a_mount_point_but_not_replaced_there(disk: Path) -> None:
    check_output(disk, [], in_place=True)
    with open_run(disk, {"seed": 0}, in_place=True) as run:
        run.write("a", "a.txt", lambda file: file.write_text("x") and None)
    check_output(disk, [], in_place=True, force=True)
    with open_run(disk, {"seed": 1}, in_place=True, force=True) as run:
        assert not (disk / "a.txt").exists()  # an unfinished run is thrown away
        run.complete()
    assert "is a mount point" in refusal(disk, in_place=True, force=True)


def test_a_read_only_disk_is_refused_before_any_work(disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    assert "is on a read-only file system; choose another folder" in refusal(disk / "out")
    assert "is on a read-only file system" in refusal(disk / "deep" / "out")
    assert "is on a read-only file system" in refusal(disk, in_place=True)


@pytest.mark.parametrize("kind", ["empty", "full", "dangling"])
def test_a_link_is_followed_and_the_output_appears_at_its_target(out: Path, tmp_path: Path, kind: str) -> None:
    target = tmp_path / "elsewhere" / "target"
    target.parent.mkdir()
    if kind == "full":
        make(target, text="old")
    if kind == "empty":
        target.mkdir()
    out.symlink_to(target)
    make(out, force=kind == "full")
    assert out.is_symlink()
    assert (target / "a.txt").read_text() == "new"
    assert {p.name for p in target.parent.iterdir()} == {"target"}
    assert {p.name for p in tmp_path.iterdir()} == {"out", "elsewhere"}


def test_a_link_that_leads_to_itself_is_refused(out: Path) -> None:
    out.symlink_to(out)
    assert "can not be used" in refusal(out) or "leads to itself" in refusal(out)


@pytest.mark.parametrize("name", [".", "..", "./", "deep/..", "../here"])
def test_the_folder_that_one_is_in_is_refused_and_fits_a_run_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    here = tmp_path / "here"
    (here / "deep").mkdir(parents=True) if "deep" in name else here.mkdir()
    monkeypatch.chdir(here)
    message = refusal(Path(name))
    assert "is the folder that you are in" in message or "is not empty" in message
    if name in (".", "./"):
        check_output(Path(name), [], in_place=True)
    assert "look like a model" in refusal(Path(".."), force=True)


def test_a_slash_at_the_end_and_dots_on_the_way_change_nothing(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    make(Path(f"{tmp_path}/deep/../out/"))
    assert {p.name for p in tmp_path.iterdir()} == {"deep", "out"}


@pytest.mark.parametrize("name", ["x" * 256, "x" * 240, "ü" * 120, "/".join(["d" * 200] * 21)])
def test_a_name_that_is_too_long_for_the_disk_is_refused_in_a_short_sentence(tmp_path: Path, name: str) -> None:
    message = refusal(tmp_path / name)
    assert "too long a name" in message or "can not be used" in message
    assert len(message) < 400


def test_a_name_with_a_null_or_below_a_file_is_refused(tmp_path: Path) -> None:
    assert "can not be used" in refusal(tmp_path / "a\0b")
    (tmp_path / "file").write_text("")
    assert "no folder" in refusal(tmp_path / "file" / "out")


@pytest.mark.skipif(os.geteuid() != 0, reason="changes the user")
def test_a_folder_without_permission_is_refused_before_any_work() -> None:
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        root.chmod(0o755)
        (root / "locked" / "own").mkdir(parents=True)
        (root / "locked" / "own").chmod(0o777)
        (root / "closed").mkdir(mode=0o700)
        new, own, closed = as_nobody(root / "locked" / "out", root / "locked" / "own", root / "closed" / "out")
    assert "locked may not be written to; choose another folder" in new
    assert "locked may not be written to; write to a folder inside of it" in own
    assert "can not be used (Permission denied)" in closed


def as_nobody(*outs: Path) -> list[str]:
    """What another user is told of these outputs."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.setuid(65534)
        for out in outs:
            try:
                check_output(out, [])
                os.write(writer, b"allowed\n")
            except BaseException as error:
                os.write(writer, f"{error}\n".encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as stream:
        found = stream.read().splitlines()
    os.waitpid(child, 0)
    return found


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("moepress.json", "[]"),
        ("moepress.json", '{"stage": "prune"}'),
        ("profile.json", "{}"),
        ("profile.json", "{"),
        ("journal.jsonl", ""),
        ("journal.jsonl", '{"settings": 3}\n'),
        ("journal.jsonl", '{"event": "a journal of another program"}\n'),
    ],
)
def test_a_file_that_only_has_the_name_of_ours_lets_nothing_be_replaced(out: Path, name: str, text: str) -> None:
    out.mkdir()
    (out / name).write_text(text)
    (out / "thesis.txt").write_text("years of work")
    for in_place in (False, True):
        assert "--force will not replace it" in refusal(out, force=True, in_place=in_place)
    with pytest.raises(UsageError), open_run(out, {"seed": 0}, force=True):
        pass
    with pytest.raises(UsageError), open_run(out, {"seed": 0}, force=True, in_place=True):
        pass
    assert (out / "thesis.txt").exists()
    (out / name).unlink()
    (out / name).symlink_to("/etc/passwd")
    assert "--force will not replace it" in refusal(out, force=True)


@pytest.mark.parametrize(("name", "text"), [("moepress.json", MADE), ("profile.json", PROFILED)])
def test_a_folder_of_ours_is_known_by_what_its_files_say(out: Path, name: str, text: str) -> None:
    out.mkdir()
    (out / name).write_text(text)
    check_output(out, [], force=True)


def test_a_work_folder_that_is_a_link_is_refused(out: Path, tmp_path: Path) -> None:
    make(tmp_path / "other")
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / JOURNAL).write_text('{"settings": {}}\n')
    partial_folder(out).symlink_to(victim)
    for options in ({"resume": True}, {"force": True}):
        with pytest.raises(UsageError, match="no work folder"):
            check_output(out, [], **options)
        with pytest.raises(UsageError, match="no work folder"), open_run(out, {}, **options):
            pass
    assert (victim / JOURNAL).exists()


@pytest.mark.parametrize("in_place", [False, True])
def test_a_second_run_on_a_live_output_is_refused_at_once_with_6(out: Path, in_place: bool) -> None:
    folder = out if in_place else partial_folder(out)
    folder.mkdir()
    (folder / JOURNAL).write_text('{"settings": {}}\n')
    (folder / LOCK).write_text(json.dumps({"pid": os.getppid(), "host": socket.gethostname()}))
    for options in ({}, {"resume": True}, {"force": True}):
        with pytest.raises(OutputLockedError) as caught:
            check_output(out, [], in_place=in_place, **options)
        assert caught.value.exit_code == 6


def test_a_folder_that_a_run_is_writing_to_is_not_replaced_by_another_command(out: Path) -> None:
    out.mkdir()
    (out / "moepress.json").write_text(MADE)
    (out / LOCK).write_text(json.dumps({"pid": os.getppid(), "host": socket.gethostname()}))
    with pytest.raises(OutputLockedError):
        check_output(out, [], force=True)
