"""Files: planted links, pipes, devices, full disks."""

import errno
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from moepress.errors import InvalidInputError, MoepressError, UsageError
from moepress.runs.files import (
    JOURNAL,
    check_file,
    contents,
    open_plain,
    put,
    remove_listed,
    rewrite,
    room_for,
    run_id,
    sha256_of,
    temporary_for,
    write_atomically,
)
from moepress.runs.journal import open_run
from moepress.runs.output import partial_folder


def test_a_small_file_is_replaced_at_once(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    file.write_text("old")
    write_atomically(file, "nëw")
    assert file.read_bytes() == "nëw".encode()
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]


def test_a_planted_link_at_a_temporary_name_is_not_followed(tmp_path: Path) -> None:
    victim, file = tmp_path / "victim", tmp_path / "plan.json"
    victim.write_text("precious")
    for name in ("plan.json.tmp", "a.txt.tmp"):
        (tmp_path / name).symlink_to(victim)
    write_atomically(file, "new")
    with open_run(tmp_path / "out", {}) as run:
        (run.folder / "a.txt.tmp").symlink_to(victim)
        (run.folder / "a.txt").symlink_to(victim)
        (run.folder / "b.txt").symlink_to(victim)
        run.write("a", "a.txt", lambda path: path.write_text("new") and None)
        put(run.folder / "b.txt", b"new")
        with pytest.raises(OSError), rewrite(tmp_path / "plan.json.tmp"):  # noqa: PT011
            pass
    assert victim.read_text() == "precious"
    assert not (tmp_path / "out.partial" / "a.txt").is_symlink()
    assert not (tmp_path / "out.partial" / "b.txt").is_symlink()


def test_a_link_that_is_planted_at_the_very_name_is_an_error_and_not_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    victim, name = tmp_path / "victim", tmp_path / "x.tmp"
    victim.write_text("precious")
    name.symlink_to(victim)
    monkeypatch.setattr("moepress.runs.files.temporary_for", lambda _file: name)
    with pytest.raises(FileExistsError):
        write_atomically(tmp_path / "plan.json", "new")
    assert victim.read_text() == "precious"


def test_a_link_at_the_name_of_a_journal_is_not_followed(tmp_path: Path) -> None:
    out, victim = tmp_path / "out", tmp_path / "victim"
    victim.write_text("precious")
    partial_folder(out).mkdir()
    (partial_folder(out) / JOURNAL).symlink_to(victim)
    for options in ({"resume": True}, {"force": True}, {}):
        with pytest.raises((UsageError, OSError)), open_run(out, {}, **options):
            pass
    assert victim.read_text() == "precious"


def test_temporary_names_are_random_and_hold_the_run_s_id(tmp_path: Path) -> None:
    with open_run(tmp_path / "out", {}) as run:
        names = {temporary_for(run.folder / "a.txt").name for _ in range(10)}
        assert len(names) == 10
        assert all(f".{run_id(run.folder)}-" in name for name in names)
    assert run_id(tmp_path) is None
    assert len(os.fsencode(temporary_for(tmp_path / ("ü" * 120)).name)) < 255


def fifo(path: Path) -> None:
    os.mkfifo(path)


def bound(path: Path) -> None:
    place = os.getcwd()  # noqa: PTH109
    os.chdir(path.parent)  # names of sockets are short
    try:
        socket.socket(socket.AF_UNIX).bind(path.name)
    finally:
        os.chdir(place)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


KINDS: list[tuple[Callable[[Path], None], str]] = [
    (fifo, "a named pipe"),
    (bound, "a socket"),
    (device, "a device"),
    (Path.mkdir, "a folder"),
]


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize(("make", "kind"), KINDS, ids=[kind for _, kind in KINDS])
def test_what_is_no_plain_file_is_refused_without_opening_it(
    tmp_path: Path, make: Callable[[Path], None], kind: str
) -> None:
    file = tmp_path / "input"
    make(file)
    signal.alarm(20)  # opening a pipe would wait
    try:
        for read in (open_plain, sha256_of):
            with pytest.raises(InvalidInputError, match=f"input is {kind}, not a plain file"):
                read(file)
    finally:
        signal.alarm(0)


class TestCheckFile:
    def refusal(self, file: Path, *, force: bool = False) -> str:
        with pytest.raises(UsageError) as caught:
            check_file(file, "--timings", force=force)
        return str(caught.value)

    def test_a_file_that_is_there_needs_force(self, tmp_path: Path) -> None:
        file = tmp_path / "plan.json"
        check_file(file, "-o", force=False)
        file.write_text("edited by hand")
        assert "is there already; choose another name, or pass --force" in self.refusal(file)
        check_file(file, "-o", force=True)

    def test_a_link_counts_as_a_file_and_is_replaced_itself(self, tmp_path: Path) -> None:
        (tmp_path / "link").symlink_to(tmp_path / "nowhere")
        assert "is there already" in self.refusal(tmp_path / "link")
        check_file(tmp_path / "link", "-o", force=True)
        write_atomically(tmp_path / "link", "new")
        assert not (tmp_path / "nowhere").exists()

    def test_a_device_or_a_pipe_is_never_replaced(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "pipe")
        for file in (Path("/dev/null"), tmp_path / "pipe"):
            assert "is no plain file and would be replaced" in self.refusal(file, force=True)

    def test_a_folder_or_a_name_that_cannot_be_is_refused(self, tmp_path: Path) -> None:
        assert "not a file in a folder that exists" in self.refusal(tmp_path, force=True)
        assert "not a file in a folder that exists" in self.refusal(tmp_path / "no" / "file")
        assert "File name too long" in self.refusal(tmp_path / ("x" * 300))


@pytest.mark.parametrize(("number", "words"), [(errno.ENOSPC, "is full"), (errno.EDQUOT, "for this user")])
def test_a_full_disk_is_named_with_what_is_free_and_needed_in_mib(tmp_path: Path, number: int, words: str) -> None:
    with pytest.raises(MoepressError) as caught, room_for(tmp_path / "a.txt", 5 << 20, resumable=True):
        raise OSError(number, os.strerror(number))
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'a.txt'} could not be written: the disk at /")
    assert words in message
    assert "MiB free, 5.0 MiB needed); make room there and repeat with --resume." in message
    assert caught.value.exit_code == 1


def test_another_error_of_the_system_passes(tmp_path: Path) -> None:
    with pytest.raises(PermissionError), room_for(tmp_path / "a.txt"):
        raise PermissionError(errno.EACCES, "no")


def test_a_run_on_a_disk_that_is_really_full_ends_in_that_sentence_and_can_be_resumed(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("mounting needs root")
    try:
        with pytest.raises(MoepressError, match=rf"big could not be written: the disk at {disk} is full \(0\.\d MiB"):
            grow(disk / "out", 1 << 20)
        assert not list((disk / "out.partial").glob("*.tmp"))
        with open_run(disk / "out", {}, resume=True) as run:
            assert set(run.pieces) == {"small"}
            run.finish()
        assert [p.name for p in (disk / "out").iterdir()] == ["small"]
    finally:
        subprocess.run(["umount", disk], check=True)


def grow(out: Path, size: int) -> None:
    with open_run(out, {}) as run:
        run.write("small", "small", lambda path: path.write_bytes(b"x") and None)
        run.write("big", "big", lambda path: path.write_bytes(bytes(size)) and None)


def test_a_limit_on_the_size_of_files_ends_in_a_sentence_too(tmp_path: Path) -> None:
    program = (
        "import resource, sys; from pathlib import Path; from moepress.runs.files import put\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))\n"
        "put(Path(sys.argv[1]), bytes(1 << 20))"
    )
    done = subprocess.run([sys.executable, "-c", program, tmp_path / "a"], capture_output=True, text=True, check=False)
    assert "takes no file so large" in done.stderr
    assert "1.0 MiB needed" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_only_what_was_listed_is_removed(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    (folder / "deep").mkdir(parents=True)
    for name in ("one", "two", "deep/three"):
        (folder / name).write_text(name)
    (folder / "link").symlink_to(tmp_path)
    listed = contents(folder)
    assert listed is not None
    (folder / "two").write_text("changed since")
    assert not remove_listed(folder, listed)
    assert [p.name for p in folder.iterdir()] == ["two"]
    (folder / "two").unlink()
    assert remove_listed(folder, {})
    assert tmp_path.exists()
