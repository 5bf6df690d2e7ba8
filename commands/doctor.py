"""`moepress doctor`: the command, and the facts as a table."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from moepress.commands.console import emit, note, say
from moepress.commands.options import json_option
from moepress.errors import UnsupportedError

if TYPE_CHECKING:
    from moepress.stages.doctor import Diagnosis, Facts


@click.command()
@json_option
def doctor(as_json: bool) -> None:
    """Tell what is installed, what ONNX Runtime's sessions really run on, devices and free disk, and what to mend.

    Ends with 5 when two ONNX Runtime packages clash or what is installed of it cannot be used, else with 0.

    \b
    Example:  moepress doctor --json
    """
    from moepress.stages.doctor import diagnose

    found = diagnose(Path.cwd())
    emit(asdict(found)) if as_json else _print_diagnosis(found)
    note(*found.notes)
    for problem in found.problems:
        if problem not in found.clashes:
            say(f"Problem: {problem}", err=True)
    if found.clashes:
        raise UnsupportedError(" ".join(found.clashes))


def _print_diagnosis(diagnosis: Diagnosis) -> None:
    """The facts as a table for people, on stdout."""
    from rich.table import Table

    from moepress.runs.terminal import console

    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True, style="bold")
    table.add_column(overflow="fold")
    for name, value in _rows(diagnosis.facts):
        table.add_row(name, value)
    console(markup=False).print(table)


def _rows(facts: Facts) -> Iterator[tuple[str, str]]:
    from moepress.stages.doctor import gib_text

    machine, torch, runtime = facts.machine, facts.torch, facts.runtime
    yield "moepress", machine.moepress
    yield "Python", machine.python
    yield "system", machine.system
    yield "processor", f"{machine.cpu}, {machine.cores} logical cores"
    yield "memory", f"{gib_text(machine.memory_bytes)}, {gib_text(machine.free_memory_bytes)} free"
    for disk in facts.disks:
        yield disk.use, f"{disk.folder}, {gib_text(disk.free_bytes)} free"
    yield from ((name, version) for name, version in facts.packages.items() if version)
    yield "not installed", ", ".join(name for name, version in facts.packages.items() if not version)
    yield "torch computes on", ", ".join(["cpu", *["cuda"] * bool(torch.devices), *["mps"] * torch.mps])
    yield "solver's loops", f"native, {torch.loops}" if torch.loops else f"in torch alone ({torch.no_loops})"
    yield "torch's CUDA", torch.cuda_build or "none"
    for index, device in enumerate(torch.devices):
        memory = f"{gib_text(device.memory_bytes)}, {gib_text(device.free_memory_bytes)} free"
        yield f"GPU {index}", f"{device.name}, {memory}"
    yield "ONNX Runtime lists", ", ".join(runtime.available) or "nothing"
    for session in runtime.sessions:
        yield f"asked for {session.asked}", f"a session got {', '.join(session.got) or 'nothing'}"
