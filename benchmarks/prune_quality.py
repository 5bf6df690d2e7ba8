"""What pruning costs, what a repair gives back, and whether pruning or fewer bits is the better use of the same bytes.

    python benchmarks/prune_quality.py [--quick] [--part pruning bytes] [--tables]

Two tables on the bench model, each figure the mean over three calibration seeds. Part `pruning`: perplexity per domain
and KL divergence by criterion at 25 % and 50 % pruned, without repair and with each kind, random keep sets beside them.
Part `bytes`: pruned and quantized against unpruned at fewer bits, at nearly equal bytes.

Errors: over seeds (standard error of their mean), and the paired standard error over evaluation windows (root mean
square over seeds). The model is small and undertrained: it can show what a repair does, not which criterion is best for
a real model at 50 %.
"""

import argparse
import json
import math
import multiprocessing
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from setting import RESULTS, bench_model, save, texts

from moepress.calibration.profile import Profile, load_profile
from moepress.comparison import load_evaluation
from moepress.compress.linears import Include
from moepress.compress.plan import Plan, make_plan
from moepress.compress.repair import Repair
from moepress.compress.repaired import Repairs, repaired_source
from moepress.compress.scoring import Criterion, Selection, domain_weights, random_keep_sets
from moepress.converters.artifact import open_artifact
from moepress.converters.scheme import Scheme
from moepress.models.checkpoint import Checkpoint, Source, open_checkpoint
from moepress.models.experts import prune_source
from moepress.models.family import Family
from moepress.models.walk import Limits
from moepress.repairing import repair_stage
from moepress.stages import Calibration, Machine, Output, QuantizeRequest, profile_stage, quantize_stage
from moepress.validation.measure import Subject, measure
from moepress.validation.results import DOMAIN_MEAN, Quality

Key = tuple[Any, ...]
REPAIRS: Mapping[str, frozenset[Repair]] = {
    "none": frozenset(),
    "gain": frozenset({Repair.GAIN}),
    "bias": frozenset({Repair.BIAS}),
    "gain+bias": frozenset(Repair),
}
REPAIRED = (Criterion.REAP, Criterion.LOO)
SHARES = (0.75, 0.5)
# bits -> (share of experts, bits): about as many bytes of routed experts, scales of 16 bits in groups of 64 included
EQUAL_BYTES = {4: ((0.5, 8),), 3: ((0.75, 4),), 2: ((0.5, 4),)}
GROUP_SIZE = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """How much is measured.

    Attributes:
        seeds: of calibration.
        tokens: of calibration, for the profile.
        repair_tokens: of calibration, for repair and quantization.
        windows: of evaluation, per domain.
        criteria: without repair.
        repaired: with every repair.
        equal: bits of the unpruned model -> shares and bits to hold against it.
        pressed: repairs of those.
    """

    seeds: tuple[int, ...] = (0, 1, 2)
    tokens: int = 32_768
    repair_tokens: int = 8_192
    windows: int = 4
    criteria: tuple[Criterion, ...] = ()
    repaired: tuple[Criterion, ...] = REPAIRED
    equal: Mapping[int, Sequence[tuple[float, int]]] = field(default_factory=lambda: dict(EQUAL_BYTES))
    pressed: tuple[str, ...] = ("none",)


QUICK = Setting(
    seeds=(0, 1),
    tokens=4096,
    repair_tokens=4096,
    windows=2,
    criteria=(),
    repaired=(Criterion.REAP,),
    equal={3: ((0.75, 4),)},
    pressed=("none", "gain"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class InMemory:
    """A source that reads every tensor once."""

    base: Source
    kept: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def config(self) -> Mapping[str, Any]:
        return self.base.config

    @property
    def family(self) -> Family:
        return self.base.family

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self.base.shapes

    def read(self, name: str) -> torch.Tensor:
        if name not in self.kept:
            self.kept[name] = self.base.read(name)
        return self.kept[name]

    def read_row(self, name: str, row: int) -> torch.Tensor:
        return self.read(name)[row]


def calibration(seed: int, tokens: int) -> Calibration:
    every = texts("train")
    return Calibration(domains=every, tokens=tokens if every else None, window=512, seed=seed)


def count_of(base: Checkpoint, share: float) -> int:
    count = round(base.shape.experts * share)
    return count - count % base.shape.groups


def random_plan(plan: Plan, profile: Profile, seed: int) -> Plan:
    selection = Selection(criterion=plan.criterion, count=plan.experts, weights=domain_weights(profile.domains, {}))
    return plan.model_copy(update={"keep": random_keep_sets(profile, selection, seed)})


def plans_of(profile: Profile, count: int, setting: Setting, seed: int) -> Iterator[tuple[str, Plan, bool]]:
    """Name, plan, and whether it is also repaired."""
    for criterion in dict.fromkeys((*setting.repaired, *setting.criteria)):
        yield criterion.value, make_plan(profile, count=count, criterion=criterion), criterion in setting.repaired
    yield "random", random_plan(make_plan(profile, count=count), profile, seed), False


def profile_of(seed: int, setting: Setting, work: Path) -> Profile:
    folder = work / f"profile-{seed}"
    if not folder.exists():
        profile_stage(str(bench_model()), Output(folder=folder), calibration(seed, setting.tokens), Machine())
    return load_profile(folder)


def repairs_of(plan: Plan, parts: frozenset[Repair], seed: int, setting: Setting, work: Path) -> Repairs:
    folder = work / "repair"
    work.mkdir(exist_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
    given = calibration(seed, setting.repair_tokens)
    return repair_stage(str(bench_model()), Output(folder=folder), plan, parts, given, Machine())


def subject(label: str, source: Source, size: int = 0) -> Subject:
    return Subject(label=label, source=source, folder=None, stored_bytes=size, parameters=0)


def measured(base: Source, subjects: Sequence[Subject], setting: Setting, work: Path) -> Quality:
    corpus = load_evaluation(
        bench_model(), (), texts("test"), window=512, max_windows=setting.windows, vocabulary=base.config["vocab_size"]
    )
    limits = Limits(memory_bytes=4 << 30, batch_windows=12)
    every = [subject("original", base), *subjects]
    return measure(
        every, corpus, device=torch.device("cpu"), dtype=torch.float32, limits=limits, scratch_folder=work / "eval"
    )


def figures(found: Quality, label: str) -> dict[str, Any]:
    """One seed's row."""
    row = found.row(label, DOMAIN_MEAN)
    domains = {d: found.row(label, d).perplexity.value for d in found.domains}
    if row.paired is None:
        return {"perplexity": row.perplexity.value, "domains": domains}
    return {
        "perplexity": row.perplexity.value,
        "change": row.paired.perplexity_ratio.value - 1,
        "paired_error": row.paired.perplexity_ratio.error,
        "kl": row.paired.kl.value,
        "kl_by_domain": {d: p.kl.value for d in found.domains if (p := found.row(label, d).paired)},
        "domains": domains,
    }


def over_seeds(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means over seeds, and both errors of the change."""

    def error(name: str) -> float | None:
        return stdev(r[name] for r in rows) / math.sqrt(len(rows)) if len(rows) > 1 else None

    return {
        **{name: mean(r[name] for r in rows) for name in ("perplexity", "change", "kl")},
        "seed_error": error("change"),
        "kl_seed_error": error("kl"),
        "paired_error": math.sqrt(mean((r["paired_error"] or 0.0) ** 2 for r in rows)),
        "domains": {d: mean(r["domains"][d] for r in rows) for d in rows[0]["domains"]},
        "kl_by_domain": {d: mean(r["kl_by_domain"][d] for r in rows) for d in rows[0]["kl_by_domain"]},
        "seeds": list(rows),
    }


def pruning_seed(seed: int, setting: Setting, work: Path) -> tuple[dict[str, Any], list[tuple[Key, dict[str, Any]]]]:
    """The original's figures, and those of every row of the first table, for one seed."""
    torch.set_num_threads(1)
    disk = open_checkpoint(bench_model())
    profile, base, own = profile_of(seed, setting, work), InMemory(base=disk), work / f"seed-{seed}"
    subjects, keys, layers = [], dict[str, Key](), dict[str, Any]()
    for share in SHARES:
        for name, plan, mended in plans_of(profile, count_of(disk, share), setting, seed):
            pruned = prune_source(base, plan.keep)
            for repair, parts in REPAIRS.items() if mended else (("none", frozenset[Repair]()),):
                label, source = f"{name} {share:.0%} {repair}", pruned
                keys[label] = (name, share, repair)
                if parts:
                    repairs = repairs_of(plan, parts, seed, setting, own)
                    source = repaired_source(pruned, repairs)
                    layers[label] = {n: [row.error_before, row.error_after] for n, row in repairs.layers.items()}
                subjects.append(subject(label, source))
    print(f"seed {seed}: {len(layers)} repairs done", flush=True)
    found = measured(base, subjects, setting, own)
    rows = [
        (key, {"seed": seed, **figures(found, label), "layer_errors": layers.get(label)}) for label, key in keys.items()
    ]
    return figures(found, "original"), rows


def over(function: Any, setting: Setting, work: Path) -> list[Any]:
    """A function's results for all seeds: a process for each, of one thread."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(len(setting.seeds), mp_context=context) as pool:
        return [f.result() for f in [pool.submit(function, seed, setting, work) for seed in setting.seeds]]


def gathered(found: Sequence[Sequence[tuple[Any, dict[str, Any]]]]) -> dict[Any, list[dict[str, Any]]]:
    """Rows of all seeds by what they are of."""
    cells: dict[Any, list[dict[str, Any]]] = {}
    for rows in found:
        for key, row in rows:
            cells.setdefault(key, []).append(row)
    return cells


def pruning(setting: Setting, work: Path) -> dict[str, Any]:
    """The first table."""
    found = over(pruning_seed, setting, work)
    cells = gathered([rows for _, rows in found])
    rows = [{"criterion": c, "keep": s, "repair": r, **over_seeds(some)} for (c, s, r), some in cells.items()]
    print_pruning(found[0][0], rows)
    return {"original": found[0][0], "pruning": rows, "repair": repair_effect(rows)}


def repair_effect(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """By share and repair: the change of log-perplexity and of KL that a repair makes, over all criteria and seeds."""
    plain = {(r["criterion"], r["keep"], s["seed"]): s for r in rows if r["repair"] == "none" for s in r["seeds"]}
    out = []
    for share in SHARES:
        for repair in [name for name in REPAIRS if name != "none"]:
            cells = [
                (s, plain[r["criterion"], share, s["seed"]])
                for r in rows
                if r["keep"] == share and r["repair"] == repair and r["criterion"] != "random"
                for s in r["seeds"]
            ]
            if len(cells) < 2:
                continue
            logs = [math.log(a["perplexity"] / b["perplexity"]) for a, b in cells]
            kls = [a["kl"] / b["kl"] - 1 for a, b in cells]
            row: dict[str, Any] = {"keep": share, "repair": repair, "cells": len(cells)}
            for name, values in (("perplexity", logs), ("kl", kls)):
                row[name], row[f"{name}_error"] = mean(values), stdev(values) / math.sqrt(len(values))
            out.append(row)
            better = sum(a["kl"] < b["kl"] for a, b in cells)
            row["better"] = better
            changes = f"perplexity {row['perplexity']:+.2%} +- {row['perplexity_error']:.2%}"
            changes += f", KL {row['kl']:+.1%} +- {row['kl_error']:.1%}"
            print(f"keep {share:.0%}, {repair:9s}: {changes}, lower KL in {better} of {len(cells)}")
    return out


def print_pruning(original: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
    domains = original["domains"]
    print(f"{'criterion':10s} {'keep':>4s} {'repair':9s}" + "".join(f"{d:>8s}" for d in domains) + "  overall   change")
    print(f"{'original':25s}" + "".join(f"{v:8.2f}" for v in domains.values()) + f" {original['perplexity']:8.2f}")
    for r in sorted(rows, key=lambda r: (-r["keep"], r["repair"] == "none", r["criterion"])):
        cells = "".join(f"{value:8.2f}" for value in r["domains"].values())
        print(f"{r['criterion']:10s} {r['keep']:4.0%} {r['repair']:9s}{cells} {r['perplexity']:8.2f} {changes_of(r)}")


def changes_of(row: Mapping[str, Any]) -> str:
    seeds = "" if row["seed_error"] is None else f" +- {row['seed_error']:.2%} (seeds)"
    return f"{row['change']:+8.2%}{seeds} +- {row['paired_error']:.2%} (paired)  KL {row['kl']:.4f}"


def bytes_seed(seed: int, setting: Setting, work: Path) -> list[tuple[Key, dict[str, Any]]]:
    """Every row of the second table, for one seed."""
    torch.set_num_threads(1)
    disk, own = open_checkpoint(bench_model()), work / f"seed-{seed}"
    profile = profile_of(seed, setting, work)
    wanted = [(1.0, bits, "none") for bits in setting.equal]
    wanted += [(s, b, r) for others in setting.equal.values() for s, b in others for r in setting.pressed]
    subjects = []
    for number, (share, bits, repair) in enumerate(wanted):
        source = pressed(profile, disk, share, bits, REPAIRS[repair], seed, setting, own / f"artifact-{number}")
        subjects.append(subject(str(number), source, source.total_bytes))
    print(f"seed {seed}: {len(wanted)} models quantized", flush=True)
    found = measured(InMemory(base=disk), subjects, setting, own)
    return [
        (key, {"seed": seed, "bytes": made.stored_bytes, **figures(found, made.label)})
        for key, made in zip(wanted, subjects, strict=True)
    ]


def equal_bytes(setting: Setting, work: Path) -> dict[str, Any]:
    """The second table: the default criterion; attention, shared experts and dense layers in the same bits."""
    cells = gathered(over(bytes_seed, setting, work))
    rows = [
        {"keep": s, "bits": b, "repair": r, "bytes": f[0]["bytes"], **over_seeds(f)} for (s, b, r), f in cells.items()
    ]
    rows.sort(key=lambda r: (-r["bytes"], -r["keep"]))
    print(f"{'keep':>4s} {'bits':>4s} {'repair':6s} {'MB':>6s}  perplexity, change")
    for r in rows:
        what = f"{r['keep']:4.0%} {r['bits']:4d} {r['repair']:6s} {r['bytes'] / 1e6:6.2f}"
        print(f"{what}  {r['perplexity']:7.2f} {changes_of(r)}")
    return {"bytes": rows}


def pressed(
    profile: Profile,
    disk: Checkpoint,
    share: float,
    bits: int,
    parts: frozenset[Repair],
    seed: int,
    setting: Setting,
    folder: Path,
) -> Any:
    """The model at that share and width, as an opened artifact."""
    plan = make_plan(profile, count=count_of(disk, share))
    repairs = repairs_of(plan, parts, seed, setting, folder.parent) if parts else None
    quantize_stage(
        str(bench_model()),
        Output(folder=folder),
        plan,
        QuantizeRequest(
            scheme=Scheme(bits=bits, group_size=GROUP_SIZE),
            include=frozenset({Include.ATTENTION, Include.SHARED, Include.DENSE}),
        ),
        calibration(seed, setting.repair_tokens),
        Machine(),
        repairs=repairs,
    )
    return open_artifact(folder)


def markdown(made: Mapping[str, Any]) -> Iterator[str]:
    """The results as tables for docs/benchmarks.md."""
    if "pruning" in made:
        domains = list(made["original"]["domains"])
        yield "| experts | criterion | repair | " + " | ".join(domains) + " | overall | change | over seeds | KL |"
        yield "|---|---|---|" + "---:|" * (len(domains) + 4)
        cells = " | ".join(f"{value:.2f}" for value in made["original"]["domains"].values())
        yield f"| all | original |  | {cells} | {made['original']['perplexity']:.2f} |  |  |  |"
        order = {name: number for number, name in enumerate(REPAIRS)}
        for r in sorted(made["pruning"], key=lambda r: (-r["keep"], r["criterion"], order[r["repair"]])):
            cells = " | ".join(f"{value:.2f}" for value in r["domains"].values())
            change = f"{r['change']:+.2%} ± {r['paired_error']:.2%} | ± {r['seed_error'] or 0:.2%}"
            row = f"| {r['keep']:.0%} | {r['criterion']} | {r['repair']} | {cells} | {r['perplexity']:.2f} | {change}"
            yield f"{row} | {r['kl']:.4f} |"
        yield ""
        yield "| experts | repair | perplexity | KL | lower KL in |"
        yield "|---|---|---:|---:|---:|"
        for r in made["repair"]:
            changes = f"{r['perplexity']:+.2%} ± {r['perplexity_error']:.2%} | {r['kl']:+.1%} ± {r['kl_error']:.1%}"
            yield f"| {r['keep']:.0%} | {r['repair']} | {changes} | {r['better']} of {r['cells']} |"
        yield ""
    if "bytes" in made:
        yield "| MB | experts | bits | repair | perplexity | change | over seeds | KL |"
        yield "|---:|---:|---:|---|---:|---:|---:|---:|"
        for r in made["bytes"]:
            change = f"{r['change']:+.2%} ± {r['paired_error']:.2%} | ± {r['seed_error'] or 0:.2%}"
            what = f"| {r['bytes'] / 1e6:.2f} | {r['keep']:.0%} | {r['bits']} | {r['repair']}"
            yield f"{what} | {r['perplexity']:.2f} | {change} | {r['kl']:.4f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a test of the script: few tokens, few rows")
    parser.add_argument("--part", nargs="+", choices=["pruning", "bytes"], default=["pruning", "bytes"])
    parser.add_argument("--tables", action="store_true", help="measure nothing; print the last results as Markdown")
    given = parser.parse_args()
    if given.tables:
        print("\n".join(markdown(json.loads((RESULTS / "prune_quality.json").read_text())["rows"])))
        return
    setting, start = QUICK if given.quick else Setting(), time.perf_counter()
    made: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        for part, run in (("pruning", pruning), ("bytes", equal_bytes)):
            if part in given.part:
                made |= run(setting, Path(name))
    seconds = time.perf_counter() - start
    more = {"seeds": setting.seeds, "calibration_tokens": setting.tokens, "repair_tokens": setting.repair_tokens}
    print(f"{seconds:.0f} s")
    before = RESULTS / "prune_quality.json"
    if before.exists() and len(given.part) < 2:  # the other part of it stays
        made = json.loads(before.read_text())["rows"] | made
    if not given.quick:
        save("prune_quality", made, windows_per_domain=setting.windows, window=512, seconds=seconds, **more)


if __name__ == "__main__":
    main()
