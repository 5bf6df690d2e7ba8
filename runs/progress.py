"""Progress with the time left, on stderr: a bar where a person watches, a line now and then where a log is kept.

A bar that is done leaves its line. Where stderr is no terminal, what is shorter than `LINE_SECONDS` says nothing, so
that short commands in scripts stay quiet, and of longer work there is a line per step (a layer, a shard), at most one
in `LINE_SECONDS`. The stages of a job leave a line each, where they take `SHORT_SECONDS`.
"""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, Protocol

from moepress.runs.text import printable

LINE_SECONDS = 5.0
SHORT_SECONDS = 0.5


class Level(IntEnum):
    """How much is said: errors alone, the usual, or every step."""

    QUIET = 0
    USUAL = 1
    VERBOSE = 2


class Advance(Protocol):
    """Counts finished steps; a remark is what they brought, such as `error 0.31 %`."""

    def __call__(self, steps: int, remark: str = "") -> None:
        """So many steps more are done."""


@dataclass(slots=True)
class _State:
    level: Level = Level.USUAL
    stages: list[str] = field(default_factory=list)
    shown: bool = False


_state = _State()


def set_level(level: Level) -> None:
    """How much this process says from now on."""
    _state.level = level


@contextmanager
def silent() -> Iterator[None]:
    """Nothing is said of what is tracked in the block."""
    before, _state.level = _state.level, Level.QUIET
    try:
        yield
    finally:
        _state.level = before


@contextmanager
def stage(number: int, of: int) -> Iterator[None]:
    """What is tracked in the block is stage `number` of `of`."""
    _state.stages.append(f"[{number}/{of}] ")
    try:
        yield
    finally:
        _state.stages.pop()


@contextmanager
def track(description: str, total: int, *, unit: str = "steps", about: str = "") -> Iterator[Advance]:
    """Show how `total` steps go on.

    Args:
        description: what is done, such as `quantize`.
        total: how many steps.
        unit: what a step is, in the plural.
        about: how much work that is, such as `131,072 tokens`.
    """
    title = printable((_state.stages[-1] if _state.stages else "") + description)
    if _state.level is Level.QUIET:
        yield _silent
    elif _watched() and not _state.shown:
        with _bar(title, total, unit, about) as advance:
            yield advance
    else:
        lines = _Lines(title=title, total=total, unit=unit, about=about, staged=bool(_state.stages))
        yield lines.advance
        lines.end()


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """Name what takes a while before there are steps to count, such as `reading the text`; where a person watches."""
    if not _watched() or _state.level is Level.QUIET or _state.shown:
        yield
        return
    from moepress.runs.terminal import console

    title = printable((_state.stages[-1] if _state.stages else "") + what)
    with _alone(), console(stderr=True, markup=False).status(title):
        yield


@contextmanager
def _alone() -> Iterator[None]:
    """A terminal has room for one thing that moves."""
    _state.shown = True
    try:
        yield
    finally:
        _state.shown = False


def note(*notes: str) -> None:
    """Notes on stderr, from where the work is done; where their reader has gone the work goes on."""
    if _state.level is not Level.QUIET:
        for line in notes:
            _print(f"Note: {line}")


def span_text(seconds: float) -> str:
    """A time as people say it: 8 s, 4 min 12 s, 3 h 5 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if rest and minutes < 10 else f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min"


def _watched() -> bool:
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


def _silent(steps: int, remark: str = "") -> None:
    """Nothing is said."""


@dataclass(slots=True, kw_only=True)
class _Lines:
    """Progress as lines of a log."""

    title: str
    total: int
    unit: str
    about: str
    staged: bool = False
    done: int = 0
    skipped: int = 0
    began: float = field(default_factory=time.monotonic)
    said: float = field(default_factory=time.monotonic)
    spoke: bool = False

    def advance(self, steps: int, remark: str = "") -> None:
        """A line, where the last one is some time ago."""
        now, self.done = time.monotonic(), self.done + steps
        if now - self.began < 0.01:  # steps that a resumed run did before
            self.skipped = self.done
            return
        if _state.level is not Level.VERBOSE and now - self.said < LINE_SECONDS:
            return
        parts = [f"{span_text(now - self.began)} so far", *self._left(now), *([remark] if remark else [])]
        _print(f"{self.title}: {self.unit} {self.done:,} of {self.total:,}, {', '.join(parts)}")
        self.said, self.spoke = now, True

    def _left(self, now: float) -> list[str]:
        fresh = self.done - self.skipped
        if not fresh or self.done >= self.total:
            return []
        return [f"{span_text((now - self.began) / fresh * (self.total - self.done))} left"]

    def end(self) -> None:
        """A last line, where there was any, or it took a while, or it is a stage of a longer job."""
        seconds = time.monotonic() - self.began
        if self.spoke or seconds >= (SHORT_SECONDS if self.staged else LINE_SECONDS):
            _print(_last_line(self.title, self.total, self.unit, self.about, seconds))


def _last_line(title: str, total: int, unit: str, about: str, seconds: float) -> str:
    return f"{title}: {total:,} {unit}{f', {about}' if about else ''}, done in {span_text(seconds)}"


@contextmanager
def _bar(title: str, total: int, unit: str, about: str) -> Iterator[Advance]:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    from moepress.runs.terminal import console

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[remark]}", markup=False),
    )
    screen, began = console(stderr=True, markup=False), time.monotonic()
    with _alone(), Progress(*columns, console=screen, transient=True) as bar:
        task = bar.add_task(title, total=total, remark="")

        def advance(steps: int, remark: str = "") -> None:
            shown: dict[str, Any] = {"remark": remark} if remark else {}
            bar.update(task, advance=steps, **shown)

        yield advance
    screen.print(_last_line(title, total, unit, about, time.monotonic() - began))


def _print(line: str) -> None:
    try:
        print(printable(line), file=sys.stderr, flush=True)
    except BrokenPipeError:
        from moepress.runs.terminal import stop_printing

        stop_printing(sys.stderr)
