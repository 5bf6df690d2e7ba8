"""The report in all its forms: report.json and junit.xml for machines, report.md and report.html for people."""

import json
import os
from pathlib import Path

from moepress.errors import InvalidInputError
from moepress.runs.files import read_text, write_atomically
from moepress.validation.report.ci import JUNIT_NAME, junit_xml
from moepress.validation.report.html import html
from moepress.validation.report.markdown import markdown
from moepress.validation.report.provenance import PROVENANCE_NAME
from moepress.validation.report.schema import Report

JSON_NAME, MARKDOWN_NAME, HTML_NAME = "report.json", "report.md", "report.html"


_SIGNS = {  # how a file that we wrote is known: by what it says, not by its name
    MARKDOWN_NAME: "Made by moepress",
    HTML_NAME: "moepress report</title>",
    JUNIT_NAME: '<testsuites name="moepress"',
}


def foreign_files(folder: Path) -> list[Path]:
    """Files in a folder that have the names of a report's, and are not of a report that moepress wrote."""
    names = (JSON_NAME, PROVENANCE_NAME, *_SIGNS)
    return [folder / name for name in names if os.path.lexists(folder / name) and not _is_ours(folder / name)]


def _is_ours(file: Path) -> bool:
    try:
        text = "" if file.is_symlink() else read_text(file)
        if file.name in _SIGNS:
            return _SIGNS[file.name] in text
        found = json.loads(text)
    except (OSError, ValueError, RecursionError, InvalidInputError):
        return False
    if not isinstance(found, dict):
        return False
    if file.name == PROVENANCE_NAME:
        return isinstance(found.get("tool"), dict) and found["tool"].get("name") == "moepress"
    return {"schema_version", "tool_version", "subjects", "quality"} <= found.keys()


def write_report(report: Report, folder: Path) -> tuple[Path, ...]:
    """Write the report in its forms, each file atomically, into a folder that is made if need be.

    Returns:
        The files' paths: JSON, Markdown, HTML, and the thresholds as JUnit XML.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, text in (
        (JSON_NAME, report.model_dump_json(indent=2) + "\n"),
        (MARKDOWN_NAME, markdown(report)),
        (HTML_NAME, html(report)),
        (JUNIT_NAME, junit_xml(report)),
    ):
        write_atomically(folder / name, text)
        written.append(folder / name)
    return tuple(written)
