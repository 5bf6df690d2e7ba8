"""Domains that a result has lost beside the others: what a mean over domains hides, for the headline."""

from moepress.compress.pruning.domains import FACTOR, parse_limit, times_mean
from moepress.validation.quality.results import QualityRow
from moepress.validation.report.cells import percent_text
from moepress.validation.report.losses import Judged, judged
from moepress.validation.report.schema import Report


def lost_text(report: Report, subject: str) -> str:
    """`; worst hit: python (+29 %)`, or nothing.

    A domain is lost where its perplexity rises by more than so many times the mean of the other domains, and beyond the
    error of that, or where the plan says so by the profile. The factor is 2, or that of the plan's limit; a mean below
    1 % counts as 1 %. Domains that were given up by their weight are not named.
    """
    pruning = report.pruning
    given_up = () if pruning is None else pruning.given_up
    rises = {row.domain: _rise(row) for row in report.quality.rows if row.scope == "domain" and row.subject == subject}
    found = [d for d in _measured(report, subject, rises) if d not in given_up]
    planned = [] if pruning is None else [d for d in pruning.lost if d not in found]
    shown = {d: f"{percent_text(rise)}, " for d, rise in rises.items()}
    named = [f"{d} ({percent_text(rises[d])})" for d in found]
    named += [f"{d} ({shown.get(d, '')}by the profile)" for d in planned]
    return f"; worst hit: {', '.join(named)}" if named else ""


def _measured(report: Report, subject: str, rises: dict[str, float]) -> list[str]:
    limit = report.pruning.limit if report.pruning is not None else None
    factor = (parse_limit(limit).factor if limit else None) or FACTOR
    return [
        domain
        for domain, rise in rises.items()
        if times_mean(rise, [other for name, other in rises.items() if name != domain]) > factor
        and _beyond(report.quality.row(subject, domain))
    ]


def _rise(row: QualityRow) -> float:
    return 0.0 if row.paired is None else row.paired.perplexity_ratio.value - 1


def _beyond(row: QualityRow) -> bool:
    return row.paired is not None and judged(row.paired.perplexity_ratio) is Judged.LOST
