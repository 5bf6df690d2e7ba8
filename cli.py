"""The command line: parse, call one function, print. Everything heavy is imported inside the commands."""

import os
import signal
import sys
from pathlib import Path
from typing import Any, NoReturn

import click

from moepress import __version__
from moepress.commands.completion import complete_list
from moepress.commands.console import (
    INTERRUPTED,
    emit,
    fail,
    note,
    quiet_libraries,
    show_estimates,
    show_report,
    upload,
)
from moepress.commands.making import export, plan, profile, prune, quantize
from moepress.commands.options import (
    budget_options,
    calibration_options,
    dry_run_option,
    evaluation_options,
    include_option,
    json_option,
    machine_options,
    match_option,
    model_argument,
    output_options,
    push_options,
    repair_option,
    scheme_options,
    selection_options,
    targets_file_option,
    timings_option,
)
from moepress.commands.parsed import push_of, recipe_values
from moepress.commands.showing import check, completion, doctor, generate, inspect, targets, validate
from moepress.errors import MoepressError, UsageError


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

    MODEL is the folder of a Hugging Face model, or its id on the hub, such as owner/name. Models never have to fit into
    memory. Interrupted runs go on with --resume. Exit codes: 0 ok, 2 wrong use, 3 a threshold was missed, 4 invalid
    input, 5 unsupported, 6 output in use, 130 interrupted.
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
        code = cli.main(prog_name="moepress", standalone_mode=False)
    except MoepressError as error:
        fail(str(error), error.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        fail("Interrupted. What is finished is kept; repeat the command with --resume to go on.", INTERRUPTED)
    except (MemoryError, RuntimeError, OSError) as error:
        _fail_of_machine(error)
    sys.exit(code if isinstance(code, int) else 0)


def _fail_of_machine(error: Exception) -> NoReturn:
    """Say in one sentence that memory or a disk is full, or what else the system refuses; bugs are raised again."""
    from moepress.runs.files import full_disk_of, is_full
    from moepress.runs.memory import is_out_of_memory

    if is_out_of_memory(error):
        place = "device" if type(error).__name__ == "OutOfMemoryError" else "machine"  # torch's, not imported here
        fail(
            f"The {place} ran out of memory; give a smaller --max-memory, or fewer --tokens, and repeat with --resume "
            "or --force.",
            1,
        )
    if not isinstance(error, OSError):
        raise error
    if is_full(error):
        fail(str(full_disk_of(error)), 1)
    fail(f"{error.filename or 'The system'}: {error.strerror or error}. Mend it and repeat with --resume.", 1)


def _interrupt(_number: int, _frame: Any) -> None:
    raise KeyboardInterrupt


for _command in (
    *(inspect, targets, doctor, profile, plan, prune, quantize, export),
    *(check, validate, generate, completion),
):
    cli.add_command(_command)


@cli.command()
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
@include_option
@match_option
@calibration_options
@evaluation_options
@click.option(
    "--to",
    "formats",
    shell_complete=complete_list("gptq", "onnx"),
    help="Further formats, with commas between them: gptq, onnx.",
)
@machine_options
@push_options
@timings_option
@dry_run_option
@json_option
def run(model: str | None, output: Path, resume: bool, force: bool, recipe_file: Path | None, **options: Any) -> None:
    """The whole job: profile, plan, quantize, export, validate, report. `run demo` shows it on the embedded model.

    Without --keep and --experts, three quarters of the experts stay; with --budget or --target experts and bits are
    chosen so that the result fits at the least estimated loss. OUT/recipe.yaml holds all that was used.

    \b
    Example:  moepress run demo -o out --keep 0.75 --bits 4
              moepress run MODEL -o out --calibration my-text/ --keep 0.5 --to gptq,onnx --max-ppl-increase 5%
              moepress run MODEL -o out --calibration my-text/ --target rtx-4060-ti-16gb --context 8192
              moepress run --recipe out/recipe.yaml -o again
    """
    from moepress.commands.timings import check_timings, timed
    from moepress.hub.snapshot import headers_only
    from moepress.runs.journal import check_output
    from moepress.stages.groundwork import local_folders
    from moepress.stages.run.dry_run import estimate_recipe
    from moepress.stages.run.recipe import check_recipe, load_recipe, make_recipe, runtime_notes
    from moepress.stages.run.run import run_recipe

    quiet_libraries()
    values = load_recipe(recipe_file) if recipe_file else {}
    values |= recipe_values(options) | ({"model": model} if model else {})
    if "model" not in values:
        raise UsageError("Say which model: moepress run MODEL -o OUT, or a recipe that names one.")
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
        report = run_recipe(recipe, output, resume=resume, force=force)
    if push is not None and any(outcome.state == "missed" for outcome in report.thresholds):
        note(f"Nothing is pushed to {push.repo}, for a threshold was missed.")
    show_report(report, output, as_json=options["as_json"])
    upload(push, output / "model", recipe.model, as_json=options["as_json"])


if __name__ == "__main__":
    main()
