"""lm-evaluation-harness, an extra: its tasks by name or file, and one model at a time asked through them.

Nothing of it is imported at the top; `pip install 'moepress[eval]'` brings it. A task file may name Python functions
(`!function`), which lm-eval runs: it is the user's own, so one that lies in a model's folder is refused. Data come from
where the task says, the hub most often; nothing ever trusts code of a data set.
"""

import contextlib
import functools
import logging
import random
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moepress.errors import InvalidInputError, MoepressError, UsageError
from moepress.runs.text import one_line, suggestion
from moepress.validation.tasks.names import OWN, harness_version, is_place, require_harness
from moepress.validation.tasks.own import write_task
from moepress.validation.tasks.results import Asked, MetricKey, TaskScores

SEEDS = {"random": 0, "numpy": 1234, "torch": 1234, "fewshot": 1234}
"""Those of lm-eval's command line."""
DEFAULT_ROOM = 256
"""Tokens of an answer where a task does not say, as in lm-eval."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Catalogue:
    """Tasks that were found.

    Attributes:
        manager: lm-eval's.
        specs: what its `load` takes, in order; our own tasks by their names.
    """

    manager: Any
    specs: tuple[str, ...]


def open_catalogue(names: Sequence[str]) -> Catalogue:
    """Find tasks; their data are not read yet.

    Args:
        names: from `check_names`.

    Raises:
        UsageError: lm-eval has no such task.
        InvalidInputError: a file is none of a task.
    """
    require_harness("--tasks")
    _quiet()
    from lm_eval.tasks import TaskManager

    places = {name: Path(name).expanduser().resolve() for name in names if is_place(name)}
    groups = {name: _group_of(place) for name, place in places.items() if not place.is_dir()}
    include = [str(place) for place in places.values() if place.is_dir()]
    include += [str(places[name].parent) for name, group in groups.items() if group is not None]
    plain = [name for name in names if name not in places and name not in OWN]
    manager = TaskManager(include_path=include or None, include_defaults=bool(plain))
    if not plain and not all(_has_tasks(manager, group) for group in groups.values() if group is not None):
        manager = TaskManager(include_path=include)  # lm-eval's own tasks too, which take ten seconds to look through
    for name in plain:
        if name not in manager.task_index:
            near = suggestion(name, manager.all_tasks)
            raise UsageError(f"lm-eval {harness_version()} has no task {name}{near}; `lm-eval ls tasks` lists them.")
    specs = list[str]()
    for name in names:
        if name not in places:
            specs.append(name)
        elif places[name].is_dir():
            specs += _tasks_of(manager, places[name])
        else:  # a group by its name: lm-eval finds its tasks beside it, and takes no group by its path
            specs.append(groups[name] or str(places[name]))
    return Catalogue(manager=manager, specs=tuple(specs))


def _has_tasks(manager: Any, group: str) -> bool:
    """Whether all that a group names is known."""
    entry = manager.task_index.get(group)
    named = entry.cfg.get("task") if entry is not None and entry.cfg else None
    names = [one if isinstance(one, str) else one.get("task") or one.get("group") for one in named or ()]
    return bool(names) and all(name in manager.task_index for name in names)


def _group_of(file: Path) -> str | None:
    """The group that a task file describes, None where it is a task; files that are neither are refused here."""
    from lm_eval.tasks._yaml_loader import load_yaml

    try:
        found = load_yaml(file, resolve_func=False)
    except Exception as error:  # of YAML, of includes, of the disk
        raise InvalidInputError(f"{file} is not a readable task of lm-eval ({one_line(error)}).") from error
    if "task" not in found and "group" not in found:
        raise InvalidInputError(f"{file} names no `task` and no `group`, so it is no task of lm-eval; mend it.")
    return str(found["group"]) if "group" in found else None


def _tasks_of(manager: Any, folder: Path) -> list[str]:
    """Names of the tasks, not the groups, of a folder."""
    found = [
        name
        for name, entry in manager.task_index.items()
        if entry.yaml_path is not None and folder in entry.yaml_path.resolve().parents and name in manager.all_subtasks
    ]
    if not found:
        raise UsageError(f"The folder {folder} holds no task of lm-eval; a task's YAML file names `task`.")
    return sorted(found)


def load_tasks(catalogue: Catalogue) -> Any:
    """Tasks with their data and lm-eval's own numbers of examples, generators seeded: always the same.

    Raises:
        MoepressError: lm-eval can not load a task or its data.
        UsageError: a task runs code that a model writes.
    """
    _quiet()
    _seed()
    folder = tempfile.TemporaryDirectory(prefix="moepress-tasks-", ignore_cleanup_errors=True)
    with _at_rest(), _own_words("load"), folder as work:
        specs = [str(write_task(spec, Path(work))) if spec in OWN else spec for spec in catalogue.specs]
        loaded = catalogue.manager.load(specs)
    for name, task in loaded["tasks"].items():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=SEEDS["fewshot"])
        if getattr(task, "UNSAFE_CODE", False) or task.get_config("unsafe_code"):
            raise UsageError(f"The task {name} runs code that the model writes, which moepress does not; leave it out.")
    return loaded


def ask(
    catalogue: Catalogue, model: Any, *, limit: int | None, chat: bool = False
) -> tuple[dict[str, TaskScores], tuple[Asked, ...]]:
    """Ask one model, through lm-eval; tasks are loaded anew and generators seeded, so that each model has the same.

    Args:
        catalogue: from `open_catalogue`.
        model: an `LM` of lm-eval.
        limit: the first items of each task alone; None: all.
        chat: write prompts with the model's chat template.

    Returns:
        Scores by task, and the tasks of each name that was asked for.

    Raises:
        MoepressError: lm-eval can not load a task or its data, or a task can not be asked.
    """
    import lm_eval

    loaded = load_tasks(catalogue)
    tasks = loaded["tasks"]
    _seed()
    with _at_rest(), _own_words("ask"):
        found = lm_eval.evaluate(
            lm=model,
            task_dict=loaded,
            limit=limit,
            bootstrap_iters=0,
            log_samples=True,
            apply_chat_template=chat,
            fewshot_as_multiturn=chat,
        )
    return {name: _scores(name, tasks[name], found) for name in tasks}, tuple(_asked(catalogue, loaded))


def _seed() -> None:
    import numpy as np
    import torch

    random.seed(SEEDS["random"])
    np.random.seed(SEEDS["numpy"])
    torch.manual_seed(SEEDS["torch"])


@contextlib.contextmanager
def _own_words(what: str) -> Iterator[None]:
    """Errors of lm-eval, of data sets and of tasks' functions, which are of any type, as one of ours."""
    try:
        yield
    except MoepressError:
        raise
    except Exception as error:
        raise MoepressError(
            f"lm-eval can not {what} the tasks ({type(error).__name__}: {one_line(error)}); mend the task, or see that "
            "its data and packages are here."
        ) from error


@contextlib.contextmanager
def _at_rest() -> Iterator[None]:
    """No bars of lm-eval and datasets, which write to logs too (ours are shown), and no counting of loads by datasets:
    for every local file it asks a server.
    """
    import datasets
    import lm_eval.api.task as tasks
    import lm_eval.models.api_models as endpoints
    from tqdm import tqdm

    quiet, hidden = functools.partial(tqdm, disable=True), datasets.are_progress_bars_disabled()
    before = [(module, module.tqdm) for module in (tasks, endpoints)]
    datasets.disable_progress_bars()
    counted, datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = datasets.config.HF_UPDATE_DOWNLOAD_COUNTS, False
    for module, _ in before:
        module.tqdm = quiet
    try:
        yield
    finally:
        for module, bar in before:
            module.tqdm = bar
        datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = counted
        if not hidden:
            datasets.enable_progress_bars()


def _quiet() -> None:
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    logging.getLogger("datasets").setLevel(logging.ERROR)


def _scores(name: str, task: Any, found: Mapping[str, Any]) -> TaskScores:
    """What is needed of lm-eval's results."""
    samples: Sequence[Mapping[str, Any]] = found["samples"][name]
    totals = {
        (metric, how): float(value)
        for key, value in found["results"][name].items()
        if (metric := key.partition(",")[0]) and (how := key.partition(",")[2])
        if not metric.endswith("_stderr") and isinstance(value, int | float)
    }
    items: dict[str, list[str]] = {}
    values: dict[MetricKey, list[float] | None] = {}
    for sample in samples:
        how = str(sample["filter"])
        items.setdefault(how, []).append(f"{sample['doc_id']} {sample['doc_hash']} {sample['target_hash']}")
        for metric in sample["metrics"]:
            key, value = (metric, how), sample[metric]
            row = values.setdefault(key, [])
            if row is not None and isinstance(value, bool | int | float):
                row.append(float(value))
            else:
                values[key] = None
    first = next(iter(items.values()))
    written = task.get_config("output_type") == "generate_until"
    room = (task.get_config("generation_kwargs") or {}).get("max_gen_toks") if written else None
    return TaskScores(
        task=name,
        items=tuple(first),
        values={key: tuple(row) for key, row in values.items() if row and _is_mean(row, totals.get(key), len(first))},
        totals=totals,
        higher={str(metric): bool(better) for metric, better in task.higher_is_better().items()},
        num_fewshot=int(task.get_config("num_fewshot") or 0),
        max_gen_toks=None if not written else int(room or DEFAULT_ROOM),
        version=None if task.VERSION in (None, "Yaml") else str(task.VERSION),
    )


def _is_mean(row: Sequence[float], total: float | None, items: int) -> bool:
    """Whether a metric has a value for each item and its score is their mean."""
    if total is None or len(row) != items:
        return False
    return abs(sum(row) / items - total) <= 1e-9 * max(1.0, abs(total))


def _asked(catalogue: Catalogue, loaded: Mapping[str, Any]) -> Iterator[Asked]:
    """The tasks of each name: its own, those of a group with one score, or each of a tag or another group alone."""
    groups = loaded.get("groups") or {}
    for spec in catalogue.specs:
        entry = catalogue.manager.task_index.get(spec)
        name = _name(spec) if is_place(spec) else spec
        if name in loaded["tasks"]:
            yield Asked(name=name, tasks=(name,))
        elif name in groups and groups[name].aggregate_metric_list:
            leaves = [task.task_name for task in groups[name].get_all_tasks()]
            yield Asked(name=name, tasks=tuple(leaves), by_size=_by_size(groups[name]))
        elif name in groups:  # nothing says how its tasks' scores make one
            yield from (Asked(name=t.task_name, tasks=(t.task_name,)) for t in groups[name].get_all_tasks())
        else:
            tags = entry.tags if entry is not None else set()
            yield from (Asked(name=task, tasks=(task,)) for task in loaded["tasks"] if task in tags)


def _name(spec: str) -> str:
    from lm_eval.tasks._yaml_loader import load_yaml

    found = load_yaml(Path(spec), resolve_func=False)
    return str(found["task"])


def _by_size(group: Any) -> bool:
    """Whether a group's score is the mean over items, as lm-eval's own aggregation has it."""
    first = group.aggregate_metric_list[0]
    return bool(first.get("weight_by_size", True) if isinstance(first, dict) else first.weight_by_size)
