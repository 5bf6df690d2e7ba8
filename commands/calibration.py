"""`moepress calibration`: the group, `make`, and what was made in two sentences."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from moepress.commands.console import INTERRUPTED, emit, fail, note, quiet_libraries, say
from moepress.commands.options import device_options, json_option, model_argument, talk_options
from moepress.errors import UsageError

if TYPE_CHECKING:
    from moepress.stages.calibration import Made

_PATH = click.Path(path_type=Path)


@click.group()
def calibration() -> None:
    """Calibration text of a model's own.

    \b
    Example:  moepress calibration make demo --prompts prompts.txt -o traces.jsonl
    """


@calibration.command()
@model_argument()
@click.option(
    "--prompts",
    required=True,
    type=_PATH,
    metavar="FILE",
    help="A prompt a line, or .jsonl with prompt, messages, question, instruction or text.",
)
@click.option("-o", "--output", required=True, type=_PATH, metavar="FILE", help="File of answers, .jsonl; appended to.")
@click.option(
    "--endpoint",
    metavar="URL",
    help="Ask a server that speaks OpenAI's chat completions, such as http://localhost:8000/v1; MODEL is the name that "
    "it knows the model by.",
)
@click.option("--api-key-env", metavar="NAME", help="Variable of the environment that holds the endpoint's key.")
@click.option("--max-new-tokens", type=click.IntRange(1), default=4096, help="Cut an answer off after so many tokens.")
@click.option("--temperature", type=float, default=0.6, help="0 takes the likeliest token; above, tokens are drawn.")
@click.option("--top-p", type=float, help="Draw among the likeliest tokens of this share only.  [default: 0.95]")
@click.option("--top-k", type=int, help="Draw among so many likeliest tokens only.  [default: all]")
@click.option("--seed", type=int, default=0, help="Of the draws; every prompt has one of its own made of it.")
@device_options
@talk_options
@json_option
def make(model: str, prompts: Path, output: Path, as_json: bool, **options: Any) -> None:
    """Let MODEL answer prompts to the end, with its reasoning, and write conversations for --calibration.

    What a model says itself is what it will be used for: text of its own style, with the ends of reasoning and of
    answers, which other text lacks. Each answer is on the disk when the next one begins; the same command goes on
    where it was interrupted, and adds answers to prompts that are new. A file that it did not make is left alone.

    \b
    Example:  moepress calibration make MODEL --prompts prompts.txt -o traces.jsonl
              moepress calibration make served-name --endpoint http://localhost:8000/v1 --prompts p.jsonl -o t.jsonl
              moepress profile MODEL -o profile --calibration traces.jsonl
    """
    from moepress.runs.files import check_file
    from moepress.stages.places import Machine, local_folders, require_file

    if options["endpoint"] is None:
        local_folders(model, gguf=True)  # a wrong path is refused before anything heavy is imported
        if options["api_key_env"] is not None:
            raise UsageError("--api-key-env goes with --endpoint only.")
    require_file(prompts)
    check_file(output, "-o", force=True)
    quiet_libraries()
    from moepress.stages.calibration import Request, make_stage
    from moepress.validation.quality.decoding import Sampling

    top_p = 0.95 if options["top_p"] is None and options["temperature"] > 0 else options["top_p"]
    request = Request(
        model=model,
        prompts=prompts,
        output=output,
        endpoint=_endpoint(options),
        max_new_tokens=options["max_new_tokens"],
        sampling=Sampling(top_p=top_p, **{name: options[name] for name in ("temperature", "top_k", "seed")}),
    )
    try:
        made = make_stage(request, Machine(device=options["device"], dtype=options["dtype"]))
    except KeyboardInterrupt:
        fail("Interrupted. Answers that are whole are kept; repeat the command to go on.", INTERRUPTED)
    emit(asdict(made)) if as_json else _print_made(made)


def _endpoint(options: dict[str, Any]) -> Any:
    from moepress.calibration.endpoint import Endpoint

    if options["endpoint"] is None:
        return None
    name = options["api_key_env"]
    key = None if name is None else os.environ.get(name)
    if name is not None and not key:
        raise UsageError(f"--api-key-env {name}: there is no such variable in the environment, or it is empty.")
    return Endpoint(url=options["endpoint"], key=key)


def _print_made(made: Made) -> None:
    if made.cut:
        note(f"{made.cut} of {made.answers} answers were cut off; give more --max-new-tokens to see their ends.")
    before = f" ({made.before} were there before)" if made.before else ""
    say(f"{made.file}: {made.answers} answers to {made.prompts} prompts{before}, {made.tokens:,} tokens")
