"""What each runtime does with a folder, in one row: the worst of its findings, how many there are, and the first."""

from dataclasses import dataclass

from moepress.validation.rules.check import Checked
from moepress.validation.rules.findings import Effect, Finding

LOADS = "loads"
_WORST = (Effect.REFUSES, Effect.WRONG, Effect.SLOWER, Effect.OPTION)
"""What refuses can not be wrong any more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """One runtime.

    Attributes:
        layout: how the folder's weights are laid out.
        runtime: its name.
        outcome: `loads`, or the worst of the findings' effects.
        findings: how many there are for it.
        first: the first finding of that effect in a sentence; None where there is none.
    """

    layout: str
    runtime: str
    outcome: str
    findings: int
    first: str | None


def outcomes(checked: Checked) -> tuple[Outcome, ...]:
    """A row for each runtime that the folder was held against."""
    rows = []
    for runtime in checked.runtimes:
        found = [finding for finding in checked.findings if finding.runtime is runtime]
        worst = next((effect for effect in _WORST if any(f.effect is effect for f in found)), None)
        first = next((finding for finding in found if finding.effect is worst), None)
        rows.append(
            Outcome(
                layout=checked.kind.value,
                runtime=runtime.value,
                outcome=LOADS if worst is None else worst.value,
                findings=len(found),
                first=None if first is None else _sentence(first),
            )
        )
    return tuple(rows)


def _sentence(finding: Finding) -> str:
    return f"{finding.what}: {finding.happens}."
