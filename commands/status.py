"""`moepress status`: how a shared run stands."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from moepress.commands.console import emit, quiet_libraries, say
from moepress.commands.options import json_option, talk_options
from moepress.commands.tables import human_bytes, plain_console, plain_table


@click.command()
@click.argument("store")
@talk_options
@json_option
def status(store: str, **options: Any) -> None:
    """Show how the run in STORE stands: tasks that are done, being done and failed, workers, and the time left.

    STORE is the folder or URL that was given to `moepress plan-work`.

    \b
    Example:  moepress status s3://bucket/run
    """
    quiet_libraries()
    from moepress.stages.status import status_stage

    found = status_stage(store)
    if options["as_json"]:
        emit(found)
        return
    _show(found)


def _show(found: Mapping[str, Any]) -> None:
    from moepress.runs.progress import span_text

    left = found["seconds_left"]
    rest = "" if left is None or found["done"] == found["tasks"] else f", about {span_text(left)} left"
    done = f"{found['done']:,} of {found['tasks']:,} tasks done, {found['running']:,} running"
    say(f"{found['store']}: {found['model']}, {done}{rest}")
    console = plain_console()
    table = plain_table("task", "done", "running", "of", "seconds each", "peak memory")
    for row in found["kinds"]:
        seconds = "" if row["seconds"] is None else f"{row['seconds']:.1f}"
        peak = "" if row["peak_bytes"] is None else human_bytes(row["peak_bytes"])
        table.add_row(row["kind"], f"{row['done']:,}", f"{row['running']:,}", f"{row['tasks']:,}", seconds, peak)
    console.print(table)
    there = [row for row in found["workers"] if row["state"] != "ended"]
    if there:
        table = plain_table("worker", "state", "doing", "did")
        for row in there:
            table.add_row(row["worker"], row["state"], row["doing"] or "", f"{row['did']:,}")
        console.print(table)
    for row in found["failures"]:
        say(f"Failed{'' if row['final'] else ' and tried again'}: {row['task']}: {row['error']}")
    if found["done"] == found["tasks"]:
        say(f"All is done: moepress work --store {found['store']} -o FOLDER fetches the result.")
