"""Whether a budget that is spent over experts and all else by measured divergence beats 8 bits for all else.

    python benchmarks/budget_parts.py [--tokens 16384] [--seeds 0,1]

For some sizes of the model three plans are made of one profile and pressed: `share`, the bits of experts by the error
of their output with attention, shared experts and dense MLPs at 8 bits (as from a profile without --grid-losses);
`fixed`, the same parts at 8 bits with experts' bits by divergence; `chosen`, the bits of these parts by divergence too.
KL is taken against the original on 6 windows of 512 tokens per domain of the test texts. Like plans are pressed once.
"""

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from setting import bench_model, save, texts

from moepress.calibration.profile import Profile
from moepress.compress.gptq.include import AUTO_BITS, IN_LAYERS
from moepress.compress.pruning.plan import Plan
from moepress.converters.safetensors.artifact import open_artifact
from moepress.models.forward.walk import Limits
from moepress.models.storage.checkpoint import open_checkpoint
from moepress.stages.evaluation import load_evaluation
from moepress.stages.places import Calibration, Machine, Output
from moepress.stages.plan import BudgetRequest, Wish, plan_within
from moepress.stages.profile import profile_stage
from moepress.stages.quantize import QuantizeRequest, quantize_stage
from moepress.validation.quality.measure import Subject, measure
from moepress.validation.quality.results import DOMAIN_MEAN

SIZES = ((15.0, False), (18.5, False), (15.0, True), (16.5, True), (17.5, True), (18.0, True))
"""MiB for the bench model's weights, and whether bits differ by layer."""


def plans(profile: Profile, mib: float, *, mixed: bool) -> dict[str, Plan]:
    """The three plans of a size."""
    request, wish = BudgetRequest(limit_bytes=int(mib * 2**20)), Wish(weights={}, mixed=mixed, auto=True)
    fixed = replace(wish, auto=False, include=dict.fromkeys(sorted(IN_LAYERS), AUTO_BITS))
    bare = replace(profile, kind_losses=())
    return {
        "share": plan_within(bare, request, wish),
        "fixed": plan_within(profile, request, fixed),
        "chosen": plan_within(profile, request, wish),
    }


def text_of(plan: Plan) -> str:
    """Experts, their bits, and those of parts."""
    assert plan.quantization is not None
    bits = ",".join(map(str, plan.layer_bits.values())) or str(plan.quantization.bits)
    return f"{plan.experts} at {bits}; " + ", ".join(f"{part.value} {n}" for part, n in plan.part_bits.items())


def measured(seed: int, tokens: int) -> list[dict[str, Any]]:
    """All sizes with the calibration text of one seed."""
    base = open_checkpoint(bench_model())
    corpus = load_evaluation(
        bench_model(), (), texts("test"), window=512, max_windows=6, vocabulary=base.shape.vocabulary
    )
    text = Calibration(domains=texts("train"), tokens=tokens, window=512, seed=seed)
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        profile = profile_stage(str(bench_model()), Output(folder=work / "profile"), text, Machine(), grid_losses=True)
        subjects = [Subject(label="original", source=base, folder=None, stored_bytes=0, parameters=0)]
        rows = list[dict[str, Any]]()
        for mib, mixed in SIZES:
            for kind, plan in plans(profile, mib, mixed=mixed).items():
                label = text_of(plan)
                row = next(row for row in plan.alternatives if row.chosen)
                rows.append({"seed": seed, "mib": mib, "mixed": mixed, "plan": kind, "label": label})
                rows[-1] |= {"estimate": row.loss, "unit": row.unit.value}
                if any(subject.label == label for subject in subjects):
                    continue
                assert plan.quantization is not None
                request = QuantizeRequest(
                    scheme=plan.quantization.scheme(), layer_bits=plan.layer_bits, include=plan.included
                )
                place = Output(folder=work / str(len(subjects)))
                quantize_stage(str(bench_model()), place, plan, request, text, Machine())
                source = open_artifact(place.folder)
                size = source.total_bytes
                assert size <= mib * 2**20, (size, mib)
                subjects.append(Subject(label=label, source=source, folder=None, stored_bytes=size, parameters=0))
        limits = Limits(memory_bytes=4 << 30, batch_windows=12)
        found = measure(
            subjects, corpus, device=torch.device("cpu"), dtype=torch.float32, limits=limits, scratch_folder=work
        )
    sizes = {subject.label: subject.stored_bytes for subject in subjects}
    for row in rows:
        paired = found.row(row["label"], DOMAIN_MEAN).paired
        assert paired is not None
        row |= {"bytes": sizes[row["label"]], "kl": paired.kl.value, "kl_error": paired.kl.error}
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--seeds", default="0,1")
    arguments = parser.parse_args()
    rows = [row for seed in arguments.seeds.split(",") for row in measured(int(seed), arguments.tokens)]
    for row in rows:
        print(
            f"{row['seed']} {row['mib']:5.1f} {'by layer' if row['mixed'] else 'uniform ':8s} {row['plan']:6s} "
            f"{row['bytes'] / 2**20:6.2f} MiB {row['estimate']:.2e} {row['unit']:5s} "
            f"{row['kl']:.5f} +- {row['kl_error']:.5f}  {row['label']}"
        )
    save("budget_parts", rows, calibration_tokens=arguments.tokens)


if __name__ == "__main__":
    main()
