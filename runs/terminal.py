"""What is printed, where it goes to: a terminal, a pipe or a file; NO_COLOR and FORCE_COLOR.

Escape codes go to terminals alone, but FORCE_COLOR (https://force-color.org) sends them anywhere, and NO_COLOR
(https://no-color.org) nowhere: not even bold type. A terminal's lines are as wide as it is; elsewhere they are as long
as they need to be, so that no table is cut and a line can be searched for.
"""

import os
import sys
from typing import IO, Any

from rich.console import Console

from moepress.runs.text import printable

ENDLESS = 100_000
"""Columns of what is no terminal: no table of ours is wider, and rich breaks nothing."""


def console(*, stderr: bool = False, soft_wrap: bool = False, markup: bool = True) -> Console:
    """A console on stdout or stderr.

    Args:
        stderr: write there instead of to stdout.
        soft_wrap: leave the breaking of long lines to the terminal; tables are fitted to it in any case.
        markup: read `[bold]` and the like; without it brackets are text.
    """
    stream = sys.stderr if stderr else sys.stdout
    return _Console(
        stderr=stderr,
        soft_wrap=soft_wrap,
        markup=markup,
        highlight=False,
        emoji=False,  # a folder may well be called :key:
        color_system=None if os.environ.get("NO_COLOR") else "auto",
        width=None if stream.isatty() else ENDLESS,
    )


def stop_printing(stream: IO[str]) -> None:
    """Send all further output of stdout or stderr nowhere, for its reader has gone, such as `head`."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


class _Console(Console):
    """A console that goes on without a reader: the command's work and its exit code are still to come."""

    def print(self, *objects: Any, **how: Any) -> None:
        """Text with what a terminal might obey as escapes: it may hold names from files."""
        super().print(*(printable(o, lines=True) if isinstance(o, str) else o for o in objects), **how)

    def on_broken_pipe(self) -> None:
        self.quiet = True
        stop_printing(self.file)
