"""`moepress plan`: the command, and what a plan keeps and costs as tables."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from moepress.commands.console import emit, note
from moepress.commands.options import (
    budget_options,
    float_option,
    force_option,
    include_option,
    json_option,
    scheme_options,
    selection_options,
    targets_file_option,
)
from moepress.commands.requests import plan_of
from moepress.commands.tables import EMBEDDED_NOTE, human_bytes, plain_console, plain_table, print_slack

if TYPE_CHECKING:
    from rich.console import Console

    from moepress.compress.budget.search import Budget
    from moepress.compress.pruning.plan import Plan


@click.command()
@click.argument("profiles", nargs=-1, required=True, type=click.Path(path_type=Path))
@selection_options
@budget_options
@targets_file_option
@click.option("--no-quantization", is_flag=True, help="Plan for pruning alone.")
@scheme_options
@float_option
@include_option
@click.option(
    "--to",
    type=click.Choice(["gguf"]),
    help="With --budget or --target: choose a type of GGUF for every kind of matrix in every part of the depth, by the "
    "losses of `profile --grid-losses`.",
)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="File for the plan, such as plan.json.")
@force_option
@json_option
def plan(profiles: tuple[Path, ...], output: Path | None, force: bool, as_json: bool, **options: Any) -> None:
    """Decide from PROFILES which experts stay; print what each domain loses and the size before and after.

    Instant, and pure: the same profile and options give the same plan. The plan is JSON that can be read and edited.
    With --budget or --target it chooses the experts and the bits that lose least, by estimate, and shows what else
    there is.

    \b
    Example:  moepress plan profile --keep 0.75 -o plan.json
              moepress plan profile --experts 8 --domain-weight python=1 --domain-weight german=0 -o plan.json
              moepress plan profile --budget 12GiB -o plan.json
              moepress plan profile --target rtx-4060-ti-16gb --context 8192 -o plan.json
              moepress plan profile --budget 12GiB --to gguf -o plan.json
              moepress plan profile --keep 0.75 --scheme mxfp4 -o plan.json
    """
    from moepress.runs.files import check_file, write_atomically
    from moepress.stages.places import require_profiles

    if output is not None:
        check_file(output, "-o", force=force)
    require_profiles(profiles)  # before anything heavy is imported
    from moepress.compress.pruning.plan import plan_text
    from moepress.stages.plan import load_profiles
    from moepress.validation.rules.check import planned_notes

    seen = load_profiles(profiles)
    made = plan_of(seen, options, quantized=not options["no_quantization"])
    note(*planned_notes(made, seen.config))
    if output is not None:
        write_atomically(output, plan_text(made))
    emit(made.model_dump(mode="json")) if as_json else _print_plan(made, output)


def _print_plan(plan: Plan, file: Path | None) -> None:
    """What a plan keeps and what it costs."""
    from moepress.compress.gptq.grid_rows import mix_text

    console = plain_console()
    share = plan.experts / plan.experts_before
    console.print(
        f"{plan.experts} of {plan.experts_before} experts stay in each of {len(plan.keep)} layers ({share:.0%}), "
        f"by {plan.criterion.value}"
    )
    if plan.prunes:
        _print_losses(console, plan)
        console.print(
            f"stability: two halves of the calibration text agree on {plan.stability:.1%} of the kept experts"
        )
    if plan.slack is not None:
        print_slack(plan.slack)
    protected = sum(map(len, plan.protected.values()))
    if protected:
        console.print(f"protected: {protected} experts with outstanding activations are never pruned")
    sizes = plan.sizes
    change = sizes.after_bytes / sizes.before_bytes - 1
    said = plan.quantization
    scheme = "" if said is None else f", {said.scheme().short}" + ("" if said.floats else f" g{said.group_size}")
    scheme = f", {mix_text(plan.grids)}" if plan.grids else scheme
    console.print(
        f"size: {human_bytes(sizes.before_bytes)} -> about {human_bytes(sizes.after_bytes)} ({change:+.0%}{scheme})"
    )
    if plan.budget is not None:
        _print_budget(console, plan.budget)
        _print_mix(console, plan) if plan.grids else _print_alternatives(console, plan)
    for line in (*plan.notes, *_more_to_know(plan)):
        console.print(f"Note: {line}")
    if plan.calibration.get("embedded"):
        console.print(EMBEDDED_NOTE)
    if file is not None:
        console.print(f"Plan written to {file}")


def _print_losses(console: Console, plan: Plan) -> None:
    """What each domain loses, and which of them are protected."""
    from moepress.compress.pruning.domains import times_others

    named, losses = bool(plan.protected_domains), {d: loss.reap_sum_mass for d, loss in plan.loss.items()}
    table = plain_table("domain", "weight", "gate mass lost", "reap-sum mass lost", "to the others", *([""] * named))
    for domain, loss in plan.loss.items():
        times = f"{times_others(losses, domain):.1f}x" if len(losses) > 1 else ""
        mark = ["protected" if domain in plan.protected_domains else ""] * named
        weight = f"{plan.domain_weights[domain]:.3g}"
        table.add_row(domain, weight, f"{loss.gate_mass:.1%}", f"{loss.reap_sum_mass:.1%}", times, *mark)
    console.print(table)
    if named:
        console.print(f"protected domains: {', '.join(plan.protected_domains)}, within {plan.max_domain_loss}")


def _print_budget(console: Console, budget: Budget) -> None:
    """What the budget is made of."""
    parts = [f"budget: {human_bytes(budget.limit_bytes)}" + (f" of {budget.target}" if budget.target else "")]
    if budget.reserve_bytes:
        share = budget.reserve_bytes / budget.limit_bytes
        parts.append(f"- {human_bytes(budget.reserve_bytes)} reserve ({share:.0%})")
    if budget.cache_bytes:
        parts.append(f"- {human_bytes(budget.cache_bytes)} KV cache ({budget.context} tokens)")
    left = f" = {human_bytes(budget.weight_bytes)}" if len(parts) > 1 else ""
    console.print(" ".join(parts) + left + " for the weights")


def _print_mix(console: Console, plan: Plan) -> None:
    """The type of every kind of matrix, by layers; and the best mixes of other sizes."""
    from moepress.compress.gptq.kinds import kind_text, range_text

    types = plain_table("kind", "layers", "type")
    for row in plan.grids:
        types.add_row(kind_text(row.kind), "" if row.layers is None else range_text(row.layers), row.type)
    console.print(types)
    points = plain_table("file", "bits per weight", "experts", "estimated KL", "")
    for point in plan.curve:
        chosen = "chosen" if point.chosen else ""
        points.add_row(
            human_bytes(point.weight_bytes), f"{point.bits:.2f}", str(point.experts), f"{point.kl:.2e}", chosen
        )
    console.print(points)


def _print_alternatives(console: Console, plan: Plan) -> None:
    """What else there is; the estimated loss is a share of the experts' output, or a divergence."""
    from moepress.compress.budget.search import Unit
    from moepress.compress.gptq.include import parts_text

    nats = any(row.unit is Unit.NATS for row in plan.alternatives)
    free = any(row.part_bits for row in plan.alternatives)
    loss = "estimated KL" if nats else "estimated loss"
    table = plain_table("experts", "bits", *(["other parts"] if free else []), "weights", loss, "fits", "")
    for row in plan.alternatives:
        bits = "as stored" if row.bits is None else f"{row.bits:.2f} by layer" if row.mixed else f"{row.bits:g}"
        parts = [parts_text(row.part_bits)] if free else []
        fits, chosen = "yes" if row.fits else "no", "chosen" if row.chosen else ""
        loss = f"{row.loss:.2e}" if nats else f"{row.loss:.3%}"
        table.add_row(str(row.experts), bits, *parts, human_bytes(row.weight_bytes), loss, fits, chosen)
    console.print(table)
    if plan.layer_bits:
        console.print("bits by layer: " + ", ".join(f"{layer}: {bits}" for layer, bits in plan.layer_bits.items()))


def _more_to_know(plan: Plan) -> list[str]:
    """How the loss of what is quantized besides the experts would get into the estimate."""
    from moepress.compress.budget.search import Unit

    if not plan.include or not plan.alternatives or plan.alternatives[0].unit is Unit.NATS:
        return []
    text = (
        "`profile --grid-losses` measures what bits of these parts cost; then that is in the estimate, and bits that "
        "nobody named are chosen by it."
    )
    return [text]
