"""What continuous integration reads of a report: JUnit XML, and GitHub's summary of a step."""

from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
from stage_runs import command

from moepress.validation.quality.results import Quality
from moepress.validation.quality.thresholds import Thresholds, judge
from moepress.validation.report.ci import SUMMARY_BYTES, append_summary, junit_xml
from moepress.validation.report.schema import Report, SubjectInfo

VALIDATE = ("validate", "demo", "demo", "--max-windows", "1", "--no-throughput")


def report_of(quality: Quality, thresholds: Thresholds, title: str = "demo") -> Report:
    return Report(
        created="2026-11-23T13:40:00+00:00",
        title=title,
        subjects=(SubjectInfo(label="demo", stored_bytes=2, parameters=1),),
        quality=quality,
        thresholds=judge(thresholds, quality.rows),
    )


def test_a_case_for_each_threshold_and_a_failure_for_each_that_was_missed(quality: Quality) -> None:
    report = report_of(quality, Thresholds(max_ppl_increase=0.9, max_kl=1e-9))
    root = ET.fromstring(junit_xml(report))
    (suite,) = root
    cases = list(suite)
    assert [case.get("classname") for case in cases] == ["moepress.copy"] * 2 + ["moepress.pruned"] * 2
    assert [case.get("name") for case in cases[:2]] == [
        "perplexity increase at most 0.9",
        "KL divergence at most 1e-09",
    ]
    failed = [case for case in cases if case.find("failure") is not None]
    missed = [outcome for outcome in report.thresholds if outcome.state == "missed"]
    assert len(failed) == len(missed) == 1
    assert "the limit is 1e-09" in str(failed[0].find("failure").get("message"))  # type: ignore[union-attr]
    for element in (root, suite):
        assert (element.get("tests"), element.get("failures"), element.get("errors")) == ("4", "1", "0")
    assert suite.get("timestamp") == report.created
    assert junit_xml(report) == junit_xml(report)


def test_without_thresholds_there_is_an_empty_suite(quality: Quality) -> None:
    (suite,) = ET.fromstring(junit_xml(report_of(quality, Thresholds())))
    assert (suite.get("tests"), list(suite)) == ("0", [])


def test_names_that_xml_can_not_hold_do_not_break_it(quality: Quality) -> None:
    title = 'a\x01b\ud800 <"&'
    (suite,) = ET.fromstring(junit_xml(report_of(quality, Thresholds(max_kl=9.0), title)))
    assert suite.get("name") == 'a\ufffdb\ufffd <"&'


def test_a_summary_is_appended(tmp_path: Path) -> None:
    file = tmp_path / "summary.md"
    append_summary(file, "# one ü\n")
    append_summary(file, "# two\n")
    assert file.read_text() == "# one ü\n# two\n"


@pytest.mark.parametrize("before", [0, 5000, SUMMARY_BYTES - 10, SUMMARY_BYTES, SUMMARY_BYTES + 10])
def test_a_long_summary_is_cut_at_a_line_and_says_so(tmp_path: Path, before: int) -> None:
    file = tmp_path / "summary.md"
    file.write_bytes(b"x" * before)
    append_summary(file, "# ü line\n" * 200_000)
    found = file.read_bytes()
    assert len(found) <= max(before, SUMMARY_BYTES)
    if before <= 5000:
        head, _, tail = found[before:].decode().partition("\n\n")
        assert set(head.splitlines()) == {"# ü line"}
        assert tail == "The report is cut off here; report.md has all of it.\n"
        assert len(found) > SUMMARY_BYTES - 100


def test_validate_writes_all_of_it_and_ends_with_3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    summary, out = tmp_path / "summary.md", tmp_path / "report"
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    code, _, errors = command(*VALIDATE, "--max-kl", "1", "-o", out)
    assert (code, errors) == (0, "")
    assert {p.name for p in out.iterdir()} == {
        *("report.html", "report.md", "report.json"),
        *("junit.xml", "provenance.json"),
    }
    assert summary.read_text() == (out / "report.md").read_text()
    (suite,) = ET.parse(out / "junit.xml").getroot()
    assert suite.get("tests") == "1"


def test_a_summary_that_can_not_be_written_is_a_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path))
    code, printed, errors = command(*VALIDATE, "--json")
    assert code == 0
    assert printed.startswith("{")
    assert errors.count("\n") == 1
    assert "which can not be written (Is a directory)" in errors
