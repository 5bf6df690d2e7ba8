"""What stores ask of obstore: its timeouts and tries, and its errors in few words without addresses."""

import os
import re
from datetime import timedelta
from typing import Any

from moepress.errors import StoreError

_VARIABLES = {"s3": "AWS", "gs": "GOOGLE", "az": "AZURE"}
_USERS: list[int] = []  # the process that uses the library, once there is one
_METADATA = "169.254.169.254"


def require_unforked(url: str) -> None:
    """Refuse what would wait forever: the library's threads are not there in a forked process.

    Raises:
        StoreError: this process was forked from one that has used a bucket.
    """
    if not _USERS:
        _USERS.append(os.getpid())
    if os.getpid() not in _USERS:
        raise StoreError(f"{url} can not be used in a forked process; start processes anew (spawn).")


def settings(url: str, request_seconds: float, patience_seconds: float) -> dict[str, Any]:
    """Timeouts and tries of the library.

    Where it is told of timeouts, it does not look into the environment for other things of connections, so this does.
    """
    request = timedelta(seconds=min(request_seconds, patience_seconds))
    client: dict[str, Any] = {"timeout": request, "connect_timeout": min(timedelta(seconds=5), request)}
    kind = _VARIABLES[url.partition("://")[0]]
    for option in ("proxy_url", "proxy_ca_certificate", "proxy_excludes"):
        if value := os.environ.get(f"{kind}_{option.upper()}"):
            client[option] = value
    endpoints = (f"{kind}_ENDPOINT", f"{kind}_ENDPOINT_URL", f"{kind}_ENDPOINT_URL_S3")
    plain = os.environ.get(f"{kind}_ALLOW_HTTP", "").lower() in ("1", "true", "yes", "on")
    if plain or any(os.environ.get(name, "").startswith("http://") for name in endpoints):
        client["allow_http"] = True
    return {
        "client_options": client,
        "retry_config": {
            "max_retries": 8,
            "retry_timeout": timedelta(seconds=patience_seconds),
            "backoff": {
                "init_backoff": timedelta(seconds=0.1),
                "max_backoff": timedelta(seconds=min(5.0, patience_seconds / 4)),
                "base": 2,
            },
        },
    }


def pause_seconds(again: int) -> float:
    """How long to wait before another try of ours."""
    return 0.1 * 2.0**again


def status_of(error: BaseException | None) -> int | None:
    """The HTTP status that an error of the library tells of."""
    found = re.search(r"status code: (\d{3})", str(error))
    return int(found[1]) if found else None


def why(error: Exception) -> str:
    """An error of the library in few words, without addresses."""
    text = str(error).partition("\n\nDebug source")[0]
    if _METADATA in text:  # where machines of a cloud learn their role: the last place that is asked
        return "no credentials are found in the environment, and none are given by the machine"
    status = re.search(r"status code: (\d{3}[A-Za-z -]*)", text)
    if status:
        code = re.search(r"<Code>([A-Za-z]{1,60})</Code>", text)
        return f"the server answers {status[1].strip()}" + (f" ({code[1]})" if code else "")
    for sign, words in (
        ("kind: Timeout", "the server does not answer in time"),
        ("onnection refused", "nothing answers at its address"),
        ("dns error", "its address is not known"),
        ("error sending request", "the connection fails or is cut"),
        ("error decoding response body", "the connection is cut"),
    ):
        if sign in str(error):
            return words
    return re.sub(r"\w+://\S+", "its address", text.splitlines()[0])[:200] if text.strip() else type(error).__name__
