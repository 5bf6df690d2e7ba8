"""GPTQ beside the peers: time and memory of moepress, GPTQModel and llm-compressor on the same models and tokens.

    python benchmarks/gptq_speed.py [--repeat 3] [--threads 2] [--tools moepress gptqmodel llmcompressor]

Two models: the bench model (without ../shared the demo), 4 bits in groups of 64, 64 windows of 512 tokens; and a made
Qwen3-MoE of 411 M parameters (4 layers of 64 experts, hidden 1024, width 512, top-8), 4 bits in groups of 128,
8 windows of 512. Every Linear but router, kv_b_proj and lm_head. Each tool is a process of its own with the same number
of threads, one after the other; a round is all tools once. Peers are run where benchmarks/peers/setup.sh made their
environment, and with their own defaults. --quick is the demo with little text, to try the script.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from quantizers import NAMES, TOOLS, Task, available, run_tool, write_windows
from setting import RESULTS, bench_model, machine, texts

from moepress.converters.safetensors.scheme import Scheme
from moepress.models.storage.checkpoint import open_checkpoint
from moepress.stages.places import Calibration, model_folder

WINDOW = 512
MADE = {"layers": 4, "experts": 64, "hidden": 1024, "width": 512, "top_k": 8}
FIGURES = ("wall_seconds", "seconds_quantize", "cpu_seconds", "peak_rss_bytes")


def tasks(work: Path, threads: int, names: list[str], *, quick: bool) -> dict[str, Task]:
    """What is to be quantized, by name."""
    if quick:
        calibration = Calibration(tokens=8 * 128, window=128)
        demo = Task(
            model=model_folder("demo"), scheme=Scheme(bits=4, group_size=32), calibration=calibration, threads=threads
        )
        return {"demo": demo}
    found = {}
    if "bench" in names:
        found[bench_model().name] = Task(
            model=bench_model(),
            scheme=Scheme(bits=4, group_size=64),
            calibration=Calibration(domains=texts("train"), tokens=64 * WINDOW, window=WINDOW),
            threads=threads,
        )
    if "made" in names:
        found["made Qwen3-MoE"] = Task(
            model=made(work / "made"),
            scheme=Scheme(bits=4, group_size=128),
            calibration=Calibration(domains=texts("train"), tokens=8 * WINDOW, window=WINDOW),
            threads=threads,
        )
    return found


def made(folder: Path) -> Path:
    """The made checkpoint, written by a process of its own."""
    code = f"from made import *; make_qwen3_moe(Path({str(folder)!r}), **{MADE})"
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, check=True)
    return folder


def parameters(model: Path) -> int:
    """How many numbers a checkpoint has."""
    return sum(math.prod(shape) for shape in open_checkpoint(model).shapes.values())


def measure(name: str, task: Task, tools: list[str], rounds: int, work: Path) -> list[dict[str, Any]]:
    """All samples of a model: tools in turn, round after round."""
    corpus = write_windows(task, work / "windows.safetensors")
    samples = []
    for repetition in range(rounds):
        for tool in tools:
            with tempfile.TemporaryDirectory(dir=work) as folder:
                figures = run_tool(tool, task, Path(folder) / "out", work / "windows.safetensors")
            samples.append({"model": name, "tool": tool, "round": repetition, "windows": corpus.digest, **figures})
            said = f"{figures['wall_seconds']:.1f} s, {figures['peak_rss_bytes'] / 1e9:.2f} GB"
            print(f"{name}, round {repetition + 1}: {NAMES[tool]} {said}", file=sys.stderr, flush=True)
    return samples


def rows_of(name: str, samples: list[dict[str, Any]], tools: list[str]) -> list[dict[str, Any]]:
    """One row a tool: medians over rounds, and ratios to moepress of the same round (their medians)."""
    rows = []
    for tool in tools:
        own = [s for s in samples if s["tool"] == tool]
        ours = {s["round"]: s for s in samples if s["tool"] == "moepress"}
        row: dict[str, Any] = {"model": name, "tool": tool, "version": own[0]["version"], "rounds": len(own)}
        for figure in FIGURES:
            values = [s[figure] for s in own]
            row[figure] = {"median": statistics.median(values), "least": min(values), "most": max(values)}
            if ours:
                row[figure]["ratio"] = statistics.median(s[figure] / ours[s["round"]][figure] for s in own)
        rows.append(row)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown; in brackets the ratio to moepress."""
    lines = [
        "| | whole process | quantization alone | CPU time | peak RSS |",
        "|---|---:|---:|---:|---:|",
    ]
    for row in rows:
        cells = []
        for figure in FIGURES:
            value, ratio = row[figure]["median"], row[figure].get("ratio")
            said = f"{value / 2**20:,.0f} MiB" if figure == "peak_rss_bytes" else f"{value:.1f} s"
            cells.append(said if ratio is None or row["tool"] == "moepress" else f"{said} ({ratio:.1f}x)")
        lines.append(f"| {NAMES[row['tool']]} {row['version']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=1, help="rounds of all tools in turn")
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=list(TOOLS))
    parser.add_argument("--models", nargs="+", choices=["bench", "made"], default=["bench", "made"])
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--quick", action="store_true", help="the demo with little text")
    parser.add_argument("--json", type=Path, help="file for the figures (default: benchmarks/results/gptq_speed.json)")
    options = parser.parse_args()
    tools = available(options.tools)
    rows, samples, shapes = [], [], {}
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="gptq-speed-") as name:
        work = Path(name)
        for label, task in tasks(work, options.threads, options.models, quick=options.quick).items():
            found = measure(label, task, tools, options.repeat, work)
            samples += found
            rows += rows_of(label, found, tools)
            shapes[label] = {
                "parameters": parameters(task.model),
                "bits": task.scheme.bits,
                "group_size": task.scheme.group_size,
                "tokens": task.calibration.tokens,
                "window": task.calibration.window,
            }
            print(f"\n{label}: {shapes[label]['parameters'] / 1e6:.0f} M parameters, {options.threads} threads")
            print(table([row for row in rows if row["model"] == label]), flush=True)
    file = options.json or (None if options.quick else RESULTS / "gptq_speed.json")
    if file:
        document = {"machine": machine() | {"threads": options.threads, "load_before": load}, "models": shapes}
        file.write_text(json.dumps(document | {"rows": rows, "samples": samples}, indent=2) + "\n")


if __name__ == "__main__":
    main()
