"""A bug in moepress: what to say of it in one sentence, and the traceback in a file, so that it can be reported."""

import platform
import shlex
import sys
import tempfile
import traceback
from pathlib import Path

from moepress import __version__
from moepress.commands.attempt import Attempt
from moepress.runs.files import JOURNAL
from moepress.runs.journal import TRACEBACK
from moepress.runs.output import partial_folder
from moepress.runs.phases import place_of
from moepress.runs.text import printable

LONGEST = 300
"""Characters of an exception's text that are shown."""
_DOING = {
    "run": "ran the stages",
    "profile": "profiled",
    "plan": "planned",
    "prune": "pruned",
    "repair": "repaired",
    "quantize": "quantized",
    "export": "exported",
    "inspect": "inspected a model",
    "targets": "listed the GPUs",
    "doctor": "looked at this machine",
    "check": "checked",
    "validate": "validated",
    "generate": "generated text",
    "push": "pushed",
    "completion": "wrote a completion script",
}


def describe(error: Exception, attempt: Attempt) -> str:
    """What moepress was doing, where the traceback was written, and how to go on.

    Args:
        error: no error that is raised on purpose.
        attempt: what was running.
    """
    where, whole = place_of(error), "".join(traceback.format_exception(error))
    doing = _DOING.get(_stage_of(error) or attempt.command or "", "read the command line")
    place = f", in {where}" if where else ""
    file = write_traceback(whole, attempt)
    written = f"the traceback is in {file}: report that file" if file else "no traceback could be written: add --debug"
    resume = ", and repeat the command with --resume to go on" if _can_resume(attempt) else ""
    name = f"moepress {attempt.command}" if attempt.command else "moepress"
    return f"{name} met a bug of its own while it {doing}{place}: {text_of(error)}; {written}{resume}."


def write_traceback(whole: str, attempt: Attempt) -> Path | None:
    """A new file in the work folder where there is one, else in the temporary folder; None where neither takes it."""
    head = f"moepress {__version__}, Python {platform.python_version()}, {platform.platform()}\n"
    head += f"{shlex.join(['moepress', *sys.argv[1:]])}\n\n"
    for folder in (_work_folder(attempt), None):
        try:
            handle, name = tempfile.mkstemp(prefix=TRACEBACK, suffix=".txt", dir=folder)
            with open(handle, "w", encoding="utf-8") as stream:  # noqa: PTH123 - opened by mkstemp, which is exclusive
                stream.write(printable(head + whole, lines=True))
        except OSError:  # a full disk may be the cause of it all
            continue
        return Path(name)
    return None


def text_of(error: Exception) -> str:
    """`KeyError: 'x'`, in one line of bounded length that is safe in a terminal."""
    try:
        said = " ".join(str(error).split()).rstrip(".")
    except Exception:  # an error that cannot even say what it is
        said = ""
    text = printable(f"{type(error).__name__}: {said}" if said else type(error).__name__)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."


def _stage_of(error: Exception) -> str | None:
    """The innermost stage that the error came through."""
    found = None
    for frame, _ in traceback.walk_tb(error.__traceback__):
        package, _, name = str(frame.f_globals.get("__name__", "")).rpartition(".")
        if package == "moepress.stages" and name in _DOING:
            found = name
    return found


def _work_folder(attempt: Attempt) -> Path | None:
    """OUT.partial with its journal: without one it is nobody's, and would be in the way of the next try."""
    folder = partial_folder(attempt.output) if attempt.output is not None else None
    return folder if folder is not None and (folder / JOURNAL).is_file() else None


def _can_resume(attempt: Attempt) -> bool:
    """Whether something is left to go on with; `run` works in its output itself."""
    return _work_folder(attempt) is not None or (attempt.output is not None and (attempt.output / JOURNAL).is_file())
