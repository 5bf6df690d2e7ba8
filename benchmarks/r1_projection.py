"""What pressing the whole DeepSeek-R1 would take, projected from the layers that r1_layer.py measured.

    python benchmarks/r1_projection.py [--tokens 131072]

Reads benchmarks/results/r1_layer.json and scales every phase to 3 dense and 58 MoE layers (the MTP layer is dropped)
and to that many tokens: on the machine it was measured on, and on one with a 24 GB GPU and NVMe, whose speeds are
assumed. Each row says by what it was scaled. Two numbers are the ends of an interval; one number is a measured time
that was only multiplied, so it is no more certain. Nothing here was measured at that size. Peaks of memory and disk
are moepress' own estimate for a folder with all of R1's headers. Written to benchmarks/results/r1_projection.json.
"""

import argparse
import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from make_r1 import BYTES, r1_tensors
from r1_scaling import (
    FORWARD,
    HESSIANS,
    HIDDEN,
    SCHEME,
    Layer,
    Term,
    Work,
    by_phase,
    expert_forward,
    first_step_flops,
    hessian_parts,
    human,
    layer_of,
    project_profile,
    project_quantize,
    reading_passes,
    table,
    total,
)
from setting import RESULTS, ROOT

from moepress.compress.estimates.estimate import Estimate
from moepress.compress.estimates.figures import Figures, figures_of, pressed_sizes
from moepress.compress.estimates.footprint import Workload
from moepress.compress.estimates.profile import estimate_profile
from moepress.compress.estimates.prune import estimate_prune
from moepress.compress.estimates.quantize import estimate_quantize
from moepress.compress.estimates.rates import ASSUMED_READ
from moepress.compress.gptq.costs import solve_flops
from moepress.compress.gptq.experts import experts_that_fit
from moepress.compress.gptq.options import SolverOptions
from moepress.models.storage.checkpoint import Checkpoint, open_checkpoint
from moepress.models.storage.writer import write_index, write_json
from moepress.runs.byte_sizes import parse_bytes

DENSE_LAYERS, MOE_LAYERS, VOCABULARY, SHARDS = 3, 58, 129280, 163
GPU = "RTX 4090 24 GB and NVMe"
GPU_MEMORY_BYTES = 12 << 30  # half of 24 GiB, as `choose_limits` takes it
# Slowest and fastest. Peaks: NVIDIA, Ada GPU Architecture whitepaper (RTX 4090: 82.6 TFLOPS fp32 without tensor cores,
# 165.2 bf16 dense with fp32 accumulate, 1008 GB/s); validation/speed/targets.toml has the last two. Shares are assumed.
ASSUMED: dict[str, tuple[float, float, str]] = {
    "bf16_flops": (0.4 * 165.2e12, 0.8 * 165.2e12, "FLOP/s; 40 to 80 % of the whitepaper's 165.2 TFLOPS, assumed"),
    "fp32_flops": (0.4 * 82.6e12, 0.8 * 82.6e12, "FLOP/s; 40 to 80 % of the whitepaper's 82.6 TFLOPS, assumed"),
    "factor_flops": (0.1 * 82.6e12, 0.4 * 82.6e12, "FLOP/s of Cholesky and inverse; 10 to 40 % of the same, assumed"),
    "bandwidth": (0.7 * 1008e9, 0.9 * 1008e9, "bytes/s; 70 to 90 % of the whitepaper's 1008 GB/s, assumed"),
    "link": (12e9, 25e9, "bytes/s between host and GPU; PCIe 4.0 x16 has 31.5 GB/s, the share is assumed"),
    "read": (3e9, 6e9, "bytes/s; an NVMe disk on PCIe 4.0 x4 (7.9 GB/s at most), assumed"),
    "write": (1e9, 3e9, "bytes/s; the same under a long load, assumed"),
    "launch": (15e-6, 5e-6, "seconds for one small operation, assumed"),
    "processor": (1.0, 8.0, "times as fast as the measured processor at what stays on it, assumed"),
}
_COLUMN_OPERATIONS = 8  # small operations for each column of the solver's loops
_SEARCH_PASSES = (160, 60)  # times that the scale search moves all weights through memory: 20 steps, unfused and fused
_ON_PROCESSOR = {"load", "pack", "release", "other", "check", "observe", "spill", HIDDEN, "embed"}


def whole_config(measured: Mapping[str, Any], *, small: bool) -> dict[str, Any]:
    """The config of all of R1, or of a model as narrow as the measured one with as many layers."""
    layers = {"num_hidden_layers": DENSE_LAYERS + MOE_LAYERS, "first_k_dense_replace": DENSE_LAYERS}
    return {**measured, **layers, "num_nextn_predict_layers": 1} | ({} if small else {"vocab_size": VOCABULARY})


def hollow(folder: Path, config: Mapping[str, Any]) -> Checkpoint:
    """All headers of the model in files that are holes; they take no room on the disk."""
    rows = list(r1_tensors(config))
    each, weight_map, size_of_all = -(-len(rows) // SHARDS), dict[str, str](), 0
    for number, start in enumerate(range(0, len(rows), each), start=1):
        name, header, position = f"model-{number:05d}-of-{SHARDS:06d}.safetensors", dict[str, Any](), 0
        for tensor, dtype, shape in rows[start : start + each]:
            size = math.prod(shape) * BYTES[dtype]
            header[tensor] = {"dtype": dtype, "shape": shape, "data_offsets": [position, position + size]}
            position, weight_map[tensor] = position + size, name
        raw = json.dumps(header).encode()
        with (folder / name).open("wb") as stream:
            stream.write(len(raw).to_bytes(8, "little") + raw)
            stream.truncate(8 + len(raw) + position)
        size_of_all += position
    write_index(folder, weight_map, size_of_all)
    write_json(folder / "config.json", config)
    return open_checkpoint(folder)


class Measured:
    """What r1_layer.py wrote, by stage."""

    def __init__(self, report: Mapping[str, Any]) -> None:
        self.report, self.rates, self.options = report, report["rates"], report["options"]
        self.stages = {row["stage"]: row for row in report["rows"]}
        fresh = [row for row in report["rows"] if row.get("fresh")]
        if "profile" not in self.stages or not fresh or not any(name.startswith("prune") for name in self.stages):
            raise SystemExit("a stage is missing; run benchmarks/r1_layer.py with all of them.")
        self.solved = fresh[0]
        self.tokens, self.window = int(self.options["tokens"]), int(self.options["window"])
        self.top_k = int(report["config"]["num_experts_per_tok"])
        self.experts = int(report["config"]["n_routed_experts"])

    def quantize_rows(self, layer: int | None) -> dict[str, Mapping[str, Any]]:
        """Phases of a layer of `quantize`; hidden states are kept after all layers but the last, so the dense one's."""
        if layer != 1:
            return by_phase(self.stages["quantize"]["timings"]["rows"], layer)
        rows = by_phase(self.solved["timings"]["rows"], 1)
        dense = by_phase(self.stages["quantize"]["timings"]["rows"], 0)
        return rows | ({HIDDEN: dense[HIDDEN]} if HIDDEN in dense else {})

    def profile_rows(self, layer: int | None) -> dict[str, Mapping[str, Any]]:
        """Phases of a layer of `profile`, likewise."""
        rows = by_phase(self.stages["profile"]["timings"]["rows"], layer)
        dense = by_phase(self.stages["profile"]["timings"]["rows"], 0)
        return rows | ({HIDDEN: dense[HIDDEN]} if layer == 1 and HIDDEN in dense else {})

    def work(self, experts: int, routed: float) -> Work:
        """What was measured, with so many experts."""
        return Work(tokens=self.tokens, window=self.window, experts=experts, routed=routed)


def here_quantize(found: Measured, config: Mapping[str, Any], tokens: int, count: int) -> list[Term]:
    """`quantize` of the whole model on the measured machine."""
    solved = found.work(found.solved["solved_experts"], found.solved["solved_tokens"])
    wanted = Work(tokens=tokens, window=found.window, experts=count, routed=tokens * found.top_k)
    nothing = {"experts": 0, "routed": 0}
    dense = project_quantize(
        found.quantize_rows(0),
        layer_of(found.report["config"], 0),
        Work(tokens=found.tokens, window=found.window, **nothing),
        Work(tokens=tokens, window=found.window, **nothing),
        found.rates,
    )
    moe = project_quantize(found.quantize_rows(1), layer_of(found.report["config"], 1), solved, wanted, found.rates)
    once = _once(found.quantize_rows(None), tokens / found.tokens)
    return [*_named(dense, DENSE_LAYERS, "dense"), *_named(moe, MOE_LAYERS, "MoE"), *once, *_outer(config, found.rates)]


def here_profile(found: Measured, tokens: int) -> list[Term]:
    """`profile` of the whole model on the measured machine; it never reads lm_head."""
    chosen = found.top_k + 1  # leave-one-out asks one more expert of every token
    terms = []
    for layer, count, kind, each in ((0, DENSE_LAYERS, "dense", 0), (1, MOE_LAYERS, "MoE", chosen)):
        before, after = (
            Work(tokens=n, window=found.window, experts=found.experts, routed=n * each) for n in (found.tokens, tokens)
        )
        sizes = layer_of(found.report["config"], layer)
        terms += _named(project_profile(found.profile_rows(layer), sizes, before, after, found.rates), count, kind)
    return [*terms, *_once(found.profile_rows(None), tokens / found.tokens)]


def here_prune(found: Measured, count: int, size: float) -> list[Term]:
    """`prune` of the whole model: what moves bytes grows with those that are written, and the rest at most so."""
    row = found.stages[f"prune {count}"]
    ratio = size / row["output_bytes"]
    rows = [entry for entry in row["timings"]["rows"] if not entry["background"]]
    terms = []
    for name in dict.fromkeys(entry["phase"] for entry in rows):
        seconds = sum(entry["seconds"] for entry in rows if entry["phase"] == name)
        moves = any(entry["bytes"] for entry in rows if entry["phase"] == name)
        scaled = "per byte written" if moves else "once, or per byte written"
        terms.append(
            Term(name=name, low=seconds * (ratio if moves else 1.0), high=seconds * ratio, scaled=scaled, bytes=size)
        )
    return terms


def _named(terms: Sequence[Term], count: int, kind: str) -> list[Term]:
    found = [term.times(count) for term in terms]
    return [
        Term(
            name=f"{term.name}, {count} {kind}",
            low=term.low,
            high=term.high,
            scaled=f"{term.scaled}, x {count} layers",
            flops=term.flops,
            bytes=term.bytes,
        )
        for term in found
    ]


def _once(rows: Mapping[str, Mapping[str, Any]], longer: float) -> list[Term]:
    found = []
    for name, row in rows.items():
        if not row["background"]:
            ratio, scaled = (longer, "per token") if name in ("embed", HIDDEN) else (1.0, "once, as measured")
            seconds = row["seconds"] * ratio
            found.append(Term(name=f"{name}, once", low=seconds, high=seconds, scaled=scaled))
    return found


def _outer_bytes(config: Mapping[str, Any]) -> float:
    return 2.0 * 2 * config["vocab_size"] * config["hidden_size"]


def _outer(config: Mapping[str, Any], rates: Mapping[str, Any]) -> list[Term]:
    size = _outer_bytes(config)
    seconds = size / (rates["read_bytes_per_second"] or ASSUMED_READ) + size / rates["write_bytes_per_second"]
    scaled = "per byte, read and written at the disk's rate"
    return [Term(name="embeddings and lm_head", low=seconds, high=seconds, scaled=scaled, bytes=size)]


def gpu_term(name: str, amount: float, rate: str, what: str) -> Term:
    """An amount at an assumed rate."""
    slow, fast, _ = ASSUMED[rate]
    ends = (amount * slow, amount * fast) if rate == "launch" else (amount / slow, amount / fast)
    flops, size = (amount if rate.endswith("flops") else 0.0), (amount if rate in ("read", "write", "link") else 0.0)
    return Term(name=name, low=min(ends), high=max(ends), scaled=what, flops=flops, bytes=size)


def solver_flops(layer: Layer, count: int) -> dict[str, float]:
    """FLOP of the solver for so many experts by phase: gate and up as one matrix of their columns, and down."""
    hidden, width, group = layer.hidden, int(layer.config["moe_intermediate_size"]), SCHEME.group_size
    first, second = solve_flops(2 * width, hidden, group), solve_flops(hidden, width, group)
    return {phase: count * (first[phase] + second[phase]) for phase in first}


def counted(found: Measured, tokens: int, count: int) -> dict[str, float]:
    """FLOP of all MoE layers of `quantize` with so many experts: the solver's phases, Hessians, the forward pass."""
    layer = layer_of(found.report["config"], 1)
    work = Work(tokens=tokens, window=found.window, experts=count, routed=tokens * found.top_k)
    forward = first_step_flops(layer, work) + work.routed * expert_forward(layer)
    each = solver_flops(layer, count) | {HESSIANS: sum(hessian_parts(layer, work)), FORWARD: forward}
    return {name: MOE_LAYERS * flops for name, flops in each.items()}


def gpu_quantize(found: Measured, config: Mapping[str, Any], figures: Figures, tokens: int, count: int) -> list[Term]:
    """`quantize` of the whole model with an RTX 4090."""
    terms = []
    for number, layers, kind, experts in ((0, DENSE_LAYERS, "dense", 0), (1, MOE_LAYERS, "MoE", count)):
        layer = layer_of(found.report["config"], number)
        work = Work(tokens=tokens, window=found.window, experts=experts, routed=tokens * found.top_k * bool(experts))
        flops = first_step_flops(layer, work) + work.routed * expert_forward(layer)
        each = [
            gpu_term(
                "read", 2.0 * layer.rest_bytes + experts * layer.expert_bytes, "read", "per byte, none of it hidden"
            ),
            gpu_term(FORWARD, flops, "bf16_flops", "per token, by FLOP"),
            gpu_term("write", layer.written_rest + experts * layer.written_expert, "write", "per byte"),
        ]
        if experts:
            each += _gpu_solver(layer, work, figures)
        moves = 2 + (
            1 + 3 * found.top_k if experts else 0
        )  # in, out; an expert's inputs for H, for down's H, and for y
        weights = 2.0 * (layer.rest + 2 * experts * layer.expert)  # fp32 to be solved; what was solved in bf16
        size = 2.0 * moves * tokens * layer.hidden + weights
        each.append(gpu_term("host and GPU", size, "link", "per token and per weight"))
        terms += _named(each, layers, kind)
    slowed = here_quantize(found, config, tokens, count)
    terms += _processor(slowed)
    terms += [gpu_term("embeddings and lm_head, read", _outer_bytes(config), "read", "per byte")]
    return [*terms, gpu_term("embeddings and lm_head, written", _outer_bytes(config), "write", "per byte")]


def _gpu_solver(layer: Layer, work: Work, figures: Figures) -> list[Term]:
    flops = solver_flops(layer, work.experts)
    flops = {name: count for name, count in flops.items() if count}  # not the scales: below, by bandwidth
    columns = layer.hidden + int(layer.config["moe_intermediate_size"])
    together = experts_that_fit(figures.shape, GPU_MEMORY_BYTES, torch.device("cuda"))
    loops = columns * (2 + SolverOptions().refits) * _COLUMN_OPERATIONS * math.ceil(work.experts / together)
    least, most = (
        4.0 * passes * work.experts * layer.expert / ASSUMED["bandwidth"][end]
        for passes, end in ((_SEARCH_PASSES[1], 1), (_SEARCH_PASSES[0], 0))
    )
    return [
        gpu_term("Hessian", sum(hessian_parts(layer, work)), "fp32_flops", "per token and expert, by FLOP"),
        *(
            gpu_term(name, each, "factor_flops" if name == "factor" else "fp32_flops", "per expert, by FLOP")
            for name, each in flops.items()
        ),
        Term(name="scales", low=least, high=most, scaled="per weight, by bandwidth"),
        gpu_term("small operations", loops, "launch", f"per column and batch of {together} experts"),
    ]


def _processor(terms: Sequence[Term]) -> list[Term]:
    """What stays on the processor, as it was measured there, and faster."""
    fastest = ASSUMED["processor"][1]
    return [
        Term(name=f"{t.name} (processor)", low=t.low / fastest, high=t.high, scaled=t.scaled, bytes=t.bytes)
        for t in terms
        if t.name.split(",")[0] in _ON_PROCESSOR
    ]


def gpu_profile(found: Measured, tokens: int) -> list[Term]:
    """`profile` of the whole model with an RTX 4090."""
    terms, chosen = [], found.top_k + 1
    for number, layers, kind, each in ((0, DENSE_LAYERS, "dense", 0), (1, MOE_LAYERS, "MoE", chosen)):
        layer = layer_of(found.report["config"], number)
        before, after = (
            Work(tokens=n, window=found.window, experts=found.experts, routed=n * each) for n in (found.tokens, tokens)
        )
        passes, more = reading_passes(found.profile_rows(number), layer, before, after)
        experts = passes * more * found.experts * bool(each)
        flops = first_step_flops(layer, after) + 2.0 * after.routed * layer.expert
        # Hidden states in and out, inputs out and in for each chosen expert, outputs back in fp32; weights in bf16.
        size = 2.0 * (3 + 3 * each) * tokens * layer.hidden + 2.0 * (layer.rest + experts * layer.expert)
        phases = [
            gpu_term("read", layer.rest_bytes + experts * layer.expert_bytes, "read", "per byte, none of it hidden"),
            gpu_term(FORWARD, flops, "bf16_flops", "per token, by FLOP"),
            gpu_term("host and GPU", size, "link", "per token and per weight"),
        ]
        terms += _named(phases, layers, kind)
    return terms + _processor(here_profile(found, tokens))


def gpu_prune(found: Measured, count: int, size: float) -> list[Term]:
    """`prune` needs no GPU."""
    moved = [gpu_term(name, size, name, "per byte written") for name in ("read", "write")]
    return moved + _processor(here_prune(found, count, size))


def takes(estimate: Estimate) -> dict[str, Any]:
    """What of an estimate is projected here."""
    return {
        "peak_memory_bytes": estimate.peak_memory_bytes,
        "device_memory_bytes": estimate.device_memory_bytes,
        "disk_bytes": estimate.disk_bytes,
        "output_bytes": estimate.output_bytes,
        "notes": list(estimate.notes),
    }


def project(found: Measured, checkpoint: Checkpoint, tokens: int) -> list[dict[str, Any]]:
    """All machines and stages."""
    config, figures, rows = checkpoint.config, figures_of(checkpoint), []
    limit = parse_bytes(found.options["max_memory"])
    here = found.report["machine"]["device"]
    # No GPU has to be there: the meta device stands for one.
    places = ((here, torch.device("cpu"), torch.float32, limit), (GPU, torch.device("meta"), torch.bfloat16, None))
    for place, device, dtype, memory in places:
        work = Workload(
            tokens=tokens, window=found.window, device=device, dtype=dtype, memory_bytes=memory or GPU_MEMORY_BYTES
        )
        gpu = place == GPU
        terms = gpu_profile(found, tokens) if gpu else here_profile(found, tokens)
        rows.append(_row(place, "profile", None, terms, estimate_profile(figures, work)))
        for count in (found.experts * 3 // 4, found.experts // 2):
            size = float(sum(pressed_sizes(checkpoint, figures, count, None).values()))
            terms = gpu_prune(found, count, size) if gpu else here_prune(found, count, size)
            rows.append(_row(place, "prune", count, terms, estimate_prune(round(size))))
            if gpu:
                terms = gpu_quantize(found, config, figures, tokens, count)
            else:
                terms = here_quantize(found, config, tokens, count)
            estimate = estimate_quantize(checkpoint, figures, count, SCHEME, work)
            rows.append(_row(place, "quantize", count, terms, estimate))
    return rows


def _row(place: str, stage: str, count: int | None, terms: Sequence[Term], estimate: Estimate) -> dict[str, Any]:
    low, high = total(terms)
    return {
        "machine": place,
        "stage": stage,
        "experts": count,
        "projected": True,
        "seconds": [low, high],
        "terms": [asdict(term) for term in terms],
        "estimate": takes(estimate),
    }


def print_rows(rows: Sequence[Mapping[str, Any]], tokens: int) -> None:
    """A table for each machine and stage, and what all of them come to."""
    for row in rows:
        what = f"{row['stage']} at {row['experts']} experts" if row["experts"] else row["stage"]
        print(f"\n{row['machine']}: {what}, {tokens:,} tokens (projected)")
        lines = [
            (
                term["name"],
                human(term["low"], term["high"]),
                f"{term['low'] / max(row['seconds'][0], 1e-9):.0%}",
                term["scaled"],
            )
            for term in row["terms"]
        ]
        print(table(("term", "projected", "of least", "scaled"), [*lines, ("all", human(*row["seconds"]), "", "")]))
    print("\nMemory and disk by moepress' own estimate (projected)")
    lines = [
        (
            f"{row['machine']}: {row['stage']} {row['experts'] or ''}".rstrip(),
            human(*row["seconds"]),
            f"{row['estimate']['peak_memory_bytes'] / 2**30:.1f}",
            f"{(row['estimate']['device_memory_bytes'] or 0) / 2**30:.1f}",
            f"{row['estimate']['disk_bytes'] / 2**30:.0f}",
        )
        for row in rows
    ]
    print(table(("stage", "time", "peak GiB", "GPU GiB", "disk GiB"), lines))


def print_counts(counts: Mapping[int, Mapping[str, float]]) -> None:
    """The FLOP of `quantize`, and those of its solver."""
    outside = (HESSIANS, FORWARD)
    names = [*next(iter(counts.values()))]
    lines = [[name, *(f"{found[name] / 1e15:.2f}" for found in counts.values())] for name in names]
    solver = [sum(flops for name, flops in found.items() if name not in outside) for found in counts.values()]
    lines.append(["solver alone", *(f"{flops / 1e15:.2f}" for flops in solver)])
    print(f"\nPFLOP of `quantize` in {MOE_LAYERS} MoE layers, counted from shapes")
    print(table(("phase", *(f"{count} experts" for count in counts)), lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measured", type=Path, default=RESULTS / "r1_layer.json", help="what r1_layer.py wrote")
    parser.add_argument("--tokens", type=int, default=131072, help="calibration tokens (default 131072)")
    given = parser.parse_args()
    if not given.measured.is_file():
        raise SystemExit(f"{given.measured} is not there; run benchmarks/r1_layer.py first.")
    found = Measured(json.loads(given.measured.read_text()))
    if found.options["device"] != "cpu":
        raise SystemExit("The measured device is no processor; project from a run with --device cpu.")
    with tempfile.TemporaryDirectory() as name:
        config = whole_config(found.report["config"], small=found.options["small"])
        rows = project(found, hollow(Path(name), config), given.tokens)
    counts = {n: counted(found, given.tokens, n) for n in (found.experts * 3 // 4, found.experts // 2)}
    print_rows(rows, given.tokens)
    print_counts(counts)
    print(f"\nAssumed of {GPU}, slowest and fastest:")
    for name, (slow, fast, said) in ASSUMED.items():
        print(f"  {name}: {slow:.3g} to {fast:.3g} {said}")
    file = given.measured.with_name("r1_projection.json")
    assumed = {name: {"slow": slow, "fast": fast, "what": said} for name, (slow, fast, said) in ASSUMED.items()}
    about = {"measured": found.report["machine"], "measured_options": found.options, "tokens": given.tokens}
    content = {"projected": True, **about, "assumed": assumed, "flops": counts, "rows": rows}
    file.write_text(json.dumps(content, indent=2) + "\n")
    print(f"\nwritten to {file.relative_to(ROOT) if file.is_relative_to(ROOT) else file}")


if __name__ == "__main__":
    main()
