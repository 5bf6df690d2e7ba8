"""What quantization costs on a trained model: round-to-nearest, plain GPTQ and moepress (twice) at 4, 3 and 2 bits.

    python benchmarks/quality.py [--bits 4 3 2]

Every Linear but router, kv_b_proj and lm_head; group size 64; 64 windows of 512 tokens of the train texts; perplexity
on 12 windows of 512 tokens per domain of the test texts; the overall figure is the mean over domains of log-perplexity.
Without ../shared the demo model and its embedded text are used.
"""

import argparse
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from setting import bench_model, save, texts

from moepress.calibration.hessian import HessianOptions, hessian_for
from moepress.compress.gptq.grid import absmax_scales, dequantize, round_to_nearest
from moepress.compress.gptq.include import Include, linear_groups
from moepress.compress.gptq.options import EFFORTS, SolverOptions
from moepress.converters.safetensors.artifact import open_artifact
from moepress.converters.safetensors.scheme import Scheme
from moepress.models.families.family import Part, part_of
from moepress.models.forward.walk import Limits
from moepress.models.storage.checkpoint import Checkpoint, SourceView, open_checkpoint
from moepress.stages.evaluation import load_evaluation
from moepress.stages.places import Calibration, Machine, Output
from moepress.stages.quantize import QuantizeRequest, quantize_stage
from moepress.validation.quality.measure import Subject, measure
from moepress.validation.quality.results import DOMAIN_MEAN

INCLUDE = frozenset({Include.ATTENTION, Include.SHARED, Include.DENSE})
PLAIN = SolverOptions(act_order=False, scale_search=False, sweeps=0, refits=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rounded(SourceView):
    """A checkpoint whose quantizable matrices are rounded to nearest with absmax scales, without calibration."""

    scheme: Scheme
    names: frozenset[str]

    def read(self, name: str) -> torch.Tensor:
        weight = self.base.read(name)
        if name not in self.names:
            return weight
        batch = weight.float().unsqueeze(0)
        scales = absmax_scales(batch, self.scheme, scale_dtype=weight.dtype)
        codes = round_to_nearest(batch, scales, self.scheme)
        return dequantize(codes, scales, self.scheme)[0].to(weight.dtype)

    def read_row(self, name: str, row: int) -> torch.Tensor:
        return self.read(name)[row] if name in self.names else self.base.read_row(name, row)


def rounded(base: Checkpoint, scheme: Scheme) -> Rounded:
    layers = base.shape.layers
    names = {n for layer in range(layers) for g in linear_groups(base, layer, layers, INCLUDE) for n in g.names}
    names |= {n for n in base.shapes if part_of(base.family, n, layers) is Part.ROUTED}
    return Rounded(base=base, scheme=scheme, names=frozenset(names))


def quantized(folder: Path, scheme: Scheme, solver: SolverOptions, hessian: HessianOptions, seed: int = 0) -> float:
    """Quantize the bench model into a folder; returns the seconds it took."""
    start = time.perf_counter()
    quantize_stage(
        str(bench_model()),
        Output(folder=folder),
        None,
        QuantizeRequest(scheme=scheme, include=INCLUDE, solver=solver, hessian=hessian),
        Calibration(domains=texts("train"), tokens=64 * 512, window=512, seed=seed),
        Machine(),
    )
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    bits = parser.parse_args().bits
    base = open_checkpoint(bench_model())
    corpus = load_evaluation(
        bench_model(), (), texts("test"), window=512, max_windows=12, vocabulary=base.shape.vocabulary
    )
    with tempfile.TemporaryDirectory() as name:
        subjects = [Subject(label="bf16", source=base, folder=None, stored_bytes=base.total_bytes, parameters=0)]
        seconds = {}
        for width in bits:
            scheme = Scheme(bits=width, group_size=64)
            label = f"round-to-nearest {width} bit"
            subjects.append(
                Subject(label=label, source=rounded(base, scheme), folder=None, stored_bytes=0, parameters=0)
            )
            methods = {
                "plain GPTQ": (PLAIN, HessianOptions(weight_power=0, shrinkage_tokens=0.0)),
                "moepress": (SolverOptions(), hessian_for("auto", width, {})),
                "moepress --effort max": (EFFORTS["max"], hessian_for("auto", width, {}, "max")),
            }
            for method, (solver, hessian) in methods.items():
                label, folder = f"{method} {width} bit", Path(name) / f"{len(seconds)}"
                seconds[label] = quantized(folder, scheme, solver, hessian)
                source = open_artifact(folder)
                size = source.total_bytes
                subjects.append(Subject(label=label, source=source, folder=folder, stored_bytes=size, parameters=0))
        limits = Limits(memory_bytes=4 << 30, batch_windows=12)
        found = measure(
            subjects, corpus, device=torch.device("cpu"), dtype=torch.float32, limits=limits, scratch_folder=Path(name)
        )
    rows = []
    before = found.row("bf16", DOMAIN_MEAN).perplexity.value
    for subject in subjects:
        row = found.row(subject.label, DOMAIN_MEAN)
        change = row.perplexity.value / before - 1
        error = row.paired.perplexity_ratio.error if row.paired else 0.0
        kl = row.paired.kl.value if row.paired else 0.0
        rows.append(
            {
                "method": subject.label,
                "perplexity": row.perplexity.value,
                "change": change,
                "change_error": error,
                "kl": kl,
                "bytes": subject.stored_bytes,
                "seconds": seconds.get(subject.label),
                "domains": {d: found.row(subject.label, d).perplexity.value for d in found.domains},
            }
        )
        took = f"  {seconds[subject.label]:5.1f} s" if subject.label in seconds else ""
        figures = f"perplexity {row.perplexity.value:8.3f}  {change:+8.2%} +- {error or 0:.2%}  KL {kl:.5f}"
        print(f"{subject.label:28s} {figures}{took}")
    save("quality", rows, tokens=found.tokens, window=found.window)


if __name__ == "__main__":
    main()
