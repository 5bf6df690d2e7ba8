"""What `inspect` and dry runs found, as tables for people, on stdout."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console

from moepress.commands.printed import human_bytes, plain_console, plain_table, print_inventory
from moepress.validation.speed.projection import interval_text

_UNITS = (("days", 86400.0), ("h", 3600.0), ("min", 60.0))


def human_seconds(seconds: float) -> str:
    """A time in two figures: 12 s, 4.5 h, 3.2 days."""
    for unit, length in _UNITS:
        if seconds >= 1.5 * length:
            return f"{seconds / length:.2g} {unit}" if seconds < 99.5 * length else f"{seconds / length:,.0f} {unit}"
    return f"{seconds:.2g} s"


def print_estimates(estimates: Mapping[str, Mapping[str, Any]]) -> None:
    """Time, memory and disk by stage, then the terms of each; stage -> an `Estimate` as plain data."""
    console = plain_console(markup=True)
    table = plain_table("projected", "time", "peak memory", "disk", "output", "tokens/expert")
    for stage, row in estimates.items():
        each = row["tokens_per_expert"]
        table.add_row(
            stage,
            human_seconds(row["seconds"]),
            human_bytes(row["peak_memory_bytes"]),
            human_bytes(row["disk_bytes"]),
            human_bytes(row["output_bytes"]),
            "" if each is None else f"{each:,.0f}",
        )
    console.print(table)
    for stage, row in estimates.items():
        console.print(f"{stage}, time: {_terms(row['time'], human_seconds)}")
        console.print(f"{stage}, memory: {_terms(row['memory'], human_bytes)}")
        console.print(f"{stage}, disk: {_terms(row['disk'], human_bytes)}")
        if row["device_memory_bytes"] is not None:
            console.print(f"{stage}, memory of the GPU: {human_bytes(row['device_memory_bytes'])}")
    for note in dict.fromkeys(note for row in estimates.values() for note in row["notes"]):
        console.print(f"Note: {note}")


def _terms(terms: Mapping[str, float], text: Any) -> str:
    whole = sum(terms.values())
    shown = [f"{name} {text(value)}" for name, value in terms.items() if value > 0.002 * whole]
    return ", ".join(shown) or "nothing"


def print_inspection(found: Mapping[str, Any]) -> None:
    """All that `inspect` found."""
    print_inventory(found)
    console = plain_console(markup=True)
    _print_counts(console, found)
    machine, estimates = found["machine"], found["estimates"]
    read = f"{machine['read_bytes_per_second'] / 1e6:,.0f} MB/s"
    console.print(
        f"\n[bold]This machine[/bold]  {machine['cores']} cores, layers on {machine['device']}: "
        f"{machine['forward_flops'] / 1e9:,.0f} GFLOP/s, disk {read} {'' if machine['read_measured'] else '(assumed)'}"
    )
    free = f"{human_bytes(machine['free_memory_bytes'])} memory and {human_bytes(machine['free_disk_bytes'])} disk"
    calibration, scheme = found["calibration"], found["scheme"]
    console.print(
        f"free: {free}; for {calibration['tokens']:,} tokens, {estimates['experts']} experts, {scheme['bits']} bit "
        f"g{scheme['group_size']}:"
    )
    print_estimates({name: row for name, row in estimates.items() if name != "experts"})
    most = max(row["disk_bytes"] for name, row in estimates.items() if name != "experts")
    if most > machine["free_disk_bytes"]:
        console.print(f"Note: the disk of this folder is too small: {human_bytes(most)} are needed.")
    _print_fits(console, found["targets"], scheme)


def _print_counts(console: Console, found: Mapping[str, Any]) -> None:
    if found["recommended_expert_counts"]:
        console.print("worth trying first:")
        for row in found["recommended_expert_counts"]:
            console.print(f"  {row['experts']} experts ({row['share']:.0%}): {'; '.join(row['reasons'])}")
    calibration = found["calibration"]
    console.print(
        f"{calibration['tokens']:,} calibration tokens give {calibration['tokens_per_expert']:,.0f} to an expert, on "
        f"average.{' ' + calibration['note'] if calibration['note'] else ''}"
    )


def _print_fits(console: Console, found: Mapping[str, Any], scheme: Mapping[str, Any]) -> None:
    counts = found["counts"]
    console.print(
        f"\n[bold]Which GPU holds it[/bold]  experts {scheme['bits']} bit g{scheme['group_size']}, the rest 16 bit; KV "
        f"cache of {found['context']:,} tokens: {human_bytes(found['cache_bytes'])}"
    )
    table = plain_table("experts that stay", "memory", *(str(row["experts"]) for row in counts))
    table.add_row("weights and cache", "", *(human_bytes(row["needed_bytes"]) for row in counts))
    for index, target in enumerate(found["table"]):
        label = target["name"] + ("" if target["kind"] == "gaming" else " *")
        table.add_row(label, f"{target['memory_gib']:g} GiB", *(_cell(row["fits"][index]) for row in counts))
    console.print(table)
    console.print(
        f"fits: {found['reserve']:.0%} of the memory stay free for activations and the runtime; tight: "
        f"{found['tight_reserve']:.0%}, a shorter context helps; -n GiB: so much is lacking for that; *: no gaming GPU"
    )
    _print_speeds(console, found)
    for sentence in found["answer"]:
        console.print(sentence)


def _cell(row: Mapping[str, Any]) -> str:
    lacking = row["lacking_bytes"] / 2**30
    return str(row["verdict"]) if not lacking else f"-{lacking:,.1f} GiB"


def _print_speeds(console: Console, found: Mapping[str, Any]) -> None:
    """Decoding on the GPUs that hold it; nothing where none does."""
    counts = found["counts"]
    table = plain_table("tokens per second", *(str(row["experts"]) for row in counts))
    for index, target in enumerate(found["table"]):
        speeds = [row["fits"][index]["tg128"] for row in counts]
        if any(speeds):
            cells = ("-" if speed is None else interval_text(speed["low"], speed["high"]) for speed in speeds)
            table.add_row(target["name"] + ("" if target["kind"] == "gaming" else " *"), *cells)
    if table.row_count:
        console.print(table)
        console.print("tg128, batch 1, projected, not measured; --json has pp512 too, and the formulas")


def print_targets(targets: Sequence[Mapping[str, Any]]) -> None:
    """The table of GPUs; target -> a `Target` as plain data."""
    table = plain_table("id", "GPU", "kind", "GiB", "GB/s", "TFLOPS")
    for row in targets:
        flops = f"{'~' if row['uncertain'] else ''}{row['fp16_tflops']:g}"
        speed = f"{row['bandwidth_gb_per_second']:g}"
        table.add_row(row["id"], row["name"], row["kind"], f"{row['memory_gib']:g}", speed, flops)
    console = plain_console(markup=True)
    console.print(table)
    console.print("TFLOPS: fp16 on tensor cores, dense, accumulating in fp32; ~: less certain")
