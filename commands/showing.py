"""The commands that show something: inspect, targets, doctor, check, validate, generate, completion."""

import os
import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from moepress.commands.completion import SHELLS, complete_runtimes, completion_script
from moepress.commands.console import INTERRUPTED, emit, fail, note, quiet_libraries, say, show_report, stream
from moepress.commands.options import (
    device_options,
    evaluation_options,
    force_option,
    json_option,
    machine_options,
    model_argument,
    targets_file_option,
)
from moepress.commands.parsed import evaluation_of, machine_of
from moepress.errors import UsageError


@click.command()
@model_argument()
@click.option("--tokens", type=click.IntRange(1), help="Calibration tokens to plan for.  [default: 131072]")
@click.option(
    "--context", type=click.IntRange(1), help="Tokens in the KV cache.  [default: 8192, or the model's context]"
)
@targets_file_option
@json_option
def inspect(model: str, tokens: int | None, context: int | None, targets_file: Path | None, as_json: bool) -> None:
    """Tell what MODEL is and what pressing it takes: family, experts, sizes by part, the expert counts that can stay
    and those to try first, time, memory and disk on this machine, and which GPU holds the result.

    Reads headers, and some weights to time the disk; writes nothing. All times are projected.

    \b
    Example:  moepress inspect demo
              moepress inspect MODEL --tokens 262144 --context 32768
              moepress inspect MODEL --targets-file my-gpus.toml
    """
    from moepress.commands.printed_inspection import print_inspection
    from moepress.hub.snapshot import headers_only
    from moepress.stages.inspect import inspect_model

    quiet_libraries()
    with headers_only():
        found = inspect_model(model, tokens=tokens, context=context, targets_file=targets_file)
    emit(found) if as_json else print_inspection(found)


@click.command()
@targets_file_option
@json_option
def targets(targets_file: Path | None, as_json: bool) -> None:
    """List the GPUs that `inspect`, `validate` and --target know, with those of --targets-file.

    That file has one table for each GPU; `pcie` and `uncertain` may be left out, `kind` may also be unified or
    reference:

    \b
      [[target]]
      id = "two-3090"
      name = "2 x RTX 3090"
      kind = "gaming"
      memory_gib = 48
      bandwidth_gb_per_second = 936
      fp16_tflops = 71.2

    \b
    Example:  moepress targets
              moepress targets --targets-file my-gpus.toml --json
    """
    from moepress.commands.printed_inspection import print_targets
    from moepress.validation.speed.targets import all_targets

    rows = [target.model_dump() for target in all_targets(targets_file)]
    emit({"targets": rows}) if as_json else print_targets(rows)


@click.command()
@json_option
def doctor(as_json: bool) -> None:
    """Tell what is installed, what ONNX Runtime's sessions really run on, devices and free disk, and what to mend.

    Ends with 5 when two ONNX Runtime packages clash or what is installed of it cannot be used, else with 0.

    \b
    Example:  moepress doctor --json
    """
    from moepress.commands.doctor import diagnose, print_diagnosis
    from moepress.errors import UnsupportedError

    found = diagnose(Path.cwd())
    emit(asdict(found)) if as_json else print_diagnosis(found)
    note(*found.notes)
    for problem in found.problems:
        if problem not in found.clashes:
            say(f"Problem: {problem}", err=True)
    if found.clashes:
        raise UnsupportedError(" ".join(found.clashes))


@click.command()
@model_argument("output")
@click.option(
    "--runtime",
    "runtimes",
    metavar="NAMES",
    shell_complete=complete_runtimes,
    help="Runtimes to check for, with commas between them: vllm, sglang, transformers, gptqmodel, llama.cpp, "
    "onnxruntime.  [default: those that the layout is made for]",
)
@click.option("--tensor-parallel", type=click.IntRange(1), default=1, help="Devices that every matrix is split over.")
@click.option("--expert-parallel", type=click.IntRange(1), default=1, help="Devices that the experts are dealt to.")
@json_option
def check(output: str, runtimes: str | None, tensor_parallel: int, expert_parallel: int, as_json: bool) -> None:
    """Hold OUTPUT against the rules of the runtimes that are to load it, without these runtimes: a folder in
    compressed-tensors or GPTQ layout, pruned, or ONNX.

    Reads JSON and headers, no weights. Each finding says which runtime, what happens there (refuses, silently wrong,
    slower), and how to mend it. Ends with 4 when a runtime refuses OUTPUT or computes something else without an error.

    \b
    Example:  moepress check pressed
              moepress check pressed --runtime vllm,sglang --tensor-parallel 2
    """
    from moepress.commands.printed_check import print_checked
    from moepress.errors import InvalidInputError
    from moepress.stages import groundwork
    from moepress.validation.rules.check import check_folder
    from moepress.validation.rules.findings import parse_runtimes

    quiet_libraries()
    found = check_folder(
        groundwork.model_folder(output),
        parse_runtimes(runtimes),
        tensor_parallel=tensor_parallel,
        expert_parallel=expert_parallel,
    )
    emit(asdict(found)) if as_json else print_checked(found)
    if found.failing:
        names = ", ".join(dict.fromkeys(finding.runtime for finding in found.failing))
        raise InvalidInputError(
            f"{output} does not work in {names} (findings: {len(found.failing)}); mend it, or name other "
            "runtimes with --runtime."
        )


@click.command()
@model_argument("before")
@model_argument("after")
@evaluation_options
@click.option(
    "--context",
    type=click.IntRange(1),
    help="Tokens in the KV cache of the report's table of GPUs.  [default: 8192, or the model's context]",
)
@targets_file_option
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="Folder for report.html, report.md, report.json, junit.xml and provenance.json.",
)
@force_option
@machine_options
@json_option
def validate(before: str, after: str, output: Path | None, force: bool, as_json: bool, **options: Any) -> None:
    """Compare two models on the same text: perplexity per domain, bits per byte, KL divergence, same top-1, size, and
    tokens per second on this machine.

    BEFORE and AFTER are folders: original, pruned, compressed-tensors, GPTQ or ONNX, which ONNX Runtime runs. Ends with
    3 when a threshold is missed by more than two sigma.

    \b
    Example:  moepress validate demo pressed --max-ppl-increase 3% -o report
              moepress validate pressed pressed-onnx --no-throughput
    """
    import tempfile

    from moepress.models.storage.inside import watched
    from moepress.runs.inputs import require_unchanged
    from moepress.stages import groundwork, validate
    from moepress.validation.report.files import write_report
    from moepress.validation.report.provenance import provenance, write_provenance

    quiet_libraries()
    if output is not None:
        validate.check_report_folder(output, groundwork.local_folders(before, after), force=force)
    folders = [groundwork.model_folder(name) for name in (before, after)]
    seen = [watched(folder) for folder in folders]
    subjects = [validate.open_subject(n, f) for n, f in zip(("before", "after"), folders, strict=True)]
    with tempfile.TemporaryDirectory(prefix="moepress-") as work:
        report = validate.validate_stage(
            subjects,
            validate.tokenizer_folder(folders),
            evaluation_of(options),
            machine_of(options),
            Path(work),
            title=" and ".join(map(groundwork.display_name, folders, (before, after))),
            commands=(shlex.join(["moepress", *sys.argv[1:]]),),
        )
    for stamps in seen:
        require_unchanged(stamps)
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        write_report(report, output)
        write_provenance(output, provenance(report, dict(zip(("before", "after"), folders, strict=True)), {}))
    show_report(report, output, as_json=as_json)


@click.command()
@model_argument()
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
    from moepress.stages import generate
    from moepress.stages.groundwork import Machine
    from moepress.validation.quality.generate import Sampling

    quiet_libraries()
    request = generate.Request(
        prompt=_prompt_of_stdin() if prompt == "-" else prompt,
        chat=options["chat"],
        max_new_tokens=options["max_new_tokens"],
        sampling=Sampling(**{name: options[name] for name in ("temperature", "top_k", "top_p", "seed")}),
    )
    machine = Machine(device=options["device"], dtype=options["dtype"])
    try:
        made = generate.generate_stage(model, request, machine, write=lambda piece: None if as_json else stream(piece))
    except KeyboardInterrupt:
        fail("Interrupted.", INTERRUPTED)  # there is nothing to resume
    if as_json:
        emit(asdict(made))
        return
    say("")
    speed = f"{made.tokens} tokens in {made.seconds:.1f} s ({made.tokens / made.seconds:.1f} per second)"
    note(f"{speed}, {made.runtime}, {made.dtype} on {made.device}, stopped: {made.stopped}")


@click.command()
@click.argument("shell", type=click.Choice(SHELLS), required=False)
@click.pass_context
def completion(context: click.Context, shell: str | None) -> None:
    """Print a script that completes commands, options, `demo`, model folders, GPUs, criteria and runtimes on TAB; for
    SHELL, or else the login shell.

    \b
    Example:  moepress completion bash >> ~/.bashrc
              moepress completion zsh > ~/.zfunc/_moepress
              moepress completion fish > ~/.config/fish/completions/moepress.fish
    """
    say(completion_script(context.find_root().command, shell, os.environ.get("SHELL", "")))


def _prompt_of_stdin() -> str:
    """What stands in stdin, without the newline that a shell puts at its end."""
    try:
        text = sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError("The text on stdin is not valid UTF-8; convert it to UTF-8.") from error
    return text.removesuffix("\n").removesuffix("\r")
