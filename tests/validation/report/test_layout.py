"""How the page is laid out: captions, legends, remarks under tables, rows as blocks on a phone, what stands out."""

import io
import re
from typing import Any

import pytest
from rich.console import Console

from moepress.stages.run.recipe import Recipe, evaluation_of
from moepress.stages.subjects import subject_of
from moepress.validation.quality.results import (
    Continuation,
    Estimate,
    Quality,
    Sample,
    Samples,
    Throughput,
    ThroughputRow,
)
from moepress.validation.report.cells import Table
from moepress.validation.report.contents import CHECKS, SAMPLES, contents
from moepress.validation.report.html import html
from moepress.validation.report.markdown import markdown
from moepress.validation.report.pictures import pictures
from moepress.validation.report.remarks import lettered
from moepress.validation.report.schema import Report, RuntimeCheck, SubjectInfo
from moepress.validation.report.terminal import print_tables
from moepress.validation.speed.fits import fits_section
from moepress.validation.speed.targets import load_targets

DENSE, NOISY = "compressed-tensors, made dense when loaded", "noisy: the machine had other work"
EVIL = "a\x1b[31m</td><script>alert(1)</script>\n\n\n\n\nend | `x` \u202e"


def speed(subject: str, test: str, note: str | None, value: float | None = 5.0) -> ThroughputRow:
    found = None if value is None else Estimate(value=value, error=0.1)
    return ThroughputRow(
        subject=subject, test=test, tokens_per_second=found, runtime="transformers 5.23.0", provider="CPU", note=note
    )


@pytest.fixture(scope="module")
def report(quality: Quality, demo: Any) -> Report:
    rows = (
        speed("demo", "pp512", None),
        speed("demo", "tg128", NOISY),
        speed("pruned", "pp512", f"{DENSE}; {NOISY}"),
        speed("copy", "-", "not measured: needs 9.0 GiB; 1.0 GiB are free", None),
    )
    sample = Sample(
        domain="german",
        prompt="<b>Der",
        continuations=(
            Continuation(subject="demo", text=EVIL, tokens=5, same_tokens=5),
            Continuation(subject="pruned", text=" Hund", tokens=5, same_tokens=2),
        ),
    )
    check = RuntimeCheck(
        subject="pruned", layout="plain", runtime="vllm", outcome="refuses", findings=2, first="No <weights>: it stops."
    )
    targets = load_targets()
    return Report(
        subjects=tuple(SubjectInfo(label=label, stored_bytes=9, parameters=2) for label in ("demo", "copy", "pruned")),
        quality=quality,
        throughput=Throughput(device="a processor", threads=1, repetitions=2, rows=rows),
        samples=Samples(prompt_tokens=4, tokens=5, rows=(sample,)),
        checks=(check, RuntimeCheck(subject="pruned", layout="plain", runtime="sglang", outcome="loads", findings=0)),
        targets=fits_section([("demo", subject_of("demo", demo).source)], targets, chosen="rtx-4090"),
    )


def table_of(report: Report, title: str) -> Table:
    (found,) = (table for table in contents(report) if table.title == title)
    return found


def test_a_caption_stands_above_each_picture(report: Report) -> None:
    figures = re.findall(r"<figure>(.*?)</figure>", html(report), flags=re.DOTALL)
    assert len(figures) == sum(map(len, pictures(report).values()))
    for figure in figures:
        assert re.match(r"\s*<figcaption>[^<]{5,}</figcaption>", figure)
        assert figure.count("<figcaption>") == 1


def test_each_picture_has_one_legend_that_names_every_series_once(report: Report) -> None:
    for title in ("Perplexity", "Throughput"):
        for shown in pictures(report)[title]:
            for drawn in (shown.svg, shown.broad):
                assert drawn.count("-legend_") == 1
                assert drawn.count(">demo</text>") == 1
                assert drawn.count(">pruned</text>") == ("tg128" not in shown.caption)
    assert [picture.caption.split(",")[0] for picture in pictures(report)["Throughput"]] == ["pp512", "tg128"]


def test_pictures_fill_the_page_and_are_drawn_for_narrow_and_for_broad_ones(report: Report) -> None:
    page = html(report)
    style = page[: page.index("</style>")]
    assert re.search(r"\.chart \{[^}]*width: 100%", style)
    assert not re.search(r"\.chart \{[^}]*max-width", style)
    for shown in pictures(report).values():
        for picture in shown:
            narrow, broad = (re.search(r'viewBox="0 0 ([\d.]+)', drawn) for drawn in (picture.svg, picture.broad))
            assert narrow is not None
            assert broad is not None
            assert (round(float(narrow[1])), round(float(broad[1]))) == (360, 792)


def test_remarks_have_letters_and_stand_once_under_their_table(report: Report) -> None:
    table = table_of(report, "Throughput")
    assert table.marks == ("", "a", "a, b", "c")
    assert table.remarks == (("a", NOISY), ("b", DENSE), ("c", "not measured: needs 9.0 GiB; 1.0 GiB are free"))
    assert "not measured" in table.rows[3]
    page, text = html(report), markdown(report)
    for shown in (page, text):
        assert shown.count(NOISY) == shown.count("needs 9.0 GiB; 1.0 GiB are free") == 1
        assert shown.index("</table>" if shown is page else "| copy <sup>c</sup> |") < shown.rindex(NOISY)
    out = io.StringIO()
    print_tables(report, Console(file=out, width=100))
    assert re.search(r"pruned \(a, b\) .*\n", out.getvalue())
    assert f"(b) {DENSE}" in out.getvalue()


def test_letters_go_on_after_z() -> None:
    marks, remarks = lettered([str(number)] for number in range(28))
    assert (marks[0], marks[25], marks[26], marks[27]) == ("a", "z", "aa", "ab")
    assert len(remarks) == 28
    assert lettered([["x", "y"], [], ["y"]])[0] == ("a, b", "", "b")


def test_the_change_comes_first_after_the_name(report: Report) -> None:
    assert table_of(report, "Size").header[:2] == ("Model", "Change")
    two = report.model_copy(update={"subjects": (report.subjects[0], report.subjects[2])})
    assert table_of(two, "Perplexity").header == ("Text", "change", "demo", "pruned")
    assert table_of(two, "Perplexity").rows[0][1].startswith("+")
    assert table_of(report, "Perplexity").header[:3] == ("Text", "change, copy", "change, pruned")


def test_cells_of_wide_tables_carry_their_column_s_name_for_a_phone(report: Report) -> None:
    page = html(report)
    tables = re.findall(r"<table.*?</table>", page, flags=re.DOTALL)
    stacked = [table for table in tables if 'class="stacked' in table]
    assert len(stacked) >= 4
    for table in stacked:
        assert table.count("<td ") == table.count("<td") == table.count('role="cell" data-name="')
        for role in ("table", "rowgroup", "row", "columnheader", "rowheader"):
            assert f'role="{role}"' in table
    assert all(table.count('<th scope="col"') <= 3 for table in tables if table not in stacked)


def test_the_target_of_the_user_stands_first_and_is_marked(report: Report) -> None:
    table = table_of(report, "Which GPU holds it (projected)")
    assert table.rows[0][0] == "RTX 4090 (your target)"
    assert table.marked == {0}
    assert len(table.rows) == len(load_targets())
    assert html(report).count('<tr class="marked"') == 1
    assert "| **RTX 4090 (your target)** |" in markdown(report)
    recipe = Recipe(model="demo", target="rtx-4090")
    assert evaluation_of(recipe).target == "rtx-4090", "of a recipe and of run --target alike"
    assert report.targets is not None
    plain = report.model_copy(update={"targets": report.targets.model_copy(update={"chosen": None})})
    assert "your target" not in html(plain)
    assert '<tr class="marked"' not in html(plain)


def test_text_of_models_is_shown_as_text_with_what_is_not_visible(report: Report) -> None:
    table = table_of(report, SAMPLES)
    assert table.header == ("Text", "Beginning", "demo", "pruned", "Alike from the start")
    assert table.rows[0][-1] == "2 of 5 tokens"
    page, text = html(report), markdown(report)
    for shown in (page, text):
        assert "<script>" not in shown
        assert "\x1b" not in shown
        assert "\u202e" not in shown
        assert "[5 line breaks]" in shown.replace("\\[", "[").replace("\\]", "]")
    assert "a\\x1b[31m&lt;/td&gt;" in page
    assert "&lt;b&gt;Der" in page
    (row,) = (line for line in text.splitlines() if line.startswith("| german | &lt;b&gt;Der |"))
    assert len(re.split(r"(?<!\\)\|", row)) == 7


def test_what_check_says_has_a_row_for_each_runtime_and_its_sentence_below(report: Report) -> None:
    table = table_of(report, CHECKS)
    assert table.rows == (("vllm", "pruned", "refuses", "2"), ("sglang", "pruned", "loads", "0"))
    assert (table.marks, table.remarks) == (("a", ""), (("a", "No <weights>: it stops."),))
    assert "No &lt;weights&gt;: it stops." in html(report)


def test_a_report_of_before_these_sections_still_loads_and_the_same_gives_the_same_bytes(report: Report) -> None:
    data = report.model_dump(mode="json")
    del data["samples"], data["checks"], data["targets"]["chosen"]
    old = Report.model_validate(data)
    assert (old.samples, old.checks) == (None, ())
    assert SAMPLES not in html(old)
    again = Report.model_validate_json(report.model_dump_json())
    assert (html(again), markdown(again)) == (html(report), markdown(report))
