"""Pictures of the report: what they show, in which colours, and that they stand on their own."""

import dataclasses
import io
import re
from base64 import b64decode
from pathlib import Path
from xml.etree import ElementTree as ET

import numpy as np
import pytest
import torch
from stage_runs import corpus_of, profile_of

from moepress.compress.budget.search import Alternative
from moepress.compress.pruning.plan import make_plan
from moepress.validation.quality.results import Estimate, Quality, Throughput, ThroughputRow
from moepress.validation.report.charts import (
    divergence_chart,
    parts_chart,
    perplexity_chart,
    throughput_chart,
    timed_tests,
)
from moepress.validation.report.contents import CHOICE, PARTS, USAGE, contents
from moepress.validation.report.drawing import new_figure, styled, svg
from moepress.validation.report.heatmap import cells, strengths, usage_maps
from moepress.validation.report.html import html
from moepress.validation.report.pictures import pictures
from moepress.validation.report.plots import choice_chart, layer_error_chart
from moepress.validation.report.schema import (
    Choice,
    DomainUsage,
    LayerError,
    Quantization,
    Report,
    SubjectInfo,
    Usage,
)
from moepress.validation.report.sections import choice_section, usage_section

ROWS = (
    Alternative(experts=16, bits=None, weight_bytes=9_000_000, loss=0.0, fits=False),
    Alternative(experts=16, bits=4, weight_bytes=4_000_000, loss=0.01, fits=True, chosen=True),
    Alternative(experts=8, bits=4, weight_bytes=3_000_000, loss=0.3, fits=True),
    Alternative(experts=8, bits=8, weight_bytes=5_000_000, loss=0.2, fits=False),
    Alternative(experts=8, bits=3.5, mixed=True, weight_bytes=2_800_000, loss=0.35, fits=True),
)


@pytest.fixture(scope="module")
def usage(demo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Usage:
    """A real profile of the demo on two domains, half of the experts kept."""
    windows = torch.randint(0, 200, (8, 32), generator=torch.Generator().manual_seed(1))
    corpus = corpus_of(windows, torch.tensor([0, 0, 0, 0, 1, 1, 1, 1]), ("prose", "code"))
    profile = profile_of(demo_folder, corpus, tmp_path_factory.mktemp("profile") / "work", leave_one_out=False)
    plan = make_plan(profile, count=8)
    found = usage_section(profile, plan)
    assert choice_section(plan) is None
    assert found.kept == tuple(tuple(plan.keep[layer]) for layer in profile.layers)
    return found


@pytest.fixture(scope="module")
def report(quality: Quality, usage: Usage) -> Report:
    def speed(subject: str, test: str, value: float | None) -> ThroughputRow:
        mean = None if value is None else Estimate(value=value, error=1.0)
        return ThroughputRow(
            subject=subject, test=test, tokens_per_second=mean, runtime="transformers 5.23.0", provider="CPU"
        )

    rows = (speed("demo", "pp512", 300.0), speed("pruned", "pp512", 400.0), speed("pruned", "tg128", None))
    return Report(
        subjects=(
            SubjectInfo(
                label="demo", stored_bytes=9000, parameters=4500, parts={"routed experts": 8000, "norms": 1000}
            ),
            SubjectInfo(label="copy", stored_bytes=9000, parameters=4500),
            SubjectInfo(
                label="pruned", stored_bytes=5000, parameters=2500, parts={"routed experts": 4000, "norms": 1000}
            ),
        ),
        quality=quality,
        throughput=Throughput(device="a processor", threads=1, repetitions=2, rows=rows),
        usage=usage,
        choice=Choice(limit_bytes=4_200_000, rows=ROWS),
        quantization=Quantization(
            scheme="4 bits", layers=tuple(LayerError(layer=n, mean_relative_error=0.01 * n) for n in range(1, 5))
        ),
    )


def label_of(picture: str) -> str:
    found = ET.fromstring(picture).get("aria-label")
    assert found
    return found


def images_of(picture: str) -> list[np.ndarray]:
    from PIL import Image

    data = re.findall(r'href="data:image/png;base64,([^"]+)"', picture)
    return [np.asarray(Image.open(io.BytesIO(b64decode(text))).convert("RGBA")) for text in data]


def test_every_section_with_figures_has_a_picture_and_a_table(report: Report) -> None:
    found, titles = pictures(report), [table.title for table in contents(report)]
    assert set(found) <= set(titles)
    assert {"Size", "Perplexity", PARTS, USAGE, CHOICE, "Quantization", "Throughput"} < set(found)
    assert [len(found[title]) for title in (USAGE, CHOICE)] == [2, 1]
    assert [picture.caption.rpartition(": ")[2] for picture in found[USAGE]] == ["prose", "code"]


def test_pictures_are_well_formed_named_and_ask_for_nothing(report: Report) -> None:
    for shown in pictures(report).values():
        for picture in shown:
            for drawn in filter(None, (picture.svg, picture.broad)):
                root = ET.fromstring(drawn)
                assert root.get("role") == "img"
                assert len(root.get("aria-label") or "") > 20
                assert not re.search(r"#0102|#0a0b|#000000|\w+://", re.sub(r"base64,[^\"]+", "", drawn))


def test_ids_are_unique_among_all_pictures(report: Report) -> None:
    ids = re.findall(r'\bid="([^"]+)"', html(report))
    assert len(ids) == len(set(ids)) > 50


def test_the_same_report_gives_the_same_page(report: Report) -> None:
    assert html(report) == html(Report.model_validate_json(report.model_dump_json()))


def test_the_map_shows_every_count_and_strikes_removed_experts_out(report: Report, usage: Usage) -> None:
    first, second = usage_maps(usage)
    image = max(images_of(first.svg), key=lambda image: image.size)
    layers, experts, side = len(usage.layers), len(usage.domains[0].counts[0]), 12
    assert image.shape == (layers * side, experts * side, 4)
    assert images_of(second.svg)[0].tobytes() != image.tobytes()
    assert usage.kept is not None
    strength = strengths(usage.domains[0].counts)
    for row in range(layers):
        for expert in range(experts):
            cell = image[row * side : (row + 1) * side, expert * side : (expert + 1) * side]
            assert abs(int(cell[0, 0, 3]) - 255 * strength[row, expert]) <= 255 / 31
            kept = expert in usage.kept[row]
            assert (cell[0, 0, 2] > cell[0, 0, 0]) == kept, "kept experts are blue, others orange"
            stroke = [cell[side - 1 - pixel, pixel, 3] for pixel in range(side)]
            assert kept or stroke == [255] * side


def test_without_pruning_no_expert_is_struck_out(usage: Usage) -> None:
    whole = usage.model_copy(update={"kept": None})
    image = images_of(usage_maps(whole)[0].svg)[0]
    assert (image[..., 2] > image[..., 0]).all()
    assert "removed" not in usage_maps(whole)[0].svg
    assert "removed" in usage_maps(usage)[0].svg


def test_strength_is_the_root_of_the_share_and_ends_at_four_even_shares() -> None:
    found = strengths([[0, 1, 2, 4, 1, 0, 0, 0], [0] * 8, [8] + [0] * 7])
    assert found[0].tolist() == pytest.approx([0, 0.5, 0.5**0.5, 1, 0.5, 0, 0, 0])
    assert found[1].tolist() == [0] * 8
    assert found[2, 0] == 1.0
    assert cells(found, np.ones((3, 8), np.bool_), 4)[..., 3].max() == 255


def test_usage_is_told_in_figures(report: Report, usage: Usage) -> None:
    (table,) = (table for table in contents(report) if table.title == USAGE)
    assert table.header[3:] == ("Choices of experts that stay, prose", "Choices of experts that stay, code")
    for row, cells_of_row in enumerate(table.rows):
        counts, kept = usage.domains[1].counts[row], (usage.kept or ())[row]
        assert cells_of_row[0] == str(usage.layers[row])
        assert cells_of_row[4] == f"{sum(counts[e] for e in kept) / sum(counts) * 100:.1f} %"
    assert all(sum(counts) == 4 * 32 * usage.top_k for domain in usage.domains for counts in domain.counts)


def test_a_map_of_deepseek_r1_stays_small(usage: Usage) -> None:
    generator = np.random.default_rng(0)
    counts = generator.gamma(0.5, 200.0, (3, 58, 256)).astype(int)
    large = Usage(
        layers=tuple(range(3, 61)),
        top_k=8,
        kept=tuple(tuple(range(row % 2, 256, 2)) for row in range(58)),
        domains=tuple(
            DomainUsage(domain=name, counts=tuple(map(tuple, counts[n].tolist()))) for n, name in enumerate("abc")
        ),
    )
    maps = usage_maps(large)
    assert all(picture.wide for picture in maps)
    assert sum(len(picture.svg) for picture in maps) < 1_500_000


def test_divergence_is_drawn_for_compared_models_alone(report: Report) -> None:
    spoken = label_of(divergence_chart(report))
    assert "demo:" not in spoken
    for domain in report.quality.domains:
        paired = report.quality.row("pruned", domain).paired
        assert paired is not None
        assert f"{domain} {paired.kl.value:.3g}" in spoken
    assert "var(--series-3)" in divergence_chart(report), "the colour of the third subject, as in the other pictures"
    assert "var(--series-1)" not in divergence_chart(report)


def test_speeds_that_were_not_measured_are_left_out(report: Report) -> None:
    assert timed_tests(report) == ("pp512",)
    spoken = label_of(throughput_chart(report, "pp512"))
    assert "demo: transformers, CPU 300; pruned: transformers, CPU 400" in spoken


def test_parts_are_those_of_subjects_that_know_them(report: Report) -> None:
    assert label_of(parts_chart(report)).endswith(
        "demo: routed experts 8.0 kB, norms 1.0 kB; pruned: routed experts 4.0 kB, norms 1.0 kB"
    )


def test_the_chosen_alternative_is_named_and_marked(report: Report) -> None:
    assert report.choice is not None
    drawn = choice_chart(report.choice)
    assert "chosen: 16 experts, 4 bits, 4.0 MB, estimated loss 1.00 %" in label_of(drawn)
    for name in ("4 bits", "8 bits", "mixed, 3.50 bits", "not quantized", "budget", "chosen"):
        assert f">{name}</text>" in drawn
    (table,) = (table for table in contents(report) if table.title == CHOICE)
    assert [row[0] for row in table.rows] == ["too large", "chosen", "fits", "too large", "fits"]
    lossless = Choice(limit_bytes=1, rows=ROWS[:1])
    assert "1 alternatives" in label_of(choice_chart(lossless))


def test_the_worst_layer_is_named() -> None:
    rows = (LayerError(layer=3, mean_relative_error=0.05), LayerError(layer=7, mean_relative_error=0.2))
    assert label_of(layer_error_chart(Quantization(scheme="4 bits", layers=rows))).endswith("the largest in layer 7")


def test_infinite_values_leave_no_bar_and_no_error(report: Report) -> None:
    rows = tuple(
        dataclasses.replace(row, perplexity=Estimate(value=float("inf"), error=float("nan")))
        if row.subject == "pruned"
        else row
        for row in report.quality.rows
    )
    made = report.model_copy(update={"quality": dataclasses.replace(report.quality, rows=rows)})
    assert "pruned: " in label_of(perplexity_chart(made))


def test_names_are_shown_as_they_are() -> None:
    with styled():
        figure = new_figure(1.0)
        figure.axes[0].set_xlabel("a $\\frac{b$ <&> 漢字")
        drawn = svg(figure, "odd", 'a "quoted" <name>')
    root = ET.fromstring(drawn)
    assert root.get("aria-label") == 'a "quoted" <name>'
    assert "a $\\frac{b$ <&> 漢字" in "".join(root.itertext())
