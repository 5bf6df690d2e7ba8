"""What a model card says of tasks: results as the hub reads them, and a table for people."""

from typing import Any

from moepress.validation.report.markdown import plain_text
from moepress.validation.report.task_tables import task_row
from moepress.validation.tasks.results import TaskResults, TaskRow


def model_index(found: TaskResults | None, label: str, name: str) -> dict[str, Any]:
    """Front matter: the scores of the folder's own model, see https://huggingface.co/docs/hub/model-cards.

    Args:
        found: of the report.
        label: of the model that lies in the folder; one that was not asked itself has no results.
        name: of the original.
    """
    rows = [row for row in found.rows if row.subject == label and row.group is None] if found else []
    results = [
        {
            "task": {"type": "text-generation"},
            "dataset": {"type": row.task, "name": row.task},
            "metrics": [{"type": row.metric, "value": round(row.after, 6), "name": _metric_name(row)}],
        }
        for row in rows
    ]
    return {"model-index": [{"name": f"{name}-pressed", "results": results}]} if results else {}


def _metric_name(row: TaskRow) -> str:
    shots = f", {row.num_fewshot}-shot" if row.num_fewshot else ""
    how = f", {row.filter}" if row.filter != "none" else ""
    return f"{row.metric}{how}{shots}, {row.items} items"


def task_lines(found: TaskResults | None) -> tuple[str, ...]:
    """What was asked for as Markdown, a table and a sentence; nothing where nothing was."""
    rows = [] if found is None else [task_row(row) for row in found.rows if row.group is None]
    if found is None or not rows:
        return ()
    header = ("Task", "Before", "After", "Recovery", "Lost, won", "Items")
    lines = [f"| {' | '.join(header)} |", "|---|" + "---:|" * (len(header) - 1)]
    lines += [f"| {' | '.join(map(plain_text, (row[0], *row[3:5], row[2], row[6], row[8])))} |" for row in rows]
    limit = "" if found.limit is None else f", the first {found.limit} items of each task"
    asked = f"Asked through {found.harness}{limit}: {plain_text(' and '.join(found.runtimes))}, on the same items. "
    return ("\n".join(lines), f"{asked}± is one standard error over items, paired.")
