"""`moepress validate`: the command, and its options as an evaluation."""

from __future__ import annotations

import shlex
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from moepress.commands.console import quiet_libraries, show_report
from moepress.commands.generation_options import check_prompt_files, generation_options
from moepress.commands.options import (
    endpoint_options,
    evaluation_options,
    force_option,
    json_option,
    machine_options,
    model_argument,
    talk_options,
    targets_file_option,
    task_options,
)
from moepress.commands.requests import machine_of, task_values, thresholds_of
from moepress.errors import UsageError
from moepress.runs.files import check_file

if TYPE_CHECKING:
    from moepress.stages.evaluation import Evaluation


@click.command()
@model_argument("before")
@model_argument("after", required=False)
@evaluation_options
@task_options
@endpoint_options
@generation_options
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
@click.option(
    "--save-reference",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Keep BEFORE's predictions in FILE, about 550 bytes a token, so that others are compared with it where it is "
    "not. AFTER may be left out.",
)
@click.option(
    "--reference",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Compare the one model that is given with what FILE keeps, in place of BEFORE. KL divergences are then lower "
    "bounds, all else is exact.",
)
@force_option
@machine_options
@talk_options
@json_option
def validate(before: str, after: str | None, output: Path | None, as_json: bool, **options: Any) -> None:
    """Compare two models on the same text: perplexity per domain, bits per byte, KL divergence, same top-1, changes of
    routing, size, and tokens per second on this machine.

    BEFORE and AFTER are folders: original, pruned, compressed-tensors, GPTQ, ONNX, which ONNX Runtime runs, or MLX; or
    GGUF files, which llama.cpp runs. With --tasks both are asked the same items, and compared item by item. Ends with 3
    when a threshold is missed by more than two sigma.

    \b
    Example:  moepress validate demo pressed --max-ppl-increase 3% -o report
              moepress validate pressed pressed-onnx --no-throughput
              moepress validate MODEL pressed --tasks gsm8k,my_tasks.yaml --limit 200 --min-recovery 95%
              moepress validate demo --save-reference demo.safetensors
              moepress validate pressed --reference demo.safetensors -o report
              moepress validate demo pressed --generations 500 --max-loop-increase 2%
    """
    from moepress.calibration.sources import parse_sources
    from moepress.stages.places import display_name, local_folders, model_place

    names = _models(before, after, options)
    inputs = local_folders(*names.values(), gguf=True)  # wrong paths are refused before anything heavy is imported
    parse_sources(options["data"], options["data_domain"])
    asked = _tasks_of(options, inputs)
    check_prompt_files(options["prompts"])
    quiet_libraries()
    from moepress.models.storage.inside import watched
    from moepress.runs.inputs import require_unchanged
    from moepress.stages.references import saved_subject
    from moepress.stages.subjects import check_report_folder, open_subject, tokenizer_folder
    from moepress.stages.validate import validate_stage
    from moepress.validation.quality.reference_file import read_reference
    from moepress.validation.report.files import write_report
    from moepress.validation.report.provenance import provenance, write_provenance

    if output is not None:
        check_report_folder(output, inputs, force=options["force"])
    saved = None if options["reference"] is None else read_reference(options["reference"])
    folders = {label: model_place(name) for label, name in names.items()}
    seen = [watched(folder) for folder in folders.values()]
    subjects = [] if saved is None else [saved_subject("before", saved)]
    subjects += [open_subject(label, folder) for label, folder in folders.items()]
    titles = [display_name(folder, names[label]) for label, folder in folders.items()]
    with tempfile.TemporaryDirectory(prefix="moepress-") as work:
        report = validate_stage(
            subjects,
            tokenizer_folder(list(folders.values())),
            _evaluation_of(options, asked),
            machine_of(options),
            Path(work),
            keep=options["save_reference"],
            title=" and ".join(titles if saved is None else [saved.about.model or "before", *titles]),
            commands=(shlex.join(["moepress", *sys.argv[1:]]),),
        )
    for stamps in seen:
        require_unchanged(stamps)
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        write_report(report, output)
        write_provenance(output, provenance(report, folders, {}))
    show_report(report, output, as_json=as_json)


def _models(before: str, after: str | None, options: Mapping[str, Any]) -> dict[str, str]:
    """Names of models by their labels: both, or the one that is compared with a reference, or of which one is made.

    Raises:
        UsageError: they are not as many as that takes, or the file of a reference cannot be written.
    """
    reference, kept = options["reference"], options["save_reference"]
    if reference is not None and (after is not None or kept is not None):
        what = "BEFORE: give one model" if after is not None else "a model: --save-reference needs one"
        raise UsageError(f"--reference takes the place of {what}, or leave --reference out.")
    if options["tasks"] and after is None:
        raise UsageError("--tasks asks two models; give BEFORE and AFTER, or leave --tasks out.")
    if kept is not None:
        check_file(kept, "--save-reference", force=options["force"])
    if reference is not None:
        return {"after": before}
    if after is None and kept is None:
        raise UsageError("Give AFTER, the model that BEFORE is compared with (or --save-reference, or --reference).")
    return {"before": before} | ({} if after is None else {"after": after})


def _tasks_of(options: Mapping[str, Any], models: Sequence[Path]) -> dict[str, Any]:
    """What --tasks and the options that go with it ask for; wrong names are refused, and nothing heavy is imported."""
    from moepress.validation.tasks.names import check_endpoint, check_names

    asked = task_values(options)
    for option in ("endpoint", "endpoint_before"):
        if options[option] is not None:
            asked[option] = check_endpoint(options[option], f"--{option.replace('_', '-')}")
    if asked and "tasks" not in asked:
        raise UsageError(f"--{next(iter(asked)).replace('_', '-')} goes with --tasks; name some, such as gsm8k.")
    check_names(asked.get("tasks", ()), models)
    return asked


def _evaluation_of(options: Mapping[str, Any], asked: Mapping[str, Any]) -> Evaluation:
    """The evaluation that --data, --max-windows, --tasks, --generations and the thresholds describe."""
    from moepress.stages.answers import answering_of
    from moepress.stages.evaluation import Evaluation
    from moepress.stages.tasks import TaskRequest
    from moepress.validation.quality.thresholds import Thresholds

    return Evaluation(
        data=options["data"],
        domains=options["data_domain"],
        window=options.get("window"),
        max_windows=options["max_windows"],
        throughput=not options["no_throughput"],
        context=options["context"],
        targets_file=options["targets_file"],
        thresholds=Thresholds(**thresholds_of(options)),
        tasks=TaskRequest(names=asked["tasks"], **{k: v for k, v in asked.items() if k != "tasks"}) if asked else None,
        answering=answering_of(options),
    )
