"""Which pictures stand above which table of the page."""

from moepress.validation.report.charts import (
    divergence_chart,
    parts_chart,
    perplexity_chart,
    size_chart,
    throughput_chart,
)
from moepress.validation.report.contents import CHOICE, PARTS, USAGE
from moepress.validation.report.drawing import Picture
from moepress.validation.report.heatmap import usage_maps
from moepress.validation.report.plots import choice_chart, layer_error_chart
from moepress.validation.report.schema import Report


def pictures(report: Report) -> dict[str, tuple[Picture, ...]]:
    """By the table's title, in the order of the page. Each has its figures in that table."""
    found: dict[str, tuple[Picture, ...]] = {
        "Size": (Picture(svg=size_chart(report)),),
        "Perplexity": (Picture(svg=perplexity_chart(report)),),
    }
    if any(subject.parts for subject in report.subjects):
        found[PARTS] = (Picture(svg=parts_chart(report)),)
    if any(row.paired is not None for row in report.quality.rows):
        found["Divergence from the first model"] = (Picture(svg=divergence_chart(report)),)
    if report.throughput is not None and any(row.tokens_per_second is not None for row in report.throughput.rows):
        found["Throughput"] = (Picture(svg=throughput_chart(report)),)
    if report.usage is not None:
        found[USAGE] = usage_maps(report.usage)
    if report.choice is not None:
        found[CHOICE] = (Picture(svg=choice_chart(report.choice)),)
    if report.quantization is not None and report.quantization.layers:
        found["Quantization"] = (Picture(svg=layer_error_chart(report.quantization)),)
    return found
