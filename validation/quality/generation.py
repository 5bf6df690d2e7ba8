"""What answers to many prompts show of models: plain rows, without torch, that the report takes over as they are."""

from collections.abc import Sequence
from dataclasses import dataclass

from moepress.validation.quality.looping import (
    Outcome,
    Share,
    Shift,
    cycle_at_end,
    mean_length,
    outcome_of,
    share_of,
    shift_of,
)
from moepress.validation.quality.results import Estimate

EXAMPLES = 4
RECOMMENDED = 500
"""Prompts from which on a few per cent more loops are seen; of 50 none of them may loop."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerRow:
    """The answers of one model.

    Attributes:
        subject: its label.
        answers: how many.
        loops: those that loop at the limit of their length.
        unended: those that reach the limit without an end token and do not loop.
        mean_tokens: length of an answer; error over answers.
        more_loops, more_unended: against the first model on the same prompts; None for itself.
    """

    subject: str
    answers: int
    loops: Share
    unended: Share
    mean_tokens: Estimate
    more_loops: Shift | None = None
    more_unended: Shift | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What one model answers to one prompt.

    Attributes:
        subject: its label.
        text: without special tokens.
        tokens: how many, with the end token.
        outcome: how it ended.
        period, repeated: of one that loops, tokens of the phrase, and how often it is there.
    """

    subject: str
    text: str
    tokens: int
    outcome: Outcome
    period: int | None = None
    repeated: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """Answers to one prompt, side by side: of the first model and of the result."""

    prompt: str
    answers: tuple[Answer, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """Answers to many prompts.

    Attributes:
        prompts: how many.
        source: where they are from, in words.
        digest: SHA-256 of their tokens.
        chat: whether a chat template wrote them.
        max_new_tokens: limit of an answer's length.
        temperature: 0 takes the likeliest token; above, tokens are drawn.
        seed: of the draws.
        rows: a row for each model, the first one first.
        examples: a few prompts, those first where the first model is fine and the other loops.
    """

    prompts: int
    source: str
    digest: str
    chat: bool
    max_new_tokens: int
    temperature: float
    seed: int
    rows: tuple[AnswerRow, ...]
    examples: tuple[Example, ...] = ()


def answer_rows(
    labels: Sequence[str], written: Sequence[Sequence[Sequence[int]]], stop: frozenset[int]
) -> tuple[AnswerRow, ...]:
    """A row for each model.

    Args:
        labels: of the models.
        written: for each model its answers, in the order of the prompts, as tokens.
        stop: end tokens.
    """
    found = [[outcome_of(answer, stop) for answer in answers] for answers in written]
    return tuple(
        _row(label, answers, outcomes, found[0] if number else None)
        for number, (label, answers, outcomes) in enumerate(zip(labels, written, found, strict=True))
    )


def _row(
    label: str, answers: Sequence[Sequence[int]], outcomes: Sequence[Outcome], first: Sequence[Outcome] | None
) -> AnswerRow:
    def shift(kind: Outcome) -> Shift | None:
        return None if first is None else shift_of([o is kind for o in first], [o is kind for o in outcomes])

    return AnswerRow(
        subject=label,
        answers=len(answers),
        loops=share_of(outcomes.count(Outcome.LOOPS), len(answers)),
        unended=share_of(outcomes.count(Outcome.UNENDED), len(answers)),
        mean_tokens=mean_length([len(answer) for answer in answers]),
        more_loops=shift(Outcome.LOOPS),
        more_unended=shift(Outcome.UNENDED),
    )


def telling(before: Sequence[Sequence[int]], after: Sequence[Sequence[int]], stop: frozenset[int]) -> list[int]:
    """Numbers of a few prompts that show what changed: loops of the second model alone, then other ends, then other
    words; of each kind the first ones.
    """

    def rank(number: int) -> int:
        one, other = (outcome_of(answers[number], stop) for answers in (before, after))
        if other is Outcome.LOOPS and one is not Outcome.LOOPS:
            return 0 if one is Outcome.ENDED else 1
        return 2 if one is not other else 3 if list(before[number]) != list(after[number]) else 4

    return [number for number in sorted(range(len(before)), key=rank) if rank(number) < 4][:EXAMPLES]


def answer_of(label: str, tokens: Sequence[int], text: str, stop: frozenset[int]) -> Answer:
    """One answer for the report."""
    outcome = outcome_of(tokens, stop)
    cycle = cycle_at_end(tokens) if outcome is Outcome.LOOPS else None
    return Answer(
        subject=label,
        text=text,
        tokens=len(tokens),
        outcome=outcome,
        period=None if cycle is None else cycle.period,
        repeated=None if cycle is None else cycle.tokens / cycle.period,
    )
