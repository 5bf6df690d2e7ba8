"""The stages as functions: open the inputs, check everything that can be checked, do the work, leave the output.

`cli.py` and `recipe.py` call these; each stage reads files and writes files, and none calls another.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from moepress import __version__
from moepress.calibration.collect import collect, drop_hidden
from moepress.calibration.corpus import Corpus
from moepress.calibration.hessian import HessianOptions
from moepress.calibration.profile import (
    Profile,
    describe_corpus,
    fingerprint,
    load_profile,
    merge_profiles,
    save_profile,
)
from moepress.compress.budget.bit_losses import bit_loss_probe
from moepress.compress.estimates.estimate import Estimate
from moepress.compress.estimates.figures import figures_of
from moepress.compress.estimates.footprint import Workload
from moepress.compress.estimates.profile import estimate_profile
from moepress.compress.estimates.prune import estimate_prune
from moepress.compress.estimates.quantize import estimate_quantize
from moepress.compress.estimates.rates import measure_rates
from moepress.compress.gptq.experts import QuantizeOptions
from moepress.compress.gptq.include import Include
from moepress.compress.gptq.pieces import PIECE_BYTES
from moepress.compress.gptq.pipeline import quantize
from moepress.compress.gptq.schemes import check_scheme, model_dtype, scale_value_dtype, settle_bits
from moepress.compress.gptq.solver import SolverOptions
from moepress.compress.pruning.plan import Plan, check_plan
from moepress.compress.pruning.repaired import Repairs, repaired_source
from moepress.compress.pruning.rewrite import mtp_keep, planned_bytes, planned_entries, prune
from moepress.converters.safetensors.scheme import Scheme
from moepress.models.forward.inventory import inventory
from moepress.models.storage.checkpoint import Checkpoint, Source, open_checkpoint
from moepress.models.storage.experts import prune_source
from moepress.models.storage.inside import watched
from moepress.models.storage.mtp import Mtp, refuse_quantized_mtp
from moepress.runs.journal import check_output, open_run
from moepress.stages.groundwork import (
    Calibration,
    Machine,
    Output,
    display_name,
    free_disk,
    load_corpus,
    model_folder,
    model_run,
    require_room,
    streamed,
    workload,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizeRequest:
    """Options of `quantize`; `layer_bits` are those of layers that do not have the scheme's."""

    scheme: Scheme
    layer_bits: Mapping[int, int] = field(default_factory=dict)
    include: frozenset[Include] = frozenset()
    hessian: HessianOptions = field(default_factory=HessianOptions)
    solver: SolverOptions = field(default_factory=SolverOptions)


def profile_stage(
    model_name: str,
    output: Output,
    calibration: Calibration,
    machine: Machine,
    *,
    leave_one_out: bool = True,
    bit_losses: bool = True,
    allow_nonfinite: bool = False,
) -> Profile:
    """Run the model over calibration text and write its profile."""
    folder = model_folder(model_name)
    check_output(output.folder, [folder], resume=output.resume, force=output.force)
    inputs = watched(folder)
    checkpoint = open_checkpoint(folder, allow_nonfinite=allow_nonfinite)
    shape = checkpoint.shape
    corpus = load_corpus(folder, calibration, context=shape.context, vocabulary=shape.vocabulary)
    model = streamed(checkpoint, machine)
    work = _profile_workload(corpus, machine, output)
    require_room(output, estimate_profile(figures_of(checkpoint), work, leave_one_out=leave_one_out).disk_bytes)
    digest = fingerprint(checkpoint)
    settings = {
        "command": "profile",
        "model": digest,
        "leave_one_out": leave_one_out,
        "bit_losses": bit_losses,
        "seed": calibration.seed,
    }
    probe = bit_loss_probe(checkpoint.config) if bit_losses else None
    with model_run(output, model, corpus, machine, settings, inputs) as (run, limits):
        statistics = collect(model, corpus, run, limits, leave_one_out=leave_one_out, probe=probe)
        profile = Profile(
            model=digest,
            model_name=display_name(folder, model_name),
            family=checkpoint.family.name,
            config=checkpoint.config,
            shape=shape,
            domains=corpus.domains,
            layers=checkpoint.outline.moe_layers,
            calibration=describe_corpus(corpus, calibration.seed),
            inventory=inventory(checkpoint),
            statistics=statistics,
        )
        save_profile(profile, run.folder)
        run.require_ready()
        drop_hidden(run)
        run.finish()
    return profile


def profile_estimate(
    model_name: str,
    calibration: Calibration,
    machine: Machine,
    *,
    leave_one_out: bool = True,
    bit_losses: bool = True,
    output: Output | None = None,
) -> Estimate:
    """What `profile` would take; without an output its disk is taken to have room."""
    folder = model_folder(model_name)
    checkpoint = open_checkpoint(folder)
    corpus = load_corpus(folder, calibration, context=checkpoint.shape.context, vocabulary=checkpoint.shape.vocabulary)
    work = _profile_workload(corpus, machine, output)
    rates = measure_rates(checkpoint, work.device, work.dtype)
    return estimate_profile(figures_of(checkpoint), work, rates, leave_one_out=leave_one_out, bit_losses=bit_losses)


def _profile_workload(corpus: Corpus, machine: Machine, output: Output | None) -> Workload:
    tokens, window = corpus.windows.numel(), corpus.windows.shape[1]
    work = workload(machine, tokens=tokens, window=window, domains=len(corpus.domains))
    return work if output is None else replace(work, free_bytes=free_disk(output)[1])


def load_profiles(folders: Sequence[Path]) -> Profile:
    """One profile, or several of one model merged."""
    return merge_profiles([load_profile(folder) for folder in folders])


def checked_plan(checkpoint: Checkpoint, plan: Plan) -> Plan:
    """The plan, held against the model.

    Raises:
        UsageError: it is for another model or not legal.
    """
    check_plan(plan, checkpoint.shape, checkpoint.outline.moe_layers, None)  # first what needs no weight to be read
    check_plan(plan, checkpoint.shape, checkpoint.outline.moe_layers, fingerprint(checkpoint))
    return plan


def prune_stage(
    model_name: str,
    output: Output,
    plan: Plan,
    *,
    mtp: Mtp = Mtp.DROP,
    allow_nonfinite: bool = False,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Rewrite the checkpoint without the experts that the plan leaves out."""
    folder = model_folder(model_name)
    check_output(output.folder, [folder], resume=output.resume, force=output.force)
    inputs = watched(folder)
    checkpoint = open_checkpoint(folder, allow_nonfinite=allow_nonfinite)
    checked_plan(checkpoint, plan)
    keep = {**plan.keep, **mtp_keep(checkpoint, plan, mtp)}
    size = planned_bytes(planned_entries(checkpoint, keep))  # known to the byte before any is written
    if dry_run:
        rates = measure_rates(checkpoint, torch.device("cpu"), torch.float32)
        return asdict(estimate_prune(size, rates))
    require_room(output, size)
    settings = {
        "command": "prune",
        "moepress": __version__,
        "model": plan.model,
        "keep": {str(layer): kept for layer, kept in plan.keep.items()},
        "groups": plan.groups.value,
        "mtp": mtp.value,
        "allow_nonfinite": allow_nonfinite,
    }
    with open_run(output.folder, settings, resume=output.resume, force=output.force, inputs=inputs) as run:
        return prune(checkpoint, plan, run, mtp=mtp)


def quantize_stage(
    model_name: str,
    output: Output,
    plan: Plan | None,
    request: QuantizeRequest,
    calibration: Calibration,
    machine: Machine,
    *,
    mtp: Mtp = Mtp.DROP,
    repairs: Repairs | None = None,
    max_pieces: int | None = None,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Quantize the model, pruned by the plan where there is one, to a compressed-tensors folder.

    With `max_pieces` it stops after so many new pieces: the result then says `"finished": False` and how far it is,
    there is no folder yet, and a resume goes on. `repairs` were made for the same plan, see `repairing.repair_stage`.
    """
    folder = model_folder(model_name)
    check_output(output.folder, [folder], resume=output.resume, force=output.force)
    inputs = watched(folder)
    checkpoint = open_checkpoint(folder)
    if mtp is Mtp.KEEP:
        refuse_quantized_mtp(checkpoint)
    shape = checkpoint.shape
    if plan is not None:
        checked_plan(checkpoint, plan)
    prunes = plan is not None and plan.prunes
    source: Source = prune_source(checkpoint, plan.keep, degroup=plan.degroup) if plan and prunes else checkpoint
    source = source if repairs is None else repaired_source(source, repairs)
    stored = model_dtype(checkpoint.config)
    scheme, layer_bits = settle_bits(source, request.scheme, request.layer_bits, request.include)
    options = QuantizeOptions(
        scheme=scheme,
        layer_bits=layer_bits,
        scale_dtype=scale_value_dtype(stored),
        stored_dtype=stored,
        hessian=request.hessian,
        solver=request.solver,
    )
    check_scheme(source, scheme, request.include)
    corpus = load_corpus(folder, calibration, context=shape.context, vocabulary=shape.vocabulary)
    model = streamed(source, machine)
    work = workload(machine, tokens=corpus.windows.numel(), window=corpus.windows.shape[1])
    estimate = estimate_quantize(
        checkpoint,
        figures_of(checkpoint),
        plan.experts if plan else shape.experts,
        scheme,
        work,
        measure_rates(checkpoint, work.device, work.dtype) if dry_run else None,
        include=request.include,
        layer_bits=layer_bits,
        original_targets=request.hessian.asymmetry > 0,
        balanced=request.hessian.least_tokens > 0,
    )
    if dry_run:
        return asdict(estimate)
    require_room(output, estimate.disk_bytes)
    digest = fingerprint(checkpoint) if plan is None else plan.model
    settings = {
        "command": "quantize",
        "model": digest,
        "keep": {str(layer): kept for layer, kept in plan.keep.items()} if plan and prunes else None,
        "groups": plan.groups.value if plan and prunes else None,
        "repair": None if repairs is None else repairs.digest,
        "scheme": asdict(scheme),
        "layer_bits": {str(layer): bits for layer, bits in layer_bits.items()} or None,
        "include": sorted(request.include),
        "hessian": asdict(request.hessian),
        "solver": asdict(request.solver),
        "seed": calibration.seed,
        "piece_bytes": PIECE_BYTES,
    }
    summary = {
        "model": digest,
        "model_name": display_name(folder, model_name),
        "calibration": describe_corpus(corpus, calibration.seed),
        "experts_before": shape.experts,
        "experts": plan.experts if plan else shape.experts,
        "repair": None if repairs is None else repairs.model_dump(mode="json", exclude={"calibration"}),
        "hessian": settings["hessian"],
        "solver": settings["solver"],
    }
    with model_run(output, model, corpus, machine, settings, inputs) as (run, limits):
        result = quantize(
            model,
            corpus,
            run,
            limits,
            options=options,
            include=request.include,
            companions=folder,
            summary=summary,
            max_pieces=max_pieces,
        )
    return {"bytes_before": checkpoint.total_bytes, **result, **summary, "scheme": settings["scheme"]}
