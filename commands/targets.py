"""`moepress targets`: the table of GPUs."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from moepress.commands.console import emit
from moepress.commands.options import json_option, targets_file_option
from moepress.commands.tables import plain_console, plain_table


@click.command()
@targets_file_option
@json_option
def targets(targets_file: Path | None, as_json: bool) -> None:
    """List the GPUs that `inspect`, `validate` and --target know, with those of --targets-file.

    Several of a GPU are one target, `2xrtx-3090`; `+` puts the machine's memory behind one, where experts may lie that
    it does not hold: `rtx-4090+ddr5-128`; and a disk behind that, from which the rest is read: `...+ddr5-128+nvme-4`.

    That file has one table for each GPU; `pcie` and `uncertain` may be left out, `kind` may also be unified or
    reference:

    \b
      [[target]]
      id = "two-3090"
      name = "2 x RTX 3090"
      kind = "gaming"
      memory_gib = 48
      bandwidth_gb_per_second = 936
      fp16_tflops = 71.2
      [[ram]]
      id = "my-ram"
      name = "192 GB DDR5-5200, two channels"
      memory_gib = 192
      bandwidth_gb_per_second = 83.2

    \b
    Example:  moepress targets
              moepress targets --targets-file my-gpus.toml --json
    """
    from moepress.validation.speed.targets import all_disks, all_ram, all_targets

    rows = [target.model_dump() for target in all_targets(targets_file)]
    behind = [ram.model_dump() for ram in all_ram(targets_file).values()]
    disks = [disk.model_dump() for disk in all_disks(targets_file).values()]
    emit({"targets": rows, "ram": behind, "disk": disks}) if as_json else _print_targets(rows, behind, disks)


def _print_targets(
    targets: Sequence[Mapping[str, Any]], behind: Sequence[Mapping[str, Any]], disks: Sequence[Mapping[str, Any]]
) -> None:
    """The tables of GPUs, of memory behind them and of disks behind that, as plain data."""
    table = plain_table("id", "GPU", "kind", "GiB", "GB/s", "TFLOPS")
    for row in targets:
        flops = f"{'~' if row['uncertain'] else ''}{row['fp16_tflops']:g}"
        speed = f"{row['bandwidth_gb_per_second']:g}"
        table.add_row(row["id"], row["name"], row["kind"], f"{row['memory_gib']:g}", speed, flops)
    console = plain_console(markup=True)
    console.print(table)
    console.print("TFLOPS: fp16 on tensor cores, dense, accumulating in fp32; ~: less certain")
    memory = plain_table("id", "memory behind a card, as in rtx-4090+ddr5-128", "GiB", "GB/s")
    for row in behind:
        memory.add_row(row["id"], row["name"], f"{row['memory_gib']:g}", f"{row['bandwidth_gb_per_second']:g}")
    console.print()
    console.print(memory)
    last = plain_table("id", "a disk behind that memory, as in rtx-4090+ddr5-128+nvme-4", "GB/s")
    for row in disks:
        last.add_row(row["id"], row["name"], f"{row['bandwidth_gb_per_second']:g}")
    console.print()
    console.print(last)
