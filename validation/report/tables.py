"""The report as headline and tables of text, the same for Markdown, HTML and the terminal."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from moepress.validation.quality.results import Estimate, QualityRow, ThroughputRow
from moepress.validation.report.schema import ExpertName, Report, SubjectInfo
from moepress.validation.speed.projection import interval_text
from moepress.validation.speed.results import TargetFit, Targets

_MINUS, _NONE = "−", "–"
BLINDNESS = (
    "Perplexity alone misses damage: a pruned model may keep it and still lose much of its skill at tasks such as "
    "arithmetic. Try the result on your own task before you rely on it."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """A table of text. The first column names the rows; `numeric` columns are set to the right.

    Attributes:
        title: heading.
        header: one text for each column.
        rows: each as long as the header.
        note: a paragraph that says how to read it.
        numeric: number of columns at the right end that hold numbers.
    """

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""
    numeric: int = 0

    def is_numeric(self, column: int) -> bool:
        """Whether a column is set to the right."""
        return column >= len(self.header) - self.numeric


def size_text(size_bytes: int) -> str:
    """Bytes in decimal units, as download pages give them: 9.3 MB."""
    if size_bytes < 1000:
        return f"{size_bytes} B"
    value, unit = size_bytes / 1000, "kB"
    for larger in ("MB", "GB", "TB"):
        if value < 999.5:
            break
        value, unit = value / 1000, larger
    return f"{value:.{0 if value >= 99.95 else 1}f} {unit}"


def percent_text(share: float, *, digits: int = 1) -> str:
    """A change as `+2.1 %`, with a true minus sign."""
    text = f"{abs(share) * 100:.{digits}f}"
    sign = "±" if float(text) == 0 else "+" if share > 0 else _MINUS
    return f"{sign}{text} %"


def number_text(estimate: Estimate, digits: int) -> str:
    """`25.10 ± 0.31`."""
    error = "" if estimate.error is None else f" ± {estimate.error:.{digits}f}"
    value = round(estimate.value, digits) + 0.0  # no minus zero
    return f"{value:.{digits}f}{error}".replace("-", _MINUS)


def headlines(report: Report) -> tuple[str, ...]:
    """One sentence for each compared subject: size and perplexity.

    The last one (what the user takes home) comes first, exports to ONNX of the same weights behind the others.
    """
    first = report.subjects[0]
    before = report.overall(first.label).perplexity.value
    title = report.title or first.label
    if len(report.subjects) == 1:
        return (f"{title}: {size_text(first.stored_bytes)}, perplexity {before:.3g}",)
    lines = []
    for subject in sorted(report.subjects[:0:-1], key=lambda subject: subject.onnx):
        row = report.overall(subject.label)
        name = title if len(report.subjects) == 2 else f"{title}, {subject.label}"
        change = row.perplexity.value / before - 1
        size = f"{size_text(first.stored_bytes)} → {size_text(subject.stored_bytes)} ({_size_change(first, subject)})"
        quality = f"perplexity {percent_text(change)} ({before:.3g} → {row.perplexity.value:.3g})"
        lines.append(f"{name}: {size}, {quality}")
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
    if len(report.subjects) > 1:
        found.append(BLINDNESS)
    if any(row.scope == "domain" and row.windows < 2 for row in report.quality.rows):
        found.append("A domain has a single window, so its numbers and the means have no standard error.")
    return tuple(found)


def tables(report: Report) -> tuple[Table, ...]:
    """All tables of a report that have content, in reading order."""
    made = [
        _thresholds(report),
        _sizes(report),
        _perplexity(report),
        _divergence(report),
        _throughput(report),
        *_pruning(report),
        *_quantization(report),
        *_targets(report),
        _conditions(report),
    ]
    return tuple(table for table in made if table.rows)


def console_tables(report: Report) -> tuple[Table, ...]:
    """The few tables that a terminal of 80 columns shows; everything else is in the report's files."""
    made = (_sizes(report), _quality_in_short(report), _speed_in_short(report), _thresholds(report))
    return tuple(table for table in made if table.rows)


def _quality_in_short(report: Report) -> Table:
    """Perplexity and its change, a column a model, without errors."""
    labels = [subject.label for subject in report.subjects]
    rows = []
    for domain in _domains(report):
        cells = [domain]
        for label in labels:
            found = report.quality.row(label, domain)
            change = "" if found.paired is None else f" ({percent_text(found.paired.perplexity_ratio.value - 1)})"
            cells.append(f"{found.perplexity.value:.2f}{change}")
        rows.append(tuple(cells))
    overall = [report.quality.row(label) for label in labels]
    kl = [_NONE if row.paired is None else number_text(Estimate(value=row.paired.kl.value), 4) for row in overall]
    same = [_NONE if row.paired is None else f"{row.paired.same_top1.value:.1%}" for row in overall]
    rows += [("KL divergence", *kl), ("same top-1", *same)]
    return Table(title="Perplexity", header=("Text", *labels), rows=tuple(rows), numeric=len(labels))


def _speed_in_short(report: Report) -> Table:
    measured = () if report.throughput is None else report.throughput.rows
    rows = []
    for row in measured:
        label, _, test, remark, speed, ratio = _throughput_row(row)
        runtime = f"{without_version(row.runtime)}, {row.provider}"
        rows.append((label, runtime, test, remark if row.tokens_per_second is None else speed, ratio))
    header = ("Model", "Runtime", "Test", "Tokens/s", "Ratio")
    return Table(title="Speed", header=header, rows=tuple(rows), numeric=2)


def without_version(runtime: str) -> str:
    """A runtime's name alone."""
    return re.sub(r" [\d.]+\S*$", "", runtime)


def _size_change(first: SubjectInfo, subject: SubjectInfo) -> str:
    return percent_text(subject.stored_bytes / first.stored_bytes - 1, digits=0) if first.stored_bytes else _NONE


def _sizes(report: Report) -> Table:
    rows = []
    for subject in report.subjects:
        change = _NONE if subject is report.subjects[0] else _size_change(report.subjects[0], subject)
        experts = _experts_text(subject.experts_per_layer)
        bits = _NONE if subject.bits is None else f"{subject.bits:.2f}"
        parameters = _parameters_text(subject.parameters)
        rows.append((subject.label, size_text(subject.stored_bytes), change, parameters, experts, bits))
    header = ("Model", "On disk", "Change", "Parameters", "Experts per layer", "Bits per weight")
    return Table(title="Size", header=header, rows=tuple(rows), numeric=5)


def _parameters_text(count: int) -> str:
    if not count:
        return _NONE
    return f"{count / 1e9:.3g} B" if count >= 1e9 else f"{count / 1e6:.3g} M"


def _experts_text(count: int | tuple[int, int] | None) -> str:
    if isinstance(count, tuple):
        return f"{count[0]} to {count[1]}"
    return _NONE if count is None else str(count)


def _perplexity(report: Report) -> Table:
    labels = [subject.label for subject in report.subjects]
    beside = len(labels) <= 3  # a column of its own for each change; with more models the table would be too wide
    header = ["Text", labels[0]]
    for label in labels[1:]:
        header += [label, "change" if len(labels) == 2 else f"change, {label}"][: 1 + beside]
    rows = []
    for domain in _domains(report):
        row = [domain]
        for label in labels:
            found = report.quality.row(label, domain)
            row.append(number_text(found.perplexity, 2))
            if found.paired is not None:
                ratio = found.paired.perplexity_ratio
                error = "" if ratio.error is None else f" ± {ratio.error * 100:.1f}"
                change = percent_text(ratio.value - 1).replace(" %", f"{error} %")
                row[-1:] = [row[-1], change] if beside else [f"{row[-1]} ({change})"]
        rows.append(tuple(row))
    note = (
        "Among how many tokens the model hesitates at each step, so to say: lower is better. ± is one standard error "
        "over windows; that of the change is smaller because both models read the same text."
    )
    return Table(title="Perplexity", header=tuple(header), rows=tuple(rows), note=note, numeric=len(header) - 1)


def _domains(report: Report) -> list[str]:
    first = report.subjects[0].label
    return [row.domain for row in report.quality.rows if row.subject == first]


def _divergence(report: Report) -> Table:
    rows = [_divergence_row(row) for row in report.quality.rows]
    compared = any(row.paired is not None for row in report.quality.rows)
    note = (
        "KL divergence: how far the predictions have moved from the first model's, in nats per token. Same top-1: how "
        "often both models hold the same token for the most likely one. Bits per byte: lower is better, and comparable "
        "between models with different tokenizers."
    )
    header = ("Model", "Text", "KL divergence", "Same top-1", "Δ NLL (nats)", "Bits per byte")
    title = "Divergence from the first model" if compared else "Bits per byte"
    return Table(title=title, header=header, rows=tuple(rows), note=note, numeric=4)


def _divergence_row(row: QualityRow) -> tuple[str, ...]:
    bits = _NONE if row.bits_per_byte is None else f"{row.bits_per_byte:.3f}"
    if row.paired is None:
        return (row.subject, row.domain, _NONE, _NONE, _NONE, bits)
    same = row.paired.same_top1
    share = Estimate(value=same.value * 100, error=None if same.error is None else same.error * 100)
    return (
        row.subject,
        row.domain,
        number_text(row.paired.kl, 4),
        f"{number_text(share, 1)} %",
        number_text(row.paired.delta_nll, 4),
        bits,
    )


def _throughput(report: Report) -> Table:
    measured = report.throughput
    rows = [] if measured is None else [_throughput_row(row) for row in measured.rows]
    note = "" if measured is None else (
        f"pp: reading a prompt of that many tokens; tg: writing that many tokens; batch 1, {measured.repetitions} "
        f"repetitions after a warm-up, mean ± standard deviation; ratio: to the first model in the same runtime, ± "
        f"standard error. transformers computes the logits of the prompt's last token only, the others those of all "
        f"tokens. {measured.device}, {measured.threads} threads."
    )  # fmt: skip
    header = ("Model", "Runtime", "Test", "Remark", "Tokens per second", "Ratio")
    return Table(title="Throughput", header=header, rows=tuple(rows), note=note, numeric=2)


def _throughput_row(row: ThroughputRow) -> tuple[str, ...]:
    speed = _NONE
    if row.tokens_per_second is not None:
        speed = number_text(row.tokens_per_second, 0 if row.tokens_per_second.value >= 1000 else 1)
    ratio = _NONE if row.ratio is None else number_text(row.ratio, 2)
    runtime = ", ".join(filter(None, (row.runtime, row.provider, row.dtype)))
    return (row.subject, runtime, row.test, row.note or "", speed, ratio)


def _thresholds(report: Report) -> Table:
    rows = []
    for outcome in report.thresholds:
        found, limit = number_text(outcome.found, 4), f"{outcome.limit:.4g}"
        if outcome.measure == "perplexity increase":
            error = outcome.found.error
            found = number_text(
                Estimate(value=outcome.found.value * 100, error=None if error is None else error * 100), 2
            )
            found, limit = f"{found} %", f"{outcome.limit * 100:.4g} %"
        rows.append((outcome.subject, outcome.measure, outcome.state, limit, found))
    header = ("Model", "Limit on", "Outcome", "Allowed", "Measured")
    note = "A limit is missed when it is exceeded by more than two standard errors."
    return Table(title="Limits", header=header, rows=tuple(rows), note=note, numeric=2)


def _pruning(report: Report) -> tuple[Table, ...]:
    pruning = report.pruning
    if pruning is None:
        return ()
    removed = 1 - pruning.kept / pruning.total if pruning.total else 0.0
    note = f"{pruning.kept} of {pruning.total} experts are kept in each layer ({percent_text(-removed, digits=0)}), "
    note += f"chosen by {pruning.criterion}."
    if pruning.keep_set_stability is not None:
        note += f" Keep sets from different parts of the text agree by {pruning.keep_set_stability * 100:.0f} %."
    rows = [(d.domain, f"{d.gate_mass_lost * 100:.1f} %", f"{d.reap_mass_lost * 100:.1f} %") for d in pruning.domains]
    header = ("Text", "Routing weight lost", "Weighted output lost")
    return (Table(title="Pruning", header=header, rows=tuple(rows) or ((_NONE,) * 3,), note=note, numeric=2),)


def _quantization(report: Report) -> tuple[Table, ...]:
    made = report.quantization
    if made is None:
        return ()
    note = f"Scheme: {made.scheme}. Rounded to nearest because the solver failed: {_experts(made.fallback_experts)}. "
    note += f"With too few tokens of their own: {_experts(made.unsupported_experts)}."
    rows = [(str(layer.layer), f"{layer.mean_relative_error:.4f}") for layer in made.layers]
    header = ("Layer", "Mean relative error")
    return (Table(title="Quantization", header=header, rows=tuple(rows) or ((_NONE,) * 2,), note=note, numeric=1),)


def _experts(experts: Sequence[ExpertName]) -> str:
    if not experts:
        return "none"
    noun = "expert" if len(experts) == 1 else "experts"
    shown = ", ".join(f"layer {e.layer} expert {e.expert}" for e in experts[:8])
    return f"{len(experts)} {noun} ({shown}{', …' if len(experts) > 8 else ''})"


def _targets(report: Report) -> tuple[Table, ...]:
    """GPUs by rows, models by columns."""
    found = report.targets
    if found is None:
        return ()
    labels = [load.subject for load in found.loads]
    rows = []
    for target in found.table:
        fits = [next(r for r in found.rows if (r.subject, r.target) == (label, target.id)) for label in labels]
        rows.append((target.name, f"{target.memory_gib:g} GiB", *map(_fit_text, fits)))
    note = (
        f"Alone on the card, with a KV cache of {found.context:,} tokens: fits leaves {found.reserve:.0%} of the "
        f"memory free, tight {found.tight_reserve:.0%}. Tokens per second of tg128 (tg) and pp512 (pp) are projected "
        "from bytes and FLOP, not measured; report.json has the formulas."
    )
    header = ("GPU", "Memory", *labels)
    held = Table(
        title="Which GPU holds it (projected)", header=header, rows=tuple(rows), note=note, numeric=1 + len(labels)
    )
    return (held, _speed_checks(found)) if found.measured else (held,)


def _speed_checks(found: Targets) -> Table:
    """This machine's GPU: measured beside projected."""
    names = {target.id: target.name for target in found.table}
    rows = [
        (
            f"{row.subject}, {row.runtime}",
            row.test,
            f"{row.measured:.4g}",
            interval_text(row.projected.low, row.projected.high),
            "inside" if row.off == 1 else f"{row.off:.2f} times its nearer end",
        )
        for row in found.measured
    ]
    return Table(
        title=f"Measured here, on {names[found.measured[0].target]}",
        header=("Model", "Test", "Measured, tokens/s", "Projected, tokens/s", "Measured against projected"),
        rows=tuple(rows),
        note="How far the projections of the table above are off on this GPU.",
        numeric=3,
    )


def _fit_text(row: TargetFit) -> str:
    if row.tg128 is None or row.pp512 is None:
        return f"no, {size_text(row.lacking_bytes)} short"
    decode, prefill = (interval_text(speed.low, speed.high) for speed in (row.tg128, row.pp512))
    return f"{row.verdict}; tg {decode}, pp {prefill}"


def _conditions(report: Report) -> Table:
    quality = report.quality
    rows = [
        ("Perplexity convention", quality.convention),
        ("Context", f"{quality.window} tokens"),
        ("Evaluated", f"{quality.windows} windows, {quality.tokens} predicted tokens"),
        ("Special tokens", quality.bos_policy),
        ("Evaluation text", _text_kind(quality.embedded)),
        ("Evaluation digest", quality.digest),
        *_computed(report),
    ]
    calibration = report.calibration
    if calibration is not None:
        sources = ", ".join(calibration.sources) or _NONE
        seed = "" if calibration.seed is None else f", seed {calibration.seed}"
        rows += [
            ("Calibration text", f"{sources}; {_text_kind(calibration.embedded)}"),
            ("Calibration tokens", f"{calibration.tokens}{seed}"),
            ("Calibration digest", calibration.digest or _NONE),
        ]
    if report.environment is not None:
        versions = ", ".join(f"{name} {version}" for name, version in report.environment.versions.items())
        cpus = "" if report.environment.cpus is None else f", {report.environment.cpus} CPUs"
        rows += [
            ("Machine", f"{report.environment.device}{cpus}, {report.environment.platform}"),
            ("Versions", versions),
        ]
    return Table(title="How it was measured", header=("What", "Value"), rows=tuple(rows))


def _computed(report: Report) -> list[tuple[str, str]]:
    """What computed the quality, a row for each runtime with its models."""
    models: dict[str, list[str]] = {}
    for label, runtime in report.quality.runtimes.items():
        models.setdefault(runtime, []).append(label)
    return [(f"Computed: {', '.join(labels)}", runtime) for runtime, labels in models.items()] or [
        ("Computed", f"{report.quality.dtype} on {report.quality.device}")
    ]


def _text_kind(embedded: bool) -> str:
    return "the small default text that comes with moepress" if embedded else "given by the user"
