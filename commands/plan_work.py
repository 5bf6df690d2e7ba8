"""`moepress plan-work`: a run of quantize as tasks in a store."""

from __future__ import annotations

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
from moepress.commands.requests import calibration_of, machine_of, mtp_of


@click.command("plan-work")
@model_argument()
@store_option
@quantize_options
@calibration_options
@machine_options
@talk_options
@json_option
def plan_work(model: str, store: str, plan_file: Path | None, **options: Any) -> None:
    """Put the quantizing of MODEL into a store as small tasks, for workers on any number of machines.

    The options are those of `moepress quantize`. The store is a folder that all workers see, or a bucket by its URL
    (s3://, gs://, az://). Nothing is computed yet but the calibration text's tokens; workers then take tasks with
    `moepress work`, and `moepress status` tells how far they are. The result's bytes do not depend on how many there
    were. With --independent-layers all layers are solved at once; without it the experts of one.

    \b
    Example:  moepress plan-work demo --bits 4 --group-size 64 --store shared
              moepress work --store shared
              moepress work --store shared -o quantized
    """
    from moepress.calibration.sources import parse_sources
    from moepress.stages.places import local_folders, require_file

    local_folders(model)
    if plan_file is not None:
        require_file(plan_file)
    parse_sources(options["calibration"], options["domain"])
    quiet_libraries()
    from moepress.compress.pruning.plan import load_plan
    from moepress.stages.plan_work import plan_work_stage

    made = load_plan(plan_file) if plan_file else None
    request = request_of(made, options)
    found = plan_work_stage(
        model, store, made, request, calibration_of(options), machine_of(options), mtp=mtp_of(options)
    )
    if options["as_json"]:
        emit(found)
        return
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in found["kinds"].items())
    say(f"{found['store']}: {found['tasks']:,} tasks ({kinds}). Start workers: moepress work --store {found['store']}")
