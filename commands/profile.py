"""`moepress profile`: the command, and what it saw in short."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from moepress.commands.console import emit, quiet_libraries, show_estimates
from moepress.commands.options import (
    calibration_options,
    dry_run_option,
    json_option,
    machine_options,
    model_argument,
    nonfinite_option,
    output_options,
    talk_options,
    timings_option,
)
from moepress.commands.requests import calibration_of, machine_of
from moepress.commands.tables import EMBEDDED_NOTE, plain_console, plain_table

if TYPE_CHECKING:
    from moepress.calibration.profile import Profile


@click.command()
@model_argument()
@output_options("Folder for the profile.")
@calibration_options
@machine_options
@click.option("--no-loo", is_flag=True, help="Leave out leave-one-out losses: 1/K less compute, no `loo` criterion.")
@click.option(
    "--no-bit-losses",
    is_flag=True,
    help="Leave out what bits cost, for which four experts of a layer are quantized at 2, 3, 4 and 8 bits (fewer where "
    "experts are wide and the text short): no `plan --budget`.",
)
@click.option(
    "--grid-losses",
    is_flag=True,
    help="Measure too what GGUF's types cost, by kind of matrix and depth, for `plan --to gguf`, and `plan --budget` "
    "to weigh attention, shared experts and dense MLPs as well: half as long again.",
)
@nonfinite_option
@timings_option
@dry_run_option
@talk_options
@json_option
def profile(model: str, output: Path, resume: bool, force: bool, **options: Any) -> None:
    """Run MODEL over calibration text and write down how it uses its experts, per domain.

    One pass gives the statistics of every pruning criterion. Profiles of one model can be merged: give several to
    `moepress plan`.

    \b
    Example:  moepress profile demo -o profile
              moepress profile MODEL -o profile --calibration chats.jsonl --domain python=code.txt
              moepress profile MODEL -o profile --grid-losses
    """
    from moepress.calibration.sources import parse_sources
    from moepress.commands.timings import check_timings, timed
    from moepress.hub.snapshot import headers_only
    from moepress.runs.output import check_output
    from moepress.stages.places import Output, local_folders

    inputs = local_folders(model)  # wrong paths are refused before anything heavy is imported
    check_timings(options["timings"], output, inputs, dry_run=options["dry_run"], force=force)
    check_output(output, inputs, resume=resume, force=force)  # before a model of the hub is downloaded
    calibration, machine = calibration_of(options), machine_of(options)
    parse_sources(calibration.sources, calibration.domains)
    quiet_libraries()
    from moepress.stages.profile import profile_estimate, profile_stage

    place = Output(folder=output, resume=resume, force=force)
    measured = {
        "leave_one_out": not options["no_loo"],
        "bit_losses": not options["no_bit_losses"],
        "grid_losses": options["grid_losses"],
    }
    if options["dry_run"]:
        with headers_only():
            found = profile_estimate(model, calibration, machine, output=place, **measured)
        show_estimates({"profile": asdict(found)}, as_json=options["as_json"])
        return
    with timed("profile", options["timings"], device=options["device"]):
        made = profile_stage(model, place, calibration, machine, allow_nonfinite=options["allow_nonfinite"], **measured)
    if options["as_json"]:
        emit({"profile": str(output), "domains": made.domains, "calibration": made.calibration})
    else:
        _print_profile(made, output)


def _print_profile(profile: Profile, folder: Path) -> None:
    """What `profile` saw, in short."""
    console = plain_console()
    calibration = profile.calibration
    table = plain_table("domain", "tokens", "busiest quarter of experts")
    for index, domain in enumerate(profile.domains):
        shares = []
        for layer in profile.layers:
            counts = sorted(profile.statistics[layer]["count"][index].sum(axis=0).tolist(), reverse=True)
            shares.append(sum(counts[: max(1, len(counts) // 4)]) / max(sum(counts), 1))
        tokens = calibration["tokens_per_domain"][domain]
        table.add_row(domain, f"{tokens:,}", f"{sum(shares) / len(shares):.0%} of choices")
    console.print(table)
    if calibration["embedded"]:
        console.print(EMBEDDED_NOTE)
    for note in calibration["notes"]:
        console.print(f"Note: {note}")
    console.print(f"Profile written to {folder}. Next: moepress plan {folder} --keep 0.75 -o plan.json")
