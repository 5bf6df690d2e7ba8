"""`inspect`: what a model is, which expert counts make sense, what pressing it takes, and which GPU then holds it."""

import dataclasses
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import psutil
import torch

from moepress.calibration.profile import load_profile
from moepress.compress.budget.sizes import group_size_for, included_linears, part_sizes, settled_parts
from moepress.compress.estimates.figures import Figures, figures_of, pressed_sizes
from moepress.compress.estimates.footprint import Workload
from moepress.compress.estimates.profile import estimate_profile
from moepress.compress.estimates.prune import estimate_prune
from moepress.compress.estimates.quantize import estimate_quantize
from moepress.compress.estimates.rates import Rates, measure_rates
from moepress.compress.gptq.include import IN_LAYERS, Asked, Include, Included
from moepress.compress.gptq.layer_bits import parts_text
from moepress.compress.pruning.scoring import Selection, default_criterion, domain_weights
from moepress.compress.pruning.slack import Published, kept_text, like_models, published, slack_of
from moepress.converters.gguf.file import GgufModel, open_gguf
from moepress.converters.safetensors.scheme import PER_CHANNEL, Scheme
from moepress.errors import UnsupportedError
from moepress.models.families.family import Part, Shape, legal_counts
from moepress.models.forward.inventory import Weight, cache_bytes, describe
from moepress.models.forward.proof import proven_family
from moepress.models.forward.tensor_check import check_tensors
from moepress.models.storage.checkpoint import Checkpoint, open_checkpoint
from moepress.stages.groundwork import announce, workload
from moepress.stages.places import DEFAULT_TOKENS, DEFAULT_WINDOW, Machine, context_notes, model_folder
from moepress.validation.rules.check import check_folder
from moepress.validation.speed.projection import FORMULAS, Load, load_of
from moepress.validation.speed.targets import (
    DEFAULT_CONTEXT,
    RESERVE,
    TIGHT_RESERVE,
    Target,
    Verdict,
    all_targets,
    fit,
    gaming,
    target_of,
)

SHARES = (1.0, 0.75, 0.5, 0.25)
# vLLM 0.33's router kernel for DeepSeek's newest models; its general one takes any count.
ROUTER_COUNTS = frozenset({1, 2, 4, 8, 16, 32, 64, 128, 192, 256, 320, 384, 448, 512, 576})
QUALITY_NOTE = (
    "What pruning costs differs much from model to model, and perplexity alone misses damage: measure your own task. "
    "Published results of like models:"
)


def inspect_gguf(file: Path) -> dict[str, Any]:
    """What a GGUF file says of itself, and what llama.cpp would do with it.

    Raises:
        InvalidInputError: it is no GGUF file.
        UnsupportedError: the package `gguf` is not installed.
    """
    model = open_gguf(file)
    checked = check_folder(file)
    return {
        "file": str(model.file),
        "files": [part.name for part in model.files],
        "architecture": model.architecture,
        "bytes": model.total_bytes,
        "parameters": model.parameters,
        "bits_per_weight": 8 * model.total_bytes / max(1, model.parameters),
        "layers": model.key("block_count"),
        "experts": model.experts,
        "experts_used": model.key("expert_used_count"),
        "context": model.context,
        "vocabulary": model.vocabulary,
        "tokenizer": [model.keys.get(f"tokenizer.ggml.{key}") for key in ("model", "pre")],
        "types": _by_type(model),
        "keys": {name: value for name, value in model.keys.items() if not isinstance(value, str) or len(value) < 200},
        "findings": [asdict(finding) for finding in checked.findings],
    }


def _by_type(model: GgufModel) -> list[dict[str, Any]]:
    """Tensors and bytes of every type and kind of tensor, most bytes first."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for tensor in model.tensors.values():
        kind = re.sub(r"^blk\.\d+\.", "", tensor.name).rpartition(".")[0]
        row = rows.setdefault((kind, tensor.type), {"kind": kind, "type": tensor.type, "tensors": 0, "bytes": 0})
        row["tensors"] += 1
        row["bytes"] += tensor.bytes
    return sorted(rows.values(), key=lambda row: -row["bytes"])


def inspect_model(
    model_name: str,
    *,
    tokens: int | None = None,
    context: int | None = None,
    targets_file: Path | None = None,
    only: str | None = None,
) -> dict[str, Any]:
    """All that `inspect` tells, as plain JSON. Reads headers, and up to 256 MiB of weights to time the disk.

    Args:
        model_name: a folder, or `demo`.
        tokens: calibration tokens that are planned; None for the default.
        context: tokens in the KV cache; None for 8192, or the model's context where it is shorter.
        targets_file: the user's own GPUs, beside those of the table.
        only: the one GPU that is of interest; None for all.

    Raises:
        UsageError, InvalidInputError: the model or the user's table of GPUs can not be used.
    """
    targets = all_targets(targets_file) if only is None else (target_of(only, targets_file),)
    checkpoint, refusal = _proven(open_checkpoint(model_folder(model_name)))
    announce(checkpoint)
    check_tensors(
        checkpoint.family, checkpoint.config, checkpoint.outline.shape, checkpoint.shapes, folder=checkpoint.folder
    )
    figures, shape = figures_of(checkpoint), checkpoint.shape
    scheme = scheme_for(shape)
    include, _notes = settled_parts(Asked(auto=True), included_linears(checkpoint, IN_LAYERS), scheme.group_size)
    work = workload(Machine(), tokens=tokens or DEFAULT_TOKENS, window=min(shape.context, DEFAULT_WINDOW))
    rates = measure_rates(checkpoint, work.device, work.dtype)
    advice = count_advice(shape)
    count = advice[0]["experts"] if advice else shape.experts
    return describe(checkpoint) | {
        "not_available": [refusal] if refusal else not_available(checkpoint),
        "recommended_expert_counts": advice,
        "published": [row.model_dump(mode="json") for row in like_models(checkpoint.family.name, shape)],
        "calibration": calibration_advice(shape, work.tokens),
        "scheme": asdict(scheme),
        "part_bits": {part.value: bits for part, bits in include.items()},
        "machine": machine_facts(rates),
        "estimates": {
            "experts": count,
            "profile": asdict(estimate_profile(figures, work, rates)),
            "prune": asdict(estimate_prune(_pruned_bytes(figures, count), rates)),
            "quantize": asdict(estimate_quantize(checkpoint, figures, count, scheme, work, rates, include=include)),
        },
        "targets": target_fits(
            checkpoint, figures, scheme, context or min(DEFAULT_CONTEXT, shape.context), targets, include
        ),
    }


def _proven(checkpoint: Checkpoint) -> tuple[Checkpoint, str | None]:
    """The model with what its family's proof told; or as it is, and why it is refused for work."""
    try:
        return replace(checkpoint, family=proven_family(checkpoint.family, checkpoint.config)), None
    except UnsupportedError as error:
        return checkpoint, str(error)


def not_available(checkpoint: Checkpoint) -> list[str]:
    """What can not be done with a model of this family, and why; a sentence each."""
    family, found = checkpoint.family, list[str]()
    if family.rule is None:
        found.append(
            "criterion loo, --repair router, --budget and --mixed-bits: how its router makes weights was not found out"
        )
    if family.rule is None or not family.rule.bias:
        found.append("--repair bias: its routers have no correction bias that is known")
    if not family.loads_single:
        found.append(
            "transformers can not load its experts once they are quantized: it keeps those of a layer in one tensor, "
            "and knows no way there from single ones"
        )
    return found


def scheme_for(shape: Shape) -> Scheme:
    """4 bits with the largest usual group size that divides both widths of an expert."""
    return Scheme(bits=4, group_size=group_size_for(shape) or PER_CHANNEL)


def count_advice(shape: Shape) -> list[dict[str, Any]]:
    """Expert counts worth trying first, from a quarter of the experts up, the largest first, each with its reasons."""
    found = []
    for count in reversed(legal_counts(shape)):
        if count == shape.experts or 4 * count < shape.experts:
            continue
        reasons = []
        if count in ROUTER_COUNTS:
            reasons.append("vLLM's specialised router takes it")
        if count & (count - 1) == 0:
            reasons.append("SGLang's fast router wants a power of two")
        if not reasons and 4 * count == 3 * shape.experts:
            reasons.append("three quarters; every runtime takes it, the fastest routers do not")
        if reasons:
            found.append({"experts": count, "share": count / shape.experts, "reasons": reasons + _splits(shape, count)})
    return found


def _splits(shape: Shape, count: int) -> list[str]:
    gpus = [str(n) for n in (2, 4, 8) if count % n == 0]
    split = [f"splits evenly over {', '.join(gpus)} GPUs"] if gpus else []
    return split + ([f"{count // shape.groups} in each of {shape.groups} groups"] if shape.groups > 1 else [])


def calibration_advice(shape: Shape, tokens: int) -> dict[str, Any]:
    """How many calibration tokens reach an expert, and whether that is enough for its Hessian."""
    each = tokens * shape.top_k / shape.experts
    needed = -(-shape.hidden * shape.experts // shape.top_k)
    note = None
    if each < shape.hidden:
        note = (
            f"Fewer than the {shape.hidden:,} columns of an expert's Hessian, which is then filled up from the layer's "
            f"pooled one; --tokens {needed} would give one token per column."
        )
    return {"tokens": tokens, "tokens_per_expert": each, "tokens_for_one_per_column": needed, "note": note}


def machine_facts(rates: Rates) -> dict[str, Any]:
    """This machine, as far as times and sizes depend on it."""
    return {
        "cores": os.cpu_count() or 1,
        "free_memory_bytes": int(psutil.virtual_memory().available),
        "free_disk_bytes": shutil.disk_usage(Path.cwd()).free,
        **asdict(rates),
        "busy": rates.busy,
    }


def _pruned_bytes(figures: Figures, count: int) -> int:
    return round(sum(part_sizes(figures.inventory, figures.shape, count, None).values()))


def target_fits(
    checkpoint: Checkpoint, figures: Figures, scheme: Scheme, context: int, targets: Sequence[Target], include: Included
) -> dict[str, Any]:
    """The model at a few expert counts on every GPU of the table, and what a card can do that does not hold it."""
    shape, cache = figures.shape, cache_bytes(checkpoint.config, context)
    counts = dict.fromkeys(min(legal_counts(shape), key=lambda n: (abs(n - s * shape.experts), n)) for s in SHARES)
    sizes = {count: pressed_sizes(checkpoint, figures, count, scheme, include) for count in counts}
    each = cache_bytes(checkpoint.config, 1)
    layers = checkpoint.outline.moe_layers
    loads = {count: pressed_load(figures, parts, count, each, layers) for count, parts in sizes.items()}
    rows = [
        {
            "experts": count,
            "share": count / shape.experts,
            "weight_bytes": sum(parts.values()),
            "experts_bytes": parts[Part.ROUTED],
            "needed_bytes": sum(parts.values()) + cache,
            "load": asdict(loads[count]),
            "fits": [asdict(fit(target, sum(parts.values()) + cache, loads[count])) for target in targets],
        }
        for count, parts in sizes.items()
    ]
    found = {
        "context": context,
        "cache_bytes": cache,
        "reserve": RESERVE,
        "tight_reserve": TIGHT_RESERVE,
        "projection": FORMULAS,
        "table": [target.model_dump() for target in targets],
        "counts": rows,
        "beside_experts": _beside_experts(checkpoint, figures, scheme, targets, cache, include),
    }
    said = answer(found, targets, _making_bytes(checkpoint, figures, scheme, include))
    notes = quality_notes(like_models(checkpoint.family.name, shape))
    return found | {"answer": [*said, *notes, *context_notes(context, shape.context)]}


def pressed_load(
    figures: Figures,
    sizes: Mapping[Part, int],
    count: int,
    cache_bytes_per_token: int,
    expert_layers: Sequence[int] | None = None,
) -> Load:
    """What the model asks of a GPU after pressing, from the bytes of its parts and the experts that stay."""
    shape, parts = dataclasses.replace(figures.shape, experts=count), dict[Part, Weight]()
    for part, size in sizes.items():
        parameters = figures.parts[part].parameters if part in figures.parts else 0
        kept = parameters * count // figures.shape.experts if part is Part.ROUTED else parameters
        parts[part] = Weight(parameters=kept, bytes=size)
    return load_of(parts, shape, cache_bytes_per_token, expert_layers)


def _beside_experts(
    checkpoint: Checkpoint, figures: Figures, scheme: Scheme, targets: Sequence[Target], cache: int, include: Included
) -> list[dict[str, Any]]:
    """What lies on the card when the experts do not: everything else, by default and in as few bits as the experts."""
    rows = []
    for own in (include, dict.fromkeys(include)):
        sizes = pressed_sizes(checkpoint, figures, figures.shape.experts, scheme, own)
        size = sum(sizes.values()) - sizes[Part.ROUTED]
        fits = [asdict(fit(target, size + cache)) for target in targets]
        bits = {part.value: width or scheme.bits for part, width in own.items()}
        rows.append({"part_bits": bits, "weight_bytes": size, "needed_bytes": size + cache, "fits": fits})
        read = sizes[Part.ROUTED] * figures.shape.top_k // figures.shape.experts
        rows[-1]["experts_bytes_per_token"] = read
    return rows


def _making_bytes(checkpoint: Checkpoint, figures: Figures, scheme: Scheme, include: Included) -> int:
    """What `quantize` holds on a GPU of 12 GiB; no such GPU has to be there."""
    device = torch.device("meta")
    work = Workload(
        tokens=DEFAULT_TOKENS, window=DEFAULT_WINDOW, device=device, dtype=torch.bfloat16, memory_bytes=12 << 30
    )
    estimate = estimate_quantize(checkpoint, figures, figures.shape.experts, scheme, work, include=include)
    found = estimate.device_memory_bytes
    assert found is not None
    return found


def answer(found: Mapping[str, Any], targets: Sequence[Target], making_bytes: int) -> list[str]:
    """In plain sentences: what a gaming GPU can do with this model."""
    cards = gaming(targets) or tuple(targets)  # of one card that was asked for, that one
    held = {row["experts"]: _smallest(cards, row["fits"]) for row in found["counts"]}
    most, least = found["counts"][0], found["counts"][-1]
    at = (
        f"At 4 bits ({parts})"
        if (parts := parts_text({Include(k): v for k, v in found["beside_experts"][0]["part_bits"].items()}))
        else "At 4 bits"
    )
    if any(held.values()):
        rows, before = list[str](), None
        for count, card in held.items():  # from the largest down: only where a smaller card will do
            if card is not None and card != before:
                rows.append(f"{count} experts fit into {card.memory_gib:g} GiB ({card.name})")
                before = card
        return [f"{at} {'; '.join(rows)}."]
    largest = cards[-1]
    cannot = (
        f"{'No gaming GPU' if len(targets) > 1 else f'No {largest.name}'} holds this model. {at} it needs "
        f"{_gib(most['needed_bytes'])} with all {most['experts']} experts and still {_gib(least['needed_bytes'])} with "
        f"{least['experts']}; {'the largest gaming GPU' if len(targets) > 1 else 'it'} has {largest.memory_gib:g} GiB."
    )
    making = (
        "One gaming GPU can make the compressed model: layers and experts pass through it one by one, in about "
        f"{_gib(making_bytes)} of its memory (projected)."
    )
    plain, packed = found["beside_experts"]
    places = [_place(row, _smallest(cards, row["fits"])) for row in (plain, packed)]
    options = ",".join(f"{name}={bits}" for name, bits in packed["part_bits"].items())
    packed_place = f"; at 4 bits like the experts, by --bits 4,{options}, {places[1]}" if options else ""
    experts = ", ".join(f"{_gib(row['experts_bytes'])} with {row['experts']}" for row in found["counts"])
    running = (
        "One can run it with the experts in system RAM or on NVMe, in a runtime that puts them there. On the card lie "
        f"attention, shared experts, dense layers, embeddings and KV cache: {places[0]}{packed_place}. Beside it lie "
        f"the experts: {experts}. Every token reads {_gib(packed['experts_bytes_per_token'])} of them."
    )
    return [cannot, making, running]


def quality_notes(rows: Sequence[Published]) -> list[str]:
    """What pruning has cost like models; without any, the two that differ most."""
    named = rows or tuple(row for row in published() if row.family in ("deepseek_v3", "qwen3_moe"))
    note = QUALITY_NOTE if rows else QUALITY_NOTE.replace("of like models", "(none of a like model is known here)")
    return [note, *(f"{line}." for line in kept_text(named))]


def inspect_profile(folder: Path) -> dict[str, Any]:
    """What slack the model of a profile has, as `plan` tells it: with the default criterion, all domains alike.

    Raises:
        InvalidInputError: the profile is not sound.
    """
    profile = load_profile(folder)
    weights = domain_weights(profile.domains, {})
    selection = Selection(criterion=default_criterion(weights), count=profile.shape.experts, weights=weights)
    return {
        "profile": str(folder),
        "model": profile.model_name,
        "family": profile.family,
        "domains": list(profile.domains),
        "slack": slack_of(profile, selection).model_dump(mode="json"),
    }


def _place(row: Mapping[str, Any], card: Target | None) -> str:
    where = f"from {card.memory_gib:g} GiB up ({card.name})" if card else "more than any gaming GPU has to spare"
    return f"{_gib(row['needed_bytes'])}, {where}"


def _smallest(cards: Sequence[Target], fits: Sequence[Mapping[str, Any]]) -> Target | None:
    held = {row["target"] for row in fits if row["verdict"] == Verdict.FITS}
    return next((card for card in cards if card.id in held), None)


def _gib(size: float) -> str:
    return f"{size / 2**30:,.1f} GiB"
