"""A proxy between a client and an S3 server that makes trouble: what networks, load balancers and old servers do.

Each request meets one kind of trouble or none, drawn by a seed. A client cannot tell `500 before` from `500 after`, nor
`cut before` from `cut after`: the request took effect only in the second of each.
"""

import http.client
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

ALL = {
    "delay": 0.05,
    "500 before": 0.04,
    "500 after": 0.04,
    "503 before": 0.04,
    "cut before": 0.04,
    "cut after": 0.04,
    "cut in the request": 0.04,
    "cut in the answer": 0.04,
    "old listing": 0.5,
}
"""How likely each trouble is; that of listings is for listings alone."""


class Proxy:
    """What goes wrong, and what went.

    Attributes:
        url: the proxy's address.
        trouble: kind -> probability; may be changed at any time.
        met: how often each kind was met.
        passed_bytes: of bodies that the server sent.
        gone: every connection is closed without an answer.
    """

    def __init__(self, server: str, url: str, trouble: Mapping[str, float], seed: int):
        self.server, self.url, self.gone = urlsplit(server), url, False
        self.trouble = dict(trouble)
        self.met: Counter[str] = Counter()
        self.passed_bytes = 0
        self._random, self._lock = random.Random(seed), threading.Lock()
        self._listings: dict[str, tuple[int, list[tuple[str, str]], bytes]] = {}

    def draw(self, listing: bool) -> str:
        """The trouble of one request."""
        with self._lock:
            left = self._random.random()
            for kind, likely in self.trouble.items():
                if (kind == "old listing") and not listing:
                    continue
                left -= likely
                if left < 0:
                    self.met[kind] += 1
                    return kind
        return "none"

    def count(self, size: int) -> None:
        """Add to `passed_bytes`."""
        with self._lock:
            self.passed_bytes += size

    def listing(self, path: str, answer: tuple[int, list[tuple[str, str]], bytes], old: bool) -> Any:
        """A listing, or the first one that was ever given for the same question."""
        with self._lock:
            first = self._listings.setdefault(path, answer)
        return first if old else answer


@contextmanager
def between(server: str, trouble: Mapping[str, float], seed: int = 0) -> Iterator[Proxy]:
    """Run a proxy in threads of this process."""
    listener = _Server(("127.0.0.1", 0), _Handler)
    listener.proxy = Proxy(server, f"http://127.0.0.1:{listener.server_port}", trouble, seed)
    thread = threading.Thread(target=listener.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield listener.proxy
    finally:
        listener.proxy.gone = True
        listener.shutdown()
        thread.join()
        listener.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128
    proxy: Proxy

    def handle_error(self, *_: Any) -> None:
        """A connection that breaks is what this is for."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, *_: Any) -> None:
        """Nothing is printed."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("do_"):
            return self._pass_on
        raise AttributeError(name)

    def _pass_on(self) -> None:
        proxy = self.server.proxy
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        listing = self.command == "GET" and "list-type=" in self.path
        kind = proxy.draw(listing)
        if proxy.gone or kind == "cut before":
            self._cut()
        elif kind == "cut in the request":
            self._half(body)
            self._cut()
        elif kind.endswith("before"):
            self._answer(int(kind[:3]), [], b"<Error><Code>Trouble</Code></Error>")
        else:
            if kind == "delay":
                time.sleep(0.3)
            answer = self._ask(body)
            if listing:
                answer = proxy.listing(self.path, answer, kind == "old listing")
            if kind == "cut after":
                self._cut()
            elif kind == "500 after":
                self._answer(500, [], b"<Error><Code>InternalError</Code></Error>")
            else:
                self._answer(*answer, cut=kind == "cut in the answer")

    def _upstream(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection(str(self.server.proxy.server.hostname), self.server.proxy.server.port)

    def _begin(self, connection: http.client.HTTPConnection) -> None:
        connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self.headers.items():
            connection.putheader(name, value)
        connection.endheaders()

    def _ask(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        connection = self._upstream()
        self._begin(connection)
        connection.send(body)
        response = connection.getresponse()
        answer = response.status, response.getheaders(), response.read()
        connection.close()
        self.server.proxy.count(len(answer[2]))
        return answer

    def _half(self, body: bytes) -> None:
        """The request reaches the server without its end."""
        connection = self._upstream()
        self._begin(connection)
        if body:
            connection.send(body[: len(body) // 2])
        connection.close()

    def _answer(self, status: int, headers: list[tuple[str, str]], body: bytes, *, cut: bool = False) -> None:
        self.send_response_only(status)
        kept = [(n, v) for n, v in headers if n.lower() not in ("connection", "transfer-encoding", "content-length")]
        length = next((v for n, v in headers if n.lower() == "content-length"), str(len(body)))
        for name, value in [*kept, ("Content-Length", length if self.command == "HEAD" else str(len(body)))]:
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if cut else body)
        if cut:
            self._cut()

    def _cut(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)
