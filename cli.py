"""The command line: parse, call one function, print. Everything heavy is imported inside the commands."""

import atexit
import gc
import os
import signal
import sys
import traceback
from typing import Any, NoReturn

import click

from moepress import __version__
from moepress.commands.attempt import Attempt
from moepress.commands.calibration import calibration
from moepress.commands.check import check
from moepress.commands.completion import completion
from moepress.commands.console import INTERRUPTED, fail, say
from moepress.commands.doctor import doctor
from moepress.commands.export import export
from moepress.commands.generate import generate
from moepress.commands.inspect import inspect
from moepress.commands.plan import plan
from moepress.commands.plan_work import plan_work
from moepress.commands.profile import profile
from moepress.commands.prune import prune
from moepress.commands.quantize import quantize
from moepress.commands.run import run
from moepress.commands.status import status
from moepress.commands.targets import targets
from moepress.commands.validate import validate
from moepress.commands.work import work
from moepress.errors import MoepressError
from moepress.runs.progress import Level, set_level
from moepress.runs.text import printable


@click.group(context_settings={"help_option_names": ["-h", "--help"], "show_default": True, "max_content_width": 100})
@click.version_option(__version__, "-V", "--version", prog_name="moepress")
@click.option("--debug", is_flag=True, help="Print the traceback of an error that moepress does not expect.")
@click.pass_context
def cli(context: click.Context, debug: bool) -> None:
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
    set_level(Level.USUAL)
    if isinstance(context.obj, Attempt):
        context.obj.command, context.obj.debug = context.invoked_subcommand, debug


def main() -> NoReturn:
    """Run the command line and exit with its code; known errors become one line on stderr."""
    # Threads that spin for long while they wait make torch several times slower where other work shares the cores (CI,
    # laptops). Those that sleep at once make llama.cpp, which has torch's OpenMP, ten times slower: a few microseconds.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    for name in ("SIGTERM", "SIGHUP"):  # Windows has no SIGHUP
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores SIGHUP on purpose
            signal.signal(number, _interrupt)
    _collect_rarely()
    attempt = Attempt()
    try:
        code = cli.main(prog_name="moepress", standalone_mode=False, obj=attempt)
    except MoepressError as error:
        fail(str(error), error.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        fail("Interrupted. What is finished is kept; repeat the command with --resume to go on.", INTERRUPTED)
    except Exception as error:
        fail(_last_words(error, attempt), 1)
    sys.exit(code if isinstance(code, int) else 0)


def _collect_rarely() -> None:
    """Python looks for cycles after 700 new objects, which is for small programs: torch and transformers make a million
    that stay, are gone through again and again as they are imported, and three times more as the process ends.

    Where memory counts, `runs.memory` has cycles collected at once.
    """
    gc.set_threshold(100_000, 10, 10)
    atexit.register(gc.freeze)


def _last_words(error: Exception, attempt: Attempt) -> str:
    """What to say of an error that nobody raised on purpose: the machine's, or else a bug."""
    from moepress.runs.files import full_disk_of, is_full
    from moepress.runs.memory import is_out_of_memory

    if attempt.debug:
        say(printable("".join(traceback.format_exception(error)), lines=True), err=True)
    if is_out_of_memory(error):
        place = "device" if type(error).__name__ == "OutOfMemoryError" else "machine"  # torch's, not imported here
        return (
            f"The {place} ran out of memory; give a smaller --max-memory, or fewer --tokens, and repeat with --resume "
            "or --force."
        )
    if isinstance(error, OSError) and is_full(error):
        return str(full_disk_of(error))
    if isinstance(error, OSError):
        return f"{error.filename or 'The system'}: {error.strerror or error}. Mend it and repeat with --resume."
    from moepress.commands.crash import describe  # here, for where memory or the disk ran out it is not needed

    return describe(error, attempt)


def _interrupt(_number: int, _frame: Any) -> None:
    raise KeyboardInterrupt


for _command in (
    *(run, inspect, targets, doctor, profile, plan, prune, quantize, export),
    *(check, validate, generate, calibration, plan_work, work, status, completion),
):
    cli.add_command(_command)


if __name__ == "__main__":
    main()
