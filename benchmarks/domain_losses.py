"""Which figure of a profile says best what a cut costs each domain, against the KL divergence that was measured.

    python benchmarks/domain_losses.py [--models bench demo] [--quick]

Per model one profile, and cuts to 75 % and 50 % of the experts: by several criteria, by chance, with one domain given
up and with one domain alone. Of every cut each domain has its candidates for a loss, and its measured KL divergence
from the original on held-out text. Printed are rank correlations over all (cut, domain), how often the worst domain of
a cut is named right, and how well "more than twice the mean of the other domains" agrees.
"""

import argparse
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from prune_setting import InMemory
from setting import save, texts, trained_model

from moepress.calibration.profile import Profile
from moepress.compress.pruning.scoring import Criterion, Selection, domain_weights, keep_sets, random_keep_sets
from moepress.models.forward.walk import Limits
from moepress.models.storage.checkpoint import open_checkpoint
from moepress.models.storage.experts import prune_source
from moepress.stages.places import Calibration, Machine, Output
from moepress.stages.profile import profile_stage
from moepress.stages.validate import load_evaluation
from moepress.validation.quality.measure import Subject, measure

WINDOW, TOKENS, WINDOWS = 512, 16_384, 4
Keep = Mapping[int, Sequence[int]]
FACTOR, LEAST = 2.0, 0.01


def shares(profile: Profile, kept: Keep, name: str, whole: str | None = None) -> dict[str, float]:
    """Per domain: what the removed experts have of an accumulator, over its sum or over a total; mean over layers."""
    found = np.zeros(len(profile.domains))
    for layer in profile.layers:
        mass = profile.statistics[layer][name].sum(axis=1)
        all_of_it = mass.sum(axis=1) if whole is None else profile.statistics[layer][whole].sum(axis=1)
        found += (mass.sum(axis=1) - mass[:, list(kept[layer])].sum(axis=1)) / np.maximum(all_of_it, 1e-300)
    return dict(zip(profile.domains, (found / len(profile.layers)).tolist(), strict=True))


CANDIDATES: Mapping[str, Callable[[Profile, Keep], dict[str, float]]] = {
    "gate mass": lambda profile, kept: shares(profile, kept, "gate"),
    "reap-sum mass": lambda profile, kept: shares(profile, kept, "weighted_norm"),
    "squared mass": lambda profile, kept: shares(profile, kept, "weighted_norm_squared"),
    "squared mass / output": lambda profile, kept: shares(profile, kept, "weighted_norm_squared", "routed_squared"),
    "leave-one-out mass": lambda profile, kept: shares(profile, kept, "leave_one_out"),
    "leave-one-out / output": lambda profile, kept: shares(profile, kept, "leave_one_out", "routed_squared"),
    "leave-one-out / residual": lambda profile, kept: shares(profile, kept, "leave_one_out", "residual_squared"),
}


def cuts(profile: Profile, count: int, *, quick: bool) -> Iterator[tuple[str, Keep]]:
    """Keep sets of one count, by name."""

    def by(criterion: Criterion, weights: Mapping[str, float]) -> Keep:
        every = domain_weights(profile.domains, weights)
        return keep_sets(profile, Selection(criterion=criterion, count=count, weights=every))

    for criterion in (
        (Criterion.REAP,) if quick else (Criterion.REAP, Criterion.REAP_SUM, Criterion.EASY_EP, Criterion.LOO)
    ):
        yield f"{criterion}", by(criterion, {})
    for domain in profile.domains[: 1 if quick else None]:
        for criterion in (Criterion.REAP, Criterion.EASY_EP):
            yield f"{criterion}, {domain} given up", by(criterion, {domain: 0.0})
            yield f"{criterion}, {domain} alone", by(criterion, {d: 0.0 for d in profile.domains if d != domain})
    plain = Selection(criterion=Criterion.REAP, count=count, weights=domain_weights(profile.domains, {}))
    for seed in range(1 if quick else 2):
        yield f"random {seed}", random_keep_sets(profile, plain, seed)


def rows_of(name: str, work: Path, *, quick: bool) -> list[dict[str, Any]]:
    """Every cut of a model with what each domain loses, by every candidate and measured."""
    folder = trained_model(name)
    given = Calibration(domains=texts("train"), tokens=TOKENS if texts("train") else None, window=WINDOW)
    profile = profile_stage(str(folder), Output(folder=work / name), given, Machine(), bit_losses=False)
    disk = open_checkpoint(folder)
    base, rows, subjects = InMemory(base=disk), list[dict[str, Any]](), list[Subject]()
    for share in (0.5,) if quick else (0.75, 0.5):
        count = round(disk.shape.experts * share)
        count -= count % disk.shape.groups
        for cut, kept in cuts(profile, count, quick=quick):
            source = prune_source(base, kept)
            subjects.append(Subject(label=str(len(rows)), source=source, folder=None, stored_bytes=0, parameters=0))
            losses = {candidate: function(profile, kept) for candidate, function in CANDIDATES.items()}
            rows.append({"model": name, "keep": share, "cut": cut, "losses": losses})
    corpus = load_evaluation(
        folder, (), texts("test"), window=WINDOW, max_windows=1 if quick else WINDOWS, vocabulary=disk.shape.vocabulary
    )
    original = Subject(label="original", source=base, folder=None, stored_bytes=0, parameters=0)
    limits = Limits(memory_bytes=4 << 30, batch_windows=12)
    found = measure(
        [original, *subjects],
        corpus,
        device=torch.device("cpu"),
        dtype=torch.float32,
        limits=limits,
        scratch_folder=work / f"{name}-eval",
    )
    for number, row in enumerate(rows):
        paired = {d: found.row(str(number), d).paired for d in found.domains}
        row["kl"] = {d: p.kl.value for d, p in paired.items() if p is not None}
        row["perplexity"] = {d: p.perplexity_ratio.value - 1 for d, p in paired.items() if p is not None}
    return rows


def ranks(values: Sequence[float]) -> "np.ndarray[Any, Any]":
    """Places in ascending order; of equal values the mean."""
    array = np.asarray(values)
    return np.array([((array < v).sum() + (array <= v).sum() - 1) / 2 for v in array])


def spearman(one: Sequence[float], other: Sequence[float]) -> float:
    """Rank correlation."""
    return float(np.corrcoef(ranks(one), ranks(other))[0, 1])


def others(losses: Mapping[str, float], domain: str, least: float = 0.0) -> float:
    """The mean of all other domains."""
    found = [loss for name, loss in losses.items() if name != domain]
    return max(sum(found) / len(found), least)


def agreement(rows: Sequence[Mapping[str, Any]], candidate: str, measured: str) -> dict[str, float]:
    """How a candidate agrees with what was measured, over the cuts of one model."""
    pairs = [(row["losses"][candidate], row[measured]) for row in rows]
    flat = [(loss[d], real[d]) for loss, real in pairs for d in real]
    within = [(loss[d] / others(loss, d, LEAST), real[d] / others(real, d, 1e-9)) for loss, real in pairs for d in real]
    called = [(one > FACTOR, other > FACTOR) for one, other in within]
    worst = [max(loss, key=lambda d: loss[d]) == max(real, key=lambda d: real[d]) for loss, real in pairs]
    return {
        "all": spearman(*zip(*flat, strict=True)),
        "relative": spearman(*zip(*within, strict=True)),
        "worst": float(np.mean(worst)),
        "lost": sum(other for _, other in called),
        "found": sum(one and other for one, other in called),
        "wrongly": sum(one and not other for one, other in called),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["bench", "demo"])
    parser.add_argument("--quick", action="store_true", help="a test of the script; nothing is written")
    given = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as work:
        for name in given.models:
            rows += rows_of(name, Path(work), quick=given.quick)
            print(f"{name}: measured", flush=True)
    print("| model | loss by | all | relative to the others | worst domain right | lost | found | wrongly |")
    print("|---|---|---:|---:|---:|---:|---:|---:|")
    for name in given.models:
        own = [row for row in rows if row["model"] == name]
        for candidate in CANDIDATES:
            a = agreement(own, candidate, "kl")
            figures = f"{a['all']:.2f} | {a['relative']:.2f} | {a['worst']:.0%}"
            print(f"| {name} | {candidate} | {figures} | {a['lost']:.0f} | {a['found']:.0f} | {a['wrongly']:.0f} |")
    if not given.quick:
        save("domain_losses", rows, tokens=TOKENS, window=WINDOW, windows=WINDOWS)


if __name__ == "__main__":
    main()
