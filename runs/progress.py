"""Progress with the time left, on stderr, and only where a person watches."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def track(description: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show a bar for `total` steps; the value yielded advances it by a number of steps.

    Where stderr is not a terminal nothing is printed, so logs and pipes stay clean.
    """
    if not sys.stderr.isatty() or os.environ.get("TERM") == "dumb":
        yield lambda _steps: None
        return
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
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console(stderr=True), transient=True) as bar:
        task = bar.add_task(description, total=total)
        yield lambda steps: bar.update(task, advance=steps)


def note(*notes: str) -> None:
    """Notes on stderr, from where the work is done; where their reader has gone the work goes on."""
    try:
        for line in notes:
            print(f"Note: {line}", file=sys.stderr, flush=True)
    except BrokenPipeError:
        from moepress.runs.terminal import stop_printing

        stop_printing(sys.stderr)
