"""What tasks give: plain rows, without torch, that the report takes over as they are.

A score is the mean over items, as a share for right-or-wrong metrics. Errors are one standard error (sigma).
"""

from collections.abc import Mapping
from dataclasses import dataclass

from moepress.validation.quality.results import Estimate


@dataclass(frozen=True, slots=True, kw_only=True)
class Flips:
    """Items of a right-or-wrong metric whose answer changed.

    Attributes:
        lost: right before, wrong after.
        won: wrong before, right after.
        p: of McNemar's exact test, two-sided: how likely such a split is where both directions are as likely.
    """

    lost: int
    won: int
    p: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskRow:
    """One metric of one task, before and after on the same items.

    Attributes:
        subject: label of the model that is compared with the first.
        task: its name; of a group that of the group.
        metric: the metric's name.
        filter: how answers were read before the metric, as lm-eval names it; `none` where they were not.
        group: the group that was asked for, in the row of a task of it; None where the task itself was asked for.
        items: how many.
        before: the first model's score.
        after: this one's.
        higher_is_better: None where the task does not say.
        difference: after minus before, over items; None where the metric has no value for each item.
        recovery: after divided by before, error by the delta method; None where less is better, before is 0, or the
            metric has no value for each item.
        flips: of a metric whose values are 0 and 1.
        shows: the smallest difference that so many items could show at two standard errors.
        judged: it is the row that a limit on the recovery is held against.
        num_fewshot: examples in the prompt.
        max_gen_toks: tokens that an answer may have; None where nothing is written.
        version: of the task.
        digest: SHA-256 over the items' texts and targets.
    """

    subject: str
    task: str
    metric: str
    filter: str = "none"
    group: str | None = None
    items: int
    before: float
    after: float
    higher_is_better: bool | None = None
    difference: Estimate | None = None
    recovery: Estimate | None = None
    flips: Flips | None = None
    shows: float | None = None
    judged: bool = False
    num_fewshot: int = 0
    max_gen_toks: int | None = None
    version: str | None = None
    digest: str | None = None

    @property
    def of(self) -> str:
        """Task and metric in words, with the filter where there are several."""
        return f"{self.task} {self.metric}" + (f" ({self.filter})" if self.filter != "none" else "")


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskResults:
    """All rows of tasks, and what one has to know to repeat them.

    Attributes:
        harness: what asked the questions, with its version.
        asked: names, as they were given, of files without their folders.
        limit: items of each task at most, the first ones; None: all.
        chat: prompts were written with the chat template.
        longest: tokens that a prompt and its answer have at most; longer prompts lose their beginning.
        seeds: of the generators that tasks may draw from.
        runtimes: what ran each model, by its label.
        rows: model by model, in the order that was asked for.
        notes: what a reader must know.
    """

    harness: str
    asked: tuple[str, ...]
    limit: int | None = None
    chat: bool = False
    longest: int
    seeds: dict[str, int]
    runtimes: dict[str, str]
    rows: tuple[TaskRow, ...]
    notes: tuple[str, ...] = ()


MetricKey = tuple[str, str]
"""A metric's name and its filter's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskScores:
    """What one model scored at one task.

    Attributes:
        task: its name.
        items: what tells each item, in order: number and hashes of text and target.
        values: a value for each item, of the metrics that have one and whose mean is the score.
        totals: the score by metric, in the task's order.
        higher: by metric, whether more is better.
        num_fewshot, max_gen_toks, version: see `TaskRow`.
    """

    task: str
    items: tuple[str, ...]
    values: Mapping[MetricKey, tuple[float, ...]]
    totals: Mapping[MetricKey, float]
    higher: Mapping[str, bool]
    num_fewshot: int = 0
    max_gen_toks: int | None = None
    version: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A name that was asked for, and the tasks that it stands for.

    Attributes:
        name: of the task or group.
        tasks: the task itself, or those of the group.
        by_size: a group's score is the mean over all items; else over its tasks, whatever their sizes.
    """

    name: str
    tasks: tuple[str, ...]
    by_size: bool = True
