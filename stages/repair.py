"""Pruning with repair: what `prune --repair` and `run --repair` do besides copying.

The repair needs calibration text and a forward pass of the original and of the pruned model side by side; pruning alone
needs neither, see `stages/prune.py`.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from moepress.calibration.corpus import Corpus
from moepress.calibration.profile import describe_corpus
from moepress.compress.estimates.estimate import Estimate
from moepress.compress.estimates.figures import figures_of
from moepress.compress.estimates.footprint import Workload
from moepress.compress.estimates.prune import estimate_prune
from moepress.compress.estimates.rates import Rates, measure_rates
from moepress.compress.estimates.repair import estimate_repair
from moepress.compress.pruning.plan import Plan
from moepress.compress.pruning.repair import Repair
from moepress.compress.pruning.repair_walk import collect_repairs, collected_downs, collected_rows, drop_walk
from moepress.compress.pruning.repaired import Repairs, RouterRows, parse_repairs
from moepress.compress.pruning.repaired_down import DownFiles, down_file, downs_digest, open_downs
from moepress.compress.pruning.rewrite import mtp_keep, planned_bytes, planned_entries, prune
from moepress.errors import InvalidInputError, UnsupportedError, UsageError
from moepress.models.forward.streamed import StreamedModel
from moepress.models.forward.walk import Limits
from moepress.models.storage.checkpoint import Checkpoint
from moepress.models.storage.experts import is_fused, prune_source, router_disk_names
from moepress.models.storage.inside import watched
from moepress.models.storage.mtp import Mtp
from moepress.models.storage.safetensors_file import read_header
from moepress.models.storage.tensors import read_tensor, tensor_entry
from moepress.models.storage.writer import write_shard
from moepress.runs.files import put, read_text
from moepress.runs.journal import Run
from moepress.runs.output import check_output
from moepress.stages.groundwork import checked_plan, load_corpus, model_run, opened, require_room, streamed, workload
from moepress.stages.places import Calibration, Machine, Output, model_folder

REPAIR_FILE = "repair.json"
ROWS_FILE = "router.safetensors"
PLAIN = frozenset({"BF16", "F16", "F32"})
"""Dtypes in which a router's rows, or down projections, can be replaced."""


def check_repair(checkpoint: Checkpoint, experts: int, parts: frozenset[Repair]) -> None:
    """Refuse a repair that has nothing to mend.

    Raises:
        UsageError: every expert stays, the routers have no correction bias, or gains are to scale what is refitted.
        UnsupportedError: the experts or the routers are stored so that they can not be changed.
    """
    if experts >= checkpoint.shape.experts:
        raise UsageError("--repair mends what pruning changes, and here every expert stays; leave --repair out.")
    if {Repair.GAIN, Repair.DOWN} <= parts:
        raise UsageError("--repair down refits what gain scales; leave gain out.")
    if Repair.GAIN in parts and checkpoint.packed:
        raise UnsupportedError(
            f"--repair gain: the experts are stored as {checkpoint.pressed_as or 'fp8 of another kind'}, whose scales "
            "can not take a factor without rounding again; prune without it."
        )
    if Repair.BIAS in parts and not (checkpoint.family.rule and checkpoint.family.rule.bias):
        raise UsageError(
            f"--repair bias: the routers of {checkpoint.family.name} models have no correction bias; use --repair gain."
        )
    if Repair.ROUTER in parts:
        _check_routers(checkpoint)
    if Repair.DOWN in parts:
        _check_downs(checkpoint)


def _check_downs(checkpoint: Checkpoint) -> None:
    """Refuse down projections that are stored as codes or fp8.

    Raises:
        UnsupportedError: one is.
    """
    family = checkpoint.family
    for layer in checkpoint.outline.moe_layers:
        fused, experts = is_fused(checkpoint, layer), range(checkpoint.shape.experts)
        names = family.fused_names(layer)[1:2] if fused else [family.expert_names(layer, e)[-1] for e in experts]
        for name in names:
            stored = checkpoint.stored.get(name)
            if stored is None or checkpoint.stored_names(name) != (name,) or stored.dtype not in PLAIN:
                raise UnsupportedError(
                    f"--repair down: {name} is not stored as a plain weight ({', '.join(sorted(PLAIN))}), so that it "
                    "can not be refitted without rounding again; use --repair router, or none."
                )


def _check_routers(checkpoint: Checkpoint) -> None:
    """Refuse routers whose rule is not known, or whose rows are stored as codes or fp8.

    Raises:
        UnsupportedError: either.
    """
    if checkpoint.family.rule is None:
        raise UnsupportedError(
            f"--repair router: how the router of {checkpoint.family.name} models makes weights was not found out; use "
            "--repair gain."
        )
    for layer in checkpoint.outline.moe_layers:
        name = router_disk_names(checkpoint, layer)[0]
        stored = checkpoint.stored.get(name)
        if stored is None or checkpoint.stored_names(name) != (name,) or stored.dtype not in PLAIN:
            raise UnsupportedError(
                f"--repair router: {name} is not stored as a plain weight ({', '.join(sorted(PLAIN))}), so that its "
                "rows can not be replaced; use --repair gain."
            )


def prune_repaired_stage(
    model_name: str,
    output: Output,
    plan: Plan,
    parts: frozenset[Repair],
    calibration: Calibration,
    machine: Machine,
    *,
    mtp: Mtp = Mtp.KEEP,
    allow_nonfinite: bool = False,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Rewrite the checkpoint without the experts that the plan leaves out, and mend what stays.

    Returns:
        As `prune.prune_stage`, and `repair`; of a dry run the estimates of both.
    """
    checkpoint, inputs = _opened(model_name, output, plan, parts, allow_nonfinite=allow_nonfinite)
    predicting = mtp_keep(checkpoint, plan, mtp)
    size = planned_bytes(planned_entries(checkpoint, {**plan.keep, **predicting}))  # a repair changes no size
    corpus = _corpus(checkpoint, calibration)
    work = workload(machine, tokens=corpus.windows.numel(), window=corpus.windows.shape[1])
    rates = measure_rates(checkpoint, work.device, work.dtype) if dry_run else None
    estimate = _estimate(checkpoint, work, plan, parts, rates)
    if dry_run:
        return {"repair": asdict(estimate), "prune": asdict(estimate_prune(size, rates))}
    require_room(output, size + estimate.disk_bytes)
    streams = _streams(checkpoint, plan, machine)
    settings = _settings("prune", plan, parts, calibration) | {
        "mtp": {str(layer): kept for layer, kept in predicting.items()},
        "allow_nonfinite": allow_nonfinite,
    }
    with model_run(output, streams[0], corpus, machine, settings, inputs) as (run, limits):
        repairs = _find(streams, plan, parts, corpus, calibration, run, limits)
        return prune(checkpoint, plan, run, mtp=mtp, repairs=repairs)


def repair_stage(
    model_name: str,
    output: Output,
    plan: Plan,
    parts: frozenset[Repair],
    calibration: Calibration,
    machine: Machine,
) -> Repairs:
    """Find the repairs without writing a pruned model: a folder for `quantize_stage` to use.

    It has `repair.json`, with refitted routers `router.safetensors`, and with refitted down projections a file of each
    layer's.
    """
    checkpoint, inputs = _opened(model_name, output, plan, parts)
    corpus = _corpus(checkpoint, calibration)
    work = workload(machine, tokens=corpus.windows.numel(), window=corpus.windows.shape[1])
    estimate = _estimate(checkpoint, work, plan, parts)
    require_room(output, estimate.disk_bytes)
    streams = _streams(checkpoint, plan, machine)
    settings = _settings("repair", plan, parts, calibration)
    with model_run(output, streams[0], corpus, machine, settings, inputs) as (run, limits):
        repairs = _find(streams, plan, parts, corpus, calibration, run, limits)
        if repairs.rows.by_layer:
            entries = [tensor_entry(str(layer), rows) for layer, rows in repairs.rows.by_layer.items()]
            write_shard(run.folder / ROWS_FILE, entries)
        put(run.folder / REPAIR_FILE, (repairs.model_dump_json(indent=1) + "\n").encode())
        run.require_ready()
        drop_walk(run)
        run.finish()
    if Repair.DOWN in parts:  # the files have moved
        return repairs.model_copy(update={"downs": _downs(output.folder, repairs)})
    return repairs


def _estimate(
    checkpoint: Checkpoint, work: Workload, plan: Plan, parts: frozenset[Repair], rates: Rates | None = None
) -> Estimate:
    down = plan.experts if Repair.DOWN in parts else 0
    return estimate_repair(figures_of(checkpoint), work, rates, router=Repair.ROUTER in parts, down=down)


def _opened(
    model_name: str, output: Output, plan: Plan, parts: frozenset[Repair], *, allow_nonfinite: bool = False
) -> tuple[Checkpoint, dict[Path, tuple[int, int]]]:
    """The checkpoint, and its files as they are now; refused where plan, repair or output do not fit."""
    folder = model_folder(model_name)
    check_output(output.folder, [folder], resume=output.resume, force=output.force)
    inputs = watched(folder)
    checkpoint = opened(folder, allow_nonfinite=allow_nonfinite)
    check_repair(checkpoint, plan.experts, parts)
    checked_plan(checkpoint, plan)
    return checkpoint, inputs


def load_repairs(folder: Path) -> Repairs:
    """Read `repair.json`, and what belongs to it, of a folder that `repair_stage` has made.

    Raises:
        InvalidInputError: there is none, or it is not valid.
    """
    file = folder / REPAIR_FILE
    try:
        text = read_text(file)
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInputError(f"Cannot read {file} ({error}); repair again.") from error
    repairs = parse_repairs(text, file)
    repairs = repairs.model_copy(update={"downs": _downs(folder, repairs, check=True)})
    if not any(layer.router is not None and layer.router.taken for layer in repairs.layers.values()):
        return repairs
    stored = read_header(folder / ROWS_FILE)
    rows = {int(name): read_tensor(entry) for name, entry in stored.items() if name.isdigit()}
    return repairs.model_copy(update={"rows": RouterRows(by_layer=rows)})


def _downs(folder: Path, repairs: Repairs, *, check: bool = False) -> DownFiles:
    """The refitted down projections of such a folder; `check` reads them all and holds them against their digests.

    Raises:
        InvalidInputError: a file is not there, or is not that of the repair.
    """
    found = {}
    for layer, repair in repairs.layers.items():
        if repair.down is not None:
            found[layer] = open_downs(folder / down_file(layer))
            if check and downs_digest(found[layer]) != repair.down.sha256:
                raise InvalidInputError(f"{folder / down_file(layer)} is not that of its repair; repair again.")
    return DownFiles(by_layer=found)


def _corpus(checkpoint: Checkpoint, calibration: Calibration) -> Corpus:
    shape = checkpoint.shape
    return load_corpus(checkpoint.folder, calibration, context=shape.context, vocabulary=shape.vocabulary)


def _streams(checkpoint: Checkpoint, plan: Plan, machine: Machine) -> tuple[StreamedModel, StreamedModel]:
    pruned = prune_source(checkpoint, plan.keep, degroup=plan.degroup)
    return streamed(checkpoint, machine), streamed(pruned, machine)


def _settings(command: str, plan: Plan, parts: frozenset[Repair], calibration: Calibration) -> dict[str, Any]:
    return {
        "command": command,
        "model": plan.model,
        "keep": {str(layer): kept for layer, kept in plan.keep.items()},
        "groups": plan.groups.value,
        "repair": sorted(parts),
        "seed": calibration.seed,
    }


def _find(
    streams: tuple[StreamedModel, StreamedModel],
    plan: Plan,
    parts: frozenset[Repair],
    corpus: Corpus,
    calibration: Calibration,
    run: Run,
    limits: Limits,
) -> Repairs:
    layers = collect_repairs(*streams, plan.keep, parts, corpus, run, limits)
    return Repairs(
        model=plan.model,
        experts=plan.experts,
        parts=sorted(parts),
        layers=layers,
        calibration=describe_corpus(corpus, calibration.seed),
        rows=collected_rows(run, layers),
        downs=collected_downs(run, layers),
    )
