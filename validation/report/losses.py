"""Whether a change of perplexity is more than the error of its measurement: what all sentences go by."""

from enum import Enum, auto

from moepress.validation.quality.results import Estimate
from moepress.validation.quality.thresholds import SIGMAS
from moepress.validation.report.cells import ROUNDING


class Judged(Enum):
    """What a change is."""

    SAME = auto()
    WITHIN = auto()
    LOST = auto()
    GAINED = auto()


def judged(ratio: Estimate) -> Judged:
    """Hold a ratio of perplexities against two of its errors; without an error it is taken as it is."""
    change = ratio.value - 1
    if abs(change) < ROUNDING:
        return Judged.SAME
    if ratio.error is not None and abs(change) <= SIGMAS * ratio.error:
        return Judged.WITHIN
    return Judged.LOST if change > 0 else Judged.GAINED
