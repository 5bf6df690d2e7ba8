"""DeepSeek-R1's width on this machine: profile, prune and quantize one dense and one MoE layer, phase by phase.

    python benchmarks/r1_layer.py --work r1                     # 12.2 GB for the checkpoint, as much again for outputs
    python benchmarks/r1_layer.py --work r1 --device cuda --tokens 131072 --max-pieces 0 --quantize-experts 256
    python benchmarks/r1_layer.py --work tiny --small           # the same on a model of a few MB, in seconds

Makes the checkpoint by make_r1.py in --work, or takes the one that is there; outputs go to a folder beside it,
WORK-runs. Every stage is a process of its own, run with --timings, and its memory is read from /proc five times a
second. Before a stage the system is asked to forget the checkpoint's part of its cache, so that it is read from the
disk. `quantize` solves --max-pieces pieces (9 experts each) of the checkpoint pruned by the plan, and then one more
with --resume. What is said of the whole layer is then projected from these, and says so; with --max-pieces 0 it is
measured.

Written to benchmarks/results/r1_layer.json, on CUDA to r1_layer_cuda.json (the projection is from the CPU's); with
--small to WORK-runs/r1_layer.json; or where --json says. --stages runs some of the stages;
the figures of the others stay where the options are the same.
"""

import argparse
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from make_r1 import make_r1, r1_config
from processes import watched
from r1_scaling import Term, Work, by_phase, human, layer_of, project_quantize, table, total
from setting import RESULTS, machine, texts

from moepress.compress.estimates.rates import matmul_rate, read_rate
from moepress.runs.files import JOURNAL
from moepress.runs.output import partial_folder

STAGES = ("profile", "prune", "quantize")
INTERVAL_SECONDS = 0.2
GOAL_SECONDS, GOAL_TOKENS, GOAL_RSS_MIB = 60.0, 131072, 8e9 / 2**20
SMALL: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 256,
    "moe_intermediate_size": 128,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "q_lora_rank": 128,
    "kv_lora_rank": 112,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "vocab_size": 2048,
}
SMALL_EXPERTS, MOE_LAYER = 32, 1


def peaks_of(command: Sequence[str]) -> dict[str, Any]:
    """Run a command; its seconds, its peaks in MiB, and what it wrote on stdout."""
    found = watched(command, INTERVAL_SECONDS)
    return {
        "wall_seconds": found["seconds"],
        "peak_rss_mib": found["peak_mib"].get("VmHWM", 0.0),
        "peak_anonymous_mib": found["peak_mib"].get("RssAnon", 0.0),
        "samples": found["samples"],
        "stdout": found["stdout"],
    }


def run_stage(stage: str, arguments: Sequence[str], runs: Path, checkpoint: Path) -> dict[str, Any]:
    """One moepress command with --timings and --json, from a cold cache."""
    timings = runs / f"timings-{stage}.json"
    timings.unlink(missing_ok=True)
    forget(checkpoint)
    print(f"moepress {' '.join(arguments)}", flush=True)
    command = [sys.executable, "-m", "moepress", *arguments, "--timings", str(timings), "--json"]
    found = peaks_of(command)
    result = json.loads(found.pop("stdout"))
    return {"stage": stage, "command": list(arguments), **found, "timings": json.loads(timings.read_text())} | {
        "result": {key: result[key] for key in ("finished", "pieces_done", "pieces", "bytes_after") if key in result}
    }


def forget(folder: Path) -> None:
    """Ask the system to drop a folder's files from its cache; what was just written has to reach the disk first."""
    advise = getattr(os, "posix_fadvise", None)
    for file in folder.glob("*.safetensors") if advise is not None else ():
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
            advise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def checkpoint_config(given: argparse.Namespace) -> dict[str, Any]:
    """The config that the checkpoint is to have."""
    experts = SMALL_EXPERTS if given.small else 256
    widths = SMALL if given.small else {} if given.full_vocab else {"vocab_size": given.vocab}
    return r1_config(dense_layers=1, moe_layers=1, experts=experts, mtp=False, **widths)


def make_checkpoint(folder: Path, config: Mapping[str, Any]) -> None:
    """Make it where it is not there.

    A process of its own would keep this one small, but this one is not measured.
    """
    whole = (folder / "config.json", folder / "tokenizer_config.json", folder / "model.safetensors.index.json")
    if all(file.is_file() for file in whole):
        if json.loads(whole[0].read_text()) == config:
            print(f"{folder} is taken as it is", flush=True)
            return
        raise SystemExit(f"{folder} holds another model; give another --work.")
    if folder.exists() and any(folder.iterdir()):
        raise SystemExit(f"{folder} holds something unfinished; delete it, or give another --work.")
    start = time.perf_counter()
    overrides = {key: value for key, value in config.items() if key in SMALL}
    size = make_r1(folder, experts=config["n_routed_experts"], **overrides)
    print(f"{folder}: {size / 1e9:.2f} GB made in {time.perf_counter() - start:.0f} s", flush=True)


def write_rate(folder: Path, size: int) -> float:
    """Bytes per second of writing a file of that size until it is on the disk."""
    file, chunk = folder / "write-rate.tmp", os.urandom(8 << 20)
    start = time.perf_counter()
    with file.open("wb") as stream:
        for _ in range(size // len(chunk)):
            stream.write(chunk)
        stream.flush()
        os.fsync(stream.fileno())
    seconds = time.perf_counter() - start
    file.unlink()
    return size / seconds


def measure_rates(checkpoint: Path, runs: Path, device: torch.device, *, small: bool) -> dict[str, Any]:
    """What figures are held against; the best of three for matmuls, for other processes only take away."""
    forget(checkpoint)
    fp32, bf16 = (max(matmul_rate(device, dtype) for _ in range(3)) for dtype in (torch.float32, torch.bfloat16))
    return {
        "fp32_flops": fp32,
        "bf16_flops": bf16,
        "forward_flops": fp32 if device.type == "cpu" else bf16,
        "read_bytes_per_second": read_rate(checkpoint.glob("*.safetensors")),
        "write_bytes_per_second": write_rate(runs, (64 if small else 1024) << 20),
    }


def folder_bytes(folder: Path) -> int:
    """Bytes of a folder's files."""
    return sum(file.stat().st_size for file in folder.iterdir())


def solved_experts(output: Path) -> dict[str, dict[str, int]]:
    """Of an unfinished `quantize`: piece -> expert -> its calibration tokens, of the MoE layer."""
    found = {}
    for line in (partial_folder(output) / JOURNAL).read_text().splitlines():
        row = json.loads(line)
        note = row.get("note") or {}
        if note.get("layer") == MOE_LAYER:
            found[row["piece"]] = {expert: int(values[0]) for expert, values in note["experts"].items()}
    return found


def pieces_on_disk(output: Path) -> dict[str, int]:
    """Finished pieces of an unfinished run, with the time they were written."""
    return {file.name: file.stat().st_mtime_ns for file in partial_folder(output).glob("model-*.safetensors")}


class Bench:
    """The folders and options that stages share."""

    def __init__(self, given: argparse.Namespace, config: Mapping[str, Any]) -> None:
        self.given, self.config = given, config
        self.checkpoint, self.runs = given.work, given.work.with_name(f"{given.work.name}-runs")
        self.experts = int(config["n_routed_experts"])
        self.counts = (self.experts * 3 // 4, self.experts // 2)
        self.machine = ["--max-memory", given.max_memory, "--device", given.device]
        self.text = ["--tokens", str(given.tokens), "--window", str(given.window)]
        for pair in texts("train"):
            self.text += ["--domain", pair]

    def plan_file(self, count: int) -> Path:
        """Where the plan for so many experts lies."""
        return self.runs / f"plan-{count}.json"

    def profile(self) -> list[dict[str, Any]]:
        """Profile, then the plans."""
        folder = str(self.runs / "profile")
        arguments = ["profile", str(self.checkpoint), "-o", folder, "--force", *self.text, *self.machine]
        rows = [run_stage("profile", arguments, self.runs, self.checkpoint)]
        for count in self.counts:
            file = str(self.plan_file(count))
            command = [sys.executable, "-m", "moepress", "plan", folder, "--experts", str(count), "-o", file, "--json"]
            found = peaks_of(command)
            del found["stdout"]
            rows.append({"stage": f"plan {count}", "command": command[3:], **found})
        return rows

    def prune(self) -> list[dict[str, Any]]:
        """Prune to both counts; the folders go again."""
        rows = []
        for count in self.counts:
            out = self.runs / f"pruned-{count}"
            arguments = ["prune", str(self.checkpoint), "--plan", self._plan(count), "-o", str(out), "--force"]
            row = run_stage(f"prune {count}", arguments, self.runs, self.checkpoint)
            rows.append(row | {"output_bytes": folder_bytes(out)})
            self._drop(out)
        return rows

    def quantize(self) -> list[dict[str, Any]]:
        """Some pieces, or all; after some of them one more with --resume."""
        count, out, limit = self.given.quantize_experts, self.runs / "quantized", self.given.max_pieces
        arguments = ["quantize", str(self.checkpoint), "-o", str(out), *self.text, *self.machine]
        if count != self.experts:
            arguments += ["--plan", self._plan(count)]
        shutil.rmtree(partial_folder(out), ignore_errors=True)
        pieces = ["--max-pieces", str(limit)] if limit else []
        first = run_stage("quantize", [*arguments, "--force", *pieces], self.runs, self.checkpoint)
        first |= {"experts": count}
        if first["result"]["finished"]:
            tokens = self.given.tokens * self.config["num_experts_per_tok"]
            self._drop(out)
            return [first | {"solved_experts": count, "solved_tokens": tokens, "fresh": True}]
        solved, before = solved_experts(out), pieces_on_disk(out)
        again = [*arguments, "--resume", "--max-pieces", "1"]
        second = run_stage("quantize --resume", again, self.runs, self.checkpoint)
        if second["result"]["finished"]:
            raise SystemExit("--max-pieces left less than two pieces to be done; give a smaller number.")
        after, all_solved = pieces_on_disk(out), solved_experts(out)
        kept = all(after.get(name) == written for name, written in before.items())
        if not kept or second["result"]["pieces_done"] != first["result"]["pieces_done"] + 1:
            raise SystemExit("--resume did not go on from the finished pieces.")
        new = {piece: experts for piece, experts in all_solved.items() if piece not in solved}
        self._drop(partial_folder(out))
        # A layer that was begun before also reads what is done and runs it once more: its seconds are not of one run.
        second |= {"experts": count, "pieces_kept": len(before), "fresh": not solved}
        return [first | _solved(solved) | {"fresh": bool(solved)}, second | _solved(new)]

    def _plan(self, count: int) -> str:
        file = self.plan_file(count)
        if not file.is_file():
            raise SystemExit(f"{file} is not there; run the stage profile first, with --stages profile.")
        return str(file)

    def _drop(self, folder: Path) -> None:
        if not self.given.keep:
            shutil.rmtree(folder, ignore_errors=True)


def _solved(pieces: Mapping[str, Mapping[str, int]]) -> dict[str, int]:
    tokens = [count for experts in pieces.values() for count in experts.values()]
    return {"solved_experts": len(tokens), "solved_tokens": sum(tokens)}


def layer_terms(row: Mapping[str, Any], report: Mapping[str, Any]) -> list[Term]:
    """The whole MoE layer of `quantize`, projected from the experts that were solved."""
    config, options, layer = report["config"], report["options"], layer_of(report["config"], MOE_LAYER)
    tokens, window = options["tokens"], options["window"]
    measured = Work(tokens=tokens, window=window, experts=row["solved_experts"], routed=row["solved_tokens"])
    wanted = Work(tokens=tokens, window=window, experts=row["experts"], routed=tokens * config["num_experts_per_tok"])
    return project_quantize(by_phase(row["timings"]["rows"], MOE_LAYER), layer, measured, wanted, report["rates"])


def print_report(report: Mapping[str, Any]) -> None:
    """All tables."""
    rates = report["rates"]
    read = rates["read_bytes_per_second"]
    print(
        f"\n{report['machine']['device']}: {rates['fp32_flops'] / 1e9:.0f} GFLOP/s in fp32, "
        f"{rates['bf16_flops'] / 1e9:.0f} in bf16; the disk reads "
        f"{f'{read / 1e6:.0f} MB/s' if read else '(too little to time it)'} and writes "
        f"{rates['write_bytes_per_second'] / 1e6:.0f} MB/s\n"
    )
    stages = [
        (
            row["stage"],
            f"{row['wall_seconds']:.1f}",
            f"{row['peak_rss_mib']:.0f}",
            f"{row['peak_anonymous_mib']:.0f}",
            f"{row.get('timings', {}).get('peak_device_bytes', 0) / 2**20:.0f}",
        )
        for row in report["rows"]
    ]
    print(table(("stage", "seconds", "peak RSS MiB", "anonymous MiB", "GPU MiB"), stages))
    for row in report["rows"]:
        if "timings" in row:
            for layer in dict.fromkeys(entry["layer"] for entry in row["timings"]["rows"]):
                print_layer(row, layer, report)
    peak = max(row["peak_rss_mib"] for row in report["rows"])
    if not report["options"]["small"]:
        print(f"\ngoal of at most {GOAL_RSS_MIB:.0f} MiB: {'met' if peak <= GOAL_RSS_MIB else 'missed'} ({peak:.0f})")


def print_layer(row: Mapping[str, Any], layer: int | None, report: Mapping[str, Any]) -> None:
    """One stage's phases in one layer."""
    entries = by_phase(row["timings"]["rows"], layer)
    solving = layer == MOE_LAYER and row.get("fresh", False)
    terms = {term.name: term for term in layer_terms(row, report)} if solving else {}
    experts = row["solved_experts"] if solving else 0
    lines = []
    for name, entry in entries.items():
        seconds, term = entry["seconds"], terms.get(name)
        line = [f"{name} (beside)" if entry["background"] else name, f"{seconds:.2f}"]
        if solving:
            line += [f"{seconds / experts:.3f}", human(term.low, term.high) if term is not None else ""]
        lines.append([*line, *_speeds(name, entry, report["rates"])])
    spent = sum(entry["seconds"] for entry in entries.values() if not entry["background"])
    last = ["all", f"{spent:.2f}"]
    if solving:
        low, high = total(terms.values())
        last += [f"{spent / experts:.3f}", human(low, high)]
    lines.append([*last, "", "", "", ""])
    what = "outside of layers" if layer is None else f"{'MoE' if layer == MOE_LAYER else 'dense'} layer {layer}"
    done = f"; {experts} of {row['experts']} experts" if solving else ""
    print(f"\n{row['stage']}, {what}{done}")
    columns = ["per expert", f"{row['experts']} experts, projected"] if solving else []
    print(table(["phase", "seconds", *columns, "GFLOP/s", "of matmul", "MB/s", "of disk"], lines))
    if solving and report["options"]["tokens"] == GOAL_TOKENS and not report["options"]["small"]:
        held = "met" if total(terms.values())[1] < GOAL_SECONDS else "missed"
        print(f"goal of {GOAL_SECONDS:.0f} s for a layer of {GOAL_TOKENS:,} tokens: {held}")


def _speeds(name: str, entry: Mapping[str, Any], rates: Mapping[str, Any]) -> list[str]:
    seconds, found = entry["seconds"] or 1e-9, []
    rate = rates["forward_flops"] if name == "forward" else rates["fp32_flops"]
    speed = entry["flops"] / seconds
    found += [f"{speed / 1e9:.1f}", f"{speed / rate:.0%}"] if entry["flops"] else ["", ""]
    reading = name.startswith("read") or name == "load"
    disk = rates["read_bytes_per_second"] if reading else rates["write_bytes_per_second"]
    moved = entry["bytes"] / seconds
    share = f"{moved / disk:.0%}" if disk else ""
    return found + ([f"{moved / 1e6:.0f}", share] if entry["bytes"] else ["", ""])


def device_of(name: str) -> torch.device:
    """`auto` takes CUDA where it is there."""
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)


def device_name(device: torch.device) -> str:
    """What the machine is called: the GPU, or the processor as the system names it."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text().splitlines() if facts.is_file() else []
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{model}, {os.cpu_count()} cores"


def earlier(file: Path, options: Mapping[str, Any], stages: Sequence[str]) -> list[dict[str, Any]]:
    """Rows of an earlier call with the same options, but those of the stages that run now."""
    if set(stages) == set(STAGES) or not file.is_file():
        return []
    before = json.loads(file.read_text())
    if before.get("options") != options:
        print(f"{file} is of a run with other options; its figures go")
        return []
    return [row for row in before["rows"] if _stage_of(row) not in stages]


def _stage_of(row: Mapping[str, Any]) -> str:
    name = row["stage"].split()[0]
    return "profile" if name == "plan" else str(name)


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, metavar="FOLDER", help="the checkpoint, made or there")
    parser.add_argument("--vocab", type=int, default=2048, help="rows of embeddings and lm_head (default 2048)")
    parser.add_argument("--full-vocab", action="store_true", help="R1's 129,280 rows: 3.7 GB more")
    parser.add_argument("--device", default="cpu", help="auto, cpu or cuda (default cpu)")
    parser.add_argument("--tokens", type=int, help="calibration tokens (default 16384)")
    parser.add_argument("--window", type=int, help="tokens per sequence (default 512)")
    parser.add_argument("--max-memory", default="5GiB", help="as moepress' option (default 5GiB)")
    parser.add_argument("--max-pieces", type=int, help="pieces that quantize makes at first, 0 for all (default 3)")
    parser.add_argument("--quantize-experts", type=int, help="experts that stay: 192 (default), 128, or 256 for all")
    parser.add_argument("--stages", default=",".join(STAGES), help=f"some of {','.join(STAGES)} (default: all)")
    parser.add_argument("--keep", action="store_true", help="leave the pruned and quantized folders")
    parser.add_argument("--small", action="store_true", help="a tiny R1")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the figures go")
    given = parser.parse_args()
    given.work = given.work.resolve()
    named = given.stages.split(",")
    given.stages = [stage for stage in STAGES if stage in named]
    defaults = (("tokens", 1024, 16384), ("window", 64, 512), ("max_pieces", 1, 3), ("quantize_experts", 24, 192))
    for name, small, wide in defaults:
        if getattr(given, name) is None:
            setattr(given, name, small if given.small else wide)
    experts = SMALL_EXPERTS if given.small else 256
    if given.quantize_experts not in (experts, experts * 3 // 4, experts // 2):
        parser.error(f"--quantize-experts is {experts}, {experts * 3 // 4} or {experts // 2}")
    if not set(named) <= set(STAGES):
        parser.error(f"--stages is some of {','.join(STAGES)}")
    return given


def main() -> None:
    given = parsed()
    config = checkpoint_config(given)
    bench = Bench(given, config)
    names = ("small", "device", "tokens", "window", "max_memory", "max_pieces", "quantize_experts")
    data = "shared" if texts("train") else "embedded"
    options = {name: getattr(given, name) for name in names} | {"vocab": config["vocab_size"], "data": data}
    bench.runs.mkdir(parents=True, exist_ok=True)
    make_checkpoint(given.work, config)
    device = device_of(given.device)
    name = "r1_layer_cuda.json" if device.type == "cuda" and not given.small else "r1_layer.json"
    file = given.json or (bench.runs if given.small else RESULTS) / name
    facts: dict[str, Any] = {
        "options": options,
        "config": config,
        "checkpoint_bytes": folder_bytes(given.work),
        "rates": measure_rates(given.work, bench.runs, device, small=given.small),
    }
    rows = earlier(file, options, given.stages)
    for stage in given.stages:
        rows += getattr(bench, stage)()
        rows.sort(key=lambda row: STAGES.index(_stage_of(row)))
        # After every stage, for a later one may fail after an hour.
        about = machine() | {"model": given.work.name, "data": data, "device": device_name(device)}
        report = {"machine": about, **facts, "rows": rows}
        file.write_text(json.dumps(report, indent=2) + "\n")
    print_report(report)


if __name__ == "__main__":
    main()
