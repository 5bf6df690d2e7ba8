"""The report as headline and tables of text, the same for Markdown, HTML and the terminal."""

from collections.abc import Sequence

from moepress.validation.quality.results import Estimate, Paired, QualityRow, ThroughputRow
from moepress.validation.report.cells import (
    NONE,
    Table,
    experts_text,
    figures,
    number_text,
    parameters_text,
    percent_text,
    share_estimate_text,
    share_text,
    size_change,
    size_text,
    text_kind,
    without_version,
)
from moepress.validation.report.generation import generation_in_short
from moepress.validation.report.remarks import lettered
from moepress.validation.report.schema import ExpertName, Report
from moepress.validation.report.task_tables import short_tasks, task_tables
from moepress.validation.speed.projection import interval_text
from moepress.validation.speed.results import TargetFit, Targets

GPUS = "Which GPU holds it (projected)"
_SHARES = ("perplexity increase", "loop increase", "recovery")
"""Limits that are shown in per cent."""


def tables(report: Report) -> tuple[Table, ...]:
    """All tables of a report that have content, in reading order."""
    made = [
        _thresholds(report),
        _sizes(report),
        _perplexity(report),
        _divergence(report),
        _tail(report),
        _agreement(report),
        *task_tables(report.tasks),
        _throughput(report),
        *_pruning(report),
        *_quantization(report),
        *_targets(report),
        _conditions(report),
    ]
    return tuple(table for table in made if table.rows)


def console_tables(report: Report) -> tuple[Table, ...]:
    """The few tables that a terminal of 80 columns shows; everything else is in the report's files."""
    made = (
        _sizes(report),
        _quality_in_short(report),
        *generation_in_short(report.generation),
        *short_tasks(report.tasks),
        _speed_in_short(report),
        _thresholds(report),
    )
    return tuple(table for table in made if table.rows)


def _quality_in_short(report: Report) -> Table:
    """Perplexity and its change, a column a model, without errors."""
    labels = [subject.label for subject in report.subjects]
    rows = []
    for domain in _domains(report):
        cells = [domain]
        for label in labels:
            found = report.quality.row(label, domain)
            change = "" if found.paired is None else f" ({_change(found.paired.perplexity_ratio, error=False)})"
            cells.append(f"{number_text(Estimate(value=found.perplexity.value), 2)}{change}")
        rows.append(tuple(cells))
    overall = [report.quality.row(label) for label in labels]
    kl = [NONE if row.paired is None else number_text(Estimate(value=row.paired.kl.value), 4) for row in overall]
    same = [NONE if row.paired is None else share_text(row.paired.same_top1.value) for row in overall]
    rows += [(_kl_name(report), *kl), ("same top-1", *same)]
    return Table(title="Perplexity", header=("Text", *labels), rows=tuple(rows), numeric=len(labels))


def _speed_in_short(report: Report) -> Table:
    measured = () if report.throughput is None else report.throughput.rows
    rows = []
    for row in measured:
        label, _, test, speed, ratio = _throughput_row(row)
        runtime = ", ".join(filter(None, (without_version(row.runtime), row.provider)))
        rows.append((label, runtime, test, speed, ratio))
    header = ("Model", "Runtime", "Test", "Tokens/s", "Ratio")
    marks, remarks = lettered(map(_remarks, measured))
    return Table(title="Speed", header=header, rows=tuple(rows), numeric=2, marks=marks, remarks=remarks)


def _sizes(report: Report) -> Table:
    rows = []
    for subject in report.subjects:
        change = NONE if subject is report.subjects[0] else size_change(report.subjects[0], subject)
        experts = experts_text(subject.experts_per_layer)
        bits = NONE if subject.bits is None else figures(subject.bits, 2)
        parameters = parameters_text(subject.parameters)
        rows.append((subject.label, change, size_text(subject.stored_bytes), parameters, experts, bits))
    header = ("Model", "Change", "On disk", "Parameters", "Experts per layer", "Bits per weight")
    return Table(title="Size", header=header, rows=tuple(rows), numeric=5)


def _perplexity(report: Report) -> Table:
    """The change stands before the numbers that it is between, for that is what a narrow screen shows first."""
    labels = [subject.label for subject in report.subjects]
    beside = len(labels) <= 3  # a column of its own for each change; with more models the table would be too wide
    changes = [] if not beside else ["change"] if len(labels) == 2 else [f"change, {label}" for label in labels[1:]]
    rows = []
    for domain in _domains(report):
        found = [report.quality.row(label, domain) for label in labels]
        ratios = [NONE if row.paired is None else _change(row.paired.perplexity_ratio) for row in found]
        numbers = [number_text(row.perplexity, 2) for row in found]
        if not beside:  # the error that matters is that of the change
            numbers[1:] = [number_text(Estimate(value=row.perplexity.value), 2) for row in found[1:]]
        if beside:
            rows.append((domain, *ratios[1:], *numbers))
        else:
            rows.append((domain, numbers[0], *map("{} ({})".format, ratios[1:], numbers[1:])))
    header = ("Text", *changes, *labels)
    note = (
        "Among how many tokens the model hesitates at each step, so to say: lower is better. ± is one standard error "
        "over windows; that of the change is smaller because both models read the same text."
    )
    return Table(title="Perplexity", header=header, rows=tuple(rows), note=note, numeric=len(header) - 1)


def _change(ratio: Estimate, *, error: bool = True) -> str:
    return percent_text(ratio.value - 1, error=ratio.error if error else None)


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
    header = ("Model", "Text", _kl_name(report), "Same top-1", "Δ NLL (nats)", "Bits per byte")
    title = "Divergence from the first model" if compared else "Bits per byte"
    return Table(title=title, header=header, rows=tuple(rows), note=note, numeric=4)


def _kl_name(report: Report) -> str:
    """Against what was kept of a model divergences are lower bounds."""
    return "KL divergence" if report.quality.saved is None else "KL divergence, at least"


def _divergence_row(row: QualityRow) -> tuple[str, ...]:
    bits = NONE if row.bits_per_byte is None else figures(row.bits_per_byte, 3)
    if row.paired is None:
        return (row.subject, row.domain, NONE, NONE, NONE, bits)
    return (
        row.subject,
        row.domain,
        number_text(row.paired.kl, 4),
        share_estimate_text(row.paired.same_top1),
        number_text(row.paired.delta_nll, 4),
        bits,
    )


def _compared(report: Report) -> list[tuple[QualityRow, Paired]]:
    """Rows of models that are held against the first, where more than the mean divergence is known."""
    return [(row, row.paired) for row in report.quality.rows if row.paired is not None and row.paired.tail is not None]


def _tail(report: Report) -> Table:
    """The few places where a model goes astray, which a mean hides."""
    rows = []
    for row, paired in _compared(report):
        assert paired.tail is not None
        every = (paired.tail.median, paired.tail.p90, paired.tail.p99, paired.tail.p999)
        rows.append((row.subject, row.domain, *(number_text(one, 4) for one in every), f"{paired.tail.largest:.3g}"))
    note = (
        "KL divergence of single positions, in nats: so much or less have a half of them, 90 %, 99 % and 99.9 %, and "
        "what the one has that moved most. ± is one standard error, by resampling windows."
    )
    header = ("Model", "Text", "Median", "90 %", "99 %", "99.9 %", "Largest")
    return Table(title="Divergence by position", header=header, rows=tuple(rows), note=note, numeric=5)


def _agreement(report: Report) -> Table:
    """What else is usual to tell of two models."""
    rows = []
    for row, paired in _compared(report):
        shares = [NONE if one is None else share_estimate_text(one) for one in (paired.same_top5, paired.rms_delta_p)]
        reverse = NONE if paired.reverse_kl is None else number_text(paired.reverse_kl, 4)
        rows.append((row.subject, row.domain, reverse, *shares))
    note = (
        "Reverse KL: KL(model || first model), nats per token, which counts what only this model thinks likely. Same "
        "top-5: how many of the first model's five likeliest tokens are among this one's. RMS Δp: how far the "
        "probability of the token that follows in the text has moved."
    )
    header = ("Model", "Text", _kl_name(report).replace("KL divergence", "Reverse KL"), "Same top-5", "RMS Δp")
    return Table(title="Agreement with the first model", header=header, rows=tuple(rows), note=note, numeric=3)


def _throughput(report: Report) -> Table:
    measured = report.throughput
    rows = [] if measured is None else [_throughput_row(row) for row in measured.rows]
    note = "" if measured is None else (
        f"pp: reading a prompt of that many tokens; tg: writing that many tokens; batch 1, {measured.repetitions} "
        f"repetitions after a warm-up, mean ± standard deviation; ratio: to the first model in the same runtime, ± "
        f"standard error. transformers computes the logits of the prompt's last token only, the others those of all "
        f"tokens. {measured.device}, {measured.threads} {'thread' if measured.threads == 1 else 'threads'}."
    )  # fmt: skip
    header = ("Model", "Runtime", "Test", "Tokens per second", "Ratio")
    marks, remarks = lettered(map(_remarks, () if measured is None else measured.rows))
    return Table(
        title="Throughput", header=header, rows=tuple(rows), note=note, numeric=2, marks=marks, remarks=remarks
    )


def _remarks(row: ThroughputRow) -> list[str]:
    """What the note of a row says, one by one; a reason why it was not measured is one."""
    note = row.note or ""
    return [note] if row.tokens_per_second is None and note else [part for part in note.split("; ") if part]


def _throughput_row(row: ThroughputRow) -> tuple[str, ...]:
    speed = "not measured"
    if row.tokens_per_second is not None:
        speed = number_text(row.tokens_per_second, 0 if row.tokens_per_second.value >= 1000 else 1)
    ratio = NONE if row.ratio is None else number_text(row.ratio, 2)
    runtime = ", ".join(filter(None, (row.runtime, row.provider, row.dtype)))
    return (row.subject, runtime or NONE, NONE if row.test == "-" else row.test, speed, ratio)


def _thresholds(report: Report) -> Table:
    rows = []
    for outcome in report.thresholds:
        found, limit = number_text(outcome.found, 4), f"{outcome.limit:.4g}"
        if outcome.measure in _SHARES:
            error = outcome.found.error
            found = number_text(
                Estimate(value=outcome.found.value * 100, error=None if error is None else error * 100), 2
            )
            found, limit = f"{found} %", f"{outcome.limit * 100:.4g} %"
        rows.append((outcome.subject, outcome.limited, outcome.state, f"{outcome.bound} {limit}", found))
    header = ("Model", "Limit on", "Outcome", "Allowed", "Measured")
    note = "A limit is missed when what was measured lies beyond it by more than two standard errors."
    return Table(title="Limits", header=header, rows=tuple(rows), note=note, numeric=2)


def _pruning(report: Report) -> tuple[Table, ...]:
    pruning = report.pruning
    if pruning is None:
        return ()
    removed = 1 - pruning.kept / pruning.total if pruning.total else 0.0
    note = f"{pruning.kept} of {pruning.total} experts are kept in each layer ({percent_text(-removed, digits=0)}), "
    note += f"chosen by {pruning.criterion}."
    if pruning.keep_set_stability is not None:
        note += (
            f" Keep sets from different parts of the text agree by {share_text(pruning.keep_set_stability, digits=0)}."
        )
    if pruning.protected:
        note += f" Protected: {', '.join(pruning.protected)}, within {pruning.limit}."
    rows = [(d.domain, share_text(d.gate_mass_lost), share_text(d.reap_mass_lost)) for d in pruning.domains]
    header = ("Text", "Routing weight lost", "Weighted output lost")
    return (Table(title="Pruning", header=header, rows=tuple(rows) or ((NONE,) * 3,), note=note, numeric=2),)


def _quantization(report: Report) -> tuple[Table, ...]:
    made = report.quantization
    if made is None:
        return ()
    note = (
        f"Scheme: {made.scheme}. Rounded to nearest, for want of tokens or because the solver failed: "
        f"{_experts(made.fallback_experts)}. With too few tokens of their own: {_experts(made.unsupported_experts)}."
    )
    rows = [(str(layer.layer), figures(layer.mean_relative_error, 4)) for layer in made.layers]
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
    for target in sorted(found.table, key=lambda target: target.id != found.chosen):
        fits = [next(r for r in found.rows if (r.subject, r.target) == (label, target.id)) for label in labels]
        name = f"{target.name} (your target)" if target.id == found.chosen else target.name
        memory = f"{target.memory_gib:g} GiB" + (f" + {target.ram.memory_gib:g} GiB" if target.ram else "")
        rows.append((name, memory, *map(_fit_text, fits)))
    note = (
        f"Alone on the card, with a KV cache of {found.context:,} tokens: fits leaves "
        f"{share_text(found.reserve, digits=0)} of the memory free, tight {share_text(found.tight_reserve, digits=0)}. "
        "Tokens per second of tg128 (tg) and pp512 (pp) are projected from bytes and FLOP, not measured; report.json "
        "has the formulas."
    )
    header = ("GPU", "Memory", *labels)
    held = Table(
        title=GPUS,
        header=header,
        rows=tuple(rows),
        note=note,
        numeric=1 + len(labels),
        marked=frozenset({0} if found.chosen is not None else ()),
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
    marks, remarks = lettered([row.note] if row.note else [] for row in found.measured)
    return Table(
        title=f"Measured here, on {names[found.measured[0].target]}",
        header=("Model", "Test", "Measured, tokens/s", "Projected, tokens/s", "Measured against projected"),
        rows=tuple(rows),
        note="How far the projections of the table above are off on this GPU.",
        numeric=3,
        marks=marks,
        remarks=remarks,
    )


def _fit_text(row: TargetFit) -> str:
    if row.tg128 is not None and row.ram_layers:
        decode = interval_text(row.tg128.low, row.tg128.high)
        disk = f", {size_text(row.disk_bytes)} of them on the disk" if row.disk_bytes else ""
        return f"experts of {row.ram_layers} layers in RAM{disk} (--n-cpu-moe {row.cpu_moe}); tg {decode}"
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
