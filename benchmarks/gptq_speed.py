"""GPTQ beside the peers: time and memory of moepress, GPTQModel, llm-compressor and AutoRound on the same tokens.

    python benchmarks/gptq_speed.py [--repeat 3] [--threads 2] [--tools moepress ...] [--work FOLDER]

Two models: the bench model (without ../shared the demo), 4 bits in groups of 64, 64 windows of 512 tokens; and a made
Qwen3-MoE of 411 M parameters (4 layers of 64 experts, hidden 1024, width 512, top-8), 4 bits in groups of 128,
8 windows of 512. Every Linear but router, kv_b_proj and lm_head. Each tool is a process of its own with the same number
of threads, one after the other; a round is all tools once, and each round begins with the next tool. Peers are run
where benchmarks/peers/setup.sh made their environment, with their own defaults but for what their names say.
What a tool wrote is opened: it must have quantized the same matrices, to codes that stand for the model's weights.

--tuned adds AutoRound's learned rounding, on the bench model and in the first round alone: with its default of 200
iterations it takes many times as long as all others together, with its light recipe of 50 a quarter of that.
--work keeps every sample as soon as it is there: the same command goes on after the last one when it was stopped.
--quick is the demo with little text, to try the script.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from peer_weights import require_quantized
from quantizers import LEARNED, NAMES, OWN, QUICK, TOOLS, Task, available, run_tool, versions, write_windows
from setting import RESULTS, bench_model, code_digest, machine, texts
from speed_tables import phases_of, phases_table, rows_of, table

from moepress.compress.estimates.rates import matmul_rate
from moepress.converters.safetensors.scheme import Scheme
from moepress.models.storage.checkpoint import open_checkpoint
from moepress.stages.places import Calibration, model_folder

WINDOW = 512
MADE_NAME = "made Qwen3-MoE"
MADE = {"layers": 4, "experts": 64, "hidden": 1024, "width": 512, "top_k": 8}


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
        found[MADE_NAME] = Task(
            model=made(work / "made"),
            scheme=Scheme(bits=4, group_size=128),
            calibration=Calibration(domains=texts("train"), tokens=8 * WINDOW, window=WINDOW),
            threads=threads,
        )
    return found


def made(folder: Path) -> Path:
    """The made checkpoint, written by a process of its own."""
    if (folder / "model.safetensors.index.json").exists():  # written last
        return folder
    code = f"from made import *; make_qwen3_moe(Path({str(folder)!r}), **{MADE})"
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, check=True)
    return folder


def parameters(model: Path) -> int:
    """How many numbers a checkpoint has."""
    return sum(math.prod(shape) for shape in open_checkpoint(model).shapes.values())


def measure(
    name: str, task: Task, tools: list[str], once: list[str], rounds: int, work: Path, kept: Path
) -> list[dict[str, Any]]:
    """All samples of a model, those of an earlier call among them: tools in turn, round after round.

    Args:
        name: of the model.
        task: what each tool is given.
        tools: which of them; round r begins with the r-th.
        once: those of them that the first round alone has.
        rounds: how many.
        work: a folder for outputs.
        kept: file of one sample a line; what is in it is not measured again.
    """
    corpus = write_windows(task, work / "windows.safetensors")
    lines = kept.read_text().splitlines() if kept.exists() else []
    before = {(s["model"], s["tool"], s["round"]): s for s in map(json.loads, lines)}
    samples = []
    for repetition in range(rounds):
        for tool in in_turn(tools, once, repetition):
            sample = before.get((name, tool, repetition))
            if sample is None:
                sample = {"model": name, "tool": tool, "round": repetition, "windows": corpus.digest}
                sample |= one_sample(tool, task, work)
                with kept.open("a") as stream:
                    stream.write(json.dumps(sample) + "\n")
            samples.append(sample)
            said = f"{sample['wall_seconds']:.1f} s, {sample['peak_rss_bytes'] / 1e9:.2f} GB"
            print(f"{name}, round {repetition + 1}: {NAMES[tool]} {said}", file=sys.stderr, flush=True)
    return samples


def in_turn(tools: list[str], once: list[str], repetition: int) -> list[str]:
    """The order of a round: each begins with the next tool; those of `once` are in the first alone."""
    own = [tool for tool in tools if tool not in once or not repetition]
    first = repetition % len(own)
    return [*own[first:], *own[:first]]


def one_sample(tool: str, task: Task, work: Path) -> dict[str, Any]:
    """One run of a tool, its output looked at; for moepress with the matmul rate of the same minutes."""
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(dir=work) as folder:
        out = Path(folder) / "out"
        rates = [fp32_rate()] if tool in OWN else []
        figures = run_tool(tool, task, out, work / "windows.safetensors")
        rates += [fp32_rate()] if tool in OWN else []
        figures |= require_quantized(out, task.model, task.scheme) | {"load_before": load}
    return figures | ({"fp32_flops": max(rates)} if rates else {})


def fp32_rate() -> float:
    """FLOP per second of large matrices on this machine; the best of three, for other processes only take away."""
    return max(matmul_rate(torch.device("cpu")) for _ in range(3))


def claim(work: Path, about: dict[str, Any]) -> None:
    """Make a folder this benchmark's, or make sure that it is of one with the same code, versions and options.

    Raises:
        SystemExit: it is of another one.
    """
    work.mkdir(parents=True, exist_ok=True)
    file = work / "about.json"
    before = json.loads(file.read_text()) if file.exists() else about
    known, of = before["versions"], about["versions"]
    changed = [f"versions of {NAMES[tool]}" for tool in of if known.get(tool, of[tool]) != of[tool]]
    changed += [key for key in about if key != "versions" and before.get(key) != about[key]]
    if changed:
        raise SystemExit(f"{work} was begun with other {', '.join(changed)}; give another --work, or delete it.")
    file.write_text(json.dumps(about | {"versions": {**known, **of}}, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=1, help="rounds of all tools in turn")
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=QUICK, help=f"default: {' '.join(QUICK)}")
    parser.add_argument(
        "--tuned", nargs="+", choices=LEARNED, default=[], help="once, on the bench model (or the demo)"
    )
    parser.add_argument("--models", nargs="+", choices=["bench", "made"], default=["bench", "made"])
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--work", type=Path, help="folder whose samples are kept, to go on from")
    parser.add_argument("--quick", action="store_true", help="the demo with little text")
    parser.add_argument("--json", type=Path, help="file for the figures (default: benchmarks/results/gptq_speed.json)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    once = [tool for tool in options.tuned if tool not in options.tools]
    tools = available([*options.tools, *once])
    about = {"threads": options.threads, "quick": options.quick, "code": code_digest()}
    about |= {"versions": {tool: versions(tool) for tool in tools}}
    rows, samples, shapes, phases = [], [], {}, {}
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="gptq-speed-") as name:
        work = (options.work or Path(name)).resolve()
        claim(work, about)
        print_versions(about["versions"], options.threads)
        for label, task in tasks(work, options.threads, options.models, quick=options.quick).items():
            own = [tool for tool in tools if tool not in once or label != MADE_NAME]
            found = measure(label, task, own, once, options.repeat, work, work / "samples.jsonl")
            samples += found
            rows += rows_of(label, found, own)
            phases[label] = phases_of(found)
            shapes[label] = {
                "parameters": parameters(task.model),
                "linears": found[0]["linears"],
                "bits": task.scheme.bits,
                "group_size": task.scheme.group_size,
                "tokens": task.calibration.tokens,
                "window": task.calibration.window,
            }
            print(f"\n{label}: {shapes[label]['parameters'] / 1e6:.0f} M parameters, {options.threads} threads")
            print(table([row for row in rows if row["model"] == label]))
            if phases[label]:
                print(f"\nmoepress on {label}, phase by phase\n{phases_table(phases[label])}", flush=True)
    file = options.json or (None if options.quick else RESULTS / "gptq_speed.json")
    if file:
        facts = machine() | {"load_before": load} | about
        document = {"machine": facts, "models": shapes, "rows": rows, "phases": phases, "samples": samples}
        file.write_text(json.dumps(document, indent=2) + "\n")


def print_versions(found: dict[str, dict[str, str]], threads: int) -> None:
    """One line a tool."""
    for tool, of in found.items():
        print(f"{NAMES[tool]}: {', '.join(f'{name} {version}' for name, version in of.items())}; {threads} threads")
    print(flush=True)


if __name__ == "__main__":
    main()
