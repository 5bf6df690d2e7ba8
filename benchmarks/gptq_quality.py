"""GPTQ beside the peers: what quantization costs on a trained model, and what each of moepress's options is worth.

    python benchmarks/gptq_quality.py [--model bench|wide|demo] [--only peers|options] [--bits 4 3] [--seeds 0 1 2]
        [--work FOLDER]

The bench model (without ../shared the demo) or --model, every Linear but router, kv_b_proj and lm_head, group size 64,
64 windows of 512 tokens of the train texts. A seed chooses the windows; all tools get the same ones. Measured on 12
windows of 512 tokens per domain of the test texts, by one code for all tools: codes times scales in fp32, the forward
in fp32. The overall figure is the mean over domains of log-perplexity. With --work the peers' outputs stay there and
are taken again in the next run; moepress is always run. AutoRound's learned rounding (--tools moepress autoround, or
autoround-light) takes half an hour a seed and is no default; what it gave stays in the file when others are measured
again. The file has the bench model's figures at its top, another --model's under its name. --quick is the demo (or
--model) with little text, to try the script.
"""

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from float_rounding import RoundedFloats
from peer_weights import check_reading, open_exact, quantized_names
from quantizers import INCLUDE, NAMES, OWN, QUICK, TOOLS, Task, available, run_tool, write_windows
from setting import RESULTS, TRAINED, bench_model, machine, texts, trained_model

from moepress.calibration.corpus import EvaluationCorpus
from moepress.calibration.hessian import END_TOKENS, HessianOptions
from moepress.compress.gptq.include import Include
from moepress.compress.gptq.options import EFFORTS, SolverOptions
from moepress.converters.safetensors.scheme import Codes, Scheme
from moepress.models.forward.walk import Limits
from moepress.models.storage.checkpoint import open_checkpoint
from moepress.stages.evaluation import load_evaluation
from moepress.stages.places import Calibration, Machine, Output, model_folder
from moepress.stages.quantize import QuantizeRequest, quantize_stage
from moepress.validation.quality.measure import Subject, measure
from moepress.validation.quality.results import DOMAIN_MEAN, Quality


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """A row of the table of options: what it sets in SolverOptions, HessianOptions, Scheme and QuantizeRequest; or
    4-bit floats that compressed-tensors rounds to nearest."""

    name: str
    rounded: Codes | None = None
    solver: dict[str, Any] = field(default_factory=dict)
    hessian: dict[str, Any] = field(default_factory=dict)
    scheme: dict[str, Any] = field(default_factory=dict)
    request: dict[str, Any] = field(default_factory=dict)


DEFAULT = Variant(name="default")  # at all bits with --match own, which --match auto takes for 4 bits and more
HIGH = {"refits": EFFORTS["high"].refits, "annealed": EFFORTS["high"].annealed}
MAX = {"asymmetry": 1.0, "end_tokens": END_TOKENS}
VARIANTS = (
    Variant(name="act_order off", solver={"act_order": False}),
    Variant(name="scale_search off", solver={"scale_search": False}),
    Variant(name="effort fast", solver={"refits": 0}),
    Variant(name="effort high", solver=HIGH),
    Variant(name="sweeps 0", solver={"sweeps": 0}),
    Variant(name="sweeps 1", solver={"sweeps": 1}),
    Variant(name="sweeps 2", solver={"sweeps": 2}),
    Variant(name="weight_power 1", hessian={"weight_power": 1}),
    Variant(name="weight_power 2", hessian={"weight_power": 2}),
    Variant(name="shrinkage 0", hessian={"shrinkage_tokens": 0.0}),
    Variant(name="shrinkage 512", hessian={"shrinkage_tokens": 512.0}),
    Variant(name="least tokens 512", hessian={"least_tokens": 512}),
    Variant(name="damp 0.01", solver={"damp": 0.01}),
    Variant(name="damp 0.1", solver={"damp": 0.1}),
    Variant(name="match original", hessian={"asymmetry": 1.0}),
    Variant(name="match original, effort high", hessian={"asymmetry": 1.0}, solver=HIGH),
    Variant(name="match original, effort max", hessian=MAX, solver={"annealed": EFFORTS["max"].annealed}),
    Variant(name="independent layers", hessian={"asymmetry": 1.0, "independent": True}),
    Variant(name="independent layers, match own", hessian={"independent": True}),
    Variant(name="match original, refits 4", hessian={"asymmetry": 1.0}, solver={"refits": 4}),
    Variant(name="positive scales", solver={"signed": False}),
    Variant(name="int4 g32", request={"scheme": Scheme(bits=4, group_size=32)}),
    Variant(name="int4 g16", request={"scheme": Scheme(bits=4, group_size=16)}),
    Variant(name="nvfp4", solver={"signed": False}, request={"scheme": Scheme.of_floats(Codes.NVFP4)}),
    Variant(name="mxfp4", solver={"signed": False}, request={"scheme": Scheme.of_floats(Codes.MXFP4)}),
    Variant(name="nvfp4, nearest", rounded=Codes.NVFP4),
    Variant(name="mxfp4, nearest", rounded=Codes.MXFP4),
    Variant(name="asymmetric", scheme={"symmetric": False}),
    Variant(name="asymmetric, match original", scheme={"symmetric": False}, hessian={"asymmetry": 1.0}),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """Model and texts of a run; `windows` and `evaluation_windows` are counts, the latter per domain."""

    model: Path
    group_size: int
    window: int
    windows: int
    evaluation_windows: int
    train: tuple[str, ...]
    test: tuple[str, ...]
    threads: int

    def calibration(self, seed: int) -> Calibration:
        return Calibration(domains=self.train, tokens=self.windows * self.window, window=self.window, seed=seed)

    def evaluation(self) -> EvaluationCorpus:
        vocabulary = open_checkpoint(self.model).shape.vocabulary
        return load_evaluation(
            self.model, (), self.test, window=self.window, max_windows=self.evaluation_windows, vocabulary=vocabulary
        )


def full(threads: int) -> Setting:
    sizes = {"group_size": 64, "window": 512, "windows": 64, "evaluation_windows": 12}
    return Setting(model=bench_model(), train=texts("train"), test=texts("test"), threads=threads, **sizes)


def quick(threads: int) -> Setting:
    sizes = {"group_size": 32, "window": 128, "windows": 8, "evaluation_windows": 2}
    return Setting(model=model_folder("demo"), train=(), test=(), threads=threads, **sizes)


def scores(subjects: Sequence[Subject], corpus: EvaluationCorpus, scratch: Path) -> Quality:
    """All subjects on all windows; the first one is the reference."""
    limits = Limits(memory_bytes=4 << 30, batch_windows=12)
    return measure(
        subjects, corpus, device=torch.device("cpu"), dtype=torch.float32, limits=limits, scratch_folder=scratch
    )


def original(setting: Setting) -> Subject:
    base = open_checkpoint(setting.model)
    return Subject(label="original", source=base, folder=None, stored_bytes=base.total_bytes, parameters=0)


def subject(label: str, folder: Path) -> Subject:
    """A quantized folder, once its reading is checked."""
    artifact = open_exact(folder)
    check_reading(artifact)
    return Subject(label=label, source=artifact, folder=None, stored_bytes=artifact.total_bytes, parameters=0)


def figures(found: Quality, one: Subject) -> dict[str, Any]:
    """A subject's figures against the original; an error is one standard error, paired over windows."""
    row = found.row(one.label, DOMAIN_MEAN)
    assert row.paired is not None
    return {
        "perplexity": row.perplexity.value,
        "log_change": row.paired.delta_nll.value,
        "log_change_error": row.paired.delta_nll.error,
        "kl": row.paired.kl.value,
        "kl_error": row.paired.kl.error,
        "same_top1": row.paired.same_top1.value,
        "bytes": one.stored_bytes,
        "domains": {d: found.row(one.label, d).perplexity.value for d in found.domains},
    }


def peer_runs(setting: Setting, tools: list[str], bits: int, seed: int, work: Path) -> list[dict[str, Any]]:
    """All tools on the windows of a seed, and each against moepress on the same test windows."""
    scheme = Scheme(bits=bits, group_size=setting.group_size)
    calibration = setting.calibration(seed)
    task = Task(model=setting.model, scheme=scheme, calibration=calibration, threads=setting.threads)
    windows = work / f"windows-{seed}.safetensors"
    digest = write_windows(task, windows).digest
    subjects, ran = [], {}
    for tool in tools:
        folder = work / f"{tool}-{setting.model.name}-{bits}-{seed}-{digest[:12]}"
        ran[tool] = quantized_by(tool, task, folder, windows)
        subjects.append(subject(tool, folder))
        print(f"{bits} bits, seed {seed}: {NAMES[tool]} quantized", file=sys.stderr, flush=True)
    require_same_matrices(subjects)
    corpus = setting.evaluation()
    found = scores([original(setting), *subjects], corpus, work)
    over = scores(subjects, corpus, work) if len(subjects) > 1 else None
    rows = []
    for one in subjects:
        row = {"tool": one.label, "version": ran[one.label]["version"], "bits": bits, "seed": seed, "windows": digest}
        row |= figures(found, one) | {"perplexity_before": found.row("original", DOMAIN_MEAN).perplexity.value}
        against = over.row(one.label, DOMAIN_MEAN).paired if over and tools[0] == "moepress" else None
        if against is not None:
            row["log_over_moepress"] = against.delta_nll.value
            row["log_over_moepress_error"] = against.delta_nll.error
        rows.append(row)
    return rows


def quantized_by(tool: str, task: Task, folder: Path, windows: Path) -> dict[str, Any]:
    """Run a tool, or take the output of a peer that is there from before; only a finished run has the file DONE."""
    done = folder / "DONE.json"
    if tool not in OWN and done.exists():
        said: dict[str, Any] = json.loads(done.read_text())
        return said
    shutil.rmtree(folder, ignore_errors=True)
    said = run_tool(tool, task, folder, windows)
    done.write_text(json.dumps(said))
    return said


def require_same_matrices(subjects: Sequence[Subject]) -> None:
    """All tools must have quantized the same matrices."""
    sets = {one.label: quantized_names(one.source) for one in subjects}  # type: ignore[arg-type]
    first = next(iter(sets.values()))
    for label, names in sets.items():
        if names != first:
            raise SystemExit(f"{label} quantized other matrices, such as {sorted(names ^ first)[:3]}")


def option_runs(
    setting: Setting, variants: Sequence[Variant], bits: int, seed: int, work: Path
) -> list[dict[str, Any]]:
    """Every variant of moepress on the windows of a seed."""
    scheme = Scheme(bits=bits, group_size=setting.group_size)
    subjects, seconds = list[Subject](), {}
    for variant in variants:
        if variant.rounded is not None:
            like = next(one for one in subjects if one.label == variant.rounded)
            base, names = open_checkpoint(setting.model), quantized_names(like.source)  # type: ignore[arg-type]
            source = RoundedFloats(base=base, codes=variant.rounded, names=frozenset(names))
            subjects.append(replace(like, label=variant.name, source=source))
            seconds[variant.name] = 0.0
            continue
        folder = work / f"option-{len(subjects)}"
        shutil.rmtree(folder, ignore_errors=True)
        request = QuantizeRequest(
            **{"scheme": replace(scheme, **variant.scheme), **variant.request},
            include=frozenset(Include(part) for part in INCLUDE),
            solver=SolverOptions(**variant.solver),
            hessian=HessianOptions(**variant.hessian),
        )
        start = time.perf_counter()
        quantize_stage(str(setting.model), Output(folder=folder), None, request, setting.calibration(seed), Machine())
        seconds[variant.name] = time.perf_counter() - start
        subjects.append(subject(variant.name, folder))
    found = scores([original(setting), *subjects], setting.evaluation(), work)
    rows = []
    for one in subjects:
        rows.append({"option": one.label, "bits": bits, "seed": seed, **figures(found, one)})
        rows[-1] |= {"seconds": seconds[one.label]}
    print(f"{bits} bits, seed {seed}: {len(subjects)} variants", file=sys.stderr, flush=True)
    return rows


def spread(values: Sequence[float]) -> dict[str, float | None]:
    """Mean and standard deviation over seeds."""
    return {"mean": statistics.mean(values), "spread": statistics.stdev(values) if len(values) > 1 else None}


def summary(runs: Sequence[dict[str, Any]], key: str, first: str) -> list[dict[str, Any]]:
    """One row for each bits and tool or option: over seeds, also the difference from the first of the same seed."""
    rows = []
    for bits, name in dict.fromkeys((run["bits"], run[key]) for run in runs):
        own = [run for run in runs if (run["bits"], run[key]) == (bits, name)]
        base = {run["seed"]: run for run in runs if (run["bits"], run[key]) == (bits, first)}
        row: dict[str, Any] = {key: name, "bits": bits, "seeds": len(own)}
        for figure in ("perplexity", "log_change", "log_change_error", "kl", "kl_error", "bytes"):
            row[figure] = spread([run[figure] for run in own])
        if len(base) == len(own):
            for figure in ("log_change", "kl"):
                row[f"{figure}_over_{first}"] = spread([run[figure] - base[run["seed"]][figure] for run in own])
        errors = [run["log_over_moepress_error"] for run in own if run.get("log_over_moepress_error") is not None]
        if errors:
            row["log_over_moepress_error"] = spread(errors)
        rows.append(row)
    return rows


def said(figure: dict[str, float | None] | None, scale: float, digits: int, sign: str = "+") -> str:
    """Mean and spread over seeds, times `scale`."""
    if figure is None or figure["mean"] is None:
        return ""
    text = f"{scale * figure['mean']:{sign}.{digits}f}"
    return text if figure["spread"] is None else f"{text} ± {scale * figure['spread']:.{digits}f}"


def table(rows: Sequence[dict[str, Any]], key: str, first: str) -> str:
    """Markdown: per cent of perplexity (100 times the change of its logarithm), and KL in thousandths of a nat."""
    lines = [
        f"| bits | {key} | perplexity, % | error, % | KL, 1e-3 | error | % over {first} | KL over {first}, 1e-3 | MB |",
        "|---:|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        own = row[key] == first
        cells = [
            said(row["log_change"], 100, 3),
            said({**row["log_change_error"], "spread": None}, 100, 3, ""),
            said(row["kl"], 1000, 2, ""),
            said({**row["kl_error"], "spread": None}, 1000, 2, ""),
            "" if own else said(row.get(f"log_change_over_{first}"), 100, 3),
            "" if own else said(row.get(f"kl_over_{first}"), 1000, 2),
            f"{row['bytes']['mean'] / 1e6:.2f}",
        ]
        lines.append(f"| {row['bits']} | {NAMES.get(row[key], row[key])} | {' | '.join(cells)} |")
    return "\n".join(lines)


def write(
    file: Path | None, under: str | None, section: str, runs: list[dict[str, Any]], first: str, key: str, about: Any
) -> None:
    """Put runs into a section of the file; those of other bits, seeds and tools stay, and so do all other sections.

    The default model's sections are the document's own, those of another one lie `under` its name.
    """
    if file is None:
        return
    document = json.loads(file.read_text()) if file.exists() else {}
    sections = document if under is None else document.setdefault(under, {})
    new = {(run[key], run["bits"], run["seed"]) for run in runs}
    before = sections.get(section, {}).get("runs", [])
    runs = [run for run in before if (run[key], run["bits"], run["seed"]) not in new] + runs
    on = {**machine(), "model": about["model"]}
    sections[section] = {"machine": on, **about, "rows": summary(runs, key, first), "runs": runs}
    file.write_text(json.dumps(document, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=TRAINED, help="of ../shared (default: bench; with --quick demo)")
    parser.add_argument("--only", choices=["peers", "options"])
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=QUICK, help=f"default: {' '.join(QUICK)}")
    parser.add_argument("--options", nargs="+", help="names of rows of the table of options (default: all)")
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--work", type=Path, help="folder for outputs; the peers' are taken again from there")
    parser.add_argument("--quick", action="store_true", help="the demo with little text")
    parser.add_argument("--json", type=Path, help="file (default: benchmarks/results/gptq_quality.json)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    setting = (quick if options.quick else full)(options.threads)
    if options.model is not None:
        setting = replace(setting, model=trained_model(options.model))
    under = None if options.model == "bench" else options.model
    file = options.json or (None if options.quick else RESULTS / "gptq_quality.json")
    about = {"group_size": setting.group_size, "calibration_tokens": setting.windows * setting.window}
    about |= {"window": setting.window, "evaluation_windows": setting.evaluation_windows, "model": setting.model.name}
    chosen = [v for v in VARIANTS if options.options is None or v.name in options.options]
    tools = available(options.tools)
    cases = [(bits, seed) for bits in options.bits for seed in options.seeds]
    with tempfile.TemporaryDirectory(prefix="gptq-quality-") as name:
        work = options.work or Path(name)
        work.mkdir(parents=True, exist_ok=True)
        runs: list[dict[str, Any]] = []
        for bits, seed in cases if options.only != "options" else []:
            runs += peer_runs(setting, tools, bits, seed, work.resolve())
            write(file, under, "peers", runs, "moepress", "tool", about)  # after each: the next may take minutes
        if runs:
            print(table(summary(runs, "tool", "moepress"), "tool", "moepress"), flush=True)
        runs = []
        for bits, seed in cases if options.only != "peers" else []:
            runs += option_runs(setting, [DEFAULT, *chosen], bits, seed, Path(name))
            write(file, under, "options", runs, "default", "option", about)
        if runs:
            print(table(summary(runs, "option", "default"), "option", "default"))


if __name__ == "__main__":
    main()
