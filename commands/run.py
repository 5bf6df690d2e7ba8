"""`moepress run`: the command, and its options as values of a recipe."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from moepress.commands.completers import complete_list
from moepress.commands.console import emit, note, quiet_libraries, show_estimates, show_report, upload
from moepress.commands.generation_options import check_prompt_files, generation_options
from moepress.commands.options import (
    NOTHING,
    asymmetric_option,
    budget_options,
    calibration_options,
    dry_run_option,
    effort_option,
    end_weight_option,
    evaluation_options,
    float_option,
    grid_option,
    include_option,
    json_option,
    machine_options,
    match_option,
    model_argument,
    mtp_option,
    output_options,
    parse_weights,
    positive_option,
    protected_names,
    push_options,
    repair_option,
    scheme_options,
    selection_options,
    talk_options,
    targets_file_option,
    task_options,
    timings_option,
    workers_option,
)
from moepress.commands.requests import all_default, asked_of, push_of, repair_of, task_values, thresholds_of
from moepress.errors import UsageError
from moepress.runs.byte_sizes import parse_bytes

_RECIPE_OPTIONS = (
    *(
        "keep",
        "experts",
        "criterion",
        "groups",
        "bits",
        "group_size",
        "scheme",
        "grid",
        "include",
        "match",
        "effort",
        "end_weight",
        "mtp",
    ),
    *("positive_scales", "asymmetric", "max_domain_loss"),
    *("target", "context", "mixed_bits", "runtime"),
    *("calibration", "domain", "tokens", "window", "seed"),
    *("data", "data_domain", "max_windows", "device", "dtype"),
    *("generations", "prompts", "max_new_tokens", "temperature", "generation_seed"),
)


@click.command()
@model_argument(required=False)
@output_options("Folder for the run: model/, exports/, profile/, plan.json, report.html, ...")
@click.option(
    "--recipe", "recipe_file", type=click.Path(path_type=Path), help="A YAML recipe; options given here win over it."
)
@selection_options
@budget_options
@targets_file_option
@repair_option
@scheme_options
@float_option
@grid_option
@include_option
@match_option
@effort_option
@end_weight_option
@positive_option
@asymmetric_option
@mtp_option
@calibration_options
@evaluation_options
@task_options
@generation_options
@click.option(
    "--to",
    "formats",
    shell_complete=complete_list("gptq", "onnx", "gguf"),
    help="Further formats, with commas between them: gptq, onnx, gguf.",
)
@machine_options
@workers_option
@push_options
@timings_option
@dry_run_option
@talk_options
@json_option
def run(model: str | None, output: Path, resume: bool, force: bool, recipe_file: Path | None, **options: Any) -> None:
    """The whole job: profile, plan, quantize, export, validate, report. `run demo` shows it on the embedded model.

    Without --keep and --experts, three quarters of the experts stay; with --budget or --target experts and bits are
    chosen so that the result fits at the least estimated loss. With --to gguf alone, and no --bits or --include, that
    is a mix of GGUF's types by measured damage. OUT/recipe.yaml holds all that was used.

    \b
    Example:  moepress run demo -o out --keep 0.75 --bits 4
              moepress run MODEL -o out --calibration my-text/ --keep 0.5 --to gptq,onnx --max-ppl-increase 5%
              moepress run MODEL -o out --calibration my-text/ --target rtx-4060-ti-16gb --context 8192
              moepress run MODEL -o out --calibration my-text/ --scheme nvfp4
              moepress run MODEL -o out --calibration my-text/ --grid Q4_K_M --to gguf
              moepress run MODEL -o out --calibration my-text/ --budget 12GiB --to gguf
              moepress run --recipe out/recipe.yaml -o again
    """
    from moepress.commands.timings import check_timings, timed
    from moepress.hub.snapshot import headers_only
    from moepress.runs.output import check_output

    values = _values(model, recipe_file, options)
    quiet_libraries()
    from moepress.stages.places import local_folders
    from moepress.stages.run.dry_run import estimate_recipe
    from moepress.stages.run.recipe import check_recipe, make_recipe, runtime_notes
    from moepress.stages.run.run import run_recipe

    recipe = make_recipe(values)
    inputs = local_folders(recipe.model)
    check_timings(options["timings"], output, inputs, dry_run=options["dry_run"], force=force)
    check_output(output, inputs, resume=resume, force=force, in_place=True)
    push = push_of(options)
    with headers_only():
        note(*runtime_notes(recipe))
        if options["dry_run"]:
            found = estimate_recipe(recipe, output, resume=resume)
            emit(found.plain()) if options["as_json"] else show_estimates(found.stages, as_json=False)
            return
        if not inputs:
            check_recipe(recipe)  # all that can be refused is, before a model of the hub is downloaded
    with timed("run", options["timings"], device=recipe.device):
        report = run_recipe(recipe, output, resume=resume, force=force, workers=options["workers"])
    if push is not None and any(outcome.state == "missed" for outcome in report.thresholds):
        note(f"Nothing is pushed to {push.repo}, for a threshold was missed.")
    show_report(report, output, as_json=options["as_json"])
    upload(push, output / "model", recipe.model, as_json=options["as_json"])


def _values(model: str | None, recipe_file: Path | None, options: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe's values and those given here, which win; wrong paths among them are refused, and nothing heavy is
    imported.
    """
    from moepress.calibration.sources import parse_sources
    from moepress.stages.places import local_folders
    from moepress.stages.run.recipe_file import load_recipe
    from moepress.validation.tasks.names import check_names

    values = load_recipe(recipe_file) if recipe_file else {}
    values |= _recipe_values(options) | ({"model": model} if model else {})
    if "model" not in values:
        raise UsageError("Say which model: moepress run MODEL -o OUT, or a recipe that names one.")
    if isinstance(values["model"], str):  # anything else is wrong, and a recipe's own check says so
        local_folders(values["model"])
    parse_sources(options["calibration"], options["domain"])
    parse_sources(options["data"], options["data_domain"])
    if values.get("tasks"):
        check_names([name for name in values["tasks"] if isinstance(name, str)], local_folders(str(values["model"])))
    check_prompt_files(options["prompts"])
    return values


def _recipe_values(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that were really given on the command line, as recipe values."""
    values = {name: options[name] for name in _RECIPE_OPTIONS if not all_default(name)}
    if "keep" in values and "experts" not in values:
        values["experts"] = None
    if "experts" in values and "keep" not in values:
        values["keep"] = None
    values |= _part_values(options)
    for name, parsed in (("domain_weight", parse_weights), ("protect", protected_names), ("targets_file", str)):
        if not all_default(name):
            values[name] = parsed(options[name])
    if not all_default("repair"):
        values["repair"] = sorted(repair_of(options))
    if not all_default("formats"):
        values["to"] = _formats(options["formats"])
    if not all_default("no_throughput"):
        values["throughput"] = not options["no_throughput"]
    for name, option in (("max_memory", "--max-memory"), ("budget", "--budget")):
        if not all_default(name):
            values[name] = parse_bytes(options[name], option)
    return values | thresholds_of(options) | task_values(options)


def _part_values(options: Mapping[str, Any]) -> dict[str, Any]:
    """What --include and --bits say of parts; a recipe's word for nothing is a list that is empty."""
    found: dict[str, Any] = {}
    if not all_default("include"):
        asked_of(options)
        found["include"] = tuple(name for name in options["include"] if name != NOTHING)
    return found | ({"part_bits": options["part_bits"]} if options["part_bits"] else {})


def _formats(text: str) -> list[str]:
    found = [part.strip() for part in text.split(",") if part.strip()]
    for target in found:
        if target not in ("gptq", "onnx", "gguf"):
            raise UsageError(
                f"--to {target} is not there; run exports to gptq, onnx and gguf, beside compressed-tensors."
            )
    return list(dict.fromkeys(found))
