"""What a refit of the routers gives back after pruning, beside gains, and with both; and one of down projections.

    python benchmarks/prune_router.py [--models bench wide] [--refit down] [--quick] [--jobs 1] [--tables]

Three calibration seeds, `reap`, 25 % and 50 % of the experts removed, held-out text: perplexity, KL divergence from the
unpruned model, and how often both predict the same token. A share given back is that of the KL divergence that pruning
alone has with the same seed.

The results are parts of benchmarks/results/prune_quality.json, `router MODEL`, `down MODEL` and `router+down MODEL`; a
seed that is done is not done again.
"""

import argparse
import functools
import itertools
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from prune_setting import (
    InMemory,
    Setting,
    count_of,
    figures,
    measured,
    over_seeds,
    profile_of,
    read_results,
    repairs_of,
    subject,
)
from prune_tables import error, percent
from setting import RESULTS, TRAINED, trained_model

from moepress.compress.pruning.plan import make_plan
from moepress.compress.pruning.repair import Repair
from moepress.compress.pruning.repaired import Repairs, repaired_source
from moepress.compress.pruning.scoring import Criterion
from moepress.models.storage.checkpoint import open_checkpoint
from moepress.models.storage.experts import prune_source
from moepress.validation.quality.results import DOMAIN_MEAN

FILE = RESULTS / "prune_quality.json"
NONE = "none"
WAYS: Mapping[str, frozenset[Repair]] = {
    "gain": frozenset({Repair.GAIN}),
    "router": frozenset({Repair.ROUTER}),
    "gain+router": frozenset({Repair.GAIN, Repair.ROUTER}),
    "down": frozenset({Repair.DOWN}),
    "router+down": frozenset({Repair.ROUTER, Repair.DOWN}),
}
REFITS: Mapping[str, tuple[str, ...]] = {
    "router": ("gain", "router", "gain+router"),
    "down": ("down",),
    "router+down": ("router+down",),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterSetting(Setting):
    """How much is measured.

    Attributes:
        ways: of repair.
    """

    criteria: tuple[str, ...] = (Criterion.REAP.value,)
    repaired: tuple[str, ...] = (Criterion.REAP.value,)
    rounds: tuple[str, ...] = ()
    random: int = 0
    pressed: tuple[Any, ...] = ()
    ways: tuple[str, ...] = REFITS["router"]


QUICK = RouterSetting(seeds=(0, 1), tokens=4096, repair_tokens=2048, windows=2, shares=(0.5,))


def router_seed(name: str, seed: int, setting: RouterSetting, work: Path) -> dict[str, Any]:
    """Every row of one seed."""
    torch.set_num_threads(1)
    folder, own = trained_model(name), work / f"router-{name}-{seed}"
    own.mkdir()
    disk = open_checkpoint(folder)
    profile, base = profile_of(seed, setting, own, folder), InMemory(base=disk)
    subjects, rows = [], list[dict[str, Any]]()
    for share in setting.shares:
        plan = make_plan(profile, count=count_of(disk, share), criterion=Criterion(setting.criteria[0]))
        pruned = prune_source(base, plan.keep)
        for way in (NONE, *setting.ways):
            row: dict[str, Any] = {"criterion": plan.criterion.value, "keep": share, "repair": way, "seed": seed}
            source, start = pruned, time.perf_counter()
            if way != NONE:
                found = repairs_of(plan, WAYS[way], seed, setting, own / str(len(rows)), folder)
                source = repaired_source(pruned, found)
                row |= {"layers": told(found), "seconds": time.perf_counter() - start}
            subjects.append(subject(str(len(rows)), source))
            rows.append(row)
            print(f"{name}, seed {seed}: {share:.0%} {way} {time.perf_counter() - start:.0f} s", flush=True)
    quality = measured(base, subjects, setting, own, folder)
    shutil.rmtree(own)
    for row, made in zip(rows, subjects, strict=True):
        paired = quality.row(made.label, DOMAIN_MEAN).paired
        assert paired is not None
        row |= figures(quality, made.label) | {"same_top1": paired.same_top1.value}
    return {"original": figures(quality, "original"), "rows": rows}


def told(repairs: Repairs) -> dict[str, Any]:
    """Errors of the layers, all tokens and those held out."""
    return {
        str(number): {
            "error": [layer.error_before, layer.error_after],
            "held_out": layer.router and [layer.router.error_before, layer.router.error_after],
            "down": layer.down and [layer.down.error_before, layer.down.error_after, layer.down.taken],
        }
        for number, layer in repairs.layers.items()
    }


def markdown(parts: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """The results, by model, as one table."""
    yield "| model | experts | repair | change of perplexity | KL | same token | KL given back | lower KL in |"
    yield "|---|---|---|---:|---:|---:|---:|---:|"
    for name, seeds in parts.items():
        rows = [row for _, found in sorted(seeds.items()) for row in found["rows"]]
        for share in sorted({row["keep"] for row in rows}, reverse=True):
            for way in (NONE, *WAYS):
                some = [row for row in rows if (row["keep"], row["repair"]) == (share, way)]
                if some:
                    plain = {row["seed"]: row["kl"] for row in rows if (row["keep"], row["repair"]) == (share, NONE)}
                    yield line(name, some, [row["kl"] / plain[row["seed"]] for row in some])


def line(name: str, rows: Sequence[Mapping[str, Any]], left: Sequence[float]) -> str:
    """A row: means over seeds, and the standard errors of these; `left` is the share of the KL that is left."""
    cells = [name, f"{rows[0]['keep']:.0%}", str(rows[0]["repair"])]
    changes, kls = [row["change"] for row in rows], [row["kl"] for row in rows]
    top = [row["same_top1"] for row in rows]
    cells.append(f"{mean(changes) * 100:+.2f}{percent(error(changes))}")
    spread = error(kls)
    cells.append(f"{mean(kls):.4f}" + ("" if spread is None else f" ± {spread:.4f}"))
    cells.append(f"{mean(top):.2%}")
    if rows[0]["repair"] == NONE:
        cells += ["", ""]
    else:
        cells.append(f"{(1 - mean(left)) * 100:.1f}{percent(error(left), 1)}")
        cells.append(f"{sum(share < 1 for share in left)} of {len(left)}")
    return "| " + " | ".join(cells) + " |"


def part_of(refit: str, name: str) -> str:
    return f"{refit} {name}"


def joined(name: str, held: Mapping[str, Any]) -> dict[str, Any]:
    """A model's seeds with the rows of all its parts; what is pruned alone is the same in all."""
    seeds: dict[str, Any] = {}
    for refit in REFITS:
        for seed, found in held.get(part_of(refit, name), {"seeds": {}})["seeds"].items():
            rows = seeds.setdefault(seed, {"rows": []})["rows"]
            there = {(row["keep"], row["repair"]) for row in rows}
            rows += [row for row in found["rows"] if (row["keep"], row["repair"]) not in there]
    return seeds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=TRAINED, default=["bench", "wide"])
    parser.add_argument("--refit", nargs="+", choices=REFITS, default=list(REFITS), help="what is refitted")
    parser.add_argument("--quick", action="store_true", help="a test of the script: few tokens, few rows, not written")
    parser.add_argument("--jobs", type=int, default=1, help="seeds at once, a process of one thread each")
    parser.add_argument("--tables", action="store_true", help="measure nothing; print the last results as Markdown")
    given = parser.parse_args()
    if given.tables:
        held = read_results(FILE)
        print("\n".join(markdown({name: seeds for name in TRAINED if (seeds := joined(name, held))})))
        return
    parts, file = dict[str, Any](), None if given.quick else FILE
    with tempfile.TemporaryDirectory() as work:
        for refit, name in itertools.product(given.refit, given.models):
            setting = replace(QUICK if given.quick else RouterSetting(), ways=REFITS[refit])
            part, seed = part_of(refit, name), functools.partial(router_seed, name)
            seeds = over_seeds(part, seed, setting, Path(work), file, given.jobs, model=name)
            parts[part] = {"seeds": seeds}
    print("\n".join(markdown({name: joined(name, parts) for name in given.models})))


if __name__ == "__main__":
    main()
