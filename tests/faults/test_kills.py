"""Twenty random kills of every long command, and twenty power cuts: resumed after each, all end with the same bytes."""

import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import fork_server
import pytest
from fork_client import Child
from killed_runs import Work, finish, lines, prepared, result, with_more

from moepress.runs.files import JOURNAL
from moepress.runs.output import partial_folder

pytestmark = pytest.mark.slow
COMMANDS = ("profile", "prune", "repair", "down", "quantize", "export", "onnx", "run")
TIMES = 20
STAGES = ("profile", "model", "exports")
# What has reached the disk, noted as it does, in a file of the test's: inode and size of every file and folder that was
# flushed; and -1 for a folder that got an entry by a rename, which is to be flushed again.
RECORDER = """
import os, sys
log = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
flush = os.fsync
def fsync(handle):
    number = handle if isinstance(handle, int) else handle.fileno()
    facts = os.fstat(number)
    flush(number)
    os.write(log, f"{facts.st_ino} {facts.st_size}\\n".encode())
os.fsync = fsync
def noted(call):
    def instead(source, target, **keywords):
        call(source, target, **keywords)
        os.write(log, f"{os.stat(os.path.dirname(os.path.abspath(target))).st_ino} -1\\n".encode())
    return instead
os.rename, os.replace = noted(os.rename), noted(os.replace)
sys.argv[:2] = ["moepress"]
from moepress.cli import main
main()
"""


@pytest.fixture(scope="module")
def work(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Work:
    return with_more(prepared(tmp_path_factory.mktemp("kills"), tiny_model))


def recorded(arguments: list[str], log: Path) -> Child:
    with log.with_suffix(".errors").open("w") as errors:
        return fork_server.start(["-c", RECORDER, str(log), *arguments], stderr=errors.fileno(), niceness=10)


def synced(log: Path) -> dict[int, int]:
    """Inode -> its size when it was flushed last; without folders that were written to since."""
    rows = [line.split() for line in log.read_text().splitlines()]
    return {inode: size for inode, size in {int(inode): int(size) for inode, size in rows}.items() if size >= 0}


def cut_power(place: Path, log: Path) -> int:
    """Leave of every file what was flushed of it, which is nothing of most; how many have lost something."""
    kept, lost = synced(log), 0
    for file in place.rglob("*"):
        if file.is_file() and not file.is_symlink():
            facts = file.stat()
            size = min(kept.get(facts.st_ino, 0), facts.st_size)
            if size < facts.st_size:
                os.truncate(file, size)
                lost += 1
    return lost


def wait_for(process: Child, out: Path, draw: random.Random, *, is_run: bool) -> None:
    """Until a random moment after one of the next pieces; of `run`, whose journals come and go, in the next seconds."""
    if is_run:
        end = time.monotonic() + draw.uniform(0, 3)
        while process.poll() is None and time.monotonic() < end:
            time.sleep(0.005)
        return
    at_line = lines(out) + draw.randint(0 if lines(out) else 1, 2)
    while process.poll() is None and lines(out) < at_line:
        time.sleep(0.0005)
    time.sleep(draw.uniform(0, 0.03))  # about as long as a piece of these takes


def weights(files: dict[str, bytes]) -> dict[str, bytes]:
    return {name: data for name, data in files.items() if name.endswith(".safetensors")}


def test_the_repair_of_down_projections_that_is_killed_changes_weights(work: Work) -> None:
    """Else its kills would show no more than those of `prune`."""
    assert weights(work.whole["down"]) != weights(work.whole["prune"])


@pytest.mark.parametrize("how", ["kill", "power cut"])
@pytest.mark.parametrize("name", COMMANDS)
def test_twenty_random_kills_and_power_cuts_change_nothing(work: Work, tmp_path: Path, name: str, how: str) -> None:
    """Runs that are ended again and again, a random moment after some piece, until each gets through."""
    place, log = tmp_path / "place", tmp_path / "log"
    place.mkdir()
    draw, out, arguments = random.Random(f"{how}:{name}"), place / "out", work.arguments[name]
    begun: set[str] = set()
    killed = lost = through = 0
    while killed < TIMES:
        log.unlink(missing_ok=True)  # inodes are given out again
        before = {file.stat().st_ino: file.stat().st_size for file in place.rglob("*")}
        log.write_text("".join(f"{inode} {size}\n" for inode, size in before.items()))  # the disk as it was found
        process = recorded([*arguments, "-o", str(out), "--resume"], log)
        wait_for(process, out, draw, is_run=name == "run")
        begun |= {stage for stage in STAGES if list(out.glob(f"{stage}*"))}
        process.send_signal(signal.SIGKILL)
        code = process.wait()
        assert code in (0, -signal.SIGKILL), log.with_suffix(".errors").read_text()
        killed += code == -signal.SIGKILL
        if how == "power cut":
            lost += cut_power(place, log)
        if code == 0 or (out.exists() and not (out / JOURNAL).exists()):  # it got through; the next one starts anew
            assert result(out) == work.whole[name]
            assert not partial_folder(out).exists()
            shutil.rmtree(out)
            through += 1
    finish([*arguments, "-o", str(out), "--resume"])
    assert result(out) == work.whole[name]
    assert [p.name for p in place.iterdir()] == ["out"]
    if how == "power cut":
        assert lost or through  # the cut was felt
    assert name != "run" or begun == set(STAGES)
    print(f"{name}, {how}: {killed} ended, {through} got through, {lost} files lost bytes")


@pytest.mark.parametrize("name", COMMANDS)
def test_a_power_cut_after_the_end_leaves_every_file_whole(work: Work, tmp_path: Path, name: str) -> None:
    """Every file of a finished output was flushed after its last write, and every folder after its last entry."""
    place, log = tmp_path / "new" / "place", tmp_path / "log"
    process = recorded([*work.arguments[name], "-o", str(place / "out")], log)
    assert process.wait(timeout=300) == 0
    kept = synced(log)
    folders = [tmp_path, tmp_path / "new", place, *(p for p in (place / "out").rglob("*") if p.is_dir()), place / "out"]
    assert {folder for folder in folders if folder.stat().st_ino not in kept} == set()
    assert cut_power(place, log) == 0
    assert result(place / "out") == work.whole[name]
