"""The report's three forms, and what a terminal shows."""

import dataclasses
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from pydantic import ValidationError
from rich.console import Console

from moepress.validation.quality.results import Estimate, Quality, Throughput, ThroughputRow
from moepress.validation.quality.thresholds import Thresholds, judge
from moepress.validation.report.files import write_report
from moepress.validation.report.html import html
from moepress.validation.report.lost import lost_text
from moepress.validation.report.markdown import markdown
from moepress.validation.report.schema import (
    Calibration,
    DomainLoss,
    Environment,
    ExpertName,
    LayerError,
    Pruning,
    Quantization,
    Report,
    SubjectInfo,
)
from moepress.validation.report.terminal import print_tables

VOID = {"meta", "link", "br", "hr", "img", "input"}


@pytest.fixture(scope="module")
def report(quality: Quality) -> Report:
    rows = tuple(row for row in quality.rows if row.subject != "copy")
    routing = tuple(row for row in quality.routing if row.subject != "copy")
    speeds = (
        ThroughputRow(
            subject="demo",
            runtime="transformers 5.23.0",
            provider="CPU",
            dtype="float32",
            test="pp384",
            tokens_per_second=Estimate(value=3000.0, error=9.0),
            samples=(2990.0, 3010.0),
        ),
        ThroughputRow(
            subject="pruned, ONNX",
            runtime="ONNX Runtime 1.32.0",
            provider="CUDA",
            dtype="float16",
            test="pp384",
            tokens_per_second=Estimate(value=9000.0, error=9.0),
            samples=(8990.0, 9010.0),
            ratio=Estimate(value=3.0, error=0.1),
            note="ratio: to demo in transformers 5.23.0",
        ),
        ThroughputRow(subject="pruned", test="-", tokens_per_second=None, note="not measured: needs 9.0 GiB"),
    )
    return Report(
        tool_version="0.1.0",
        created="2026-11-23T13:40:00+00:00",
        title="demo <model>",
        subjects=(
            SubjectInfo(
                label="demo", folder="demo", stored_bytes=9_268_136, parameters=4_618_880, experts_per_layer=16
            ),
            SubjectInfo(label="pruned", stored_bytes=3_100_000, parameters=3_045_760, experts_per_layer=8, bits=4.5),
        ),
        quality=dataclasses.replace(quality, rows=rows, routing=routing),
        throughput=Throughput(device="a processor", threads=2, repetitions=2, rows=speeds),
        thresholds=judge(Thresholds(max_ppl_increase=1e-6, max_kl=9.0), rows),
        pruning=Pruning(
            criterion="reap",
            kept=8,
            total=16,
            domains=(DomainLoss(domain="german", gate_mass_lost=0.12, reap_mass_lost=0.05),),
            keep_set_stability=0.9,
        ),
        quantization=Quantization(
            scheme="4 bits, groups of 32, symmetric",
            layers=(LayerError(layer=1, mean_relative_error=0.05),),
            fallback_experts=(ExpertName(layer=2, expert=7),),
        ),
        calibration=Calibration(sources=("a|b.txt",), embedded=True, tokens=4096, seed=0, digest="ab"),
        notes=("An expert has `few` tokens | <script>alert(1)</script>",),
        environment=Environment(versions={"torch": "2.13.0"}, device="cpu", cpus=2, platform="Linux"),
        commands=("moepress validate demo out",),
        recipe="model: demo\n",
    )


@pytest.fixture(scope="module")
def bare(report: Report) -> Report:
    """Only what a report can not do without, one subject, a single window in a single domain."""
    quality = report.quality
    rows = tuple(
        dataclasses.replace(row, windows=1, nll=Estimate(value=1.0), perplexity=Estimate(value=2.7))
        for row in quality.rows
        if row.subject == "demo"
    )
    bare = dataclasses.replace(quality, rows=rows, routing=(), embedded=False)
    return Report(subjects=report.subjects[:1], quality=bare)


class Balance(HTMLParser):
    """Collects tags that are closed in the wrong order, and all attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.wrong: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.tags: list[str] = []
        self.elements: list[tuple[str, list[tuple[str, str | None]]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.elements.append((tag, attrs))
        self.attributes += attrs
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        if not self.stack or self.stack.pop() != tag:
            self.wrong.append(tag)


def parsed(page: str) -> Balance:
    balance = Balance()
    balance.feed(page)
    balance.close()
    return balance


def test_json_round_trips_through_the_model(report: Report, bare: Report, tmp_path: Path) -> None:
    for number, one in enumerate((report, bare)):
        paths = write_report(one, tmp_path / str(number))
        assert [path.name for path in paths] == ["report.json", "report.md", "report.html", "junit.xml"]
        assert Report.model_validate_json(paths[0].read_text()) == one
        assert {path.name for path in paths[0].parent.iterdir()} == {path.name for path in paths}


def test_infinite_perplexity_survives_json(bare: Report) -> None:
    rows = tuple(dataclasses.replace(row, perplexity=Estimate(value=float("inf"))) for row in bare.quality.rows)
    worst = bare.model_copy(update={"quality": dataclasses.replace(bare.quality, rows=rows)})
    text = worst.model_dump_json()
    assert '"Infinity"' in text
    assert Report.model_validate_json(text) == worst


def test_another_schema_version_and_unknown_keys_are_refused(report: Report) -> None:
    data = report.model_dump()
    for change in ({"schema_version": "2.0"}, {"surplus": 1}):
        with pytest.raises(ValidationError):
            Report.model_validate({**data, **change})


def test_the_page_asks_for_nothing_from_outside(report: Report) -> None:
    page = html(report)
    assert re.findall(r"\w+://[^\s\"'<]*", page) == []
    assert "@import" not in page
    found = parsed(page)
    assert "script" not in found.tags
    links = [value for name, value in found.attributes if name in {"src", "href", "xlink:href", "srcset"}]
    assert all(value is not None and value.startswith(("#", "data:")) for value in links)


def test_the_page_is_balanced_with_unique_ids(report: Report, bare: Report) -> None:
    for one in (report, bare):
        found = parsed(html(one))
        assert (found.wrong, found.stack) == ([], [])
        ids = [value for name, value in found.attributes if name == "id"]
        assert len(ids) == len(set(ids))
        assert {value for name, value in found.attributes if name == "aria-labelledby"} <= set(ids)
        targets = {value[1:] for name, value in found.attributes if name == "href" and value and value[0] == "#"}
        assert targets <= set(ids)


def test_the_page_can_be_read_by_ear_and_in_the_dark(report: Report) -> None:
    page = html(report)
    assert '<html lang="en">' in page
    assert "prefers-color-scheme: dark" in page
    found = parsed(page)
    named = [dict(attributes) for tag, attributes in found.elements if tag in {"svg", "img"}]
    assert len(named) == 2 * 6, "size, perplexity, divergence, speed, error by layer, routing; narrow and broad"
    assert all(one.get("role") == "img" and len(one.get("aria-label") or "") > 20 for one in named)
    assert all(dict(attributes).get("scope") in {"col", "row"} for tag, attributes in found.elements if tag == "th")
    assert found.tags.count("caption") == found.tags.count("table")
    levels = [int(tag[1]) for tag in found.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert set(levels[1:]) == {2}
    assert "currentColor" in page
    assert "var(--series-2)" in page
    assert not re.search(r"#0102|#0a0b", page), "a marker colour of the charts is left"
    assert "#000000" not in page, "black ink is invisible in the dark"


def luminance(colour: str) -> float:
    """Relative luminance of #rgb or #rrggbb, as WCAG 2 defines it."""
    digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
    parts = [int(digits[n : n + 2], 16) / 255 for n in (0, 2, 4)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    dark, light = sorted(map(luminance, (one, other)))
    return (light + 0.05) / (dark + 0.05)


def test_colours_stand_out_on_light_and_on_dark_paper(report: Report) -> None:
    schemes = re.findall(r":root \{(.*?)\}", html(report), flags=re.DOTALL)
    assert len(schemes) == 2
    for scheme in schemes:
        colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]+)", scheme))
        texts = [(ink, paper) for ink in ("ink", "soft", "series-2") for paper in ("paper",)]
        for ink, paper in [*texts, ("ink", "shade"), ("ink", "warn-shade"), ("warn", "warn-shade")]:
            assert contrast(colours[ink], colours[paper]) >= 4.5, (ink, paper)
        for number in range(1, 7):
            assert contrast(colours[f"series-{number}"], colours["paper"]) >= 3


def test_the_page_can_be_used_with_the_keyboard_and_printed(report: Report) -> None:
    page = html(report)
    found = parsed(page)
    (main,) = (dict(attributes) for tag, attributes in found.elements if tag == "main")
    first = next(dict(attributes) for tag, attributes in found.elements if tag == "a")
    assert first["href"] == f"#{main['id']}"
    frames = [dict(attributes) for _, attributes in found.elements if ("class", "scroll") in attributes]
    assert all(one.get("tabindex") == "0" and (one.get("aria-label") or one.get("aria-labelledby")) for one in frames)
    assert "@media print" in page
    assert "focus-visible" in page


def test_long_tables_are_folded_below_their_picture(report: Report) -> None:
    assert report.quantization is not None
    assert "<details>" not in html(report)
    rows = tuple(LayerError(layer=n, mean_relative_error=0.01) for n in range(13))
    made = report.model_copy(update={"quantization": report.quantization.model_copy(update={"layers": rows})})
    assert parsed(html(made)).tags.count("details") == 1
    assert "The figures as a table (13 rows)" in html(made)


def test_the_result_is_told_in_plain_words(report: Report) -> None:
    text = markdown(report).splitlines()[2]
    assert text.startswith(
        "The original takes 9.3 MB, the result 3.1 MB: 33 % of it. On the test text it expects the same"
    )
    paired = report.overall("pruned").paired
    assert paired is not None
    assert f"in {paired.same_top1.value * 100:.0f} % of the places" in text
    losses = {
        domain: found.perplexity_ratio.value
        for domain in report.quality.domains
        if (found := report.quality.row("pruned", domain).paired) is not None
    }
    assert f"Most was lost in {max(losses, key=losses.__getitem__)} (" in text


def test_warnings_name_rounded_experts_and_what_perplexity_does_not_see(report: Report, bare: Report) -> None:
    assert "1 expert was rounded to nearest" in markdown(report)
    assert "Perplexity alone misses damage" in html(report)
    assert "misses damage" not in html(bare)


def test_a_report_without_the_newer_sections_still_loads(report: Report) -> None:
    data = json.loads(report.model_dump_json())
    for name in ("usage", "choice"):
        del data[name]
    for subject in data["subjects"]:
        del subject["parts"]
    assert Report.model_validate_json(json.dumps(data)) == report


def test_text_is_escaped_everywhere(report: Report) -> None:
    page, text = html(report), markdown(report)
    assert "<script>" not in page
    assert "<script>" not in text
    assert "demo &lt;model&gt;" in page
    assert r"\`few\` tokens \| &lt;script" in text
    assert r"a\|b.txt" in text


def test_markdown_begins_with_a_sentence_for_everybody(report: Report) -> None:
    before, after = (report.overall(label).perplexity.value for label in ("demo", "pruned"))
    first = markdown(report).splitlines()[0]
    assert first == (
        f"# demo &lt;model&gt;: 9.3 MB → 3.1 MB (−67 %), perplexity +{(after / before - 1) * 100:.1f} % "
        f"({before:.1f} → {after:.1f}){lost_text(report, 'pruned')}"
    )


def test_markdown_has_a_row_for_every_domain(report: Report) -> None:
    lines = markdown(report).splitlines()
    for domain in (*report.quality.domains, "all windows", "mean over domains"):
        (row,) = (line for line in lines if line.startswith(f"| {domain} | +"))
        assert f"{report.quality.row('demo', domain).perplexity.value:.2f} ±" in row
    tables = re.findall(r"(?:^\|.*\|\n)+", markdown(report), flags=re.MULTILINE)
    for table in tables:
        widths = {len(re.split(r"(?<!\\)\|", line)) for line in table.splitlines()}
        assert len(widths) == 1


def test_every_section_is_shown(report: Report) -> None:
    for text in (markdown(report), html(report)):
        for part in (
            "missed",
            "not measured: needs 9.0 GiB",
            "chosen by reap",
            "agree by 90 %",
            "layer 2 expert 7",
            "GPTQ papers",
            report.quality.digest,
            "32 tokens",
            "adds BOS",
            "moepress validate demo out",
            "model: demo",
            "Calibrated on the small default text",
            "report schema 1.0",
        ):
            assert part in text


def test_every_speed_names_its_runtime_and_provider(report: Report) -> None:
    row = "| pruned, ONNX <sup>a</sup> | ONNX Runtime 1.32.0, CUDA, float16 | pp384 | 9000 ± 9 | 3.00 ± 0.10 |"
    assert row in markdown(report)
    assert "- <sup>a</sup> ratio: to demo in transformers 5.23.0" in markdown(report)
    assert "ONNX Runtime 1.32.0, CUDA, float16" in html(report)
    out = io.StringIO()
    print_tables(report, Console(file=out, width=140))
    assert re.search(r"pruned, ONNX \(a\) +ONNX Runtime, CUDA +pp384 +9000 ± 9 +3.00 ± 0.10", out.getvalue())


def test_what_computed_the_quality_is_said_by_runtime(report: Report) -> None:
    runtimes = {"demo": "torch 2", "pruned": "torch 2", "pruned, ONNX": "ONNX Runtime 1.32.0"}
    made = report.model_copy(update={"quality": dataclasses.replace(report.quality, runtimes=runtimes)})
    for line in ("| Computed: demo, pruned | torch 2 |", "| Computed: pruned, ONNX | ONNX Runtime 1.32.0 |"):
        assert line in markdown(made)


def test_onnx_subjects_may_have_uneven_experts_and_come_last_in_the_headlines(report: Report) -> None:
    quality = report.quality
    onnx = [dataclasses.replace(row, subject="onnx") for row in quality.rows if row.subject == "pruned"]
    made = report.model_copy(
        update={
            "quality": dataclasses.replace(quality, rows=(*quality.rows, *onnx)),
            "subjects": (
                *report.subjects,
                SubjectInfo(label="onnx", stored_bytes=9, parameters=0, experts_per_layer=(6, 8), onnx=True),
            ),
        }
    )
    assert "| onnx | −99.999 % | 9 B | – | 6 to 8 | – |" in markdown(made)
    assert markdown(made).startswith("# demo &lt;model&gt;, pruned: ")
    assert Report.model_validate_json(made.model_dump_json()) == made


def test_a_single_window_is_said_to_have_no_error(bare: Report) -> None:
    assert "single window" in markdown(bare)
    assert markdown(bare).startswith("# demo: 9.3 MB, perplexity 2.70\n")


def test_the_terminal_shows_before_and_after(report: Report) -> None:
    out = io.StringIO()
    print_tables(report, Console(file=out, width=140))
    text = out.getvalue()
    for part in (
        "9.3 MB → 3.1 MB",
        "Perplexity",
        "german",
        "same top-1",
        "not measured: needs 9.0 GiB",
        "missed",
        "Note:",
    ):
        assert part in text


def test_charts_are_the_same_every_time(report: Report) -> None:
    assert html(report) == html(report)
