"""The command line: parse, call one function, print. Everything heavy is imported inside the commands."""

import json
import os
import shlex
import signal
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

import click

from moepress import __version__
from moepress.errors import MoepressError, ThresholdMissedError, UsageError
from moepress.options import (
    calibration_options,
    device_options,
    dry_run_option,
    evaluation_options,
    include_option,
    json_option,
    machine_options,
    mtp_option,
    nonfinite_option,
    onnx_options,
    output_options,
    scheme_options,
    selection_options,
)
from moepress.parsed import (
    all_default,
    calibration_of,
    evaluation_of,
    includes_of,
    machine_of,
    mtp_of,
    plan_of,
    recipe_values,
)

INTERRUPTED = 130


@click.group(context_settings={"help_option_names": ["-h", "--help"], "show_default": True, "max_content_width": 100})
@click.version_option(__version__, "-V", "--version", prog_name="moepress")
def cli() -> None:
    """Press Mixture-of-Experts language models: measure which experts your text uses, prune the others, quantize
    what stays with GPTQ, export, and prove what it cost.

    \b
    The whole job in one command (`demo` is a small model that comes with moepress):
      moepress run demo -o out --keep 0.75 --bits 4
    \b
    The same, stage by stage:
      moepress inspect MODEL
      moepress profile MODEL -o profile --calibration my-text.jsonl
      moepress plan profile --keep 0.75 --bits 4 -o plan.json
      moepress quantize MODEL --plan plan.json -o pressed
      moepress validate MODEL pressed
      moepress export pressed --to gptq -o pressed-gptq

    MODEL is the folder of a Hugging Face model. Models never have to fit into memory. Interrupted runs go on with
    --resume. Exit codes: 0 ok, 2 wrong use, 3 a threshold was missed, 4 invalid input, 5 unsupported, 6 output in
    use, 130 interrupted.
    """


def main() -> NoReturn:
    """Run the command line and exit with its code; known errors become one line on stderr."""
    # Threads that spin while they wait make torch several times slower where other work shares the cores (CI, laptops).
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    for name in ("SIGTERM", "SIGHUP"):  # Windows has no SIGHUP
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores SIGHUP on purpose
            signal.signal(number, _interrupt)
    try:
        code = cli.main(standalone_mode=False)
    except MoepressError as error:
        _fail(str(error), error.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        _fail("Interrupted. What is finished is kept; repeat the command with --resume to go on.", INTERRUPTED)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(0)
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's, which is not imported here
            raise
        _fail("The device ran out of memory; give a smaller --max-memory and repeat with --resume or --force.", 1)
    except OSError as error:
        _fail(f"{error.filename or 'The system'}: {error.strerror or error}. Mend it and repeat with --resume.", 1)
    sys.exit(code if isinstance(code, int) else 0)


def _interrupt(_number: int, _frame: Any) -> None:
    raise KeyboardInterrupt


def _fail(message: str, code: int) -> NoReturn:
    click.echo(f"Error: {message}" if code != INTERRUPTED else message, err=True)
    sys.exit(code)


def _emit(data: Mapping[str, Any]) -> None:
    click.echo(json.dumps(data, indent=2, default=str, ensure_ascii=False))


def _note(*notes: str) -> None:
    for note in notes:
        click.echo(f"Note: {note}", err=True)


def _show_estimates(estimates: Mapping[str, Any], *, as_json: bool) -> None:
    """What a dry run found: a table, or as JSON the one estimate of a stage."""
    if as_json:
        _emit(next(iter(estimates.values())))
        return
    from moepress.printed_inspection import print_estimates

    print_estimates(estimates)


def _quiet_libraries() -> None:
    """No banners or bars of the libraries below; ours are on stderr."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


@cli.command()
@click.argument("model")
@click.option("--tokens", type=click.IntRange(1), help="Calibration tokens to plan for.  [default: 131072]")
@click.option(
    "--context", type=click.IntRange(1), help="Tokens in the KV cache.  [default: 8192, or the model's context]"
)
@json_option
def inspect(model: str, tokens: int | None, context: int | None, as_json: bool) -> None:
    """Tell what MODEL is and what pressing it takes: family, experts, sizes by part, the expert counts that can stay
    and those to try first, time, memory and disk on this machine, and which GPU holds the result.

    Reads headers, and some weights to time the disk; writes nothing. All times are projected.

    \b
    Example:  moepress inspect demo
              moepress inspect MODEL --tokens 262144 --context 32768
    """
    from moepress.inspection import inspect_model
    from moepress.printed_inspection import print_inspection

    _quiet_libraries()
    found = inspect_model(model, tokens=tokens, context=context)
    _emit(found) if as_json else print_inspection(found)


@cli.command()
@json_option
def doctor(as_json: bool) -> None:
    """Tell what is installed, what ONNX Runtime's sessions really run on, devices and free disk, and what to mend.

    Ends with 5 when two ONNX Runtime packages clash or what is installed of it cannot be used, else with 0.

    \b
    Example:  moepress doctor --json
    """
    from moepress.doctor import diagnose, print_diagnosis
    from moepress.errors import UnsupportedError

    found = diagnose(Path.cwd())
    _emit(asdict(found)) if as_json else print_diagnosis(found)
    _note(*found.notes)
    for problem in found.problems:
        if problem not in found.clashes:
            click.echo(f"Problem: {problem}", err=True)
    if found.clashes:
        raise UnsupportedError(" ".join(found.clashes))


@cli.command()
@click.argument("model")
@output_options("Folder for the profile.")
@calibration_options
@machine_options
@click.option("--no-loo", is_flag=True, help="Leave out leave-one-out losses: 1/K less compute, no `loo` criterion.")
@nonfinite_option
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
    from moepress import stages
    from moepress.journal import check_output
    from moepress.printed import print_profile

    _quiet_libraries()
    calibration, machine = calibration_of(options), machine_of(options)
    if options["dry_run"]:
        check_output(output, [stages.model_folder(model)], resume=resume, force=force)
        found = stages.profile_estimate(model, calibration, machine, leave_one_out=not options["no_loo"])
        _show_estimates({"profile": asdict(found)}, as_json=options["as_json"])
        return
    made = stages.profile_stage(
        model,
        stages.Output(folder=output, resume=resume, force=force),
        calibration,
        machine,
        leave_one_out=not options["no_loo"],
        allow_nonfinite=options["allow_nonfinite"],
    )
    if options["as_json"]:
        _emit({"profile": str(output), "domains": made.domains, "calibration": made.calibration})
    else:
        print_profile(made, output)


@cli.command()
@click.argument("profiles", nargs=-1, required=True, type=click.Path(path_type=Path))
@selection_options
@click.option("--no-quantization", is_flag=True, help="Plan for pruning alone.")
@scheme_options
@click.option("-o", "--output", type=click.Path(path_type=Path), help="File for the plan, such as plan.json.")
@json_option
def plan(profiles: tuple[Path, ...], output: Path | None, as_json: bool, **options: Any) -> None:
    """Decide from PROFILES which experts stay; print what each domain loses and the size before and after.

    Instant, and pure: the same profile and options give the same plan. The plan is JSON that can be read and edited.

    \b
    Example:  moepress plan profile --keep 0.75 -o plan.json
              moepress plan profile --experts 8 --domain-weight python=1 --domain-weight german=0 -o plan.json
    """
    from moepress.journal import write_atomically
    from moepress.printed import print_plan
    from moepress.stages import load_profiles

    if output is not None and (output.is_dir() or not output.resolve().parent.is_dir()):
        raise UsageError(f"-o {output} is not a file in a folder that exists; write for example -o plan.json.")
    made = plan_of(load_profiles(profiles), options, quantized=not options["no_quantization"])
    from moepress.compress.plan import plan_text

    if output is not None:
        write_atomically(output, plan_text(made))
    _emit(made.model_dump(mode="json")) if as_json else print_plan(made, output)


@cli.command()
@click.argument("model")
@output_options("Folder for the pruned model.")
@click.option("--plan", "plan_file", type=click.Path(path_type=Path), help="A plan made by `moepress plan`.")
@click.option("--profile", "profiles", multiple=True, type=click.Path(path_type=Path), help="Plan from this profile.")
@selection_options
@mtp_option
@nonfinite_option
@dry_run_option
@json_option
def prune(model: str, output: Path, resume: bool, force: bool, plan_file: Path | None, **options: Any) -> None:
    """Rewrite MODEL without the experts that the plan leaves out: byte for byte, in the memory of one tensor.

    \b
    Example:  moepress prune demo --plan plan.json -o pruned
              moepress prune demo --profile profile --keep 0.5 -o pruned
    """
    from moepress import stages
    from moepress.compress.plan import load_plan

    if (plan_file is None) == (not options["profiles"]):
        raise UsageError("Say what to prune: either --plan plan.json, or --profile PROFILE with --keep or --experts.")
    if plan_file is not None:
        if not all_default("keep", "experts", "criterion", "domain_weight", "groups"):
            raise UsageError("--plan decides what stays; leave out --keep, --experts, --criterion and the like.")
        made = load_plan(plan_file)
    else:
        made = plan_of(stages.load_profiles(options["profiles"]), options, quantized=False)
    _note(*made.notes)
    place = stages.Output(folder=output, resume=resume, force=force)
    result = stages.prune_stage(
        model,
        place,
        made,
        mtp=mtp_of(options),
        allow_nonfinite=options["allow_nonfinite"],
        dry_run=options["dry_run"],
    )
    if options["dry_run"]:
        _show_estimates({"prune": result}, as_json=options["as_json"])
        return
    if options["as_json"]:
        _emit(result)
        return
    _note(*result["notes"])
    from moepress.printed import human_bytes

    sizes = f"{human_bytes(result['bytes_before'])} -> {human_bytes(result['bytes_after'])}"
    click.echo(f"{output}: {result['experts']} of {result['experts_before']} experts stay, {sizes}")


@cli.command()
@click.argument("model")
@output_options("Folder for the quantized model.")
@click.option("--plan", "plan_file", type=click.Path(path_type=Path), help="Prune by this plan, with its bits.")
@scheme_options
@include_option
@mtp_option
@click.option("--max-pieces", type=click.IntRange(1), help="Stop after so many new pieces; --resume goes on.")
@calibration_options
@machine_options
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
    from moepress import stages
    from moepress.compress.plan import load_plan
    from moepress.converters.scheme import Scheme

    _quiet_libraries()
    made = load_plan(plan_file) if plan_file else None
    scheme = Scheme(bits=options["bits"], group_size=options["group_size"])
    if made is not None and made.quantization is not None and all_default("bits", "group_size"):
        scheme = made.quantization.scheme()
    result = stages.quantize_stage(
        model,
        stages.Output(folder=output, resume=resume, force=force),
        made,
        stages.QuantizeRequest(scheme=scheme, include=includes_of(options)),
        calibration_of(options),
        machine_of(options),
        mtp=mtp_of(options),
        max_pieces=options["max_pieces"],
        dry_run=options["dry_run"],
    )
    if options["dry_run"]:
        _show_estimates({"quantize": result}, as_json=options["as_json"])
        return
    if not result["finished"]:
        done = f"{result['pieces_done']} of {result['pieces']} pieces are done"
        _note(f"{done}; repeat the command with --resume to go on.")
    if options["as_json"]:
        _emit(result)
        return
    if not result["finished"]:
        return
    from moepress.printed import print_quantized

    _note(*result["notes"])
    print_quantized(result, output)


@cli.command()
@click.argument("artifact")
@output_options("Folder for the export.")
@click.option(
    "--to", "target", required=True, type=click.Choice(["gptq", "compressed-tensors", "onnx"]), help="The format."
)
@onnx_options
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
    from moepress import exports, stages

    place = stages.Output(folder=output, resume=resume, force=force)
    if target == "onnx":
        _export_onnx(artifact, place, options, as_json=as_json)
        return
    if not all_default("preset", "kernel", "accuracy_level", "no_check", "dry_run"):
        raise UsageError("--for, --experts, --accuracy-level, --no-check and --dry-run go with --to onnx only.")
    result = exports.export_stage(artifact, place, target)
    _note(*result.notes)
    if as_json:
        _emit({"output": str(output), **asdict(result)})
    else:
        from moepress.printed import human_bytes

        click.echo(f"{output}: {result.modules} matrices in {target} layout, {human_bytes(result.bytes_after)}")


def _export_onnx(artifact: str, place: Any, options: Mapping[str, Any], *, as_json: bool) -> None:
    from moepress import exports
    from moepress.parsed import onnx_of
    from moepress.printed import print_onnx

    _quiet_libraries()
    request = onnx_of(options)
    if options["dry_run"]:
        _emit(exports.onnx_estimate(artifact, place, request))
        return
    result = exports.onnx_stage(artifact, place, request, check=not options["no_check"])
    _note(*result.notes)
    _emit({"output": str(place.folder), **asdict(result)}) if as_json else print_onnx(result, place.folder)


@cli.command()
@click.argument("before")
@click.argument("after")
@evaluation_options
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Folder for report.html, report.md, report.json.")
@machine_options
@json_option
def validate(before: str, after: str, output: Path | None, as_json: bool, **options: Any) -> None:
    """Compare two models on the same text: perplexity per domain, bits per byte, KL divergence, same top-1, size, and
    tokens per second on this machine.

    BEFORE and AFTER are folders: original, pruned, compressed-tensors, GPTQ or ONNX, which ONNX Runtime runs. Ends with
    3 when a threshold is missed by more than two sigma.

    \b
    Example:  moepress validate demo pressed --max-ppl-increase 3% -o report
              moepress validate pressed pressed-onnx --no-throughput
    """
    import tempfile

    from moepress import comparison, stages
    from moepress.validation.report import write_report

    _quiet_libraries()
    folders = [stages.model_folder(name) for name in (before, after)]
    if output is not None:
        comparison.check_report_folder(output, folders)
    subjects = [comparison.open_subject(n, f) for n, f in zip(("before", "after"), folders, strict=True)]
    with tempfile.TemporaryDirectory(prefix="moepress-") as work:
        report = comparison.validate_stage(
            subjects,
            comparison.tokenizer_folder(folders),
            evaluation_of(options),
            machine_of(options),
            Path(work),
            title=f"{folders[0].resolve().name} and {folders[1].resolve().name}",
            commands=(shlex.join(["moepress", *sys.argv[1:]]),),
        )
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        write_report(report, output)
    _show_report(report, output, as_json=as_json)


@cli.command()
@click.argument("model")
@click.argument("prompt")
@click.option("--max-new-tokens", type=click.IntRange(1), default=64, help="Stop after so many tokens.")
@click.option("--temperature", type=float, default=0.0, help="0 takes the likeliest token; above, tokens are drawn.")
@click.option("--top-k", type=int, help="Draw among so many likeliest tokens only.  [default: all]")
@click.option("--top-p", type=float, help="Draw among the likeliest tokens of this share only.  [default: all]")
@click.option("--seed", type=int, default=0, help="Of the draws: the same seed gives the same text.")
@click.option("--chat", is_flag=True, help="Write the prompt with the tokenizer's chat template.")
@device_options
@json_option
def generate(model: str, prompt: str, as_json: bool, **options: Any) -> None:
    """Let MODEL go on from PROMPT, to look at what was made: an original, pruned, quantized or ONNX folder. A PROMPT of
    - is read from stdin.

    The text comes to stdout as it is made. The whole model is loaded, so it must fit into memory; ONNX models keep
    their codes there, other quantized folders become dense.

    \b
    Example:  moepress generate demo "def main():"
              moepress generate pressed "The sum of" --temperature 0.8 --top-p 0.95 --seed 7
    """
    from moepress import generation
    from moepress.stages import Machine
    from moepress.validation.generate import Sampling

    _quiet_libraries()
    request = generation.Request(
        prompt=_prompt_of_stdin() if prompt == "-" else prompt,
        chat=options["chat"],
        max_new_tokens=options["max_new_tokens"],
        sampling=Sampling(**{name: options[name] for name in ("temperature", "top_k", "top_p", "seed")}),
    )
    machine = Machine(device=options["device"], dtype=options["dtype"])
    try:
        made = generation.generate_stage(
            model, request, machine, write=lambda piece: None if as_json else click.echo(piece, nl=False)
        )
    except KeyboardInterrupt:
        _fail("Interrupted.", INTERRUPTED)  # there is nothing to resume
    if as_json:
        _emit(asdict(made))
        return
    click.echo()
    speed = f"{made.tokens} tokens in {made.seconds:.1f} s ({made.tokens / made.seconds:.1f} per second)"
    _note(f"{speed}, {made.runtime}, {made.dtype} on {made.device}, stopped: {made.stopped}")


def _prompt_of_stdin() -> str:
    """What stands in stdin, without the newline that a shell puts at its end."""
    try:
        text = sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError("The text on stdin is not valid UTF-8; convert it to UTF-8.") from error
    return text.removesuffix("\n").removesuffix("\r")


@cli.command()
@click.argument("model", required=False)
@output_options("Folder for the run: model/, exports/, profile/, plan.json, report.html, ...")
@click.option(
    "--recipe", "recipe_file", type=click.Path(path_type=Path), help="A YAML recipe; options given here win over it."
)
@selection_options
@scheme_options
@include_option
@calibration_options
@evaluation_options
@click.option("--to", "targets", help="Further formats, with commas between them: gptq, onnx.")
@machine_options
@dry_run_option
@json_option
def run(model: str | None, output: Path, resume: bool, force: bool, recipe_file: Path | None, **options: Any) -> None:
    """The whole job: profile, plan, quantize, export, validate, report. `run demo` shows it on the embedded model.

    Without --keep and --experts, three quarters of the experts stay. OUT/recipe.yaml holds all that was used.

    \b
    Example:  moepress run demo -o out --keep 0.75 --bits 4
              moepress run MODEL -o out --calibration my-text/ --keep 0.5 --to gptq,onnx --max-ppl-increase 5%
              moepress run --recipe out/recipe.yaml -o again
    """
    from moepress.recipe import estimate_recipe, load_recipe, make_recipe, run_recipe

    _quiet_libraries()
    values = load_recipe(recipe_file) if recipe_file else {}
    values |= recipe_values(options) | ({"model": model} if model else {})
    if "model" not in values:
        raise UsageError("Say which model: moepress run MODEL -o OUT, or a recipe that names one.")
    recipe = make_recipe(values)
    if options["dry_run"]:
        from moepress import stages
        from moepress.journal import check_output

        check_output(output, [stages.model_folder(recipe.model)], resume=resume, force=force, in_place=True)
        found = estimate_recipe(recipe)
        if options["as_json"]:
            _emit(found)
        else:
            _show_estimates({name: found[name] for name in ("profile", "quantize")}, as_json=False)
        return
    report = run_recipe(recipe, output, resume=resume, force=force)
    _show_report(report, output, as_json=options["as_json"])


def _show_report(report: Any, folder: Path | None, *, as_json: bool) -> None:
    """Print the tables, say where the report lies, and end with 3 when a threshold was missed."""
    if as_json:
        click.echo(report.model_dump_json(indent=2))
    else:
        from rich.console import Console

        from moepress.validation.report import print_tables

        print_tables(report, Console(highlight=False))
        if folder is not None:
            click.echo(f"Report: {folder / 'report.html'}")
    missed = [outcome for outcome in report.thresholds if outcome.state == "missed"]
    if missed:
        worst = missed[0]
        raise ThresholdMissedError(
            f"{worst.subject}: {worst.measure} is {worst.found.value:.4g}, the limit is {worst.limit:.4g}; keep more "
            "experts, use more bits, or raise the limit."
        )


if __name__ == "__main__":
    main()
