"""What commands print: JSON and reports on stdout, notes on stderr. Imports nothing heavy."""

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import click

from moepress.errors import ThresholdMissedError
from moepress.runs.text import message as bounded
from moepress.runs.text import printable

INTERRUPTED = 130


def fail(message: str, code: int) -> NoReturn:
    """Print a sentence on stderr and exit with that code."""
    say(f"Error: {bounded(message)}" if code != INTERRUPTED else message, err=True)
    sys.exit(code)


def emit(data: Mapping[str, Any]) -> None:
    """Print JSON on stdout."""
    text = json.dumps(data, indent=2, default=str, ensure_ascii=False)
    if printable(text, lines=True) != text:  # JSON has escapes of its own for what a terminal might obey
        text = json.dumps(data, indent=2, default=str)
    say(text)


def say(text: str, *, err: bool = False) -> None:
    """Print a text on stdout or stderr; where its reader has gone go on in silence, to the end and its exit code."""
    try:
        click.echo(printable(text, lines=True), err=err)
    except BrokenPipeError:
        from moepress.runs.terminal import stop_printing

        stop_printing(sys.stderr if err else sys.stdout)


def stream(piece: str) -> None:
    """Print a piece of a text that is still being made; where its reader has gone there is nothing left to do: exit."""
    try:
        click.echo(piece, nl=False)
    except BrokenPipeError:
        from moepress.runs.terminal import stop_printing

        stop_printing(sys.stdout)
        sys.exit(0)


def note(*notes: str) -> None:
    """Print notes on stderr, but under --quiet."""
    from moepress.runs.progress import note as noted

    noted(*notes)


def show_estimates(estimates: Mapping[str, Any], *, as_json: bool) -> None:
    """What a dry run found: a table, or as JSON the one estimate of a stage."""
    if as_json:
        emit(next(iter(estimates.values())))
        return
    from moepress.commands.tables import print_estimates

    print_estimates(estimates)


def _append_summary(file: Path, report: Any) -> None:
    from moepress.validation.report.ci import append_summary
    from moepress.validation.report.markdown import markdown

    try:
        append_summary(file, markdown(report))
    except OSError as error:  # the result is what counts
        note(f"GITHUB_STEP_SUMMARY names {file}, which can not be written ({error.strerror or error}).")


def upload(push: Any, folder: Path, base: str, *, as_json: bool) -> None:
    """Upload an output, made of the model `base`, where --push asks for it, and say where it is then."""
    if push is None:
        return
    from moepress.stages.push import push_folder

    url = push_folder(push, folder, base)
    note(f"{folder} is on {url}") if as_json else say(f"Pushed: {url}")


def quiet_libraries() -> None:
    """No banners or bars of the libraries below; ours are on stderr. Imports none of them: few commands need all."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if "transformers" in sys.modules:  # which read its environment when it was imported
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
    elif "huggingface_hub" in sys.modules:
        from huggingface_hub.utils import disable_progress_bars

        disable_progress_bars()


def show_report(report: Any, folder: Path | None, *, as_json: bool) -> None:
    """Print the tables, say where the report lies, and end with 3 when a threshold was missed.

    In a step of GitHub Actions, which names a file for it, the report is appended to the step's summary.
    """
    summary = os.environ.get("GITHUB_STEP_SUMMARY")
    if summary:
        _append_summary(Path(summary), report)
    if as_json:
        say(report.model_dump_json(indent=2))
    else:
        from moepress.runs.terminal import console
        from moepress.validation.report.terminal import print_tables

        print_tables(report, console())
        if folder is not None:
            say(f"Report: {folder / 'report.html'}")
    missed = [outcome for outcome in report.thresholds if outcome.state == "missed"]
    if missed:
        worst = missed[0]
        raise ThresholdMissedError(
            f"{worst.subject}: {worst.limited} is {worst.found.value:.4g}, the limit is {worst.limit:.4g}; keep more "
            f"experts, use more bits, or {'lower' if worst.bound == 'at least' else 'raise'} the limit."
        )
