"""Options of what models are to answer, for the commands that compare them. Imports nothing heavy."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from moepress.errors import InvalidInputError

LEAST_NEW_TOKENS, MAX_NEW_TOKENS = 64, 256

_OPTIONS = (
    click.option(
        "--generations",
        type=click.IntRange(1),
        metavar="N",
        help="Let the models answer so many prompts, and count answers that loop or do not end. 500 show what 50 do "
        "not. The models must fit into memory.  [default: none; 500 with --max-loop-increase; all of --prompts]",
    ),
    click.option(
        "--prompts",
        multiple=True,
        metavar="FILE",
        help="What is asked: a prompt on each line, or records as of --data. Repeatable.  [default: what is asked in "
        "the conversations of --data, else beginnings out of its text]",
    ),
    click.option(
        "--max-new-tokens",
        type=click.IntRange(LEAST_NEW_TOKENS),
        default=MAX_NEW_TOKENS,
        show_default=True,
        metavar="N",
        help="Longest answer.",
    ),
    click.option(
        "--temperature",
        type=click.FloatRange(0),
        default=0.0,
        show_default=True,
        help="Of the answers: 0 takes the likeliest token; above, tokens are drawn.",
    ),
    click.option("--generation-seed", type=click.IntRange(0), default=0, show_default=True, help="Of these draws."),
    click.option(
        "--max-loop-increase",
        metavar="SHARE",
        help="Fail when so much more of the answers loops, such as 2% (percentage points).",
    ),
)


def generation_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """--generations, --prompts, how they are answered, and --max-loop-increase."""
    for option in reversed(_OPTIONS):
        function = option(function)
    return function


def check_prompt_files(names: Sequence[str]) -> None:
    """Refuse files of prompts that are not there, before anything heavy is imported.

    Raises:
        InvalidInputError: naming the first.
    """
    from moepress.runs.files import require_plain

    for name in names:
        try:
            require_plain(Path(name).expanduser())
        except OSError as error:
            raise InvalidInputError(f"--prompts {name}: {error.strerror or error}; give a file of prompts.") from error
