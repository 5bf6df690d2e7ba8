"""The report's tables in reading order: those of `validation.report.tables`, and what the plan knew between them."""

from collections.abc import Sequence

from moepress.validation.report.cells import Table, size_text
from moepress.validation.report.heatmap import FULL_SHARE
from moepress.validation.report.plots import bits_name
from moepress.validation.report.schema import Choice, Report, Usage
from moepress.validation.report.tables import tables

PARTS, USAGE, CHOICE = "Size by part", "Use of the experts", "What else would have been possible"


def contents(report: Report) -> tuple[Table, ...]:
    """All tables that have content, in reading order."""
    found = list(tables(report))
    _insert(found, _parts(report), after=("Size",))
    decided = [_choice(report.choice)] if report.choice is not None else []
    decided += [_usage(report.usage)] if report.usage is not None else []
    for table in decided:
        _insert(found, table, after=("Pruning", "Throughput", "Divergence from the first model"))
    return tuple(table for table in found if table.rows)


def _insert(found: list[Table], table: Table, *, after: Sequence[str]) -> None:
    """Behind the first of these titles that is there, else at the end."""
    titles = [each.title for each in found]
    place = next((titles.index(title) + 1 for title in after if title in titles), len(found))
    found.insert(place, table)


def _parts(report: Report) -> Table:
    known = [subject for subject in report.subjects if subject.parts]
    names = dict.fromkeys(part for subject in known for part in subject.parts)
    rows = [(name, *(size_text(subject.parts.get(name, 0)) for subject in known)) for name in names]
    header = ("Part", *(subject.label for subject in known))
    return Table(title=PARTS, header=header, rows=tuple(rows), numeric=len(known))


def _choice(choice: Choice) -> Table:
    rows = [
        (
            "chosen" if row.chosen else "fits" if row.fits else "too large",
            bits_name(row),
            str(row.experts),
            size_text(row.weight_bytes),
            f"{row.loss:.2%}",
        )
        for row in choice.rows
    ]
    note = (
        f"Weights may take {size_text(choice.limit_bytes)}. The loss is an estimate made before anything was pressed: "
        "it ranks the alternatives and is no change of perplexity."
    )
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
        busiest = f"{most} ({every[most] / max(sum(every), 1):.1%})"
        rows.append((str(layer), str(every.count(0)), busiest, *(f"{share:.1%}" for share in kept)))
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
