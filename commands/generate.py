"""`moepress generate`: the command, and the prompt that stdin holds."""

import sys
from dataclasses import asdict
from typing import Any

import click

from moepress.commands.console import INTERRUPTED, emit, fail, note, quiet_libraries, say, stream
from moepress.commands.options import device_options, json_option, model_argument
from moepress.errors import UsageError


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
    """Let MODEL go on from PROMPT, to look at what was made: an original, pruned, quantized, ONNX or MLX folder,
    or a GGUF file. A PROMPT of
    - is read from stdin.

    The text comes to stdout as it is made. The whole model is loaded, so it must fit into memory; ONNX models keep
    their codes there, other quantized folders become dense.

    \b
    Example:  moepress generate demo "def main():"
              moepress generate pressed "The sum of" --temperature 0.8 --top-p 0.95 --seed 7
    """
    from moepress.stages.places import Machine, local_folders

    local_folders(model, gguf=True)  # a wrong path is refused before anything heavy is imported
    quiet_libraries()
    from moepress.stages import generate
    from moepress.validation.quality.decoding import Sampling

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


def _prompt_of_stdin() -> str:
    """What stands in stdin, without the newline that a shell puts at its end."""
    try:
        text = sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError("The text on stdin is not valid UTF-8; convert it to UTF-8.") from error
    return text.removesuffix("\n").removesuffix("\r")
