"""`moepress quantize`: the command, and what it made as a table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from moepress.commands.console import emit, note, quiet_libraries, show_estimates, upload
from moepress.commands.options import (
    asymmetric_option,
    calibration_options,
    dry_run_option,
    effort_option,
    end_weight_option,
    float_option,
    grid_option,
    include_option,
    independent_option,
    json_option,
    machine_options,
    match_option,
    model_argument,
    mtp_option,
    output_options,
    positive_option,
    push_options,
    scheme_options,
    talk_options,
    timings_option,
    workers_option,
)
from moepress.commands.requests import (
    all_default,
    asked_of,
    calibration_of,
    floats_of,
    machine_of,
    mtp_of,
    names_parts,
    push_of,
)
from moepress.commands.tables import EMBEDDED_NOTE, human_bytes, plain_console, plain_table
from moepress.errors import UsageError

if TYPE_CHECKING:
    from moepress.calibration.hessian import HessianOptions
    from moepress.compress.gptq.include import Asked
    from moepress.compress.pruning.plan import Plan
    from moepress.stages.quantize import By, QuantizeRequest


def quantize_options(function: Any) -> Any:
    """What is asked of quantizing, whoever does it: the plan, codes, Hessians."""
    plan = click.option(
        "--plan",
        "plan_file",
        type=click.Path(path_type=Path),
        help="Prune by this plan, with its bits unless --grid is given.",
    )
    options = (
        plan,
        scheme_options,
        float_option,
        grid_option,
        include_option,
        match_option,
        effort_option,
        end_weight_option,
        independent_option,
        positive_option,
        asymmetric_option,
        mtp_option,
    )
    for option in reversed(options):
        function = option(function)
    return function


@click.command()
@model_argument()
@output_options("Folder for the quantized model.")
@quantize_options
@workers_option
@click.option("--max-pieces", type=click.IntRange(1), help="Stop after so many new pieces; --resume goes on.")
@calibration_options
@machine_options
@push_options
@timings_option
@dry_run_option
@talk_options
@json_option
def quantize(model: str, output: Path, resume: bool, force: bool, plan_file: Path | None, **options: Any) -> None:
    """Quantize MODEL with GPTQ, pruned by a plan where one is given; the calibration text flows through the pruned,
    already quantized layers.

    The routed experts are quantized, attention, shared experts and dense MLPs at 8 bits unless --include says
    otherwise; router, norms, embeddings, lm_head and what a runtime trips over stay as they are. The result is a
    compressed-tensors folder that transformers and vLLM load; with --asymmetric its experts load in vLLM at 4 bits and
    not in transformers.

    A large model may be quantized in several sittings: --max-pieces ends each after so many pieces (of about 256 MiB of
    the result), and the folder appears with the last one.

    \b
    Example:  moepress quantize demo --bits 4 --group-size 64 -o quantized
              moepress quantize MODEL --plan plan.json --bits 4,attention=8,shared=4 -o pressed
              moepress quantize MODEL --plan plan.json -o pressed --max-pieces 20 --resume
              moepress quantize MODEL --grid Q4_K_M -o blocks
              moepress quantize MODEL --scheme nvfp4 -o floats
    """
    from moepress.calibration.sources import parse_sources
    from moepress.commands.timings import check_timings, timed
    from moepress.runs.output import check_output
    from moepress.stages.places import Output, local_folders, require_file

    inputs = local_folders(model)  # wrong paths are refused before anything heavy is imported
    check_timings(options["timings"], output, inputs, dry_run=options["dry_run"], force=force)
    check_output(output, inputs, resume=resume, force=force)  # before a model of the hub is downloaded
    if plan_file is not None:
        require_file(plan_file)
    parse_sources(options["calibration"], options["domain"])
    push = push_of(options)
    quiet_libraries()
    from moepress.compress.pruning.plan import load_plan
    from moepress.stages.quantize import quantize_stage

    made = load_plan(plan_file) if plan_file else None
    request = request_of(made, options)
    with timed("quantize", options["timings"], device=options["device"]):
        result = quantize_stage(
            model,
            Output(folder=output, resume=resume, force=force),
            made,
            request,
            calibration_of(options),
            machine_of(options),
            mtp=mtp_of(options),
            max_pieces=options["max_pieces"],
            dry_run=options["dry_run"],
            by=_by(model, options),
        )
    if options["dry_run"]:
        show_estimates({"quantize": result}, as_json=options["as_json"])
        return
    _show_quantized(result, output, as_json=options["as_json"])
    if result["finished"]:
        upload(push, output, model, as_json=options["as_json"])


def _by(model: str, options: Mapping[str, Any]) -> By | None:
    """Who does the work.

    Raises:
        UsageError: it is to be done in sittings too.
    """
    if options["workers"] is None:
        return None
    if options["max_pieces"] is not None:
        raise UsageError("--max-pieces is for one process; leave it out with --workers, which can be stopped any time.")
    from moepress.stages.workers import by_workers

    return by_workers(options["workers"], machine_of(options), model, calibration_of(options).seed)


def request_of(plan: Plan | None, options: Mapping[str, Any]) -> QuantizeRequest:
    """What is asked of `quantize`: the plan's bits and parts, unless options name others, of which a note tells."""
    from moepress.compress.gptq.options import solver_of
    from moepress.converters.safetensors.scheme import Scheme
    from moepress.stages.quantize import QuantizeRequest

    named = options["scheme"] or _floats_in(plan)
    if named is not None:
        return _of_floats(plan, named, options)
    if options["grid"] is not None or (plan is not None and plan.grids):
        return _on_blocks(plan, options)
    scheme = Scheme(bits=options["bits"], group_size=options["group_size"])
    layer_bits: Mapping[int, int] = {}
    if plan is not None and plan.quantization is not None and all_default("bits", "group_size"):
        scheme, layer_bits = plan.quantization.scheme(), plan.layer_bits
    elif plan is not None and plan.layer_bits:
        note("--bits or --group-size was given: the plan's bits by layer are left aside.")
    if options["asymmetric"]:
        if plan is not None and plan.budget is not None:
            raise UsageError("The plan fits its budget with codes without zero points; leave --asymmetric out here.")
        scheme = replace(scheme, symmetric=False)
    asked, notes = _asked_for(plan, options)
    note(*notes)
    return QuantizeRequest(
        scheme=scheme,
        layer_bits=layer_bits,
        include=asked.parts,
        auto=asked.auto,
        hessian=_hessian_of(options, scheme.bits, layer_bits),
        solver=solver_of(options["effort"], positive=options["positive_scales"]),
    )


def _floats_in(plan: Plan | None) -> str | None:
    """The format of 4-bit floats that a plan names."""
    planned = None if plan is None else plan.quantization
    return planned.codes.value if planned is not None and planned.floats else None


def _of_floats(plan: Plan | None, named: str, options: Mapping[str, Any]) -> QuantizeRequest:
    """What is asked of `quantize --scheme`, or of a plan that names such a format.

    Raises:
        UsageError: what else is given says something of codes too, or the plan has chosen them.
    """
    from moepress.compress.gptq.options import solver_of
    from moepress.stages.quantize import QuantizeRequest

    scheme = floats_of(options, named, floats="--scheme" if options["scheme"] else f"this plan's {named}")
    if plan is not None and (plan.grids or plan.budget is not None):
        raise UsageError(
            "The plan has chosen other codes than --scheme has, to fit its budget; plan again with --keep or --experts."
        )
    if plan is not None and plan.quantization is not None and plan.quantization.codes != named:
        note("--scheme was given: the plan's bits are left aside.")
    asked, notes = _asked_for(plan, options)
    note(*notes)
    return QuantizeRequest(
        scheme=scheme,
        include=asked.parts,
        auto=asked.auto,
        hessian=_hessian_of(options, scheme.bits, {}),
        solver=solver_of(options["effort"]),
    )


def _on_blocks(plan: Plan | None, options: Mapping[str, Any]) -> QuantizeRequest:
    """What is asked of `quantize --grid`, or of a plan that has chosen types; bits by layer are of another kind.

    Raises:
        UsageError: bits or groups are given besides, or a grid and a plan that fits its budget with others.
    """
    from moepress.compress.gptq.block_choice import PLANNED, nearest_scheme
    from moepress.compress.gptq.options import solver_of
    from moepress.stages.quantize import QuantizeRequest

    if not all_default("bits", "group_size"):
        what = "--grid, which says both" if options["grid"] else "this plan, which has chosen types of GGUF"
        raise UsageError(f"--bits and --group-size do not go with {what}.")
    if options["positive_scales"] or options["asymmetric"]:
        named = "--positive-scales" if options["positive_scales"] else "--asymmetric"
        raise UsageError(f"{named} is for codes of integers; GGUF's types say themselves what scales are.")
    if plan is not None and plan.budget is not None and options["grid"]:
        raise UsageError(
            "The plan fits its budget with other bits than --grid has; plan again with --keep or --experts."
        )
    if plan is not None and plan.quantization is not None:
        note("--grid was given: the plan's bits are left aside.")
    mix = () if plan is None or options["grid"] else plan.grids
    if mix and names_parts(options):
        raise UsageError("--include does not go with this plan, which has chosen a type of GGUF for every matrix.")
    scheme = nearest_scheme(options["grid"] or PLANNED, mix)
    asked, notes = _asked_for(plan, options)
    note(*notes)
    return QuantizeRequest(
        scheme=scheme,
        include=asked.parts,
        auto=asked.auto and not mix,
        hessian=_hessian_of(options, scheme.bits, {}),
        solver=solver_of(options["effort"]),
        grid=options["grid"] or PLANNED,
        mix=mix,
    )


def _show_quantized(result: Mapping[str, Any], output: Path, *, as_json: bool) -> None:
    if not result["finished"]:
        done = f"{result['pieces_done']} of {result['pieces']} pieces are done"
        note(f"{done}; repeat the command with --resume to go on.")
    if as_json:
        emit(result)
        return
    if not result["finished"]:
        return
    note(*result["notes"], *(f"Calibration: {found}." for found in result["calibration"]["notes"]))
    _print_quantized(result, output)


def _asked_for(plan: Plan | None, options: Mapping[str, Any]) -> tuple[Asked, list[str]]:
    """What `quantize` adds to the experts: the plan's parts, unless options name others; and what to say of that.

    Raises:
        UsageError: less is included than the plan's budget counts on.
    """
    from moepress.compress.gptq.include import Asked, included

    if plan is None or (plan.quantization is None and not plan.grids):
        return asked_of(options), []
    planned = Asked(parts=included(plan.included))
    if not names_parts(options) or asked_of(options) == planned:
        return planned, []
    given = asked_of(options)
    if plan.budget is None and not plan.include:
        return given, []
    text = " ".join(f"--include {part}" for part in plan.include) or "--include none"
    less = {part for part in plan.include if given.parts.get(part, 99) != plan.included[part]}
    if plan.budget is not None and (less or given.auto):
        raise UsageError(f"The plan fits its budget with {text}; leave --include out here, or plan again with it.")
    return given, [f"The plan was made for {text}: the sizes that it states are not those of this result."]


def _hessian_of(options: Mapping[str, Any], bits: int, layer_bits: Mapping[int, int]) -> HessianOptions:
    """How tokens are weighed in Hessians, with the targets that --match names for so many bits."""
    from moepress.calibration.hessian import hessian_for

    found = hessian_for(options["match"], bits, layer_bits, options["effort"], options["end_weight"])
    return replace(found, independent=options["independent_layers"])


def _print_quantized(result: Mapping[str, Any], folder: Path) -> None:
    """What `quantize` made."""
    from moepress.compress.gptq.include import included_of
    from moepress.compress.gptq.layer_bits import bits_text

    console = plain_console()
    scheme = result["scheme"]
    bits = bits_text(result.get("layer_bits", {"": scheme["bits"]}).values(), included_of(result))
    zeros = "" if scheme.get("symmetric", True) else " with zero points"
    text = scheme.get("grid") or scheme.get("codes") or f"{bits} g{scheme['group_size']}{zeros}"
    before, after = result["bytes_before"], result["bytes_after"]
    console.print(f"{folder}: {text}, {human_bytes(before)} -> {human_bytes(after)} ({after / before - 1:+.0%})")
    table = plain_table("layer", "relative error")
    for layer, error in result["layer_error"].items():
        table.add_row(layer, f"{error:.3%}")
    console.print(table)
    for title, key in (
        ("saw no token and use the pooled Hessian", "experts_without_tokens"),
        ("were rounded to nearest", "experts_rounded"),
    ):
        found = sum(map(len, result[key].values()))
        if found:
            console.print(f"Note: {found} experts {title}.")
    if result["calibration"]["embedded"]:
        console.print(EMBEDDED_NOTE)
