"""Answers of a model that a server runs: OpenAI's chat completions, as vLLM, SGLang, llama.cpp and others speak them.

The protocol is that of https://platform.openai.com/docs/api-reference/chat. Reasoning comes as `reasoning_content`
(DeepSeek, SGLang, llama.cpp) or `reasoning` (vLLM), or stands in the content.
"""

import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from moepress.calibration.reasoning import split_reasoning
from moepress.errors import MoepressError, UsageError

_SECONDS = 3600.0
_TRIES, _PAUSE_SECONDS = 4, 2.0
_AGAIN = {408, 429, 500, 502, 503, 504}
_MOST_BYTES = 64 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """Where a server listens.

    Attributes:
        url: base of the protocol's addresses, such as http://localhost:8000/v1.
        key: sent as a bearer token; None for none.
    """

    url: str
    key: str | None = None

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise UsageError(f"--endpoint {self.url!r} is no address; give one such as http://localhost:8000/v1.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a model said.

    Attributes:
        content: the answer; empty where it was cut off in its reasoning.
        reasoning: what it thought before; None where it did not say.
        stopped: `end`, `length` or `context`.
        tokens: how many it wrote; None where nobody counted.
        text: prompt and answer as the model saw them, special tokens among it; None where only a server knows.
    """

    content: str
    reasoning: str | None
    stopped: str
    tokens: int | None
    text: str | None = None


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A server that sends on to another one would get prompts and key there."""

    def redirect_request(self, *_arguments: Any, **_named: Any) -> None:
        """None refuses."""


def ask(endpoint: Endpoint, request: Mapping[str, Any], *, pause_seconds: float = _PAUSE_SECONDS) -> Answer:
    """One answer; what passes by itself is tried again a few times.

    Args:
        endpoint: the server.
        request: `model`, `messages` and sampling, as the protocol has them.
        pause_seconds: before the second try; doubled before each one after.

    Raises:
        MoepressError: the server can not be reached, refuses, or answers something else.
    """
    for attempt in range(_TRIES):
        if attempt:
            time.sleep(pause_seconds * 2 ** (attempt - 1))
        try:
            return _answer(endpoint, _post(endpoint, request))
        except urllib.error.HTTPError as error:
            if error.code not in _AGAIN or attempt == _TRIES - 1:
                raise MoepressError(_refusal(endpoint, error)) from error
        except (OSError, http.client.HTTPException) as error:
            if attempt == _TRIES - 1:
                reason = getattr(error, "reason", None) or error
                raise MoepressError(
                    f"{endpoint.url} can not be reached ({reason}); start the server, or check --endpoint."
                ) from error
    raise AssertionError("the last try returns or raises")


def _post(endpoint: Endpoint, request: Mapping[str, Any]) -> bytes:
    headers = {"Content-Type": "application/json", "User-Agent": "moepress"}
    if endpoint.key is not None:
        headers["Authorization"] = f"Bearer {endpoint.key}"
    url = f"{endpoint.url.rstrip('/')}/chat/completions"
    asked = urllib.request.Request(url, json.dumps(dict(request)).encode(), headers, method="POST")
    opener = urllib.request.build_opener(_NoRedirect)
    with opener.open(asked, timeout=_SECONDS) as response:
        found: bytes = response.read(_MOST_BYTES)
    return found


def _refusal(endpoint: Endpoint, error: urllib.error.HTTPError) -> str:
    said = " ".join(error.read(2000).decode("utf-8", "replace").split())[:300]
    hint = "give the base address, such as http://localhost:8000/v1" if error.code == 404 else "see what it says"
    return f"{endpoint.url} answers {error.code} {error.reason}; {hint}{f': {said}' if said else ''}."


def _answer(endpoint: Endpoint, body: bytes) -> Answer:
    try:
        found = json.loads(body)
        choice = found["choices"][0]
        message = choice["message"]
        content = message.get("content") or ""
        reasoning = message.get("reasoning_content") or message.get("reasoning")
        tokens = (found.get("usage") or {}).get("completion_tokens")
        if not isinstance(content, str) or not isinstance(reasoning, str | None):
            raise TypeError
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise MoepressError(
            f"{endpoint.url} does not answer as OpenAI's chat completions do; is it the right address?"
        ) from error
    if reasoning is None:
        reasoning, content = split_reasoning(content)
    stopped = "length" if choice.get("finish_reason") == "length" else "end"
    return Answer(
        content=content.strip("\n"),
        reasoning=reasoning,
        stopped=stopped,
        tokens=tokens if isinstance(tokens, int) else None,
    )
