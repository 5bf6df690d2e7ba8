"""Results as tables for people, on stdout."""

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from moepress.calibration.profile import Profile
from moepress.compress.budget.search import Budget
from moepress.compress.gptq.schemes import bits_text
from moepress.compress.pruning.plan import Plan
from moepress.runs.terminal import console

EMBEDDED_NOTE = "Note: the embedded demo text was used for calibration; give --calibration with your own text."


def human_bytes(size: float) -> str:
    """A size with a binary unit."""
    for unit, factor in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if size >= factor:
            return f"{size / factor:,.2f} {unit}"
    return f"{size:.0f} B"


def human_count(number: int) -> str:
    """A number of parameters: 671.0 B, 4.6 M."""
    for unit, factor in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= factor:
            return f"{number / factor:.1f} {unit}"
    return str(number)


def plain_console(*, markup: bool = False) -> Console:
    """stdout, for people: no colours for numbers, no lines broken."""
    return console(soft_wrap=True, markup=markup)


def plain_table(*columns: str) -> Table:
    """A table without lines; the first column to the left, numbers to the right."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", no_wrap=True)
    return table


def print_inventory(found: Mapping[str, Any]) -> None:
    """What `inspect` found."""
    console = plain_console(markup=True)
    kinds = found["layer_kinds"]
    groups = f", {found['groups']} groups ({found['top_groups']} used)" if found["groups"] > 1 else ""
    console.print(f"[bold]{escape(found['model'])}[/bold]  {found['family']} ({found['architecture']})")
    console.print(f"{found['layers']} layers: {kinds['moe']} with experts, {kinds['dense']} dense")
    console.print(f"{found['experts']} routed experts of width {found['expert_width']}, top-{found['top_k']}{groups}")
    console.print(f"hidden {found['hidden']}, vocabulary {found['vocabulary']}, context {found['context']}")
    dtypes = ", ".join(f"{name} {human_bytes(size)}" for name, size in found["dtype_bytes"].items())
    console.print(f"{found['shards']} shards: {dtypes}")
    table = plain_table("part", "parameters", "size", "share")
    for part, row in found["parts"].items():
        share = row["bytes"] / max(found["bytes"], 1)
        table.add_row(part, human_count(row["parameters"]), human_bytes(row["bytes"]), f"{share:.1%}")
    table.add_row("all", human_count(found["parameters"]), human_bytes(found["bytes"]), "")
    console.print(table)
    console.print(f"active per token: {human_count(found['active_parameters'])} parameters")
    console.print(f"expert counts that can stay: {_ranges(found['legal_expert_counts'])}")
    if found["legal_expert_counts_degrouped"]:
        console.print(f"with --groups degroup: {_ranges(found['legal_expert_counts_degrouped'])}")
    console.print(f"never quantized: {', '.join(found['never_quantized'])}")
    if found["mtp_layers"]:
        console.print("The multi-token-prediction layer is dropped, or kept by `prune --mtp keep`.")


def _ranges(numbers: list[int]) -> str:
    """1, 2, 3, 4, 8 as 1-4, 8; evenly spaced runs as `8, 16, ... 64`."""
    if not numbers:
        return "none"
    steps = {b - a for a, b in pairwise(numbers)}
    if len(numbers) > 4 and len(steps) == 1:
        step = steps.pop()
        if step == 1:
            return f"{numbers[0]}-{numbers[-1]}"
        return f"{numbers[0]}, {numbers[1]}, ... {numbers[-1]} (multiples of {step})"
    return ", ".join(map(str, numbers))


def print_profile(profile: Profile, folder: Path) -> None:
    """What `profile` saw, in short."""
    console = plain_console()
    calibration = profile.calibration
    table = plain_table("domain", "tokens", "busiest quarter of experts")
    for index, domain in enumerate(profile.domains):
        shares = []
        for layer in profile.layers:
            counts = sorted(profile.statistics[layer]["count"][index].sum(axis=0).tolist(), reverse=True)
            shares.append(sum(counts[: max(1, len(counts) // 4)]) / max(sum(counts), 1))
        tokens = calibration["tokens_per_domain"][domain]
        table.add_row(domain, f"{tokens:,}", f"{sum(shares) / len(shares):.0%} of choices")
    console.print(table)
    if calibration["embedded"]:
        console.print(EMBEDDED_NOTE)
    for note in calibration["notes"]:
        console.print(f"Note: {note}")
    console.print(f"Profile written to {folder}. Next: moepress plan {folder} --keep 0.75 -o plan.json")


def print_plan(plan: Plan, file: Path | None) -> None:
    """What a plan keeps and what it costs."""
    console = plain_console()
    share = plan.experts / plan.experts_before
    console.print(
        f"{plan.experts} of {plan.experts_before} experts stay in each of {len(plan.keep)} layers ({share:.0%}), "
        f"by {plan.criterion.value}"
    )
    if plan.prunes:
        table = plain_table("domain", "weight", "gate mass lost", "reap-sum mass lost")
        for domain, loss in plan.loss.items():
            weight = f"{plan.domain_weights[domain]:g}"
            table.add_row(domain, weight, f"{loss.gate_mass:.1%}", f"{loss.reap_sum_mass:.1%}")
        console.print(table)
        console.print(
            f"stability: two halves of the calibration text agree on {plan.stability:.1%} of the kept experts"
        )
    protected = sum(map(len, plan.protected.values()))
    if protected:
        console.print(f"protected: {protected} experts with outstanding activations are never pruned")
    sizes = plan.sizes
    change = sizes.after_bytes / sizes.before_bytes - 1
    scheme = f", {plan.quantization.bits} bit g{plan.quantization.group_size}" if plan.quantization else ""
    console.print(
        f"size: {human_bytes(sizes.before_bytes)} -> about {human_bytes(sizes.after_bytes)} ({change:+.0%}{scheme})"
    )
    if plan.budget is not None:
        _print_alternatives(console, plan, plan.budget)
    for note in plan.notes:
        console.print(f"Note: {note}")
    if plan.calibration.get("embedded"):
        console.print(EMBEDDED_NOTE)
    if file is not None:
        console.print(f"Plan written to {file}")


def _print_alternatives(console: Console, plan: Plan, budget: Budget) -> None:
    """What the budget is made of, and what else there is; the estimated loss is a share of the experts' output."""
    parts = [f"budget: {human_bytes(budget.limit_bytes)}" + (f" of {budget.target}" if budget.target else "")]
    if budget.reserve_bytes:
        share = budget.reserve_bytes / budget.limit_bytes
        parts.append(f"- {human_bytes(budget.reserve_bytes)} reserve ({share:.0%})")
    if budget.cache_bytes:
        parts.append(f"- {human_bytes(budget.cache_bytes)} KV cache ({budget.context} tokens)")
    left = f" = {human_bytes(budget.weight_bytes)}" if len(parts) > 1 else ""
    console.print(" ".join(parts) + left + " for the weights")
    table = plain_table("experts", "bits", "weights", "estimated loss", "fits", "")
    for row in plan.alternatives:
        bits = "as stored" if row.bits is None else f"{row.bits:.2f} by layer" if row.mixed else f"{row.bits:g}"
        fits, chosen = "yes" if row.fits else "no", "chosen" if row.chosen else ""
        table.add_row(str(row.experts), bits, human_bytes(row.weight_bytes), f"{row.loss:.3%}", fits, chosen)
    console.print(table)
    if plan.layer_bits:
        console.print("bits by layer: " + ", ".join(f"{layer}: {bits}" for layer, bits in plan.layer_bits.items()))


def print_quantized(result: Mapping[str, Any], folder: Path) -> None:
    """What `quantize` made."""
    console = plain_console()
    scheme = result["scheme"]
    bits = bits_text(result.get("layer_bits", {"": scheme["bits"]}).values())
    before, after = result["bytes_before"], result["bytes_after"]
    console.print(
        f"{folder}: {bits} g{scheme['group_size']}, {human_bytes(before)} -> {human_bytes(after)} "
        f"({after / before - 1:+.0%})"
    )
    table = plain_table("layer", "relative error")
    for layer, error in result["layer_error"].items():
        table.add_row(layer, f"{error:.3%}")
    console.print(table)
    for title, key in (
        ("saw no token and use the pooled Hessian", "experts_without_tokens"),
        ("were rounded to nearest", "experts_rounded"),
    ):
        found = sum(map(len, result[key].values()))
        if found:
            console.print(f"Note: {found} experts {title}.")
    if result["calibration"]["embedded"]:
        console.print(EMBEDDED_NOTE)


def print_onnx(result: Any, folder: Path) -> None:
    """What `export --to onnx` made, and what its self-check found."""
    console = plain_console()
    console.print(f"{folder}: ONNX, {result.nodes} nodes, {human_bytes(result.bytes_after)}")
    found = result.checked
    if found is None:
        return
    prefill, decode = found.tokens
    console.print(f"checked against {found.compared_with}, in a session on {', '.join(found.providers)}:")
    table = plain_table("tokens", "largest difference, of the largest logit")
    table.add_row(f"{prefill} prefill", f"{found.prefill_error:.1e}")
    table.add_row(f"{decode} decode", f"{found.decode_error:.1e}")
    console.print(table)
    console.print(f"same most likely token: {found.same_top1:.0%}")
    if found.genai_same is not None:
        console.print(f"onnxruntime-genai goes on with the same greedy tokens: {'yes' if found.genai_same else 'no'}")
    for note in found.notes:
        console.print(f"Note: {note}.")
