"""`moepress plan-work`: a run of quantize or profile as tasks in a store."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from moepress.commands.console import emit, quiet_libraries, say
from moepress.commands.options import (
    calibration_options,
    json_option,
    machine_options,
    model_argument,
    store_option,
    talk_options,
)
from moepress.commands.quantize import quantize_options, request_of
from moepress.commands.requests import all_default, calibration_of, machine_of, mtp_of
from moepress.errors import UsageError

_QUANTIZE = (
    *("plan_file", "bits", "group_size", "scheme", "grid", "include", "match", "effort", "end_weight", "mtp"),
    *("independent_layers", "positive_scales", "asymmetric"),
)


@click.command("plan-work")
@model_argument()
@store_option
@click.option(
    "--stage",
    type=click.Choice(["quantize", "profile"]),
    default="quantize",
    show_default=True,
    help="What workers are to do: `moepress quantize`, or `moepress profile`.",
)
@quantize_options
@click.option("--no-loo", is_flag=True, help="With --stage profile: leave out leave-one-out losses.")
@click.option("--no-bit-losses", is_flag=True, help="With --stage profile: leave out what bits cost.")
@calibration_options
@machine_options
@talk_options
@json_option
def plan_work(model: str, store: str, stage: str, plan_file: Path | None, **options: Any) -> None:
    """Put the quantizing or profiling of MODEL into a store as small tasks, for workers on any number of machines.

    The options are those of `moepress quantize`. The store is a folder that all workers see, or a bucket by its URL
    (s3://, gs://, az://). Nothing is computed yet but the calibration text's tokens; workers then take tasks with
    `moepress work`, and `moepress status` tells how far they are. The result's bytes do not depend on how many there
    were. With --independent-layers all layers are solved at once; without it the experts of one.

    \b
    Example:  moepress plan-work demo --bits 4 --group-size 64 --store shared
              moepress work --store shared
              moepress work --store shared -o quantized
              moepress plan-work demo --stage profile --store profiling
    """
    from moepress.calibration.sources import parse_sources
    from moepress.stages.places import local_folders, require_file

    local_folders(model)
    if plan_file is not None:
        require_file(plan_file)
    parse_sources(options["calibration"], options["domain"])
    if stage == "profile" and not all_default(*_QUANTIZE):
        raise UsageError("A profile has no bits or plan; with --stage profile leave out what is asked of quantizing.")
    if stage == "quantize" and (options["no_loo"] or options["no_bit_losses"]):
        raise UsageError("--no-loo and --no-bit-losses go with --stage profile.")
    quiet_libraries()
    found = _profile(model, store, options) if stage == "profile" else _quantize(model, store, plan_file, options)
    if options["as_json"]:
        emit(found)
        return
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in found["kinds"].items())
    say(f"{found['store']}: {found['tasks']:,} tasks ({kinds}). Start workers: moepress work --store {found['store']}")


def _quantize(model: str, store: str, plan_file: Path | None, options: Mapping[str, Any]) -> dict[str, Any]:
    from moepress.compress.pruning.plan import load_plan
    from moepress.stages.plan_work import plan_work_stage

    made = load_plan(plan_file) if plan_file else None
    request = request_of(made, options)
    calibration, machine = calibration_of(options), machine_of(options)
    return plan_work_stage(model, store, made, request, calibration, machine, mtp=mtp_of(options))


def _profile(model: str, store: str, options: Mapping[str, Any]) -> dict[str, Any]:
    from moepress.stages.plan_work import plan_profile_stage
    from moepress.stages.sharing.profile import Asked

    asked = Asked(leave_one_out=not options["no_loo"], bit_losses=not options["no_bit_losses"])
    return plan_profile_stage(model, store, asked, calibration_of(options), machine_of(options))
