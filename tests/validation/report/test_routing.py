"""What the report says of the routing: table, picture, a line on the terminal, nothing where nothing was seen."""

import dataclasses
import io
from xml.etree import ElementTree as ET

import pytest
from rich.console import Console

from moepress.validation.quality.results import Estimate, Quality, RoutingRow
from moepress.validation.report.cells import Table
from moepress.validation.report.contents import contents
from moepress.validation.report.html import html
from moepress.validation.report.markdown import markdown
from moepress.validation.report.pictures import pictures
from moepress.validation.report.routing import ROUTING, routing_lines
from moepress.validation.report.schema import Report, SubjectInfo
from moepress.validation.report.terminal import print_tables


def row(subject: str, layer: int | None, changed: float, common: float | None) -> RoutingRow:
    return RoutingRow(
        subject=subject, layer=layer, tokens=4096, changed=Estimate(value=changed, error=0.001), common=common
    )


ONE = (row("pruned", 3, 0.0, 1.0), row("pruned", 7, 0.2, None), row("pruned", None, 0.1, 0.95))


def report_of(quality: Quality, *routing: RoutingRow) -> Report:
    subjects = tuple(SubjectInfo(label=label, stored_bytes=9, parameters=2) for label in ("demo", "copy", "pruned"))
    return Report(subjects=subjects, quality=dataclasses.replace(quality, routing=routing))


def table_of(report: Report) -> Table:
    (found,) = (table for table in contents(report) if table.title == ROUTING)
    return found


def printed(report: Report) -> str:
    out = io.StringIO()
    print_tables(report, Console(file=out, width=100))
    return out.getvalue()


def test_every_layer_has_its_shares_and_all_have_their_mean(quality: Quality) -> None:
    table = table_of(report_of(quality, *ONE))
    assert table.header == ("Layer", "Tokens that choose otherwise", "Choices alike")
    assert table.rows == (
        ("3", "0 ± 0.1 %", "100.0 %"),
        ("7", "20.0 ± 0.1 %", "–"),
        ("mean", "10.0 ± 0.1 %", "95.0 %"),
    )
    assert table.note.startswith("All 4,096 tokens of the test text.")


def test_several_models_stand_beside_each_other_and_a_layer_that_one_lacks_is_a_dash(quality: Quality) -> None:
    report = report_of(quality, *ONE, row("copy", 3, 0.5, 0.5), row("copy", None, 0.5, 0.5))
    table = table_of(report)
    assert table.header[1:] == (
        *("Tokens that choose otherwise, pruned", "Choices alike, pruned"),
        *("Tokens that choose otherwise, copy", "Choices alike, copy"),
    )
    assert table.rows[1] == ("7", "20.0 ± 0.1 %", "–", "–", "–")
    assert routing_lines(report) == (
        "pruned: top-k of 10.0 % of tokens changed (layer 7: 20.0 %, the most)",
        "copy: top-k of 50.0 % of tokens changed (layer 3: 50.0 %, the most)",
    )


def test_the_picture_says_in_words_what_it_shows(quality: Quality) -> None:
    report = report_of(quality, *ONE)
    (shown,) = pictures(report)[ROUTING]
    for drawn in (shown.svg, shown.broad):
        assert (ET.fromstring(drawn).get("aria-label") or "").endswith(
            "by layer. top-k of 10.0 % of tokens changed (layer 7: 20.0 %, the most)"
        )
    assert shown.svg in html(report)
    assert f"<figcaption>{shown.caption}" in html(report)


def test_terminal_and_markdown_have_it_too(quality: Quality) -> None:
    report = report_of(quality, *ONE)
    assert "Routing: top-k of 10.0 % of tokens changed (layer 7: 20.0 %, the most)\n" in printed(report)
    assert "| 7 | 20.0 ± 0.1 % | – |" in markdown(report)


def test_a_measured_report_is_shown_and_an_equal_model_has_changed_nothing(quality: Quality) -> None:
    report = report_of(quality, *quality.routing)
    copied, pruned = routing_lines(report)
    assert copied == "copy: top-k of no token changed"
    assert pruned.startswith("pruned: top-k of ")
    assert len(table_of(report).rows) == 4 + 1
    assert f"## {ROUTING}" in markdown(report)
    assert Report.model_validate_json(report.model_dump_json()) == report


def test_where_no_routers_were_seen_nothing_is_said(quality: Quality) -> None:
    report = report_of(quality)
    assert ROUTING not in [table.title for table in contents(report)]
    assert ROUTING not in pictures(report)
    for text in (html(report), markdown(report), printed(report)):
        assert "outing" not in text


@pytest.mark.parametrize("most", [0.0, 1e-6, 1.0])
def test_any_share_can_be_drawn(quality: Quality, most: float) -> None:
    (shown,) = pictures(report_of(quality, row("pruned", 1, most, 1.0), row("pruned", None, most, 1.0)))[ROUTING]
    ET.fromstring(shown.svg)
