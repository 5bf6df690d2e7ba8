"""The fork server: its children are processes as an interpreter would make them, and none outlives who asked."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import fork_server
import pytest

WAITS = "import sys, time; print('here', flush=True); time.sleep(600)"


SHOWN = "sys.argv, sys.path[0], os.getcwd(), os.environ['ASKED'], input(), os.nice(0)"


def asked(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    command = [*fork_server.python(), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)  # type: ignore[call-overload,no-any-return]


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return Path(f"/proc/{pid}/stat").is_file() and Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z"


def soon(found: Callable[[], bool]) -> bool:
    end = time.monotonic() + 30
    while not found() and time.monotonic() < end:
        time.sleep(0.01)
    return found()


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("pass", 0),
        ("raise SystemExit(3)", 3),
        ("raise SystemExit(-1)", 255),
        ("import sys; sys.exit('said')", 1),
        ("1 / 0", 1),
        ("import os; os._exit(7)", 7),
        ("raise KeyboardInterrupt", -signal.SIGINT),
        ("import os; os.kill(os.getpid(), 9)", -signal.SIGKILL),
        ("import atexit; atexit.register(print, 'at exit')", 0),
        ("import threading; threading.Timer(0.05, print, ['thread']).start()", 0),
    ],
)
def test_a_child_ends_as_an_interpreter_does(code: str, expected: int) -> None:
    ours, theirs = asked("-c", code), subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True)
    assert ours.returncode == theirs.returncode == expected
    assert ours.stdout == theirs.stdout
    assert ours.stderr.splitlines()[-1:] == theirs.stderr.splitlines()[-1:]


def test_arguments_folder_environment_niceness_and_standard_streams_are_those_of_who_asks(tmp_path: Path) -> None:
    file = tmp_path / "shown.py"
    file.write_text(f"import os, sys; print({SHOWN})")
    expected = f"['{file}', 'a', 'é'] {tmp_path} {tmp_path} 1 typed {os.nice(0)}\n"
    for python in ([sys.executable], fork_server.python()):
        command = [*python, str(file), "a", "é"]
        environment = os.environ | {"ASKED": "1"}
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, input="typed\n", capture_output=True, text=True, check=True
        )
        assert (done.stdout, done.stderr) == (expected, "")
    assert asked("-m", "json.tool", "--help").stdout.startswith("usage: ")


def test_what_libraries_read_as_they_are_imported_is_refused() -> None:
    done = asked("-c", "pass", env=os.environ | {"HF_HOME": "/elsewhere"})
    assert (done.returncode, done.stderr) == (
        1,
        "HF_HOME are read as libraries are imported: this needs a new interpreter\n",
    )


def test_everything_is_imported_and_no_thread_was_lost() -> None:
    heavy = {"torch", "transformers.modeling_utils", "moepress.stages"}
    code = f"import os, sys; print({heavy} - set(sys.modules), os.getppid())"
    missing, server = asked("-c", code).stdout.rsplit(maxsplit=1)
    assert missing == "set()"
    tasks = Path("/proc") / server / "task"
    assert not tasks.is_dir() or len(list(tasks.iterdir())) == 1


def test_a_broken_pipe_shows_in_the_exit_code() -> None:
    readable, writable = os.pipe()
    os.close(readable)
    command = [*fork_server.python(), "-c", "print(1)"]
    done = subprocess.run(command, stdout=writable, stderr=subprocess.PIPE, check=False)
    os.close(writable)
    assert done.returncode == 120
    assert b"BrokenPipeError" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_child_can_be_killed_and_its_files_are_closed_then(number: signal.Signals) -> None:
    readable, writable = os.pipe()
    child = fork_server.start(["-c", WAITS], stdout=writable)
    os.close(writable)
    with os.fdopen(readable) as shown:
        assert shown.readline() == "here\n"
        assert child.poll() is None
        child.send_signal(number)
        assert child.wait(30) == -number
        assert shown.read() == ""
    child.send_signal(number)
    assert child.poll() == -number


def test_signals_to_the_one_between_are_passed_on_and_its_death_is_the_child_s() -> None:
    code = "import os, sys, time; print(os.getpid(), flush=True); time.sleep(600)"
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        with subprocess.Popen(
            [*fork_server.python(), "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        ) as process:
            assert process.stdout is not None
            pid = int(process.stdout.readline())
            process.send_signal(number)
            assert process.wait(30) == -number
        assert soon(lambda pid=pid: gone(pid))  # type: ignore[misc]


def test_server_and_children_end_with_a_process_that_is_killed() -> None:
    code = f"""if True:
        import sys, time
        sys.path.insert(0, {str(Path(fork_server.__file__).parent)!r})
        import fork_server
        fork_server.WARM = ()
        child = fork_server.start(["-c", {WAITS!r}])
        print(child.pid, fork_server.server_pid(), flush=True)
        time.sleep(600)"""
    with subprocess.Popen([sys.executable, "-S", "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        pids = [int(pid) for pid in process.stdout.readline().split()]
        process.kill()
    assert len(pids) == 2
    assert all(soon(lambda pid=pid: gone(pid)) for pid in pids)  # type: ignore[misc]
