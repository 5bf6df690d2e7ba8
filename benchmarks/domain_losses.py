"""Which figure of a profile says best what a cut costs each domain, against the KL divergence that was measured.

    python benchmarks/domain_losses.py [--models bench demo wide] [--quick] [--tables]

Per model one profile, and cuts to 75 % and 50 % of the experts, or the next legal count below: by several criteria,
by chance, with one domain given up and with one domain alone. Of every cut each domain has its candidates for a loss,
and its measured KL divergence from the original on held-out text. Printed are, for every candidate m and for its
damage m / (1 - m): the rank correlation with KL over all (cut, domain); the correlation of the logarithms of "so many
times the mean of the other domains"; how often the worst domain of a cut is named right; and of the domains whose KL
is more than twice the mean of the others how many are found, and how many are called so wrongly. A second table has
KL and perplexity over the damage by reap-sum mass, which `plan` projects by. A model that is measured takes its place
in the results; others stay.
"""

import argparse
import itertools
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from prune_setting import InMemory, count_of
from setting import RESULTS, save, texts, trained_model

from moepress.calibration.profile import Profile
from moepress.compress.pruning.domains import FACTOR, LEAST, damage
from moepress.compress.pruning.scoring import Criterion, Selection, domain_weights, keep_sets, random_keep_sets
from moepress.models.forward.walk import Limits
from moepress.models.storage.checkpoint import open_checkpoint
from moepress.models.storage.experts import prune_source
from moepress.stages.evaluation import load_evaluation
from moepress.stages.places import Calibration, Machine, Output
from moepress.stages.profile import profile_stage
from moepress.validation.quality.measure import Subject, measure

WINDOW, TOKENS, WINDOWS = 512, 16_384, 4
Keep = Mapping[int, Sequence[int]]


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
        count = count_of(disk, share)
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


def agreement(rows: Sequence[Mapping[str, Any]], candidate: str, form: Callable[[float], float]) -> dict[str, float]:
    """How a form of a candidate agrees with the KL divergence, over the cuts of one model."""
    pairs = [({d: form(loss) for d, loss in row["losses"][candidate].items()}, row["kl"]) for row in rows]
    flat = [(loss[d], real[d]) for loss, real in pairs for d in real]
    within = [(loss[d] / others(loss, d, LEAST), real[d] / others(real, d)) for loss, real in pairs for d in real]
    logs = np.log(np.maximum(np.array(within), 1e-3))
    worst = [max(loss, key=lambda d: loss[d]) == max(real, key=lambda d: real[d]) for loss, real in pairs]
    return {
        "all": spearman(*zip(*flat, strict=True)),
        "relative": float(np.corrcoef(logs.T)[0, 1]),
        "slope": float(np.polyfit(logs[:, 0], logs[:, 1], 1)[0]),
        "worst": float(np.mean(worst)),
        "lost": sum(real > FACTOR for _, real in within),
        "found": sum(loss > FACTOR and real > FACTOR for loss, real in within),
        "wrongly": sum(loss > FACTOR >= real for loss, real in within),
    }


FORMS: Mapping[str, Callable[[float], float]] = {"m": lambda m: m, "m / (1 - m)": damage}


def tables(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Both tables, as Markdown."""
    yield "| model | m | as | all | relative to the others | slope | worst domain right | found | wrongly |"
    yield "|---|---|---|---:|---:|---:|---:|---:|---:|"
    models = list(dict.fromkeys(row["model"] for row in rows))
    for name, candidate, form in itertools.product(models, CANDIDATES, FORMS):
        if form == "m" or "/" not in candidate:  # a share of another figure is none of its own sum
            a = agreement([row for row in rows if row["model"] == name], candidate, FORMS[form])
            figures = f"{a['all']:.2f} | {a['relative']:.2f} | {a['slope']:.2f} | {a['worst']:.0%}"
            called = f"{a['found']:.0f} of {a['lost']:.0f} | {a['wrongly']:.0f}"
            yield f"| {name} | {candidate} | {form} | {figures} | {called} |"
    yield ""
    yield "| model | experts | cut | damage | KL | perplexity | KL / damage | perplexity / damage |"
    yield "|---|---:|---|---:|---:|---:|---:|---:|"
    disks = {name: open_checkpoint(trained_model(name)) for name in models}
    for row in rows:
        if "," not in row["cut"] and "random" not in row["cut"]:
            disk = disks[row["model"]]
            lost = float(np.mean([damage(m) for m in row["losses"]["reap-sum mass"].values()]))
            kl, rise = (float(np.mean(list(row[what].values()))) for what in ("kl", "perplexity"))
            figures = f"{lost:.3f} | {kl:.4f} | {rise:+.1%} | {kl / lost:.3f} | {rise / lost:.3f}"
            experts = f"{count_of(disk, row['keep'])} of {disk.shape.experts}"
            yield f"| {row['model']} | {experts} | {row['cut']} | {figures} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["bench", "demo", "wide"])
    parser.add_argument("--quick", action="store_true", help="a test of the script; nothing is written")
    parser.add_argument("--tables", action="store_true", help="measure nothing; print the last results as Markdown")
    given = parser.parse_args()
    file = RESULTS / "domain_losses.json"
    rows = json.loads(file.read_text())["rows"] if file.exists() and not given.quick else []
    with tempfile.TemporaryDirectory() as work:
        for name in () if given.tables else given.models:
            made = rows_of(name, Path(work), quick=given.quick)
            rows = [row for row in rows if row["model"] != name] + made
            print(f"{name}: measured", flush=True)
            if not given.quick:
                save("domain_losses", rows, tokens=TOKENS, window=WINDOW, windows=WINDOWS)
    print("\n".join(tables(rows)))


if __name__ == "__main__":
    main()
