"""The report in all its forms: report.json and junit.xml for machines, report.md and report.html for people."""

from pathlib import Path

from moepress.runs.journal import write_atomically
from moepress.validation.report.ci import JUNIT_NAME, junit_xml
from moepress.validation.report.html import html
from moepress.validation.report.markdown import markdown
from moepress.validation.report.schema import Report

JSON_NAME, MARKDOWN_NAME, HTML_NAME = "report.json", "report.md", "report.html"


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
