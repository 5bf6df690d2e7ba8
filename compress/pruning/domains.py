"""What every domain loses with the experts that go, and keep sets under which no protected domain loses too much.

What a domain loses is the share m of its experts' weighted output (reap-sum mass) that the experts have which go. Its
damage is m / (1 - m), of all figures of a profile the one that agrees best with the KL divergence of domains, and grows
as it does (docs/formulas.md: Domains). A limit is a share m, or a multiple of the other domains' mean damage.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from moepress.calibration.profile import Profile
from moepress.compress.pruning.scoring import Groups, Selection, keep_sets, removed_share
from moepress.errors import ThresholdMissedError, UsageError
from moepress.models.families.family import legal_counts

FACTOR = 2.0
"""Beyond so many times the mean of the other domains a domain is called lost, and a protected one is refused."""
LEAST = 0.01
"""Means below it count as it: a domain that loses next to nothing is not lost because others lose still less."""
_LEFT = 1e-3  # of a domain's output, for where nothing is left
_STEPS, _HALVINGS = 24, 4  # with which weights of protected domains are raised until they lose little enough; and back
_LEAST_STEP, _MOST_STEP, _MOST = 1.2, 2.0, 4096.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """What a domain may lose at most.

    Attributes:
        factor: so many times the mean damage of the other domains; None where a share is given.
        share: of the domain's weighted output, 0 to 1; None where a factor is given.
    """

    factor: float | None = None
    share: float | None = None

    def excess(self, losses: Mapping[str, float], domain: str) -> float:
        """What that domain loses over what it may, given what all of them do: above 1 it is too much."""
        if self.share is not None:
            return losses[domain] / self.share if self.share else float("inf") if losses[domain] else 0.0
        assert self.factor is not None
        return times_others(losses, domain) / self.factor

    @property
    def text(self) -> str:
        """As `--max-domain-loss` takes it."""
        return f"{self.factor:g}x" if self.factor is not None else f"{100 * (self.share or 0.0):g}%"


def parse_limit(text: str) -> Limit:
    """`2x`: twice the mean damage of the other domains; `10%`: a share of the domain's weighted output.

    Raises:
        UsageError: it is neither.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*(x|%)\s*", text)
    value = float(found[1]) if found else 0.0
    if found and found[2] == "x" and value >= 1:
        return Limit(factor=value)
    if found and found[2] == "%" and value <= 100:
        return Limit(share=value / 100)
    raise UsageError(
        f"--max-domain-loss {text!r} is no limit; write 2x (twice the mean damage of the other domains, 1x or more) or "
        "10% (of its experts' weighted output)."
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Protection:
    """Domains that must not lose more than a limit; without any domains nothing is asked for."""

    domains: tuple[str, ...] = ()
    limit: Limit = Limit(factor=FACTOR)

    def require(self, profile_domains: Sequence[str], weights: Mapping[str, float]) -> None:
        """Refuse what can not be held against the domains of a profile.

        Raises:
            UsageError: a domain is unknown or given up by its weight, or there is no other one to compare with.
        """
        for domain in self.domains:
            if domain not in profile_domains:
                raise UsageError(
                    f"--protect {domain}: the profile has no such domain; it has {', '.join(profile_domains)}."
                )
            if weights.get(domain, 1.0) == 0:
                raise UsageError(f"--protect {domain} and --domain-weight {domain}=0 exclude each other.")
        if self.domains and self.limit.factor is not None and len(profile_domains) < 2:
            raise UsageError(
                f"--max-domain-loss {self.limit.text} compares with other domains, and the profile has one alone; "
                "give a share, such as 10%."
            )


NO_PROTECTION = Protection()


def protection(domains: Sequence[str], limit: str | None) -> Protection:
    """What `--protect` and `--max-domain-loss` say.

    Raises:
        UsageError: the limit is none, or stands alone.
    """
    if limit is None:
        return Protection(domains=tuple(domains))
    if not domains:
        raise UsageError(
            "--max-domain-loss says what domains of --protect may lose; name them, such as --protect python."
        )
    return Protection(domains=tuple(domains), limit=parse_limit(limit))


def damage(loss: float) -> float:
    """m / (1 - m): what goes over what stays."""
    return loss / max(1 - loss, _LEFT)


def times_others(losses: Mapping[str, float], domain: str) -> float:
    """Damage of a domain over the mean damage of the others, which counts as `LEAST` at least; 0 without others."""
    others = [damage(loss) for name, loss in losses.items() if name != domain]
    return times_mean(damage(losses[domain]), others)


def times_mean(value: float, others: Sequence[float]) -> float:
    """A value over the mean of others, which counts as `LEAST` at least; 0 where there are none."""
    return value / max(sum(others) / len(others), LEAST) if others else 0.0


def domain_losses(profile: Profile, kept: Mapping[int, Sequence[int]]) -> dict[str, float]:
    """Per domain: m, the share of its weighted output that the removed experts have, mean over layers."""
    return removed_share(profile, kept, "weighted_norm")


def lost_domains(losses: Mapping[str, float], weights: Mapping[str, float], factor: float = FACTOR) -> tuple[str, ...]:
    """Domains whose damage is beyond so many times the mean of the others, but for those given a weight below 1."""
    return tuple(d for d in losses if times_others(losses, d) > factor and weights.get(d, 1.0) >= 1)


def protected_selection(profile: Profile, selection: Selection, protection: Protection) -> Selection:
    """The selection with the weights of protected domains raised until none of them loses more than the limit.

    The weights of domains that lose too much are multiplied by their excess until none does, and then the last step is
    halved a few times, so that others give up no more than has to be. Deterministic.

    Raises:
        UsageError: see `Protection.require`.
        ThresholdMissedError: no weights are enough; with what the domain loses, and a count that would do.
    """
    found = try_protected(profile, selection, protection)
    if found is None:
        raise _refusal(profile, selection, protection)
    return found


def try_protected(profile: Profile, selection: Selection, protection: Protection) -> Selection | None:
    """`protected_selection`, or None where no weights are enough."""
    protection.require(profile.domains, selection.weights)
    weights = before = {d: selection.weights.get(d, 1.0) for d in profile.domains}
    for _ in range(_STEPS + 1):
        over = _over(profile, replace(selection, weights=weights), protection)
        if not over:
            break
        if before is weights and _never(profile, selection, protection, over):
            return None
        steps = {d: min(max(excess, _LEAST_STEP), _MOST_STEP) for d, excess in over.items()}
        before, weights = weights, {d: w * steps.get(d, 1.0) for d, w in weights.items()}
    else:
        return None
    if before is weights:
        return selection
    low, high = 0.0, 1.0  # of the way, on a scale of logarithms, from the last weights that were not enough
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        tried = _between(before, weights, middle)
        if _over(profile, replace(selection, weights=tried), protection):
            low = middle
        else:
            high = middle
    return replace(selection, weights=_between(before, weights, high))


def _between(one: Mapping[str, float], other: Mapping[str, float], share: float) -> dict[str, float]:
    return {d: w if w == other[d] else w * (other[d] / w) ** share for d, w in one.items()}


def _over(profile: Profile, selection: Selection, protection: Protection) -> dict[str, float]:
    """Protected domains that lose too much, and so many times what they may."""
    if not protection.domains:
        return {}
    losses = domain_losses(profile, keep_sets(profile, selection))
    excesses = {d: protection.limit.excess(losses, d) for d in protection.domains}
    return {d: excess for d, excess in excesses.items() if excess > 1}


def _never(profile: Profile, selection: Selection, protection: Protection, domains: Iterable[str]) -> bool:
    """Whether one of these domains loses more than a share even where experts are chosen for it alone."""
    if protection.limit.share is None:
        return False
    alone = ({d: float(d == domain) for d in profile.domains} for domain in domains)
    return any(
        _over(profile, replace(selection, weights=weights), replace(protection, domains=(domain,)))
        for domain, weights in zip(domains, alone, strict=True)
    )


def selections_of(
    profile: Profile, selection: Selection, counts: Sequence[int], protection: Protection
) -> dict[int, Selection]:
    """Count -> the selection that keeps within the limit; counts with which no weights are enough are not there.

    Raises:
        ThresholdMissedError: there is none; see `protected_selection`.
    """
    found = {
        count: made
        for count in counts
        if (made := try_protected(profile, replace(selection, count=count), protection)) is not None
    }
    if not found:
        raise _refusal(profile, replace(selection, count=max(counts)), protection)
    return found


def lost_text(losses: Mapping[str, float], domain: str) -> str:
    """`cs loses 41.2% of its experts' weighted output, 3.1 times the damage of the other domains`."""
    beside = (
        f", {times_others(losses, domain):.1f} times the mean damage of the other domains" if len(losses) > 1 else ""
    )
    return f"{domain} loses {losses[domain]:.1%} of its experts' weighted output{beside}"


def _refusal(profile: Profile, selection: Selection, protection: Protection) -> ThresholdMissedError:
    """In a sentence: which domain loses what, and which count would do."""
    most = {d: w * _MOST if d in protection.domains else w for d, w in selection.weights.items()}
    losses = domain_losses(profile, keep_sets(profile, replace(selection, weights=most)))
    worst = max(protection.domains, key=lambda d: protection.limit.excess(losses, d))
    enough = _enough(profile, selection, protection)
    return ThresholdMissedError(
        f"With {selection.count} of {profile.shape.experts} experts {lost_text(losses, worst)}, however much it "
        f"weighs, and --max-domain-loss is {protection.limit.text}; {enough} experts would do (--experts {enough})."
    )


def _enough(profile: Profile, selection: Selection, protection: Protection) -> int:
    """A larger count that keeps within the limit; of many the first of about sixteen. All experts always do."""
    every = legal_counts(profile.shape, degroup=selection.groups is Groups.DEGROUP)
    more = [count for count in every if count > selection.count]
    step = -(-len(more) // 16)
    tried = (*more[step - 1 :: step], profile.shape.experts)
    return next(
        count
        for count in tried
        if count == profile.shape.experts or try_protected(profile, replace(selection, count=count), protection)
    )
