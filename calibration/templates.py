"""A tokenizer's chat template, run in a process that can be stopped.

A template is a program from whoever made the model: it may loop, build strings without end, or raise anything. It runs
in one child for all conversations of a run, started at the first of them; the child is stopped when one takes too long,
and the system stops it when it takes too much memory (where there is such a limit: not on Windows, and macOS does not
keep it). See `calibration.template_child`.
"""

import json
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from moepress.calibration import template_child
from moepress.calibration.records import Conversation

_START_SECONDS = 120.0
_PIPE_LINE_BYTES = 1 << 31


@dataclass(frozen=True, slots=True, kw_only=True)
class RenderLimits:
    """What one conversation may take.

    Attributes:
        cpu_seconds: of computing; kept by the system, where it can.
        seconds: of waiting for it.
        memory_bytes: of the whole child.
        average_seconds: of waiting for one, over all, beyond `seconds`.
        chars: of text, beside `growth` times what the conversation itself has.
        growth: see there.
    """

    cpu_seconds: float = 10
    seconds: float = 60
    average_seconds: float = 0.5
    memory_bytes: int = 2 << 30
    chars: int = 4 << 20
    growth: int = 16


DEFAULT_LIMITS = RenderLimits()


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    """Why there is no text of a conversation: words that stand in a sentence."""

    reason: str


class _GoneError(Exception):
    """The child has ended or was stopped."""


class ChatTemplate:
    """The chat template of a tokenizer; close it, or use it in a `with` statement.

    Args:
        tokenizer: of transformers; one without a template is fine, see `there`.
        limits: of each conversation.
    """

    def __init__(self, tokenizer: Any, limits: RenderLimits | None = None) -> None:
        self._tokenizer, self._limits = tokenizer, limits or DEFAULT_LIMITS
        self._child: subprocess.Popen[bytes] | None = None
        self._answers: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self._left_seconds = self._limits.seconds

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def there(self) -> bool:
        """Whether the tokenizer has a chat template."""
        return bool(getattr(self._tokenizer, "chat_template", None))

    def render(self, chats: Sequence[Conversation], *, add_generation_prompt: bool = False) -> list[str | Refused]:
        """The texts of conversations, in one batch; one that is refused leaves the others, unless it ends the child."""
        found: list[str | Refused] = []
        while len(found) < len(chats):
            with_tools = chats[len(found)].tools is not None
            part = []
            for chat in chats[len(found) :]:  # a tokenizer may have a template of its own for tools
                if (chat.tools is not None) != with_tools:
                    break
                part.append(chat)
            found += self._render(part, add_generation_prompt)
        return found

    def close(self) -> None:
        """End the child."""
        child, self._child = self._child, None
        if child is None:
            return
        assert child.stdin is not None
        with suppress(OSError):
            child.stdin.close()  # it then ends, if it still listens
        try:
            child.wait(1)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()

    def _render(self, chats: Sequence[Conversation], add_generation_prompt: bool) -> list[str | Refused]:
        try:
            template = self._tokenizer.get_chat_template(tools=chats[0].tools)
        except (AttributeError, TypeError, ValueError) as error:
            return [Refused(reason=" ".join(str(error).split())[:300].rstrip("."))] * len(chats)
        named = getattr(self._tokenizer, "special_tokens_map", {})
        plain = [{"messages": chat.messages, "tools": chat.tools} for chat in chats]
        lengths = [len(json.dumps(chat, default=str)) for chat in plain]
        request = {
            "template": str(template),
            "variables": _plain_variables(named),
            "add_generation_prompt": add_generation_prompt,
            "chats": plain,
            "most_chars": [self._limits.chars + self._limits.growth * length for length in lengths],
        }
        found: list[str | Refused] = []
        try:
            self._send(json.dumps(request, default=str).encode("ascii") + b"\n")
            for _ in chats:
                answer = json.loads(self._next_answer())
                found.append(answer["text"] if "text" in answer else Refused(reason=str(answer["refused"])))
        except _GoneError as gone:
            self.close()
            found.append(Refused(reason=str(gone)))
            found += [Refused(reason="one before it ended the process that runs the template")] * (
                len(chats) - len(found)
            )
        return found

    def _next_answer(self) -> bytes:
        """What the child says of one conversation; all of them together have a limit as well."""
        started = time.monotonic()
        line = self._receive(self._limits.seconds)
        self._left_seconds += self._limits.average_seconds - (time.monotonic() - started)
        if self._left_seconds < 0:
            raise _GoneError(f"it takes longer than {self._limits.average_seconds:g} seconds for each conversation")
        return line

    def _send(self, line: bytes) -> None:
        child = self._child or self._start()
        assert child.stdin is not None
        try:
            child.stdin.write(line)
            child.stdin.flush()
        except OSError as error:
            raise _GoneError(self._end(child)) from error

    def _start(self) -> subprocess.Popen[bytes]:
        """A child that says that it is ready."""
        limits = (str(self._limits.memory_bytes), str(self._limits.cpu_seconds))
        command = [sys.executable, "-I", str(Path(str(template_child.__file__))), *limits]
        try:
            child = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, close_fds=True
            )
        except OSError as error:
            raise _GoneError(f"no process for it can be started: {error}") from error
        self._child, self._answers = child, queue.SimpleQueue()
        assert child.stdout is not None
        threading.Thread(target=_pass_on, args=(child.stdout, self._answers), daemon=True).start()
        self._receive(_START_SECONDS)
        return child

    def _receive(self, seconds: float) -> bytes:
        """The next line of the child."""
        child = self._child
        assert child is not None
        try:
            line = self._answers.get(timeout=seconds)
        except queue.Empty:
            child.kill()
            raise _GoneError(f"it takes longer than {seconds:g} seconds") from None
        if not line.endswith(b"\n"):
            raise _GoneError(self._end(child))
        return line

    def _end(self, child: subprocess.Popen[bytes]) -> str:
        """Why a child has ended."""
        try:
            code = child.wait(5)
        except subprocess.TimeoutExpired:
            child.kill()
            code = child.wait()
        if code == -getattr(signal, "SIGXCPU", 0):
            return f"it computes longer than {self._limits.cpu_seconds:g} seconds"
        return f"the process that runs it ended with {code}; it needs too much time or memory"


def _pass_on(pipe: IO[bytes], answers: "queue.SimpleQueue[bytes]") -> None:
    """Lines of a child to the queue; an empty one at its end. A thread, for Windows can not wait for a pipe."""
    with pipe:
        while True:
            try:
                line = pipe.readline(_PIPE_LINE_BYTES)
            except (OSError, ValueError):
                line = b""
            answers.put(line)
            if not line.endswith(b"\n"):
                return


def _plain_variables(named: Mapping[str, Any]) -> dict[str, Any]:
    """Special tokens as text."""
    return {
        name: [str(token) for token in value] if isinstance(value, list | tuple) else str(value)
        for name, value in named.items()
    }
