"""A Ray cluster of this machine, started by Ray's own command, whose processes can be told apart from all others."""

import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """A head with one node.

    Attributes:
        address: of the head.
        head: the process that began all others.
        token: made for this cluster, which answers nobody without it.
    """

    address: str
    head: psutil.Process
    token: str

    @property
    def environment(self) -> dict[str, str]:
        """Where it is, for who wants to join."""
        return {"RAY_ADDRESS": self.address, **authorized(self.token)}

    def actors(self) -> list[psutil.Process]:
        """Processes in which a worker of ours works."""
        return [each for each in self._all() if any("_Actor" in word for word in _words(each))]

    def daemons(self) -> list[psutil.Process]:
        """The cluster's own: where its state is, and what starts workers."""
        return [each for each in self._all() if Path(next(iter(_words(each)), "")).name in ("gcs_server", "raylet")]

    def _all(self) -> list[psutil.Process]:
        try:
            return self.head.children(recursive=True)
        except psutil.NoSuchProcess:
            return []


def authorized(token: str) -> dict[str, str]:
    """What Ray looks for."""
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}


def _words(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


@contextmanager
def running(cpus: int = 2) -> Iterator[Cluster]:
    """Start one, and end all that it started."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as place:  # names of sockets are short
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", f"--port={port}"]
        command += ["--node-ip-address=127.0.0.1", "--include-dashboard=false", "--disable-usage-stats"]
        command += [f"--num-cpus={cpus}", f"--temp-dir={place}", "--object-store-memory=100000000"]
        token = secrets.token_hex(32)
        with (Path(place) / "start.log").open("wb") as log:
            environment = os.environ | authorized(token)
            started = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment)
        head = psutil.Process(started.pid)
        everybody: set[psutil.Process] = set()
        try:
            _wait_for(port, started)
            yield Cluster(address=f"127.0.0.1:{port}", head=head, token=token)
        finally:
            with suppress(psutil.NoSuchProcess):
                everybody |= set(head.children(recursive=True))
            started.terminate()
            with suppress(subprocess.TimeoutExpired):
                started.wait(20)
            for each in [*everybody]:
                with suppress(psutil.NoSuchProcess):
                    each.kill()
            started.kill()
            started.wait(20)


def _wait_for(port: int, started: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + 120
    while time.monotonic() < end:
        assert started.poll() is None, "Ray did not start"
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.2)
    raise AssertionError("Ray did not start")
