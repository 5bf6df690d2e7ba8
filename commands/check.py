"""`moepress check`: the command, and its findings for people."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from moepress.commands.completers import complete_runtimes
from moepress.commands.console import emit, quiet_libraries
from moepress.commands.options import json_option, model_argument
from moepress.commands.tables import plain_console, plain_table
from moepress.errors import InvalidInputError

if TYPE_CHECKING:
    from moepress.validation.rules.check import Checked
    from moepress.validation.rules.findings import Finding


@click.command()
@model_argument("output")
@click.option(
    "--runtime",
    "runtimes",
    metavar="NAMES",
    shell_complete=complete_runtimes,
    help="Runtimes to check for, with commas between them: vllm, sglang, transformers, gptqmodel, llama.cpp, "
    "onnxruntime, mlx.  [default: those that the layout is made for]",
)
@click.option("--tensor-parallel", type=click.IntRange(1), default=1, help="Devices that every matrix is split over.")
@click.option("--expert-parallel", type=click.IntRange(1), default=1, help="Devices that the experts are dealt to.")
@json_option
def check(output: str, runtimes: str | None, tensor_parallel: int, expert_parallel: int, as_json: bool) -> None:
    """Hold OUTPUT against the rules of the runtimes that are to load it, without these runtimes: a folder in
    compressed-tensors or GPTQ layout, pruned, or ONNX, or a GGUF file.

    Reads JSON and headers, no weights. Each finding says which runtime, what happens there (refuses, silently wrong,
    slower), and how to mend it. Ends with 4 when a runtime refuses OUTPUT or computes something else without an error.

    \b
    Example:  moepress check pressed
              moepress check pressed --runtime vllm,sglang --tensor-parallel 2
    """
    from moepress.stages.places import model_place

    model_place(output)  # what is not there is refused before anything heavy is imported, on the hub too
    quiet_libraries()
    from moepress.stages.check import check_stage

    found = check_stage(output, runtimes, tensor_parallel=tensor_parallel, expert_parallel=expert_parallel)
    emit(asdict(found)) if as_json else _print_checked(found)
    if found.failing:
        names = ", ".join(dict.fromkeys(finding.runtime for finding in found.failing))
        raise InvalidInputError(
            f"{output} does not work in {names} (findings: {len(found.failing)}); mend it, or name other "
            "runtimes with --runtime."
        )


def _print_checked(found: Checked) -> None:
    """A row for each runtime, then every problem with what happens where and how to mend it."""
    from rich.markup import escape

    from moepress.validation.rules.findings import Effect

    console = plain_console(markup=True)
    console.print(f"[bold]{escape(found.folder)}[/bold]  {found.kind}, held against {found.rules} rules")
    if not found.runtimes:
        console.print(
            "No runtime reads such a folder; `moepress export FOLDER --to gguf -o FILE.gguf` makes the file that "
            "llama.cpp reads, and `moepress check FILE.gguf` looks at it."
        )
        return
    table = plain_table("runtime", *Effect)
    for runtime in found.runtimes:
        counts = Counter(finding.effect for finding in found.findings if finding.runtime is runtime)
        table.add_row(runtime, *(str(counts[effect]) for effect in Effect))
    console.print(table)
    problems: dict[tuple[str, str, str], list[Finding]] = {}
    for finding in found.findings:
        problems.setdefault((finding.rule, finding.what, finding.mend), []).append(finding)
    for (rule, what, mend), own in problems.items():
        console.print(f"\n[bold]{rule}[/bold]: {escape(what)}")
        for finding in own:
            console.print(f"  {finding.runtime} {finding.effect}: {escape(finding.happens)}")
        console.print(f"  to mend it: {escape(mend)}")
        known = dict.fromkeys(finding.source for finding in own)
        console.print(f"  checked: {escape('; '.join(known))}")
