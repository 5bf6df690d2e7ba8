"""A process of its own that writes conversations with a chat template; `calibration.templates` starts and limits it.

Run as a script in Python's isolated mode, it imports jinja2 and the standard library alone, so that it is there in a
tenth of a second. The environment is that of transformers' `chat_template_utils`: an immutable sandbox with `tojson`,
`raise_exception`, `strftime_now`, loop controls, `{% generation %}` and namespaces and dicts that hide nothing of
Python's. A line of JSON comes in for a batch, one goes out for each conversation: so the one that hangs is known.
"""

import json
import math
import re
import sys
import time
from contextlib import suppress
from datetime import datetime
from functools import lru_cache
from typing import IO, Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")
REASON_CHARS = 300
"""So much is said of an exception."""
_ASKS_FOR_NONE = re.compile(r"content['\"]?\]?\s+is\s+(?:not\s+)?none", re.IGNORECASE)
"""A template that asks so (DeepSeek's) is given a null content; others take a missing one better, see transformers."""


class Arguments(dict[str, Any]):
    """Arguments of a tool call, for templates that want an object and for those that want JSON text.

    Some ask for a mapping or pass it to `tojson`, as transformers advises; those of DeepSeek join it to text.
    """

    def __init__(self, values: dict[str, Any], text: str) -> None:
        super().__init__(values)
        self._text = text

    def __str__(self) -> str:
        return self._text

    def __add__(self, other: str) -> str:
        return self._text + other

    def __radd__(self, other: str) -> str:
        return other + self._text


class Generation(jinja2.ext.Extension):
    """The statement `{% generation %}`, which marks what an assistant said, and is not needed here."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        """Its body, in a scope of its own as in transformers."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_said"), [], [], body).set_lineno(line)

    def _said(self, caller: Any) -> str:
        return str(caller())


class PlainDict:
    """`dict` without Python's class behind it."""

    def __call__(self, *args: Any, **named: Any) -> dict[Any, Any]:
        """As `dict`."""
        return dict(*args, **named)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        """As `dict.fromkeys`."""
        return dict.fromkeys(*args)


class PlainNamespace(jinja2.utils.Namespace):
    """`namespace` without names that begin with an underscore."""

    def __init__(*args: Any, **named: Any) -> None:  # so that namespace(self=...) works
        values = dict(*args[1:], **named)
        for name in values:
            _check_name(name)
        jinja2.utils.Namespace.__init__(args[0], values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace can not have {name!r}")


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


@lru_cache(maxsize=4)
def compiled(template: str) -> jinja2.Template:
    """The template in transformers' environment."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
        "dict": PlainDict(),
        "namespace": PlainNamespace,
    }
    return environment.from_string(template)


def prepared(message: dict[str, Any], *, asks_for_none: bool) -> dict[str, Any]:
    """A message as templates expect it: reasoning under all its names, arguments that are object and text in one."""
    reasoning = next((message[key] for key in REASONING_FIELDS if message.get(key) is not None), None)
    if reasoning is not None:
        message = {"thinking": reasoning, **message, "reasoning_content": reasoning}
    for call in message.get("tool_calls") or ():
        function = call["function"]
        stated = function.get("arguments")
        values = stated
        if isinstance(stated, str):
            with suppress(ValueError, RecursionError):
                values = json.loads(stated)
        if isinstance(values, dict):
            text = stated if isinstance(stated, str) else json.dumps(values, ensure_ascii=False)
            function["arguments"] = Arguments(values, text)
    if asks_for_none and message.get("tool_calls"):
        message.setdefault("content", None)
    return message


def written(request: dict[str, Any], chat: dict[str, Any], most_chars: int) -> str:
    """One conversation as the template writes it.

    Raises:
        ValueError: it is longer than `most_chars`.
        Exception: whatever a template raises.
    """
    template = request["template"]
    asks_for_none = _ASKS_FOR_NONE.search(template) is not None
    messages = [prepared(message, asks_for_none=asks_for_none) for message in chat["messages"]]
    values = {"messages": messages, "tools": chat["tools"], "documents": None}
    values |= {"add_generation_prompt": request["add_generation_prompt"], **request["variables"]}
    pieces, chars = [], 0
    for piece in compiled(template).generate(values):
        pieces.append(piece)
        chars += len(piece)
        if chars > most_chars:
            raise ValueError(f"it writes more than {most_chars:,} characters")
    return "".join(pieces)


def limit(memory_bytes: int) -> None:
    """No more memory than that, and no core files, where the system knows such limits."""
    try:
        import resource
    except ImportError:  # Windows
        return
    for kind, size in ((resource.RLIMIT_CORE, 0), (resource.RLIMIT_AS, memory_bytes)):
        with suppress(ValueError, OSError):
            resource.setrlimit(kind, (size, size))


def limit_time(seconds: float) -> None:
    """The system ends this process when it has computed for so long from now on."""
    try:
        import resource
    except ImportError:
        return
    with suppress(ValueError, OSError):
        most = math.ceil(time.process_time() + seconds)
        resource.setrlimit(resource.RLIMIT_CPU, (most, resource.getrlimit(resource.RLIMIT_CPU)[1]))


def answer(request: dict[str, Any], chat: dict[str, Any], most_chars: int) -> dict[str, str]:
    """The text of one conversation, or why there is none."""
    try:
        text = written(request, chat, most_chars)
        text.encode("utf-8")
        return {"text": text}
    except UnicodeEncodeError:
        return {"refused": "it writes a lone surrogate (\\ud800 to \\udfff), no character"}
    except MemoryError:
        return {"refused": "it needs too much memory"}
    except Exception as error:  # a template can raise whatever Python can
        said = " ".join(str(error)[: 4 * REASON_CHARS].split())[:REASON_CHARS].rstrip(".")
        said = "".join(c if c.isprintable() else "?" for c in said)
        is_theirs = isinstance(error, jinja2.TemplateError | ValueError) and said
        return {"refused": said if is_theirs else f"{type(error).__name__}: {said}".rstrip(": ")}


def serve(requests: IO[bytes], answers: IO[bytes], cpu_seconds: float) -> None:
    """Answer until the other side closes."""
    answers.write(b'{"ready": true}\n')
    answers.flush()
    for line in requests:
        request = json.loads(line)
        for chat, most_chars in zip(request["chats"], request["most_chars"], strict=True):
            limit_time(cpu_seconds)
            found = answer(request, chat, most_chars)
            try:
                data = json.dumps(found).encode("ascii")
            except (MemoryError, RecursionError):
                data = b'{"refused": "it writes too much"}'
            answers.write(data + b"\n")
            answers.flush()


if __name__ == "__main__":
    limit(int(sys.argv[1]))
    with suppress(KeyboardInterrupt, BrokenPipeError):
        serve(sys.stdin.buffer, sys.stdout.buffer, float(sys.argv[2]))
