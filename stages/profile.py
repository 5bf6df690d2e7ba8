"""profile: the model over calibration text, and what is written down of how it uses its experts."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from moepress.calibration.collect import collect, drop_hidden
from moepress.calibration.corpus import Corpus
from moepress.calibration.profile import Profile, Statistic, describe_corpus, fingerprint, save_profile
from moepress.compress.budget.bit_losses import bit_loss_probe
from moepress.compress.budget.gguf_sizes import FileWeights
from moepress.compress.budget.kind_losses import drop_kind_losses, kind_losses, sample
from moepress.compress.budget.sensitivities import ROUNDED
from moepress.compress.budget.sizes import linear_rows
from moepress.compress.estimates.estimate import Estimate
from moepress.compress.estimates.figures import figures_of
from moepress.compress.estimates.footprint import Workload
from moepress.compress.estimates.profile import estimate_profile
from moepress.compress.estimates.rates import measure_rates
from moepress.compress.gptq.block_choice import MIX_TYPES
from moepress.errors import UsageError
from moepress.models.forward.inventory import inventory
from moepress.models.forward.tensor_check import mtp_problems
from moepress.models.storage.checkpoint import Checkpoint
from moepress.models.storage.experts import mtp_layers
from moepress.models.storage.inside import watched
from moepress.runs.output import check_output
from moepress.runs.progress import note
from moepress.stages.groundwork import (
    announce,
    can_leave_out,
    free_disk,
    gguf_weights,
    load_corpus,
    model_run,
    opened,
    require_room,
    streamed,
    tell_of_residual,
    warn_of_memory,
    workload,
)
from moepress.stages.places import Calibration, Machine, Output, display_name, model_folder


def profile_stage(
    model_name: str,
    output: Output,
    calibration: Calibration,
    machine: Machine,
    *,
    leave_one_out: bool = True,
    bit_losses: bool = True,
    grid_losses: bool = False,
    allow_nonfinite: bool = False,
) -> Profile:
    """Run the model over calibration text and write its profile.

    With `grid_losses` also what GGUF's types cost, kind by kind of matrix: a second walk over a few windows.

    Raises:
        UsageError: `grid_losses` without `bit_losses`.
        UnsupportedError: `grid_losses` of a model that llama.cpp does not compute.
    """
    folder = model_folder(model_name)
    check_output(output.folder, [folder], resume=output.resume, force=output.force)
    inputs = watched(folder)
    checkpoint = opened(folder, allow_nonfinite=allow_nonfinite)
    announce(checkpoint)
    leave_one_out = leave_one_out and can_leave_out(checkpoint)
    file = _file_weights(checkpoint, bit_losses=bit_losses, leave_one_out=leave_one_out) if grid_losses else None
    shape = checkpoint.shape
    corpus = load_corpus(folder, calibration, context=shape.context, vocabulary=shape.vocabulary)
    model = streamed(checkpoint, machine)
    work = _profile_workload(corpus, machine, output)
    tell_of_residual(checkpoint)
    estimate = estimate_profile(
        figures_of(checkpoint), work, leave_one_out=leave_one_out, bit_losses=bit_losses, grid_losses=grid_losses
    )
    require_room(output, estimate.disk_bytes)
    warn_of_memory(estimate)
    settings = {
        "command": "profile",
        "model": fingerprint(checkpoint),
        "leave_one_out": leave_one_out,
        "bit_losses": bit_losses,
        "grid_losses": grid_losses,
        "seed": calibration.seed,
    }
    probe = bit_loss_probe(checkpoint.config, grids=grid_losses) if bit_losses else None
    note(*not_whole(checkpoint))
    with model_run(output, model, corpus, machine, settings, inputs) as (run, limits):
        found = collect(model, corpus, run, limits, leave_one_out=leave_one_out, probe=probe)
        kinds = kind_losses(model, sample(corpus), run, limits) if grid_losses else []
        profile = profile_of(
            checkpoint,
            display_name(folder, model_name),
            corpus.domains,
            describe_corpus(corpus, calibration.seed),
            found,
        )
        if file is not None:
            rows = tuple(row.model_dump(mode="json") for row in kinds)
            file_rows = file.model_dump(mode="json")
            profile = replace(profile, grids=(*MIX_TYPES, ROUNDED), kind_losses=rows, file=file_rows)
        save_profile(profile, run.folder)
        run.require_ready()
        drop_kind_losses(run)
        drop_hidden(run)
        run.finish()
    return profile


def profile_of(
    checkpoint: Checkpoint,
    name: str,
    domains: Sequence[str],
    calibration: Mapping[str, Any],
    found: Mapping[int, Mapping[str, Statistic]],
) -> Profile:
    """A profile of what was observed.

    Args:
        checkpoint: the model.
        name: its name for people.
        domains: of the text.
        calibration: `describe_corpus`.
        found: layer -> accumulators, of MTP layers too.
    """
    layers = checkpoint.outline.moe_layers
    return Profile(
        model=fingerprint(checkpoint),
        model_name=name,
        family=checkpoint.family.name,
        config=checkpoint.config,
        shape=checkpoint.shape,
        domains=tuple(domains),
        layers=layers,
        calibration=calibration,
        inventory=inventory(checkpoint),
        statistics={layer: found[layer] for layer in layers},
        mtp={layer: statistics for layer, statistics in found.items() if layer >= checkpoint.shape.layers},
        linears=linear_rows(checkpoint),
    )


def _file_weights(checkpoint: Checkpoint, *, bit_losses: bool, leave_one_out: bool) -> FileWeights:
    """What a GGUF file of the model is made of; refuses losses on GGUF's types where they would be of no use.

    Raises:
        UsageError: other losses are left out, or a matrix fits no type.
        UnsupportedError: llama.cpp does not compute such a model, or `gguf` is not installed.
    """
    if not bit_losses:
        raise UsageError("--grid-losses needs what bits cost; leave out --no-bit-losses.")
    if not leave_one_out:
        raise UsageError(
            "--grid-losses is for plans, which weigh experts by leave-one-out losses too; this profile would have none."
        )
    file = gguf_weights(checkpoint)
    for matrix in file.matrices:
        matrix.type("Q4_K")
    return file


def not_whole(checkpoint: Checkpoint) -> list[str]:
    """What is to be said of multi-token-prediction layers that can not be run; the model itself can."""
    problems = {layer: mtp_problems(checkpoint, layer) for layer in mtp_layers(checkpoint)}
    return [
        f"The multi-token-prediction layer {layer} is not profiled, for {found[0]}; prune it with --mtp drop."
        for layer, found in problems.items()
        if found
    ]


def profile_estimate(
    model_name: str,
    calibration: Calibration,
    machine: Machine,
    *,
    leave_one_out: bool = True,
    bit_losses: bool = True,
    grid_losses: bool = False,
    output: Output | None = None,
) -> Estimate:
    """What `profile` would take; without an output its disk is taken to have room."""
    folder = model_folder(model_name)
    checkpoint = opened(folder)
    announce(checkpoint)
    corpus = load_corpus(folder, calibration, context=checkpoint.shape.context, vocabulary=checkpoint.shape.vocabulary)
    work = _profile_workload(corpus, machine, output)
    rates = measure_rates(checkpoint, work.device, work.dtype)
    leave_one_out = leave_one_out and can_leave_out(checkpoint)
    return estimate_profile(
        figures_of(checkpoint),
        work,
        rates,
        leave_one_out=leave_one_out,
        bit_losses=bit_losses,
        grid_losses=grid_losses,
    )


def _profile_workload(corpus: Corpus, machine: Machine, output: Output | None) -> Workload:
    tokens, window = corpus.windows.numel(), corpus.windows.shape[1]
    work = workload(machine, tokens=tokens, window=window, domains=len(corpus.domains))
    return work if output is None else replace(work, free_bytes=free_disk(output)[1])
