"""The report in its first lines, and what a reader should know beside the figures."""

from moepress.validation.quality.generation import RECOMMENDED
from moepress.validation.report.cells import percent_text, size_change, size_text, three_figures
from moepress.validation.report.generation import visible_text
from moepress.validation.report.losses import Judged, judged
from moepress.validation.report.lost import lost_text
from moepress.validation.report.schema import Report

BLINDNESS = (
    "Perplexity alone misses damage: a pruned model may keep it and still lose much of its skill at tasks such as "
    "arithmetic. Try the result on your own task before you rely on it."
)


def headlines(report: Report) -> tuple[str, ...]:
    """One sentence for each compared subject: size, perplexity, and domains that are lost.

    The last one (what the user takes home) comes first, exports to ONNX of the same weights behind the others.
    """
    first = report.subjects[0]
    before = report.overall(first.label).perplexity.value
    title = report.title or first.label
    if len(report.subjects) == 1:
        return (f"{title}: {size_text(first.stored_bytes)}, perplexity {three_figures(before)}",)
    lines = []
    for subject in sorted(report.subjects[:0:-1], key=lambda subject: subject.onnx):
        row = report.overall(subject.label)
        name = title if len(report.subjects) == 2 else f"{title}, {subject.label}"
        change = row.perplexity.value / before - 1
        size = f"{size_text(first.stored_bytes)} → {size_text(subject.stored_bytes)} ({size_change(first, subject)})"
        within = row.paired is not None and judged(row.paired.perplexity_ratio) is Judged.WITHIN
        quality = f"perplexity {percent_text(change)}{', within the error' if within else ''} "
        quality += f"({three_figures(before)} → {three_figures(row.perplexity.value)})"
        lines.append(f"{name}: {size}, {quality}{lost_text(report, subject.label)}")
    return tuple(lines)


def warnings(report: Report) -> tuple[str, ...]:
    """What the reader must know before believing the numbers: the caller's notes, the corpus's, and our own."""
    found = [*report.notes, *report.quality.notes]
    if report.quality.embedded:
        found.append("Measured on the small default text of moepress: for a decision, evaluate on text of your own.")
    if report.calibration is not None and report.calibration.embedded:
        found.append(
            "Calibrated on the small default text of moepress: use text of your own domain for better results."
        )
    if report.quantization is not None and report.quantization.fallback_experts:
        count = len(report.quantization.fallback_experts)
        found.append(
            f"{count} {'expert was' if count == 1 else 'experts were'} rounded to nearest: no tokens came there, or "
            "the solver failed."
        )
    if report.generation is not None and report.generation.prompts < RECOMMENDED and len(report.generation.rows) > 1:
        found.append(visible_text(report.generation))
    if len(report.subjects) > 1:
        found.append(BLINDNESS)
    if any(row.scope == "domain" and row.windows < 2 for row in report.quality.rows):
        found.append("A domain has a single window, so its numbers and the means have no standard error.")
    return tuple(found)
