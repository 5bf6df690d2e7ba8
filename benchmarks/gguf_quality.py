"""GGUF's grids beside llama-quantize's method: loss at equal bytes, grid by grid and as whole files.

    python benchmarks/gguf_quality.py [--grids q4_0 q4_k q3_k q2_k iq4_xs] [--mixes Q4_K_M Q3_K_M]
        [--shares 1.0 0.9 0.8 0.7] [--seeds 0 1 2]

The model of widths 256 of ../shared (without it the demo), attention and experts, 128 windows of 512 tokens of the
train texts; measured on 4 windows of 512 tokens per domain of the test texts, weights alone: dequantized, the forward
in fp32.
llama-quantize's method is that of the package libgguf, ggml's own reference quantizers: plain, and with the importance
of columns (the mean square of what reaches them) from the same windows, which is its imatrix. A seed chooses the
windows; errors are standard errors over windows, pooled over seeds. --mixes are whole files in llama.cpp itself, which
rounds activations to 8 bits: the same type map for both, so the same bytes. --shares are files too, of so much of
Q4_K_M's bytes, their types chosen by measured damage (`plan --budget --to gguf`), with the divergence that the plan
estimates and the one that weights alone have. --quick tries the script.
The file of figures grows: what it holds of other grids and seeds stays, and the tables are of all that it holds.
"""

import argparse
import json
import shutil
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import libgguf
import numpy as np
import torch
from gguf import GGMLQuantizationType
from gptq_quality import Setting, figures, original, quick, scores
from setting import RESULTS, SHARED, machine, texts
from torch import Tensor

from moepress.calibration.corpus import EvaluationCorpus
from moepress.calibration.hessian import hessian_for
from moepress.compress.gptq import experts
from moepress.compress.gptq.block_choice import PLANNED, BlockChoice, nearest_scheme
from moepress.compress.gptq.block_scales import grid_of, made
from moepress.compress.gptq.block_solver import SolvedBlocks, solve_blocks
from moepress.compress.gptq.include import Include
from moepress.compress.gptq.options import SolverOptions
from moepress.converters.gguf.export import GgufRequest
from moepress.converters.safetensors.scheme import Scheme
from moepress.models.storage.block_types import BlockType
from moepress.models.storage.blocks import unpack
from moepress.models.storage.checkpoint import Checkpoint, open_checkpoint
from moepress.stages.export import gguf_stage
from moepress.stages.places import Machine, Output, model_folder
from moepress.stages.plan import BudgetRequest, Wish, mix_within
from moepress.stages.profile import profile_stage
from moepress.stages.quantize import QuantizeRequest, quantize_stage
from moepress.validation.quality.llama_cpp import open_llama
from moepress.validation.quality.measure import Subject

PARTS = frozenset({Include.ATTENTION, Include.SHARED, Include.DENSE})
Solver = Callable[[Tensor, Tensor, BlockType, SolverOptions], SolvedBlocks]


def full(threads: int) -> Setting:
    wide = SHARED / "models" / "wide"
    return Setting(
        model=wide if wide.is_dir() else model_folder("demo"),
        train=texts("train"),
        test=texts("test"),
        threads=threads,
        group_size=32,
        window=512,
        windows=128,
        evaluation_windows=4,
    )


@contextmanager
def solving(solver: Solver) -> Iterator[None]:
    """Another solver in the place of ours, for all matrices."""
    before = experts.solve_blocks
    experts.solve_blocks = solver  # type: ignore[assignment]
    try:
        yield
    finally:
        experts.solve_blocks = before


def ggml_solver(*, imatrix: bool) -> Solver:
    """What llama-quantize does with a matrix."""

    def solve(weight_EOI: Tensor, hessian_EII: Tensor, kind: BlockType, options: SolverOptions) -> SolvedBlocks:
        ours = solve_blocks(weight_EOI, hessian_EII, kind, replace(options, sweeps=0))
        grid, codes, scales = grid_of(kind), [], []
        for weight_OI, hessian_II in zip(weight_EOI, hessian_EII, strict=True):
            data = ggml_blocks(kind, weight_OI, hessian_II.diagonal().clamp(min=0) if imatrix else None)
            blocks = unpack(kind, data)
            scales.append(made(kind, blocks.d, blocks.scales, blocks.dmin, blocks.minima))
            low = int(grid.low) if grid.integers else 0
            codes.append((blocks.codes.short() + low).to(torch.int8))
        return SolvedBlocks(kind=kind, solved=replace(ours.solved, codes=torch.stack(codes)), scales=tuple(scales))

    return solve


def ggml_blocks(kind: BlockType, weight_OI: Tensor, importance_I: Tensor | None) -> Tensor:
    """A matrix by ggml's reference quantizer, as bytes."""
    number = GGMLQuantizationType(kind.number)
    weigh = None if importance_I is None else np.ascontiguousarray(importance_I.numpy(), dtype=np.float32)
    made = libgguf.quantize_rows(np.ascontiguousarray(weight_OI.numpy()), number, imatrix=weigh)
    return torch.from_numpy(np.asarray(made).view(np.uint8).reshape(len(weight_OI), -1).copy())


MACHINE = Machine(device="cpu", dtype="float32", memory_bytes=4 << 30)


def pressed(setting: Setting, name: str, seed: int, out: Path, solver: Solver | None) -> Checkpoint:
    """The model on a grid or in a mix."""
    shutil.rmtree(out, ignore_errors=True)
    bits = BlockChoice(name=name, layers=1, experts=1, shared_heads=1).bits
    request = QuantizeRequest(
        scheme=Scheme(bits=min(4, bits) if bits < 8 else 8, group_size=32),
        include=PARTS,
        grid=name,
        hessian=hessian_for("own" if solver is not None else "auto", bits, {}),
    )
    with solving(solver or solve_blocks):
        quantize_stage(str(setting.model), Output(folder=out), None, request, setting.calibration(seed), MACHINE)
    return open_checkpoint(out)


PARTS_OF = ("grids", "files", "shares")
METHODS: Mapping[str, Solver | None] = {
    "ggml, plain": ggml_solver(imatrix=False),
    "ggml, imatrix (llama-quantize)": ggml_solver(imatrix=True),
    "moepress": None,
}


def on_grids(setting: Setting, grids: Sequence[str], seeds: Sequence[int], work: Path) -> Iterator[dict[str, Any]]:
    """KL of every grid, method and seed."""
    corpus = setting.evaluation()
    for grid in grids:
        for seed in seeds:
            subjects = [original(setting)]
            for method, solver in METHODS.items():
                folder = pressed(setting, grid, seed, work / f"{grid}-{len(subjects)}", solver)
                subjects.append(subject_of(method, folder))
            found = scores(subjects, corpus, work)
            for one in subjects[1:]:
                row = {"grid": grid, "method": one.label, "seed": seed} | figures(found, one)
                print(f"{grid:7} {one.label:32} seed {seed}: KL {1e3 * row['kl']:.3f}e-3", flush=True)
                yield row


def chosen_by_damage(
    setting: Setting, shares: Sequence[float], seeds: Sequence[int], work: Path, of_bytes: int
) -> Iterator[dict[str, Any]]:
    """KL of files whose types a plan has chosen, against its estimate."""
    if not shares:
        return
    corpus = setting.evaluation()
    wanted = llama_logits(export(setting.model, work / "plain", exact=True), corpus)
    for seed in seeds:
        place = Output(folder=work / f"profile-{seed}")
        profile = profile_stage(str(setting.model), place, setting.calibration(seed), MACHINE, grid_losses=True)
        for share in shares:
            wish = Wish(experts=profile.shape.experts, weights={})
            plan = mix_within(profile, BudgetRequest(limit_bytes=round(share * of_bytes)), wish)
            out = work / "mix"
            shutil.rmtree(out, ignore_errors=True)
            bits = nearest_scheme(PLANNED, plan.grids)
            request = QuantizeRequest(
                scheme=bits, hessian=hessian_for("auto", bits.bits, {}), grid=PLANNED, mix=plan.grids
            )
            quantize_stage(str(setting.model), Output(folder=out), plan, request, setting.calibration(seed), MACHINE)
            made = open_checkpoint(out)
            file = export(out, work / "file")
            found, same = compared(wanted, llama_logits(file, corpus))
            subjects = [original(setting), subject_of("moepress", made)]
            alone = figures(scores(subjects, corpus, work), subjects[1])
            estimate = next(point.kl for point in plan.curve if point.chosen)
            size, kl = file.stat().st_size, float(found.mean())
            print(
                f"mix of {share:.0%} seed {seed}: KL {1e3 * kl:.3f}e-3, weights alone {1e3 * alone['kl']:.3f}e-3, "
                f"estimated {1e3 * estimate:.3f}e-3, {size} B",
                flush=True,
            )
            yield {
                "share": share,
                "method": "moepress, measured damage",
                "seed": seed,
                "bytes": size,
                "kl": kl,
                "kl_error": float(found.std() / len(found) ** 0.5),
                "same_top1": same,
                "weights_kl": alone["kl"],
                "estimated_kl": estimate,
                "grids": [row.model_dump(mode="json") for row in plan.grids],
            }


def subject_of(label: str, made: Checkpoint) -> Subject:
    return Subject(label=label, source=made, folder=None, stored_bytes=made.total_bytes, parameters=0)


def as_files(setting: Setting, mixes: Sequence[str], seeds: Sequence[int], work: Path) -> Iterator[dict[str, Any]]:
    """KL of whole files in llama.cpp to the unquantized model in llama.cpp."""
    if not mixes:
        return
    corpus = setting.evaluation()
    plain = export(setting.model, work / "plain", exact=True)
    wanted = llama_logits(plain, corpus)
    for mix in mixes:
        for seed in seeds:
            for method, solver in METHODS.items():
                pressed(setting, mix, seed, work / "mix", solver)
                file = export(work / "mix", work / "file")
                found, same = compared(wanted, llama_logits(file, corpus))
                size, kl = file.stat().st_size, float(found.mean())
                print(f"{mix:7} {method:32} seed {seed}: KL {1e3 * kl:.3f}e-3, {size} B", flush=True)
                error = float(found.std() / len(found) ** 0.5)
                row = {"file": mix, "method": method, "seed": seed, "bytes": size}
                yield row | {"kl": kl, "kl_error": error, "same_top1": same}


def export(folder: Path, out: Path, *, exact: bool = False) -> Path:
    shutil.rmtree(out, ignore_errors=True)
    gguf_stage(str(folder), Output(folder=out), GgufRequest(exact=exact))
    return next(out.glob("*.gguf"))


def llama_logits(file: Path, corpus: EvaluationCorpus) -> list[Tensor]:
    """fp16 log-probabilities of every window [T, V]."""
    session = open_llama(file, context=corpus.windows.shape[1])
    rows = []
    for window in corpus.windows.tolist():
        session.clear()
        rows.append(session.logits(window[:-1]))
    session.close()
    return rows


def compared(wanted: Sequence[Tensor], found: Sequence[Tensor]) -> tuple[Tensor, float]:
    """Mean KL of every window, and the share of equal most likely tokens."""
    means, same = [], []
    for ours, theirs in zip(wanted, found, strict=True):
        p, q = torch.log_softmax(ours.double(), -1), torch.log_softmax(theirs.double(), -1)
        means.append(float((p.exp() * (p - q)).sum(-1).mean()))
        same.append(float((p.argmax(-1) == q.argmax(-1)).double().mean()))
    return torch.tensor(means, dtype=torch.float64), statistics.mean(same)


def table(rows: Sequence[Mapping[str, Any]], key: str) -> str:
    """Means over seeds, and what ours is to llama-quantize's."""
    lines = [
        f"| {key} | method | MB | seeds | KL e-3 | same top-1 | to llama-quantize |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for name in dict.fromkeys(row[key] for row in rows):
        methods = {(row["seed"], row["method"]) for row in rows if row[key] == name}
        whole = [seed for seed in {seed for seed, _ in methods} if all((seed, m) in methods for m in METHODS)]
        if not whole:
            continue
        means = {}
        for method in METHODS:
            own = [row for row in rows if row[key] == name and row["method"] == method and row["seed"] in whole]
            kl = statistics.mean(row["kl"] for row in own)
            error = statistics.mean(row["kl_error"] for row in own)
            means[method] = kl, error, statistics.mean(row["same_top1"] for row in own), own[0]["bytes"]
        base = means["ggml, imatrix (llama-quantize)"][0]
        for method, (kl, error, same, size) in means.items():
            lines.append(
                f"| {name} | {method} | {size / 1e6:.2f} | {len(whole)} | {1e3 * kl:.2f} ± {1e3 * error:.2f} "
                f"| {same:.1%} | {kl / base - 1:+.0%} |"
            )
    return "\n".join(lines)


def share_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Means over seeds of files chosen by damage: in llama.cpp, of weights alone, and as estimated."""
    lines = [
        "| of Q4_K_M's bytes | MB | seeds | KL e-3 | same top-1 | weights alone e-3 | estimated e-3 |",
        "|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for share in sorted({row["share"] for row in rows}, reverse=True):
        own = [row for row in rows if row["share"] == share]
        size, kl, error, same, alone, estimate = (
            statistics.mean(row[key] for row in own)
            for key in ("bytes", "kl", "kl_error", "same_top1", "weights_kl", "estimated_kl")
        )
        lines.append(
            f"| {share:.0%} | {size / 1e6:.2f} | {len(own)} | {1e3 * kl:.2f} ± {1e3 * error:.2f} | {same:.1%} "
            f"| {1e3 * alone:.2f} | {1e3 * estimate:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grids", nargs="*", default=["q4_0", "q4_k", "q3_k", "q2_k", "iq4_xs"])
    parser.add_argument("--mixes", nargs="*", default=["Q4_K_M", "Q3_K_M"])
    parser.add_argument("--shares", nargs="*", type=float, default=[1.0, 0.9, 0.8, 0.7])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--quick", action="store_true", help="the demo with little text")
    parser.add_argument(
        "--json", type=Path, help="file for the figures (default: benchmarks/results/gguf_quality.json)"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    setting = quick(options.threads) if options.quick else full(options.threads)
    file = options.json or (None if options.quick else RESULTS / "gguf_quality.json")
    known = json.loads(file.read_text()) if file and file.is_file() else {}
    document: dict[str, Any] = {"machine": machine() | {"model": setting.model.name}, **{part: [] for part in PARTS_OF}}
    if known.get("machine", {}).get("model") == setting.model.name:
        document |= {part: known[part] for part in PARTS_OF if part in known}
    with tempfile.TemporaryDirectory(prefix="gguf-quality-") as name:
        work, seeds = Path(name), options.seeds

        def by_damage() -> Iterator[dict[str, Any]]:
            middle = [row["bytes"] for row in document["files"] if row["file"] == "Q4_K_M"]
            if options.shares and not middle:
                parser.error("--shares are of the bytes of Q4_K_M; give --mixes Q4_K_M too.")
            yield from chosen_by_damage(setting, options.shares, seeds, work, middle[0] if middle else 0)

        rows_of = {
            "grids": lambda: on_grids(setting, options.grids, seeds, work),
            "files": lambda: as_files(setting, options.mixes, seeds, work),
            "shares": by_damage,
        }
        for part in PARTS_OF:
            for row in rows_of[part]():
                key = (row[part[:-1]], row["method"], row["seed"])
                others = [r for r in document[part] if (r[part[:-1]], r["method"], r["seed"]) != key]
                document[part] = [*others, row]
                if file:  # at once: the next may take an hour
                    file.write_text(json.dumps(document, indent=2) + "\n")
    for part in ("grids", "files"):
        if document[part]:
            print(f"\n{table(document[part], part[:-1])}")
    if document["shares"]:
        print(f"\n{share_table(document['shares'])}")


if __name__ == "__main__":
    main()
