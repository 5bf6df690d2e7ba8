"""What pruning costs in answers, and what a repair gives back: moepress's own two tasks, before and after.

    python benchmarks/prune_tasks.py [--models bench wide] [--quick] [--jobs 1] [--tables]

Three calibration seeds, `reap`, 25 % and 50 % of the experts removed, alone, with routers and with down projections
refitted. The items are the same in all seeds, so every figure is of the item's mean over seeds, with its paired error
over items; what changes with the seed stands beside it. Items whose text is in the training text, which calibration
is drawn from too, are asked and not counted. The results, every item's answer in them, are the parts `tasks MODEL` of
benchmarks/results/prune_quality.json; a seed that is done is not done again.
"""

import argparse
import functools
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from prune_router import NONE, QUICK, WAYS, RouterSetting, told
from prune_setting import InMemory, count_of, over_seeds, profile_of, read_results, repairs_of, subject
from prune_tables import error
from setting import RESULTS, TRAINED, texts, trained_model

from moepress.compress.pruning.plan import make_plan
from moepress.compress.pruning.repaired import repaired_source
from moepress.compress.pruning.scoring import Criterion
from moepress.models.storage.checkpoint import Source, open_checkpoint
from moepress.models.storage.experts import prune_source
from moepress.stages.groundwork import load_tokenizer
from moepress.validation.quality.decoding import stop_tokens
from moepress.validation.tasks.names import OWN
from moepress.validation.tasks.own import own_items, own_scores
from moepress.validation.tasks.paired import compare
from moepress.validation.tasks.results import Asked, TaskRow, TaskScores
from moepress.validation.tasks.runners import open_runner
from moepress.validation.tasks.text_model import TextModel

FILE = RESULTS / "prune_quality.json"
ORIGINAL = "original"
LEAST_RIGHT = 5
"""Right answers of the original; of fewer a share tells nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TasksSetting(RouterSetting):
    """How much is measured.

    Attributes:
        limit: items of each task; None: all.
    """

    ways: tuple[str, ...] = ("router", "down")
    limit: int | None = None


def tasks_seed(name: str, seed: int, setting: TasksSetting, work: Path) -> dict[str, Any]:
    """Every row of one seed, the original's first."""
    torch.set_num_threads(1)
    folder, own = trained_model(name), work / f"tasks-{name}-{seed}"
    own.mkdir()
    disk = open_checkpoint(folder)
    base = InMemory(base=disk)
    rows = [{"keep": 1.0, "repair": ORIGINAL, "seed": seed, "right": asked(base, folder, setting)}]
    profile = profile_of(seed, setting, own, folder)
    for share in setting.shares:
        plan = make_plan(profile, count=count_of(disk, share), criterion=Criterion(setting.criteria[0]))
        pruned = prune_source(base, plan.keep)
        for way in (NONE, *setting.ways):
            row: dict[str, Any] = {"criterion": plan.criterion.value, "keep": share, "repair": way, "seed": seed}
            source, start = pruned, time.perf_counter()
            if way != NONE:
                found = repairs_of(plan, WAYS[way], seed, setting, own / str(len(rows)), folder)
                source = repaired_source(pruned, found)
                row |= {"layers": told(found)}
            rows.append(row | {"right": asked(source, folder, setting)})
            print(f"{name}, seed {seed}: {share:.0%} {way} {time.perf_counter() - start:.0f} s", flush=True)
    shutil.rmtree(own)
    return {"seen": {task: seen(task, setting) for task in OWN}, "rows": rows}


def seen(task: str, setting: TasksSetting) -> str:
    """A 1 for each item whose text is in the training text, and a 0 for each other."""
    known = [Path(given.partition("=")[2]).read_text(encoding="utf-8") for given in texts("train")]
    items = own_items(task)[: setting.limit]
    return "".join(str(int(any(item["context"] in text for text in known))) for item in items)


def unseen(right: Mapping[str, str], marks: Mapping[str, str]) -> dict[str, str]:
    """The same without the items that were seen."""
    return {
        task: "".join(one for one, mark in zip(answers, marks[task], strict=True) if mark == "0")
        for task, answers in right.items()
    }


def asked(source: Source, folder: Path, setting: TasksSetting) -> dict[str, str]:
    """By task, a 1 for each item that a model answers rightly and a 0 for each other, by the task's first metric."""
    device, dtype, tokenizer = torch.device("cpu"), torch.float32, load_tokenizer(folder)
    runner = open_runner(subject("", source), device=device, dtype=dtype)
    longest, stop = source.outline.shape.context, stop_tokens(folder, tokenizer)
    model = TextModel("", runner, tokenizer, longest=longest, stop=stop)
    try:
        found = {task: own_scores(task, model, setting.limit) for task in OWN}
    finally:
        model.close()
        runner.close()
    return {task: "".join(f"{value:.0f}" for value in first_metric(scores)) for task, scores in found.items()}


def first_metric(scores: TaskScores) -> Sequence[float]:
    """Its items' values."""
    return scores.values[next(iter(scores.totals))]


def compared(task: str, before: Sequence[str], after: Sequence[str]) -> TaskRow:
    """Two models on the same items, each item's mean over seeds: score, recovery and difference with errors."""
    pair = [
        {
            task: TaskScores(
                task=task,
                items=tuple(map(str, range(len(values)))),
                values={("share", "none"): values},
                totals={("share", "none"): mean(values)},
                higher={"share": True},
            )
        }
        for values in (over_items(before), over_items(after))
    ]
    (row,) = compare("", *pair, [Asked(name=task, tasks=(task,))])
    return row


def over_items(answers: Sequence[str]) -> tuple[float, ...]:
    """Each item's mean over seeds."""
    return tuple(mean(map(int, item)) for item in zip(*answers, strict=True))


def markdown(parts: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """The results, by model, as one table."""
    heads = (f" {title} | recovery | against pruned |" for title in ("continuation", "sums"))
    yield "| model | experts | repair |" + "".join(heads)
    yield "|---|---|---|" + "---:|---:|---:|" * len(OWN)
    for name, seeds in parts.items():
        every = [found for _, found in sorted(seeds.items())]
        rows = [row | {"right": unseen(row["right"], found["seen"])} for found in every for row in found["rows"]]
        first = [row["right"] for row in rows if row["repair"] == ORIGINAL]
        keys = list(dict.fromkeys((row["keep"], row["repair"]) for row in rows))
        for keep, repair in keys:
            some, plain = (
                [row["right"] for row in rows if (row["keep"], row["repair"]) == (keep, way)] for way in (repair, NONE)
            )
            yield line(name, keep, repair, (first, plain, some))


def line(name: str, keep: float, repair: str, right: tuple[Sequence[Mapping[str, str]], ...]) -> str:
    """A row: scores with the error over seeds; recovery and difference with the paired one over items."""
    cells = [name, "all" if repair == ORIGINAL else f"{keep:.0%}", repair]
    for task in OWN:
        first, plain, some = ([one[task] for one in models] for models in right)
        scores = [mean(map(int, one)) for one in some]
        cells.append(f"{mean(scores):.1%}" + (f" ± {error(scores) or 0:.1%}" if repair != ORIGINAL else ""))
        recovery, beside = "", ""
        if repair != ORIGINAL:
            found = compared(task, first, some).recovery
            if found is not None and first[0].count("1") >= LEAST_RIGHT:
                recovery = f"{found.value:.0%} ± {found.error or 0:.0%}"
        if repair not in (ORIGINAL, NONE):
            change = compared(task, plain, some).difference
            assert change is not None
            beside = f"{change.value * 100:+.1f} ± {(change.error or 0) * 100:.1f}"
        cells += [recovery, beside]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=TRAINED, default=["bench", "wide"])
    parser.add_argument("--quick", action="store_true", help="a test of the script: few tokens, few items, not written")
    parser.add_argument("--jobs", type=int, default=1, help="seeds at once, a process of one thread each")
    parser.add_argument("--tables", action="store_true", help="measure nothing; print the last results as Markdown")
    given = parser.parse_args()
    if given.tables:
        held = read_results(FILE)
        print("\n".join(markdown({n: held[f"tasks {n}"]["seeds"] for n in TRAINED if f"tasks {n}" in held})))
        return
    parts, setting = dict[str, Any](), TasksSetting()
    if given.quick:
        few = {name: getattr(QUICK, name) for name in ("seeds", "tokens", "repair_tokens", "shares")}
        setting = replace(setting, limit=8, **few)
    with tempfile.TemporaryDirectory() as work:
        for name in given.models:
            file, seed = None if given.quick else FILE, functools.partial(tasks_seed, name)
            parts[name] = over_seeds(f"tasks {name}", seed, setting, Path(work), file, given.jobs, model=name)
    print("\n".join(markdown(parts)))


if __name__ == "__main__":
    main()
