"""The file of answers: a conversation a line, each with what made it; a run that was killed goes on with it.

Lines are appended, flushed and never changed. A file that holds a line of anybody else's, or of another run's settings,
is not touched.
"""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from moepress.calibration.endpoint import Answer
from moepress.calibration.prompts import Prompt
from moepress.errors import OutputLockedError, UsageError
from moepress.runs.files import check_file, open_plain, room_for

MADE = "made"
"""Key of a line's own facts: the run's settings, the prompt's key, tokens, and why the answer stopped."""


@dataclass(slots=True, kw_only=True)
class Traces:
    """An open file of answers.

    Attributes:
        done: keys of the prompts that have their answer.
        kept: how many lines were there before.
    """

    file: Path
    settings: Mapping[str, Any]
    stream: IO[bytes]
    done: set[str] = field(default_factory=set)
    kept: int = 0

    def add(self, prompt: Prompt, answer: Answer, *, as_text: bool = False) -> None:
        """Append one answer, whole and on the disk.

        Args:
            prompt, answer: what was asked and said.
            as_text: write the text as the model saw it, for a chat template that would leave the reasoning out.
        """
        line = json.dumps(record_of(prompt, answer, self.settings, as_text=as_text), ensure_ascii=False)
        data = line.encode("utf-8", "replace") + b"\n"
        with room_for(self.file, len(data)):
            self.stream.write(data)
            self.stream.flush()
            os.fsync(self.stream.fileno())
        self.done.add(prompt.key)


def record_of(prompt: Prompt, answer: Answer, settings: Mapping[str, Any], *, as_text: bool = False) -> dict[str, Any]:
    """A line of the file, as `calibration.records` reads it."""
    facts = {**settings, "prompt": prompt.key, "tokens": answer.tokens, "stopped": answer.stopped}
    if as_text:
        return {"text": answer.text, MADE: facts}
    thought = {} if not answer.reasoning else {"reasoning_content": answer.reasoning}
    said = {"role": "assistant", **thought, "content": answer.content}
    return {"messages": [*prompt.messages, said], MADE: facts}


@contextmanager
def open_traces(file: Path, settings: Mapping[str, Any]) -> Iterator[Traces]:
    """Open a new file, or one of the same settings to go on with; a last line that was torn is cut off.

    Raises:
        UsageError: the file is somebody else's, or of other settings, named in the message.
        OutputLockedError: another process writes to it.
    """
    check_traces(file, settings)
    with file.open("ab") as stream:
        _lock(file, stream)
        done, whole = _read(file, settings)
        stream.truncate(whole)
        yield Traces(file=file, settings=settings, stream=stream, done=done, kept=len(done))


def check_traces(file: Path, settings: Mapping[str, Any]) -> int:
    """Refuse a place for answers before any work; returns how many are there.

    Raises:
        UsageError: as `open_traces`.
    """
    check_file(file, "-o", force=True)
    if file.is_symlink():
        raise UsageError(f"-o {file} is a link; name the file that it leads to.")
    return len(_read(file, settings)[0]) if file.exists() else 0


def _read(file: Path, settings: Mapping[str, Any]) -> tuple[set[str], int]:
    """Keys of the answers, and bytes of all whole lines."""
    with open_plain(file) as stream:
        data = stream.read()
    whole, done = data.rfind(b"\n") + 1, set[str]()
    for line in data[:whole].split(b"\n")[:-1]:
        made = _made(line)
        if made is None:
            raise _foreign(file)
        for name, value in settings.items():
            if made.get(name) != value:
                raise UsageError(
                    f"{file} holds answers made with {name} {made.get(name)!r}, and now it is {value!r}; choose "
                    "another name, or repeat the command as it was."
                )
        done.add(str(made.get("prompt")))
    if whole == 0 and data and not data.startswith(_STARTS):
        raise _foreign(file)
    return done, whole


_STARTS = (b'{"messages": [', b'{"text": ')


def _made(line: bytes) -> Mapping[str, Any] | None:
    with suppress(ValueError, RecursionError):
        record = json.loads(line)
        if isinstance(record, Mapping) and isinstance(record.get(MADE), Mapping):
            found: Mapping[str, Any] = record[MADE]
            return found
    return None


def _foreign(file: Path) -> UsageError:
    return UsageError(f"-o {file} is there and was not made by `moepress calibration make`; choose another name.")


def _lock(file: Path, stream: IO[bytes]) -> None:
    """Held until the file is closed, by whatever end of the process; where the system has such locks."""
    try:
        import fcntl
    except ImportError:  # Windows
        return
    try:
        fcntl.flock(stream.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise OutputLockedError(f"{file} is being written by another process; wait for it.") from error
