"""What pruning costs, what a repair gives back, and whether pruning or fewer bits is the better use of the same bytes.

    python benchmarks/prune_quality.py [--quick] [--part pruning bytes] [--jobs 1] [--tables]

On the bench model, three calibration seeds, held-out text. Part `pruning`: perplexity per domain and KL divergence of
every criterion at 25 % and 50 % pruned, keep sets drawn by chance beside them; for two criteria also with each repair,
and at 50 % in two rounds: half of what must go is dropped, the pruned model is profiled anew, the rest is dropped. Part
`bytes`: pruned and quantized against unpruned at fewer bits.

A seed that is done is written to benchmarks/results/prune_quality.json at once, and taken from there by the next run
of the same setting; delete the file to measure anew.

Errors: over seeds (standard error of their mean), and the paired standard error over evaluation windows (root mean
square over seeds). The model is small and undertrained: it can show what a repair does, not which criterion is best for
a real model at 50 %.
"""

import argparse
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from prune_bytes import bytes_seed
from prune_setting import (
    QUICK,
    REPAIRS,
    InMemory,
    Setting,
    calibration,
    count_of,
    figures,
    measured,
    over_seeds,
    profile_of,
    read_results,
    repairs_of,
    subject,
)
from prune_tables import markdown
from setting import RESULTS, bench_model

from moepress.calibration.collect import collect
from moepress.calibration.profile import Profile
from moepress.compress.pruning.plan import Plan, make_plan
from moepress.compress.pruning.repaired import repaired_source
from moepress.compress.pruning.scoring import Criterion, Selection, domain_weights, keep_sets, random_keep_sets
from moepress.models.storage.checkpoint import Checkpoint, Source, open_checkpoint
from moepress.models.storage.experts import prune_source
from moepress.stages.groundwork import load_corpus, model_run, streamed
from moepress.stages.places import Machine, Output

FILE = RESULTS / "prune_quality.json"
NONE = "none"
Keep = dict[int, list[int]]


def profile_again(base: Checkpoint, profile: Profile, keep: Keep, seed: int, setting: Setting, work: Path) -> Profile:
    """A profile of the pruned model, on the same text; its experts have new numbers."""
    source, machine, folder = prune_source(base, keep), Machine(), work / "round"
    model, given = streamed(source, machine), calibration(seed, setting.tokens)
    corpus = load_corpus(bench_model(), given, context=base.shape.context, vocabulary=base.shape.vocabulary)
    settings = {"seed": seed, "keep": {str(layer): kept for layer, kept in keep.items()}}
    work.mkdir(exist_ok=True)
    with model_run(Output(folder=folder, force=True), model, corpus, machine, settings) as (run, limits):
        statistics = collect(model, corpus, run, limits, leave_one_out=True)
        run.finish()
    shutil.rmtree(folder)
    shape = source.outline.shape
    return Profile(
        model=profile.model,
        model_name=profile.model_name,
        family=profile.family,
        config=source.config,
        shape=shape,
        domains=profile.domains,
        layers=profile.layers,
        calibration=profile.calibration,
        inventory=profile.inventory,
        statistics=statistics,
    )


def selection(profile: Profile, criterion: str, count: int) -> Selection:
    return Selection(criterion=Criterion(criterion), count=count, weights=domain_weights(profile.domains, {}))


def two_rounds(
    base: Checkpoint, profile: Profile, criterion: str, count: int, seed: int, setting: Setting, work: Path
) -> Keep:
    """The keep sets, by old numbers, when half of what must go is dropped before the rest is chosen."""
    groups = profile.shape.groups
    middle = (profile.shape.experts + count) // 2 // groups * groups
    first = keep_sets(profile, selection(profile, criterion, middle))
    again = profile_again(base, profile, first, seed, setting, work)
    second = keep_sets(again, selection(again, criterion, count))
    return {layer: [first[layer][expert] for expert in kept] for layer, kept in second.items()}


def plans_of(
    base: Checkpoint, profile: Profile, share: float, seed: int, setting: Setting, work: Path
) -> Iterator[tuple[str, Plan]]:
    """Name and plan of all keep sets of one share; those by chance have one name."""
    count = count_of(base, share)
    for criterion in setting.criteria:
        yield criterion, make_plan(profile, count=count, criterion=Criterion(criterion))
    default = make_plan(profile, count=count)
    for draw in range(setting.random):
        keep = random_keep_sets(profile, selection(profile, default.criterion, count), 1000 * seed + draw)
        yield "random", default.model_copy(update={"keep": keep})
    for criterion in setting.rounds if share == min(setting.shares) else ():
        keep = two_rounds(base, profile, criterion, count, seed, setting, work)
        yield f"{criterion}, 2 rounds", default.model_copy(update={"keep": keep})


def pruning_seed(seed: int, setting: Setting, work: Path) -> dict[str, Any]:
    """The original's figures, and those of every row of the first table, for one seed."""
    torch.set_num_threads(1)
    start, disk = time.perf_counter(), open_checkpoint(bench_model())
    profile, base, own = profile_of(seed, setting, work), InMemory(base=disk), work / f"pruning-{seed}"
    subjects, rows = [], list[dict[str, Any]]()

    def add(source: Source, **row: Any) -> None:
        subjects.append(subject(str(len(rows)), source))
        rows.append({**row, "seed": seed})

    for share in setting.shares:
        for name, plan in plans_of(disk, profile, share, seed, setting, own):
            pruned = prune_source(base, plan.keep)
            add(pruned, criterion=name, keep=share, repair=NONE)
            for repair, parts in REPAIRS.items() if name in setting.repaired else ():
                if not parts:
                    continue
                found = repairs_of(plan, parts, seed, setting, own)
                errors = {n: [layer.error_before, layer.error_after] for n, layer in found.layers.items()}
                add(repaired_source(pruned, found), criterion=name, keep=share, repair=repair, layer_errors=errors)
    print(f"seed {seed}: {len(subjects)} models after {time.perf_counter() - start:.0f} s", flush=True)
    quality = measured(base, subjects, setting, own)
    shutil.rmtree(own)
    return {
        "original": figures(quality, "original"),
        "rows": [row | figures(quality, made.label) for row, made in zip(rows, subjects, strict=True)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a test of the script: few tokens, few rows, not written")
    parser.add_argument("--part", nargs="+", choices=["pruning", "bytes"], default=["pruning", "bytes"])
    parser.add_argument("--jobs", type=int, default=1, help="seeds at once, a process of one thread each")
    parser.add_argument("--tables", action="store_true", help="measure nothing; print the last results as Markdown")
    given = parser.parse_args()
    if given.tables:
        print("\n".join(markdown({part: found["seeds"] for part, found in read_results(FILE).items()})))
        return
    setting, start, parts = QUICK if given.quick else Setting(), time.perf_counter(), {}
    functions = {"pruning": pruning_seed, "bytes": bytes_seed}
    with tempfile.TemporaryDirectory() as name:
        for part in given.part:
            file = None if given.quick else FILE
            parts[part] = over_seeds(part, functions[part], setting, Path(name), file, given.jobs)
    print("\n".join(markdown(parts)))
    print(f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
