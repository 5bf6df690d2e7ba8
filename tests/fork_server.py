"""Processes that cost a fork: what a new interpreter spends seconds on, importing torch and moepress, is done once.

`python()` is the beginning of a command line that stands for `python`: `subprocess.run([*python(), "-m", "moepress",
"targets"])`, or a line of a shell. Behind it, a server with everything imported forks a child that takes over the
caller's arguments, folder, environment, stdin, stdout and stderr, and niceness; the child's exit status is passed on.
`start` gives a child without the process between, to be killed or interrupted: it is a true process with a pid.

There is a server for each process of pytest, begun by the first who asks. It ends, and kills its children, when the
process that began it is gone, however that ended: then nobody holds the other end of its stdin.

Not for tests of the start itself: what is imported, how long that takes, what libraries read from the environment as
they are imported (FRESH, which is refused). Those start `sys.executable`.
"""

import atexit
import contextlib
import gc
import importlib
import json
import os
import pkgutil
import runpy
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

from fork_client import Child, ask

FRESH = ("HF_ENDPOINT", "HF_HOME", "HF_HUB_DISABLE_XET", "OMP_NUM_THREADS", "PYTHONPATH", "PYTHONWARNINGS")
LOADED = (
    *("accelerate", "matplotlib.figure", "matplotlib.backends.backend_svg", "rich.progress"),
    *("rich.table", "tokenizers.trainers", "torch.fx.experimental.symbolic_shapes", "transformers.modeling_utils"),
    *("transformers.convert_slow_tokenizer", "transformers.models.qwen3_moe.modeling_qwen3_moe"),
    *("transformers.models.deepseek_v3.modeling_deepseek_v3", "transformers.tokenization_utils_tokenizers"),
)
"""What commands import within functions, and takes long."""
WARM = ("loaded",)
"""Empty for a server that imports nothing."""


def server_pid() -> int:
    """Of this process's server."""
    return _server()[1]


@cache
def _server() -> tuple[str, int]:
    """Where this process's server listens, and its pid; it is begun by the first call."""
    folder = tempfile.TemporaryDirectory(prefix="fork-")  # short: the name of a socket has a hundred letters at most
    place = Path(folder.name) / "socket"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    server = subprocess.Popen(
        [sys.executable, __file__, place, *WARM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
    )
    assert server.stdin is not None
    assert server.stdout is not None

    def end() -> None:
        server.stdin.close()  # type: ignore[union-attr]
        server.wait(timeout=30)
        folder.cleanup()

    atexit.register(end)
    assert server.stdout.read(1) == b"!", "the fork server did not start"
    server.stdout.close()
    return str(place), server.pid


def python() -> tuple[str, ...]:
    """What to write in place of `sys.executable`, followed by `-m MODULE`, `-c CODE` or a file, and arguments."""
    return (sys.executable, "-S", "-E", str(Path(__file__).with_name("fork_client.py")), _server()[0])


def start(
    arguments: Sequence[str],
    *,
    stdin: int | None = None,
    stdout: int | None = None,
    stderr: int | None = None,
    env: Mapping[str, str] | None = None,
    niceness: int = 0,
) -> Child:
    """Fork a child that runs `python ARGUMENTS`; stdin, stdout and stderr are file descriptors, or /dev/null."""
    with Path(os.devnull).open("r+b", buffering=0) as nothing:
        files = [nothing.fileno() if file is None else file for file in (stdin, stdout, stderr)]
        return ask(_server()[0], arguments, files, os.environ if env is None else env, niceness)


def _receive(connection: socket.socket) -> tuple[dict[str, Any], list[int]]:
    connection.settimeout(30)
    head, files, _, _ = socket.recv_fds(connection, 4, 3)
    (size,) = struct.unpack("!i", head)
    data = b""
    while len(data) < size:
        piece = connection.recv(size - len(data))
        assert piece, "whoever asked has gone"
        data += piece
    request: dict[str, Any] = json.loads(data)
    return request, files


def serve(place: str) -> dict[str, Any]:
    """Fork for all who ask until stdin is closed. Returns in the children, each with its request."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(place)
    listener.listen()
    woken, wakes = os.pipe()  # to be woken by the end of a child
    os.set_blocking(wakes, False)
    signal.set_wakeup_fd(wakes)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # of a terminal: the server ends with pytest
    children: dict[int, socket.socket] = {}
    os.write(1, b"!")
    while True:
        ready, _, _ = select.select([0, listener, woken, *children.values()], [], [])
        for pid, connection in children.items():
            if 0 in ready or connection in ready:  # whoever asked for it has gone
                os.kill(pid, signal.SIGKILL)
        if 0 in ready:
            os._exit(0)
        if woken in ready:
            os.read(woken, 4096)
            _bury(children)
        if listener in ready:
            connection, _ = listener.accept()
            request, files = _receive(connection)
            pid = os.fork()
            if pid == 0:
                _take_over(files, [listener, connection, *children.values()], [woken, wakes])
                return request
            for file in files:
                os.close(file)
            children[pid] = connection
            with contextlib.suppress(BrokenPipeError):
                connection.sendall(struct.pack("!i", pid))


def _take_over(files: Sequence[int], sockets: Sequence[socket.socket], pipe: Sequence[int]) -> None:
    """In a child: its own files and signals in place of the server's."""
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGCHLD, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number, file in enumerate(files):
        os.dup2(file, number)
    for connection in sockets:
        connection.close()
    for file in (*files, *pipe):
        os.close(file)


def _bury(children: dict[int, socket.socket]) -> None:
    """Tell who asked for them how children have ended."""
    for pid in list(children):
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            with contextlib.suppress(BrokenPipeError), children.pop(pid) as connection:
                connection.sendall(struct.pack("!i", status))


def load() -> None:
    """Import what commands import. Nothing is computed: threads would not be there in the children."""
    import moepress

    found = list(LOADED)
    for room in Path(moepress.__path__[0]).glob("*/__init__.py"):
        name = f"moepress.{room.parent.name}"
        found += [name, *(module.name for module in pkgutil.walk_packages([str(room.parent)], f"{name}."))]
    for name in found:
        with contextlib.suppress(ModuleNotFoundError):  # what is in no wheel that we test with, such as Triton
            importlib.import_module(name)
    gc.unfreeze = lambda: None  # as in conftest.py
    gc.collect()
    gc.freeze()


def become(request: Mapping[str, Any]) -> None:
    """Be the interpreter that was asked for, up to the first line of its program."""
    asked = request["env"]
    changed = [name for name in FRESH if name in asked and asked[name] != os.environ.get(name)]
    if changed:
        sys.exit(f"{', '.join(changed)} are read as libraries are imported: this needs a new interpreter")
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(asked)
    os.nice(request["niceness"] - os.getpriority(os.PRIO_PROCESS, 0))
    buffering = 1 if os.isatty(1) else -1
    sys.stdin = sys.__stdin__ = os.fdopen(0, encoding="utf-8", closefd=False)
    sys.stdout = sys.__stdout__ = os.fdopen(1, "w", buffering, encoding="utf-8", closefd=False)
    sys.stderr = sys.__stderr__ = os.fdopen(2, "w", 1, encoding="utf-8", errors="backslashreplace", closefd=False)


def run(arguments: list[str]) -> None:
    """What the interpreter does with its arguments."""
    match arguments:
        case ["-m", module, *rest]:
            sys.argv, sys.path[0] = [module, *rest], str(Path.cwd())
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        case ["-c", code, *rest]:
            sys.argv, sys.path[0] = ["-c", *rest], ""
            exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
        case [file, *rest]:
            sys.argv, sys.path[0] = [file, *rest], str(Path(file).parent)
            runpy.run_path(file, run_name="__main__")


def end(error: BaseException | None) -> NoReturn:
    """As the interpreter ends, but for taking all modules apart, which takes as long as a short command."""
    code = 0
    if isinstance(error, SystemExit):
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
        if error.code is not None and not isinstance(error.code, int):
            print(error.code, file=sys.stderr)
    elif error is not None:
        traceback.print_exception(error)
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
    except OSError as broken:
        print(f"Exception ignored while stdout is flushed: {broken!r}", file=sys.stderr)
        code = 120
    if isinstance(error, KeyboardInterrupt):
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    os._exit(code & 0xFF)


def main() -> None:
    if sys.argv[2:]:
        load()
    request = serve(sys.argv[1])  # from here on, a child
    try:
        become(request)
        run(request["arguments"])
    except BaseException as error:
        end(error)
    end(None)


if __name__ == "__main__":
    main()
