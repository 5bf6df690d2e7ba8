"""A real S3 server on this machine: moto's, in a process of its own that ends with the tests.

moto looks for an object and writes it in two steps. What S3 promises of conditional writes is only true of it with one
request at a time, which `main` sees to; a body that ends too early is refused there, as S3 does. With `unconditional`
the server ignores `If-None-Match`, as old servers do.
"""

import io
import secrets
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

KEY, SECRET = "AKIATESTTESTTESTTEST", "this-secret-is-in-no-message"


@contextmanager
def running(*options: str) -> Iterator[str]:
    """Start a server on a free port; its address."""
    server = subprocess.Popen(
        [sys.executable, __file__, *options], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert server.stdin is not None
    assert server.stdout is not None
    try:
        port = server.stdout.readline().strip()
        assert port.isdigit(), "the S3 server did not start"
        yield f"http://127.0.0.1:{port}"
    finally:
        server.stdin.close()
        server.stdout.close()
        server.terminate()
        server.wait(timeout=30)


def new_bucket(address: str) -> str:
    """Make a bucket; its URL."""
    name = f"bucket-{secrets.token_hex(6)}"
    request = urllib.request.Request(f"{address}/{name}", method="PUT")
    urllib.request.urlopen(request, timeout=30).close()
    return f"s3://{name}"


def environment(address: str) -> dict[str, str]:
    """What obstore and every other client look for."""
    return {
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_ENDPOINT_URL": address,
        "AWS_REGION": "us-east-1",
    }


def tell_environment(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Say in this process's environment where the server is."""
    for name, value in environment(address).items():
        monkeypatch.setenv(name, value)


def main(*options: str) -> None:
    """Serve until stdin is closed, which it is when the tests are gone."""
    import logging

    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import WSGIRequestHandler, make_server

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    WSGIRequestHandler.protocol_version = "HTTP/1.1"  # connections stay, as those to S3 do
    moto = DomainDispatcherApplication(create_backend_app)
    alone = threading.Lock()

    def serve(environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        length = int(environ.get("CONTENT_LENGTH") or 0)
        body = environ["wsgi.input"].read(length)
        if len(body) < length:
            start("400 Bad Request", [("Content-Length", "0")])
            return []
        environ["wsgi.input"] = io.BytesIO(body)
        if "unconditional" in options:
            environ.pop("HTTP_IF_NONE_MATCH", None)
        with alone:
            return [b"".join(moto(environ, start))]

    server = make_server("127.0.0.1", 0, serve, threaded=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(server.port, flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main(*sys.argv[1:])
