"""The result in sentences that need no knowledge of language models."""

from moepress.validation.quality.results import Estimate
from moepress.validation.quality.thresholds import SIGMAS
from moepress.validation.report.cells import percent_text, size_text
from moepress.validation.report.schema import Report, SubjectInfo


def plain_words(report: Report) -> tuple[str, ...]:
    """What was gained and what was lost, of the model that the user takes home; nothing where there is only one."""
    others = [s for s in report.subjects[1:] if not s.onnx] or list(report.subjects[1:])
    if not others:
        return ()
    first, result = report.subjects[0], others[-1]
    paired = report.overall(result.label).paired
    words = [_size(first, result)]
    if paired is not None:
        words.append(
            "On the test text it expects the same next piece of a word as the original in "
            f"{paired.same_top1.value:.0%} of the places; {_change(paired.perplexity_ratio)}."
        )
    return (*words, *_domains(report, result.label))


def _size(first: SubjectInfo, result: SubjectInfo) -> str:
    text = f"The original takes {size_text(first.stored_bytes)}, the result {size_text(result.stored_bytes)}"
    return f"{text}: {result.stored_bytes / first.stored_bytes:.0%} of it." if first.stored_bytes else f"{text}."


def _change(ratio: Estimate) -> str:
    change = ratio.value - 1
    if ratio.error is not None and abs(change) <= SIGMAS * ratio.error:
        return "how sure it is of the text has not changed by more than the error of the measurement"
    return f"it is {'less' if change > 0 else 'more'} sure of the text (perplexity {percent_text(change)})"


def _domains(report: Report, label: str) -> tuple[str, ...]:
    changes = {
        row.domain: row.paired.perplexity_ratio.value - 1
        for row in report.quality.rows
        if row.subject == label and row.scope == "domain" and row.paired is not None
    }
    if len(changes) < 2:
        return ()
    worst, best = max(changes, key=changes.__getitem__), min(changes, key=changes.__getitem__)
    most, least = percent_text(changes[worst]), percent_text(changes[best])
    return (f"Most was lost in {worst} (perplexity {most}), least in {best} ({least}).",)


def imprint(report: Report) -> str:
    """What made the report, and when."""
    tool = f"moepress {report.tool_version}" if report.tool_version else "moepress"
    when = f", {report.created}" if report.created else ""
    return f"Made by {tool}{when}; report schema {report.schema_version}."
