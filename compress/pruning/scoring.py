"""From statistics to scores, from scores to keep sets. Pure, in fp64, ties broken the same way everywhere."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import combinations

import numpy as np

from moepress.calibration.profile import Profile, Statistic
from moepress.errors import InvalidInputError, UsageError
from moepress.models.families.family import Shape

MIN_TOKENS = 32


class Criterion(StrEnum):
    """What an expert is worth; the lowest are pruned (FORMULAS: Criteria)."""

    REAP = "reap"
    REAP_SUM = "reap-sum"
    EASY_EP = "easy-ep"
    FREQUENCY = "frequency"
    GATE = "gate"
    EAN = "ean"
    MAN = "man"
    LOO = "loo"


class Groups(StrEnum):
    """What happens to the router's groups: keep them balanced, or drop them."""

    BALANCED = "balanced"
    DEGROUP = "degroup"


# criterion -> (accumulator, whether it is divided by the number of tokens)
_FORMULAS = {
    Criterion.REAP: ("weighted_norm", True),
    Criterion.REAP_SUM: ("weighted_norm", False),
    Criterion.EASY_EP: ("turned_norm", False),
    Criterion.FREQUENCY: ("count", False),
    Criterion.GATE: ("gate", False),
    Criterion.EAN: ("norm", False),
    Criterion.MAN: ("norm", True),
    Criterion.LOO: ("leave_one_out", False),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """Options that a keep set depends on.

    Attributes:
        criterion: what experts are ranked by.
        count: experts kept in every layer.
        weights: weight per domain; domains that are not named weigh 1.
        groups: balanced or dropped.
    """

    criterion: Criterion
    count: int
    weights: Mapping[str, float]
    groups: Groups = Groups.BALANCED


def default_criterion(weights: Mapping[str, float]) -> Criterion:
    """`reap`; with domain weights that differ `easy-ep`, which is made for pruning towards a task."""
    return Criterion.EASY_EP if len(set(weights.values())) > 1 else Criterion.REAP


def domain_weights(domains: Sequence[str], given: Mapping[str, float]) -> dict[str, float]:
    """Weights for all domains of a profile, 1 where none is given.

    Raises:
        UsageError: a weight is for a domain that the profile lacks, negative, or all are zero.
    """
    unknown = sorted(set(given) - set(domains))
    if unknown:
        raise UsageError(f"The profile has no domain {unknown[0]!r}; it has {', '.join(domains)}.")
    weights = {d: float(given.get(d, 1.0)) for d in domains}
    if any(not 0 <= w < float("inf") for w in weights.values()) or not any(weights.values()):
        raise UsageError("Domain weights must be zero or positive numbers, and one of them positive.")
    return weights


def layer_scores(
    statistics: Mapping[str, Statistic], criterion: Criterion, weights_S: Statistic, shards: Sequence[int]
) -> Statistic:
    """Scores of one layer's experts, fp64 [E]: every domain's scores sum to 1, then they are added with its weight.

    Args:
        statistics: accumulators [S, B, E].
        criterion: which value.
        weights_S: domain weights, fp64 [S].
        shards: token shards to use.
    """
    accumulator, mean = _FORMULAS[criterion]
    value = statistics[accumulator][:, list(shards)].sum(axis=1)
    if mean:
        value = value / np.maximum(statistics["count"][:, list(shards)].sum(axis=1), 1)
    value = value / np.maximum(value.sum(axis=1, keepdims=True), 1e-300)
    scores: Statistic = (weights_S[:, None] * value).sum(axis=0)
    return scores


def token_counts(statistics: Mapping[str, Statistic]) -> Statistic:
    """Tokens that reached every expert, fp64 [E]."""
    tokens: Statistic = statistics["count"].sum(axis=(0, 1))
    return tokens


def keep_set(
    scores_E: Statistic, tokens_E: Statistic, protected: Sequence[int], shape: Shape, selection: Selection
) -> list[int]:
    """The experts kept in one layer, ascending: the best in the order (score, tokens, number).

    With balanced groups the same number is kept in every group. Protected experts come first.
    """
    groups = 1 if selection.groups is Groups.DEGROUP else shape.groups
    size, kept = shape.experts // groups, list[int]()
    scores, tokens, safe = scores_E.tolist(), tokens_E.tolist(), set(protected)
    for group in range(groups):
        members = range(group * size, (group + 1) * size)
        ranked = sorted(members, key=lambda e: (e not in safe, -scores[e], -tokens[e], e))
        kept += ranked[: selection.count // groups]
    return sorted(kept)


def super_experts(profile: Profile) -> dict[int, list[int]]:
    """Experts whose outputs peak far above all others, in the first three quarters of the layers: never pruned.

    M_e must exceed both the 99.5th percentile of all experts' peaks and a tenth of the largest. (Su et al., 2025.)
    """
    peaks = {layer: profile.statistics[layer]["peak"].max(axis=(0, 1)) for layer in profile.layers}
    every = np.concatenate(list(peaks.values()))
    bound = max(float(np.quantile(every, 0.995)), float(every.max()) / 10)
    early = profile.shape.layers * 3 // 4
    return {layer: np.flatnonzero(peak > bound).tolist() if layer < early else [] for layer, peak in peaks.items()}


def keep_sets(profile: Profile, selection: Selection, shards: Sequence[int] | None = None) -> dict[int, list[int]]:
    """Keep sets of all layers.

    Raises:
        InvalidInputError: the profile lacks what the criterion needs.
    """
    weights_S = np.array([selection.weights.get(d, 1.0) for d in profile.domains])
    everything = list(range(next(iter(profile.statistics.values()))["count"].shape[1]))
    safe = super_experts(profile)
    kept = {}
    for layer in profile.layers:
        statistics = profile.statistics[layer]
        _require_losses(statistics, selection)
        scores = layer_scores(statistics, selection.criterion, weights_S, everything if shards is None else shards)
        kept[layer] = keep_set(scores, token_counts(statistics), safe[layer], profile.shape, selection)
    return kept


def _require_losses(statistics: Mapping[str, Statistic], selection: Selection) -> None:
    if selection.criterion is Criterion.LOO and not bool(statistics["leave_one_out"].any()):
        raise InvalidInputError("The profile was made with --no-loo and has no leave-one-out losses; profile again.")


def mtp_keep_sets(profile: Profile, selection: Selection) -> dict[int, list[int]]:
    """Keep sets of the multi-token-prediction layers that were profiled, as `keep_sets` has them; none is protected.

    Raises:
        InvalidInputError: the profile lacks what the criterion needs.
    """
    weights_S, kept = np.array([selection.weights.get(d, 1.0) for d in profile.domains]), {}
    for layer, statistics in sorted(profile.mtp.items()):
        _require_losses(statistics, selection)
        scores = layer_scores(statistics, selection.criterion, weights_S, range(statistics["count"].shape[1]))
        kept[layer] = keep_set(scores, token_counts(statistics), [], profile.shape, selection)
    return kept


def random_keep_sets(profile: Profile, selection: Selection, seed: int) -> dict[int, list[int]]:
    """A baseline for benchmarks: legal keep sets drawn by chance."""
    import torch  # its generator: tables of benchmarks were drawn with it

    generator = torch.Generator().manual_seed(seed)
    return {
        layer: keep_set(
            torch.rand(profile.shape.experts, generator=generator, dtype=torch.float64).numpy(),
            np.zeros(profile.shape.experts),
            [],
            profile.shape,
            selection,
        )
        for layer in profile.layers
    }


def stability(profile: Profile, selection: Selection) -> float:
    """Share of kept experts that two halves of the calibration tokens agree on, mean over layers and 35 splits.

    1 means that the text was enough; a share near the kept ratio means that the choice is chance.
    """
    shards = range(8)
    shared, total = 0, 0
    for half in combinations(shards, 4):
        if 0 not in half:
            continue  # every split once
        first = keep_sets(profile, selection, half)
        second = keep_sets(profile, selection, [s for s in shards if s not in half])
        for layer in profile.layers:
            shared += len(set(first[layer]) & set(second[layer]))
            total += len(first[layer])
    return shared / total if total else 1.0


def removed_share(profile: Profile, kept: Mapping[int, Sequence[int]], accumulator: str) -> dict[str, float]:
    """Per domain: the share of an accumulator's mass that the removed experts carry, mean over layers."""
    shares = np.zeros(len(profile.domains))
    for layer in profile.layers:
        mass = profile.statistics[layer][accumulator].sum(axis=1)
        remains = mass.take(kept[layer], axis=1).sum(axis=1)  # in the order in which the whole is summed
        shares += 1 - remains / np.maximum(mass.sum(axis=1), 1e-300)
    return {d: float(s) for d, s in zip(profile.domains, (shares / len(profile.layers)).tolist(), strict=True)}


def unsupported(
    profile: Profile, weights: Mapping[str, float] | None = None, min_tokens: int = MIN_TOKENS
) -> dict[int, list[int]]:
    """Per layer, the experts whose score rests on fewer than `min_tokens` tokens of the domains that count."""
    counted = np.array([(weights or {}).get(d, 1.0) > 0 for d in profile.domains])
    tokens = {n: profile.statistics[n]["count"][counted].sum(axis=(0, 1)) for n in profile.layers}
    few = {layer: np.flatnonzero(seen < min_tokens).tolist() for layer, seen in tokens.items()}
    return {layer: experts for layer, experts in few.items() if experts}
