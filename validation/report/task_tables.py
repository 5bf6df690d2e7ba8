"""What models score at tasks, as tables."""

from moepress.validation.quality.results import Estimate
from moepress.validation.report.cells import NONE, Table, figures, number_text, share_estimate_text
from moepress.validation.tasks.results import TaskResults, TaskRow

TASKS, PARTS = "Tasks", "Tasks of groups"


def task_tables(found: TaskResults | None) -> tuple[Table, ...]:
    """What was asked for; behind it the tasks that groups are made of."""
    if found is None:
        return ()
    asked, parts = ([row for row in found.rows if (row.group is not None) is inside] for inside in (False, True))
    header = ("Task", "Model", "Recovery", "Before", "After", "Difference", "Lost, won", "p", "Items")
    made = [Table(title=TASKS, header=header, rows=tuple(map(task_row, asked)), note=_note(found), numeric=7)]
    made += [Table(title=PARTS, header=header, rows=tuple(map(task_row, parts)), numeric=7)] if parts else []
    return tuple(made)


def short_tasks(found: TaskResults | None) -> tuple[Table, ...]:
    """The first metric of each name that was asked for, for a terminal."""
    rows = [] if found is None else [task_row(row) for row in found.rows if row.judged]
    header = ("Task", "Recovery", "Before", "After", "Lost, won", "p", "Items")
    short = tuple((row[0], *row[2:5], *row[6:]) for row in rows)
    return (Table(title=TASKS, header=header, rows=short, numeric=6),)


def task_row(row: TaskRow) -> tuple[str, ...]:
    """The cells of a row: task, model, recovery, before, after, difference, flips, p, items."""
    shares = row.flips is not None
    flips, p = (f"{row.flips.lost}, {row.flips.won}", figures(row.flips.p, 2)) if row.flips else (NONE, NONE)
    return (
        f"{row.group}: {row.of}" if row.group else row.of,
        row.subject,
        NONE if row.recovery is None else share_estimate_text(row.recovery),
        _score(Estimate(value=row.before), shares=shares),
        _score(Estimate(value=row.after), shares=shares),
        NONE if row.difference is None else _score(row.difference, shares=shares),
        flips,
        p,
        str(row.items),
    )


def _score(estimate: Estimate, *, shares: bool) -> str:
    """A share of right answers in per cent; other scores as they are."""
    return share_estimate_text(estimate) if shares else number_text(estimate, 3)


def shown_text(row: TaskRow) -> str:
    """What so many items can tell."""
    if row.shows is None:
        return ""
    least = f"{figures(row.shows * 100, 1)} points" if row.flips is not None else figures(row.shows, 3)
    return f"{row.of}: {row.items} items show a difference of {least} and more."


def _note(found: TaskResults) -> str:
    limit = "" if found.limit is None else f", the first {found.limit} items of each"
    chat = ", with the chat template" if found.chat else ""
    how = f"Asked through {found.harness}{limit}{chat}: both models had the same items, and wrote the likeliest tokens."
    shown = " ".join(filter(None, (shown_text(row) for row in found.rows if row.judged)))
    return f"{how} {_LEGEND} At two standard errors, {shown}" if shown else how


_LEGEND = (
    "Recovery: the score after, divided by the score before, lucky guesses among them. ± is one standard error over "
    "items, paired. Lost: right before and wrong after; won: the other way round; p: of McNemar's exact test, how "
    "likely such a split is where both ways are as likely."
)
