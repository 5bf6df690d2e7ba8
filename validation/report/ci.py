"""What continuous integration reads: thresholds as JUnit XML, and the report as GitHub's summary of a step."""

import re
from pathlib import Path
from xml.etree import ElementTree as ET

from moepress.validation.quality.thresholds import SIGMAS, Outcome
from moepress.validation.report.schema import Report

JUNIT_NAME = "junit.xml"
SUMMARY_BYTES = 900 << 10
"""GitHub drops a step's summary above 1 MiB, and the step may have written to it before."""

_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_CUT = "\nThe report is cut off here; report.md has all of it.\n"


def junit_xml(report: Report) -> str:
    """One suite with a case for each threshold and model; a failure is what makes the command end with 3.

    The same report gives the same text; the suite's timestamp is the report's own.
    """
    cases = report.thresholds
    counts = {"tests": str(len(cases)), "failures": str(sum(case.state == "missed" for case in cases))}
    counts |= {"errors": "0"}
    root = ET.Element("testsuites", {"name": "moepress", **counts})
    names = {"name": _xml(report.title or report.subjects[0].label), **counts, "skipped": "0"}
    suite = ET.SubElement(root, "testsuite", names | ({"timestamp": report.created} if report.created else {}))
    for case in cases:
        _add_case(suite, case)
    ET.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ET.tostring(root, encoding="unicode") + "\n"


def _add_case(suite: ET.Element, case: Outcome) -> None:
    name = _xml(f"{case.limited} {case.bound} {case.limit:.4g}")
    element = ET.SubElement(suite, "testcase", {"classname": _xml(f"moepress.{case.subject}"), "name": name})
    error = "" if case.found.error is None else f" ± {case.found.error:.4g}"
    measured = f"{case.limited} of {case.subject} is {case.found.value:.4g}{error}, the limit is {case.limit:.4g}"
    if case.state == "missed":
        failure = ET.SubElement(element, "failure", {"message": _xml(measured), "type": "threshold"})
        failure.text = f"It is exceeded by more than {SIGMAS:g} standard errors."
    else:
        ET.SubElement(element, "system-out").text = _xml(f"{measured}: {case.state}")


def _xml(text: str) -> str:
    """The text without characters that XML has no way to write."""
    return _NOT_XML.sub("\N{REPLACEMENT CHARACTER}", text)


def append_summary(file: Path, text: str) -> None:
    """Append Markdown to the file that GITHUB_STEP_SUMMARY names, cut at a line where it would grow above 900 KiB.

    Raises:
        OSError: it can not be written.
    """
    before = file.stat().st_size if file.exists() else 0
    raw, room = text.encode(), SUMMARY_BYTES - before
    if len(raw) > room:
        cut = raw[: max(0, room - len(_CUT.encode()))]
        raw = cut[: cut.rfind(b"\n") + 1] + (_CUT.encode() if room > len(_CUT.encode()) else b"")
    with file.open("ab") as stream:
        stream.write(raw)
