"""Whether the loss that `plan --budget` estimates puts results in the order of their measured damage.

    python benchmarks/budget_order.py [--tokens 32768]

Several (experts, bits) of one model, and bits by layer at the bytes of some, are planned, quantized and compared with
the original on 6 windows of 512 tokens per domain of the test texts. Printed: the rank correlation (Spearman) of the
estimates with the KL divergences, and of pairs at nearly equal bytes how many are in the right order.
"""

import argparse
import tempfile
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import torch
from setting import bench_model, save, texts

from moepress.calibration.hessian import hessian_for
from moepress.calibration.profile import Profile
from moepress.compress.budget.damage import PRUNING_WEIGHT, space_of
from moepress.compress.pruning.plan import Plan
from moepress.compress.pruning.scoring import Selection, keep_sets
from moepress.converters.safetensors.artifact import open_artifact
from moepress.models.families.family import legal_counts
from moepress.models.forward.walk import Limits
from moepress.models.storage.checkpoint import open_checkpoint
from moepress.stages.evaluation import load_evaluation
from moepress.stages.places import Calibration, Machine, Output
from moepress.stages.plan import BudgetRequest, Wish, plan_within
from moepress.stages.profile import profile_stage
from moepress.stages.quantize import QuantizeRequest, quantize_stage
from moepress.validation.quality.measure import Subject, measure
from moepress.validation.quality.results import DOMAIN_MEAN

NEAR = 0.1  # of the bytes: pairs that a budget has to choose between


def ranks(values: list[float]) -> torch.Tensor:
    order = sorted(range(len(values)), key=lambda n: values[n])
    found = torch.zeros(len(values), dtype=torch.float64)
    found[torch.tensor(order)] = torch.arange(len(values), dtype=torch.float64)
    return found


def spearman(first: list[float], second: list[float]) -> float:
    return float(torch.corrcoef(torch.stack((ranks(first), ranks(second))))[0, 1])


def plans(profile: Profile) -> dict[str, Plan]:
    """Uniform plans over the useful range, and bits by layer at the bytes of all experts at 3 and at 2.5 bits."""
    every = [n for n in legal_counts(profile.shape) if 2 * n >= profile.shape.experts]
    most, middle, least = every[-1], every[len(every) // 2], every[0]
    wanted = [
        (most, 4),
        (most, 3),
        (most, 2),
        (middle, 8),
        (middle, 4),
        (middle, 3),
        (middle, 2),
        (least, 8),
        (least, 4),
    ]
    large = BudgetRequest(limit_bytes=1 << 50)
    made = {
        f"{count} at {bits}": plan_within(profile, large, Wish(experts=count, widths=(bits,), weights={}))
        for count, bits in wanted
    }
    two, three = (made[f"{most} at {bits}"].sizes.after_bytes for bits in (2, 3))
    for name, limit in (("3", three), ("2.5", (two + three) // 2)):
        wish = Wish(experts=most, mixed=True, weights={})
        made[f"{most} by layer, bytes of {name}"] = plan_within(profile, BudgetRequest(limit_bytes=limit), wish)
    return made


def pruning_losses(profile: Profile, plans: list[Plan]) -> dict[int, float]:
    """What of the estimates is by the experts that go, by count."""
    selection = Selection(criterion=plans[0].criterion, count=1, weights=plans[0].domain_weights)
    counts = sorted({plan.experts for plan in plans})
    kept = {count: keep_sets(profile, replace(selection, count=count)) for count in counts}
    return dict(space_of(profile, kept, weights=selection.weights, widths=(None,), group_size=-1).pruned)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=32_768)
    tokens = parser.parse_args().tokens
    base = open_checkpoint(bench_model())
    corpus = load_evaluation(
        bench_model(), (), texts("test"), window=512, max_windows=6, vocabulary=base.shape.vocabulary
    )
    text = Calibration(domains=texts("train"), tokens=tokens, window=512)
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        profile = profile_stage(str(bench_model()), Output(folder=work / "profile"), text, Machine())
        made = plans(profile)
        subjects = [Subject(label="original", source=base, folder=None, stored_bytes=0, parameters=0)]
        for number, (label, plan) in enumerate(made.items()):
            assert plan.quantization is not None
            scheme, layer_bits = plan.quantization.scheme(), plan.layer_bits
            hessian = hessian_for("auto", scheme.bits, layer_bits)
            request = QuantizeRequest(scheme=scheme, layer_bits=layer_bits, hessian=hessian)
            place = Output(folder=work / str(number))
            quantize_stage(str(bench_model()), place, plan, request, text, Machine())
            source = open_artifact(place.folder)
            size = source.total_bytes
            assert size <= plan.sizes.after_bytes, (size, plan.sizes.after_bytes)
            subjects.append(Subject(label=label, source=source, folder=None, stored_bytes=size, parameters=0))
            print(f"{label}: {size / 2**20:.2f} MiB", flush=True)
        limits = Limits(memory_bytes=4 << 30, batch_windows=12)
        found = measure(
            subjects, corpus, device=torch.device("cpu"), dtype=torch.float32, limits=limits, scratch_folder=work
        )
    rows = []
    pruned = pruning_losses(profile, list(made.values()))
    print(f"{'experts at bits':28s} {'MiB':>7s} {'estimate':>9s} {'KL':>16s} {'perplexity':>10s}")
    for subject in subjects[1:]:
        paired = found.row(subject.label, DOMAIN_MEAN).paired
        assert paired is not None
        plan = made[subject.label]
        loss = next(row.loss for row in plan.alternatives if row.chosen)
        row = {
            "label": subject.label,
            "bytes": subject.stored_bytes,
            "layer_bits": plan.layer_bits,
            "estimated_loss": loss,
            "unweighted_loss": loss - pruned[plan.experts] * (1 - 1 / PRUNING_WEIGHT),
            "kl": paired.kl.value,
            "kl_error": paired.kl.error,
            "change": paired.perplexity_ratio.value - 1,
        }
        rows.append(row)
        kl = f"{row['kl']:.4f} +- {row['kl_error']:.4f}"
        size = subject.stored_bytes / 2**20
        print(f"{subject.label:28s} {size:7.2f} {row['estimated_loss']:9.3%} {kl:>16s} {row['change']:+10.2%}")
    rows.sort(key=lambda row: row["kl"])
    kls = [row["kl"] for row in rows]
    correlation, plain = (spearman([row[key] for row in rows], kls) for key in ("estimated_loss", "unweighted_loss"))
    near = [(a, b) for a, b in combinations(rows, 2) if abs(a["bytes"] - b["bytes"]) <= NEAR * b["bytes"]]
    right = sum(a["estimated_loss"] <= b["estimated_loss"] for a, b in near)
    print(f"Spearman {correlation:.3f}, without the weight of pruning {plain:.3f}")
    print(f"{right} of {len(near)} pairs within {NEAR:.0%} of each other's bytes in order")
    more = {"calibration_tokens": tokens, "tokens": found.tokens, "window": found.window}
    more |= {"spearman": correlation, "spearman_unweighted": plain}
    save("budget_order", rows, near_pairs=len(near), near_pairs_in_order=right, **more)


if __name__ == "__main__":
    main()
