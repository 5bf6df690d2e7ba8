"""`run --dry-run`: time, memory and disk of every stage that a recipe names, and of all together, after all checks."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from moepress.calibration.hessian import hessian_for
from moepress.compress.budget.sizes import included_linears
from moepress.compress.estimates.estimate import PROJECTED, Estimate
from moepress.compress.estimates.export import Pressed, estimate_gguf, estimate_gptq, estimate_onnx, onnx_bytes_after
from moepress.compress.estimates.figures import Figures, figures_of
from moepress.compress.estimates.footprint import Workload
from moepress.compress.estimates.profile import estimate_profile
from moepress.compress.estimates.prune import estimate_prune
from moepress.compress.estimates.quantize import estimate_quantize
from moepress.compress.estimates.rates import Rates, measure_rates
from moepress.compress.estimates.repair import estimate_repair
from moepress.compress.gptq.block_choice import MIX_TYPES, PLANNED, nearest_scheme
from moepress.compress.gptq.options import solver_of
from moepress.compress.pruning.plan import estimate_sizes, load_plan
from moepress.compress.pruning.repair import Repair
from moepress.models.forward.inventory import inventory
from moepress.models.forward.walk import default_memory
from moepress.models.storage.checkpoint import Checkpoint
from moepress.models.storage.experts import mtp_layers
from moepress.models.storage.mtp import Mtp
from moepress.runs.rows import first_settings
from moepress.stages.groundwork import gguf_weights, workload
from moepress.stages.places import DEFAULT_TOKENS, DEFAULT_WINDOW, Machine
from moepress.stages.plan import budget_of
from moepress.stages.quantize import on_grid
from moepress.stages.run.recipe import Recipe, Settled, as_before, budget_request, check_recipe, mixes, resolve, settled
from moepress.stages.run.run import no_room

ALL = "all"
BUDGET_NOTE = (
    "The budget decides after the profile. Taken here: the most experts that fit, and bits that fill what they leave."
)
REPORT_NOTE = "What the report takes, which runs all models over the evaluation text, is not in it."


@dataclass(frozen=True, slots=True, kw_only=True)
class RunEstimate:
    """What a run would take.

    Attributes:
        recipe: in full.
        settled: experts and bits, known or assumed.
        sizes: bytes of all weights before and after.
        stages: stage -> its estimate as plain data, in order, and `all`.
    """

    recipe: Recipe
    settled: Settled
    sizes: Mapping[str, int]
    stages: Mapping[str, Mapping[str, Any]]

    def plain(self) -> dict[str, Any]:
        """As JSON: the stages lie beside the rest, by their names."""
        return {
            "recipe": self.recipe.model_dump(mode="json"),
            "experts": self.settled.count,
            "bits": None if self.settled.scheme is None else self.settled.scheme.bits,
            "scheme": self.recipe.scheme,
            "grid": self.recipe.grid,
            "group_size": None if self.settled.scheme is None else self.settled.scheme.group_size,
            "layer_bits": {str(layer): bits for layer, bits in self.settled.layer_bits.items()},
            "include": [part.value for part in self.settled.include],
            "part_bits": {part.value: bits for part, bits in self.settled.include.items() if bits is not None},
            "sizes": dict(self.sizes),
            **self.stages,
        }


def estimate_recipe(recipe: Recipe, out: Path, *, resume: bool = False) -> RunEstimate:
    """What a run into that folder would take; nothing is written.

    A plan that a run which is resumed has made already says how many experts and bits there are.

    Raises:
        UsageError, InvalidInputError, UnsupportedError: as the run would.
    """
    recipe = as_before(recipe, first_settings(out) if resume else {})
    checkpoint, _, criterion = check_recipe(recipe)
    full = resolve(recipe, checkpoint, criterion, recipe.max_memory or default_memory())
    machine = Machine(device=full.device, dtype=full.dtype, memory_bytes=full.max_memory)
    work = workload(machine, tokens=full.tokens or DEFAULT_TOKENS, window=full.window or DEFAULT_WINDOW)
    planned = _planned(out, asymmetric=full.asymmetric) if resume else None
    known, figures = planned or settled(full, checkpoint), figures_of(checkpoint)
    rates = measure_rates(checkpoint, work.device, work.dtype)
    stages = {"profile": _profile_estimate(full, figures, work, rates)}
    if full.repair:
        stages["repair"] = estimate_repair(
            figures,
            work,
            rates,
            router=Repair.ROUTER in full.repair,
            down=known.count if Repair.DOWN in full.repair else 0,
        )
    include = on_grid(checkpoint, full.grid, known.include)
    linears = included_linears(checkpoint, include)
    sizes = estimate_sizes(
        inventory(checkpoint), checkpoint.shape, known.count, known.scheme, known.layer_bits, linears=linears
    )
    if mixes(full):
        sizes = sizes.model_copy(update={"after_bytes": _mix_bytes(full, checkpoint, known.count)})
    notes: list[str] = []
    if known.scheme is None:
        stages["prune"] = estimate_prune(sizes.after_bytes, rates)
    else:
        hessian = hessian_for(full.match, known.scheme.bits, known.layer_bits, full.effort)
        stages["quantize"] = estimate_quantize(
            checkpoint,
            figures,
            known.count,
            known.scheme,
            work,
            rates,
            include=include,
            layer_bits=known.layer_bits,
            original_targets=hessian.asymmetry > 0,
            end_tokens=hessian.end_tokens,
            solver=solver_of(full.effort, positive=full.positive_scales),
            predicting=mtp_layers(checkpoint) if full.mtp is Mtp.KEEP else (),
        )
        pressed = Pressed(
            size=sizes.after_bytes,
            count=known.count,
            scheme=known.scheme,
            layer_bits=known.layer_bits,
            linears=linears,
        )
        exports, notes = _exports(full, out, checkpoint, figures, pressed, rates)
        stages |= exports
    notes += [REPORT_NOTE, *([BUDGET_NOTE] if planned is None and budget_request(full) is not None else [])]
    return RunEstimate(
        recipe=full,
        settled=known,
        sizes=sizes.model_dump(),
        stages={name: asdict(row) for name, row in {**stages, ALL: together(stages, notes)}.items()},
    )


def _mix_bytes(recipe: Recipe, checkpoint: Checkpoint, count: int) -> int:
    """What a mix takes at most: its budget, or a file with every matrix in the largest type."""
    request = budget_request(recipe)
    assert request is not None
    most = gguf_weights(checkpoint).bytes(count, MIX_TYPES[-1])
    return min(most, budget_of(request, checkpoint.config, checkpoint.shape).weight_bytes)


def _profile_estimate(recipe: Recipe, figures: Figures, work: Workload, rates: Rates) -> Estimate:
    budgeted = budget_request(recipe) is not None
    return estimate_profile(figures, work, rates, bit_losses=budgeted, grid_losses=mixes(recipe))


def together(stages: Mapping[str, Estimate], notes: list[str]) -> Estimate:
    """One after the other: times and outputs add up; of memory, and of what lies beside outputs, the most counts."""
    before, peak = 0, 0
    for stage in stages.values():
        peak = max(peak, before + stage.disk_bytes)
        before += stage.output_bytes
    time = {name: stage.seconds for name, stage in stages.items() if stage.seconds is not None}
    on_device = [stage.device_memory_bytes for stage in stages.values() if stage.device_memory_bytes is not None]
    return Estimate(
        disk_bytes=peak,
        output_bytes=before,
        peak_memory_bytes=max(stage.peak_memory_bytes for stage in stages.values()),
        device_memory_bytes=max(on_device, default=None),
        seconds=sum(time.values()),
        tokens_per_expert=None,
        time=time,
        memory={name: stage.peak_memory_bytes for name, stage in stages.items()},
        disk={name: stage.output_bytes for name, stage in stages.items()},
        notes=(PROJECTED, *notes),
    )


def _planned(out: Path, *, asymmetric: bool) -> Settled | None:
    """By the plan of an earlier start, where it came so far."""
    file = out / "plan.json"
    if not file.exists():
        return None
    plan = load_plan(file)
    if plan.grids:
        return Settled(count=plan.experts, scheme=nearest_scheme(PLANNED, plan.grids))
    if plan.quantization is None:
        return None
    scheme = replace(plan.quantization.scheme(), symmetric=not asymmetric)
    return Settled(count=plan.experts, scheme=scheme, layer_bits=plan.layer_bits, include=plan.included)


def _exports(
    recipe: Recipe, out: Path, checkpoint: Checkpoint, figures: Figures, pressed: Pressed, rates: Rates
) -> tuple[dict[str, Estimate], list[str]]:
    """A row for every export, named as in the run's journal, and what is left out."""
    rows: dict[str, Estimate] = {}
    if "gptq" in recipe.to:
        rows["export-gptq"] = estimate_gptq(figures, pressed, rates)
    if "gguf" in recipe.to:
        rows["export-gguf"] = estimate_gguf(figures, pressed, rates)
    if "onnx" not in recipe.to:
        return rows, []
    from moepress.converters.onnx.export import OnnxRequest, onnx_bytes, plan_onnx

    before = onnx_bytes(plan_onnx(checkpoint, OnnxRequest()))
    after = onnx_bytes_after(
        before, figures, pressed, bias=checkpoint.family.rule is not None and checkpoint.family.rule.bias
    )
    rows["export-onnx"] = estimate_onnx(figures, pressed.size, after, pressed.count, rates)
    if not recipe.throughput:
        return rows, []
    lack = no_room(recipe.model, next(p for p in (out, *out.resolve().parents) if p.exists()))
    if lack is None:
        rows["export-onnx-before"] = estimate_onnx(
            figures, checkpoint.total_bytes, before, checkpoint.shape.experts, rates
        )
    return rows, [] if lack is None else [lack]
