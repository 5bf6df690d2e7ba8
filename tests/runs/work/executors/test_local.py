"""Processes of workers: started again where they die, ended once all is done."""

import os
import sys
import time
from pathlib import Path

import pytest
from small_runs import planned, work, worker

from moepress.errors import MoepressError
from moepress.runs.store.store import Store
from moepress.runs.work.executors.local import LocalWorkers, worker_commands
from moepress.runs.work.shared import open_shared

HANGS = "import time; time.sleep(600)"
DIES = "import os; os.kill(os.getpid(), 9)"
ENDS = "import sys; sys.exit('Error: the model is broken.')"
INTERRUPTED = "import sys; sys.exit(130)"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return planned(tmp_path / "store", tmp_path)


def workers(store: Store, tmp_path: Path, *codes: str) -> LocalWorkers:
    commands = [[sys.executable, "-S", "-E", "-c", code, str(tmp_path)] for code in codes]
    return LocalWorkers(shared=open_shared(store), commands=commands, logs=tmp_path / "logs")


def test_one_that_hangs_is_ended_once_all_is_done(store: Store, tmp_path: Path) -> None:
    told: list[int] = []
    with worker(store, tmp_path) as one:
        work(one)
    began = time.monotonic()
    workers(store, tmp_path, HANGS, HANGS).work(told.append)
    assert time.monotonic() - began < 5
    assert told == [len(one.did)]


@pytest.mark.parametrize("code", [DIES, INTERRUPTED])
def test_one_that_dies_again_and_again_ends_the_work(
    store: Store, tmp_path: Path, code: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(MoepressError, match="killed 4 times before any task was done"):
        workers(store, tmp_path, HANGS, code).work()
    assert capsys.readouterr().err.count("is started again") == 3


def test_the_error_of_one_ends_the_work_and_the_others(store: Store, tmp_path: Path) -> None:
    noted = "import os, sys, time; open(sys.argv[1] + '/pid', 'w').write(str(os.getpid())); time.sleep(600)"
    late = f"import os, sys, time\nwhile not os.path.exists(sys.argv[1] + '/pid'): time.sleep(0.01)\n{ENDS}"
    with pytest.raises(MoepressError, match=r"ended with code 1: Error: the model is broken\."):
        workers(store, tmp_path, noted, late).work()
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_one_that_misses_the_first_signal_is_asked_again(store: Store, tmp_path: Path) -> None:
    """And ends in order: what it has to give back is given back."""
    deaf = (
        "import signal, sys, time\nheard = []\n"
        "def hear(*_):\n    heard.append(1)\n"
        "    if len(heard) == 2:\n        open(sys.argv[1] + '/ended', 'w').close(); sys.exit(130)\n"
        "signal.signal(signal.SIGTERM, hear)\nopen(sys.argv[1] + '/ready', 'w').close()\n"
        "while True:\n    time.sleep(0.05)"
    )
    late = f"import os, sys, time\nwhile not os.path.exists(sys.argv[1] + '/ready'): time.sleep(0.01)\n{ENDS}"
    with pytest.raises(MoepressError, match="the model is broken"):
        workers(store, tmp_path, deaf, late).work()
    assert (tmp_path / "ended").exists()


def test_commands_of_workers_name_their_parent_and_their_share() -> None:
    first, second = worker_commands("s3://bucket/run", 2, ["--threads", "1"])
    assert first[first.index("--shard") + 1] == "0/2"
    assert second[second.index("--shard") + 1] == "1/2"
    assert first[first.index("--parent") + 1] == str(os.getpid())
