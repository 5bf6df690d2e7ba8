"""The report's tables in reading order: those of `validation.report.tables`, and what the plan knew between them."""

from collections.abc import Sequence

from moepress.compress.budget.search import Unit
from moepress.compress.gptq.include import parts_text
from moepress.compress.gptq.kinds import kind_text, range_text
from moepress.validation.quality.results import Samples
from moepress.validation.report.cells import Table, prose_text, share_text, size_text
from moepress.validation.report.generation import generation_tables
from moepress.validation.report.heatmap import FULL_SHARE
from moepress.validation.report.plots import bits_name, loss_text
from moepress.validation.report.remarks import lettered
from moepress.validation.report.routing import routing_table
from moepress.validation.report.schema import Choice, Report, RuntimeCheck, Usage
from moepress.validation.report.tables import GPUS, tables

PARTS, USAGE, CHOICE = "Size by part", "Use of the experts", "What else would have been possible"
SAMPLES, CHECKS = "Text before and after", "What the runtimes do with it"


def contents(report: Report) -> tuple[Table, ...]:
    """All tables that have content, in reading order."""
    found = list(tables(report))
    _insert(found, _parts(report), after=("Size",))
    if report.samples is not None:
        _insert(found, _samples(report.samples), after=("Divergence from the first model", "Perplexity"))
    for table in reversed(generation_tables(report.generation)):
        _insert(found, table, after=("Agreement with", "Divergence by", "Divergence from", "Perplexity"))
    _insert(found, _checks(report.checks), after=("Measured here", GPUS, "Quantization", "Pruning", "Throughput"))
    _insert(
        found, routing_table(report), after=("Quantization", "Pruning", "Throughput", "Divergence from the first model")
    )
    decided = _decided(report.choice) if report.choice is not None else []
    decided += [_usage(report.usage)] if report.usage is not None else []
    for table in decided:
        _insert(found, table, after=("Pruning", "Throughput", "Divergence from the first model"))
    return tuple(table for table in found if table.rows)


def _insert(found: list[Table], table: Table, *, after: Sequence[str]) -> None:
    """Behind the first of these titles that is there, else at the end."""
    titles = [each.title for each in found]
    place = next((n + 1 for title in after for n, known in enumerate(titles) if known.startswith(title)), len(found))
    found.insert(place, table)


def _parts(report: Report) -> Table:
    known = [subject for subject in report.subjects if subject.parts]
    names = dict.fromkeys(part for subject in known for part in subject.parts)
    rows = [(name, *(size_text(subject.parts.get(name, 0)) for subject in known)) for name in names]
    header = ("Part", *(subject.label for subject in known))
    return Table(title=PARTS, header=header, rows=tuple(rows), numeric=len(known))


def _decided(choice: Choice) -> list[Table]:
    """Behind each other, the last first: every one is put in at the same place."""
    return [_types(choice), _curve(choice)] if choice.curve else [_choice(choice)]


def _curve(choice: Choice) -> Table:
    """The best mixes of several sizes."""
    rows = [
        (
            "chosen" if row.chosen else "fits" if row.weight_bytes <= choice.limit_bytes else "too large",
            str(row.experts),
            f"{row.bits:.2f}",
            size_text(row.weight_bytes),
            f"{row.kl:.2e}",
        )
        for row in choice.curve
    ]
    note = (
        f"The file may take {size_text(choice.limit_bytes)}. The divergence from the original is an estimate made "
        "before anything was pressed, from what rounding each kind of matrix costs. What came of it was measured, and "
        "stands under “Divergence from the first model”."
    )
    header = ("Outcome", "Experts per layer", "Bits per weight", "Size", "Estimated KL")
    return Table(title=CHOICE, header=header, rows=tuple(rows), note=note, numeric=4)


def _types(choice: Choice) -> Table:
    rows = [
        (kind_text(row.kind), "" if row.layers is None else range_text(row.layers), row.type) for row in choice.grids
    ]
    return Table(title="Types", header=("Kind of matrix", "Layers", "Type of GGUF"), rows=tuple(rows))


def _choice(choice: Choice) -> Table:
    rows = [
        (
            "chosen" if row.chosen else "fits" if row.fits else "too large",
            bits_name(row) + (f"; {parts_text(row.part_bits)}" if row.part_bits else ""),
            str(row.experts),
            size_text(row.weight_bytes),
            loss_text(row),
        )
        for row in choice.rows
    ]
    nats = any(row.unit is Unit.NATS for row in choice.rows)
    note = (
        f"Weights may take {size_text(choice.limit_bytes)}. The loss is an estimate made before anything was pressed: "
        "it ranks the alternatives and is "
    ) + ("a KL divergence, from what rounding each kind of matrix costs." if nats else "no change of perplexity.")
    header = ("Outcome", "Bits", "Experts per layer", "Size", "Estimated loss")
    return Table(title=CHOICE, header=header, rows=tuple(rows), note=note, numeric=3)


def _usage(usage: Usage) -> Table:
    """A row for each layer; how much of every domain's choices went to experts that stay."""
    pruned = usage.kept is not None
    rows = []
    for place, layer in enumerate(usage.layers):
        every = [sum(counts) for counts in zip(*(domain.counts[place] for domain in usage.domains), strict=True)]
        most = max(range(len(every)), key=every.__getitem__)
        kept = [_kept_share(domain.counts[place], usage.kept[place]) for domain in usage.domains] if usage.kept else []
        busiest = f"{most} ({share_text(every[most] / max(sum(every), 1))})"
        rows.append((str(layer), str(every.count(0)), busiest, *map(share_text, kept)))
    shares = [f"Choices of experts that stay, {domain.domain}" for domain in usage.domains] if pruned else []
    header = ("Layer", "Never chosen", "Most chosen", *shares)
    note = (
        f"Each token chooses {usage.top_k} experts in each layer. Colour in the pictures: how often an expert was "
        f"chosen, against an even share; full from {FULL_SHARE:g} times on."
    )
    note += " Removed experts are orange and struck through." if pruned else ""
    return Table(title=USAGE, header=header, rows=tuple(rows), note=note, numeric=len(header) - 1)


def _kept_share(counts: Sequence[int], kept: Sequence[int]) -> float:
    return sum(counts[expert] for expert in kept) / max(sum(counts), 1)


def _samples(samples: Samples) -> Table:
    """A row for each beginning: what the first model wrote, then the other, and how long they agree."""
    labels = [continuation.subject for continuation in samples.rows[0].continuations] if samples.rows else []
    rows = []
    for sample in samples.rows:
        last = sample.continuations[-1]
        texts = [prose_text(continuation.text) for continuation in sample.continuations]
        agreed = [f"{last.same_tokens} of {last.tokens} tokens"] if len(texts) > 1 else []
        rows.append((sample.domain, prose_text(sample.prompt), *texts, *agreed))
    header = ("Text", "Beginning", *labels, *(["Alike from the start"] if len(labels) > 1 else []))
    note = (
        f"The first {samples.prompt_tokens} tokens of a window of the evaluation text, and up to {samples.tokens} "
        "tokens that each model finds likeliest after them, one at a time. After one other token all that follows may "
        "differ: a difference alone is no loss."
    )
    return Table(title=SAMPLES, header=header, rows=tuple(rows), note=note, prose=True)


def _checks(checks: Sequence[RuntimeCheck]) -> Table:
    """A row for each runtime of each folder; the first finding stands below."""
    marks, remarks = lettered([check.first] if check.first else [] for check in checks)
    rows = [(check.runtime, check.subject, check.outcome, str(check.findings)) for check in checks]
    return Table(
        title=CHECKS,
        header=("Runtime", "Model", "Outcome", "Findings"),
        rows=tuple(rows),
        note="By the rules of moepress check, which says how to mend each; the runtimes themselves were not run.",
        numeric=1,
        marks=marks,
        remarks=remarks,
    )
