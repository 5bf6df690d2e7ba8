"""`moepress prune`: the command, and what it made in two sentences."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from moepress.commands.console import emit, note, quiet_libraries, say, show_estimates, upload
from moepress.commands.options import (
    calibration_options,
    dry_run_option,
    json_option,
    machine_options,
    model_argument,
    mtp_option,
    nonfinite_option,
    output_options,
    push_options,
    repair_option,
    selection_options,
    talk_options,
    timings_option,
)
from moepress.commands.requests import all_default, calibration_of, machine_of, mtp_of, plan_of, push_of, repair_of
from moepress.commands.tables import human_bytes
from moepress.errors import UsageError

if TYPE_CHECKING:
    from moepress.compress.pruning.plan import Plan
    from moepress.stages.places import Output
    from moepress.stages.push import Push


@click.command()
@model_argument()
@output_options("Folder for the pruned model.")
@click.option("--plan", "plan_file", type=click.Path(path_type=Path), help="A plan made by `moepress plan`.")
@click.option("--profile", "profiles", multiple=True, type=click.Path(path_type=Path), help="Plan from this profile.")
@selection_options
@repair_option
@calibration_options
@machine_options
@mtp_option
@nonfinite_option
@push_options
@timings_option
@dry_run_option
@talk_options
@json_option
def prune(model: str, output: Path, resume: bool, force: bool, plan_file: Path | None, **options: Any) -> None:
    """Rewrite MODEL without the experts that the plan leaves out: byte for byte, in the memory of one tensor.

    --repair runs the original and the pruned model over calibration text and mends what stays, so that each layer's
    output comes nearer to the original's. The options of calibration and machine belong to it.

    \b
    Example:  moepress prune demo --plan plan.json -o pruned
              moepress prune demo --profile profile --keep 0.5 -o pruned
              moepress prune demo --plan plan.json --repair gain -o repaired
    """
    from moepress.commands.timings import check_timings, timed
    from moepress.runs.output import check_output
    from moepress.stages.places import Output, local_folders

    inputs = local_folders(model)  # wrong paths are refused before anything heavy is imported
    check_timings(options["timings"], output, inputs, dry_run=options["dry_run"], force=force)
    check_output(output, inputs, resume=resume, force=force)  # before a model of the hub is downloaded
    _check_choice(plan_file, options)
    push = push_of(options)
    made = _plan(plan_file, options)
    note(*made.notes)
    place = Output(folder=output, resume=resume, force=force)
    if options["repair"] is not None:
        _prune_repaired(model, place, made, push, options)
        return
    if not all_default("calibration", "domain", "tokens", "window", "seed", "device", "dtype", "max_memory"):
        raise UsageError("Pruning alone copies bytes: calibration and machine options go with --repair only.")
    from moepress.stages.prune import prune_stage

    with timed("prune", options["timings"]):
        result = prune_stage(
            model,
            place,
            made,
            mtp=mtp_of(options),
            allow_nonfinite=options["allow_nonfinite"],
            dry_run=options["dry_run"],
        )
    if options["dry_run"]:
        show_estimates({"prune": result}, as_json=options["as_json"])
        return
    _show_pruned(result, output, options)
    upload(push, output, model, as_json=options["as_json"])


def _check_choice(plan_file: Path | None, options: Mapping[str, Any]) -> None:
    """Refuse what does not say what to prune, and files that are not there; imports nothing heavy."""
    from moepress.stages.places import require_file, require_profiles

    if (plan_file is None) == (not options["profiles"]):
        raise UsageError("Say what to prune: either --plan plan.json, or --profile PROFILE with --keep or --experts.")
    if plan_file is None:
        require_profiles(options["profiles"])
        return
    if not all_default("keep", "experts", "criterion", "domain_weight", "protect", "max_domain_loss", "groups"):
        raise UsageError("--plan decides what stays; leave out --keep, --experts, --criterion and the like.")
    require_file(plan_file)


def _plan(plan_file: Path | None, options: Mapping[str, Any]) -> Plan:
    """The plan of --plan, or one made of the profiles."""
    if plan_file is not None:
        from moepress.compress.pruning.plan import load_plan

        return load_plan(plan_file)
    from moepress.stages.plan import load_profiles

    return plan_of(load_profiles(options["profiles"]), options, quantized=False)


def _prune_repaired(model: str, place: Output, plan: Plan, push: Push | None, options: Mapping[str, Any]) -> None:
    from moepress.commands.timings import timed

    quiet_libraries()
    from moepress.stages.repair import prune_repaired_stage

    with timed("prune", options["timings"], device=options["device"]):
        result = prune_repaired_stage(
            model,
            place,
            plan,
            repair_of(options),
            calibration_of(options),
            machine_of(options),
            mtp=mtp_of(options),
            allow_nonfinite=options["allow_nonfinite"],
            dry_run=options["dry_run"],
        )
    if not options["dry_run"]:
        _show_pruned(result, place.folder, options)
        upload(push, place.folder, model, as_json=options["as_json"])
    elif options["as_json"]:
        emit(result)
    else:
        show_estimates(result, as_json=False)


def _show_pruned(result: Mapping[str, Any], output: Path, options: Mapping[str, Any]) -> None:
    if options["as_json"]:
        emit(result)
        return
    note(*result["notes"])
    sizes = f"{human_bytes(result['bytes_before'])} -> {human_bytes(result['bytes_after'])}"
    say(f"{output}: {result['experts']} of {result['experts_before']} experts stay, {sizes}")
    if "repair" in result:
        layers = result["repair"]["layers"].values()
        before, after = (sum(row[name] for row in layers) / len(layers) for name in ("error_before", "error_after"))
        say(f"Squared error of the layers' output, mean: {before:.2%} unrepaired, {after:.2%} repaired")
        refitted = [row["router"] for row in layers if row["router"] is not None]
        if refitted:
            taken = sum(row["sha256"] is not None for row in refitted)
            say(f"Routers: refitted in {taken} of {len(refitted)} layers; in the others it lowered no error")
        downs = [row["down"] for row in layers if row["down"] is not None]
        if downs:
            taken, of = sum(row["taken"] for row in downs), result["experts"] * len(downs)
            say(f"Down projections: {taken} of {of} refitted; the others lowered no error")
