"""GGUF's grids beside llama-quantize's method: loss at equal bytes, grid by grid and as whole files.

    python benchmarks/gguf_quality.py [--grids q4_0 q4_k q3_k q2_k iq4_xs] [--mixes Q4_K_M Q3_K_M] [--seeds 0 1 2]

The model of widths 256 of ../shared (without it the demo), attention and experts, 128 windows of 512 tokens of the
train texts; measured on 4 windows of 512 tokens per domain of the test texts, weights alone: dequantized, the forward
in fp32.
llama-quantize's method is that of the package libgguf, ggml's own reference quantizers: plain, and with the importance
of columns (the mean square of what reaches them) from the same windows, which is its imatrix. A seed chooses the
windows; errors are standard errors over windows, pooled over seeds. --mixes are whole files in llama.cpp itself, which
rounds activations to 8 bits: the same type map for both, so the same bytes. --quick tries the script.
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
from moepress.compress.gptq.block_choice import BlockChoice
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
    machine_ = Machine(device="cpu", dtype="float32", memory_bytes=4 << 30)
    with solving(solver or solve_blocks):
        quantize_stage(str(setting.model), Output(folder=out), None, request, setting.calibration(seed), machine_)
    return open_checkpoint(out)


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grids", nargs="*", default=["q4_0", "q4_k", "q3_k", "q2_k", "iq4_xs"])
    parser.add_argument("--mixes", nargs="*", default=["Q4_K_M", "Q3_K_M"])
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
    document: dict[str, Any] = {"machine": machine() | {"model": setting.model.name}, "grids": [], "files": []}
    if known.get("machine", {}).get("model") == setting.model.name:
        document |= {part: known[part] for part in ("grids", "files")}
    with tempfile.TemporaryDirectory(prefix="gguf-quality-") as name:
        parts = (("grids", on_grids, options.grids), ("files", as_files, options.mixes))
        for part, measured, named in parts:
            for row in measured(setting, named, options.seeds, Path(name)):
                key = (row[part[:-1]], row["method"], row["seed"])
                others = [r for r in document[part] if (r[part[:-1]], r["method"], r["seed"]) != key]
                document[part] = [*others, row]
                if file:  # at once: the next may take an hour
                    file.write_text(json.dumps(document, indent=2) + "\n")
    for part in ("grids", "files"):
        if document[part]:
            print(f"\n{table(document[part], part[:-1])}")


if __name__ == "__main__":
    main()
