"""The report as headline and tables of text, the same for Markdown, HTML and the terminal."""

from collections.abc import Sequence

from moepress.validation.quality.results import Estimate, QualityRow, ThroughputRow
from moepress.validation.report.cells import (
    NONE,
    Table,
    experts_text,
    number_text,
    parameters_text,
    percent_text,
    size_change,
    size_text,
    text_kind,
    without_version,
)
from moepress.validation.report.schema import ExpertName, Report
from moepress.validation.speed.projection import interval_text
from moepress.validation.speed.results import TargetFit, Targets


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
    kl = [NONE if row.paired is None else number_text(Estimate(value=row.paired.kl.value), 4) for row in overall]
    same = [NONE if row.paired is None else f"{row.paired.same_top1.value:.1%}" for row in overall]
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


def _sizes(report: Report) -> Table:
    rows = []
    for subject in report.subjects:
        change = NONE if subject is report.subjects[0] else size_change(report.subjects[0], subject)
        experts = experts_text(subject.experts_per_layer)
        bits = NONE if subject.bits is None else f"{subject.bits:.2f}"
        parameters = parameters_text(subject.parameters)
        rows.append((subject.label, size_text(subject.stored_bytes), change, parameters, experts, bits))
    header = ("Model", "On disk", "Change", "Parameters", "Experts per layer", "Bits per weight")
    return Table(title="Size", header=header, rows=tuple(rows), numeric=5)


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
    bits = NONE if row.bits_per_byte is None else f"{row.bits_per_byte:.3f}"
    if row.paired is None:
        return (row.subject, row.domain, NONE, NONE, NONE, bits)
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
    speed = NONE
    if row.tokens_per_second is not None:
        speed = number_text(row.tokens_per_second, 0 if row.tokens_per_second.value >= 1000 else 1)
    ratio = NONE if row.ratio is None else number_text(row.ratio, 2)
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
    return (Table(title="Pruning", header=header, rows=tuple(rows) or ((NONE,) * 3,), note=note, numeric=2),)


def _quantization(report: Report) -> tuple[Table, ...]:
    made = report.quantization
    if made is None:
        return ()
    note = f"Scheme: {made.scheme}. Rounded to nearest because the solver failed: {_experts(made.fallback_experts)}. "
    note += f"With too few tokens of their own: {_experts(made.unsupported_experts)}."
    rows = [(str(layer.layer), f"{layer.mean_relative_error:.4f}") for layer in made.layers]
    header = ("Layer", "Mean relative error")
    return (Table(title="Quantization", header=header, rows=tuple(rows) or ((NONE,) * 2,), note=note, numeric=1),)


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
        ("Evaluation text", text_kind(quality.embedded)),
        ("Evaluation digest", quality.digest),
        *_computed(report),
    ]
    calibration = report.calibration
    if calibration is not None:
        sources = ", ".join(calibration.sources) or NONE
        seed = "" if calibration.seed is None else f", seed {calibration.seed}"
        rows += [
            ("Calibration text", f"{sources}; {text_kind(calibration.embedded)}"),
            ("Calibration tokens", f"{calibration.tokens}{seed}"),
            ("Calibration digest", calibration.digest or NONE),
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
