"""What the report says of answers: how many loop or do not end, and a few of them side by side."""

from moepress.validation.quality.generation import RECOMMENDED, Answer, AnswerRow, Generation
from moepress.validation.quality.looping import LEAST_TOKENS, LEAST_TURNS, Share, Shift
from moepress.validation.quality.results import Estimate
from moepress.validation.quality.thresholds import SIGMAS
from moepress.validation.report.cells import NONE, Table, figures, number_text, prose_text, share_text

GENERATION, EXAMPLES = "Generation", "Answers side by side"
_HEAD_CHARS, _TAIL_CHARS = 300, 160  # of an answer, which may be long


def generation_tables(found: Generation | None) -> tuple[Table, ...]:
    """Counts, and answers side by side; nothing where nobody answered."""
    return () if found is None else (_counts(found), _examples(found))


def generation_in_short(found: Generation | None) -> tuple[Table, ...]:
    """The counts for a terminal: no intervals."""
    if found is None:
        return ()
    rows = [
        (
            row.subject,
            share_text(row.loops.value),
            NONE if row.more_loops is None else _increase(row.more_loops),
            share_text(row.unended.value),
            f"{row.mean_tokens.value:.0f}",
        )
        for row in found.rows
    ]
    header = ("Model", "Loop", "More", "Do not end", "Tokens")
    title = f"{GENERATION}: {found.prompts} prompts"
    return (Table(title=title, header=header, rows=tuple(rows), note=visible_text(found), numeric=4),)


def generation_sentence(found: Generation | None, label: str) -> tuple[str, ...]:
    """Loops before and after in words; nothing where that model was asked nothing."""
    after = next((row for row in found.rows[1:] if row.subject == label), None) if found is not None else None
    if found is None or after is None:
        return ()
    shift = after.more_loops
    surely = shift is not None and abs(shift.increase.value) > SIGMAS * (shift.increase.error or 0.0)
    known = "" if surely else ", which so many prompts do not tell from chance"
    return (f"Of {found.prompts} answers {_times(found.rows[0])} looped before and {_times(after)} loop now{known}.",)


def _times(row: AnswerRow) -> str:
    return f"{row.loops.count} ({share_text(row.loops.value)})"


def visible_text(found: Generation) -> str:
    """What so many prompts can show."""
    shifts = [row.more_loops for row in found.rows if row.more_loops is not None]
    if not shifts:
        return ""
    least = SIGMAS * max(shift.increase.error or 0.0 for shift in shifts)
    text = f"With {found.prompts} prompts, changes of less than {figures(least * 100, 1)} percentage points are not "
    text += "told from chance"
    few = f"; {RECOMMENDED} or more show smaller ones" if found.prompts < RECOMMENDED else ""
    return f"{text}{few}."


def _counts(found: Generation) -> Table:
    rows = [
        (
            row.subject,
            _share(row.loops),
            NONE if row.more_loops is None else _increase(row.more_loops),
            NONE if row.more_loops is None else _pairs(row.more_loops),
            _share(row.unended),
            NONE if row.more_unended is None else _increase(row.more_unended),
            number_text(row.mean_tokens, 1),
        )
        for row in found.rows
    ]
    header = ("Model", "Loop", "More loop", "Only before : only after", "Do not end", "More do not end", "Tokens")
    how = (
        "the likeliest token each time"
        if not found.temperature
        else f"temperature {found.temperature:g}, seed {found.seed}"
    )
    note = (
        f"{found.prompts} answers to {found.source}, {how}, up to {found.max_new_tokens} tokens. Loop: the answer "
        f"reaches that limit, and at its end one phrase stands {LEAST_TURNS} times or more, over {LEAST_TOKENS} tokens "
        "or more. Do not end: it reaches the limit without that. In brackets: between these the true share lies with a "
        "confidence of 95 % (Wilson). More: against the first model on the same prompts, in percentage points, ± one "
        "standard error. "
    ) + visible_text(found)
    return Table(title=GENERATION, header=header, rows=tuple(rows), note=note.strip(), numeric=6)


def _share(share: Share) -> str:
    return f"{share_text(share.value)} ({share_text(share.low)} to {share_text(share.high)})"


def _increase(shift: Shift) -> str:
    value, error = shift.increase.value * 100, (shift.increase.error or 0.0) * 100
    sign = "+" if value > 0 else ""
    return f"{sign}{number_text(Estimate(value=value, error=error), 1)}"


def _pairs(shift: Shift) -> str:
    return f"{shift.only_before} : {shift.only_after} (p = {figures(shift.p_value, 2)})"


def _examples(found: Generation) -> Table:
    labels = [answer.subject for answer in found.examples[0].answers] if found.examples else []
    rows = []
    for number, example in enumerate(found.examples, start=1):
        answers = [f"[{_end(one)}]\n{prose_text(_cut(one.text))}" for one in example.answers]
        rows.append((str(number), prose_text(_cut(example.prompt)), *answers))
    note = (
        "First those where the first model is fine and the other loops, then others that differ. Of long texts the "
        "beginning and the end are shown."
    )
    return Table(title=EXAMPLES, header=("Number", "Prompt", *labels), rows=tuple(rows), note=note, prose=True)


def _end(answer: Answer) -> str:
    if answer.period is None or answer.repeated is None:
        return f"{answer.outcome}, {answer.tokens} tokens"
    phrase = "one token" if answer.period == 1 else f"a phrase of {answer.period} tokens"
    return f"{answer.outcome}: {phrase} {answer.repeated:.0f} times"


def _cut(text: str) -> str:
    if len(text) <= _HEAD_CHARS + _TAIL_CHARS:
        return text
    return f"{text[:_HEAD_CHARS]} […] {text[-_TAIL_CHARS:]}"
