"""prune: the checkpoint without the experts that a plan leaves out, byte for byte."""

from dataclasses import asdict
from typing import Any

import torch

from moepress import __version__
from moepress.compress.estimates.prune import estimate_prune
from moepress.compress.estimates.rates import measure_rates
from moepress.compress.pruning.plan import Plan
from moepress.compress.pruning.rewrite import mtp_keep, planned_bytes, planned_entries, prune
from moepress.models.storage.inside import watched
from moepress.models.storage.mtp import Mtp
from moepress.runs.journal import open_run
from moepress.runs.output import check_output
from moepress.stages.groundwork import announce, checked_plan, opened, require_room
from moepress.stages.places import Output, model_folder


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
    checkpoint = opened(folder, allow_nonfinite=allow_nonfinite)
    checked_plan(checkpoint, plan)
    keep = {**plan.keep, **mtp_keep(checkpoint, plan, mtp)}
    size = planned_bytes(planned_entries(checkpoint, keep))  # known to the byte before any is written
    if dry_run:
        announce(checkpoint)
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
