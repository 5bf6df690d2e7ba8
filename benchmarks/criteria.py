"""Which experts to prune: perplexity per domain by criterion at 25 % and 50 % pruned, random keep sets included.

    python benchmarks/criteria.py [--tokens 65536]

Two profiles: calibration on all four domains, and on Python alone. The models are small and undertrained: they can show
regressions and whether a criterion beats chance, not which criterion is best for a real model at 50 %.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from setting import bench_model, save, texts

from moepress.calibration.profile import Profile
from moepress.compress.pruning.scoring import Criterion, Selection, domain_weights, keep_sets, random_keep_sets
from moepress.models.forward.walk import Limits
from moepress.models.storage.checkpoint import open_checkpoint
from moepress.models.storage.experts import prune_source
from moepress.stages.evaluation import load_evaluation
from moepress.stages.places import Calibration, Machine, Output
from moepress.stages.profile import profile_stage
from moepress.validation.quality.measure import Subject, measure
from moepress.validation.quality.results import DOMAIN_MEAN

SEEDS = (0, 1, 2)


def profiles(folder: Path, tokens: int) -> dict[str, Profile]:
    """Calibration on all domains, and on one."""
    every = texts("train")
    one = tuple(t for t in every if t.startswith("python=")) or None
    made = {
        "all domains": profile_stage(
            str(bench_model()),
            Output(folder=folder / "all"),
            Calibration(domains=every, tokens=tokens if every else None, window=512),
            Machine(),
        )
    }
    if one:
        calibration = Calibration(domains=one, tokens=tokens, window=512)
        made["python"] = profile_stage(str(bench_model()), Output(folder=folder / "one"), calibration, Machine())
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=65_536)
    tokens = parser.parse_args().tokens
    base = open_checkpoint(bench_model())
    corpus = load_evaluation(
        bench_model(), (), texts("test"), window=512, max_windows=12, vocabulary=base.shape.vocabulary
    )
    rows = []
    with tempfile.TemporaryDirectory() as name:
        subjects = [Subject(label="original", source=base, folder=None, stored_bytes=0, parameters=0)]
        keys: dict[str, tuple[str, str, float]] = {}
        for calibration, profile in profiles(Path(name), tokens).items():
            weights = domain_weights(profile.domains, {})
            for share in (0.75, 0.5):
                count = round(base.shape.experts * share)
                count -= count % base.shape.groups
                sets = {
                    c.value: keep_sets(profile, Selection(criterion=c, count=count, weights=weights)) for c in Criterion
                }
                if calibration == "all domains":
                    selection = Selection(criterion=Criterion.REAP, count=count, weights=weights)
                    sets |= {f"random {seed}": random_keep_sets(profile, selection, seed) for seed in SEEDS}
                for criterion, keep in sets.items():
                    label = f"{calibration} / {criterion} / {share}"
                    keys[label] = (calibration, criterion, share)
                    source = prune_source(base, keep)
                    subjects.append(Subject(label=label, source=source, folder=None, stored_bytes=0, parameters=0))
        limits = Limits(memory_bytes=4 << 30, batch_windows=12)
        found = measure(
            subjects, corpus, device=torch.device("cpu"), dtype=torch.float32, limits=limits, scratch_folder=Path(name)
        )
    header = "".join(f"{d:>9s}" for d in found.domains)
    print(f"{'calibration':12s} {'criterion':10s} {'keep':>5s}{header} {'overall':>9s} {'change':>9s} +-")
    for subject in subjects:
        calibration, criterion, share = keys.get(subject.label, ("", "original", 1.0))
        overall = found.row(subject.label, DOMAIN_MEAN)
        domains = {d: found.row(subject.label, d).perplexity.value for d in found.domains}
        ratio = overall.paired.perplexity_ratio if overall.paired else None
        change, error = (ratio.value - 1, ratio.error) if ratio else (0.0, 0.0)
        rows.append(
            {
                "calibration": calibration,
                "criterion": criterion,
                "keep": share,
                "perplexity": overall.perplexity.value,
                "change": change,
                "change_error": error,
                "kl": overall.paired.kl.value if overall.paired else 0.0,
                "domains": domains,
            }
        )
        cells = "".join(f"{value:9.2f}" for value in domains.values())
        figures = f"{overall.perplexity.value:9.2f} {change:+9.1%} {error:.1%}"
        print(f"{calibration:12s} {criterion:10s} {share:5.0%}{cells} {figures}")
    save("criteria", rows, calibration_tokens=tokens, tokens=found.tokens, window=found.window)


if __name__ == "__main__":
    main()
