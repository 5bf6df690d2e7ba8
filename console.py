"""What commands print: JSON and reports on stdout, notes on stderr. Imports nothing heavy."""

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import click

from moepress.errors import ThresholdMissedError

INTERRUPTED = 130


def fail(message: str, code: int) -> NoReturn:
    """Print a sentence on stderr and exit with that code."""
    click.echo(f"Error: {message}" if code != INTERRUPTED else message, err=True)
    sys.exit(code)


def emit(data: Mapping[str, Any]) -> None:
    """Print JSON on stdout."""
    click.echo(json.dumps(data, indent=2, default=str, ensure_ascii=False))


def note(*notes: str) -> None:
    """Print notes on stderr."""
    for line in notes:
        click.echo(f"Note: {line}", err=True)


def show_estimates(estimates: Mapping[str, Any], *, as_json: bool) -> None:
    """What a dry run found: a table, or as JSON the one estimate of a stage."""
    if as_json:
        emit(next(iter(estimates.values())))
        return
    from moepress.printed_inspection import print_estimates

    print_estimates(estimates)


def _append_summary(file: Path, report: Any) -> None:
    from moepress.validation.ci import append_summary
    from moepress.validation.report import markdown

    try:
        append_summary(file, markdown(report))
    except OSError as error:  # the result is what counts
        note(f"GITHUB_STEP_SUMMARY names {file}, which can not be written ({error.strerror or error}).")


def quiet_libraries() -> None:
    """No banners or bars of the libraries below; ours are on stderr."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def show_report(report: Any, folder: Path | None, *, as_json: bool) -> None:
    """Print the tables, say where the report lies, and end with 3 when a threshold was missed.

    In a step of GitHub Actions, which names a file for it, the report is appended to the step's summary.
    """
    summary = os.environ.get("GITHUB_STEP_SUMMARY")
    if summary:
        _append_summary(Path(summary), report)
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
