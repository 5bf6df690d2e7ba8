"""`moepress inspect`: the command, and what it found as tables."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from moepress.commands.completers import complete_targets
from moepress.commands.console import emit, quiet_libraries
from moepress.commands.options import json_option, model_argument, targets_file_option
from moepress.commands.tables import (
    human_bytes,
    plain_console,
    plain_table,
    print_estimates,
    print_slack,
    rough_bytes,
)

if TYPE_CHECKING:
    from rich.console import Console


@click.command()
@model_argument()
@click.option("--tokens", type=click.IntRange(1), help="Calibration tokens to plan for.  [default: 131072]")
@click.option(
    "--context", type=click.IntRange(1), help="Tokens in the KV cache.  [default: 8192, or the model's context]"
)
@click.option("--target", metavar="GPU", shell_complete=complete_targets, help="Only this GPU of `moepress targets`.")
@targets_file_option
@json_option
def inspect(
    model: str, tokens: int | None, context: int | None, target: str | None, targets_file: Path | None, as_json: bool
) -> None:
    """Tell what MODEL is and what pressing it takes: which GPU holds the result, family, experts, sizes by part, the
    expert counts that can stay and those to try first, time, memory and disk on this machine.

    Reads headers, and some weights to time the disk; writes nothing. All times are projected. Of a GGUF file it tells
    what the file says of itself, its tensors by type, and what llama.cpp would do with it. Of a folder of
    `moepress profile` it tells what slack the model has: what cuts are likely to cost, before one is made.

    \b
    Example:  moepress inspect demo
              moepress inspect MODEL --tokens 262144 --context 32768
              moepress inspect MODEL --target "RTX 4090"
              moepress inspect MODEL --targets-file my-gpus.toml
              moepress inspect FILE.gguf
              moepress inspect profile
    """
    from moepress.hub.snapshot import headers_only
    from moepress.stages.places import model_place
    from moepress.validation.speed.targets import all_targets, target_of

    all_targets(targets_file) if target is None else target_of(
        target, targets_file
    )  # what is not there is refused before anything heavy is imported, on the hub too
    with headers_only():
        place = model_place(model)
    quiet_libraries()
    from moepress.converters.gguf.file import gguf_file
    from moepress.stages.inspect import inspect_gguf, inspect_model, inspect_profile

    if (place / "profile.json").is_file() and not (place / "config.json").exists():
        slack = inspect_profile(place)
        emit(slack) if as_json else _print_profile(slack)
        return
    file = gguf_file(place)
    if file is not None:
        about = inspect_gguf(file)
        emit(about) if as_json else _print_gguf(about)
        return
    with headers_only():
        found = inspect_model(model, tokens=tokens, context=context, targets_file=targets_file, only=target)
    emit(found) if as_json else _print_inspection(found)


def _print_profile(found: Mapping[str, Any]) -> None:
    """What slack the model of a profile has."""
    from moepress.compress.pruning.slack import Slack

    console = plain_console()
    console.print(f"{found['model']}: {found['family']}, a profile of {', '.join(found['domains'])}")
    print_slack(Slack.model_validate(found["slack"]))
    console.print(f"Next: moepress plan {found['profile']} --keep 0.75 -o plan.json")


def _print_gguf(found: Mapping[str, Any]) -> None:
    """What a GGUF file is, its tensors by type, and what llama.cpp would do with it."""
    console = plain_console()
    parts = f" in {len(found['files'])} files" if len(found["files"]) > 1 else ""
    console.print(
        f"{found['file']}: GGUF{parts}, {found['architecture']}, {human_bytes(found['bytes'])}, "
        f"{found['parameters'] / 1e6:,.1f} M parameters, {found['bits_per_weight']:.2f} bits per weight"
    )
    console.print(
        f"{found['layers']} layers, {found['experts']} experts of which {found['experts_used']} work for a token; "
        f"context {found['context']:,}, vocabulary {found['vocabulary']:,}, tokenizer {found['tokenizer'][0]} "
        f"({found['tokenizer'][1]})"
    )
    table = plain_table("tensors", "type", "number", "size")
    for row in found["types"]:
        table.add_row(row["kind"], row["type"], str(row["tensors"]), human_bytes(row["bytes"]))
    console.print(table)
    for finding in found["findings"]:
        console.print(f"llama.cpp {finding['effect']}: {finding['what']}: {finding['happens']}")
    if not found["findings"]:
        console.print("Nothing is known that would keep llama.cpp from running it as it is meant.")


def _print_inspection(found: Mapping[str, Any]) -> None:
    """The answer first, then what it rests on."""
    console = plain_console(markup=True)
    _print_title(console, found)
    for sentence in found["targets"]["answer"]:
        console.print(sentence)
    _print_fits(console, found["targets"], found["scheme"])
    _print_inventory(console, found)
    _print_counts(console, found)
    _print_machine(console, found)


def _print_machine(console: Console, found: Mapping[str, Any]) -> None:
    machine, estimates = found["machine"], found["estimates"]
    read = f"{machine['read_bytes_per_second'] / 1e6:,.0f} MB/s"
    console.print(
        f"\n[bold]This machine[/bold]  {machine['cores']} cores, layers on {machine['device']}: "
        f"{machine['forward_flops'] / 1e9:,.0f} GFLOP/s, disk {read} {'' if machine['read_measured'] else '(assumed)'}"
    )
    if machine["busy"]:
        console.print(
            f"Note: other processes took {machine['others_share']:.0%} of the cores while this machine was measured; "
            "on a quiet one the times are shorter."
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
        console.print(f"Note: the disk of this folder is too small: {rough_bytes(most)} are needed.")


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
    least = next((n for n, row in enumerate(counts) if any(fit["tg128"] for fit in row["fits"])), None)
    speed = [] if least is None else ["tokens/s"]
    table = plain_table("experts that stay", "memory", *(str(row["experts"]) for row in counts), *speed)
    table.add_row("weights and cache", "", *(human_bytes(row["needed_bytes"]) for row in counts), *("" for _ in speed))
    for index, target in enumerate(found["table"]):
        label = target["name"] + ("" if target["kind"] == "gaming" else " *")
        cells = [_cell(row["fits"][index]) for row in counts]
        if least is not None:
            cells.append(_speed(next((r["fits"][index]["tg128"] for r in counts if r["fits"][index]["tg128"]), None)))
        table.add_row(label, f"{target['memory_gib']:g} GiB", *cells)
    console.print(table)
    console.print(
        f"fits: {found['reserve']:.0%} of the memory stay free for activations and the runtime; tight: "
        f"{found['tight_reserve']:.0%}, a shorter context helps; -n GiB: so much is lacking for that; *: no gaming GPU"
    )
    if any(fit["ram_layers"] for row in counts for fit in row["fits"]):
        console.print(
            "experts of N in RAM: of N layers; the rest fits on the card (llama.cpp: `-ngl 999` and the option shown)"
        )
    if speed:
        console.print("tokens/s: decoding (tg128, batch 1) with the most experts that fit, projected; --json has all")


def _speed(found: Mapping[str, Any] | None) -> str:
    from moepress.validation.speed.projection import interval_text

    return "-" if found is None else interval_text(found["low"], found["high"])


def _cell(row: Mapping[str, Any]) -> str:
    if row["ram_layers"]:
        where = "RAM and on disk" if row["disk_bytes"] else "RAM"
        return f"experts of {row['ram_layers']} in {where} (--n-cpu-moe {row['cpu_moe']})"
    lacking = row["lacking_bytes"] / 2**30
    return str(row["verdict"]) if not lacking else f"-{lacking:,.1f} GiB"


def _print_title(console: Console, found: Mapping[str, Any]) -> None:
    from rich.markup import escape

    console.print(f"[bold]{escape(found['model'])}[/bold]  {found['family']} ({found['architecture']})")


def _print_inventory(console: Console, found: Mapping[str, Any]) -> None:
    """What the model is, part by part."""
    kinds = found["layer_kinds"]
    console.print("\n[bold]The model[/bold]")
    groups = f", {found['groups']} groups ({found['top_groups']} used)" if found["groups"] > 1 else ""
    console.print(f"{found['layers']} layers: {kinds['moe']} with experts, {kinds['dense']} dense")
    console.print(f"{found['experts']} routed experts of width {found['expert_width']}, top-{found['top_k']}{groups}")
    console.print(f"hidden {found['hidden']}, vocabulary {found['vocabulary']}, context {found['context']}")
    dtypes = ", ".join(f"{name} {human_bytes(size)}" for name, size in found["dtype_bytes"].items())
    console.print(f"{found['shards']} {'shard' if found['shards'] == 1 else 'shards'}: {dtypes}")
    table = plain_table("part", "parameters", "size", "share")
    for part, row in found["parts"].items():
        share = row["bytes"] / max(found["bytes"], 1)
        table.add_row(part, _human_count(row["parameters"]), human_bytes(row["bytes"]), f"{share:.1%}")
    table.add_row("all", _human_count(found["parameters"]), human_bytes(found["bytes"]), "")
    console.print(table)
    console.print(f"active per token: {_human_count(found['active_parameters'])} parameters")
    console.print(f"expert counts that can stay: {_ranges(found['legal_expert_counts'])}")
    if found["legal_expert_counts_degrouped"]:
        console.print(f"with --groups degroup: {_ranges(found['legal_expert_counts_degrouped'])}")
    console.print(f"never quantized: {', '.join(found['never_quantized'])}")
    how = (
        "derived from transformers, nothing is written down for it" if found["derived"] else "a row of moepress's table"
    )
    console.print(f"family: {how}")
    if found["stored_as"]:
        console.print(f"stored as {found['stored_as']}: `prune` moves the bytes as they are")
    for what in found["not_available"]:
        console.print(f"not available: {what}")
    if found["mtp_layers"]:
        console.print("Multi-token-prediction layers are kept, pruned like the others; `--mtp drop` drops them.")


def _ranges(numbers: list[int]) -> str:
    """1, 2, 3, 4, 8 as 1-4, 8; evenly spaced runs as `8, 16, ... 64`."""
    if not numbers:
        return "none"
    steps = {b - a for a, b in pairwise(numbers)}
    if len(numbers) > 4 and len(steps) == 1:
        step = steps.pop()
        if step == 1:
            return f"{numbers[0]}-{numbers[-1]}"
        return f"{numbers[0]}, {numbers[1]}, ... {numbers[-1]} (multiples of {step})"
    return ", ".join(map(str, numbers))


def _human_count(number: int) -> str:
    """A number of parameters: 671.0 B, 4.6 M."""
    for unit, factor in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= factor:
            return f"{number / factor:.1f} {unit}"
    return str(number)
