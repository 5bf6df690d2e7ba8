"""What slack a model has: how much cuts to three quarters and to half are likely to cost, before a day is spent on one.

From the profile: the damage of such cuts (`domains`), and the effective number of experts. Damage grows as the KL
divergence does, by a factor of each model's own: those of models that were measured here give the range of what is to
be expected. Beside it stand published results of like models. All of it is projected; `validate` measures.
"""

import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.resources import files
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict

from moepress.calibration.profile import Profile
from moepress.compress.budget.damage import removal_shares
from moepress.compress.pruning.domains import damage, domain_losses
from moepress.compress.pruning.scoring import Groups, Selection, keep_sets
from moepress.models.families.family import Shape, legal_counts

SHARES = (0.75, 0.5)
_LIKE = 2.0  # so many times as many experts, or as large a share of them per token, are still alike
_MOST_MODELS = 3


class Cut(BaseModel):
    """What a cut removes, by the profile; means over domains are taken with their weights.

    Attributes:
        experts: that stay in every layer.
        reap_sum_mass: share of the weighted output that the removed experts have.
        damage: the mean of m / (1 - m) of the domains' shares m.
        worst_layer, worst_mass: the layer that loses the largest share, and that share.
        leave_one_out: losses of the removed experts over the squared routed output, mean over layers; None without any.
        kl: KL divergence from the original, nats per token, lowest and highest: projected.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    experts: int
    reap_sum_mass: float
    damage: float
    worst_layer: int
    worst_mass: float
    leave_one_out: float | None
    kl: tuple[float, float]


class MeasuredCut(BaseModel):
    """A cut of a model that was measured, `python benchmarks/domain_losses.py`.

    Attributes:
        model: its name.
        before, top_k: its experts, and how many work for a token.
        effective: as of `Slack.effective_experts`.
        experts: that stay.
        damage: as of `Cut.damage`, all domains alike.
        kl, perplexity: KL divergence in nats per token and relative rise of the perplexity, mean over domains.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    before: int
    top_k: int
    effective: float
    experts: int
    damage: float
    kl: float
    perplexity: float


class Published(BaseModel):
    """A published result of a model whose experts were pruned.

    Attributes:
        model, family, experts, top_k: of the original.
        task: what it was tested on.
        kept: per cent of the experts that were pruned -> score after over score before.
        source: address.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    family: str
    experts: int
    top_k: int
    task: str
    kept: dict[int, float]
    source: str


class Slack(BaseModel):
    """All that is known before a cut is made.

    Attributes:
        label: that it is projected.
        experts: of each layer.
        effective_experts: exp of the entropy of the experts' weighted output norms, mean over layers and domains.
        cuts: to three quarters and to half of the experts, where these are legal counts, or the nearest that are.
        measured: cuts of models that were measured with moepress.
        published: results of like models.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    label: Literal["projected"] = "projected"
    experts: int
    effective_experts: float
    cuts: tuple[Cut, ...]
    measured: tuple[MeasuredCut, ...]
    published: tuple[Published, ...]


def slack_of(profile: Profile, selection: Selection) -> Slack:
    """The slack of a profile's model, with the criterion, weights and groups of a selection."""
    counts = cut_counts(profile.shape, degroup=selection.groups is Groups.DEGROUP)
    return Slack(
        experts=profile.shape.experts,
        effective_experts=effective_experts(profile),
        cuts=tuple(cut_of(profile, replace(selection, count=count)) for count in counts),
        measured=measured_cuts(),
        published=like_models(profile.family, profile.shape),
    )


def cut_counts(shape: Shape, *, degroup: bool = False) -> tuple[int, ...]:
    """The legal counts next to `SHARES`, each once, without all of them."""
    counts = legal_counts(shape, degroup=degroup)
    nearest = (min(counts, key=lambda n: (abs(n - share * shape.experts), n)) for share in SHARES)
    return tuple(count for count in dict.fromkeys(nearest) if count < shape.experts)


def cut_of(profile: Profile, selection: Selection) -> Cut:
    """What the experts that go carry."""
    kept = keep_sets(profile, selection)
    by_layer = {n: _mean(domain_losses(replace(profile, layers=(n,)), kept), selection) for n in profile.layers}
    worst = max(by_layer, key=lambda n: by_layer[n])
    losses = domain_losses(profile, kept)
    lost = _mean({d: damage(loss) for d, loss in losses.items()}, selection)
    factors = [row.kl / row.damage for row in measured_cuts()]
    return Cut(
        experts=selection.count,
        reap_sum_mass=_mean(losses, selection),
        damage=lost,
        worst_layer=worst,
        worst_mass=by_layer[worst],
        leave_one_out=_leave_one_out(profile, selection, kept),
        kl=(min(factors) * lost, max(factors) * lost),
    )


def _leave_one_out(profile: Profile, selection: Selection, kept: Mapping[int, Sequence[int]]) -> float | None:
    removal, _ = removal_shares(profile, {d: selection.weights.get(d, 1.0) for d in profile.domains})
    if not any(bool(cost.any()) for cost in removal.values()):
        return None
    return sum(float(np.delete(removal[n], list(kept[n])).sum()) for n in profile.layers) / len(profile.layers)


def _mean(values: Mapping[str, float], selection: Selection) -> float:
    weights = {d: selection.weights.get(d, 1.0) for d in values}
    return sum(weights[d] * value for d, value in values.items()) / sum(weights.values())


def effective_experts(profile: Profile) -> float:
    """exp of the entropy of how the weighted output norms are spread over experts, mean over layers and domains."""
    found = []
    for layer in profile.layers:
        mass_SE = profile.statistics[layer]["weighted_norm"].sum(axis=1)
        share_SE = mass_SE / np.maximum(mass_SE.sum(axis=1, keepdims=True), 1e-300)
        entropy_S = -(share_SE * np.log(np.maximum(share_SE, 1e-300))).sum(axis=1)
        found.append(float(np.exp(entropy_S).mean()))
    return sum(found) / len(found)


def _table() -> dict[str, Any]:
    text = (files("moepress.compress.pruning") / "published.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)


def measured_cuts() -> tuple[MeasuredCut, ...]:
    """What was measured with moepress."""
    return tuple(MeasuredCut.model_validate(row) for row in _table()["measured"])


def published() -> tuple[Published, ...]:
    """All published results that are known here."""
    rows = _table()["result"]
    return tuple(Published.model_validate(row | {"kept": {int(k): v for k, v in row["kept"].items()}}) for row in rows)


def like_models(family: str, shape: Shape) -> tuple[Published, ...]:
    """Results of at most three like models, the likest first: of the same family, or with about as many experts, and
    about as large a share of them for each token.
    """
    near = [(_distance(row, family, shape), row) for row in published()]
    names = list(dict.fromkeys(row.model for distance, row in sorted(near, key=lambda pair: pair[0]) if distance < 1e9))
    return tuple(row for name in names[:_MOST_MODELS] for row in published() if row.model == name)


def _distance(row: Published, family: str, shape: Shape) -> float:
    """0 for the same; infinite for what is not alike."""
    counts = abs(math.log(row.experts / shape.experts))
    shares = abs(math.log((row.top_k / row.experts) / (shape.top_k / shape.experts)))
    if row.family == family:
        return min(counts + shares, 1e8)
    return 10 + counts + shares if max(counts, shares) <= math.log(_LIKE) + 1e-9 else math.inf


def kept_text(rows: Sequence[Published]) -> list[str]:
    """A sentence for each model."""
    lines = []
    for name in dict.fromkeys(row.model for row in rows):
        own = [row for row in rows if row.model == name]
        tasks = "; ".join(
            f"{row.task} "
            + ", ".join(f"{100 * kept:.0f} % at {cut} % pruned" for cut, kept in sorted(row.kept.items()))
            for row in own
        )
        lines.append(f"{name} ({own[0].experts} experts, top-{own[0].top_k}) is reported to keep {tasks}")
    return lines
