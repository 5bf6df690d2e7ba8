"""How quantizing scales with workers: measured here on one and two, simulated from measured tasks for many.

    python benchmarks/scaling.py --work FOLDER                    # all three parts, about 25 minutes on two quiet cores
    python benchmarks/scaling.py --work FOLDER --parts simulation # in a second
    python benchmarks/scaling.py --work FOLDER --small            # all parts on tiny models, in two minutes

- `made`: the made checkpoint of 411 M parameters, by `moepress quantize` and by `--workers 1` and `2`, one thread each.
- `r1`: a dense and an MoE layer of DeepSeek-R1's width with 16 experts, layers independent, by one worker of two
  threads and by two of one. 8,192 tokens are 4,096 for each of the 16 experts, as many as 131,072 are for each of R1's.
- `simulation`: R1 whole at 131,072 tokens with all 256 experts on 1, 8, 64 and 512 workers, layers in turn and
  independent: every task is given to the first worker that is free, and takes its share of the seconds that
  r1_projection.json has for one machine, and the time for its files over the worker's and the store's network.

Written to benchmarks/results/scaling.json. What is simulated is a projection and says so.
"""

import argparse
import heapq
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptq_speed import made
from make_r1 import make_r1
from r1_layer import SMALL
from setting import RESULTS, machine, texts

from moepress.compress.gptq.tasks import Extent, graph
from moepress.runs.store.store import open_store
from moepress.runs.work.shared import open_shared
from moepress.runs.work.tasks import Task, consumers

PARTS = ("made", "r1", "simulation")
WORKERS = (1, 8, 64, 512)
TIMED = Path(__file__).parent / "timed.py"
R1_LAYERS, R1_DENSE, R1_EXPERTS, R1_TOKENS = 61, 3, 256, 131_072
SHARD_TOKENS, PIECE_EXPERTS, R1_HIDDEN = 16_384, 9, 7168
EXPERT_BYTES, CODED_BYTES = 3 * 7168 * 2048, int(3 * 7168 * 2048 * 4.125 / 8)
DENSE_BYTES, ATTENTION_BYTES = 3 * 7168 * 18432, 231 << 20
MACHINES = (("two cores like these", 1.0, 1.0, 0.09), ("RTX 4090", 58.2 / 11.8, 70.8 / 3.8, 0.40))
"""Workers: how many times as fast as these two cores, at least and at most, by r1_projection.json's `quantize` of 192
experts; dollars an hour, assumed."""
LINE, STORE = 1.25e9, 50e9
"""Bytes per second of one worker's network (10 Gbit/s) and of a bucket, which those that work share; assumed."""


def run(work: Path, command: Sequence[str], threads: int) -> dict[str, float]:
    """A moepress command in a process of its own; its seconds and peak."""
    report = work / "report.json"
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    whole = [sys.executable, str(TIMED), str(report), sys.executable, "-m", "moepress", *command]
    print("moepress " + " ".join(command), flush=True)
    subprocess.run(whole, check=True, env=environment, stdout=subprocess.DEVNULL)
    found: dict[str, float] = json.loads(report.read_text())
    return found


def digest_of(folder: Path) -> str:
    """Of all files of a result."""
    from moepress.runs.files import sha256_of

    return " ".join(sha256_of(file)[:16] for file in sorted(folder.glob("model-*.safetensors")))


def measure_made(work: Path, *, small: bool) -> list[dict[str, Any]]:
    """The plain run and those of workers; refuses other bytes."""
    model = "demo" if small else str(made(work / "made"))
    text = ["--tokens", "4096", "--window", "512", "--group-size", "64" if small else "128"]
    for pair in texts("train"):
        text += ["--domain", pair]
    rows, expected = list[dict[str, Any]](), dict[bool, str]()
    for independent in (False, True):
        for workers in (None, 2) if independent else (None, 1, 2):
            out = work / "out"
            options = ["--independent-layers"] if independent else []
            options += ["--workers", str(workers)] if workers else []
            threads = workers or 1  # of all workers together
            found = run(work, ["quantize", model, "-o", str(out), "--force", *text, *options], threads)
            if expected.setdefault(independent, digest_of(out)) != digest_of(out):
                raise SystemExit(f"{workers} workers gave other bytes than the plain run.")
            rows.append({"workers": workers or 0, "independent": independent, "seconds": found["wall_seconds"]})
            shutil.rmtree(out)
    return rows


def r1_model(work: Path, *, small: bool) -> Path:
    """A dense and an MoE layer."""
    folder = work / "r1"
    if not (folder / "tokenizer_config.json").exists():  # written last
        shutil.rmtree(folder, ignore_errors=True)
        make_r1(folder, experts=16, **(SMALL if small else {"vocab_size": 2048}))
    return folder


def measure_r1(work: Path, *, small: bool) -> Iterator[dict[str, Any]]:
    """Seconds by workers, and the tasks of one worker of two threads; again after each of the runs, which are long."""
    model, rows, tasks = r1_model(work, small=small), list[dict[str, Any]](), list[dict[str, Any]]()
    tokens = 1024 if small else 8192
    text = ["--tokens", "1024" if small else "8192", "--window", "64" if small else "512"]
    for pair in texts("train"):
        text += ["--domain", pair]
    for workers, threads in ((1, 2), (2, 1)):
        store = work / "store"
        shutil.rmtree(store, ignore_errors=True)
        plan = ["plan-work", str(model), "--store", str(store), *text, "--independent-layers", "--max-memory", "5GiB"]
        run(work, plan, threads)
        seconds = by_workers(work, store, workers, threads)
        rows.append({"workers": workers, "threads": threads, "seconds": seconds})
        if threads == 2:
            shared = open_shared(open_store(str(store)))
            for task in shared.tasks:
                done = shared.done(task.id)
                assert done is not None
                size = sum(made.bytes for made in done.files.values())
                tasks.append({"task": task.id, "kind": task.kind, "seconds": done.seconds, "bytes": size})
                tasks[-1] |= {"phases": dict(done.phases), "peak_bytes": done.peak_bytes}
        shutil.rmtree(store)
        yield {"rows": rows, "tasks": tasks, "experts": 16, "tokens": tokens}


def by_workers(work: Path, store: Path, workers: int, threads: int) -> float:
    """Seconds until so many `moepress work` are done."""
    import time

    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    base = [sys.executable, "-m", "moepress", "work", "--store", str(store), "--threads", str(threads)]
    start = time.perf_counter()
    processes = [
        subprocess.Popen([*base, "--shard", f"{n}/{workers}", "--max-memory", "5GiB"], env=environment)
        for n in range(workers)
    ]
    if any(process.wait() for process in processes):
        raise SystemExit("a worker failed")
    return time.perf_counter() - start


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Of a task: seconds of a worker like this machine, and bytes over its network."""

    seconds: float
    bytes: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Shares:
    """Seconds of R1's tasks on two cores, of r1_projection.json's `quantize` with 192 and with 128 experts.

    Attributes:
        expert: one expert is solved: the difference of both, over layers and experts.
        forward: the routed experts' forward pass of all tokens of a layer, by FLOP at the measured rate.
        begin: what else a layer takes with targets from the original.
    """

    expert: float
    forward: float
    begin: float


def shares_of(projected: Mapping[str, Any], rate_flops: float, which: int) -> Shares:
    """By the least (0) or the most (1) of the projected seconds."""
    first = str(projected["rows"][0]["machine"])
    rows = {row["experts"]: row["seconds"][which] for row in _quantized(projected, first)}
    moe = R1_LAYERS - R1_DENSE
    expert = (rows[192] - rows[128]) / (64 * moe)
    forward = 2.0 * R1_TOKENS * 8 * EXPERT_BYTES / rate_flops
    begin = (rows[192] - 192 * expert * moe) / R1_LAYERS - 2 * forward  # both streams
    return Shares(expert=expert, forward=forward, begin=max(begin, 0.0))


def _quantized(projected: Mapping[str, Any], machine: str) -> list[Mapping[str, Any]]:
    return [row for row in projected["rows"] if row["stage"] == "quantize" and row["machine"] == machine]


def costs_of(shares: Shares, tasks: Sequence[Task], shards: int, *, independent: bool) -> dict[str, Cost]:
    """Every task's cost. Layers in turn walk two models, for targets from the original; independent ones walk one."""
    streams, shard_tokens = (1 if independent else 2), R1_TOKENS // shards
    state = R1_HIDDEN * 4.0  # bytes of one token's fp32 state
    found = {}
    for task in tasks:
        dense = bool(task.at) and task.at[0] < R1_DENSE
        weights = ATTENTION_BYTES + (DENSE_BYTES if dense else 0)
        experts = 0 if dense or task.kind != "experts" else int(task.cost)
        layer = 0 if dense else R1_EXPERTS
        if task.kind == "begin":
            seconds, moved = shares.begin * streams / 2, weights + R1_TOKENS * state * streams * 3
        elif task.kind == "experts":
            seconds = shares.expert * experts
            moved = experts * (EXPERT_BYTES + CODED_BYTES) + (R1_TOKENS * state * streams if experts else 2 * weights)
        elif task.kind in ("forward", "leave"):
            seconds = shares.forward * streams / shards
            both = EXPERT_BYTES if independent else EXPERT_BYTES + CODED_BYTES
            moved = weights + layer * both + shard_tokens * state * streams * 3
        else:
            seconds, moved = 60.0, 4e9
        found[task.id] = Cost(seconds=seconds, bytes=moved)
    return found


def simulate(tasks: Sequence[Task], costs: Mapping[str, Cost], workers: int, speed: float = 1.0) -> dict[str, float]:
    """Give each task to the worker that is free first, as soon as what it needs is done; workers are `speed` times as
    fast as this machine.

    Returns:
        Seconds of the whole; the shares of the workers' time that compute and files take; the longest chain.
    """
    rate = min(LINE, STORE / min(workers, side_by_side(tasks)))
    took = {task.id: costs[task.id].seconds / speed + costs[task.id].bytes / rate for task in tasks}
    free, done = [0.0] * workers, dict[str, float]()
    missing, after = {task.id: len(task.needs) for task in tasks}, consumers(tasks)
    number = {task.id: place for place, task in enumerate(tasks)}
    waiting = [(0.0, number[task.id], task.id) for task in tasks if not task.needs]
    needs = {task.id: task.needs for task in tasks}
    while waiting:
        ready, _, task = heapq.heappop(waiting)
        done[task] = max(heapq.heappop(free), ready) + took[task]
        heapq.heappush(free, done[task])
        for other in after[task]:
            missing[other] -= 1
            if not missing[other]:
                heapq.heappush(waiting, (max(done[need] for need in needs[other]), number[other], other))
    chain: dict[str, float] = {}
    for task in tasks:
        chain[task.id] = took[task.id] + max((chain[need] for need in task.needs), default=0.0)
    whole = max(done.values())
    compute = sum(costs[task.id].seconds for task in tasks) / speed
    files = sum(costs[task.id].bytes for task in tasks) / rate
    return {
        "seconds": whole,
        "busy": (compute + files) / (whole * workers),
        "files": files / (compute + files),
        "chain_seconds": max(chain.values()),
    }


def side_by_side(tasks: Sequence[Task]) -> int:
    """How many tasks of the kind that there are most of can be done at once: those of a layer, or all of them."""
    independent = any(task.kind == "forward" for task in tasks)
    layers = {task.at[0] for task in tasks if task.kind == "experts"}
    experts = sum(task.kind == "experts" for task in tasks)
    return experts if independent else -(-experts // len(layers))


def limit_of(row: Mapping[str, float]) -> str:
    """What holds the whole up."""
    if row["chain_seconds"] > 0.8 * row["seconds"]:
        return "the longest chain of tasks"
    return "files" if row["files"] > 0.5 else "computing"


def simulation() -> list[dict[str, Any]]:
    """Both orders of layers on all numbers of workers; with many workers shards are smaller, so that chains are."""
    projected = json.loads((RESULTS / "r1_projection.json").read_text())
    rate = json.loads((RESULTS / "r1_layer.json").read_text())["rates"]["forward_flops"]
    least, most = (shares_of(projected, rate, which) for which in (0, 1))
    rows = []
    for independent in (False, True):
        for workers in WORKERS:
            shards = max(R1_TOKENS // SHARD_TOKENS, min(workers, 64)) if independent else R1_TOKENS // SHARD_TOKENS
            pieces = [PIECE_EXPERTS] * (R1_EXPERTS // PIECE_EXPERTS) + [R1_EXPERTS % PIECE_EXPERTS]
            parts = [[0] if layer < R1_DENSE else pieces for layer in range(R1_LAYERS)]
            extent = Extent(
                parts=parts, shards=shards, independent=independent, ends=False, head=False, layers=R1_LAYERS
            )
            tasks = graph(extent)
            row = {"independent": independent, "workers": workers, "shards": shards, "tasks": len(tasks)}
            for name, slow_speed, fast_speed, price in MACHINES:
                slow = simulate(tasks, costs_of(most, tasks, shards, independent=independent), workers, slow_speed)
                fast = simulate(tasks, costs_of(least, tasks, shards, independent=independent), workers, fast_speed)
                rows.append({**row, "machine": name, "projected": True, "slow": slow, "fast": fast})
                hours = [found["seconds"] / 3600 for found in (fast, slow)]
                rows[-1] |= {"limit": limit_of(slow), "dollars": [workers * price * each for each in hours]}
    return rows


def print_rows(report: Mapping[str, Any]) -> None:
    """Markdown tables."""
    if "made" in report:
        print("\n| layers | workers | seconds | of the plain run |\n|---|---:|---:|---:|")
        for row in report["made"]:
            plain = next(r for r in report["made"] if r["independent"] == row["independent"] and not r["workers"])
            order = "independent" if row["independent"] else "in turn"
            share = plain["seconds"] / row["seconds"]
            print(f"| {order} | {row['workers'] or 'plain'} | {row['seconds']:.1f} | {share:.2f}x |")
    if "r1" in report:
        first = report["r1"]["rows"][0]["seconds"]
        print("\n| R1's width: workers | threads each | seconds | |\n|---:|---:|---:|---:|")
        for row in report["r1"]["rows"]:
            print(f"| {row['workers']} | {row['threads']} | {row['seconds']:.1f} | {first / row['seconds']:.2f}x |")
        print("\n| task | seconds | peak memory, MiB |\n|---|---:|---:|")
        for row in report["r1"]["tasks"]:
            print(f"| {row['task']} | {row['seconds']:.1f} | {row['peak_bytes'] / 2**20:.0f} |")
    if "simulation" in report:
        print("\nR1 whole, projected:\n\n| a worker is | layers | workers | hours | dollars | busy | files | limit |")
        print("|---|---|---:|---:|---:|---:|---:|---|")
        for row in report["simulation"]:
            order, slow = "independent" if row["independent"] else "in turn", row["slow"]
            hours = _range([row["fast"]["seconds"] / 3600, slow["seconds"] / 3600], 1)
            cells = f"{hours} | {_range(row['dollars'], 0)} | {slow['busy']:.0%} | {slow['files']:.0%} | {row['limit']}"
            print(f"| {row['machine']} | {order} | {row['workers']} | {cells} |")


def _range(values: Sequence[float], digits: int) -> str:
    low, high = (f"{value:,.{digits}f}" for value in values)
    return low if low == high else f"{low} to {high}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, metavar="FOLDER", help="for checkpoints and outputs")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--small", action="store_true", help="tiny models")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the figures go")
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    file = given.json or (given.work / "scaling.json" if given.small else RESULTS / "scaling.json")
    report: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    report |= {"machine": machine(), "small": given.small, "line": LINE, "store": STORE}
    for part in PARTS:
        if part not in given.parts:
            continue
        if part == "made":
            report["made"] = measure_made(given.work, small=given.small)
        elif part == "r1":
            for report["r1"] in measure_r1(given.work, small=given.small):
                file.write_text(json.dumps(report, indent=2) + "\n")
        else:
            report["simulation"] = simulation()
        file.write_text(json.dumps(report, indent=2) + "\n")
    print_rows(report)


if __name__ == "__main__":
    main()
