"""The commands that make something: profile, plan, prune, quantize, export."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from moepress.commands.console import emit, note, quiet_libraries, say, show_estimates, upload
from moepress.commands.options import (
    budget_options,
    calibration_options,
    dry_run_option,
    include_option,
    json_option,
    machine_options,
    match_option,
    model_argument,
    mtp_option,
    nonfinite_option,
    onnx_options,
    output_options,
    push_options,
    repair_option,
    scheme_options,
    selection_options,
    targets_file_option,
    timings_option,
)
from moepress.commands.parsed import (
    all_default,
    calibration_of,
    hessian_of,
    includes_for,
    machine_of,
    mtp_of,
    plan_of,
    push_of,
    repair_of,
)
from moepress.errors import UsageError


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
@nonfinite_option
@timings_option
@dry_run_option
@json_option
def profile(model: str, output: Path, resume: bool, force: bool, **options: Any) -> None:
    """Run MODEL over calibration text and write down how it uses its experts, per domain.

    One pass gives the statistics of every pruning criterion. Profiles of one model can be merged: give several to
    `moepress plan`.

    \b
    Example:  moepress profile demo -o profile
              moepress profile MODEL -o profile --calibration chats.jsonl --domain python=code.txt
    """
    from moepress.commands.printed import print_profile
    from moepress.commands.timings import check_timings, timed
    from moepress.hub.snapshot import headers_only
    from moepress.runs.journal import check_output
    from moepress.stages import groundwork, making

    quiet_libraries()
    inputs = groundwork.local_folders(model)
    check_timings(options["timings"], output, inputs, dry_run=options["dry_run"])
    check_output(output, inputs, resume=resume, force=force)  # before a model of the hub is downloaded
    calibration, machine = calibration_of(options), machine_of(options)
    if options["dry_run"]:
        place = groundwork.Output(folder=output, resume=resume, force=force)
        with headers_only():
            found = making.profile_estimate(
                model,
                calibration,
                machine,
                leave_one_out=not options["no_loo"],
                bit_losses=not options["no_bit_losses"],
                output=place,
            )
        show_estimates({"profile": asdict(found)}, as_json=options["as_json"])
        return
    with timed("profile", options["timings"], device=options["device"]):
        made = making.profile_stage(
            model,
            groundwork.Output(folder=output, resume=resume, force=force),
            calibration,
            machine,
            leave_one_out=not options["no_loo"],
            bit_losses=not options["no_bit_losses"],
            allow_nonfinite=options["allow_nonfinite"],
        )
    if options["as_json"]:
        emit({"profile": str(output), "domains": made.domains, "calibration": made.calibration})
    else:
        print_profile(made, output)


@click.command()
@click.argument("profiles", nargs=-1, required=True, type=click.Path(path_type=Path))
@selection_options
@budget_options
@targets_file_option
@click.option("--no-quantization", is_flag=True, help="Plan for pruning alone.")
@scheme_options
@include_option
@click.option("-o", "--output", type=click.Path(path_type=Path), help="File for the plan, such as plan.json.")
@json_option
def plan(profiles: tuple[Path, ...], output: Path | None, as_json: bool, **options: Any) -> None:
    """Decide from PROFILES which experts stay; print what each domain loses and the size before and after.

    Instant, and pure: the same profile and options give the same plan. The plan is JSON that can be read and edited.
    With --budget or --target it chooses the experts and the bits that lose least, by estimate, and shows what else
    there is.

    \b
    Example:  moepress plan profile --keep 0.75 -o plan.json
              moepress plan profile --experts 8 --domain-weight python=1 --domain-weight german=0 -o plan.json
              moepress plan profile --budget 12GiB -o plan.json
              moepress plan profile --target rtx-4060-ti-16gb --context 8192 -o plan.json
    """
    from moepress.commands.printed import print_plan
    from moepress.runs.journal import write_atomically
    from moepress.stages.making import load_profiles

    if output is not None and (output.is_dir() or not output.resolve().parent.is_dir()):
        raise UsageError(f"-o {output} is not a file in a folder that exists; write for example -o plan.json.")
    seen = load_profiles(profiles)
    made = plan_of(seen, options, quantized=not options["no_quantization"])
    from moepress.compress.pruning.plan import plan_text
    from moepress.validation.rules.check import planned_notes

    note(*planned_notes(made, seen.config))
    if output is not None:
        write_atomically(output, plan_text(made))
    emit(made.model_dump(mode="json")) if as_json else print_plan(made, output)


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
@json_option
def prune(model: str, output: Path, resume: bool, force: bool, plan_file: Path | None, **options: Any) -> None:
    """Rewrite MODEL without the experts that the plan leaves out: byte for byte, in the memory of one tensor.

    --repair runs the original and the pruned model over calibration text and scales what stays, so that each layer's
    output comes nearer to the original's. The options of calibration and machine belong to it.

    \b
    Example:  moepress prune demo --plan plan.json -o pruned
              moepress prune demo --profile profile --keep 0.5 -o pruned
              moepress prune demo --plan plan.json --repair gain -o repaired
    """
    from moepress.commands.timings import check_timings, timed
    from moepress.compress.pruning.plan import load_plan
    from moepress.runs.journal import check_output
    from moepress.stages import groundwork, making

    inputs = groundwork.local_folders(model)
    check_timings(options["timings"], output, inputs, dry_run=options["dry_run"])
    check_output(output, inputs, resume=resume, force=force)  # before a model of the hub is downloaded
    push = push_of(options)
    if (plan_file is None) == (not options["profiles"]):
        raise UsageError("Say what to prune: either --plan plan.json, or --profile PROFILE with --keep or --experts.")
    if plan_file is not None:
        if not all_default("keep", "experts", "criterion", "domain_weight", "groups"):
            raise UsageError("--plan decides what stays; leave out --keep, --experts, --criterion and the like.")
        made = load_plan(plan_file)
    else:
        made = plan_of(making.load_profiles(options["profiles"]), options, quantized=False)
    note(*made.notes)
    place = groundwork.Output(folder=output, resume=resume, force=force)
    if options["repair"] is not None:
        _prune_repaired(model, place, made, push, options)
        return
    if not all_default("calibration", "domain", "tokens", "window", "seed", "device", "dtype", "max_memory"):
        raise UsageError("Pruning alone copies bytes: calibration and machine options go with --repair only.")
    with timed("prune", options["timings"]):
        result = making.prune_stage(
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


def _prune_repaired(model: str, place: Any, plan: Any, push: Any, options: Mapping[str, Any]) -> None:
    from moepress.commands.timings import timed
    from moepress.stages import repair

    quiet_libraries()
    with timed("prune", options["timings"], device=options["device"]):
        result = repair.prune_repaired_stage(
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
    from moepress.commands.printed import human_bytes

    sizes = f"{human_bytes(result['bytes_before'])} -> {human_bytes(result['bytes_after'])}"
    say(f"{output}: {result['experts']} of {result['experts_before']} experts stay, {sizes}")
    if "repair" in result:
        layers = result["repair"]["layers"].values()
        before, after = (sum(row[name] for row in layers) / len(layers) for name in ("error_before", "error_after"))
        say(f"Squared error of the layers' output, mean: {before:.2%} unrepaired, {after:.2%} repaired")


@click.command()
@model_argument()
@output_options("Folder for the quantized model.")
@click.option("--plan", "plan_file", type=click.Path(path_type=Path), help="Prune by this plan, with its bits.")
@scheme_options
@include_option
@match_option
@mtp_option
@click.option("--max-pieces", type=click.IntRange(1), help="Stop after so many new pieces; --resume goes on.")
@calibration_options
@machine_options
@push_options
@timings_option
@dry_run_option
@json_option
def quantize(model: str, output: Path, resume: bool, force: bool, plan_file: Path | None, **options: Any) -> None:
    """Quantize MODEL with GPTQ, pruned by a plan where one is given; the calibration text flows through the pruned,
    already quantized layers.

    The routed experts are quantized, and what --include adds; router, norms, embeddings and what a runtime trips over
    stay as they are. The result is a compressed-tensors folder that transformers and vLLM load.

    A large model may be quantized in several sittings: --max-pieces ends each after so many pieces (of about 256 MiB of
    the result), and the folder appears with the last one.

    \b
    Example:  moepress quantize demo --bits 4 --group-size 64 -o quantized
              moepress quantize MODEL --plan plan.json --include attention --include shared -o pressed
              moepress quantize MODEL --plan plan.json -o pressed --max-pieces 20 --resume
    """
    from moepress.commands.timings import check_timings, timed
    from moepress.compress.pruning.plan import load_plan
    from moepress.converters.safetensors.scheme import Scheme
    from moepress.runs.journal import check_output
    from moepress.stages import groundwork, making

    quiet_libraries()
    inputs = groundwork.local_folders(model)
    check_timings(options["timings"], output, inputs, dry_run=options["dry_run"])
    check_output(output, inputs, resume=resume, force=force)  # before a model of the hub is downloaded
    push = push_of(options)
    made = load_plan(plan_file) if plan_file else None
    scheme = Scheme(bits=options["bits"], group_size=options["group_size"])
    layer_bits: Mapping[int, int] = {}
    if made is not None and made.quantization is not None and all_default("bits", "group_size"):
        scheme, layer_bits = made.quantization.scheme(), made.layer_bits
    elif made is not None and made.layer_bits:
        note("--bits or --group-size was given: the plan's bits by layer are left aside.")
    include, notes = includes_for(made, options)
    note(*notes)
    with timed("quantize", options["timings"], device=options["device"]):
        result = making.quantize_stage(
            model,
            groundwork.Output(folder=output, resume=resume, force=force),
            made,
            making.QuantizeRequest(
                scheme=scheme,
                layer_bits=layer_bits,
                include=include,
                hessian=hessian_of(options, scheme.bits, layer_bits),
            ),
            calibration_of(options),
            machine_of(options),
            mtp=mtp_of(options),
            max_pieces=options["max_pieces"],
            dry_run=options["dry_run"],
        )
    if options["dry_run"]:
        show_estimates({"quantize": result}, as_json=options["as_json"])
        return
    _show_quantized(result, output, as_json=options["as_json"])
    if result["finished"]:
        upload(push, output, model, as_json=options["as_json"])


def _show_quantized(result: Mapping[str, Any], output: Path, *, as_json: bool) -> None:
    if not result["finished"]:
        done = f"{result['pieces_done']} of {result['pieces']} pieces are done"
        note(f"{done}; repeat the command with --resume to go on.")
    if as_json:
        emit(result)
        return
    if not result["finished"]:
        return
    from moepress.commands.printed import print_quantized

    note(*result["notes"], *(f"Calibration: {found}." for found in result["calibration"]["notes"]))
    print_quantized(result, output)


@click.command()
@model_argument("artifact")
@output_options("Folder for the export.")
@click.option(
    "--to", "target", required=True, type=click.Choice(["gptq", "compressed-tensors", "onnx"]), help="The format."
)
@onnx_options
@push_options
@dry_run_option
@json_option
def export(artifact: str, output: Path, resume: bool, force: bool, target: Any, as_json: bool, **options: Any) -> None:
    """Write a quantized ARTIFACT in another format. Codes do not change; nothing is solved again.

    gptq and compressed-tensors take a quantized folder. onnx takes any folder: quantized, pruned, or the original,
    whose experts then stay dense. Its result runs in ONNX Runtime and onnxruntime-genai, and is held against ARTIFACT
    before it appears. --for, --experts, --accuracy-level, --no-check and --dry-run belong to onnx.

    \b
    Example:  moepress export quantized --to gptq -o quantized-gptq
              moepress export quantized --to onnx -o quantized-onnx
              moepress export quantized --to onnx --for cuda -o quantized-onnx-cuda
    """
    from moepress.runs.journal import check_output
    from moepress.stages import export, groundwork

    place = groundwork.Output(folder=output, resume=resume, force=force)
    check_output(output, groundwork.local_folders(artifact), resume=resume, force=force)
    push = push_of(options)
    if target == "onnx":
        _export_onnx(artifact, place, push, options, as_json=as_json)
        return
    if not all_default("preset", "kernel", "accuracy_level", "no_check", "dry_run"):
        raise UsageError("--for, --experts, --accuracy-level, --no-check and --dry-run go with --to onnx only.")
    result = export.export_stage(artifact, place, target)
    note(*result.notes)
    if as_json:
        emit({"output": str(output), **asdict(result)})
    else:
        from moepress.commands.printed import human_bytes

        say(f"{output}: {result.modules} matrices in {target} layout, {human_bytes(result.bytes_after)}")
    upload(push, output, artifact, as_json=as_json)


def _export_onnx(artifact: str, place: Any, push: Any, options: Mapping[str, Any], *, as_json: bool) -> None:
    from moepress.commands.parsed import onnx_of
    from moepress.commands.printed import print_onnx
    from moepress.stages import export

    quiet_libraries()
    request = onnx_of(options)
    if options["dry_run"]:
        emit(export.onnx_estimate(artifact, place, request))
        return
    result = export.onnx_stage(artifact, place, request, check=not options["no_check"])
    note(*result.notes)
    emit({"output": str(place.folder), **asdict(result)}) if as_json else print_onnx(result, place.folder)
    upload(push, place.folder, artifact, as_json=as_json)
