"""Which pictures stand above which table of the page."""

from collections.abc import Callable
from typing import Any

from moepress.validation.report.charts import (
    divergence_chart,
    parts_chart,
    perplexity_chart,
    size_chart,
    throughput_chart,
    timed_tests,
)
from moepress.validation.report.contents import CHOICE, PARTS, USAGE
from moepress.validation.report.drawing import Picture, picture
from moepress.validation.report.heatmap import usage_maps
from moepress.validation.report.plots import choice_chart, curve_chart, layer_error_chart
from moepress.validation.report.routing import ROUTING, routing_chart
from moepress.validation.report.schema import Report


def pictures(report: Report) -> dict[str, tuple[Picture, ...]]:
    """By the table's title, in the order of the page. Each has its figures in that table."""
    found: dict[str, tuple[Picture, ...]] = {
        "Size": (picture("Size on disk", _of(size_chart, report)),),
        "Perplexity": (picture("Perplexity by text (lower is better)", _of(perplexity_chart, report)),),
    }
    if any(subject.parts for subject in report.subjects):
        found[PARTS] = (picture("Size on disk by part of the model", _of(parts_chart, report)),)
    if any(row.paired is not None for row in report.quality.rows):
        caption = "KL divergence by text, nats per token (lower is better)"
        found["Divergence from the first model"] = (picture(caption, _of(divergence_chart, report)),)
    if timed_tests(report):
        found["Throughput"] = tuple(_speed(report, test) for test in timed_tests(report))
    if report.usage is not None:
        found[USAGE] = usage_maps(report.usage)
    if report.choice is not None and report.choice.curve:
        caption = "Estimated KL divergence by size, nats per token (lower is better)"
        found[CHOICE] = (picture(caption, _of(curve_chart, report.choice)),)
    elif report.choice is not None:
        found[CHOICE] = (picture("Estimated loss by size (lower is better)", _of(choice_chart, report.choice)),)
    if report.quantization is not None and report.quantization.layers:
        caption = "Mean relative error by layer (lower is better)"
        found["Quantization"] = (picture(caption, _of(layer_error_chart, report.quantization)),)
    if report.quality.routing:
        caption = "Tokens that choose otherwise than in the first model, by layer"
        found[ROUTING] = (picture(caption, _of(routing_chart, report)),)
    return found


def _of(chart: Callable[..., str], *what: Any) -> Callable[[bool], str]:
    return lambda broad: chart(*what, broad=broad)


def _speed(report: Report, test: str) -> Picture:
    kind = {"pp": ", reading a prompt", "tg": ", writing"}.get(test[:2], "")
    caption = f"{test}{kind}: tokens per second (higher is better)"
    return picture(caption, _of(throughput_chart, report, test))
