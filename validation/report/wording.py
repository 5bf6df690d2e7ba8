"""The result in sentences that need no knowledge of language models."""

from collections.abc import Sequence

from moepress.validation.quality.results import Estimate
from moepress.validation.report.cells import percent_text, share_text, size_text
from moepress.validation.report.generation import generation_sentence
from moepress.validation.report.losses import Judged, judged
from moepress.validation.report.schema import Report, SubjectInfo


def plain_words(report: Report) -> tuple[str, ...]:
    """What was gained and what was lost, of the model that the user takes home; nothing where there is only one."""
    others = [s for s in report.subjects[1:] if not s.onnx] or list(report.subjects[1:])
    if not others:
        return ()
    first, result = report.subjects[0], others[-1]
    paired = report.overall(result.label).paired
    if paired is None:
        return (_size(first, result),)
    same = share_text(paired.same_top1.value, digits=0)
    places = f"On the test text it expects the same next piece of a word as the original in {same} of the places"
    return (
        _size(first, result),
        f"{places}; {_change(paired.perplexity_ratio)}.",
        *generation_sentence(report.generation, result.label),
        *_domains(report, result.label, paired.perplexity_ratio),
    )


def _size(first: SubjectInfo, result: SubjectInfo) -> str:
    text = f"The original takes {size_text(first.stored_bytes)}, the result {size_text(result.stored_bytes)}"
    if not first.stored_bytes:
        return f"{text}."
    return f"{text}: {share_text(result.stored_bytes / first.stored_bytes, digits=0)} of it."


def _change(ratio: Estimate) -> str:
    kind, change = judged(ratio), ratio.value - 1
    if kind is Judged.SAME:
        return "how sure it is of the text as a whole has not changed"
    if kind is Judged.WITHIN:
        return "how sure it is of the text as a whole has not changed by more than the error of the measurement"
    return f"it is {'less' if kind is Judged.LOST else 'more'} sure of the text (perplexity {percent_text(change)})"


def _domains(report: Report, label: str, whole: Estimate) -> tuple[str, ...]:
    """Where it lost most and where least; only what exceeds the error of the measurement is called a loss."""
    ratios = {
        row.domain: row.paired.perplexity_ratio
        for row in report.quality.rows
        if row.subject == label and row.scope == "domain" and row.paired is not None
    }
    if len(ratios) < 2:
        return ()
    lost = sorted(
        (domain for domain, ratio in ratios.items() if judged(ratio) is Judged.LOST),
        key=lambda domain: -ratios[domain].value,
    )
    if not lost:
        if judged(whole) is Judged.LOST:
            return ("In no single text is the loss larger than its error.",)
        return ("Nothing measurable was lost in any of the texts.",)
    best = min(ratios, key=lambda domain: ratios[domain].value)
    words = f"{'Most' if len(lost) > 1 else 'Something'} was lost in {lost[0]} "
    words += f"(perplexity {percent_text(ratios[lost[0]].value - 1)})"
    if judged(ratios[best]) is Judged.LOST:
        return (f"{words}, least in {best} ({percent_text(ratios[best].value - 1)}).",)
    spared = [domain for domain in ratios if domain not in lost]
    return (f"{words}, nothing measurable in {_listed(spared)}.",)


def _listed(names: Sequence[str], most: int = 3) -> str:
    if len(names) > most:
        return f"{', '.join(names[:most])} and {len(names) - most} more"
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def imprint(report: Report) -> str:
    """What made the report, and when."""
    tool = f"moepress {report.tool_version}" if report.tool_version else "moepress"
    when = f", {report.created}" if report.created else ""
    return f"Made by {tool}{when}; report schema {report.schema_version}."
