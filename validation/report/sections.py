"""What the report says of a plan, a quantization and the calibration text, taken from their results."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from moepress.calibration.profile import Profile
from moepress.compress.gptq.include import Include
from moepress.compress.gptq.layer_bits import bits_text
from moepress.compress.pruning.plan import Plan
from moepress.converters.safetensors.scheme import Scheme
from moepress.validation.report.schema import (
    Calibration,
    Choice,
    DomainLoss,
    DomainUsage,
    ExpertName,
    LayerError,
    Pruning,
    Quantization,
    Usage,
)


def pruning_section(plan: Plan) -> Pruning:
    """What the report says of the pruning."""
    return Pruning(
        criterion=plan.criterion.value,
        kept=plan.experts,
        total=plan.experts_before,
        domains=tuple(
            DomainLoss(domain=d, gate_mass_lost=loss.gate_mass, reap_mass_lost=loss.reap_sum_mass)
            for d, loss in plan.loss.items()
        ),
        keep_set_stability=plan.stability,
        protected=plan.protected_domains,
        limit=plan.max_domain_loss,
        given_up=tuple(d for d, weight in plan.domain_weights.items() if weight < 1),
        lost=plan.lost_domains,
    )


def usage_section(profile: Profile, plan: Plan) -> Usage:
    """What the report says of the experts' use."""
    counts = [profile.statistics[layer]["count"].sum(axis=1).round().astype(int) for layer in profile.layers]
    return Usage(
        layers=profile.layers,
        top_k=profile.shape.top_k,
        kept=tuple(tuple(plan.keep[layer]) for layer in profile.layers) if plan.prunes else None,
        domains=tuple(
            DomainUsage(domain=domain, counts=tuple(tuple(count_SE[number].tolist()) for count_SE in counts))
            for number, domain in enumerate(profile.domains)
        ),
    )


def choice_section(plan: Plan) -> Choice | None:
    """What the report says of the alternatives; None where the plan was not made under a budget."""
    if plan.budget is None or not (plan.alternatives or plan.curve):
        return None
    return Choice(
        limit_bytes=plan.budget.weight_bytes,
        rows=tuple(plan.alternatives),
        curve=tuple(plan.curve),
        grids=plan.grids,
    )


def scheme_text(scheme: Scheme, layer_bits: Mapping[int, int], include: Iterable[Include] = ()) -> str:
    """Bits and groups in words, or the format of 4-bit floats."""
    if scheme.floats:
        return f"{scheme.short}, 4-bit floats in groups of {scheme.group_size}"
    group = "per channel" if scheme.group_size < 0 else f"g{scheme.group_size}"
    zeros = "symmetric" if scheme.symmetric else "with zero points"
    return f"{bits_text(layer_bits.values() or [scheme.bits], include)}, {group}, {zeros}"


def quantization_section(result: Mapping[str, Any], scheme: str, plan: Plan | None) -> Quantization:
    """What the report says of the quantization; the scheme is in words."""
    return Quantization(
        scheme=scheme,
        layers=tuple(LayerError(layer=int(n), mean_relative_error=e) for n, e in result["layer_error"].items()),
        fallback_experts=_experts(result["experts_without_tokens"]) + _experts(result["experts_rounded"]),
        unsupported_experts=_experts(plan.unsupported) if plan else (),
    )


def _experts(found: Mapping[Any, Sequence[int]]) -> tuple[ExpertName, ...]:
    return tuple(ExpertName(layer=int(layer), expert=e) for layer, experts in found.items() for e in experts)


def calibration_section(sources: Sequence[str], found: Mapping[str, Any]) -> Calibration:
    """What the report says of the calibration text."""
    return Calibration(
        sources=tuple(sources) or ("the embedded text of moepress",),
        embedded=bool(found["embedded"]),
        domains=tuple(found["tokens_per_domain"]),
        tokens=int(found["tokens"]),
        seed=found["seed"],
        digest=found["digest"],
    )
