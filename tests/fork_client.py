"""Children of a fork server; as a program, stands for `python`: it ends as its child does. See `fork_server`.

    python -S -E fork_client.py SOCKET ARGUMENTS

It is begun for every child, so it imports next to nothing.
"""

import contextlib
import json
import os
import select
import signal
import socket
import struct
import sys
from collections.abc import Mapping, Sequence


class Child:
    """A process that a server has forked; `returncode` as in subprocess."""

    def __init__(self, pid: int, connection: socket.socket) -> None:
        self.pid, self.returncode = pid, None
        self._connection = connection

    returncode: int | None

    def poll(self) -> int | None:
        """The exit code, or None while it runs."""
        if self.returncode is None and select.select([self._connection], [], [], 0)[0]:
            self._end()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """The exit code, waited for."""
        if self.returncode is None:
            if not select.select([self._connection], [], [], timeout)[0]:
                raise TimeoutError(f"process {self.pid} has not ended after {timeout} seconds")
            self._end()
        assert self.returncode is not None
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Nothing where it has ended."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def _end(self) -> None:
        status = self._connection.recv(4)
        self._connection.close()
        assert len(status) == 4, "the fork server has gone"
        self.returncode = os.waitstatus_to_exitcode(struct.unpack("!i", status)[0])


def ask(place: str, arguments: Sequence[str], files: Sequence[int], env: Mapping[str, str], niceness: int) -> Child:
    """A child that runs `python ARGUMENTS` in this process's folder, with these three as its first files."""
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(place)
    request = {"arguments": list(arguments), "cwd": os.path.realpath("."), "env": dict(env), "niceness": niceness}
    data = json.dumps(request).encode()
    socket.send_fds(connection, [struct.pack("!i", len(data))], list(files))
    connection.sendall(data)
    answer = connection.recv(4)
    assert len(answer) == 4, "the fork server has gone"
    return Child(struct.unpack("!i", answer)[0], connection)


def main() -> None:
    child = ask(sys.argv[1], sys.argv[2:], (0, 1, 2), os.environ, os.getpriority(os.PRIO_PROCESS, 0))
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _frame: child.send_signal(number))
    code = child.wait()
    if code < 0:
        if -code != signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


if __name__ == "__main__":
    main()
