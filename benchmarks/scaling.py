"""How quantizing scales with workers: measured here on one and two, simulated from measured tasks for many.

    python benchmarks/scaling.py --work FOLDER                    # all three parts, about 25 minutes on two quiet cores
    python benchmarks/scaling.py --work FOLDER --parts simulation # from the tasks that the file has
    python benchmarks/scaling.py --work FOLDER --small            # all parts on tiny models, in two minutes

- `made`: the made checkpoint of 411 M parameters, by `moepress quantize` and by `--workers 1` and `2`, one thread each.
- `r1`: a dense and an MoE layer of DeepSeek-R1's width with 16 experts, layers independent, by one worker of two
  threads, whose tasks the simulation takes, and by two of one. 8,192 tokens are 4,096 for each of the 16 experts, as
  many as 131,072 are for each of R1's 256.
- `simulation`: R1 whole at 131,072 tokens on 8, 64 and 512 workers like this machine, layers in turn and independent:
  every task is given to the first worker that is free, and takes what its kind took here, scaled by its tokens and
  experts, and the time for its files over the worker's and the store's share of the network.

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
from moepress.runs.work.tasks import Task

PARTS = ("made", "r1", "simulation")
WORKERS = (1, 8, 64, 512)
TIMED = Path(__file__).parent / "timed.py"
R1_LAYERS, R1_DENSE, R1_EXPERTS, R1_TOKENS = 61, 3, 256, 131_072
SHARD_TOKENS, PIECE_EXPERTS, R1_HIDDEN = 16_384, 9, 7168
EXPERT_BYTES, CODED_BYTES = 3 * 7168 * 2048, int(3 * 7168 * 2048 * 4.125 / 8)
DENSE_BYTES, ATTENTION_BYTES = 3 * 7168 * 18432, 231 << 20
PER_TOKEN = ("forward", "Hessian", "embed", "hidden states", "check")  # phases that grow with the tokens
MACHINES = (("two cores like these", 1.0, 1.0, 0.09), ("RTX 4090", 58.2 / 11.8, 70.8 / 3.8, 0.40))
"""Workers: how many times as fast as these two cores, at least and at most, by r1_projection.json's `quantize` of 192
experts; dollars an hour, assumed."""
LINE, STORE = 1.25e9, 5e9
"""Bytes per second of one worker's network (10 Gbit/s) and of the store, assumed."""


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


def costs_of(measured: Mapping[str, Any], tasks: Sequence[Task], shards: int, *, independent: bool) -> dict[str, Cost]:
    """Every task's cost, from those that were measured.

    Sequential layers walk two models and make Hessians of both (targets from the original): what grows with the tokens
    is twice there.
    """
    streams, shard_tokens = (1 if independent else 2), R1_TOKENS // shards
    state = R1_HIDDEN * 4.0  # bytes of one token's fp32 state
    begin = {"dense": _task(measured, "begin-0"), "moe": _task(measured, "begin-1")}
    forward = {"dense": _task(measured, "forward-0-0"), "moe": _task(measured, "forward-1-0")}
    solved = [_task(measured, f"experts-1-{part}") for part in (0, 1)]
    expert = sum(row["seconds"] for row in solved) / measured["experts"]
    found = {}
    for task in tasks:
        kind = "dense" if task.at and task.at[0] < R1_DENSE else "moe"
        weights = ATTENTION_BYTES + (DENSE_BYTES if kind == "dense" else 0)
        experts = int(task.cost) if task.kind == "experts" and kind == "moe" else 0
        layer = R1_EXPERTS if kind == "moe" else 0
        if task.kind == "begin":
            longer = R1_TOKENS / measured["tokens"]
            seconds = _scaled(begin[kind], longer, streams)
            moved = weights + R1_TOKENS * state * streams * 3
        elif task.kind == "experts":
            seconds = expert * experts or 30.0
            moved = experts * (EXPERT_BYTES + CODED_BYTES) + (R1_TOKENS * state * streams if experts else 2 * weights)
        elif task.kind in ("forward", "leave"):
            seconds = forward[kind]["seconds"] * shard_tokens / measured["tokens"] * streams
            both = EXPERT_BYTES if independent else EXPERT_BYTES + CODED_BYTES
            moved = weights + layer * both + shard_tokens * state * streams * 3
        else:
            seconds, moved = 60.0, 4e9
        found[task.id] = Cost(seconds=seconds, bytes=moved)
    return found


def _task(measured: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found: Mapping[str, Any] = next(row for row in measured["tasks"] if row["task"] == name)
    return found


def _scaled(row: Mapping[str, Any], longer: float, streams: int) -> float:
    own = sum(value[0] for name, value in row["phases"].items() if name in PER_TOKEN)
    return float((row["seconds"] - own) + own * longer * streams)


def simulate(tasks: Sequence[Task], costs: Mapping[str, Cost], workers: int, speed: float = 1.0) -> dict[str, float]:
    """Give each task to the worker that is free first, as soon as what it needs is done; workers are `speed` times as
    fast as this machine.

    Returns:
        Seconds of the whole; the shares of the workers' time that compute and files take; the longest chain.
    """
    rate = min(LINE, STORE / workers)
    took = {task.id: costs[task.id].seconds / speed + costs[task.id].bytes / rate for task in tasks}
    free, done, pending = [0.0] * workers, dict[str, float](), list(enumerate(tasks))
    waiting: list[tuple[float, int, Task]] = []
    heapq.heapify(free)
    while pending or waiting:
        still = []
        for number, task in pending:
            if all(need in done for need in task.needs):
                heapq.heappush(waiting, (max((done[need] for need in task.needs), default=0.0), number, task))
            else:
                still.append((number, task))
        pending = still
        ready, _, task = heapq.heappop(waiting)
        start = max(heapq.heappop(free), ready)
        done[task.id] = start + took[task.id]
        heapq.heappush(free, done[task.id])
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


def limit_of(row: Mapping[str, float]) -> str:
    """What holds the whole up."""
    if row["chain_seconds"] > 0.8 * row["seconds"]:
        return "the longest chain of tasks"
    return "files" if row["files"] > 0.5 else "computing"


def simulation(measured: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Both orders of layers on all numbers of workers; with many workers shards are smaller, so that chains are."""
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
            costs = costs_of(measured, tasks, shards, independent=independent)
            row = {"independent": independent, "workers": workers, "shards": shards, "tasks": len(tasks)}
            for name, least, most, price in MACHINES:
                slow, fast = (simulate(tasks, costs, workers, speed) for speed in (least, most))
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
            report["simulation"] = simulation(report["r1"])
        file.write_text(json.dumps(report, indent=2) + "\n")
    print_rows(report)


if __name__ == "__main__":
    main()
